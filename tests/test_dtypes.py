"What numbers a model is made of: half precision, mixed and by autocast, judged by float64; and weights in tensors of other classes."
import pytest, torch, torch.nn.functional as F, torch.utils._pytree as pytree
from fastai.torch_core import TensorBase,TensorImage
from torch import nn
from fasterfold.fold import BN_Folder
from fasterfold.proof import distance,prove,run,run_as
from fasterfold.rules import PULL
from fasterfold.state import FoldError
from helpers import *

HALF = torch.bfloat16,torch.float16

def conv(n_in=8, n_out=8, ks=3, **kwargs): return nn.Conv2d(n_in, n_out, ks, padding=ks//2, **kwargs)
def image(n=2, c=3, h=11, w=9): return torch.randn(n, c, h, w)

# ---- Right folds go

class Residual(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.a,self.b,self.n1,self.n2 = conv(c, c, bias=False),conv(c, c, bias=False),nn.BatchNorm2d(c),nn.BatchNorm2d(c)
    def forward(self, x): return F.relu(x+self.n2(self.b(F.relu(self.n1(self.a(x))))))

class Gated(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.conv,self.norm,self.down,self.up = conv(c, c, bias=False),nn.BatchNorm2d(c),nn.Conv2d(c, 2, 1),nn.Conv2d(2, c, 1)
    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.silu(y)*torch.sigmoid(self.up(F.relu(self.down(y.mean((2,3), keepdim=True)))))

def stem(): return conv(3),nn.BatchNorm2d(8)
def chain(): return nn.Sequential(*stem(), nn.ReLU(), *[m for _ in range(5) for m in (conv(bias=False),nn.BatchNorm2d(8),nn.ReLU())])
def residual():
    last = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(8, 8),nn.BatchNorm1d(8),nn.ReLU(),nn.Linear(8, 3)
    return nn.Sequential(*stem(), *[Residual() for _ in range(3)], *last)
def depthwise():
    def block(): return conv(groups=8, bias=False),nn.BatchNorm2d(8),nn.ReLU6(),conv(ks=1),nn.BatchNorm2d(8)
    return nn.Sequential(*stem(), *block(), *block(), *block())
def before(): return nn.Sequential(*stem(), *[m for _ in range(4) for m in (nn.Sigmoid(),nn.BatchNorm2d(8),conv(ks=1))])
def gated(): return nn.Sequential(*stem(), *[Gated() for _ in range(3)])
def grouped(): return nn.Sequential(*stem(), nn.GroupNorm(2, 8), nn.ReLU(), conv(), nn.GroupNorm(4, 8), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8))
def transposed():
    up,last = nn.ConvTranspose2d(8, 8, 2, stride=2),nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2, bias=False)
    return nn.Sequential(*stem(), nn.ReLU(), up, nn.BatchNorm2d(8), nn.ReLU(), last, nn.BatchNorm2d(4))
def head():
    first = nn.Flatten(),nn.Linear(297, 16),nn.BatchNorm1d(16),nn.LayerNorm(16)
    return nn.Sequential(*first, nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))
MODELS = [chain,residual,depthwise,before,gated,grouped,transposed,head]

def spread(m, low, high, g): return 10**(torch.rand(m.shape, generator=g, dtype=torch.float64)*(high-low)+low)
def hostile(net, kind, seed=1):
    "Random statistics of every size; `kind` says how far they range."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in randomize_norms(net, seed).modules():
            if getattr(m, 'running_var', None) is None: continue
            var,scale = dict(usual=((0,0),(0,0)), wide=((-4,4),(-3,3)), small=((-4,-2),(0,0)), large=((2,4),(0,0)), zero=((0,0),(0,0)))[kind]
            m.running_var.mul_(spread(m.running_var, *var, g))
            m.running_mean.mul_(10*m.running_var.sqrt())
            m.weight.mul_(spread(m.weight, *scale, g))
            if kind=='zero': m.weight[::3] = 0
    return net

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('make', MODELS)
def test_half_precision_folds_as_float32_does(make, dtype):
    "Statistics of every size, numbers that overflow float16 included."
    for kind in ('usual','wide','small','large','zero'):
        torch.manual_seed(0)
        net,x = hostile(make(), kind),image()
        full,half = BN_Folder(),BN_Folder()
        full.fold(net, x)
        net,x = net.to(dtype),x.to(dtype)
        new = half.fold(net, x)
        assert names_of(half.result.folded)==names_of(full.result.folded) and names_of(half.result.folded), kind
        own,_,exact = errors(net, new, x)
        assert exact<=1e-10, kind
        if own<float('inf'): check_fold(net, new, x)

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('name', ['resnet18','mobilenet_v3_small'])
def test_half_precision_of_known_models(name, dtype):
    import torchvision # takes a second, chkstyle: ignore
    torch.manual_seed(0)
    net,x = randomize_norms(getattr(torchvision.models, name)()).to(dtype),torch.randn(2, 3, 64, 64).to(dtype)
    folder = BN_Folder()
    check_fold(net, folder.fold(net, x), x)
    assert not folder.result.kept

