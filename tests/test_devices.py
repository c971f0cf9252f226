"Devices that nobody has here: whole kernels, no float64, random numbers, clocks and memory of their own. What stays in a process has one to itself."
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.utils._pytree import tree_map_only
from fasterfold import cost, state as keeping
from fasterfold.cost import compare,peak_memory
from fasterfold.proof import run_as
from fasterfold.trace import trace
from helpers import *

def _alone(call, args):
    torch.set_num_threads(1)
    return json.loads(json.dumps(globals()[call](*args)))

def child(call, *args):
    "What the function `call` of this module returns in a process of its own."
    context = get_context('forkserver')
    context.set_forkserver_preload([__name__,'test_models','learners']) # what takes longest is to import these, once for all
    with ProcessPoolExecutor(1, context) as pool: return pool.submit(_alone, call, args).result()

def model_of(name):
    import test_models
    make,draw = (test_models.TABLE | test_models.SMALL)[name][0]
    torch.manual_seed(0)
    return randomize_norms(make()),draw()

# ---- whole kernels

LEARNERS = 'vision_learner','unet_learner','tabular_learner','xresnet18'
OTHERS = 'resnet26d','levit_128','mobilevit_xxs','botnet26t_256','xcit_nano_12_p16_224','shufflenet_v2_x1_0','googlenet'

def folds_whole(whole):
    "Plans and operations of models, and which kernels ran for the whole."
    ran,lib = set(),None
    if whole:
        import devices
        def kernel(op):
            def _f(*args, **kwargs):
                ran.add(op.__name__)
                return op._op_dk(devices.COMPOSITE, *args, **kwargs)
            return _f
        lib = devices.whole(devices.overridden(), run=kernel)
    res = {}
    for name in LEARNERS+OTHERS:
        (model,sample),folder = model_of(name),BN_Folder()
        assert trace(model, sample).parted==whole
        if name in LEARNERS: check_fold(model, folder.fold(model, sample), sample)
        res[name] = str(folder.result if name in LEARNERS else folder.plan(model, sample))
    return dict(plans=res, ran=sorted(ran), lib=lib is not None)

def test_composites_that_run_whole_fold_the_same():
    "Every composite operation for which a backend of PyTorch has a kernel of its own, as MPS has for `linear` and `max_pool2d`."
    plain,whole = folds_whole(False),child('folds_whole', True)
    assert {'linear.default','max_pool2d.default','matmul.default','reshape.default','chunk.default'} <= {*whole['ran']}
    assert plain['plans']==whole['plans'] and plain['ran']==[]
    assert whole['plans']['vision_learner'].startswith('22 of 22')

def test_decompositions_in_python_change_nothing():
    "Some take batch normalizations apart, once something has imported them."
    import torch._decomp
    assert torch.ops.aten.native_batch_norm.default.py_kernels
    assert BN_Folder().plan(*model_of('vision_learner')).summary=='22 of 22 norms fold'

class Linears(nn.Sequential):
    def __init__(self, n=3): super().__init__(*[m for _ in range(n) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())])

@pytest.fixture
def lib():
    with torch.library._scoped_library('aten', 'IMPL') as lib: yield lib

def test_inference_mode():
    "Where nothing records gradients, all composites arrive whole."
    net,x = randomize_norms(Linears()),torch.randn(4, 16)
    names,plain = [o.name for o in trace(net, x).ops],BN_Folder().plan(net, x)
    net.forward = torch.inference_mode()(net.forward)
    assert [o.name for o in trace(net, x).ops]==names and str(BN_Folder().plan(net, x))==str(plain)

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16])
def test_whole_kernel_that_rounds_otherwise(lib, dtype):
    "The parts in the trace are not what the model returns: next to them it would look as if it returned something else each time."
    def short(t): return t if t.dtype==torch.float64 else t.bfloat16().float()
    def fast(x, w, b): return (short(x)@short(w).t()+b).to(x.dtype)
    lib.impl('linear', fast, 'CPU')
    net,x = randomize_norms(Linears()).to(dtype),torch.randn(32, 16).to(dtype)
    parts = trace(net, x)
    assert torch.equal(parts.results[0], run(net, x)[0])
    folder = BN_Folder()
    folder.fold(net, x)
    assert len(folder.result.folded)==3 and folder.result.proof.ok

