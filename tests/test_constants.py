"Weights that are computed at every call are stored where nothing tells the difference, and what never runs goes."
import copy, io, itertools, pickle, threading
import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from fastai.layers import NormType
from fastai.vision.learner import create_unet_model
from timm.layers import StdConv2d, StdConv2dSame
from torchvision import models as M
from fasterfold.constants import same
from helpers import *

def image(n=2, c=3, s=12): return torch.randn(n, c, s, s+1)
def equal(a, b): return len(a)==len(b) and all(map(same, a, b))
def stored_in(folder): return [o.name for o in folder.result.stored]

def stores(make, x, names, keep='', **options):
    "Fold what `make` makes in every way: the layers called `names` are stored, those called `keep` are not, outputs of what has no norms are equal in every bit, and undo gives all back."
    refs = run(made(make), x)
    for folder,net,new,before in every_way(make, x, state, **options):
        assert stored_in(folder)==names.split() and all(any(f'`{k}`' in n for n in folder.result.notes) for k in keep.split())
        if not folder.result.folded: assert equal(run(new, x), refs)
        elif not options: check_fold(made(make), new.eval(), x)
        if new is net:
            folder.undo()
            assert state(net)[0]==before[0]
    return folder

# ---- wrapped layers

class Half(nn.Module):
    def forward(self, w): return w/2
class Symmetric(nn.Module):
    def forward(self, w): return w+w.transpose(0, 1)
def wrap(m, f, name='weight'):
    parametrize.register_parametrization(m, name, f)
    return m

WRAPS = dict(weight_norm_old=nn.utils.weight_norm, weight_norm=parametrizations.weight_norm, spectral_norm_old=nn.utils.spectral_norm,
    spectral_norm=parametrizations.spectral_norm, orthogonal=parametrizations.orthogonal, prune=lambda m: prune.l1_unstructured(m, 'weight', .5),
    own=lambda m: wrap(m, Half()), two=lambda m: wrap(wrap(m, Half()), Symmetric()), bias=lambda m: wrap(m, Half(), 'bias'))

@pytest.mark.parametrize('kind', WRAPS)
@pytest.mark.parametrize('layer', ['conv','linear'])
def test_wrapped_layers(kind, layer):
    def make():
        m = nn.Conv2d(3, 3, 3, padding=1, padding_mode='circular') if layer=='conv' else nn.Linear(13, 13)
        return nn.Sequential(WRAPS[kind](m), nn.ReLU())
    stores(make, x := image(), '0')
    new = BN_Folder().fold(made(make), x)
    assert type(new[0]) in (nn.Conv2d,nn.Linear) and [*sorted(new.state_dict())]==['0.bias','0.weight'] and new[0].weight.requires_grad
    assert equal(run(pickle.loads(pickle.dumps(new)), x), run(made(make), x))

@pytest.mark.parametrize('kind', WRAPS)
def test_norms_fold_into_what_is_stored(kind):
    folder = stores(lambda: nn.Sequential(WRAPS[kind](nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3), nn.ReLU()), image(), '0')
    assert names_of(folder.result.folded)==['1']

def test_unwrapped_where_it_is():
    "Class, padding and hooks of a user stay, and so do those hooks that came before and after."
    seen,calls = [],[]
    def make():
        m = nn.Conv2d(3, 4, 3, padding='same', padding_mode='reflect')
        m.register_forward_pre_hook(lambda m,args: calls.append('before'))
        m = nn.utils.weight_norm(m)
        m.register_forward_hook(lambda m,args,out: seen.append(out.shape))
        return nn.Sequential(m)
    net = made(make)
    layer = net[0]
    BN_Folder().fold(net, image(), inplace=True)
    assert net[0] is layer and type(layer) is nn.Conv2d and layer.padding=='same' and layer.padding_mode=='reflect'
    calls.clear(), seen.clear(), net(image())
    assert calls==['before'] and len(seen)==1 and len(layer._forward_pre_hooks)==1

