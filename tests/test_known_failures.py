"""What other folders have got wrong, and what random networks have found here, each by name.

Every model is folded without verification, so that nothing but the rules themselves can make it right, and once with it.
"""
import itertools
import pytest, timm, torch
import torch.nn.functional as F
from fastai.layers import BatchNorm1dFlat
from torch import nn
from torch.nn.utils import parametrize,parametrizations
from torchvision.ops import FrozenBatchNorm2d
from fasterfold.cost import latency
from fasterfold.rules import PULL
from fasterfold.state import FoldError
from helpers import *

def double(*shape): return torch.randn(*shape, dtype=torch.float64)

class Scale(nn.Module):
    "A constant per channel, as in LayerScale."
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(n)+.5)
    def forward(self, x): return x*self.gamma[:,None,None]

def folds(model, *sample, folded=None, kept=None):
    "Fold `model` in float64 in every way, and check that its outputs stay; returns the plan. `folded` and `kept` name all norms there."
    model = randomize_norms(model).double()
    refs,before = run(model, sample),state(model)
    for verify in (False,True):
        folder = BN_Folder(verify=verify)
        new = folder.fold(model, sample)
        assert distance(run(new, sample), refs)<1e-12
        plan = folder.result
        assert not any('failed verification' in o.reason for o in plan.kept)
        if folded is not None: assert names_of(plan.folded)==folded.split()
        if kept is not None: assert sorted(names_of(plan.kept))==sorted(kept.split())
    assert state(model)==before
    return plan

def image(c=3, n=2): return double(n, c, 6, 5)
def conv(i=3, o=4, k=3, **kwargs): return nn.Conv2d(i, o, k, padding=k//2, **kwargs)

# ---- known failures of other folders

def test_conv_reused_with_and_without_norm():
    "pytorch issue 197539: the norm went into a convolution that also runs without it."
    net = Fn(lambda m,x: m.norm(m.conv(x))+m.conv(x.flip(3)), conv=conv(), norm=nn.BatchNorm2d(4))
    assert '`conv' in reason(folds(net, image(), kept='norm'), 'norm')

@pytest.mark.parametrize('groups', [1,2,4])
def test_grouped_transposed_conv(groups):
    "pytorch issue 180995: the weight of a grouped transposed convolution is [in, out/groups, …]."
    folds(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, groups=groups), nn.BatchNorm2d(8)), image(4), folded='1')

@pytest.mark.parametrize('cls', [nn.ConvTranspose1d,nn.ConvTranspose2d,nn.ConvTranspose3d])
def test_transposed_conv_is_scaled_on_its_output_axis(cls):
    "ultralytics issue 25364; as many inputs as outputs hides the mistake from shapes."
    k = int(cls.__name__[-2])
    folds(nn.Sequential(cls(4, 4, 2, bias=False), [nn.BatchNorm1d,nn.BatchNorm2d,nn.BatchNorm3d][k-1](4)), double(2, 4, *[3]*k), folded='1')

def test_conv_output_with_second_consumer():
    "executorch issue 20601."
    net = Fn(lambda m,x: m.norm(y:=m.conv(x)).relu()+y, conv=conv(), norm=nn.BatchNorm2d(4))
    assert 'feeds' in reason(folds(net, image(), kept='norm'), 'norm')

def test_groups_of_levit():
    "LeViT pull request 22: `fuse` forgot the groups."
    net = nn.Sequential(conv(4, 8, groups=4, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 8, groups=2), nn.BatchNorm2d(8))
    folds(net, image(4), folded='1 4')

def test_functional_batch_norm():
    "pytorch issue 122070. A function cannot be removed, and says so."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm = conv(),nn.BatchNorm2d(4)
        def forward(self, x):
            n = self.norm
            return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0., n.eps)
    plan = folds(Net(), image(), folded='')
    assert 'called as a function' in reason(plan, '')

