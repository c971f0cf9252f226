"""Every rule in both directions, by brute force.

Each case is one ATen operation on small tensors of odd sizes, recorded as a trace records it. Maps that change along no dimension, along any single
one, or along all, with positive, negative and zero scales, with and without shifts, are pulled and pushed through it; whatever a rule does not block
is carried out with the operation itself, in float64, and must give exactly what the map says. So a rule that lets pass what algebra forbids fails
here, and so does a rule without a case, or one that blocks everything.
"""
import itertools
import pytest, torch, torchvision
from torch import nn
from fasterfold import rules
from fasterfold.affine import Affine
from fasterfold.rules import BESIDE,PULL,PUSH,Blocked,Context,pull_through,push_through
from fasterfold.trace import Tracer
from helpers import *

A,V = torch.ops.aten,getattr(torch.ops, torchvision.__name__)
CASES = {}
LATER = '_upsample_lanczos2d_aa', # operations that the oldest PyTorch does not have yet

class Arg:
    "A tensor argument: its shape, what it is made of, and whether it is a weight: it must be ('weight'), must not be ('plain'), or may be one ('any')."
    def __init__(self, *shape, make=torch.randn, role='any'): self.shape,self.make,self.role = shape,make,role
    def draw(self): return t if not (t:=self.make(self.shape)).is_floating_point() else t.double()

def T(*shape): return Arg(*shape)
def W(*shape): return Arg(*shape, role='weight')
def positive(*shape): return Arg(*shape, make=lambda s: torch.rand(s)+.5, role='weight')
def index(*shape): return Arg(*shape, make=lambda s: torch.randint(3, s), role='weight')
def written(*shape): return Arg(*shape, role='plain')
def masked(*shape): return Arg(*shape, make=lambda s: torch.randn(s).index_fill(0, torch.tensor(0), -torch.inf), role='plain') # the first row sees nothing

def case(func, *args, **kwargs):
    "Add an operation on `Arg`s and other arguments to `CASES`."
    name = func._schema.name.split('::')[-1].removesuffix('_')
    CASES.setdefault(name, []).append((func, args, kwargs))

x2,x3,x4,x5 = T(2,3),T(2,3,5),T(2,4,3,5),T(1,3,2,3,3)
each = (x2,x3,T(1,3,1,2),T(3))

# moves
for x in each:
    n = torch.Size(x.shape).numel()
    for to in ([n],[1,n],[*x.shape,1],[*x.shape[::-1]]):
        for f in (A.view.default,A._unsafe_view.default,A._reshape_copy.default): case(f, x, to)
        case(A._reshape_alias.default, x, to, torch.empty(to).stride())
    for f in ('clone','detach','alias','lift_fresh','squeeze','neg','relu','abs'): case(getattr(A, f).default, x)
    case(A._to_copy.default, x, dtype=torch.float64)
    case(A._to_copy.default, x, dtype=torch.int64)
    case(A.leaky_relu.default, x, .1)
    case(A.relu_.default, written(*x.shape))
    case(A.repeat.default, x, [2]*len(x.shape))
    case(A.repeat.default, x, [3,*[1]*len(x.shape)])
    case(A.expand.default, x, [2,*x.shape])
    for f in (A.mean.default,A.sum.default,A.max.default,A.min.default,A.median.default): case(f, x)
    for d in (-1,*range(len(x.shape))):
        case(A.squeeze.dim, x, d)
        case(A.unsqueeze.default, x, d)
        case(A.select.int, x, d, -1)
        case(A.select.int, x, d, 0)
        case(A.unbind.int, x, d)
        case(A.slice.Tensor, x, d, 0, 1)
        case(A.slice.Tensor, x, d, -2, 2**62, 1)
        case(A.slice.Tensor, x, d, 0, 2**62, 2)
        case(A.split.Tensor, x, 2, d)
        case(A.unsafe_split.Tensor, x, 1, d)
        case(A.split_with_sizes.default, x, [1,x.shape[d]-1] if x.shape[d]>1 else [1], d)
        case(A.flip.default, x, [d])
        case(A.roll.default, x, [1], [d])
        case(A.unfold.default, x, d, 1, 2)
        case(A.unfold.default, x, d, min(2, x.shape[d]), 1)
        for role in ('weight','plain'):
            for make in (lambda s,n=x.shape[d]: torch.arange(4)%n, lambda s,n=x.shape[d]: torch.randperm(n)[:2]):
                case(A.index_select.default, x, d, Arg(4, make=make, role=role))
                case(A.index.Tensor, x, [None]*(d%len(x.shape)) + [Arg(4, make=lambda s,f=make: f(s)-1, role=role)])
        case(A.cat.default, [x,T(*x.shape)], d)
        if x is x3: case(A.cat.default, [x,T(*[2 if k==d%len(x.shape) else n for k,n in enumerate(x.shape)]),x], d)
        case(A.stack.default, [x,T(*x.shape)], d)
        for keep in (True,False):
            for f in (A.mean.dim,A.sum.dim_IntList,A.amax.default,A.amin.default): case(f, x, [d], keep)
            for f in ('std','var','std_mean','var_mean'): case(getattr(A, f).correction, x, [d], correction=0, keepdim=keep)
            for f in (A.max.dim,A.min.dim,A.median.dim): case(f, x, d, keep)
