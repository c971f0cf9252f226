"""Norms, layers and laws at the rim of what folds, each by name: called by keyword, around recurrent, deformable and weight-normed layers, before pooled
statistics, with complex outputs, with statistics of each input, and with parameters that are pieces of one vector."""
import itertools
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d,FrozenBatchNorm2d,deform_conv2d
from fasterfold.proof import run_as
from fasterfold.rules import PULL
from helpers import *
from test_contents import everything

def image(n=2, h=6, w=5): return torch.randn(n, 3, h, w)
def images(): return image(),image(1, 7, 9),image(3, 6, 6)
def sound(n=2, c=4, size=9): return torch.randn(n, c, size)
def sounds(): return sound(),sound(1, size=5),sound(3, size=12)
def conv(i=3, o=4, k=3): return nn.Conv2d(i, o, k, padding=k//2)
def net_of(make, zero=False, train=False):
    "What `make` makes, with negative scales, and with zeros among them if asked for."
    net = made(make, train)
    for m in net.modules():
        if zero and getattr(m, 'running_mean', None) is not None and getattr(m, 'weight', None) is not None: m.weight.data[1] = 0
    return net

def stays_right(make, xs, folded='', **why):
    """With negative and zero scales, from either mode, with proof and without, as a copy and in place: the norms `folded` go, and the plan says so, too; others stay
    for reasons that contain `why`; on each of `xs` the model is as far from its float64 run as before; undo gives it back."""
    why = {k.replace('_', '.'):v for k,v in why.items()}
    for zero,verify,inplace in itertools.product((False,True), repeat=3):
        net = net_of(make, zero, train := inplace!=verify)
        before,eps,folder = everything(net),eps_of(net),BN_Folder(verify=verify, store_weights=False) # else no rule is asked about computed weights
        want = [(exact := run_as(net, x),distance(run(net, x), exact)) for x in xs]
        plans = [] if verify or inplace else [folder.plan(net, xs[0])]
        new = folder.fold(net, xs[0], inplace=inplace)
        for p in (*plans,folder.result):
            assert names_of(p.folded)==folded.split()
            assert {o.norm for o in p.kept}==why.keys() and all(w in reason(p, k) for k,w in why.items()), p.kept
        for _ in range(2):
            new.train()
            new.eval()
            for x,(exact,own) in zip(xs, want): assert distance(run(new, x), exact)<=10*own+10*eps
        if not inplace: continue
        if folded: folder.undo()
        net.train(train)
        assert everything(net)==before

# ---- Called by keyword

def called(call, norm, **more):
    return lambda: Fn(lambda m,x: m.last(call(m, m.conv(x))), conv=conv(), norm=norm(), last=conv(4, 2), **{k:f() for k,f in more.items()})
class Named(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x)
class Activated(nn.BatchNorm2d):
    "As timm's `BatchNormAct2d`, with the name of argument that PyTorch has."
    def __init__(self, n):
        super().__init__(n)
        self.act = nn.ReLU()
    def forward(self, input): return self.act(super().forward(input))
class Writes(nn.BatchNorm2d):
    def forward(self, input): return super().forward(input.mul_(2))

def test_norm_called_by_keyword(): stays_right(called(lambda m,y: m.norm(input=y).relu(), lambda: nn.BatchNorm2d(4)), images(), 'norm')
def test_norm_called_by_keyword_and_by_position():
    "Two calls of one norm."
    stays_right(lambda: Fn(lambda m,x: m.norm(input=m.a(x))+m.norm(m.b(x)), a=conv(), b=conv(), norm=nn.BatchNorm2d(4)), images(), 'norm')
def test_layers_around_a_norm_called_by_keyword():
    def f(m, x): return m.last(input=m.norm(input=m.conv(input=x).sigmoid()))
    stays_right(lambda: Fn(f, conv=conv(), norm=nn.BatchNorm2d(4), last=conv(4, 2, 1)), images(), 'norm')
@pytest.mark.parametrize('norm', [Named,FrozenBatchNorm2d])
def test_norm_called_by_another_keyword(norm):
    stays_right(called(lambda m,y: m.norm(x=y), lambda: norm(4)), images(), norm='with `x=`, which an `nn.Identity` does not take')
def test_norm_called_by_keyword_with_what_stays():
    stays_right(called(lambda m,y: m.norm(input=y), lambda: Activated(4)), images(), norm='what stays of it need not take')
def test_norm_called_by_keyword_that_writes_to_its_input():
    stays_right(called(lambda m,y: m.norm(input=y)+y, lambda: Writes(4)), images(), norm='it is called by keyword with several tensors or one that is written to')

def test_norm_called_by_keyword_with_what_was_written_to():
    def f(m, x):
        y = m.conv(x)
        y[:,:1].mul_(2)
        return m.norm(input=y)
    stays_right(lambda: Fn(f, conv=conv(), norm=nn.BatchNorm2d(4)), images(), norm='it is called by keyword with several tensors or one that is written to')

class Leaky(nn.Module):
    def forward(self, x, slope=0., *, more=0.): return F.leaky_relu(x, slope+more)
class KeywordOnly(nn.Module):
    def forward(self, *, x): return x.relu()
STAY = dict(option=(Leaky,lambda act,y: act(y, .3)), option_by_keyword=(Leaky,lambda act,y: act(y, more=.3)), keyword=(nn.ReLU,lambda act,y: act(input=y)),
    keyword_only=(KeywordOnly,lambda act,y: act(x=y)))
@pytest.mark.parametrize('kind', STAY)
def test_what_stays_of_a_norm_is_called_in_a_way_of_its_own(kind):
    "In the place of the norm it would be called by position, with one value."
    act,call = STAY[kind]
    class Norm(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.act = act()
        def forward(self, x): return call(self.act, super().forward(x))
    stays_right(lambda: nn.Sequential(conv(), Norm(), conv(4, 2)), images(), **{'1':'does more than scale and shift'})

def see_all(m, args, kwargs, out): pass
def test_hook_that_sees_keywords():
    def make():
        net = called(lambda m,y: m.seen(input=m.norm(y.sigmoid())), lambda: nn.BatchNorm2d(4), seen=lambda: conv(4, 4))()
        net.seen.register_forward_hook(see_all, with_kwargs=True)
        return net
    stays_right(make, images(), norm='see_all')

class OwnDropout(nn.Dropout):
    def forward(self, x): return super().forward(x)
def test_dropout_called_by_keyword():
    "It is stripped where an `nn.Identity` can be called like that."
    net = net_of(called(lambda m,y: m.b(x=m.a(input=m.norm(y))), lambda: nn.BatchNorm2d(4), a=nn.Dropout, b=OwnDropout))
    new = BN_Folder(strip_dropout=True).fold(net, image())
    assert (type(new.a),type(new.b),type(new.norm))==(nn.Identity,OwnDropout,nn.Identity)
    check_fold(net, new, image(1, 7, 9))

# ---- Recurrent layers

class Recurrent(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d, rnn=nn.LSTM, **kwargs):
        super().__init__()
        self.norm,self.rnn,self.first = norm(4),rnn(4, 5, **kwargs),kwargs.get('batch_first')
    def forward(self, x):
        x = self.norm(x.sigmoid()) # [batch, channels, steps]
        return self.rnn(x.transpose(1, 2) if self.first else x.permute(2, 0, 1))[0]

LSTMS = dict(plain={}, batch_first=dict(batch_first=True), both_ways=dict(bidirectional=True), layers=dict(num_layers=3), projected=dict(proj_size=2),
    all=dict(batch_first=True, bidirectional=True, num_layers=2, dropout=.5), all_projected=dict(proj_size=3, bidirectional=True, num_layers=2))
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
@pytest.mark.parametrize('kind', LSTMS)
def test_norm_before_an_lstm(kind, dtype): stays_right(lambda: Recurrent(**LSTMS[kind]).to(dtype), [x.to(dtype) for x in sounds()], 'norm')

class Scaling(nn.Module):
    "As a norm without a shift."
    def __init__(self, n, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1.5, n).view(n, *shape))
    def forward(self, x): return x*self.gamma
def test_norm_before_an_lstm_without_bias():
    stays_right(lambda: Recurrent(bias=False), sounds(), norm='`rnn` (LSTM) has no bias to take the shift')
    stays_right(lambda: Recurrent(norm=lambda n: Scaling(n, 1), bias=False, bidirectional=True), sounds(), 'norm')

def test_lstm_takes_the_norm_into_its_input_weights_only():
    net = net_of(lambda: Recurrent(num_layers=2, bidirectional=True))
    old,folder = {k:p.clone() for k,p in net.rnn.named_parameters()},BN_Folder()
    folder.fold(net, sound(), inplace=True)
    changed = {k for k,p in net.rnn.named_parameters() if not torch.equal(p, old[k])}
    assert changed=={f'{k}_ih_l0{d}' for k in ('weight','bias') for d in ('','_reverse')}
    assert folder.result.folded[0].into==['rnn']

def test_lstm_that_others_beside_it_keep():
    "One reads the norm that cannot take it up."
    stays_right(lambda: Fn(lambda m,x: (m.r(x := m.norm(x.sigmoid()).permute(2, 0, 1))[0],x.tanh()), r=nn.LSTM(4, 5), norm=nn.BatchNorm1d(4)), sounds(),
        norm='it is followed by `tanh`')
def test_norms_between_recurrent_layers():
    def f(m, x):
        x = m.a(m.norm(x.sigmoid()).permute(2, 0, 1))[0]
        x = m.norm2(x.permute(1, 2, 0))
        return m.c(m.b(x.permute(2, 0, 1))[0])
    def make():
        return Fn(f, norm=nn.BatchNorm1d(4), a=nn.LSTM(4, 5), norm2=nn.BatchNorm1d(5), b=nn.LSTM(5, 3, bidirectional=True), c=nn.Linear(6, 2))
    stays_right(make, sounds(), 'norm norm2')
def test_lstm_that_starts_from_the_norm():
    "What it starts from is no input."
    def f(m, x):
        x = m.norm(x.sigmoid()).permute(2, 0, 1)
        return m.rnn(x, (x[:1],x[:1]))[0]
    stays_right(lambda: Fn(f, rnn=nn.LSTM(4, 4), norm=nn.BatchNorm1d(4)), sounds(), norm='takes it as `hx_`')
def test_one_lstm_that_reads_a_norm_and_something_else():
    def f(m, x): return m.rnn(m.norm(x.sigmoid()).permute(2, 0, 1))[0]+m.rnn(x.permute(2, 0, 1))[0]
    stays_right(lambda: Fn(f, rnn=nn.LSTM(4, 5), norm=nn.BatchNorm1d(4)), sounds(),
        norm='`rnn.weight_ih_l0` is also used by `rnn` (LSTM)')
def test_lstm_whose_input_weight_is_weight_normed():
    "Which it computes four times, and reads once."
    stays_right(lambda: Recurrent(rnn=lambda *a: parametrizations.weight_norm(nn.LSTM(*a), 'weight_ih_l0', dim=1)), sounds(), norm='original0` is also used by')
def test_norm_of_the_steps_before_an_lstm():
    stays_right(lambda: Fn(lambda m,x: m.rnn(m.norm(x.sigmoid()))[0], rnn=nn.LSTM(9, 5), norm=nn.BatchNorm1d(4)), [sound(),sound(1)],
        norm='`rnn` (LSTM) cannot scale each position differently')
def test_packed_sequence():
    def f(m, x):
        x = m.norm(x.sigmoid()).permute(2, 0, 1)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([len(x)]*x.shape[1]))
        return nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0])[0]
    stays_right(lambda: Fn(f, rnn=nn.LSTM(4, 5), norm=nn.BatchNorm1d(4)), sounds(), norm='it is followed by `_pack_padded_sequence`')