def test_linear_flatten_norm():
    "optimum issue 348."
    folds(nn.Sequential(nn.Linear(5, 6), nn.Flatten(), nn.BatchNorm1d(24)), double(2, 4, 5), kept='2')
    folds(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4)), double(2, 4, 5), kept='1')
    folds(nn.Sequential(conv(), nn.Flatten(), nn.BatchNorm1d(120)), image(), kept='2')
    folds(nn.Sequential(nn.Linear(5, 6), nn.Flatten(), nn.BatchNorm1d(6)), double(2, 5), folded='2')
    folds(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(120), nn.Linear(120, 3)), image(), folded='1 3')

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    "pytorch issues 120545 and 145623: folded in low precision, the error is several times the original's."
    net = randomize_norms(nn.Sequential(*[nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]))
    net,x = net.to(dtype),torch.randn(2, 8, 8, 8).to(dtype)
    folder = BN_Folder()
    new = folder.fold(net, x)
    own,diff,exact = errors(net, new, x)
    assert names_of(folder.result.folded)==[f'{i}.1' for i in range(6)] and exact<1e-12 and diff<=2*own
    proof = folder.result.proof
    assert proof.own>0 and proof.folded<=2*proof.own and proof.exact<1e-12

@pytest.mark.parametrize('write', [lambda y: y.relu_(), lambda y: y.add_(1), lambda y: y[:,:1].mul_(2), lambda y: y.zero_()])
def test_input_of_norm_written_later(write):
    "An `Identity` is its input: folding forward would show the write to who reads the output."
    def f(m, x):
        y = m.conv1(x).sigmoid()
        z = m.norm(y)
        write(y)
        return m.conv2(z),y
    folds(Fn(f, conv1=conv(), norm=nn.BatchNorm2d(4), conv2=conv(4, 4, 1)), image(), kept='norm')

def test_output_of_norm_written_later():
    def f(m, x):
        y = m.conv1(x).sigmoid()
        z = m.norm(y)
        return m.conv2(z.add_(1)),y
    folds(Fn(f, conv1=conv(), norm=nn.BatchNorm2d(4), conv2=conv(4, 4, 1)), image(), kept='norm')

class Box:
    __slots__ = 'held',
    def __init__(self, held): self.held = held

aside = []
@pytest.mark.parametrize('where', [Box,lambda y: {y},lambda y: aside.append(y),lambda y: lambda: y])
def test_output_where_nobody_looks(where):
    "What a model returns in an object that PyTorch cannot look into, or puts aside, is seen as well."
    def f(m, x):
        y = m.conv(x)
        return m.norm(y).relu(),where(y)
    folds(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4)), image(), kept='norm')
    folds(Fn(lambda m, x: (m.norm(m.conv(x)).relu(),where(x*2)), conv=conv(), norm=nn.BatchNorm2d(4)), image(), folded='norm')
    aside.clear()

def test_attribute_that_a_layer_keeps():
    def f(m, x):
        m.seen = y = m.conv(x)
        return m.norm(y).relu()
    folds(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4)), image(), kept='norm')

# ---- proof

@pytest.fixture
def no_bias(monkeypatch):
    "A wrong rule: it forgets the bias of a transposed convolution."
    right = PULL['convolution']
    monkeypatch.setitem(PULL, 'convolution', lambda op,out,a,ctx: right(op, out, a, ctx)[:1] if op.args.transposed else right(op, out, a, ctx))

def test_planted_wrong_rule_is_caught(no_bias):
    "The norms that the rule spoils stay, all others go, and the model is right."
    layers = conv(),nn.ConvTranspose2d(4, 4, 2),conv(4, 4),nn.ConvTranspose2d(4, 4, 2)
    net = nn.Sequential(*[m for c in layers for m in (c,nn.BatchNorm2d(4),nn.ReLU())])
    net,x = randomize_norms(net).double(),image()
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert names_of(folder.result.folded)==['1','7'] and names_of(folder.result.kept)==['4','10']
    assert all('failed verification' in o.reason for o in folder.result.kept)
    assert distance(run(new, x), run(net, x))<1e-12
    assert isinstance(new[1], nn.Identity) and isinstance(new[4], nn.BatchNorm2d) and torch.equal(new[3].weight, net[3].weight)