case(A.index.Tensor, T(3,3,5), [index(4),index(4)])
case(A.index.Tensor, x3, [None,Arg(2,2, make=lambda s: torch.randint(3, s), role='weight')])
case(A.index.Tensor, x3, [None,Arg(3, make=lambda s: torch.tensor([True,False,True]), role='weight')])
for to in ([2,12,5],[2,2,2,15],[24,5],[2,4,15],[8,3,5]): case(A.view.default, x4, to)
for dims in itertools.permutations(range(3)): case(A.permute.default, x3, dims)
for d in ((0,1),(1,2),(-1,1)): case(A.transpose.int, x4, *d)
case(A.permute.default, x4, [0,2,3,1])
case(A.t.default, x2)
case(A.expand.default, T(2,3,1), [2,3,4])
case(A.expand.default, T(3,1), [2,-1,4])
case(A.repeat.default, T(2,1,3), [1,4,1])
case(A.flip.default, x3, [0,2])
case(A.roll.default, x3, [1,1], [0,2])
case(A.roll.default, x3, [1])
for keep in (True,False):
    for f in (A.mean.dim,A.sum.dim_IntList,A.amax.default,A.amin.default): case(f, x4, [2,3], keep)
    for f in ('std','var','std_mean','var_mean'): case(getattr(A, f).correction, x4, [2,-1], correction=1, keepdim=keep)
for f in ('std','var','std_mean','var_mean'): case(getattr(A, f).correction, x3)
case(A.pixel_shuffle.default, T(2,8,3,2), 2)
case(A.pixel_shuffle.default, T(2,9,1,2), 3)
case(A.pixel_unshuffle.default, T(1,2,4,6), 2)
case(A.channel_shuffle.default, T(2,6,3,1), 3)
case(A.channel_shuffle.default, T(1,4,2), 2)
case(A.copy.default, T(2,3,4), T(2,3,4))
case(A.copy.default, T(2,3,4), T(3,1))
case(A.copy_.default, written(2,3,4), T(2,3,4))

# windows
for pad,ceil,count in ((0,False,True),(1,False,True),(1,False,False),(1,True,False),(0,True,True)):
    case(A.avg_pool2d.default, T(2,3,5,6), [3,2], [2,1], [pad,pad], ceil, count)
    case(A.avg_pool3d.default, T(1,2,4,5,4), [2,3,2], [1,2,2], [pad]*3, ceil, count)
    case(A.max_pool2d_with_indices.default, T(2,3,5,6), [3,2], [2,1], [pad,pad], [1,1], ceil)
    case(A.max_pool3d_with_indices.default, T(1,2,4,5,4), [2,3,2], [1,2,2], [pad]*3, [1]*3, ceil)
case(A.avg_pool2d.default, T(2,3,4,4), [2,2], [2,2], [0,0], False, True, 3)
case(A.avg_pool2d.default, T(3,4,4), [2,2])
for n in (1,2,3):
    case(A._adaptive_avg_pool2d.default, x4, [n,n])
    case(A._adaptive_avg_pool3d.default, x5, [n,2,n])
    case(A.adaptive_max_pool2d.default, x4, [n,n])
    case(A.adaptive_max_pool3d.default, x5, [n,1,n])
