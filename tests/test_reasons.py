"Reasons that were not true, each by name; and a check of the check that all tests run, which must find those that are not."
import pytest, torch, torch.nn.functional as F
from fastai.torch_core import TensorBase
from torch import nn
from fasterfold.find import Kept
from fasterfold.plan import plan_folds
from fasterfold.trace import trace
from helpers import *
from reasons import check_reason

def conv(i=3, o=4): return nn.Conv2d(i, o, 3, padding=1)
def norm(n=4): return nn.BatchNorm2d(n)
def image(): return torch.randn(2, 3, 6, 5)
def conditional(m, x): return F.batch_norm(x, m.b.running_mean, m.b.running_var, x.mean((0,2,3)), None)

class Drawn(nn.BatchNorm2d):
    "Always normalizes with the statistics of its batch, as for Monte Carlo estimates."
    def forward(self, x): return F.batch_norm(x, None, None, self.weight, self.bias, True)
class Trained(nn.BatchNorm2d):
    "Has statistics, and does not use them."
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.)

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, 1, 1)+.5)
    def forward(self, x): return x*self.gamma

def of_class(m, cls):
    "`m` with a weight of a class that has PyTorch's functions of its own."
    m.weight = nn.Parameter(m.weight.detach().as_subclass(cls))
    return m
def positions(m, x): return m.norm(F.max_pool2d(m.conv(x), 2, return_indices=True)[1].float())
def sampled(m, x): return F.grid_sample(x, m.norm(x[:,:2].tanh()).permute(0, 2, 3, 1), align_corners=False)
def own_product(m, x): return torch.addmm(y:=m.norm(x.tanh()), y, m.w)
def halves(m, x): return m.norm(torch.cat([(y:=m.conv(x)).flip(2), y.flip(3)], 1))
def plain_weight(m, x): return m.norm(F.conv2d(x, *m.plain)).relu()

CASES = { # what is told: (model, input, the norm, its reason)
    'input by keyword': (Fn(lambda m,x: m.norm(x=m.conv(x)), conv=conv(), norm=Fn(lambda m,x: m.b.weight[:,None,None]*x, b=norm())), image, 'norm',
        'it is called with `x=`, which an `nn.Identity` does not take'),
    'weight from the input': (Fn(lambda m,x: m.act(m.conv(x)), conv=conv(), act=Fn(conditional, b=norm())), image, 'act',
        'its `weight` is not known to be the same for every input'),
    'no statistics': (nn.Sequential(conv(), Drawn(4)), image, '1',
        'it normalizes with statistics of its input, which change with it (as with `track_running_stats=False`)'),
    'unused statistics': (nn.Sequential(conv(), Trained(4)), image, '1', 'it normalizes with statistics of its input, which change with it'),
    'reader of what lies before': (Fn(lambda m,x: m.norm((y:=m.conv(x)).flip(3))+y, conv=conv(), norm=norm()), image, 'norm',
        'what `conv` (Conv2d) makes also feeds `add` in `the model`, and …'),
    'one norm, one weight twice': (Fn(lambda m,x: m.norm(torch.cat([m.conv(x), m.conv(2*x)], 1)), conv=conv(), norm=norm(8)), image, 'norm',
        '`conv.weight` is used more than once, and different maps are wanted of it, and …'),
    'one value twice': (Fn(halves, conv=conv(), norm=norm(8)), image, 'norm', 'what `conv` (Conv2d) makes also feeds `flip` in `the model`, and …'),
    'positions': (Fn(positions, conv=conv(), norm=norm()), image, 'norm', 'it reads the positions that `max_pool2d_with_indices` in `the model` found, and …'),
    'grid': (Fn(sampled, norm=norm(2)), image, 'norm', '…, and `grid_sampler_2d` in `the model` takes it as `grid`'),
    'added to a product': (Fn(lambda m,x: torch.addmm(m.norm(x.tanh()), x, x), norm=nn.BatchNorm1d(3)), lambda: torch.randn(3, 3), 'norm',
        '…, and it is added to something else in `addmm` in `the model`'),
    'added to its own product': (Fn(own_product, norm=nn.BatchNorm1d(3), w=nn.Parameter(torch.randn(3, 3))), lambda: torch.randn(3, 3), 'norm',
        '…, and it is added to something else in `addmm` in `the model`'),
    'added and multiplied': (Fn(lambda m,x: m.norm(torch.addcmul(y:=m.conv(x), y, m.b(x))), conv=conv(), b=conv(), norm=norm()), image, 'norm',
        '`addcmul` in `the model` reads it twice, and …'),
    'returned weight': (Fn(lambda m,x: (m.norm(m.conv(x)), m.conv.weight), conv=conv(), norm=norm()), image, 'norm', 'the model returns `conv.weight`, and …'),
    'computed weight': (Fn(lambda m,x: F.conv2d(m.norm(x.tanh()), m.c.weight.sigmoid(), m.c.bias), c=conv(), norm=norm(3)), image, 'norm',
        '…, and `sigmoid` in `the model` computes a weight at every call, which cannot be stored (it is the whole model)'),
    'followed by batch statistics': (nn.Sequential(nn.Sigmoid(), norm(3), nn.BatchNorm2d(3, track_running_stats=False)), image, '1',
        'it comes after `0` (Sigmoid), and `2` (BatchNorm2d) cannot take it up'),
    'no norm each time': (Fn(lambda m,x: m.scale(m.conv(x))+m.scale(x[:,:1]), conv=conv(), scale=Scale()), image, 'scale', 'it is no norm each time it runs'),
    'one window': (Fn(lambda m,x: m.norm(m.conv(x).unfold(1, 4, 1)[:,0].permute(0, 3, 1, 2)), conv=conv(), norm=norm()), image, 'norm',
        '`unfold` in `the model` cannot scale each position differently, and …'),
    'tensors of a class of their own': (nn.Sequential(of_class(conv(), TensorBase), norm()), image, '1', 'it returns a `TensorBase`, which nobody saw being made'),
    'padding': (Fn(lambda m,x: m.c(F.pad(m.norm(x.tanh()), (1,1))), norm=norm(3), c=conv()), image, 'norm',
        '…, and `constant_pad_nd` in `the model` adds values that the map would change'),
    'plain tensor': (Fn(plain_weight, plain=[torch.randn(4, 3, 1, 1), torch.randn(4)], norm=norm()), image, 'norm',
        '`convolution` in `the model` reads a tensor that is no lasting part of the model, and …')}