def test_planted_wrong_rule_next_to_rounding(no_bias):
    "How many numbers the first item gives is decided by rounding, and the second sample has no other item: the whole sample is proved too."
    def f(m, x):
        y = m.norm1(m.conv(x[:1]))
        return y[(y*2**24).round().long()%2==0],m.norm2(m.up(x[1:]))
    net = randomize_norms(Fn(f, conv=conv(), norm1=nn.BatchNorm2d(4), up=nn.ConvTranspose2d(3, 4, 2), norm2=nn.BatchNorm2d(4)))
    folder = BN_Folder()
    folder.fold(net, image().float())
    assert names_of(folder.result.folded)==['norm1'] and 'failed verification' in reason(folder.result, 'norm2')

def test_control_flow_on_data():
    "What the norm sees decides what runs, so it stays."
    def f(m, x):
        y = m.conv(x)
        return m.norm(y) if y.mean()>0 else m.other(y)
    net = Fn(f, conv=conv(), norm=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4))
    plan = folds(net, image(), folded='')
    assert sorted(names_of(plan.kept))==['norm','other'] and 'did not run' in ' '.join(o.reason for o in plan.kept)

def test_control_flow_that_the_second_sample_shows():
    "The convolution goes on with or without its norm depending on a number that leaves the graph; the second sample takes the other way."
    def f(m, x):
        y = m.conv(x)
        return m.norm(y) if x.sum().item()>0 else y
    net,x = randomize_norms(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4))).double(),image().abs()
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert 'would be wrong on inputs of' in reason(folder.result, 'norm')
    assert distance(run(new, -x), run(net, -x))==0 and distance(run(new, x), run(net, x))==0

def test_fold_that_holds_for_one_image_size_only():
    "Images that windows of 7 do not divide are padded with zeros after the norm; the sample, which is divided, does not show how much."
    def f(m, x): return m.conv(F.pad(m.norm(x.relu()), (0, -x.shape[-1]%7, 0, -x.shape[-2]%7)))
    net = randomize_norms(Fn(f, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 7, stride=7))).double()
    folder = BN_Folder()
    new = folder.fold(net, double(2, 4, 224, 224))
    assert '`constant_pad_nd` in `the model` adds values that the map would change' in reason(folder.result, 'norm')
    assert distance(run(new, x:=double(2, 4, 100, 100)), run(net, x))==0

def test_either_of_two_norms_could_go():
    "Each could go into the other, and only one batch size calls both: while one is put to the proof, the other must not go in its place."
    def f(m, x):
        y = m.first(m.conv(x))
        return m.second(y) if len(x)==1 else y
    net,x = randomize_norms(Fn(f, conv=conv(), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4))).double(),double(1, 3, 9, 9)
    net.conv.register_forward_hook(lambda m,args,out: None)
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert sorted(names_of(folder.result.kept))==['first','second'] and all('would be wrong on inputs of' in o.reason for o in folder.result.kept)
    assert distance(run(new, x), run(net, x))==0

@pytest.mark.parametrize('leave', [lambda y: y.data*2, lambda y: torch.from_numpy(y.numpy()*2), lambda y: torch.tensor(y.tolist())*2])
def test_value_that_leaves_the_graph(leave):
    net,x = randomize_norms(Fn(lambda m,x: m.norm(y:=m.conv(x))+leave(y), conv=conv(), norm=nn.BatchNorm2d(4))).double(),image()
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert distance(run(new, x), run(net, x))==0 and names_of(folder.result.kept)==['norm']

def test_random_model_is_refused():
    net = Fn(lambda m,x: m.norm(m.conv(x))*torch.rand(1).item(), conv=conv(), norm=nn.BatchNorm2d(4))
    net,x = randomize_norms(net).double(),image()
    draws = run(net, x),run(net, x)
    assert distance(*draws)==0 # runs are seeded alike
    before = state(net)
    count = itertools.count()
    net.f = lambda m,x: m.norm(m.conv(x))*(1+next(count))
    with pytest.raises(FoldError, match='different outputs'): BN_Folder().fold(net, x, inplace=True)
    assert state(net)==before

# ---- shared modules and weights