# ---- Deformable convolutions

class Deforms(nn.Module):
    def __init__(self, before=nn.Identity, after=nn.Identity, masked=False, padding=1, groups=1, bias=True):
        super().__init__()
        self.stem,self.offset = conv(3, 4),nn.Conv2d(3, 18, 3, padding=padding)
        self.mask = nn.Conv2d(3, 9, 3, padding=padding) if masked else None
        self.norm,self.deform,self.norm2 = before(4),DeformConv2d(4, 6, 3, padding=padding, groups=groups, bias=bias),after(6)
    def forward(self, x):
        y = self.norm(self.stem(x).tanh())
        return self.norm2(self.deform(y, 2*self.offset(x), self.mask(x).sigmoid() if self.mask is not None else None))

@pytest.mark.parametrize('bias', [True,False])
@pytest.mark.parametrize('masked', [False,True])
@pytest.mark.parametrize('groups', [1,2])
def test_norm_behind_a_deformable_convolution(masked, groups, bias):
    for padding in (0,1): stays_right(lambda: Deforms(after=nn.BatchNorm2d, masked=masked, padding=padding, groups=groups, bias=bias), images(), 'norm2')
@pytest.mark.parametrize('masked', [False,True])
@pytest.mark.parametrize('groups', [1,2])
def test_norm_before_a_deformable_convolution(masked, groups):
    "A scale passes; a shift does not, padded or not: offsets lead beyond the border, where there are zeros."
    for padding in (0,1):
        stays_right(lambda: Deforms(lambda n: Scaling(n, 1, 1), masked=masked, padding=padding, groups=groups), images(), 'norm')
        stays_right(lambda: Deforms(nn.BatchNorm2d, masked=masked, padding=padding, groups=groups), images(), norm='`deform` (DeformConv2d) does not let a shift pass')