def test_a_copy_shares_the_class():
    "Unwrapping one leaves its copy, and the copy of a copy, alone."
    for kind in ('own','orthogonal','weight_norm'):
        net = nn.Sequential(WRAPS[kind](nn.Linear(4, 4))).eval()
        twin,x = copy.deepcopy(net),torch.randn(3, 4)
        refs = run(net, x)
        folder = BN_Folder()
        folder.fold(net, x, inplace=True)
        assert type(net[0]) is nn.Linear and parametrize.is_parametrized(twin[0]) and equal(run(twin, x), refs) and equal(run(net, x), refs)
        folder.undo()
        assert equal(run(net, x), refs) and type(net[0]) is type(twin[0])

def test_pruning_is_undone_with_the_pruned_numbers():
    "`prune.remove` would write zeros into the parameter."
    net = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), 'weight', .5)).eval()
    before,folder = net[0].weight_orig.detach().clone(),BN_Folder()
    folder.fold(net, torch.randn(3, 4), inplace=True)
    assert (net[0].weight==0).sum()==8 and not net[0]._buffers
    folder.undo()
    assert torch.equal(net[0].weight_orig, before) and (before!=0).all()

def test_frozen_weights_stay_frozen():
    for kind in WRAPS:
        net = nn.Sequential(WRAPS[kind](nn.Linear(4, 4)))
        for p in net.parameters(): p.requires_grad_(False)
        assert not any(p.requires_grad for p in BN_Folder().fold(net, torch.randn(3, 4)).parameters())

def test_wrapped_recurrent_layers():
    def make(): return Fn(lambda m,x: m.lstm(x)[0], lstm=nn.utils.weight_norm(nn.LSTM(3, 4), 'weight_hh_l0'))
    stores(make, torch.randn(5, 2, 3), 'lstm')
    stores(lambda: Fn(lambda m,x: m.lstm(x)[0], lstm=wrap(nn.LSTM(3, 4), Half(), 'weight_hh_l0')), torch.randn(5, 2, 3), 'lstm')

def test_in_place_writes_reach_no_weight_of_the_model():
    "To read a constant again is to run what made it; a copy in another dtype is skipped, so that the write would hit the parameter."
    def copied(w):
        w = w.float()
        w -= w.mean()
        return w.double()
    net = randomize_norms(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), Own(3, 4, 3, f=copied), nn.BatchNorm2d(4))).double()
    before,x = state(net),image().double()
    for on in (True,False):
        BN_Folder(store_weights=on).plan(net, x)
        assert state(net)[0]==before[0]
        check_fold(net, BN_Folder(store_weights=on).fold(net, x), x, BN_Folder(store_weights=on, verify=False))

class Dropped(nn.Module):
    "DropConnect that is never off."
    def forward(self, w): return F.dropout(w, .5, True)
def test_random_weights_stay():
    folder = BN_Folder(verify=False)
    new = folder.fold(nn.Sequential(wrap(nn.Linear(4, 4), Dropped())), torch.randn(3, 4))
    assert not folder.result.stored and parametrize.is_parametrized(new[0]) and 'not known to be the same at every call' in folder.result.notes[0]

def test_who_watches_the_parametrization_keeps_it():
    def make():
        net = nn.Sequential(WRAPS['own'](nn.Linear(4, 4)))
        net[0].parametrizations.weight[0].register_forward_hook(lambda *_: None)
        return net
    stores(make, torch.randn(3, 4), '', keep='0')

# ---- classes that compute their weight