def mixed():
    "A half-precision body with float32 norms inside, as training in mixed precision leaves it."
    def f(m, x):
        for c,n in zip(m.convs, m.norms): x = n(c(x.to(c.weight.dtype)).float()).relu()
        return x
    return Fn(f, convs=nn.ModuleList([conv(3).bfloat16(), conv().bfloat16(), conv().half()]), norms=nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3)))

class Auto(nn.Sequential):
    def forward(self, x):
        with torch.autocast('cpu', dtype=torch.bfloat16): return super().forward(x)

@pytest.mark.parametrize('make', [mixed,lambda: Auto(*chain())], ids=['mixed','autocast'])
def test_mixed_precision(make):
    torch.manual_seed(0)
    net,x,folder = randomize_norms(make()),image(),BN_Folder()
    new = folder.fold(net, x)
    exact = run_as(net, x)
    assert not folder.result.kept and folder.result.proof.exact<1e-12
    assert distance(run(new, x), exact)<=10*distance(run(net, x), exact)

JUMPS = dict(label=lambda y: y.flatten(1).argmax(1), top=lambda y: y.flatten(1).topk(3), mask=lambda y: y>0, some=lambda y: y[y>0],
    steps=lambda y: (y*4).round())
@pytest.mark.parametrize('kind', JUMPS)
def test_half_precision_of_outputs_that_jump(kind):
    """Which of two channels is the largest is decided by rounding: that of the weights, too, which a fold rounds anew.
    Where the original is right by luck and no throw of the dice takes that away, a norm may stay, and the reason is that."""
    kept = []
    for seed in range(8):
        torch.manual_seed(seed)
        net,x = randomize_norms(Fn(lambda m,x: JUMPS[kind](m.body(x)), body=chain()), seed).bfloat16(),image(8).bfloat16()
        folder = BN_Folder()
        folder.fold(net, x)
        kept += folder.result.kept
    assert len(kept)<=1 and all('rounding would' in o.reason for o in kept)

# ---- Wrong folds stay

@pytest.fixture
def no_shift(monkeypatch):
    "A wrong rule: it forgets the bias of a transposed convolution."
    right = PULL['convolution']
    monkeypatch.setitem(PULL, 'convolution', lambda op,out,a,ctx: right(op, out, a, ctx)[:1] if op.args.transposed else right(op, out, a, ctx))

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('kind', ['usual','wide','small','large','zero'])
def test_half_precision_and_a_wrong_rule(no_shift, kind, dtype):
    torch.manual_seed(0)
    net,x,folder = hostile(transposed(), kind).to(dtype),image().to(dtype),BN_Folder()
    folder.fold(net, x)
    assert names_of(folder.result.folded)==['1'] and all('failed verification' in o.reason for o in folder.result.kept)

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('off', [.2,1e-2,1e-3,1e-6])
def test_half_precision_and_a_rule_that_is_a_little_wrong(monkeypatch, dtype, off):
    "Less than rounding, so that only float64 can tell."
    right = PULL['convolution']
    monkeypatch.setitem(PULL, 'convolution', lambda op,out,a,ctx: [(v,type(m)(m.scale*(1+off), m.shift)) for v,m in right(op, out, a, ctx)])
    torch.manual_seed(0)
    net,x,folder = randomize_norms(chain()).to(dtype),image().to(dtype),BN_Folder()
    new = folder.fold(net, x)
    assert not folder.result.folded and distance(run(new, x), run(net, x))==0