class OtherBias(DeformConv2d):
    "Has none of its own, and adds another."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.other = nn.Parameter(torch.randn(6)) if self.adds else None
    def forward(self, x, offset, mask): return deform_conv2d(x, offset, self.weight, self.other, padding=1, mask=mask)
class NoBias(OtherBias): adds = False
class Adds(OtherBias): adds = True
def test_norm_behind_a_deformable_convolution_with_a_forward_of_its_own():
    def make(cls):
        net = Deforms(after=nn.BatchNorm2d)
        net.deform = cls(4, 6, 3)
        return net
    stays_right(lambda: make(Adds), images(), 'norm2')
    stays_right(lambda: make(NoBias), images(), norm2='`deform` (NoBias) has no bias to take the shift')

class Function(nn.Module):
    def __init__(self, own=False):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.randn(6, 3, 3, 3)),nn.Parameter(torch.randn(6)) if own else None
        self.offset,self.norm = nn.Conv2d(3, 18, 3),nn.BatchNorm2d(6)
    def forward(self, x): return self.norm(deform_conv2d(x, self.offset(x), self.weight, self.bias))
def test_norm_behind_the_function():
    stays_right(lambda: Function(True), images(), 'norm')
    stays_right(Function, images(), norm='`deform_conv2d` in `the model` has no bias to take the shift')
