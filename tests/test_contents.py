"What a model holds: tied and overlapping weights, buffers of every kind, norms with a forward of their own, hooks, and what is counted or kept on the way."
import array
from collections import Counter, defaultdict, deque
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from fasterfold.fold import BN_Folder
from fasterfold.proof import distance
from helpers import *

def conv(i=3, o=4, ks=3): return nn.Conv2d(i, o, ks)
def image(n=2, size=9): return torch.randn(n, 3, size, size)
def memory(net):
    "Where parameters and buffers lie, and what other attributes hold."
    ts = *net.named_parameters(remove_duplicate=False),*net.named_buffers(remove_duplicate=False)
    attrs = [(n, k, held(v)) for n,m in net.named_modules() for k,v in vars(m).items() if k[0]!='_']
    return [(n, t.untyped_storage()._cdata, t.storage_offset()) for n,t in ts],attrs

def held(o):
    if isinstance(o, torch.Tensor): return id(o),o.tolist()
    if isinstance(o, (array.array,np.ndarray,bytearray)): return id(o),[*o]
    if isinstance(o, dict): return id(o),type(o),[(k,held(v)) for k,v in o.items()]
    if isinstance(o, (list,tuple,set,deque)): return id(o),type(o),[held(v) for v in o]
    return (id(o),held(vars(o))) if isinstance(o, Log) else id(o)

def everything(net): return state(net),memory(net)

def stays_right(make, folded, why=None, x=None, tol=1e-6, **options):
    """In every way, `folded` norms go, the first other one stays for the reason `why`, outputs stay on other sizes and batches, also after
    `train(); eval()`, and what was folded in place is given back by undo."""
    xs = [image(),image(3, 12)] if x is None else [x,x[:1]]
    refs = [now(made(make), x) for x in xs]
    for folder,net,new,_ in every_way(make, xs[0], everything, **options):
        train = new.training
        assert len(folder.result.folded)==folded
        if why: assert why in folder.result.kept[0].reason
        for _ in range(2):
            new.eval()
            assert max(distance(now(new, x), r) for x,r in zip(xs, refs))<tol
            new.train()
        if new is not net: continue
        net = made(make, train) # which nobody used between fold and undo
        before = everything(net)
        folder.fold(net, xs[0], inplace=True)
        folder.undo()
        assert everything(net)==before
    return new

class Buffers(nn.Module):
    "`f(x, **buffers)`."
    def __init__(self, f, persistent=True, bias=None, **buffers):
        super().__init__()
        self.f,self.bias = f,bias
        for k,b in buffers.items(): self.register_buffer(k, b, persistent)
    def forward(self, x): return self.f(x, bias=self.bias, **self._buffers)

# ---- Weights that share memory

LAST = [{},dict(channels_last=True)]
def tied(norm):
    a,b = conv(4, 4),conv(4, 4)
    b.weight = a.weight
    return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), a, nn.BatchNorm2d(4), nn.ReLU(), b, norm(), nn.ReLU())

@pytest.mark.parametrize('options', LAST)
@pytest.mark.parametrize('norm', [nn.Identity,lambda: nn.BatchNorm2d(4)])
def test_tied_weights(norm, options):
    new = stays_right(lambda: tied(norm), 1, '`3.weight` is also used by `6`', **options)
    assert new[3].weight is new[6].weight

class Viewed(nn.Module):
    "Reads its first filter as a weight and once more as what `register` makes of a view of it."
    def __init__(self, register):
        super().__init__()
        self.conv,self.norm,self.last,self.norm2 = conv(),nn.BatchNorm2d(4),conv(4, 4),nn.BatchNorm2d(4)
        register(self, self.conv.weight.detach()[:2])
    def forward(self, x): return self.norm2(self.last(self.norm(self.conv(x)).relu()))+self.view.sum()

VIEWS = dict(buffer=lambda m,v: m.register_buffer('view', v), parameter=lambda m,v: m.register_parameter('view', nn.Parameter(v)),
    plain=lambda m,v: setattr(m, 'view', v))