def test_part_that_a_device_lacks(lib):
    "Then the whole stays what it is, and unknown."
    def never(*args, **kwargs): raise NotImplementedError('no such kernel')
    lib.impl('linear', lambda x,w,b: (x[:,None]*w).sum(-1)+b, 'CPU')
    lib.impl('addmm', never, 'CPU')
    net,x,folder = randomize_norms(Linears(1)),torch.randn(4, 16),BN_Folder()
    ref = run(net, x)
    assert 'linear' in [o.name for o in trace(net, x).ops]
    new = folder.fold(net, x)
    assert '(Linear)' in reason(folder.result, '1') and torch.equal(run(new, x)[0], ref[0])

def test_whole_views_and_writes(lib):
    "A whole operation may return a view, several, or what it was given, and something may write there."
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    ops = torch.ops.aten.reshape.default,torch.ops.aten.narrow.default,torch.ops.aten.chunk.default,torch.ops.aten.matmul.out,torch.ops.aten.linear.default
    def f(m, x):
        y = m.norm(m.fc(input=x).reshape(-1, 4))
        a,b = y.chunk(2, 1)
        y.narrow(1, 0, 2).mul_(2)
        return torch.matmul(a, b.t(), out=torch.empty(0)), y.relu_()
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc,self.norm = nn.Linear(3, 8),nn.BatchNorm1d(4)
        forward = f
    net,x = randomize_norms(Net()),torch.randn(5, 3)
    names,plain,refs = [o.name for o in trace(net, x).ops],BN_Folder().plan(net, x),run(net, x)
    for op in ops: lib.impl(op.__name__.removesuffix('.default'), partial(op._op_dk, composite), 'CPU')
    g = trace(net, x)
    assert [o.name for o in g.ops]==names and str(BN_Folder().plan(net, x))==str(plain)
    assert all(map(torch.equal, g.results, refs)) and g.parted

@pytest.mark.filterwarnings('ignore:.*nested tensors')
def test_nested_tensors_stay_whole():
    class Net(nn.Sequential):
        def forward(self, x): return super().forward(x).to_padded_tensor(0.)
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2,3)])
    assert [o.name for o in trace(Net(nn.Linear(4, 4)), x).ops][0]=='nested_linear'

@pytest.mark.filterwarnings('ignore:.*nested tensors')
def test_model_with_a_faster_way_that_it_leaves_when_watched(lib):
    "What it returns then is compared with what it returns when nobody watches, with the same kernels."
    from test_models import Ragged
    def kernel(x, w, b=None): return torch.ops.aten.linear.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, x, w, b)
    lib.impl('linear', kernel, 'CPU')
    net,x = randomize_norms(Ragged()),torch.randint(1, 9, (3, 7)).where(torch.arange(7)<torch.tensor([[7],[4],[2]]), 0)
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert names_of(folder.result.folded)==['norm','last'] and not folder.result.kept
    assert distance(run(new, x), run(net, x))<1e-5

# ---- an accelerator without float64

def on(x): return tree_map_only(torch.Tensor, lambda t: t.to('npu'), x)
def halved(x): return tree_map_only(torch.Tensor, lambda t: t.half() if t.is_floating_point() else t, x)

def fold_on_npu():
    "Plans on the CPU and on the accelerator, in full and in half precision, and what proved them."
    import devices
    lib,res = devices.npu(),{}
    for name in ('vision_learner','tabular_learner','mobilevit_xxs'):
        (model,sample),folder = model_of(name),BN_Folder()
        plain,double = BN_Folder().plan(model, sample),run(to_double(model), Sample.of(sample).to(torch.float64))
        model,sample = model.to('npu'),on(sample)
        assert trace(model, sample).parted
        exact = run_as(model, sample)
        was = [(k,v,v.cpu().clone()) for k,v in model.state_dict(keep_vars=True).items()]
        new = folder.fold(model, sample, inplace=True)
        assert new is model and {p.device.type for p in model.parameters()}=={'npu'}
        assert [o.reason for o in folder.result.kept]==[o.reason for o in plain.kept]
        folder.undo()
        now = model.state_dict(keep_vars=True)
        assert [*now]==[k for k,*_ in was] and all(now[k] is v and torch.equal(v.cpu(), t) for k,v,t in was)
        half = BN_Folder()
        half.fold(model.half(), halved(sample))
        res[name] = [str(o.result).splitlines()[0] for o in (folder,half)],str(plain).splitlines()[0],half.result.proof.exact,distance(exact, double)
    return dict(res=res, refused=torch.npu.refused, lib=lib is not None)

class Noisy(nn.Module):
    "Draws random numbers where its weights are, and looks whether its input is there."
    def __init__(self):
        super().__init__()
        self.net = Linears(2)
    def forward(self, x):
        device = self.net[0].weight.device
        assert x.device==device
        return self.net(x)+0*torch.rand(x.shape, device=device)*torch.ones(1).to(device)