def test_norm_of_the_offsets():
    "Where it looks is no linear matter."
    stays_right(lambda: Fn(lambda m,x: m.d(x, m.norm(m.o(x).tanh())), d=DeformConv2d(3, 4, 3), o=nn.Conv2d(3, 18, 3), norm=nn.BatchNorm2d(18)), images(),
        norm='`d` (DeformConv2d) takes it as `offset`')
def test_two_deformable_convolutions_with_one_weight():
    def f(m, x): return m.norm(m.d(x, m.o(x)))+m.d(x, 0*m.o(x))
    stays_right(lambda: Fn(f, d=DeformConv2d(3, 4, 3, bias=False), o=nn.Conv2d(3, 18, 3), norm=nn.BatchNorm2d(4)), images(),
        norm='`d.weight` is also used by `d` (DeformConv2d)')

# ---- Weight norm

KINDS = dict(old=nn.utils.weight_norm, parametrized=parametrizations.weight_norm)
@pytest.mark.parametrize('kind', KINDS)
def test_norm_behind_a_weight_normed_transposed_convolution(kind):
    "Its lengths are along the dimension of its outputs if `dim=1`; else they are lengths of its inputs."
    def make(dim): return lambda: nn.Sequential(KINDS[kind](nn.ConvTranspose2d(3, 4, 3, stride=2), dim=dim), nn.BatchNorm2d(4), nn.ReLU())
    stays_right(make(1), images(), '1')
    stays_right(make(0), images(), **{'1':'computes a weight'})
    def small(**kwargs): return lambda: nn.Sequential(KINDS[kind](nn.ConvTranspose1d(4, 6, 2, **kwargs), dim=1), nn.BatchNorm1d(6))
    stays_right(small(groups=2), sounds(), **{'1':'is also used by `0'})
    stays_right(small(bias=False), sounds(), '1')