@pytest.mark.parametrize('dtype', [*HALF,torch.float32])
@pytest.mark.parametrize('part', [.2,.05,.01])
def test_fold_that_is_a_little_wrong_on_the_larger_sample(part, dtype):
    "A number that leaves the graph adds a little of what lies in between; that the first sample is proved tells nothing of it."
    def f(m, x):
        z = m.norm(y:=m.conv(x))
        return z if x.sum().item()>0 else z+part*y
    torch.manual_seed(0)
    net,x,folder = randomize_norms(Fn(f, conv=conv(3), norm=nn.BatchNorm2d(8))).to(dtype),image(1, h=6, w=5).abs().to(dtype),BN_Folder()
    new = folder.fold(net, x)
    assert 'would be wrong on inputs of' in reason(folder.result, 'norm') and all(distance(run(new, s*x), run(net, s*x))==0 for s in (1,-1))

def test_output_of_nothing_but_rounding_beside_another(no_shift):
    "Its distance to float64 is beyond all measure, and must be none for the other."
    def f(m, x):
        y = m.norm(m.up(x))
        return y,y.softmax(1).sum(1)-1
    torch.manual_seed(0)
    net,x,folder = randomize_norms(Fn(f, up=nn.ConvTranspose2d(3, 4, 2), norm=nn.BatchNorm2d(4))),image(),BN_Folder()
    folder.fold(net, x)
    assert 'failed verification' in reason(folder.result, 'norm')

@pytest.mark.parametrize('dtype', HALF)
def test_fold_that_the_next_eval_would_undo_by_a_little(dtype):
    "The norm does less than ten roundings would."
    net,x,folder = nn.Sequential(Rewritten(5, 6), nn.BatchNorm1d(6), nn.ReLU()).to(dtype).eval(),torch.randn(4, 5).to(dtype),BN_Folder()
    with torch.no_grad(): net[1].weight.fill_(1+5*torch.finfo(dtype).eps)
    new = folder.fold(net, x)
    assert 'no lasting part' in reason(folder.result, '1') and distance(run(new.train().eval(), x), run(net, x))==0

class Merging(nn.Linear):
    "Takes an update into its weight in eval mode, and out of it in train mode, and rounds each time."
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.update,self.merged = nn.Parameter(torch.randn(n_out, n_in)),False
    def train(self, mode=True):
        super().train(mode)
        if mode==self.merged: self.weight.data += -self.update if mode else self.update
        self.merged = not mode
        return self

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('seed', range(3))
def test_half_precision_updates_that_are_merged(seed, dtype):
    "Each `train(); eval()` rounds the weights, also those that no norm folds into."
    torch.manual_seed(seed)
    net = randomize_norms(nn.Sequential(Merging(5, 6), nn.BatchNorm1d(6), nn.ReLU(), Merging(6, 3)).to(dtype))
    folder = BN_Folder()
    folder.fold(net, torch.randn(4, 5).to(dtype))
    assert folder.result.summary=='1 of 1 norms fold'

@pytest.mark.parametrize('dtype', [*HALF,torch.float32])
def test_rounding_that_is_really_worse_stays(dtype):
    "The norm takes away a large mean exactly, from numbers that are exact; a layer would take differences of large products."
    torch.manual_seed(0)
    mean = 128. if dtype is torch.bfloat16 else 1024.
    net = Fn(lambda m,x: m.fc(m.norm((x>0).to(x.dtype)+mean)), norm=nn.BatchNorm1d(8), fc=nn.Linear(8, 4)).to(dtype).eval()
    net.norm.running_mean.fill_(mean)
    x,folder = torch.randn(5, 8).to(dtype),BN_Folder()
    folder.fold(net, x)
    assert 'failed verification: rounding would put it' in reason(folder.result, 'norm')

