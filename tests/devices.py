"""Devices that nobody has here, made of the CPU: one with kernels of its own for composite operations, and a whole accelerator that has no float64.

What is registered stays for as long as the process lives, so each is for a process of its own."""
import ctypes
from ctypes import POINTER, Structure, c_int, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from functools import partial
from pathlib import Path
import torch, torchgen, yaml
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

# ---- kernels for the whole

def overridden():
    "Composite operations for which some backend of PyTorch has a kernel of its own."
    path = Path(torchgen.__file__).parent/'packaged'/'ATen'/'native'/'native_functions.yaml'
    for f in yaml.load(path.read_text(), Loader=yaml.CSafeLoader):
        name = f['func'].partition('(')[0]
        ours = torch._C._dispatch_has_kernel_for_dispatch_key(f'aten::{name}', COMPOSITE)
        if ours and set(', '.join(f.get('dispatch') or {}).split(', '))-{'','CompositeImplicitAutograd'}: yield name

def op_of(name):
    packet,_,overload = name.partition('.')
    return getattr(getattr(torch.ops.aten, packet), overload or 'default')

def whole(
    names, # Of operations
    key='CPU', # Of the backend
    run=lambda op: partial(op._op_dk, COMPOSITE), # Makes a kernel for one
):
    "Register a kernel for each of `names` as a whole. The library that holds them."
    lib = torch.library.Library('aten', 'IMPL')
    for name in names:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f'aten::{name}', key): lib.impl(name, run(op_of(name)), key)
    return lib

# ---- an accelerator

class _Device(Structure): _fields_ = [('type',c_int),('id',c_int)]
class _Type(Structure): _fields_ = [('code',c_uint8),('bits',c_uint8),('lanes',c_uint16)]
class _DLTensor(Structure):
    _fields_ = [('data',c_void_p),('device',_Device),('ndim',c_int),('dtype',_Type),('shape',POINTER(c_int64)),('strides',POINTER(c_int64)),('offset',c_uint64)]
class _Managed(Structure): pass
_Deleter = ctypes.CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = [('tensor',_DLTensor),('context',c_void_p),('deleter',_Deleter)]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype,_capsule.argtypes = ctypes.py_object,[c_void_p,ctypes.c_char_p,c_void_p]
_codes = {torch.bool:6, torch.uint8:1, torch.float16:2, torch.float32:2, torch.bfloat16:4, **dict.fromkeys((torch.int8,torch.int16,torch.int32,torch.int64), 0)}
_held = {}

@_Deleter
def _free(m):
    _,_,_,t = _held.pop(ctypes.addressof(m.contents))
    if t.is_cpu: torch.npu.take(-t.nbytes)

def seen_on(
    kind, # 1 is the CPU, 12 the accelerator
    t, # A tensor of the other
):
    "The memory of `t` as a tensor of a device."
    shape,strides = (c_int64*t.dim())(*t.shape),(c_int64*t.dim())(*t.stride())
    at = t.data_ptr() if t.numel() else 0
    m = _Managed(_DLTensor(at, _Device(kind, 0), t.dim(), _Type(_codes[t.dtype], 8*t.element_size(), 1), shape, strides, 0), None, _free)
    _held[ctypes.addressof(m)] = m,shape,strides,t
    if t.is_cpu: torch.npu.take(t.nbytes)
    return torch.utils.dlpack.from_dlpack(_capsule(ctypes.addressof(m), b'dltensor', None))

class Npu:
    "The module of the accelerator: `torch.npu`."
    ran,waited,refused = 0,0,0 # operations, those done when it was last waited for, and attempts at float64
    taken,peak = 0,0 # bytes, now and at most
    def __init__(self): self.on,self.generator = False,torch.Generator()
    def is_available(self): return True
    def is_initialized(self): return self.on
    def device_count(self): return 1
    def current_device(self): return 0
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed): self.generator.manual_seed(seed)
    def get_rng_state(self, device=None): return self.generator.get_state()
    def set_rng_state(self, state, device=None): self.generator.set_state(state)
    def synchronize(self, device=None): self.waited = self.ran
    def memory_allocated(self, device=None): return self.taken
    def max_memory_allocated(self, device=None): return self.peak
    def reset_peak_memory_stats(self, device=None): self.peak = self.taken
    def take(self, n):
        self.taken += n
        self.peak = max(self.peak, self.taken)