@pytest.mark.parametrize('kind', KINDS)
def test_norm_before_a_convolution_weight_normed_along_its_inputs(kind):
    stays_right(lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), KINDS[kind](nn.Conv2d(3, 4, 3), dim=1)), images(), '1')
    stays_right(lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), KINDS[kind](nn.Conv2d(3, 4, 3), dim=0)), images(), **{'1':'computes a weight'})
def test_norm_takes_the_length_of_a_weight_and_its_bias():
    net = net_of(lambda: nn.Sequential(KINDS['parametrized'](nn.ConvTranspose2d(3, 4, 3), dim=1), nn.BatchNorm2d(4)))
    old = {k:p.clone() for k,p in net[0].named_parameters()}
    BN_Folder(store_weights=False).fold(net, image(), inplace=True)
    assert {k for k,p in net[0].named_parameters() if not torch.equal(p, old[k])}=={'bias','parametrizations.weight.original0'}

# ---- Complex numbers

def pair(y): return torch.complex(y, y.flip(1)*2)
COMPLEX = dict(alone=pair, in_a_dict=lambda y: {'a':{'b':pair(y)},'c':y}, in_a_tuple=lambda y: (y,[pair(y)]), conjugate=lambda y: pair(y).conj(),
    waves=torch.fft.rfft2, spectrum=lambda y: torch.fft.fft2(y).abs(), real_view=lambda y: torch.view_as_real(pair(y)),
    there_and_back=lambda y: torch.fft.irfft2(torch.fft.rfft2(y)*(1+2j), s=y.shape[-2:]))
class Into(nn.Sequential):
    def __init__(self, f):
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.f = f
    def forward(self, x): return self.f(super().forward(x))
@pytest.mark.parametrize('kind', COMPLEX)
def test_complex_numbers(kind): stays_right(lambda: Into(COMPLEX[kind]), images(), '1')

@pytest.mark.parametrize('kind', COMPLEX)
def test_wrong_complex_numbers(kind, monkeypatch):
    "A rule that forgets the bias is found out."
    right = PULL['convolution']
    monkeypatch.setitem(PULL, 'convolution', lambda *args: right(*args)[:1])
    folder = BN_Folder()
    folder.fold(net_of(lambda: Into(COMPLEX[kind])), image())
    assert 'failed verification' in reason(folder.result, '1')

def test_complex_numbers_that_rounding_hides():
    "What is left after two large terms cancel is proved in float64, which complex numbers then are, too."
    def f(m, x):
        y = m.norm(m.conv(x))
        res = torch.zeros(y.shape, dtype=torch.complex64)
        res[:] = pair(y)*m.w
        return {'y':res-3e3*m.w*(1+2j)}
    net = net_of(lambda: Fn(f, conv=conv(), norm=nn.BatchNorm2d(4), w=nn.Parameter(torch.randn(4, 1, 1, dtype=torch.complex64))))
    net.norm.bias.data.fill_(3e3)
    folder = BN_Folder()
    folder.fold(net, image())
    proof = folder.result.proof
    assert names_of(folder.result.folded)==['norm'] and proof.exact<1e-10 and proof.largest>0

