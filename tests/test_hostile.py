"Models that do more than compute: the fold is right or refused, and the original and all else are as they were."
import math, random, sys, threading
from collections import OrderedDict,UserList,deque
from collections.abc import Mapping,Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType,SimpleNamespace
from typing import NamedTuple
import numpy as np, pytest, torch, torch.nn.functional as F
import torch.ao.quantization as quantization
from pandas import DataFrame
from torch import nn
from fasterfold.fold import BN_Folder
from fasterfold.proof import distance, run
from fasterfold.rules import PULL
from fasterfold.state import FoldError
from fasterfold.trace import trace
from helpers import *

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import planning

def conv(n_in=3, n_out=4, ks=3): return nn.Conv2d(n_in, n_out, ks)
def image(n=2, size=9): return torch.randn(n, 3, size, size)
def stays_right(make, x, folded, **options):
    "In every way, `folded` norms go, the result is right, also after `train(); eval()`, and undo gives back what was. The last plan."
    for folder,net,new,before in every_way(make, x, state, **options):
        train,ref = new.training,now(made(make), x)
        assert len(folder.result.folded)==folded
        for _ in range(2):
            assert distance(now(new.eval(), x), ref)<1e-6
            new.train()
        folder.undo()
        new.train(train)
        assert new is not net or state(net)==before
    return folder.result

# ---- Modes that are more than a flag

class LowRank(nn.Linear):
    "Takes a low-rank update into its weight in eval mode, and out of it in train mode."
    def __init__(self, n_in, n_out, rank=2):
        super().__init__(n_in, n_out)
        self.a,self.b,self.merged = nn.Parameter(torch.randn(rank, n_in)),nn.Parameter(torch.randn(n_out, rank)),False
    def train(self, mode=True):
        super().train(mode)
        if mode==self.merged: self.weight.data += -self.b@self.a if mode else self.b@self.a
        self.merged = not mode # and returns nothing, as many do
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y+x@self.a.T@self.b.T

def low_rank(): return nn.Sequential(LowRank(5, 6), nn.BatchNorm1d(6), nn.ReLU(), LowRank(6, 3))

def test_low_rank_updates_that_are_merged(): stays_right(low_rank, torch.randn(4, 5), 1)

def test_low_rank_updates_after_an_error():
    net,wrong = made(low_rank, True),torch.randn(4, 7)
    before = state(net)
    for method in ('plan','fold'):
        with pytest.raises(FoldError): getattr(BN_Folder(), method)(net, wrong)
        assert state(net)==before
    with pytest.raises(FoldError): BN_Folder().fold(net, wrong, inplace=True)
    assert state(net)==before

def test_refold_of_low_rank_updates():
    x,folder = torch.randn(4, 5),BN_Folder()
    ref,net = now(made(low_rank), x),made(low_rank, True)
    before = state(net)
    folder.fold(net, x, inplace=True)
    folder.undo()
    folder.refold()
    assert net.training and distance(now(net.eval(), x), ref)<1e-6
    folder.undo()
    assert state(net)==before

class Expanded(nn.Module):
    "Keeps its filter in a buffer in eval mode, and drops it in train mode."
    def __init__(self, n_in=3, n_out=4):
        super().__init__()
        self.w,self.bias = nn.Parameter(torch.randn(n_out, n_in)),nn.Parameter(torch.randn(n_out))
        self.register_buffer('basis', torch.randn(1, 1, 3, 3))
    def expand(self): return self.w[:,:,None,None]*self.basis
    def train(self, mode=True):
        if mode: self._buffers.pop('filter', None)
        elif 'filter' not in self._buffers: self.register_buffer('filter', self.expand().detach())
        return super().train(mode)
    def forward(self, x): return F.conv2d(x, self.expand() if self.training else self.filter, self.bias)

def test_filter_that_is_made_for_inference():
    "A fold into what the next `train()` drops would be lost."
    net,x = made(lambda: nn.Sequential(Expanded(), nn.BatchNorm2d(4), nn.ReLU())).eval(),image()
    ref,before = now(net, x),state(net)
    for verify in (True,False):
        folder = BN_Folder(verify=verify)
        new = folder.fold(net, x)
        assert not folder.result.folded and state(net)==before
        assert distance(now(new.train().eval(), x), ref)<1e-6