@pytest.mark.parametrize('options', LAST)
@pytest.mark.parametrize('kind', VIEWS)
def test_views_of_weights(kind, options):
    "A copy has memory of its own for each buffer and parameter, as all copies of modules have."
    for train in (False,True):
        for inplace in (False,True):
            for verify in (False,True):
                net,xs,folder = made(lambda: Viewed(VIEWS[kind]), train),(image(),image(1, 12)),BN_Folder(verify=verify, **options)
                refs,before = [now(made(lambda: Viewed(VIEWS[kind])), x) for x in xs],everything(net)
                new = folder.fold(net, xs[0], inplace=inplace)
                assert inplace or everything(net)==before
                assert max(distance(now(new.eval(), x), r) for x,r in zip(xs, refs))<1e-6
                if inplace and kind!='plain':
                    assert '`conv.weight` shares its memory with `view`' in reason(folder.result, 'norm')
                    assert new.view.untyped_storage().data_ptr()==new.conv.weight.untyped_storage().data_ptr()
                net.train(train)
                folder.undo()
                assert not inplace or everything(net)==before

OVERLAPPING = dict(rows=lambda i: torch.randn(4, 1, 1, 1).expand(4, i, 3, 3), columns=lambda i: torch.randn(1, i, 3, 3).expand(4, i, 3, 3),
    one=lambda i: torch.randn(()).expand(4, i, 3, 3), strided=lambda i: torch.randn(40).as_strided((4,i,3,3), (3,2,1,1)),
    part=lambda i: torch.randn(8, i, 3, 3)[::2], turned=lambda i: torch.randn(3, 3, i, 4).permute(3, 2, 1, 0))
@pytest.mark.parametrize('options', LAST)
@pytest.mark.parametrize('kind', OVERLAPPING)
def test_elements_that_share_memory(kind, options):
    def layer(i):
        m = conv(i)
        m.weight = nn.Parameter(OVERLAPPING[kind](i))
        return m
    stays_right(lambda: nn.Sequential(layer(3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.BatchNorm2d(4), layer(4)), 2, **options)

class Adds(nn.Module):
    "Counts in a buffer or plain tensor, of which all elements are one."
    def __init__(self, register):
        super().__init__()
        register(self, torch.zeros(1).expand(4))
    def forward(self, x):
        self.view[:1] += 1
        return x+0*self.view[:1]

@pytest.mark.parametrize('kind', [k for k in VIEWS if k!='parameter'])
def test_one_element_that_is_written_to(kind):
    stays_right(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), Adds(VIEWS[kind]), conv(4, 2)), 1)

class Merged(nn.Module):
    "Doubles its weight, of which all elements are one, in train mode."
    def __init__(self):
        super().__init__()
        self.w,self.double = nn.Parameter(torch.ones(1).expand(4)),False
    def train(self, mode=True):
        if mode!=self.double: self.w.data[:1] *= 2 if mode else .5
        self.double = mode
        return super().train(mode)
    def forward(self, x): return x.relu()*self.w[:1]

def test_one_element_that_modes_write_to(): stays_right(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), Merged(), conv(4, 4), nn.BatchNorm2d(4)), 2)

class Moves(nn.Module):
    "Counts in a buffer that gets other memory each time."
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(2, 2))
    def forward(self, x):
        self.n.data = self.n+1
        self.n += 1
        return x

def test_buffer_that_moves(): stays_right(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), Moves(), conv(4, 2)), 1)

# ---- Buffers that are not saved

def filtered(persistent, bias=True): return Buffers(lambda x,weight,bias: F.conv2d(x, weight, bias), persistent,
    nn.Parameter(torch.randn(4)) if bias else None, weight=torch.randn(4, 4, 3, 3))