def heads(m, x): return m.norm(m.conv(x)),m.norm(m.conv(x.flip(2)))
def test_shared_head_in_tandem():
    "A head that runs on every level of a pyramid folds once."
    plan = folds(Fn(lambda m,x,y: heads(m, x)+heads(m, y), conv=conv(), norm=nn.BatchNorm2d(4)), image(), double(2, 3, 3, 3), folded='norm')
    assert plan.folded[0].calls==4

def test_shared_conv_with_a_norm_for_each_level():
    net = Fn(lambda m,x: (m.norm1(m.conv(x)),m.norm2(m.conv(x.flip(2)))), conv=conv(), norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4))
    assert all('conv' in o.reason for o in folds(net, image(), kept='norm1 norm2').kept)

def test_norm_shared_by_two_convs():
    folds(Fn(lambda m,x: m.norm(m.conv1(x))+m.norm(m.conv2(x)), conv1=conv(), conv2=conv(k=1), norm=nn.BatchNorm2d(4)), image(), folded='norm')

def test_norm_that_runs_twice_in_series(): folds(nn.Sequential(conv(), norm:=nn.BatchNorm2d(4), norm), image())

def test_module_under_two_names():
    "The norm is replaced under each of its names."
    net = nn.Sequential(conv(), nn.BatchNorm2d(4))
    net.again = net[1]
    net = randomize_norms(Fn(lambda m,x: m.a[1](m.a[0](x)), a=net))
    new = BN_Folder().fold(net, torch.randn(2, 3, 6, 5))
    assert isinstance(new.a[1], nn.Identity) and new.a.again is new.a[1]

def test_tied_weights():
    one,two = conv(3, 3),conv(3, 3)
    two.weight = one.weight
    folds(Fn(lambda m,x: m.two(m.norm(m.one(x))), one=one, norm=nn.BatchNorm2d(3), two=two), image(), kept='norm')

def test_tied_weight_of_a_module_that_does_not_run():
    "A decoder that is used elsewhere keeps its weight."
    one,two = nn.Linear(4, 5),nn.Linear(4, 5)
    two.weight = one.weight
    net,x = randomize_norms(Fn(lambda m,x: m.norm(m.one(x)), one=one, norm=nn.BatchNorm1d(5), two=two)).double(),double(3, 4)
    new = BN_Folder().fold(net, x)
    assert torch.equal(new.two(x), net.two(x)) and distance(run(new, x), run(net, x))<1e-12

def test_weights_that_share_memory():
    one,two = conv(3, 3),conv(3, 3)
    two.weight.data = one.weight.data
    net = Fn(lambda m,x: m.two(m.norm(m.one(x))), one=one, norm=nn.BatchNorm2d(3), two=two)
    net,x = randomize_norms(net),torch.randn(2, 3, 6, 5)
    folder = BN_Folder(verify=False)
    ref = run(net, x)
    assert folder.fold(net, x, inplace=True) is net
    assert distance(run(net, x), ref)<1e-6

def test_weight_used_by_a_function():
    net = Fn(lambda m,x: m.norm(m.conv(x))+F.conv2d(x, m.conv.weight, padding=1), conv=conv(), norm=nn.BatchNorm2d(4))
    assert '`conv.weight`' in reason(folds(net, image(), kept='norm'), 'norm')

def test_weight_penalty_in_the_output():
    folds(Fn(lambda m,x: (m.norm(m.conv(x)),m.conv.weight.square().sum()), conv=conv(), norm=nn.BatchNorm2d(4)), image(), kept='norm')

def test_statistics_that_are_read_elsewhere():
    folds(Fn(lambda m,x: m.norm(m.conv(x))+m.norm.running_mean.sum(), conv=conv(), norm=nn.BatchNorm2d(4)), image(), kept='norm')

# ---- computed weights

COMPUTED = dict(weight_norm_old=torch.nn.utils.weight_norm, weight_norm=parametrizations.weight_norm, spectral_norm_old=torch.nn.utils.spectral_norm,
    spectral_norm=parametrizations.spectral_norm, orthogonal=lambda m: parametrizations.orthogonal(m))