def _refuse(args):
    for a in tree_flatten(args)[0]:
        wide = a is torch.float64 or isinstance(a, Tensor) and a.dtype is torch.float64 and (a.dim() or not a.is_cpu)
        if wide:
            torch.npu.refused += 1
            raise TypeError("float64 on a device that has none")

_view = partial(torch.ops.aten.as_strided.default._op_dk, torch._C.DispatchKey.CPU) # it only makes another tensor of a storage
_set = partial(torch.ops.aten.set_.source_Storage_storage_offset._op_dk, torch._C.DispatchKey.CPU)
def _attention(q, k, v, mask=None, dropout=0., causal=False, debug=False, scale=None):
    e = torch.empty(0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale),e,e,e,1,1,e,e,e
_instead = dict( # of what the CPU has no kernel for
    _copy_from=lambda t,out,non_blocking=False: out.copy_(t),
    _fused_sdp_choice=lambda *args,**kwargs: torch.nn.attention.SDPBackend.OVERRIDEABLE.value,
    _scaled_dot_product_fused_attention_overrideable=_attention,
    convolution_overrideable=torch.ops.aten.convolution.default)

def _run(op, *args, **kwargs):
    "Carry out `op` of the accelerator, in the memory that it shares with the CPU."
    _refuse((args,kwargs))
    torch.npu.on = True
    torch.npu.ran += 1
    if op is torch.ops.aten.as_strided.default: return _view(*args, **kwargs)
    given = {} # storage of a tensor of the CPU to that tensor and the accelerator's
    def here(t):
        if t.is_cpu: return t
        c = seen_on(1, t) if t.numel() else torch.empty(t.shape, dtype=t.dtype)
        given[c.untyped_storage()._cdata] = c,t
        return c
    def there(r):
        c,t = given.get(r.untyped_storage()._cdata, (None,None))
        if t is None: return seen_on(12, r)
        if t.numel()==0<c.numel(): _set(t, (n:=seen_on(12, c)).untyped_storage(), 0, n.shape, n.stride()) # `out` has grown
        return t if r is c else _view(t, r.shape, r.stride(), t.storage_offset()+r.storage_offset())
    args,kwargs = tree_map_only(torch.device, lambda d: torch.device('cpu'), tree_map_only(Tensor, here, (args,kwargs)))
    if torch.Tag.nondeterministic_seeded in op.tags and any(a.name=='generator' for a in op._schema.arguments): kwargs['generator'] = torch.npu.generator
    f = _instead.get(op.__name__.removesuffix('.default'), op)
    if any(str(s.type)=='Tensor' and isinstance(a, (int,float)) for s,a in zip(op._schema.arguments, args)): f = op.overloadpacket # Python gets a number for what was one
    out = f(*args, **kwargs)
    _refuse(out)
    return tree_map_only(Tensor, there, out)

def _cloned(t, memo):
    "As `Tensor.__deepcopy__` does for MPS: there is no memory but that of tensors."
    if t.is_cpu: return _deepcopy(t, memo)
    if id(t) not in memo: memo[id(t)] = t.clone()
    return memo[id(t)]
_deepcopy = Tensor.__deepcopy__

def npu():
    "Make the accelerator `npu`: it runs whatever the CPU runs, in its memory, composites of other backends as a whole, and refuses float64."
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
    setup('npu', Npu())
    Tensor.__deepcopy__ = _cloned
    lib = torch.library.Library('_', 'IMPL')
    lib.fallback(_run, 'PrivateUse1')
    return lib,whole([*overridden(),*_instead], 'PrivateUse1', lambda op: partial(_run, op))