def test_fold_that_the_next_eval_would_undo():
    plan = stays_right(lambda: nn.Sequential(Rewritten(5, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(4, 5), 0)
    assert 'no lasting part of the model' in reason(plan, '1')

class AsksForItsNorm(nn.Sequential):
    "Freezes its norm while it trains."
    def train(self, mode=True):
        super().train(mode)
        if mode: self[1].weight.requires_grad_(False)
        return self

def test_train_that_asks_for_a_norm():
    net,x,folder = made(lambda: AsksForItsNorm(conv(), nn.BatchNorm2d(4), nn.ReLU())).eval(),image(),BN_Folder()
    net[1].weight.requires_grad_()
    before = state(net)
    folder.plan(net, x)
    folder.fold(net, x, inplace=True)
    folder.undo()
    assert state(net)==before
    assert '`train()`' in reason(folder.result, '1') and "has no attribute 'weight'" in reason(folder.result, '1')
    net = net.train()
    before = state(net)
    for verify in (True,False):
        for inplace in (True,False):
            folder = BN_Folder(verify=verify)
            if verify:
                folder.fold(net, x, inplace=inplace)
                folder.undo()
            else:
                with pytest.raises(FoldError, match='eval'): folder.fold(net, x, inplace=inplace)
            assert state(net)==before

# ---- Modules where PyTorch does not look

class Listed(nn.Module):
    "Runs a norm out of a plain list."
    def __init__(self):
        super().__init__()
        self.conv,self.norms,self.last = conv(),[randomize_norms(nn.BatchNorm2d(4)).train()],conv(4, 2)
    def forward(self, x): return self.last(self.norms[0](self.conv(x)).relu())

class ByMethod(nn.Module):
    "Runs another model by its `forward`."
    def __init__(self):
        super().__init__()
        self.own,other = nn.Sequential(conv(), nn.BatchNorm2d(4)),randomize_norms(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))).train()
        self.f,self.norms = other.forward,[other[1]]
    def forward(self, x): return self.f(self.own(x))

class InDict(nn.Module):
    "Keeps a norm from being registered."
    def __init__(self):
        super().__init__()
        self.conv,self.__dict__['norm'] = conv(),randomize_norms(nn.BatchNorm2d(4)).train()
        self.norms = [self.norm]
    def forward(self, x): return self.norm(self.conv(x)).relu()

def test_norm_in_a_plain_attribute():
    net,x = made(InDict),image()
    del net.norms
    before = state(net.norm)
    BN_Folder().plan(net, x)
    assert state(net.norm)==before and net.norm.training

@pytest.mark.parametrize('make,folded', [(Listed,0),(InDict,0),(ByMethod,1)])
def test_norm_that_is_not_registered(make, folded):
    "It is in training mode, and its statistics stay."
    for inplace in (False,True):
        net,x = made(make),image()
        norm,before = net.norms[0],state(net.norms[0])
        for verify in (True,False):
            folder = BN_Folder(verify=verify)
            folder.plan(net, x)
            folder.fold(net, x, inplace=inplace)
            assert len(folder.result.folded)==folded and state(norm)==before and norm.training
            folder.undo()

class TwoHolders(nn.Module):
    "Runs its layers by a list."
    def __init__(self, n=1, width=4):
        super().__init__()
        self.steps = []
        for i in range(n):
            for name,m in (f'conv{i}',nn.Conv2d(width, width, 1)),(f'norm{i}',nn.BatchNorm2d(width)):
                self.add_module(name, m)
                self.steps.append(m)
    def forward(self, x):
        for m in self.steps: x = m(x)
        return x

def test_norm_in_two_places():
    "The list would still run it."
    for n in (1,64): # found without halving
        plan = stays_right(lambda: TwoHolders(n), torch.randn(2, 4, 5, 5), 0)
        assert {o.reason for o in plan.kept}=={'`steps` holds it, too, and would still run it'}

def closed_over():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4))
    first,norm = net
    net.forward = lambda x: norm(first(x)).relu()
    return net