def test_network_in_waves():
    "As a Fourier neural operator: between real layers, some of the waves are multiplied by complex weights."
    def f(m, x):
        waves = torch.fft.rfft(m.norm(m.conv(x)))
        res = torch.zeros_like(waves)
        res[...,:3] = torch.einsum('bif,iof->bof', waves[...,:3], m.w)
        return m.last(torch.fft.irfft(res, n=x.shape[2])+x)
    def make(): return Fn(f, conv=nn.Conv1d(4, 4, 1), norm=nn.BatchNorm1d(4), w=nn.Parameter(torch.randn(4, 4, 3, dtype=torch.cfloat)), last=nn.Conv1d(4, 2, 1))
    stays_right(make, sounds(), 'norm')

# ---- A user's own affine layer after a sum

class Own(nn.Module):
    "`y*std + mean`, of numbers known before training."
    def __init__(self, *shape):
        super().__init__()
        self.register_buffer('std', torch.linspace(-1, 2, 4).view(4, *shape))
        self.register_buffer('mean', torch.linspace(3, 1, 4).view(4, *shape))
    def forward(self, y): return y*self.std+self.mean
class Readout(nn.Module):
    def __init__(self, add, own, last=None):
        super().__init__()
        self.conv,self.own,self.last,self.add = nn.Conv1d(4, 4, 3, padding=1),own,last,add
    def forward(self, x):
        y = self.own(self.add(self.conv(x)))
        return y if self.last is None else self.last(y)

counts = '`sum` in `the model` sums over positions, and their number changes with the size of the input'
def test_own_affine_layer_after_a_sum():
    "How many are summed is a matter of the input, so a shift does not go back; forward it may."
    stays_right(lambda: Readout(lambda y: y.sum(2), Own()), sounds(), own=counts)
    stays_right(lambda: Readout(lambda y: y.sum(2), Own(), nn.Linear(4, 3)), sounds(), 'own')
    stays_right(lambda: Readout(lambda y: y.sum(2), Scaling(4)), sounds(), 'own')
def test_own_affine_layer_after_a_sum_of_two():
    stays_right(lambda: Fn(lambda m,x: m.own(m.a(x)+m.b(x)), a=nn.Conv1d(4, 4, 3), b=nn.Conv1d(4, 4, 3), own=Own(1)), sounds(), 'own')
def test_own_affine_layer_after_a_mean(): stays_right(lambda: Readout(lambda y: y.mean(2), Own()), sounds(), 'own')
def test_own_affine_layer_after_a_sum_divided_by_the_count():
    "That is a mean, but nobody says so."
    stays_right(lambda: Readout(lambda y: y.sum(2)/y.shape[2], Own()), sounds(), own='no part of the model')
def test_own_affine_layer_after_a_sum_over_nodes():
    def collected(y): return y.new_zeros(len(y), 4, 2).index_add(2, torch.arange(y.shape[2])%2, y).mean(2)
    stays_right(lambda: Readout(collected, Own()), sounds(), own='`index_add` in `the model` does not let a shift pass')
def test_own_affine_layer_before_a_sum():
    stays_right(lambda: Fn(lambda m,x: m.own(m.conv(x)).sum(2), conv=nn.Conv1d(4, 4, 3), own=Own(1)), sounds(), 'own')
    def f(m, x): return m.last(m.own(m.conv(x).sigmoid()).sum(2))
    stays_right(lambda: Fn(f, conv=nn.Conv1d(4, 4, 3), own=Own(1), last=nn.Linear(4, 2)), sounds(), own=counts)

# ---- Statistics over positions

def both(*ts): return torch.cat(ts, 1).flatten(1)
POOLS = dict(std=lambda y: y.std(2), var=lambda y: y.var(2), std_kept=lambda y: y.std(-1, keepdim=True).squeeze(2), population=lambda y: y.var(2, correction=0),
    mean_and_std=lambda y: both(y.mean(2), y.std(2)), mean_and_var=lambda y: both(y.var(2), y.mean(2)), std_mean=lambda y: both(*torch.std_mean(y, 2)),
    var_mean=lambda y: both(*torch.var_mean(y, 2, keepdim=True)), deviation=lambda y: y.std(2)*2)