UNSAVED = dict(back=(lambda p: nn.Sequential(conv(), nn.Sigmoid(), filtered(p), nn.BatchNorm2d(4), nn.ReLU()),'`2.weight` is not saved in the state_dict',0),
    forward=(lambda p: nn.Sequential(conv(), nn.Sigmoid(), nn.BatchNorm2d(4), filtered(p), nn.ReLU()),'`3.weight` is not saved in the state_dict',0),
    another_way=(lambda p: nn.Sequential(conv(), nn.Sigmoid(), filtered(p), nn.BatchNorm2d(4), conv(4, 2)),None,1))
@pytest.mark.parametrize('kind', UNSAVED)
def test_buffer_that_is_not_saved(kind):
    "What a norm has learned would be lost with it: a freshly built model, folded, could not be given the weights of a folded one."
    make,why,folded = UNSAVED[kind]
    stays_right(lambda: make(False), folded, why)
    stays_right(lambda: make(True), 1)
    for persistent in (False,True):
        x,net,fresh = image(),made(lambda: make(persistent)),made(lambda: make(persistent))
        with torch.no_grad():
            for p in fresh.parameters(): p.normal_()
        for m in fresh:
            if isinstance(m, nn.BatchNorm2d): m.reset_running_stats()
        new,fresh = BN_Folder().fold(net, x),BN_Folder().fold(fresh, x)
        fresh.load_state_dict(new.state_dict())
        assert torch.equal(*now(fresh, x), *now(new, x))

def test_statistics_that_are_not_saved():
    "These may go: they are no more lost than before."
    def norm():
        m = nn.BatchNorm2d(4)
        for k in ('running_mean','running_var'): m.register_buffer(k, m._buffers.pop(k), persistent=False)
        return m
    stays_right(lambda: nn.Sequential(conv(), norm(), nn.ReLU()), 1)

# ---- Integers, truths and complex numbers

def ints(*shape): return torch.randint(1, 4, shape)
WAYS = dict(times=(lambda x,i,**_: x*i,1), plus=(lambda x,i,**_: x+i,0), minus=(lambda x,i,**_: i-x,0), over=(lambda x,i,**_: x/i,1),
    mask=(lambda x,i,**_: x*(i>1),1), where=(lambda x,i,**_: torch.where(i>1, x, 0*x),0), fill=(lambda x,i,**_: x.masked_fill(i>1, 0.),0),
    pick=(lambda x,i,**_: x[:,i.flatten()],0), power=(lambda x,i,**_: x**i,0), floats=(lambda x,i,**_: x*i.float(),1),
    matrix=(lambda x,i,**_: (x.permute(0,2,3,1)@i[:,:,0].float().expand(4, 4)).permute(0,3,1,2),0))
@pytest.mark.parametrize('where', ['behind a convolution','before one','between what stays'])
@pytest.mark.parametrize('kind', WAYS)
def test_integers_on_the_way(kind, where):
    def way(): return Buffers(WAYS[kind][0], i=ints(4, 1, 1))
    make = {'behind a convolution':lambda: nn.Sequential(conv(), way(), nn.BatchNorm2d(4), nn.ReLU()),
        'before one':lambda: nn.Sequential(conv(), nn.Sigmoid(), nn.BatchNorm2d(4), way(), conv(4, 2)),
        'between what stays':lambda: nn.Sequential(conv(), nn.Sigmoid(), way(), nn.BatchNorm2d(4), way(), nn.Sigmoid())}[where]
    folded = len(BN_Folder().plan(made(make), image()).folded)
    stays_right(make, folded)
    if WAYS[kind][1]: assert folded

TAKERS = dict(added=lambda w: Buffers(lambda x,i,bias: F.conv2d(x, bias)+i, i=ints(4, 1, 1), bias=w),
    subtracted=lambda w: Buffers(lambda x,i,bias: i-F.conv2d(x, bias), i=ints(4, 1, 1), bias=w),
    floats=lambda w: Buffers(lambda x,i,bias: F.conv2d(x, bias)+i.float(), i=ints(4, 1, 1), bias=w),
    weight=lambda w: Buffers(lambda x,i,bias: F.conv2d(x, i.float(), bias), i=ints(4, 3, 3, 3), bias=nn.Parameter(torch.randn(4))))