@pytest.mark.parametrize('kind', COMPUTED)
@pytest.mark.parametrize('order', ['back','forward'])
def test_computed_weights(kind, order):
    "The weight is stored and the norm folds into it; where it goes on being computed, it folds or is kept with the reason."
    layer = COMPUTED[kind](conv(4, 4, 1))
    net = nn.Sequential(layer, nn.BatchNorm2d(4)) if order=='back' else nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), layer)
    randomize_norms(net).double()
    folder = BN_Folder(store_weights=False)
    check_fold(net, folder.fold(net, image(4)), image(4), BN_Folder(store_weights=False, verify=False))
    plan = folder.result
    assert names_of(plan.folded)+names_of(plan.kept)==['1'] and all('weight' in o.reason or 'comes after' in o.reason for o in plan.kept)
    folds(net, image(4))

class Symmetric(nn.Module):
    def forward(self, w): return w+w.transpose(0, 1)
def test_own_parametrization():
    layer = conv(4, 4, 1)
    parametrize.register_parametrization(layer, 'weight', Symmetric())
    net = randomize_norms(nn.Sequential(layer, nn.BatchNorm2d(4))).double()
    assert names_of(BN_Folder(store_weights=False).plan(net, image(4)).kept)==['1']
    folds(net, image(4))

# ---- hooks

def see(m, args, out): pass
def see_before(m, args): pass
def see_grads(m, given, out): pass

@pytest.mark.parametrize('where', [0,1])
@pytest.mark.parametrize('how', ['forward','forward_pre','full_backward'])
def test_hooks_keep_the_norm(where, how):
    "The reason names the hook."
    hook = dict(forward=see, forward_pre=see_before, full_backward=see_grads)[how]
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    getattr(net[where], f'register_{how}_hook')(hook)
    plan = folds(net, image())
    assert hook.__name__ in reason(plan, '1')

def test_hook_that_feeds_the_model():
    "As in fastai's `DynamicUnet`: what the hook keeps is used later."
    class Keep:
        def __call__(self, m, args, out): self.out = out
    net = Fn(None, body=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), conv2=conv(4, 4), norm2=nn.BatchNorm2d(4))
    net.body[0].register_forward_hook(Keep())
    net.f = lambda m,x: m.norm2(m.conv2(m.body(x)))+next(iter(m.body[0]._forward_hooks.values())).out
    folds(net, image(), folded='norm2', kept='body.1')

def test_hook_that_changes_the_output():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    net[0].register_forward_hook(lambda m,args,out: out*2)
    folds(net, image(), kept='1')

# ---- kinds of norm

def test_frozen_batchnorm(): folds(nn.Sequential(conv(), FrozenBatchNorm2d(4), nn.ReLU()), image(), folded='1')
def test_instancenorm_with_running_statistics():
    folds(nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), image(), folded='1')
    folds(nn.Sequential(conv(), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()), image(), folded='1')
def test_instancenorm_pair_without_weights():
    folds(nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU()), image())
def test_instancenorm_of_each_image_stays(): assert not folds(nn.Sequential(conv(), nn.InstanceNorm2d(4)), image()).folded
class Found(Fn):
    "A detector: its `head` runs on the images in which something is found."
    def __init__(self): super().__init__(lambda m,x: (lambda y: (y,m.head(y[x[:,0,0,0]>9])))(m.body(x)), body=block(), head=block(4))
def block(i=3): return nn.Sequential(conv(i), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten() if i==4 else nn.Identity())
def test_norm_that_runs_on_nothing():
    "PyTorch multiplies an empty tensor by the norm's `weight[0]`."
    net,x = Found(),image()
    assert 'empty' in reason(folds(net, x, folded='body.1', kept='head.1'), 'head.1')
    folds(net, x+50, folded='body.1 head.1')