class Own(nn.Conv2d):
    "A convolution with the weight `f(weight)`, padded by `pad(x)`."
    def __init__(self, *args, f=lambda w: w-w.mean((1,2,3), keepdim=True), pad=lambda x: x, **kwargs):
        super().__init__(*args, **kwargs)
        self.f,self.pad,self.eps = f,pad,1e-5
    def forward(self, x): return F.conv2d(self.pad(x), self.f(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)
class OwnLinear(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*.5, self.bias)
class OwnEmbedding(nn.Embedding):
    def forward(self, x): return F.embedding(x, self.weight*.5, self.padding_idx)
class OwnTransposed(nn.ConvTranspose2d):
    def forward(self, x): return F.conv_transpose2d(x, self.weight*.5, self.bias, self.stride, self.padding, self.output_padding, self.groups)
class Lora(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.a,self.b = nn.Parameter(torch.randn(2, self.in_features)),nn.Parameter(torch.randn(self.out_features, 2))
    def forward(self, x): return F.linear(x, self.weight+self.b@self.a, self.bias)

def written(w):
    w = w*2
    w -= w.mean((1,2,3), keepdim=True)
    w /= w.std()
    w[0].mul_(3)
    return w

CLASSES = dict(standardized=(lambda: StdConv2d(3, 4, 3, stride=2), nn.Conv2d), own=(lambda: Own(4, 6, 3, padding=1, groups=1, bias=False), nn.Conv2d),
    grouped=(lambda: Own(4, 6, 3, dilation=2, groups=2), nn.Conv2d), max_norm=(lambda: Own(4, 6, 3, f=lambda w: w.renorm(2, 0, .1)), nn.Conv2d),
    in_place=(lambda: Own(4, 6, 3, f=written), nn.Conv2d), masked=(lambda: Own(4, 6, 3, f=lambda w: w*(w>0)), nn.Conv2d),
    linear=(lambda: OwnLinear(13, 5), nn.Linear), no_bias=(lambda: OwnLinear(13, 5, bias=False), nn.Linear),
    lora=(lambda: Lora(13, 5), nn.Linear), transposed=(lambda: OwnTransposed(4, 6, 3, stride=2, output_padding=1, groups=2), nn.ConvTranspose2d),
    circular=(lambda: Own(4, 6, 3, pad=lambda x: F.pad(x, (1,1,1,1), 'circular'), padding_mode='circular'), None))

@pytest.mark.parametrize('kind', CLASSES)
def test_classes(kind):
    make,now = CLASSES[kind]
    x = image(c=3 if kind=='standardized' else 4)
    folder = stores(lambda: nn.Sequential(make(), nn.ReLU()), x, '0' if now else '', keep='' if now else '0')
    if now is None: return
    new = BN_Folder().fold(made(lambda: nn.Sequential(make(), nn.ReLU())), x)
    assert type(new[0]) is now and {*new.state_dict()}-{'0.folded'}<={'0.weight','0.bias'} and new[0].weight.requires_grad
    file = io.BytesIO()
    torch.save(new, file)
    assert b'timm' not in file.getvalue() and b'test_constants' not in file.getvalue() and b'fasterfold' not in file.getvalue()
    for n,s in (1,12),(3,17),(2,14):
        y = image(n, x.shape[1], s)[...,:13]
        assert equal(run(new, y), run(made(lambda: nn.Sequential(make(), nn.ReLU())), y))

def test_embeddings(): stores(lambda: nn.Sequential(OwnEmbedding(9, 4, padding_idx=2)), torch.randint(9, (2,5)), '0')

@pytest.mark.parametrize('s', [16,17])
def test_padding_that_depends_on_the_size(s):
    "As 'same' is meant in TensorFlow: also where it is nothing on the sample. Where a stride of 1 fixes it, the layer is plain."
    stores(lambda: nn.Sequential(StdConv2dSame(3, 4, 3, stride=2)), torch.randn(2, 3, s, s), '', keep='0')
    stores(lambda: nn.Sequential(StdConv2dSame(3, 4, 3)), torch.randn(2, 3, s, s), '0')
    stores(lambda: nn.Sequential(Own(3, 4, 2, stride=2, pad=lambda x: F.pad(x, (0,x.shape[3]%2,0,x.shape[2]%2)))), torch.randn(2, 3, 16, 16), '', keep='0')

def test_padding_of_a_class_is_given_to_the_plain_layer():
    class Circular(nn.Conv2d):
        def forward(self, x): return self._conv_forward(x, self.weight*.5, self.bias)
    for how in (dict(padding=1, padding_mode='circular'),dict(padding='same', padding_mode='reflect'),dict(padding='same')):
        stores(lambda: nn.Sequential(Circular(3, 4, 3, **how)), image(), '0')

class Bytes(nn.Module):
    "Its weight is rounded to integers."
    def __init__(self):
        super().__init__()
        self.register_buffer('bytes', torch.randint(-127, 128, (5,4), dtype=torch.int8))
        self.register_buffer('scale', torch.tensor(.01))
    def forward(self, x): return F.linear(x, self.bytes.float()*self.scale)
class Thin(nn.Module):
    "Its weight is a product of two factors."
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Parameter(torch.randn(9, 1)),nn.Parameter(torch.randn(1, 8))
    def forward(self, x): return F.linear(x, self.a@self.b)
def test_weights_that_are_computed_to_save_memory_stay():
    stores(lambda: nn.Sequential(Bytes()), torch.randn(3, 4), '', keep='0')
    stores(lambda: nn.Sequential(Thin()), torch.randn(3, 8), '', keep='0')

class Depends(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*x.mean(), self.bias)
class Twice(nn.Linear):
    def forward(self, x): return F.linear(F.linear(x, self.weight*.5), self.weight*2)
class Residual(nn.Linear):
    def forward(self, x): return x+F.linear(x, self.weight*.5)
class Active(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*.5).relu()
class Parts(nn.Linear):
    "What a mask writes from Python is not known to be constant."
    def forward(self, x):
        w = self.weight.clone()
        w[:,0] = torch.tensor(0.)
        return F.linear(x, w)
class Larger(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*.5 if len(x)<3 else self.weight*2)

@pytest.mark.parametrize('cls', [Twice,Residual,Active,Larger])
def test_what_is_more_than_one_operation_stays(cls): stores(lambda: nn.Sequential(cls(4, 4)), torch.randn(2, 4), '', keep='0')

@pytest.mark.parametrize('cls', [Depends,Parts])
def test_what_is_not_known_to_be_constant_is_not_stored(cls): stores(lambda: nn.Sequential(cls(4, 4)), torch.randn(2, 4), '')

class Turns(nn.Module):
    "Passes its input to the layer the other way round: not contiguous."
    def __init__(self):
        super().__init__()
        self.layer = OwnLinear(6, 5)
    def forward(self, x): return self.layer(x.transpose(1, 2))
def test_gradients_pick_another_kernel():
    "A weight that is trained rounds otherwise in `F.linear` of an input that is not contiguous: bits are compared without gradients, which are back afterwards."
    for f in (Turns,lambda: Fn(lambda m,x: m.layer(x.transpose(1, 2)), layer=wrap(nn.Linear(6, 5), Half()))):
        net,x = made(f),torch.randn(3, 6, 7)
        folder = BN_Folder()
        new = folder.fold(net, x)
        assert stored_in(folder)==['layer'] and new.layer.weight.requires_grad and distance(run(new, x), run(net, x))<1e-6
        new.layer.weight.requires_grad_(False)
        assert equal(run(new, x), run(net, x))

def test_tied_weights_stay_tied():
    def make():
        a,b = OwnLinear(4, 4),OwnLinear(4, 4)
        b.weight = a.weight
        return nn.Sequential(a, b)
    net = made(make)
    new = BN_Folder().fold(net, x:=torch.randn(3, 4))
    assert new[0].weight is new[1].weight and equal(run(new, x), run(net, x))
    stores(make, x, '0 1')

def test_tied_to_what_computes_nothing():
    def make():
        a,b = OwnLinear(4, 4),nn.Linear(4, 4)
        b.weight = a.weight
        return nn.Sequential(a, b)
    stores(make, torch.randn(3, 4), '0')

def test_called_twice():
    stores(lambda: Fn(lambda m,x: m.layer(m.layer(x)), layer=OwnLinear(4, 4)), torch.randn(3, 4), 'layer')
    stores(lambda: Fn(lambda m,x: m.a(m.b(x)), a=(layer := OwnLinear(4, 4)), b=layer), torch.randn(3, 4), 'a')
    stores(lambda: Fn(lambda m,x: m.layer(m.layer(x)), layer=WRAPS['weight_norm'](nn.Linear(4, 4))), torch.randn(3, 4), 'layer')

def test_rows_of_no_numbers():
    "A row of zeros has no direction."
    def zeroed(m):
        with torch.no_grad(): m.weight[1] = 0
        return m
    for kind in ('weight_norm_old','weight_norm'):
        net = made(lambda: nn.Sequential(WRAPS[kind](zeroed(nn.Linear(4, 4)))))
        assert run(net, torch.randn(3, 4))[0].isnan().any()
        stores(lambda: nn.Sequential(WRAPS[kind](zeroed(nn.Linear(4, 4)))), torch.randn(3, 4), '0')
    stores(lambda: nn.Sequential(Own(3, 4, 3, f=lambda w: w/w.mul(0))), image(), '0')

def test_layers_that_did_not_run():
    def make(): return Fn(lambda m,x: m.a(x), a=OwnLinear(4, 4), b=OwnLinear(4, 4), c=WRAPS['own'](nn.Linear(4, 4)))
    stores(make, torch.randn(3, 4), 'a')

# ---- what only the whole model shows

class AsksClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = OwnLinear(4, 4),OwnLinear(4, 4)
    def forward(self, x):
        y = self.a(x)
        return self.b(y)*(2 if isinstance(self.a, OwnLinear) else 1)
class AsksEps(AsksClass):
    def forward(self, x): return self.b(x)+self.a(x)*self.a.mine
    def __init__(self):
        super().__init__()
        self.a.mine = .5

@pytest.mark.parametrize('cls', [AsksClass,AsksEps])
def test_a_parent_that_asks(cls):
    "One layer is left out, the other is stored."
    stores(cls, torch.randn(3, 4), 'b', keep='a')

def test_the_model_itself_and_hooks_and_lists():
    stores(lambda: OwnLinear(4, 4), torch.randn(3, 4), '')
    def hooked():
        net = nn.Sequential(OwnLinear(4, 4), OwnLinear(4, 4))
        net[0].register_forward_hook(lambda *_: None)
        return net
    stores(hooked, torch.randn(3, 4), '1', keep='0')
    stores(lambda: Fn(lambda m,x: m.all[0](x), layer=(o := OwnLinear(4, 4)), all=[o]), torch.randn(3, 4), '', keep='layer')
    stores(lambda: Fn(lambda m,x: m.layer(x)+m.layer.weight.sum(), layer=OwnLinear(4, 4)), torch.randn(3, 4), '', keep='layer')

def test_of_a_model_that_is_another_each_time_nothing_is_stored():
    calls = itertools.count()
    net = Fn(lambda m,x: m.layer(x)+next(calls), layer=OwnLinear(4, 4))
    folder = BN_Folder(verify=False)
    folder.fold(net, torch.randn(3, 4))
    assert not folder.result.stored

def test_switched_by_an_argument():
    "The layer computes something else when its parent says so: other arguments are tried."
    class Switched(nn.Linear):
        times = .5
        def forward(self, x): return F.linear(x, self.weight*self.times, self.bias)
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Switched(4, 4)
        def forward(self, x, double=False):
            self.layer.times = 2. if double else .5
            return self.layer(x)
    net,folder,x = Parent().eval(),BN_Folder(),torch.randn(3, 4)
    new = folder.fold(net, x)
    assert not folder.result.stored and equal([new(x, double=True)], [net(x, double=True)])

# ---- reasons, plans, reports, learners

def test_reasons_say_why_a_weight_is_computed():
    net = nn.Sequential(StdConv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4))
    for plan in (BN_Folder().plan(net, torch.randn(2, 3, 16, 16)),(f := BN_Folder()).fold(net, torch.randn(2, 3, 16, 16)) and f.result):
        assert '`0` (StdConv2dSame) computes a weight at every call, which cannot be stored (it pads its input itself)' in reason(plan, '1')
        assert plan.notes==["Weights are computed at every call in `0`: it pads its input itself."]

def test_reasons_that_name_a_parameter_say_it_too():
    conv = Own(3, 8, 3, f=lambda w: w-w.mean(), pad=lambda x: F.pad(x, (0,x.shape[3]%2)))
    net = randomize_norms(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
    assert '`0.weight` is also used by `0` (Own): `0` computes a weight at every call, which cannot be stored (it pads its input itself), and' in reason(BN_Folder().plan(net, image()), '1')

def test_the_plan_shows_it():
    net = nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), WRAPS['prune'](nn.Conv2d(4, 4, 1)))
    before,x = state(net),image()
    plan = BN_Folder().plan(net, x)
    assert state(net)[0]==before[0]
    assert plan.rows()==[('1','folded back','0'), ('0','stored','weight of Conv2d instead of StdConv2d'), ('3','stored','weight of Conv2d')]
    assert plan.summary=='1 of 1 norms fold. 2 weights were computed at every call, and are stored now.' and plan.summary in str(plan) and 'StdConv2d' in plan._repr_html_()
    assert len(pickle.loads(pickle.dumps(plan)).stored)==2
    assert BN_Folder(store_weights=False).plan(net, x).stored==[]