@pytest.mark.parametrize('kind', POOLS)
def test_norm_before_pooled_statistics(kind):
    "As in x-vectors: its map goes on to the layer behind, in which the standard deviation has the size of the scale, and no shift."
    def make():
        n = POOLS[kind](sound()).shape[1]
        return Fn(lambda m,x: m.last(POOLS[kind](m.norm(m.conv(x).relu()))), conv=nn.Conv1d(4, 4, 3), norm=nn.BatchNorm1d(4), last=nn.Linear(n, 3))
    stays_right(make, sounds(), 'norm')

def test_network_of_a_speaker_embedding():
    class Statistics(nn.Module):
        def forward(self, x): return torch.cat([x.mean(-1),x.std(-1)], 1)
    def layer(i, o, k): return nn.Conv1d(i, o, k),nn.ReLU(),nn.BatchNorm1d(o)
    stays_right(lambda: nn.Sequential(*layer(4, 6, 3), *layer(6, 5, 1), Statistics(), nn.BatchNorm1d(10), nn.Linear(10, 4)), sounds(), '2 5 7')

def test_norm_behind_a_standard_deviation():
    "A positive scale goes back, whatever else does not."
    class Positive(Scaling):
        def __init__(self, n, *shape):
            super().__init__(n, *shape)
            self.gamma.data.abs_()
    for f in (lambda y: y.std(2),lambda y: y.var(2)):
        stays_right(lambda: Fn(lambda m,x: m.own(f(m.conv(x))), conv=nn.Conv1d(4, 4, 3), own=Positive(4)), sounds(), 'own')
        stays_right(lambda: Fn(lambda m,x: m.own(f(m.conv(x))), conv=nn.Conv1d(4, 4, 3), own=Scaling(4)), sounds(),
            own='does not let a negative scale pass')
        stays_right(lambda: Fn(lambda m,x: m.norm(f(m.conv(x))), conv=nn.Conv1d(4, 4, 3), norm=nn.BatchNorm1d(4)), sounds(), norm='does not let a shift pass')
def test_statistics_over_what_is_scaled_differently():
    stays_right(lambda: Fn(lambda m,x: m.last(m.norm(x.sigmoid()).std(1)), norm=nn.BatchNorm1d(4), last=nn.Linear(9, 2)), [sound(),sound(1)],
        norm='`std` in `the model` mixes values that are scaled differently')

BY_HAND = dict(centred=(lambda y: ((y-y.mean(2, keepdim=True))**2).mean(2).sqrt(),'it is followed by `pow`'),
    squares=(lambda y: (y*y).mean(2)-y.mean(2)**2,'it is followed by `'), clamped=(lambda y: y.var(2).clamp(min=1e-5).sqrt(),'it is followed by `clamp`'),
    with_eps=(lambda y: (y.var(2)+1e-5).sqrt(),'takes a number that is no part of the model'))
@pytest.mark.parametrize('kind', BY_HAND)
def test_statistics_by_hand(kind):
    f,why = BY_HAND[kind]
    def make(): return Fn(lambda m,x: m.last(f(m.norm(m.conv(x).relu()))), conv=nn.Conv1d(4, 4, 3), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 3))
    stays_right(make, sounds(), norm=why)
def test_normalization_by_hand_is_no_norm():
    class Standard(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.randn(4, 1))
        def forward(self, x): return self.g*(x-x.mean(2, keepdim=True))/x.std(2, keepdim=True)
    stays_right(lambda: nn.Sequential(nn.Conv1d(4, 4, 3), Standard(), nn.Conv1d(4, 2, 1)), sounds())

# ---- Statistics of each input

class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.conv,self.f = conv(),f
    def forward(self, x): return self.f(self.conv(x))
EACH = dict(instance=lambda: nn.InstanceNorm2d(4), instance_affine=lambda: nn.InstanceNorm2d(4, affine=True), group=lambda: nn.GroupNorm(2, 4),
    layer=lambda: nn.LayerNorm([6,5]), one_group=lambda: nn.GroupNorm(1, 4), functional_instance=F.instance_norm,
    functional_group=lambda y: F.group_norm(y, 2), functional_layer=lambda y: F.layer_norm(y, y.shape[1:]),
    functional_batch=lambda y: F.batch_norm(y, None, None, training=True))