def test_half_of_one_image():
    "The second sample is one image, of which half is none."
    net = Fn(lambda m,x: m.norm(m.fc(m.body(x)[:len(x)//2]).flatten(0, 2)), body=block(), fc=nn.Linear(5, 3), norm=nn.BatchNorm1d(3))
    folds(net, image(), folded='body.1 norm')
def test_layerscale():
    net = Fn(lambda m,x: x+m.gamma(m.conv2(m.conv1(x).relu())), conv1=conv(), conv2=conv(4, 3), gamma=Scale(3))
    folds(net, image(), folded='gamma')
def test_layerscale_of_timm():
    net = timm.create_model('convnext_atto', depths=(1,1,1,1), dims=(8,8,8,8), num_classes=3)
    for n,p in net.named_parameters():
        if n.endswith('gamma'): p.data.normal_()
    net,x = net.double().eval(),double(1, 3, 64, 64)
    folder = BN_Folder(verify=False)
    assert distance(run(folder.fold(net, x), x), run(net, x))<1e-10
def test_batchnorm1dflat(): folds(nn.Sequential(nn.Linear(5, 6), BatchNorm1dFlat(6)), double(2, 3, 5), folded='1')
def test_batchnorm_with_activation():
    net = nn.Sequential(conv(), timm.layers.BatchNormAct2d(4))
    folds(net, image(), folded='1')
    assert isinstance(BN_Folder().fold(net, image())[1], nn.ReLU)
@pytest.mark.parametrize('norm', [lambda: nn.BatchNorm2d(4, affine=False),lambda: without_bias(nn.BatchNorm2d(4))], ids=['neither','bias'])
def test_batchnorm_without_weight_or_bias(norm):
    folds(nn.Sequential(conv(bias=False), norm(), nn.ReLU(), conv(4, 4), norm()), image(), folded='1 4')
def test_batch_statistics_stay():
    assert 'track_running_stats' in reason(folds(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), image()), '1')
def test_norm_that_does_not_run():
    assert 'did not run' in reason(folds(Fn(lambda m,x: m.conv(x), conv=conv(), norm=nn.BatchNorm2d(4)), image()), 'norm')
def test_norm_is_the_model(): assert names_of(folds(nn.BatchNorm2d(3), image()).kept)==['']
def test_statistics_that_are_not_finite():
    for k,value in (('running_mean',float('nan')),('running_var',float('inf')),('weight',float('inf'))):
        net,x = randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))).double(),image()
        getattr(net[1], k).data[0] = value
        folder = BN_Folder()
        new = folder.fold(net, x)
        if k!='running_var': assert 'finite' in reason(folder.result, '1')
        assert names_of(folder.result.folded)[-1]=='4' and distance(run(new, x), run(net, x))<1e-12

# ---- options

def test_strip_dropout():
    net = randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Flatten(), nn.Dropout(), nn.Linear(120, 2)))
    x = torch.randn(2, 3, 6, 5)
    kept,stripped = BN_Folder().fold(net, x),BN_Folder(strip_dropout=True).fold(net, x)
    assert isinstance(kept[2], nn.Dropout2d) and isinstance(kept[4], nn.Dropout)
    assert isinstance(stripped[2], nn.Identity) and isinstance(stripped[4], nn.Identity)
    assert torch.equal(*run(kept, x), *run(stripped, x))
    folder = BN_Folder(strip_dropout=True)
    before = state(net)
    folder.fold(net, x, inplace=True)
    folder.undo()
    assert state(net)==before

def test_dropout_inside_a_residual_branch_is_stripped():
    net,x = timm.create_model('resnet10t', drop_path_rate=.1, drop_rate=.1).eval(),torch.randn(1, 3, 64, 64)
    folder = BN_Folder(strip_dropout=True)
    new = folder.fold(randomize_norms(net), x)
    assert distance(run(new, x), run(net, x))<1e-5

@pytest.mark.parametrize('name', ['repvgg_a0','mobileone_s0','repvit_m0_9','fastvit_t8'])
def test_merge_branches(name):
    net,x = randomize_norms(timm.create_model(name)),torch.randn(1, 3, 64, 64)
    folder = BN_Folder(merge_branches=True)
    new = folder.fold(net, x)
    assert count_norm_calls(new, x)==0 and len(list(new.modules()))<len(list(BN_Folder().fold(net, x).modules()))
    check_fold(net, new, x, BN_Folder(merge_branches=True, verify=False))