class Branches(nn.Module):
    "Two layers that are one, and know it, as RepVGG's."
    def __init__(self):
        super().__init__()
        self.a,self.b,self.norm,self.one = nn.Linear(16, 8),nn.Linear(16, 8),nn.BatchNorm1d(8),None
    def forward(self, x): return self.norm(self.one(x) if self.one else self.a(x)+self.b(x))
    def reparameterize(self):
        self.one,a,b = nn.Linear(16, 8, device=self.a.weight.device),self.a,self.b
        for k in ('weight','bias'): getattr(self.one, k).data = (getattr(a, k)+getattr(b, k)).data
        del self.a,self.b

def other_uses_of_npu():
    "What else computes in float64, keeps random numbers, reads a clock or asks for memory."
    import devices
    from fasterfold.report import report
    lib,waits,read = devices.npu(),[],keeping.default_timer
    def timer():
        waits.append(torch.npu.waited==torch.npu.ran)
        return read()
    keeping.default_timer = timer
    net,x,folder = randomize_norms(Noisy()).to('npu'),torch.randn(4, 16).to('npu'),BN_Folder()
    before = torch.npu.generator.get_state()
    new = folder.fold(net, x)
    kept = torch.equal(torch.npu.generator.get_state(), before)
    res = report(net, new, folder.result, {'batch of 4': x}, seconds=.02)
    merged = BN_Folder(merge_branches=True)
    one = merged.fold(randomize_norms(nn.Sequential(Branches())).to('npu'), x)[0]
    exact, = run_as(net, x)
    torch.set_default_dtype(torch.float64) # of what is made up on the CPU
    assert {t.device.type for t in Sample.of(None, Linears(1).float().to('npu')).tensors}=={'npu'}
    torch.set_default_dtype(torch.float32)
    off = [Sample.of(t).jittered(1e-3, 0).args[0].cpu() for t in (x,x.cpu())]
    return dict(kept=kept, off=torch.equal(*off), timed=len(waits), waited=all(waits),
        memory=res.memory['batch of 4'], weights=sum(p.nbytes for p in net.parameters()), own=res.rounding.original,
        folded=res.rounding.folded, exact=[str(exact.dtype),exact.device.type], merged=merged.result.summary, one=one.one is not None,
        learner=learner_on_npu(), refused=torch.npu.refused, lib=lib is not None)

def learner_on_npu():
    "`Learner.fold` where the model and its data are on the accelerator."
    import learners, tempfile
    from fasterfold import learner
    learn = learners.plain(tempfile.mkdtemp())
    randomize_norms(learn.model)
    learn.dls.to(torch.device('npu'))
    learn.model.to('npu')
    with learn.no_bar(), learn.no_logging():
        rep = learner.Learner.fold(learn)
        learn.get_preds()
    return dict(norms=rep.plan.summary, metrics=rep.metrics, own=rep.rounding.original, shown=str(rep))

npu = pytest.mark.skipif(not hasattr(torch.utils.backend_registration, '_setup_privateuseone_for_python_backend'),
    reason='PyTorch knows no accelerators written in Python')

@npu
def test_accelerator_without_float64():
    "The float64 proof is a real one there, and no float64 tensor is made on it but the one that asks."
    out = child('fold_on_npu')
    for folds,plain,exact,off in out['res'].values():
        assert folds==[plain]*2
        assert exact<1e-12 and off<1e-12
    assert out['refused']==1

@npu
def test_all_else_on_an_accelerator():
    out = child('other_uses_of_npu')
    assert out['kept'] and out['waited'] and out['timed']>4
    assert out['off'] and out['exact']==['torch.float64','cpu'] and 0<out['own']<1e-4 and 0<out['folded']<1e-4
    before,after = out['memory']
    assert out['weights']<after<before<20*out['weights']
    assert out['merged']=='1 of 1 norms fold' and out['one']
    learn = out['learner']
    assert learn['norms']=='3 of 3 norms fold' and 'npu' in learn['shown'] and learn['own'] is not None
    assert all(a==pytest.approx(b, rel=1e-4) for a,b in learn['metrics'].values())
    assert out['refused']==1

# ---- what is asked of an accelerator, whichever it is