def test_the_report_says_it():
    from fasterfold.report import report
    net,folder = nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)),BN_Folder()
    rep = report(net, folder.fold(net, image()), folder.result, {})
    line = '1 weight was computed at every call, and is stored now.'
    assert line in str(rep) and line in rep._repr_html_() and '"stored"' in rep.to_json()

def test_refold_has_the_weights_of_now():
    net,folder,x = made(lambda: nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), WRAPS['weight_norm'](nn.Conv2d(4, 4, 1)))),BN_Folder(),image()
    folder.fold(net, x, inplace=True)
    folder.undo()
    with torch.no_grad():
        for p in net.parameters(): p.mul_(1.5)
    before,refs = state(net),run(net, x)
    folder.refold()
    assert type(net[0]) is nn.Conv2d and stored_in(folder)==['0','3'] and distance(run(net, x), refs)<1e-6
    folder.undo()
    assert state(net)[0]==before[0]

def test_errors_leave_the_model_as_it_was(monkeypatch):
    import fasterfold.fold
    net = nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), WRAPS['own'](nn.Conv2d(4, 4, 1)))
    before = state(net)
    def fails(*args): raise RuntimeError('no')
    monkeypatch.setattr(fasterfold.fold, 'apply_plan', fails)
    with pytest.raises(Exception, match='no'): BN_Folder().fold(net, image(), inplace=True)
    assert state(net)[0]==before[0]