def test_forward_that_closes_over_the_layers():
    "A copy would run the original."
    for train in (False,True):
        net,x,folder = made(closed_over, train),image(),BN_Folder()
        before = state(net)
        with pytest.raises(FoldError, match='inplace=True'): folder.fold(net, x)
        assert state(net)==before
        folder.fold(net, x, inplace=True)
        assert '`forward` holds it, too' in reason(folder.result, '1')
        folder.undo()
        assert state(net)==before

class OwnForward(nn.Module):
    "Its `forward` is one of its own methods."
    def __init__(self):
        super().__init__()
        self.conv,self.norm = conv(),nn.BatchNorm2d(4)
        self.forward = self.run
    def run(self, x): return self.norm(self.conv(x)).relu()

def test_forward_that_is_a_method_of_its_own(): stays_right(OwnForward, image(), 1)

# ---- What cannot be copied or is written to in inference mode only

class Holds(nn.Sequential):
    def __init__(self, what):
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.what = what()

@pytest.mark.parametrize('what', [threading.Lock,lambda: open(__file__),lambda: (i for i in range(3)),torch.Generator], ids=['lock','file','generator','random'])
def test_attribute_without_a_copy(what): stays_right(lambda: Holds(what), image(), 1)

class Noisy(Holds):
    "Adds noise from a generator of its own."
    def forward(self, x): return super().forward(x) + (torch.rand(1, generator=self.what) if isinstance(self.what, torch.Generator) else self.what.random())

GENERATORS = dict(torch=lambda: torch.Generator().manual_seed(1), python=lambda: random.Random(1), numpy=lambda: np.random.default_rng(1),
    legacy=lambda: np.random.RandomState(1))

def next_draws(net, x): return [net(x) for _ in range(2)]

@pytest.mark.parametrize('kind', GENERATORS)
def test_random_numbers_of_its_own_go_on_where_they_were(kind):
    x = image()
    def net(): return made(lambda: Noisy(GENERATORS[kind]))
    refs,folder = next_draws(net(), x),BN_Folder()
    looked = net()
    folder.plan(looked, x)
    assert list(map(torch.equal, next_draws(looked, x), refs))==[True,True]
    folded = folder.fold(net(), x)
    assert folder.result.summary=='1 of 1 norms fold' and all(distance([a], [b])<1e-6 for a,b in zip(next_draws(folded, x), refs))

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.n = conv(),nn.BatchNorm2d(4)
    def forward(self, x): return torch.cond(x.sum()>0, lambda y: y+1, lambda y: y-1, (self.n(self.a(x)),))

def test_functions_inside_an_operator_are_said():
    with pytest.raises(FoldError, match="The model calls `cond`, which runs functions"): BN_Folder().fold(made(Branches), image())

def test_list_of_what_has_no_copy():
    net,x = made(lambda: Holds(lambda: [threading.Lock()])),image()
    with pytest.raises(FoldError, match="inplace=True"): BN_Folder().fold(net, x)
    ref = now(net, x)
    assert distance(now(BN_Folder().fold(net, x, inplace=True), x), ref)<1e-6

@pytest.mark.parametrize('inplace', [False,True])
@pytest.mark.parametrize('given', [False,True])
def test_model_made_in_inference_mode(given, inplace):
    with torch.inference_mode(): net,x = made(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())),image(2, 64)
    ref,before = now(net, x),state(net)
    sample,folder = x if given else None,BN_Folder()
    assert folder.plan(net, sample).summary=='1 of 1 norms fold' and state(net)==before
    assert distance(now(folder.fold(net, sample, inplace=inplace), x), ref)<1e-6
    folder.undo()
    assert state(net)==before

# ---- Outputs

class Named(OrderedDict): pass
class Pair(NamedTuple):
    first: object
    second: object
@dataclass
class Plain: a:object
@dataclass
class Slotted:
    __slots__ = 'a',
    a:object
class Hidden(Slotted):
    __slots__ = '__b',
    def __init__(self, b): self.__b = b
class OwnMapping(Mapping):
    __slots__ = 'a',
    def __init__(self, a): self.a = {'a':a}
    def __getitem__(self, k): return self.a[k]
    def __iter__(self): return iter(self.a)
    def __len__(self): return len(self.a)
class OwnSequence(Sequence):
    __slots__ = 'a',
    def __init__(self, a): self.a = [a]
    def __getitem__(self, i): return self.a[i]
    def __len__(self): return 1
def with_attribute(o, y):
    o.y = y
    return o