class Module:
    "The module of an accelerator, which notes what is asked of it; its random numbers have another state each time."
    def __init__(self, *names, on=True):
        self.log,self.on = [],on
        for n in names: setattr(self, n, partial(self.note, n))
    def is_initialized(self): return self.on
    def is_available(self): return True
    def note(self, name, *args):
        self.log.append((name,*args))
        return [torch.tensor([len(self.log)])] if name.startswith('get') else 5

class Draws(Linears):
    def forward(self, x):
        torch.rand(1)
        return super().forward(x)

def put(monkeypatch, module):
    "Let PyTorch have `module` as that of its accelerator."
    there = SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type='gpu'))
    monkeypatch.setattr(torch, 'accelerator', there, raising=False)
    monkeypatch.setattr(torch, 'gpu', module, raising=False)
    return module

RNG = 'get_rng_state','set_rng_state'
ALL = tuple(f'{n}_all' for n in RNG)

@pytest.mark.parametrize('names,kept', [(RNG,RNG),(RNG+ALL,ALL),((),())])
def test_random_numbers_of_an_accelerator_are_kept(monkeypatch, names, kept):
    "Those of all its devices if it has several."
    gpu = put(monkeypatch, Module(*names))
    run(Linears(1), torch.randn(2, 16))
    assert {n for n,*_ in gpu.log}<={*kept[:1]} # it draws nothing
    gpu.log.clear()
    run(Draws(1), torch.randn(2, 16))
    assert (gpu.log[-1][0],*gpu.log[-1][1])==(kept[1],1) if kept else not gpu.log

def test_accelerator_that_nobody_uses(monkeypatch):
    "It is not asked for anything, which might start it."
    gpu = put(monkeypatch, Module(*RNG, *ALL, 'synchronize', on=False))
    x,folder = torch.randn(2, 16),BN_Folder()
    compare(dict(a=Linears(1), b=folder.fold(Linears(1), x)), x, .01)
    assert not gpu.log and keeping.accelerator() is None

@pytest.mark.parametrize('kind', ['cuda','mps'])
def test_accelerators_of_older_torch(monkeypatch, kind):
    monkeypatch.delattr(torch, 'accelerator', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: kind=='cuda')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: kind=='mps')
    gpu = Module(*RNG)
    monkeypatch.setattr(torch, kind, gpu)
    run(Draws(1), torch.randn(2, 16))
    assert keeping.accelerator() is gpu and (gpu.log[0],gpu.log[-1][0])==((RNG[0],),RNG[1])

@pytest.mark.parametrize('device,asked', [('cpu',()),('mps',()),('cuda:1',(torch.device('cuda:1'),))])
def test_clock_waits(monkeypatch, device, asked):
    "For the device where something runs, which need not be the current one; on the CPU for whatever is in use."
    gpu = put(monkeypatch, Module('synchronize'))
    for k in ('cuda','mps'): monkeypatch.setattr(torch, k, gpu)
    keeping.clock(device)
    assert gpu.log==[('synchronize',*asked)]

@pytest.mark.parametrize('timed', [lambda: compare(dict(m=Linears(1)), torch.randn(2, 16), .01),
    lambda: BN_Folder(channels_last='auto').fold(nn.Conv2d(2, 2, 3), torch.randn(2, 2, 9, 9))])
def test_every_time_is_read_after_waiting(monkeypatch, timed):
    gpu = put(monkeypatch, Module('synchronize'))
    read = keeping.default_timer
    def timer():
        gpu.log.append('read')
        return read()
    monkeypatch.setattr(keeping, 'default_timer', timer)
    timed()
    assert gpu.log.count('read')>4 and gpu.log==[('synchronize',),'read']*gpu.log.count('read')

METERS = 'memory_allocated','max_memory_allocated','reset_peak_memory_stats'

def test_memory_wherever_it_is_told(monkeypatch):
    "By the module of a device, or for all accelerators; not where one is missing, fails, or knows of no memory although there is a tensor."
    def meter(own, all_):
        monkeypatch.setattr(torch, 'xpu', own)
        monkeypatch.setattr(torch, 'accelerator', all_, raising=False)
        return cost._meter(torch.device('xpu'))
    def fails(*args): raise RuntimeError('no allocator')
    full,some,broken,empty = Module(*METERS),Module(METERS[0]),Module(*METERS),Module(*METERS)
    broken.memory_allocated,empty.memory_allocated = fails,lambda *args: 0
    assert meter(full, some) is full
    for own in (some,broken,empty):
        assert meter(own, full) is full
        for other in (some,broken,empty): assert meter(own, other) is None
    assert cost._meter(torch.device('cpu')) is None and peak_memory(Linears(1), torch.randn(2, 16)) is None