@pytest.mark.parametrize('kind', EACH)
def test_norms_with_statistics_of_each_input_are_not_counted(kind):
    "They are no map, whoever runs them, and none of them is said to stay."
    make = EACH[kind]
    def net(): return Calls(make) if 'functional' in kind else nn.Sequential(conv(), make(), nn.ReLU())
    assert BN_Folder().plan(net_of(net), image()).summary=='This model has no norm to fold.'
def test_batch_norm_without_statistics_is_counted():
    "It would fold if it tracked them."
    stays_right(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), [image()], **{'1':'it normalizes with statistics of its input'})
@pytest.mark.parametrize('kind', ['instance_affine','group','one_group'])
def test_other_norms_fold_into_those(kind): stays_right(lambda: nn.Sequential(conv(), EACH[kind](), nn.BatchNorm2d(4), nn.ReLU()), images(), '2')

# ---- Pieces of one vector

def deep(): return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))
def in_a_vector(net):
    v = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(v, net.parameters())
    return net
def test_parameters_in_one_vector(): stays_right(lambda: in_a_vector(deep()), images(), '1 4')
def test_parameters_in_one_vector_are_that_again_after_undo():
    net,folder = net_of(lambda: in_a_vector(deep())),BN_Folder()
    ps = [*net.parameters()]
    stores,bits = {p.untyped_storage()._cdata for p in ps},nn.utils.parameters_to_vector(ps).clone()
    folder.fold(net, image(), inplace=True)
    folder.undo()
    assert len(stores)==1 and stores=={p.untyped_storage()._cdata for p in ps} and torch.equal(bits, nn.utils.parameters_to_vector(ps))
def test_parameters_that_take_turns_in_memory():
    "Every other number of one vector."
    def make():
        net,v = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4)),torch.randn(2, 16)
        both = v.T.contiguous()
        net[0].weight.data,net[2].weight.data = both[:,0].view(4, 4),both[:,1].view(4, 4)
        return net
    stays_right(make, [torch.randn(3, 4),torch.randn(1, 4)], '1')
def test_parameters_that_are_columns_of_a_matrix():
    def make():
        net,both = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)),torch.randn(4, 8)
        net[0].weight.data,net[2].weight.data = both[:,:4],both[:,4:]
        return net
    stays_right(make, [torch.randn(3, 4),torch.randn(1, 4)], '1')
def test_recurrent_layer_in_one_vector(): stays_right(lambda: in_a_vector(Recurrent(bidirectional=True)), sounds(), 'norm')
@pytest.mark.parametrize('shift', [0,1,8])
def test_parameters_that_overlap(shift):
    "One number in common is enough to stay in place."
    def make():
        net,v = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)),torch.randn(32)
        net[0].weight.data,net[3].weight.data = v[:16].view(4, 4),v[15-shift:31-shift].view(4, 4)
        return net
    net,x = net_of(make),torch.randn(3, 4)
    folder = BN_Folder()
    refs,plan = run(net, x),folder.plan(net, x)
    assert '`0.weight` shares its memory with `3.weight`' in reason(plan, '1')
    assert distance(run(folder.fold(net, x, inplace=True), x), refs)==0 and names_of(folder.result.kept)==['1']

# ---- A LayerNorm without weights, over several dimensions

class Layered(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.conv,self.layer,self.norm = nn.Conv1d(3,4,1),nn.LayerNorm(shape, elementwise_affine=False),nn.BatchNorm1d(4)
    def forward(self, x): return self.norm(self.layer(self.conv(x))).tanh()

@pytest.mark.parametrize('shape', [(6,),(4,6)])
@pytest.mark.parametrize('verify', [False,True])
def test_norm_behind_a_layer_norm_without_weights(shape, verify):
    model,x = randomize_norms(Layered(shape)),torch.randn(2,3,6)
    folder = BN_Folder(verify=verify)
    new = folder.fold(model, x)
    assert len(folder.result.folded)==(len(shape)>1) # a weight for each position cannot scale each channel
    assert distance(run(new, x), run(model, x))<1e-5