@pytest.mark.parametrize('kind', TAKERS)
def test_integers_take_up_no_norm(kind):
    stays_right(lambda: nn.Sequential(TAKERS[kind](nn.Parameter(torch.randn(4, 3, 3, 3))), nn.BatchNorm2d(4), nn.ReLU()), 0,
        '`0.i` is not of floating-point numbers' if kind in ('weight','floats') else 'has no bias')

@pytest.mark.parametrize('cast', [lambda w: w.int(),lambda w: w.long().float(),lambda w: (w-1).int().bool(),lambda w: w>1],
    ids=['int','back','bool','comparison'])
@pytest.mark.parametrize('op', [torch.mul,torch.add])
def test_weights_that_become_integers(op, cast):
    "They were read as if nothing were cut off."
    def way(): return Fn(lambda m,x: op(x, cast(m.w)), w=nn.Parameter(torch.rand(4, 1, 1)*3+.5))
    folded = 2 if op is torch.mul else 1 # scaling by it is a norm, too
    stays_right(lambda: nn.Sequential(conv(), way(), nn.BatchNorm2d(4), nn.ReLU()), folded)
    stays_right(lambda: nn.Sequential(conv(), nn.Sigmoid(), nn.BatchNorm2d(4), way(), conv(4, 2)), folded)

class IntegerNorm(nn.BatchNorm2d):
    "Its weight or bias is a buffer of integers."
    def __init__(self, name):
        super().__init__(4)
        delattr(self, name)
        self.register_buffer(name, ints(4))
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight.float(), self.bias.float(), False, 0., self.eps)

@pytest.mark.parametrize('dtype', [torch.long,torch.uint8])
def test_norm_of_integers(dtype):
    stays_right(lambda: nn.Sequential(conv(), Buffers(lambda x,m,v,**_: (x-m)/v, m=ints(4, 1, 1).to(dtype), v=ints(4, 1, 1).to(dtype)), nn.ReLU()), 1)
@pytest.mark.parametrize('name', ['weight','bias'])
def test_norm_with_a_buffer_of_integers(name):
    def norm():
        m = IntegerNorm(name)
        m.running_var += .5 # `randomize_norms` would write to the integers
        return nn.ModuleList([m])
    def make(): return nn.Sequential(conv(), Fn(lambda m,x: m.n[0](x), n=norm()), nn.Sigmoid(), nn.BatchNorm2d(4), Fn(lambda m,x: m.n[0](x), n=norm()),
        nn.ReLU())
    stays_right(make, 2)

def test_embedding_of_integers_that_are_held():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.norm,self.last = nn.Embedding(9, 6),nn.BatchNorm1d(6),nn.Linear(6, 2)
            self.register_buffer('index', torch.randint(9, (5,)))
        def forward(self, i): return self.last(self.norm(self.emb(self.index[i%5])).relu())
    stays_right(Table, 1, x=torch.arange(7))

@pytest.mark.parametrize('f,n', [(lambda m,x: (x*m.c).real,0), (lambda m,x: (x*m.c).abs(),0), (lambda m,x: F.conv2d(x, m.w.real),1),
    (lambda m,x: F.conv2d(x, m.w.abs()),1)])
def test_complex_weights(f, n):
    "Real weights that are computed from complex ones are stored, and take a norm up."
    def layer(): return Fn(f, c=nn.Parameter(torch.randn(4, 1, 1, dtype=torch.complex64)), w=nn.Parameter(torch.randn(4, 4, 1, 1, dtype=torch.complex64)))
    def back(): return nn.Sequential(conv(), nn.Sigmoid(), layer(), nn.BatchNorm2d(4), nn.ReLU())
    def forward(): return nn.Sequential(conv(), nn.Sigmoid(), nn.BatchNorm2d(4), layer(), nn.ReLU())
    for make in (back,forward):
        stays_right(make, n)
        assert not BN_Folder(store_weights=False).plan(made(make), torch.randn(2, 3, 6, 6)).folded