def learner_of(net):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import MSELossFlat
    xs = torch.randn(8, 3, 12, 12)
    items = [(x,x.mean((1,2)).sum()[None]) for x in xs]
    return Learner(DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu'), net, loss_func=MSELossFlat())

def small_net():
    layers = StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), WRAPS['weight_norm'](nn.Conv2d(4, 4, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))

def test_learners():
    "The optimizer keeps the parameters of before: it goes, and comes back. Validation on the folded model has the weights of each epoch."
    from fasterfold.learner import FoldedValidation
    learn = learner_of(small_net())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=FoldedValidation())
        folded,before,opt = learn.recorder.values[-1][-1],state(learn.model),learn.opt
        assert abs(learn.validate()[0]-folded)<1e-5*abs(folded)
        with learn.folded(): assert learn.opt is None and type(learn.model[0]) is nn.Conv2d
        assert learn.opt is opt and state(learn.model)[0]==before[0] and opt is not None
        loss = learn.validate()[0]
        rep = learn.fold()
        assert learn.opt is None and '2 weights were computed at every call' in str(rep) and abs(learn.validate()[0]-loss)<1e-5*abs(loss)
        learn.fit(1, 1e-3)

# ---- what never runs

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.norm,self.aux,self.head = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),nn.Conv2d(4, 2, 1)
        self.tied,self.read,self.flag = nn.Conv2d(4, 2, 1),nn.Linear(3, 3),False
        self.tied.weight = self.head.weight
    def forward(self, x, more=False):
        y = self.norm(self.body(x))
        z = self.head(y)*self.read.weight.sum()
        return (z,self.aux(y)) if self.flag or more is None else z