class Returns(nn.Sequential):
    def __init__(self, f):
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.f = f
    def forward(self, x): return self.f(super().forward(x))

OUTPUTS = {'own dict':lambda y: Named(a=y), 'nested':lambda y: Named(a=[Named(b=y.numpy())]), 'array':lambda y: y.numpy(),
    'arrays':lambda y: {'a':(y.numpy(),)}, 'reversed':lambda y: y.numpy()[:,::-1], 'complex':lambda y: torch.complex(y, 2*y),
    'dataclass':Plain, 'slots':Slotted, 'private slots':Hidden, 'named tuple':lambda y: Pair(y, 1), 'own mapping':OwnMapping, 'own sequence':OwnSequence,
    'dict with attributes':lambda y: with_attribute(Named(k=1), y), 'list with attributes':lambda y: with_attribute(UserList([1]), y),
    'tensor with attributes':lambda y: with_attribute(torch.zeros(2), y), 'namespace':lambda y: SimpleNamespace(a=y), 'queue':lambda y: deque([y]),
    'views':lambda y: {'a':y}.values(), 'one in a set':lambda y: {y}, 'proxy':lambda y: MappingProxyType({'a':y}), 'objects':lambda y: np.array([y,None], dtype=object),
    'float':lambda y: y.double().mean().item(), 'floats':lambda y: {'a':y.numpy().ravel().tolist()}, 'scalar':lambda y: [*y.numpy()[0,0,0]],
    'complex number':lambda y: complex(y.double().mean(), 1), 'frame':lambda y: DataFrame(y[0,0].numpy()), 'sparse':lambda y: y.to_sparse(),
    'rows':lambda y: y[0,0].to_sparse_csr(), 'nested tensor':lambda y: torch.nested.nested_tensor(list(y)), 'function':lambda y: lambda: y,
    'partial':lambda y: partial(print, y), 'distribution':lambda y: torch.distributions.Normal(y, 1.), 'packed':lambda y: nn.utils.rnn.pack_sequence([*y[:,0]])}
@pytest.mark.parametrize('kind', OUTPUTS)
def test_outputs_of_every_kind(kind):
    net,x,folder = made(lambda: Returns(OUTPUTS[kind])),image(),BN_Folder()
    new = folder.fold(net, x)
    assert folder.result.summary=='1 of 1 norms fold' and folder.result.proof.ok
    assert 0<distance(run(new, x), run(net, x))<1e-6

@pytest.mark.parametrize('kind', OUTPUTS)
def test_wrong_outputs_of_every_kind(kind, monkeypatch):
    "A rule that forgets the bias is found out, whatever the outputs are in, and where another output does not show it."
    right = PULL['convolution']
    monkeypatch.setitem(PULL, 'convolution', lambda *args: right(*args)[:1])
    for f in (OUTPUTS[kind],lambda y: (torch.ones(2),OUTPUTS[kind](y))):
        folder = BN_Folder()
        folder.fold(made(lambda: Returns(f)), image())
        assert 'failed verification' in reason(folder.result, '1')

def items(y): yield y
UNSEEN = dict(generator=items, map=lambda y: map(abs, [y]), list_iterator=lambda y: iter([y]), set=lambda y: {y,y+1},
    memoryview=lambda y: memoryview(y.numpy()), ndarray=lambda y: y.numpy().astype(np.longdouble), builtin_function_or_method=lambda y: y.sum)
@pytest.mark.parametrize('beside', [False,True])
@pytest.mark.parametrize('kind', UNSEEN)
def test_outputs_that_nobody_can_look_into(kind, beside):
    "Not even beside others that can be compared; and who asks for no proof gets none."
    net,x = made(lambda: Returns(lambda y: (y,UNSEEN[kind](y)) if beside else UNSEEN[kind](y))),image()
    before = state(net)
    for inplace in (False,True):
        with pytest.raises(FoldError, match=f'{kind}.*register_pytree_node.*verify=False'): BN_Folder().fold(net, x, inplace=inplace)
        assert state(net)==before
    assert BN_Folder().plan(net, x).summary==str(BN_Folder(verify=False).plan(net, x).summary)
    assert isinstance(BN_Folder(verify=False).fold(net, x)[1], nn.Identity)