# ---- Norms with a forward of their own

def derived(f, base=nn.BatchNorm2d, *args, **kwargs):
    class Derived(base):
        def __init__(self):
            super().__init__(*args or (4,), **kwargs)
            self.k = 2.
        def forward(self, x, *args, **kwargs): return f(self, super().forward, x, *args, **kwargs)
    return Derived()

more,none = 'does more than scale and shift','runs no batch normalization'
FORWARDS = dict(adds=(lambda m,f,x: f(x)+1,None), adds_input=(lambda m,f,x: f(x)+x,'added to something else'), ignores=(lambda m,f,x: x,none),
    scales=(lambda m,f,x: f(x*m.k)*m.k,None), by_size=(lambda m,f,x: f(x)*x.shape[-1],'computes with a size'),
    batch_statistics=(lambda m,f,x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, True),'in eval mode, too'),
    own_statistics=(lambda m,f,x: F.batch_norm(x, None, None, m.weight, m.bias, True),'statistics of its input'), twice=(lambda m,f,x: f(f(x)),None),
    after_relu=(lambda m,f,x: f(x.relu()),more), relu=(lambda m,f,x: f(x).relu(),'does not let a shift pass'), flipped=(lambda m,f,x: f(x.flip(1)),more),
    swapped=(lambda m,f,x: F.batch_norm(x, m.running_mean, m.running_var, m.bias, m.weight),None), by_data=(lambda m,f,x: f(x) if x.sum()<1e9 else x,more),
    counts=(lambda m,f,x: (m.num_batches_tracked.add_(1),f(x))[1],None))
@pytest.mark.parametrize('kind', FORWARDS)
def test_batchnorm_with_a_forward_of_its_own(kind):
    f,why = FORWARDS[kind]
    def make(): return nn.Sequential(conv(), derived(f), nn.ReLU())
    if kind=='batch_statistics': # each run changes what the next one gives if it is not preserved
        net,x = made(make),image()
        before = everything(net)
        folder = BN_Folder()
        folder.plan(net, x)
        folder.fold(net, x)
        assert everything(net)==before and why in reason(folder.result, '1')
    else: stays_right(make, why is None, why, tol=1e-5)

CALLS = dict(argument=(lambda m,f,x,y: f(x)*y,lambda n,x: n(x, 2.),'more than its input'),
    keyword=(lambda m,f,x,y=1: f(x)*y,lambda n,x: n(x, y=2.),'more than its input'),
    ignored=(lambda m,f,x,mask=None: f(x),lambda n,x: n(x, mask=None),'more than its input'), by_name=(lambda m,f,x: f(x),lambda n,x: n(x=x),'with `x=`'),
    tuple=(lambda m,f,x: (f(x),1),lambda n,x: n(x)[0],more), given_a_list=(lambda m,f,x: f(x[0]),lambda n,x: n([x]),'with one tensor'),
    by_method=(lambda m,f,x: f(x),lambda n,x: n.forward(x),'called as a function'))
@pytest.mark.parametrize('kind', CALLS)
def test_batchnorm_called_in_a_way_of_its_own(kind):
    "An `nn.Identity` in its place takes one argument and returns that."
    f,call,why = CALLS[kind]
    stays_right(lambda: Fn(lambda m,x: m.last(call(m.norm, m.conv(x))), conv=conv(), norm=derived(f), last=conv(4, 2)), 0, why)

def writes_back():
    "Does this release write an `InstanceNorm2d`'s statistics in eval mode, too (as PyTorch 2.6)? Then a second call reads others than the first."
    m = nn.InstanceNorm2d(1, track_running_stats=True).eval()
    before = m.running_mean._version
    m(torch.ones(1, 1, 2, 2))
    return m.running_mean._version!=before