case(A.fractional_max_pool2d.default, T(2,3,6,5), [2,2], [3,3], Arg(2,3,2, make=torch.rand, role='plain'))
for f in (A.upsample_nearest1d.default,A._upsample_nearest_exact1d.default): case(f, x3, [7])
for f in (A.upsample_nearest2d.default,A._upsample_nearest_exact2d.default): case(f, x4, [7,4])
for f in (A.upsample_nearest3d.default,A._upsample_nearest_exact3d.default): case(f, x5, [3,4,5])
case(A.upsample_nearest2d.vec, x4, None, [2.,2.])
for corners in (True,False):
    case(A.upsample_linear1d.default, x3, [7], corners)
    for f in (getattr(A, n).default for n in ('upsample_bilinear2d','upsample_bicubic2d','_upsample_bilinear2d_aa','_upsample_bicubic2d_aa',*(n for n in LATER if hasattr(A, n)))):
        for size in ([7,6],[2,3]): case(f, x4, size, corners)
    case(A.upsample_trilinear3d.default, x5, [3,4,5], corners)
    for mode in (0,1,2):
        for pad in (0,1,2):
            case(A.grid_sampler_2d.default, x4, Arg(2,3,2,2, make=lambda s: torch.rand(s)*3-1.5, role='plain'), mode, pad, corners)
            if mode<2: case(A.grid_sampler_3d.default, x5, Arg(1,2,3,2,3, make=lambda s: torch.rand(s)*3-1.5, role='plain'), mode, pad, corners)
for k,x in ((1,x3),(2,x4),(3,x5)):
    for kind in ('reflection','replication'): case(getattr(A, f'{kind}_pad{k}d').default, x, [1,0]*k)
for value in (0.,.5,-torch.inf):
    case(A.constant_pad_nd.default, x4, [1,2], value)
    case(A.constant_pad_nd.default, x4, [0,0,0,1,2,1], value)
    case(A.constant_pad_nd.default, x3, [1,-1], value)
    case(A.constant_pad_nd.default, x3, [0,0,-1,0], value)

# graphs: rows collected in zeros, some of them in the same place, some in none
def zeros(*shape): return Arg(*shape, make=torch.zeros, role='weight')
def places(*shape): return Arg(*shape, make=lambda s: torch.randint(3, s), role='plain')
for base in (zeros(4,3),W(4,3),T(4,3),written(4,3)):
    for f in (A.index_add.default,A.index_add_.default): case(f, base, 0, places(5), T(5,3))
    for f in (A.scatter_add.default,A.scatter_add_.default): case(f, base, 0, places(5,3), T(5,3))
    for how in ('sum','mean','amax','amin','prod'):
        for own in (True,False): case(A.scatter_reduce.two, base, 0, places(5,3), T(5,3), how, include_self=own)
case(A.index_add.default, zeros(2,4,3), -2, places(5), T(2,5,3), alpha=-2.)
case(A.scatter_add.default, zeros(4,4), 1, places(2,3), T(3,5)) # reads a part of it
case(A.scatter_add.default, zeros(3), 0, places(5), T(5))
for f in (A.zeros_like,A.ones_like): case(f.default, x3)
case(A.full_like.default, x3, 2.)
for f in (A.new_zeros,A.new_ones): case(f.default, x3, [4,5])
case(A.new_full.default, x3, [4,5], 2.)

# arithmetic
for y in (W(2,3,4),W(3,1),W(4),W(1,1,1),W(1)):
    for f in (A.add.Tensor,A.sub.Tensor,A.rsub.Tensor):
        for alpha in (1,-2.): case(f, T(2,3,4), y, alpha=alpha)
    case(A.mul.Tensor, T(2,3,4), y)
    case(A.div.Tensor, T(2,3,4), Arg(*y.shape, make=lambda s: torch.rand(s)+.5))
    case(A.mul.Tensor, y, T(2,3,4))
    case(A.add.Tensor, y, T(2,3,4))
    case(A.div.Tensor, Arg(*y.shape, make=torch.rand), Arg(2,3,4, make=lambda s: torch.rand(s)+.5))
case(A.add.Tensor, T(2,3,4), T(2,3,4), alpha=-1)
case(A.mul.Tensor, T(2,3,4), T(2,3,1))
case(A.mul.Tensor, T(2,1,4), T(2,3,1))
case(A.mul.Tensor, T(2,3,4), Arg(3,1, make=torch.zeros, role='weight'))
case(A.add_.Tensor, written(2,3,4), T(2,3,4))
case(A.mul_.Tensor, written(2,3,4), T(2,3,1))
for number in (2.,0.,-1):
    case(A.add.Scalar, x3, number)
    case(A.mul.Scalar, x3, number)
    case(A.rsub.Scalar, x3, number, 2)
    case(A.sub.Scalar, x3, number, -3)