@pytest.mark.parametrize('name', CASES)
def test_reason(name):
    model,draw,which,why = CASES[name]
    model,x = randomize_norms(model),draw()
    folder = BN_Folder(verify=False)
    assert distance(run(folder.fold(model, x), x), run(model, x))<1e-6
    start,_,end = why.partition('…')
    got = reason(folder.result, which)
    assert got.startswith(start) and got.endswith(end)

def test_statistics_that_are_finite():
    "It is their inverse that is not."
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, eps=0.))
    model[1].running_var[0] = 0
    assert reason(BN_Folder(verify=False).plan(model, image()), '1')=='it multiplies by or adds numbers that are not finite'

def network():
    def f(m, x):
        y = m.conv(x)
        return m.two(m.norm(y).relu())+y+m.three(x)
    return Fn(f, conv=conv(), norm=norm(), two=conv(4), three=conv())

FALSE = dict(other_layer='its input also feeds `three` (Conv2d), and `relu` in `the model` does not let a shift pass',
    other_op='its input also feeds `add` in `the model`, and `sigmoid` in `the model` does not let a shift pass',
    wrong_side='`relu` in `the model` does not let a shift pass, and its input also feeds `add` in `the model`',
    wrong_claim='its input also feeds `add` in `the model`, and it is followed by `relu` in `the model`',
    behind_weights='its input also feeds `add` in `the model`, and the model returns what lies in between',
    no_such_hook='a hook (see) watches it', ran='it did not run on the sample',
    straight="it comes straight from the model's input, and `relu` in `the model` does not let a shift pass",
    weight_used_once='`conv.weight` is also used by `conv` (Conv2d), and `relu` in `the model` does not let a shift pass', unknown='it would rather stay')

@pytest.mark.parametrize('name', FALSE)
def test_reason_that_is_not_true(name):
    model = randomize_norms(network())
    graph = trace(model, image())
    plan = plan_folds(graph)
    assert [o.reason for o in plan.kept]==['its input also feeds `add` in `the model`, and `relu` in `the model` does not let a shift pass']
    check_reason(graph, plan, plan.kept[0])
    with pytest.raises(AssertionError, match='does not say' if name=='unknown' else 'not true'): check_reason(graph, plan, Kept('norm', FALSE[name]))