@pytest.mark.parametrize('kind', ['adds','scales','twice','ignores'])
@pytest.mark.parametrize('base', [nn.LayerNorm,nn.GroupNorm,nn.InstanceNorm2d,'running'])
def test_other_norms_with_a_forward_of_their_own(base, kind):
    args = {nn.LayerNorm:(7,), nn.GroupNorm:(2,4)}.get(base, (4,))
    def norm(): return derived(FORWARDS[kind][0], nn.InstanceNorm2d, 4, affine=True,
        track_running_stats=True) if base=='running' else derived(FORWARDS[kind][0], base, *args)
    def make(): return nn.Sequential(conv(), norm(), nn.BatchNorm2d(4), nn.ReLU())
    x = image()
    folded = len(BN_Folder().plan(made(make), x).folded)
    stays_right(make, folded, x=x, tol=1e-5)
    if base=='running': assert folded==(0 if kind=='twice' and writes_back() else 2-(kind=='ignores'))

def test_norm_of_constants():
    "It is in the plan."
    stays_right(lambda: Fn(lambda m,x: m.conv(x)+m.norm(m.w), conv=conv(), norm=nn.BatchNorm2d(4), w=nn.Parameter(torch.randn(1, 4, 1, 1))), 0, none)

# ---- Norms in training mode

class Frozen(nn.BatchNorm2d):
    def train(self, mode=True): return super().train(False)
class Always(nn.BatchNorm2d):
    def train(self, mode=True): return super().train(True)
class Flagless(nn.BatchNorm2d):
    training = property(lambda self: True, lambda self,v: None)

def test_frozen_norm(): stays_right(lambda: nn.Sequential(conv(), Frozen(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4, momentum=None)), 2)
def test_norm_without_statistics(): stays_right(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()), 0,
    'track_running_stats=False')

@pytest.mark.parametrize('cls', [Always,Flagless])
def test_norm_that_never_leaves_training_mode(cls):
    "It stays, and so do its statistics."
    for train in (False,True):
        for verify in (False,True):
            for inplace in (False,True):
                net,x,folder = made(lambda: nn.Sequential(conv(), cls(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4)), train),image(),BN_Folder(verify=verify)
                before,mean = everything(net),net[1].running_mean.clone()
                folder.plan(net, x)
                assert everything(net)==before
                new = folder.fold(net, x, inplace=inplace)
                assert names_of(folder.result.folded)==['4'] and 'in eval mode, too' in reason(folder.result, '1')
                assert torch.equal(new[1].running_mean, mean) and new[1].training
                folder.undo()
                assert everything(net)==before

@pytest.mark.parametrize('inplace', [False,True])
@pytest.mark.parametrize('verify', [False,True])
def test_norm_in_training_mode_in_a_model_that_is_not(verify, inplace):
    "The fold is of what `eval()` makes of the model; each module keeps its mode."
    net,x,folder = made(lambda: nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), nn.ReLU(), conv(4, 4),
        nn.BatchNorm2d(4))),image(),BN_Folder(verify=verify)
    ref = now(net, x)
    net[0][1].train()
    before,modes = everything(net),[m.training for m in net.modules()]
    new = folder.fold(net, x, inplace=inplace)
    assert len(folder.result.folded)==2 and [m.training for m in new.modules()]==modes and not isinstance(new[0][1], nn.BatchNorm2d)
    assert distance(now(new.eval(), x), ref)<1e-6
    net.eval()[0][1].train()
    folder.undo()
    assert everything(net)==before