def test_channels_last():
    net,x = randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(4))),torch.randn(2, 3, 6, 5)
    new = BN_Folder(channels_last=True).fold(net, x)
    assert new[0].weight.is_contiguous(memory_format=torch.channels_last) and net[0].weight.is_contiguous()
    assert distance(run(new, x), run(net, x))<1e-6

# ---- found by random networks

def test_norm_with_unweighted_group_norm_before():
    folds(nn.Sequential(nn.Sigmoid(), nn.GroupNorm(1, 3, affine=False), nn.BatchNorm2d(3)), image())

def test_statistics_of_one_norm_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma,self.norm = Scale(3),nn.BatchNorm2d(3)
        def forward(self, x):
            n = self.norm
            return n(F.batch_norm(self.gamma(x), n.running_mean, n.running_var, n.weight, n.bias))
    folds(Net(), image())

def test_value_minus_itself(): folds(Fn(lambda m,x: m.conv(m.norm(x-x)), conv=conv(3, 4, 1), norm=nn.BatchNorm2d(3)), image())

def test_sum_with_itself_beside_a_norm():
    folds(Fn(lambda m,x: ((y:=m.conv(x))+y)+m.norm(x), conv=conv(3, 3), norm=nn.BatchNorm2d(3)), image())

def test_product_with_itself():
    folds(Fn(lambda m,x: m.norm(torch.addcmul(m.a(x), y:=m.conv(x), y)), a=conv(), conv=conv(), norm=without_bias(nn.BatchNorm2d(4))), image())
    folds(Fn(lambda m,x: m.norm(torch.bmm(y:=m.fc(x), y)), fc=nn.Linear(3, 3, bias=False), norm=without_bias(nn.BatchNorm1d(3))), double(2, 3, 3))

NO_MAPS = dict(relu=F.relu, relu_=lambda x: x.relu_(), abs=torch.abs, flip=lambda x: x.flip(3), roll=lambda x: x.roll(1, 2), swap=lambda x: x[:,[1,0,3,2]],
    avg_pool=lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), max_pool=lambda x: F.max_pool2d(x, 3, 1, 1),
    shuffle=lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape))
@pytest.mark.parametrize('f', NO_MAPS.values(), ids=NO_MAPS)
def test_scale_behind_what_is_no_map(f):
    "One module does both: it is no norm, though its operations carry the identity on."
    class Both(Scale):
        def forward(self, x): return super().forward(f(x))
    folds(nn.Sequential(conv(), Both(4)), image(), folded='', kept='')

def test_scale_between_moves_that_cancel():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(4)-.5)
        def forward(self, x): return (x.permute(0,2,3,1)*self.gamma).permute(0,3,1,2)
    folds(nn.Sequential(conv(), Last()), image(), folded='1', kept='')

@pytest.mark.parametrize('norm', [FrozenBatchNorm2d,Scale,nn.BatchNorm2d])
def test_norm_whose_input_was_written_through_a_view(norm):
    def f(m, x):
        y = m.conv(x)
        y[:,:1].add_(1.)
        return m.norm(y)
    plan = folds(Fn(f, conv=conv(), norm=norm(4)), image())
    assert names_of(plan.folded)+names_of(plan.kept)==['norm']

def test_roll_of_everything(): folds(Fn(lambda m,x: m.norm(torch.roll(m.conv(x), 1)), conv=conv(), norm=nn.BatchNorm2d(4)), image())

def test_attention_to_itself():
    "What is looked up is also what is looked for."
    def f(m, x):
        y = m.norm(m.fc(x))[:,None]
        return F.scaled_dot_product_attention(x[:,None], y, y)
    folds(Fn(f, fc=nn.Linear(4, 4), norm=BatchNorm1dFlat(4)), double(2, 3, 4))
    def g(m, x): return m.norm(F.scaled_dot_product_attention(x[:,None], y:=m.fc(x)[:,None], y)[:,0])
    folds(Fn(g, fc=nn.Linear(4, 4), norm=BatchNorm1dFlat(4)), double(2, 3, 4))