@pytest.mark.parametrize('nothing', [None,'cat',True,b'cat',3,[],print])
def test_outputs_without_numbers(nothing):
    net,x,folder = made(lambda: Returns(lambda y: nothing)),image(),BN_Folder()
    with pytest.raises(FoldError, match='returned no numbers'): folder.fold(net, x)
    net.f = lambda y: (y,nothing)
    folder.fold(net, x)
    assert folder.result.summary=='1 of 1 norms fold'

def test_generator_is_left_to_the_user():
    "Only the last run is theirs, and nothing was taken out of it."
    made_by = []
    def f(y):
        made_by.append(g := items(y))
        return y.mean(),g
    with pytest.raises(FoldError): BN_Folder().fold(made(lambda: Returns(f)), image())
    assert all(len([*g])==1 for g in made_by)

# ---- Reasons

class Reads(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.conv,self.norm,self.last = conv(),nn.BatchNorm2d(4),conv(4, 2)
        self.read = read
    def forward(self, x): return self.last(self.norm(self.conv(x)).to(self.read(self.norm)))

@pytest.mark.parametrize('read,name', [(lambda m: m.weight.dtype,'weight'),(lambda m: m.running_var.dtype,'running_var'),(lambda m: next(iter(m.bias.detach())).dtype,'bias')])
def test_norm_whose_weights_are_asked_for(read, name):
    "Found before anything is tried."
    plan = stays_right(lambda: Reads(read), image(), 0)
    assert reason(plan, 'norm')==f'the model asks for its `{name}`'

def test_layer_that_is_asked_for_its_bias():
    "A layer in whose place code looks for a bias gets none."
    def make():
        net = Reads(lambda m: torch.float32)
        net.conv = nn.Conv2d(3, 4, 3, bias=False)
        net.conv.register_forward_hook(lambda *args: None) # nothing goes back
        net.read = lambda m: torch.float64 if net.conv.bias is not None else torch.float32
        return net
    net,x = made(make),image()
    for verify in (True,False):
        new = BN_Folder(verify=verify).fold(net, x, inplace=True)
        assert new.conv.bias is None

def test_norm_whose_attributes_are_read():
    net,x,folder = made(lambda: Reads(lambda m: torch.float64 if m.num_features<0 else torch.float32)),image(),BN_Folder()
    new = folder.fold(net, x)
    assert "does not run (AttributeError: 'Identity' object has no attribute 'num_features')" in reason(folder.result, 'norm')
    assert torch.equal(run(new, x)[0], run(net, x)[0])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('prepare', [quantization.prepare,quantization.prepare_qat])
def test_prepared_for_quantization(prepare):
    net = nn.Sequential(quantization.QuantStub(), conv(), nn.BatchNorm2d(4), nn.ReLU(), quantization.DeQuantStub())
    assert BN_Folder().plan(net, image()).summary=='1 of 1 norms fold' # with stubs only
    qat = prepare is quantization.prepare_qat
    net.qconfig = quantization.get_default_qat_qconfig('fbgemm') if qat else quantization.get_default_qconfig('fbgemm')
    net = prepare(net.train(qat))
    before = state(net)
    for method in (BN_Folder().plan,BN_Folder().fold):
        with pytest.raises(FoldError, match='Fold the model first, then prepare it'): method(net)
    assert state(net)==before

def test_exported_graph_within_a_model():
    net,x = made(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())),image()
    exported = torch.export.export(net, (x,))
    with pytest.raises(FoldError, match='Fold the model that it was exported from'): BN_Folder().fold(nn.Sequential(exported.module()), x)

# ---- Other threads