case(A.div.Scalar, x3, -3.)
case(A.div.Tensor_mode, x3, Arg(3,1, make=lambda s: torch.rand(s)+.5), rounding_mode='floor')
for y in (T(2,3,4),T(3,1),W(4)):
    case(A.addcmul.default, T(2,3,4), T(2,3,4), y, value=-.5)
    case(A.addcmul.default, T(3,1), y, T(2,3,4))
case(A._prelu_kernel.default, x4, W(1,4,1,1))

# layers
for g,(k,stride,pad,dilation) in itertools.product((1,3), ((1,1,0,1),(3,1,1,1),(2,2,0,1),(3,1,0,1),(1,2,1,1),(3,1,2,2))):
    for bias in (W(6),None):
        case(A.convolution.default, T(2,3,5), W(6,3//g,k), bias, [stride], [pad], [dilation], False, [0], g)
        case(A.convolution.default, T(1,3,5,7), W(6,3//g,k,k), bias, [stride]*2, [pad]*2, [dilation]*2, False, [0,0], g)
        if k<3: case(A.convolution.default, T(1,3,3,2,3), W(6,3//g,k,k,k), bias, [stride]*3, [pad]*3, [dilation]*3, False, [0]*3, g)
        for extra in range(stride):
            case(A.convolution.default, T(2,3,5), W(3,6//g,k), bias, [stride], [pad], [dilation], True, [extra], g)
            case(A.convolution.default, T(1,3,3,4), W(3,6//g,k,k), bias, [stride]*2, [pad]*2, [dilation]*2, True, [extra]*2, g)
case(A.convolution.default, T(2,3,5,5), W(3,1,3,3), W(3), [1,1], [1,1], [1,1], False, [0,0], 3)
for n in (1,2,3): # a batch as large as a channel count hides mistakes
    case(A.mm.default, T(n,3), W(3,5))
    case(A.mm.default, W(n,3), T(3,5))
    for bias in (W(5),W(1),W(n,5),W(n,1),W(1,5)): case(A.addmm.default, bias, T(n,3), W(3,5))
    case(A.bmm.default, T(2,n,3), W(2,3,5))
    case(A.bmm.default, T(2,n,3), T(2,3,2))
    for bias in (W(2,n,5),W(5),W(2,1,5)): case(A.baddbmm.default, bias, T(2,n,3), W(2,3,5))
case(A.mm.default, T(3,3), T(3,3))
case(A.bmm.default, T(2,3,3), T(2,3,3))
case(A.addmm.default, W(3), T(3,3), T(3,3))
case(A.addmm.default, W(5), T(2,3), W(3,5), beta=.5, alpha=2.)
for f in (A.addmm.default,A._sparse_addmm.default):
    for beta in (0,1): case(f, W(5), T(2,3), W(3,5), beta=beta)
for mask in (None,masked(3,4)):
    for causal in (True,False):
        if mask is None or not causal:
            case(A._scaled_dot_product_flash_attention_for_cpu.default, T(2,2,3,5), T(2,2,4,5), T(2,2,4,5), 0., causal, attn_mask=mask)
case(A._scaled_dot_product_flash_attention.default, T(2,2,3,5), T(2,2,4,5), T(2,2,4,5))
case(A._scaled_dot_product_efficient_attention.default, T(2,2,3,5), T(2,2,4,5), T(2,2,4,3), None, False)
case(A._scaled_dot_product_cudnn_attention.default, T(2,2,3,5), T(2,2,4,5), T(2,2,4,3), None, False)
for f in (A._scaled_dot_product_attention_math_for_mps,A._scaled_dot_product_fused_attention_overrideable):
    case(f.default, T(2,2,3,5), T(2,2,4,5), T(2,2,4,3))
for x in (T(2,3),T(1,3,5),T(2,3,2,3)):
    for affine in ((W(3),W(3)),(W(3),None),(None,W(3)),(None,None)):
        stats = W(3),positive(3)
        case(A.native_batch_norm.default, x, *affine, *stats, False, .1, 1e-5)
        case(A._native_batch_norm_legit.default, x, *affine, *stats, False, .1, 1e-5)
        case(A._native_batch_norm_legit_no_training.default, x, *affine, *stats, .1, 1e-5)
        case(A._batch_norm_no_update.default, x, *affine, *stats, .1, 1e-5)
        for f in (A.cudnn_batch_norm.default,A.miopen_batch_norm.default):
            if affine[0] is not None: case(f, x, *affine, *stats, False, .1, 1e-5)
    case(A.native_batch_norm.default, x, W(3), W(3), *stats, True, .1, 1e-5)
    case(A.native_batch_norm.default, x, W(3), W(3), None, None, True, .1, 1e-5)
for affine in ((W(4),W(4)),(W(4),None),(None,None)):
    case(A.native_group_norm.default, T(2,4,3,1), *affine, 2, 4, 3, 2, 1e-5)
    case(A.native_layer_norm.default, T(2,3,4), [4], *affine, 1e-5)
case(A.native_layer_norm.default, T(2,3,4), [3,4], W(3,4), W(3,4), 1e-5)
for ids in (index(2,4),index(3)): case(A.embedding.default, W(3,5), ids)
for dim in (0,1): case(A._weight_norm_interface.default, W(4,3), [W(4,1),W(1,3)][dim], dim)
case(A._weight_norm_interface.default, W(4,3,2), W(4,1,1), 0)
case(A.mul.Tensor, W(2,3,4), W(1,3,1))
def drawn(*shape): return Arg(*shape, make=torch.randn, role='plain')
for g,pad,mask in ((1,0,zeros(2,1)),(2,1,zeros(2,1)),(2,1,drawn(2,9,4,5))):
    x,w,off = T(2,4,6-2*pad,7-2*pad),W(6,4//g,3,3),drawn(2,18,4,5)
    case(V.deform_conv2d.default, x, w, off, mask, W(6), 1, 1, pad, pad, 1, 1, g, 1, mask.role=='plain')
for reverse,biased in ((False,True),(True,True),(True,False)):
    case(A.mkldnn_rnn_layer.default, T(4,2,3), W(20,3), W(20,5), W(20), W(20), written(2,5), written(2,5), reverse, [], 2, 5, 1, biased, False, False, False)

@pytest.fixture(autouse=True, scope='module')
def kernels():
    "Kernels for operations that only other devices have, written from their definition."
    def batch_norm(n): return lambda x,*args: (torch.native_batch_norm(x, *args)[0],)+tuple(x.new_empty(0) for _ in range(n))
    def attend(q, k, v): return (q@k.transpose(-1, -2)/q.shape[-1]**.5).softmax(-1)@v
    def e(): return torch.empty(0)
    def lstm(x, w, u, b, d, h, c, reverse, sizes, mode, n, layers, biased, *rest):
        "It runs float32 only."
        ys = []
        for t in x.flip(0) if reverse else x:
            i,f,g,o = (t@w.T+h@u.T+(b+d if biased else 0)).chunk(4, -1)
            c = f.sigmoid()*c+i.sigmoid()*g.tanh()
            ys.append(h := o.sigmoid()*c.tanh())
        return torch.stack(ys[::-1] if reverse else ys),h,c,e()
    with torch.library._scoped_library('aten', 'IMPL') as lib:
        lib.impl('cudnn_batch_norm', batch_norm(3), 'CPU')
        lib.impl('miopen_batch_norm', batch_norm(2), 'CPU')
        lib.impl('mkldnn_rnn_layer', lstm, 'CPU')
        lib.impl('_scaled_dot_product_flash_attention', lambda q,k,v,*a,**kw: (attend(q, k, v),e(),e(),e(),1,1,e(),e(),e()), 'CPU')
        lib.impl('_scaled_dot_product_efficient_attention', lambda q,k,v,*a,**kw: (attend(q, k, v),e(),e(),e()), 'CPU')
        lib.impl('_scaled_dot_product_attention_math_for_mps', lambda q,k,v,*a,**kw: (attend(q, k, v),e()), 'CPU')
        lib.impl('_scaled_dot_product_fused_attention_overrideable', lambda q,k,v,*a,**kw: (attend(q, k, v),e(),e(),e(),1,1,e(),e(),e()), 'CPU')
        lib.impl('_scaled_dot_product_cudnn_attention', lambda q,k,v,*a,**kw: (attend(q, k, v),e(),e(),e(),1,1,e(),e(),e()), 'CPU')
        yield

class Traced:
    "One operation, recorded, and a way to carry it out with other tensors."
    def __init__(self, func, args, kwargs, const, tied, read):
        params,seen = nn.ParameterList(),[]
        def real(a):
            if isinstance(a, list): return [real(o) for o in a]
            if not isinstance(a, Arg): return a
            k = len(seen)
            t = seen[tied[k]] if k in tied else a.draw()
            if const[k] and k not in tied: t = nn.Parameter(t, requires_grad=False)
            if const[k]: params.append(t)
            seen.append(t)
            return t
        args,kwargs = [real(a) for a in args],{k:real(a) for k,a in kwargs.items()}
        tracer = Tracer(params, [t for t in seen if not isinstance(t, nn.Parameter)])
        self.before,self.value = {id(t):t.clone() for t in seen},{id(t):tracer.value(t) for t in seen}
        with torch.no_grad():
            self.result = self.outs_of(tracer.__torch_dispatch__(func, (), tuple(args), kwargs))
            self.op = tracer.graph.ops[-1]
            if read:
                for t in self.result: tracer.__torch_dispatch__(A.clone.default, (), (t,))
        self.result = [t.clone() for t in self.result]
        self.func,self.args,self.kwargs,self.seen = func,args,kwargs,seen
        self.sides = (0,-1) if len(set(self.op.inputs))>1 else (0,)
    @staticmethod
    def outs_of(out): return [t for t in (out if isinstance(out, (list,tuple)) else [out]) if isinstance(t, torch.Tensor)]
    @property
    def outs(self): return [v for v in self.op.outs if v is not None]

    def again(self, maps):
        "The outputs when each input `v` is replaced by `maps[v](v)`."
        new = {i:maps[self.value[i]](t) if self.value[i] in maps else t.clone() for i,t in self.before.items()}
        def put(a): return [put(o) for o in a] if isinstance(a, list) else new[id(a)] if isinstance(a, torch.Tensor) else a
        with torch.no_grad(): return [t.clone() for t in self.outs_of(self.func(*[put(a) for a in self.args], **{k:put(a) for k,a in self.kwargs.items()}))]

def layouts(shape):
    "Dimensions along which a map may change: none, one, all."
    return [(),*[(d,) for d in range(len(shape)) if shape[d]>1],*([tuple(range(len(shape)))] if sum(n>1 for n in shape)>1 else [])]

KINDS = dict(scale=(lambda t: t.abs()+.3,None), sign=(lambda t: t,None), zero=(lambda t: t.abs().where(torch.arange(t.numel()).reshape(t.shape)%2>0, 0),None),
    shift=(None,lambda t: t), all=(lambda t: t.abs()+.3,lambda t: t), negative=(lambda t: t-3,lambda t: t))

def maps(shape):
    "(kind, dimensions, map) of every sort, for a value of `shape`."
    for dims in layouts(shape):
        size = [n if d in dims else 1 for d,n in enumerate(shape)]
        for kind,(s,t) in KINDS.items():
            one = torch.ones(size, dtype=torch.float64)
            def draw(f, none): return none if f is None else f(torch.randn(size, dtype=torch.float64))
            yield kind,dims,Affine(draw(s, one), draw(t, one*0)).collapse()

def close(got, want, *what):
    "Assert that `got` is `want` to 1e-10, infinities and all; `what` says where."
    ok = got.shape==want.shape
    if ok and not want.is_floating_point(): ok = torch.equal(got, want)
    elif ok:
        fin = want.isfinite()
        diff,size = (got[fin]-want[fin]).abs(),want[fin].abs()
        ok = torch.equal(got[~fin].nan_to_num(), want[~fin].nan_to_num()) and bool((diff<=1e-10*(1+(size.max() if len(size) else 0))).all())
    assert ok, f"{what}: {got} is not {want}"

def variants(func, args, kwargs):
    "The operation with each choice of constant arguments, and with equal arguments being one."
    flat = [a for a in itertools.chain.from_iterable(a if isinstance(a, list) else [a] for a in (*args,*kwargs.values())) if isinstance(a, Arg)]
    free = [k for k,a in enumerate(flat) if a.role=='any']
    choices = [set(),*([{k} for k in free] if len(flat)>1 else [])]
    if len(flat)>1 and len(free)<len(flat): choices.append({k for k,a in enumerate(flat) if a.role=='weight'})
    for chosen in choices:
        if len(chosen)==len(flat): continue
        const = [k in chosen or (a.role=='weight' and len(chosen)<2) for k,a in enumerate(flat)]
        yield Traced(func, args, kwargs, const, {}, len(chosen)%2)
    for i,j in itertools.combinations(free, 2):
        if flat[i].shape==flat[j].shape: yield Traced(func, args, kwargs, [a.role=='weight' for a in flat], {j:i}, False)

def skip_missing(name):
    if name in LATER and not hasattr(A, name): pytest.skip(f'this release of PyTorch has no {name}')

def traced(name):
    skip_missing(name)
    return [t for c in CASES[name] for t in variants(*c)]

def one_each(asks):
    "The maps asked of each value, which must not contradict each other."
    res = {}
    for v,m in asks: assert res.setdefault(v, m)==m, f"two maps are wanted of {v}"
    return res

@pytest.mark.parametrize('name', sorted(PULL))
def test_pull(name):
    passed = set()
    for o in traced(name):
        for k,out in enumerate(o.outs):
            if not out.dtype.is_floating_point: continue
            for (kind,dims,a),side in itertools.product(maps(out.shape), o.sides):
                try: asks = one_each(pull_through(o.op, out, a, Context(side=side)))
                except Blocked: continue
                what = o.op,o.args,o.kwargs,kind,dims,out
                assert all(v in o.op.inputs for v in asks), what
                for j,(got,was) in enumerate(zip(o.again(asks), o.result)):
                    if j==k: close(got, a(was), *what)
                    elif o.outs[j].users: close(got, was, j, *what)
                passed.add((kind,bool(dims)))
    assert ('scale',True) in passed or ('scale',False) in passed, f"nothing passes: {passed}"

def carriers(o):
    "Inputs that may carry maps: each alone, and any two."
    vals = [v for v in dict.fromkeys(o.op.inputs) if v.dtype.is_floating_point]
    yield from ((v,) for v in vals)
    if len(vals)<4: yield from itertools.combinations(vals, 2)

@pytest.mark.parametrize('name', sorted(PUSH))
def test_push(name):
    passed = set()
    for o in traced(name):
        for vals in carriers(o):
            for (kind,dims,a),side in itertools.product(maps(vals[0].shape), o.sides):
                carried = {vals[0]:a}
                if len(vals)>1: carried[vals[1]] = a if vals[1].shape==vals[0].shape and kind!='sign' else next(m for k,_,m in maps(vals[1].shape) if k==kind)
                try: outs,asks = push_through(o.op, carried, Context(side=side))
                except Blocked: continue
                what = o.op,o.args,o.kwargs,kind,dims,vals
                assert all(v in o.op.inputs and v not in carried for v,_ in asks), what
                outs,new = one_each(outs),o.again(one_each(asks))
                for j,(got,want) in enumerate(zip(new, o.again(carried))):
                    v = o.outs[j]
                    if j==0 or v.users: close(outs[v](got) if v in outs else got, want, j, *what)
                passed.add((kind,bool(dims)))
    assert ('scale',True) in passed or ('scale',False) in passed, f"nothing passes: {passed}"

@pytest.mark.parametrize('name', sorted(BESIDE))
def test_beside(name):
    passed = 0
    for o in traced(name):
        out = o.outs[0]
        for x in [v for v in dict.fromkeys(o.op.inputs) if v.shape==out.shape]:
            t = next(t for i,t in o.before.items() if o.value[i] is x)
            for kind,dims,a in maps(x.shape):
                try: found = BESIDE[name](o.op, x, a, lambda u,v: u is v)
                except Blocked: continue
                for further,asks in found:
                    new = one_each(asks)
                    for v,m in further:
                        assert v not in new
                        new[v] = lambda w,m=m: w+m(t)
                    close(o.again(new)[0], o.result[0]+a(t), o.op, o.args, kind, dims, x)
                    passed += 1
    assert passed

@pytest.mark.parametrize('registry,name', [(r,n) for r in ('PULL','PUSH','BESIDE') for n in sorted(getattr(rules, r))])
def test_every_rule_has_a_case(registry, name):
    skip_missing(name)
    assert name in CASES, f"{registry} has a rule for {name}, and no case tries it: add `case(A.{name}.default, T(2,3,5), ...)` to tests/test_rules.py"