def test_attention_that_sees_nothing():
    "A row whose mask hides everything gives zeros, to which no shift can be added before."
    mask = torch.tensor([[0,0,0],[1,0,1],[1,1,1]], dtype=torch.bool)
    def f(m, x): return m.norm(F.scaled_dot_product_attention(x[:,None], x[:,None], m.fc(x)[:,None], attn_mask=mask)[:,0])
    folds(Fn(f, fc=nn.Linear(4, 4), norm=BatchNorm1dFlat(4)), double(2, 3, 4))

def test_one_value_normed_twice_and_then_written_to():
    "Without the norm both results would be one tensor."
    def f(m, x): return m.norm(y:=m.conv(x)), F.relu_(m.norm(y))
    assert 'in place' in reason(folds(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4)), image()), 'norm')

@pytest.mark.parametrize('again,why', [('norm','in place'),('other','its input also feeds `add`')])
def test_value_normed_again_after_the_first_result_was_written_to(again, why):
    def f(m, x):
        y = m.conv(x)
        z = m.norm(y).add_(x)
        return getattr(m, again)(y)+z
    plan = folds(Fn(f, conv=conv(3, 3), **{k:nn.BatchNorm2d(3) for k in {'norm',again}}), image())
    assert why in reason(plan, 'norm')

@pytest.mark.parametrize('inplace', [False,True])
def test_model_that_writes_to_its_input(inplace):
    "Each run gets a copy of the sample: the next would see what the last one wrote, and so would the caller."
    net = Fn(lambda m,x: m.norm(m.conv(x.sub_(.5).relu_())), conv=conv(), norm=nn.BatchNorm2d(4))
    x = image()
    given = x.clone()
    folds(net, x, folded='norm')
    BN_Folder().fold(net, x, inplace=inplace)
    latency(net, x, seconds=.01)
    assert torch.equal(x, given)

def test_written_result_of_one_norm_of_two():
    "The second norm folds first, as it can go on into what follows; the first must not then write to what that one reads."
    def f(m, x):
        y = m.conv(x)
        z = F.relu_(m.norm(y))
        return m.after(m.other(y))+z
    folds(Fn(f, conv=conv(3, 3, bias=False), norm=nn.BatchNorm2d(3), other=nn.BatchNorm2d(3), after=conv(3, 3)), image())

@pytest.mark.parametrize('frozen', [False,True])
def test_linear_without_bias_on_transposed_tokens(frozen):
    "A frozen weight is multiplied with each item by itself, as `bmm` and not as `mm`, and that operation had no bias to be added."
    net = Fn(lambda m,x: m.norm(m.fc(x.transpose(1, 2)).flatten(0, 1)), fc=nn.Linear(5, 4, bias=False), norm=nn.BatchNorm1d(4))
    net.fc.requires_grad_(not frozen)
    folds(net, double(2, 5, 3), folded='norm')

def test_flip_of_a_lone_number():
    "It has no dimension, and PyTorch flips it along the first."
    folds(Fn(lambda m,x: m.norm(m.conv(x)).mean().flip(0), conv=conv(), norm=nn.BatchNorm2d(4)), image())
    assert 'lets no map pass' in reason(folds(Fn(lambda m,x: m.norm(x.tanh()).mean((0,2,3))[0].flip(0), norm=nn.BatchNorm2d(3)), image()), 'norm')

def test_branches_are_merged_again_after_undo():
    "The weights of merged branches are computed: whoever folds again computes them anew, from the weights of now."
    torch.manual_seed(0)
    net,x = randomize_norms(timm.create_model('fastvit_t8')).eval(),torch.randn(2, 3, 64, 64)
    folder = BN_Folder(merge_branches=True, verify=False)
    folder.fold(net, x, inplace=True)
    before = folder.result.counts
    folder.undo()
    with torch.no_grad(): net.final_conv.conv_kxk[0].conv.weight.mul_(1.5)
    ref = run(net, x)
    folder.refold()
    assert folder.result.counts==before and before['merged'] and not count_norm_calls(net, x)
    assert distance(run(net, x), ref)<1e-5