def test_norm_with_a_layer_that_does_not_run():
    "To see whether that is for training, the norm is run in training mode: its statistics stay."
    class Spare(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.spare = conv(4, 4)
    stays_right(lambda: nn.Sequential(conv(), Spare(), nn.ReLU()), 0, 'did not run')

# ---- Hooks

HOOKS = dict(times=lambda m,args,y: y*2, plus=lambda m,args,y: y+1, writes=lambda m,args,y: [y.mul_(2)] and None, other=lambda m,args,y: args[0].mean()+y,
    constant=lambda m,args,y: torch.ones_like(y))
PRE = dict(times=lambda m,args: args[0]*2, tuple=lambda m,args: (args[0]+1,), writes=lambda m,args: [args[0].mul_(2)] and None)
KW = dict(with_kwargs=lambda m,args,kwargs,y: y*2), dict(with_kwargs=lambda m,args,kwargs: ((args[0]*2,),kwargs),
    moved=lambda m,args,kwargs: ((),{'x' if isinstance(m, Net) else 'input':args[0]}))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.last,self.norm = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()),conv(4, 4),nn.BatchNorm2d(4)
    def forward(self, x): return self.norm(self.last(self.body(x)))

def hooked(where, how, hook, **kwargs):
    net = Net()
    getattr(net.get_submodule(where), f'register_{how}hook')(hook, **kwargs)
    return net

@pytest.mark.parametrize('where,stay', [('body.1',1),('body.0',1),('last',1),('norm',1),('body',0),('',0),('body.2',0)])
def test_hooks_that_change_values(where, stay):
    "Norms stay beside a hook; nothing is lost of what one does around several layers."
    for how,hooks,kw in (('forward_',HOOKS,{}),('forward_pre_',PRE,{}),('forward_',KW[0],dict(with_kwargs=True)),('forward_pre_',KW[1],dict(with_kwargs=True))):
        for hook in hooks.values():
            net,xs = made(lambda: hooked(where, how, hook, **kw)),[image(),image(3, 12)]
            before,refs = everything(net),[now(net, x) for x in xs]
            for verify in (True,False):
                folder = BN_Folder(verify=verify)
                new = folder.fold(net, xs[0])
                assert everything(net)==before and all(distance(now(new, x), r)<1e-5 for x,r in zip(xs, refs))
                assert len(folder.result.kept)==stay
            folder.fold(net, xs[0], inplace=True)
            folder.undo()
            assert everything(net)==before

class Once:
    "A hook that takes itself away."
    def __call__(self, m, args, *out):
        for hooks in (m._forward_hooks,m._forward_pre_hooks): hooks.pop(self.id, None)
        return out[0]*2 if out else (args[0]*2,)

@pytest.mark.parametrize('how', ['forward_','forward_pre_'])
@pytest.mark.parametrize('where', ['body.1','body.0','body','','last'])
def test_hook_that_is_removed_while_it_runs(where, how):
    def make():
        net,hook = Net(),Once()
        hook.id = getattr(net.get_submodule(where), f'register_{how}hook')(hook).id
        return net
    net,x = made(make),image()
    refs = [now(net, x),now(net, x)] # with it, and then without
    for inplace in (False,True):
        for verify in (False,True):
            net,folder = made(make),BN_Folder(verify=verify)
            before = everything(net)
            new = folder.fold(net, x, inplace=inplace)
            assert inplace or everything(net)==before
            assert all(distance(now(new, x), r)<1e-6 for r in refs)
    net = made(make)
    before = everything(net)
    folder.fold(net, x, inplace=True)
    folder.undo()
    assert everything(net)==before

GLOBAL = dict(norms=(register_module_forward_pre_hook,lambda m,args: args[0]*2 if isinstance(m, nn.BatchNorm2d) else None),
    convs=(register_module_forward_hook,lambda m,args,y: y+1 if isinstance(m, nn.Conv2d) else None),
    all=(register_module_forward_hook,lambda m,args,y: y*1.1),
    activations=(register_module_forward_pre_hook,lambda m,args: args[0]+1 if isinstance(m, nn.ReLU) else None))
@pytest.mark.parametrize('kind', GLOBAL)
def test_hooks_on_all_modules(kind):
    register,hook = GLOBAL[kind]
    handle = register(hook)
    try: stays_right(Net, 2 if kind=='activations' else 0, tol=1e-5)
    finally: handle.remove()