def test_what_never_runs_goes():
    net,x = made(Heads),image()
    before,refs = state(net),run(net, x)
    folder = BN_Folder(strip_unused=True)
    new = folder.fold(net, x)
    assert state(net)[0]==before[0] and folder.result.unused==dict(aux=sum(p.numel() for p in net.aux.parameters())) and type(new.aux) is nn.Module
    assert distance(run(new, x), refs)<1e-5 and 'in place of Sequential' in repr(new) and names_of(folder.result.folded)==['norm']
    assert '1 module ran on no sample' in folder.result.summary and ('aux','unused','156 parameters') in folder.result.rows()
    new.flag = True
    with pytest.raises(NotImplementedError, match='forward'): new(x)
    assert type(BN_Folder().fold(net, x).aux) is nn.Sequential # off by default

def test_what_never_runs_comes_back():
    net,folder = made(Heads),BN_Folder(strip_unused=True)
    before = state(net)
    assert folder.plan(net, image()).unused and state(net)[0]==before[0]
    folder.fold(net, image(), inplace=True)
    folder.undo()
    assert state(net)[0]==before[0]
    folder.refold()
    assert type(net.aux) is nn.Module
    assert 'in place of' in repr(pickle.loads(pickle.dumps(net.aux)))

def test_what_one_of_the_samples_runs_stays():
    net = made(lambda: Fn(lambda m,x: m.large(x) if x.shape[3]>9 else m.small(x), large=nn.Conv2d(3, 4, 3), small=nn.Conv2d(3, 4, 3)))
    for verify in (True,False):
        folder = BN_Folder(strip_unused=True, verify=verify)
        folder.fold(net, samples=[image(s=6),image(s=12)])
        assert not folder.result.unused
    folder = BN_Folder(strip_unused=True)
    folder.fold(net, image())
    assert not folder.result.unused # the code asks for sizes, and both answers are run