def test_folds_beside_predictions():
    "Four threads fold one model while two others predict, with it and with another, and one draws random numbers."
    def block(i): return conv(i),nn.BatchNorm2d(4),nn.ReLU()
    net,other,x = made(lambda: nn.Sequential(*block(3), *block(4))),made(lambda: nn.Sequential(*block(3))),image()
    refs,errors,wrong,done = {m:now(m, x)[0] for m in (net,other)},[],[],threading.Event()
    folded = [None]*12
    def guarded(f):
        def go():
            try: f()
            except Exception as e: errors.append(e)
        return threading.Thread(target=go)
    def fold(k):
        for i in range(k, len(folded), 4): folded[i] = BN_Folder().fold(net, x)
    def predict(m):
        while not done.is_set():
            if not torch.equal(now(m, x)[0], refs[m]): wrong.append(m)
    def draw():
        while not done.is_set(): drawn.append(torch.rand(3))
    drawn,folding = [],[guarded(lambda k=k: fold(k)) for k in range(4)]
    predicting = [guarded(draw),*(guarded(lambda m=m: predict(m)) for m in refs)]
    for t in (*predicting,*folding): t.start()
    for t in folding: t.join()
    done.set()
    for t in predicting: t.join()
    assert not errors and not wrong
    assert len({tuple(o.tolist()) for o in drawn})==len(drawn)>0
    assert all(distance(now(m, x), [refs[net]])<1e-6 and not any(isinstance(o, nn.BatchNorm2d) for o in m) for m in folded)

# ---- Time

def grows_like_its_length(trace_of, n=100):
    "Twice the levels are twice the rules that planning asks, or less."
    (_,some),(_,many) = (planning.asked(trace_of(n)) for n in (n,2*n))
    assert 0<many<=2.2*some

@pytest.mark.parametrize('kind', planning.kinds)
def test_planning_grows_like_the_model(kind):
    "In the one kind whose models grow like the square of their levels fewer are enough; where one norm waits and looks far, more."
    grows_like_its_length(lambda n: planning.traced(kind, n), {'cat, of all levels':50, 'diamond, no layer inside':200}.get(kind, 100))

class EachTwice(nn.Module):
    "Each norm runs twice, and can fold only after the one behind it: the last one first."
    def __init__(self, n):
        super().__init__()
        self.first,self.last = conv(),conv(4, 2, 1)
        self.norms,self.convs = (nn.ModuleList([make() for _ in range(n)]) for make in (lambda: nn.BatchNorm2d(4),lambda: conv(4, 2, 1)))
    def forward(self, x):
        x = y = self.first(x).tanh()
        side = 0
        for norm,c in zip(self.norms, self.convs): y,side = norm(y),side+c(norm(x))
        return side+self.last(y)

def test_planning_of_norms_that_wait_for_the_next():
    grows_like_its_length(lambda n: trace(made(lambda: EachTwice(n)), image()))
    stays_right(lambda: EachTwice(5), image(), 5)

@pytest.mark.parametrize('kind', planning.kinds)
def test_levels_are_folded_rightly(kind):
    net,x = made(lambda: planning.Levels(kind, 6)),image()
    for verify in (True,False): check_fold(net, BN_Folder(verify=verify).fold(net, x), x)

def test_norm_that_takes_another_up_on_its_way_need_not_hold_it():
    "In half precision the first norm's weight times the second's would overflow; what it multiplies does not."
    net = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Tanh()))
    with torch.no_grad():
        for p in net[0].parameters(): p.mul_(1e-4)
        net[1].running_mean.zero_()
        net[1].running_var.fill_(1e3)
        net[1].weight.fill_(6e4)
        net[2].weight.fill_(100)
    folder = BN_Folder(verify=False)
    folder.fold(net.half(), torch.randn(3, 4).half())
    assert [(o.norm,o.into) for o in folder.result.folded]==[('1',['0']),('2',['0'])]

@pytest.mark.parametrize('n,which', [*((n,w) for n in (1,8,16) for w in ('one','half','all')),(64,'one')])
def test_proofs_for_norms_that_fail(n, which):
    "They are found by halves, and a half that holds is not looked at again."
    failing = planning.which(n)[which]
    k,count = len(failing),planning.proofs(n, failing)['proofs'] # which asserts that just they are kept
    assert count<=k*(2*math.log2(n/k)+2)+3

@pytest.mark.parametrize('asked', [{0},{15},{3,4,12}])
def test_forward_that_asks_which_norms_are_there(asked):
    net,x,folder = made(lambda: planning.Branches(16, asked)),torch.randn(4, 8),BN_Folder()
    ref,before = now(net, x),state(net)
    assert distance(now(folder.fold(net, x), x), ref)<1e-6 and state(net)==before
    assert {int(o.norm.split('.')[1]) for o in folder.result.kept}==asked
    assert all('failed verification: the folded model did not compute the same' in o.reason for o in folder.result.kept)