# ---- What is counted and kept on the way

class Log:
    "An object of a user's own."
    def __init__(self): self.calls,self.items = 0,[]
    def add(self):
        self.calls += 1
        self.items.append(self.calls)

KEEP = dict(list=(list,lambda o: o.append(1)), full=(lambda: [0],lambda o: o.append(1)), deque=(deque,lambda o: o.append(1)),
    window=(lambda: deque([1,2], 2),lambda o: o.append(3)), defaultdict=(lambda: defaultdict(list, a=[0]),lambda o: (o['a'].append(1),o['b'].append(1))),
    counter=(Counter,lambda o: o.update('a')), array=(lambda: array.array('d', [1]),lambda o: o.append(2)),
    bytes=(lambda: bytearray(b'a'),lambda o: o.append(1)), numpy=(lambda: np.zeros(2),lambda o: o.__iadd__(1)), object=(Log,Log.add),
    objects=(lambda: [Log()],lambda o: o[0].add()), nested=(lambda: [[1]],lambda o: o[0].append(1)),
    nested_twice=(lambda: [{'a':[1]}],lambda o: o[0]['a'].append(1)), tuple=(lambda: ([],),lambda o: o[0].append(1)),
    sets=(lambda: {'a':set()},lambda o: o['a'].add(1)), tensor=(lambda: torch.zeros(2),lambda o: o.add_(1)),
    tensors=(lambda: [torch.zeros(2)],lambda o: o[0].add_(1)))

class Keeps(nn.Module):
    "Has `add` do something to its attribute `kept` when it runs."
    def __init__(self, make, add):
        super().__init__()
        self.kept,self.add = make(),add
    def forward(self, x):
        self.add(self.kept)
        return x
def around(*ms): return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), *ms, conv(4, 4), nn.BatchNorm2d(4))

@pytest.mark.parametrize('kind', KEEP)
def test_what_a_layer_counts(kind): stays_right(lambda: around(Keeps(*KEEP[kind])), 2)

@pytest.mark.parametrize('kind', KEEP)
@pytest.mark.parametrize('closed_over', [False,True])
def test_what_a_hook_counts(kind, closed_over):
    "In a layer, or where only the hook holds on to it, as where a user collects activations."
    make,add = KEEP[kind]
    net,x,o = made(around),image(),make()
    if closed_over: net[2].register_forward_hook(lambda m,args,y: [add(o)] and None)
    else:
        net[2].kept = o
        net[2].register_forward_hook(lambda m,args,y: [add(m.kept)] and None)
    before = held(o),state(net)
    for inplace in (False,True):
        folder = BN_Folder()
        folder.plan(net, x)
        folder.fold(net, x, inplace=inplace)
        assert held(o)==before[0]
        folder.undo()
        assert (held(o),state(net))==before

def test_what_a_method_of_an_object_counts_as_a_hook():
    net,x,log = made(around),image(),Log()
    log.hook = lambda m,args,y: log.add()
    class Store:
        def __init__(self): self.out = None
        def hook(self, m, args, y): self.out = y
    store = Store()
    for hook in (log.hook,store.hook): net[0].register_forward_hook(hook)
    for inplace in (False,True): BN_Folder().fold(net, x, inplace=inplace)
    assert not log.calls and not log.items and store.out is None

class CountsModes(Keeps):
    def forward(self, x): return x
    def train(self, mode=True):
        self.add(self.kept)
        return super().train(mode)
@pytest.mark.parametrize('kind', ['list','full','deque','defaultdict','counter','array','nested','nested_twice','tuple'])
def test_what_modes_count(kind): stays_right(lambda: around(CountsModes(*KEEP[kind])), 2)

def test_list_that_another_module_holds():
    def make():
        log,other = Keeps(list, lambda o: o.append(1)),Keeps(list, lambda o: o.append(2))
        other.kept = log.kept
        return around(log, other)
    stays_right(make, 2)