def overflowing(lost):
    "Runs of a float16 model of which some numbers overflow, and of the same folded, of which `lost` more do."
    exact = torch.cat([torch.full((10,), 1e6), torch.linspace(-4e4, 4e4, 90)]).double()
    refs = exact.half()
    outs = refs.clone()
    outs[10:10+lost] = float('inf')
    return [outs],[refs],[refs],[exact],[exact],torch.finfo(torch.float16).eps

def test_overflow_of_the_original_is_no_leave_for_more():
    assert prove(*overflowing(0)).ok and not prove(*overflowing(5)).ok
    outs,refs,*rest = overflowing(0)
    exact = [torch.full((100,), 65519.).double()]
    largest = [torch.full((100,), 65504.).half()]
    assert prove([torch.full((100,), float('inf')).half()], largest, largest, exact, exact, rest[-1]).ok # on the edge

# ---- Tensors of other classes

def unwrapped(cls, f, args, kwargs):
    def plain(t): return t.plain() if isinstance(t, cls) else t
    return f(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))

class Wrapper(torch.Tensor):
    "Has no numbers of its own: other tensors hold them."
    @staticmethod
    def __new__(cls, numbers, size): return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=size.dtype)
    def __init__(self, numbers, size): self.numbers,self.size = numbers,size
    @classmethod
    def of(cls, t): return cls(t/t.abs().max(), t.abs().max())
    def plain(self): return self.numbers.to(self.size.dtype)*self.size
    def __tensor_flatten__(self): return ['numbers','size'],None
    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride): return cls(**inner)
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default,torch.ops.aten.clone.default): return cls(func(args[0].numbers), func(args[0].size))
        return unwrapped(cls, func, args, kwargs)

class Bytes(Wrapper):
    @classmethod
    def of(cls, t): return cls((t/t.abs().max()*127).round().to(torch.int8), t.abs().max()/127)

def wrapped(cls, at):
    net = randomize_norms(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    net[at].weight = nn.Parameter(cls.of(net[at].weight.data), requires_grad=False)
    return net

def refused(net, x, says):
    refs = net(x)
    for f in (BN_Folder().plan,BN_Folder().fold,BN_Folder(verify=False).fold):
        with pytest.raises(FoldError, match=says): f(net, x)
    with pytest.raises(FoldError, match=says): BN_Folder().fold(net, x, inplace=True)
    assert torch.equal(net(x), refs) and isinstance(net[1], nn.BatchNorm1d)

@pytest.mark.parametrize('at', [0,3,5])
@pytest.mark.parametrize('cls,says', [(Bytes,r'is quantized.*Fold the float model, then quantize it'),(Wrapper,'a class of its own.*Fold the model with plain tensors')])
def test_weights_that_wrap_others(cls, says, at):
    "Their numbers cannot be edited, whatever their own rules say."
    refused(wrapped(cls, at), torch.randn(4, 5), f'`{at}` .Linear. .*{says}')

def test_quantized_by_torchao():
    quantization = pytest.importorskip('torchao.quantization')
    for config in (quantization.Int8WeightOnlyConfig(),quantization.Int8DynamicActivationInt8WeightConfig()):
        net = randomize_norms(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32)))
        x = torch.randn(4, 64)
        assert not BN_Folder().plan(net, x).kept
        quantization.quantize_(net, config, lambda m,name: name=='3')
        refused(net, x, '`3` .Linear. is quantized')

class Own(torch.Tensor): "A plain tensor under another name, which `deepcopy` refuses."

def test_weight_that_has_no_copy():
    net,x = randomize_norms(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())),torch.randn(4, 5)
    net[0].weight = nn.Parameter(net[0].weight.data.as_subclass(Own))
    before = state(net)
    with pytest.raises(FoldError, match='inplace=True'): BN_Folder().fold(net, x)
    assert state(net)==before

class Tagged(nn.Sequential):
    def forward(self, x): return TensorBase(super().forward(x))

def test_tensors_of_fastai_as_inputs_and_outputs():
    torch.manual_seed(0)
    net,x,folder = randomize_norms(Tagged(*chain())),image(),BN_Folder()
    new = folder.fold(net, TensorImage(x))
    assert not folder.result.kept and distance(run(new, x), run(net, x))<1e-6