def test_what_is_asked_for_stays():
    "Of what does not run the parent reads a size."
    net = made(lambda: Fn(lambda m,x: m.a(x)*m.b.in_features, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)))
    folder = BN_Folder(strip_unused=True)
    new = folder.fold(net, torch.randn(3, 4))
    assert [*folder.result.unused]==['c'] and type(new.b) is nn.Linear and 'What ran on no sample stays in `b`' in folder.result.notes[0]

def test_auxiliary_heads():
    "GoogLeNet halves. Then, in training mode, it cannot run."
    net = M.googlenet(weights=None, init_weights=False)
    folder = BN_Folder(strip_unused=True)
    new = folder.fold(net, x:=torch.randn(1, 3, 64, 64))
    assert [*folder.result.unused]==['aux1','aux2'] and sum(folder.result.unused.values())==6379984 and not folder.result.kept
    assert distance(run(new, x), run(net, x))<1e-5
    with pytest.raises(NotImplementedError): new.train()(torch.randn(2, 3, 64, 64))

# ---- real models

class EEGNet(nn.Module):
    "As in the paper, with max-norm constraints of the spatial filters and of the classifier."
    def __init__(self, channels=8, times=128, classes=4):
        super().__init__()
        self.temporal,self.norm1 = nn.Conv2d(1, 8, (1,65), padding=(0,32), bias=False),nn.BatchNorm2d(8)
        self.spatial,self.norm2 = Own(8, 16, (channels,1), groups=8, bias=False, f=lambda w: w.renorm(2, 0, 1.)),nn.BatchNorm2d(16)
        self.depth,self.point,self.norm3 = nn.Conv2d(16, 16, (1,16), padding=(0,8), groups=16, bias=False),nn.Conv2d(16, 16, 1, bias=False),nn.BatchNorm2d(16)
        self.head = wrap(nn.Linear(16*(times//32), classes), MaxNorm())
    def forward(self, x):
        x = F.avg_pool2d(F.elu(self.norm2(self.spatial(self.norm1(self.temporal(x))))), (1,4))
        return self.head(F.avg_pool2d(F.elu(self.norm3(self.point(self.depth(x)))), (1,8)).flatten(1))
class MaxNorm(nn.Module):
    def forward(self, w): return w.renorm(2, 0, .25)

def test_eegnet():
    folder = stores(EEGNet, torch.randn(2, 1, 8, 128), 'spatial head')
    assert not folder.result.kept

@pytest.mark.parametrize('name,n', [('eca_nfnet_l0',57),('resnetv2_50x1_bit',53),('dm_nfnet_f0',None)])
def test_timm(name, n):
    "DeepMind's own pads by the size where it strides: those layers stay."
    torch.manual_seed(0)
    net = timm.create_model(name, **dict(num_classes=10)).eval()
    x = torch.randn(1, 3, 64, 64)
    folder = BN_Folder(verify=n is not None)
    new = folder.fold(net, x)
    assert equal(run(new, x), run(net, x)) and equal(run(new, y:=torch.randn(2, 3, 75, 99)), run(net, y))
    left = [k for k,m in new.named_modules() if 'StdConv' in type(m).__name__]
    if n is not None: assert len(folder.result.stored)==n and not left
    else: assert len(folder.result.stored)>40 and all(new.get_submodule(k).stride==(2,2) for k in left) and left and 'pads its input' in folder.result.notes[0]

@pytest.mark.parametrize('kind', ['Spectral','Weight'])
def test_fastai_unets(kind):
    torch.manual_seed(0)
    net = randomize_norms(create_unet_model(M.resnet18, 3, (32,32), pretrained=False, norm_type=NormType[kind], self_attention=True))
    x,folder = torch.randn(2, 3, 32, 32),BN_Folder()
    new = folder.fold(net, x)
    assert len(folder.result.stored)>10 and not any(k.endswith(('_orig','_g','original0')) for k in new.state_dict())
    check_fold(net, new, x)

def test_pruned_resnet():
    torch.manual_seed(0)
    net = randomize_norms(M.resnet18(num_classes=10))
    for m in net.modules():
        if isinstance(m, nn.Conv2d): prune.l1_unstructured(m, 'weight', .5)
    x,folder = torch.randn(2, 3, 32, 32),BN_Folder()
    new = folder.fold(net, x)
    assert len(folder.result.stored)==20 and not folder.result.kept and not any('mask' in k for k in new.state_dict())
    check_fold(net, new, x)

def test_a_copy_of_a_parametrized_layer_shares_its_lock():
    m = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    m[0].lock = threading.Lock()
    x = torch.randn(2, 3, 6, 6)
    new = BN_Folder().fold(m, x)
    assert new[0].lock is m[0].lock and distance(run(new, x), run(m, x))<1e-6
