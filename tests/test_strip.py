"`nn.Identity` goes where nobody can tell, and stays wherever somebody might."
import copy, io, threading
import pytest, torch
from torch import nn
from fastai.layers import MergeLayer,SequentialEx
from fasterfold.strip import _Entries
from helpers import *

def conv(i=4): return nn.Conv2d(i, 4, 3, padding=1)
def body(): return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU())
def sample(n=2, s=8): return torch.randn(n, 3, s, s)

class Net(nn.Module):
    "Runs its `body` by `f(body, x)`."
    def __init__(self, f=lambda b,x: b(x), body=body, **mods):
        super().__init__()
        self.stem,self.body,self.f = conv(3),body(),f
        for k,m in mods.items(): setattr(self, k, m)
        randomize_norms(self)
    def forward(self, x): return self.f(self.body, self.stem(x))

def strip(net, x=None, **options):
    "Fold and strip `net` in every way and back; returns the folder and the copy."
    x = sample() if x is None else x
    refs,before = run(net, x),state(net)
    folded = BN_Folder().fold(net, x)
    folder = BN_Folder(strip_identity=True, **options)
    new = folder.fold(net, x)
    assert state(net)==before and distance(run(new, x), refs)<1e-5
    if not options: assert all(map(torch.equal, run(new, x), run(folded, x)))
    def others(m): return [n for n,o in m.named_modules() if not isinstance(o, (nn.Identity,nn.Dropout2d,nn.Dropout))]
    assert [*new.state_dict()]==[*folded.state_dict()] and others(new)==others(folded)
    assert not any(isinstance(m._modules, _Entries) for o in (net,new) for m in o.modules())
    there = BN_Folder(strip_identity=True, **options)
    there.fold(net, x, inplace=True)
    names,outs = [n for n,_ in net.named_modules()],run(net, x)
    assert names==[n for n,_ in new.named_modules()]
    there.undo()
    assert state(net)==before
    there.refold()
    assert [n for n,_ in net.named_modules()]==names and distance(run(net, x), outs)<1e-6 and there.result.stripped==folder.result.stripped
    there.undo()
    assert state(net)==before
    return folder,new

def test_keys_stay():
    folder,new = strip(Net())
    assert folder.result.stripped==['body.1','body.4'] and [*new.body._modules]==['0','2','3','5'] and not folder.result.notes
    again = BN_Folder().fold(Net(), sample())
    again.load_state_dict(new.state_dict())
    assert all(map(torch.equal, run(new, x:=sample()), run(again, x)))

@pytest.mark.parametrize('options', [dict(channels_last=True),dict(strip_dropout=True),dict(merge_branches=True),dict(verify=False)])
def test_with_other_options(options):
    net = Net(body=lambda: nn.Sequential(*body(), nn.Dropout2d(), conv()))
    folder,new = strip(net, **options)
    assert [*new.body._modules]==['0','2','3','5',*['6']*('strip_dropout' not in options),'7']

def test_off_by_default():
    folder = BN_Folder()
    assert [*folder.fold(Net(), sample()).body._modules]==[*'012345'] and not folder.result.stripped and not folder.result.notes

def test_it_pickles_and_loads_as_it_is():
    _,new = strip(Net(nn.Module.__call__))
    f = io.BytesIO()
    torch.save(new, f)
    f.seek(0)
    again = torch.load(f, weights_only=False)
    assert type(again.body._modules) is type(nn.Sequential()._modules) and all(map(torch.equal, run(again, x:=sample()), run(new, x)))

BY_POSITION = dict(index=lambda b,x: b[2](b(x)), last=lambda b,x: b[-1](b(x)), part=lambda b,x: b[:2](b(x)), length=lambda b,x: b(x)*len(b),
    truth=lambda b,x: b(x) if b else x,
    loop=lambda b,x: [x:=m(x) for m in b][-1]+b(x), enumerate=lambda b,x: b(x)*[i for i,m in enumerate(b)][-1], children=lambda b,x: [*b.children()][-1](b(x)),
    unpack=lambda b,x: (lambda *ms: ms[2](b(x)))(*b), names=lambda b,x: b(x)*len([*b._modules]), dictionary=lambda b,x: [*b._modules.values()][2](b(x)),
    vars=lambda b,x: [*vars(b)['_modules']].index('3')*b(x), copied=lambda b,x: [*b._modules.copy().values()][2](b(x)),
    merged=lambda b,x: [*({}|b._modules).values()][2](b(x)),
    pairs=lambda b,x: dict(b.named_children())['2'](b(x)), reversed=lambda b,x: next(reversed(b._modules.values()))(b(x)), added=lambda b,x: (b+b)(b(x)))
@pytest.mark.parametrize('f', BY_POSITION.values(), ids=BY_POSITION)
def test_looked_up_by_position(f):
    "Whoever counts entries or goes through them would find others: none goes, though the loop runs as well."
    folder,new = strip(Net(f))
    assert not folder.result.stripped and [*new.body._modules]==[*'012345']
    assert folder.result.notes==["`nn.Identity` stays in `body.1`, `body.4`: other code counts its entries or goes through them while the model runs."]
    assert folder.result.notes[0] in str(folder.result) and 'body.4' in folder.result._repr_html_()

BY_NAME = dict(getattr=lambda b,x: getattr(b, '4')(b(x)), hasattr=lambda b,x: b(x)*hasattr(b, '4'), modules=lambda b,x: b._modules['4'](b(x)),
    get=lambda b,x: b._modules.get('4', len)(b(x)),
    submodule=lambda b,x: b.get_submodule('4')(b(x)), within=lambda b,x: b(x)*(1 if '4' in b._modules else 2))
@pytest.mark.parametrize('f', BY_NAME.values(), ids=BY_NAME)
def test_looked_up_by_name(f):
    "Then only that entry stays."
    folder,new = strip(Net(f, lambda: nn.Sequential(conv(), nn.Identity(), nn.ReLU(), conv(), nn.Identity(), nn.ReLU())))
    assert folder.result.stripped==['body.1'] and [*new.body._modules]==['0','2','3','4','5'] and 'by name' in folder.result.notes[0]

FINE = dict(call=lambda b,x: b(x), forward=lambda b,x: b.forward(x), twice=lambda b,x: b(b(x)), as_class=lambda b,x: nn.Sequential.forward(b, x),
    others_by_name=lambda b,x: getattr(b, '2')(b(x)),
    parameters=lambda b,x: b(x.to(next(b.parameters()))), modules=lambda b,x: b(x)*len([m for m in b.modules() if isinstance(m, nn.Conv2d)]),
    missing=lambda b,x: b(x)*getattr(b, 'scale', 2))
@pytest.mark.parametrize('f', FINE.values(), ids=FINE)
def test_nobody_can_tell(f):
    folder,new = strip(Net(f))
    assert folder.result.stripped==['body.1','body.4'] and not folder.result.notes

def test_never_run_by_its_container():
    "Its entries are called by name: which ones, another input might tell."
    for f in (lambda b,x: getattr(b, '0')(x), lambda b,x: getattr(b, '1')(getattr(b, '0')(x))):
        folder,new = strip(Net(f, lambda: nn.Sequential(conv(), nn.Identity(), nn.ReLU())))
        assert not folder.result.stripped and 'did not run' in folder.result.notes[0]

class Own(nn.Sequential):
    def forward(self, x): return super().forward(x)
class Loop(nn.Sequential):
    def __iter__(self): return iter([*self._modules.values()][:-1])
class Plain(nn.Sequential):
    "A subclass with nothing of its own in the way."
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = 3

@pytest.mark.parametrize('cls,goes', [(Own,False),(Loop,False),(Plain,True)])
def test_subclasses(cls, goes):
    folder,new = strip(Net(body=lambda: cls(*body())))
    assert bool(folder.result.stripped)==goes and (goes or 'no plain loop' in folder.result.notes[0])

def test_forward_of_one_object():
    net = Net()
    net.body.forward = lambda x: nn.Sequential.forward(net.body, x)
    folder = BN_Folder(strip_identity=True)
    folder.fold(net, x:=sample(), inplace=True)
    assert not folder.result.stripped and 'no plain loop' in folder.result.notes[0]

def test_fastai_containers():
    "`SequentialEx` loops by itself, over a `ModuleList`, and is no `nn.Sequential`."
    folder,new = strip(Net(body=lambda: SequentialEx(*body(), MergeLayer())))
    assert not folder.result.stripped and [*new.body.layers._modules]==[*'0123456']

@pytest.mark.parametrize('cls', [lambda ms: nn.ModuleList(ms), lambda ms: nn.ModuleDict({f'm{i}':m for i,m in enumerate(ms)})])
def test_lists_and_dictionaries(cls):
    def f(b, x):
        for m in b.values() if isinstance(b, nn.ModuleDict) else b: x = m(x)
        return x
    folder,new = strip(Net(f, lambda: cls(body())))
    assert len(folder.result.folded)==2 and len(new.body)==6 and not folder.result.stripped

def seen(*args): pass

def test_hooks_and_weights_on_an_identity():
    a,b,c,d = (nn.Identity() for _ in range(4))
    a.register_forward_hook(seen)
    b.register_full_backward_hook(seen)
    c.bias = nn.Parameter(torch.ones(2))
    d.forward = lambda x: x*2
    folder,new = strip(Net(body=lambda: nn.Sequential(conv(), nn.Identity(), a, b, c, d)))
    assert folder.result.stripped==['body.1'] and [*new.body._modules]==['0','2','3','4','5'] and 'body.3` and 2 more: hooks or weights' not in folder.result.notes[0]
    assert 'hooks or weights hang on it' in folder.result.notes[0]

def test_hook_on_the_container_that_looks():
    net = Net()
    net.body.register_forward_hook(lambda m,i,o: o*len(m))
    folder,_ = strip(net)
    assert not folder.result.stripped
    net = Net()
    net.body.register_forward_hook(lambda m,i,o: o*2)
    folder,_ = strip(net)
    assert folder.result.stripped

def test_identities_of_the_user_go_too():
    "A model folded before has them, and nothing tells these from others. A subclass is something else."
    class Mark(nn.Identity): pass
    folder,new = strip(Net(body=lambda: nn.Sequential(nn.Identity(), conv(), Mark(), nn.ReLU(), nn.Identity())))
    assert [*new.body._modules]==['1','2','3'] and 'no norm' in str(folder.result)
    old = BN_Folder().fold(Net(), sample())
    assert [*BN_Folder(strip_identity=True).fold(old, sample()).body._modules]==['0','2','3','5']

def test_attributes_stay():
    "What a forward calls by name, it calls."
    folder,new = strip(Net(lambda b,x: b(x), norm=nn.BatchNorm2d(4)))
    net = Net()
    net.norm = net.body[1]
    folder,new = strip(net)
    assert isinstance(new.norm, nn.Identity) and [*new.body._modules]==['0','2','3','5']

class Twin(Net):
    def forward(self, x): return super().forward(x)+self.twin(self.stem(x)*2)

def test_container_under_two_names():
    net = Twin()
    net.twin = net.body
    folder,new = strip(net)
    assert new.twin is new.body and [*new.body._modules]==['0','2','3','5']

def test_containers_in_containers_and_empty_ones():
    net = Net(body=lambda: nn.Sequential(nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4))), nn.Sequential(nn.Identity(), nn.Identity()), nn.Sequential()))
    folder,new = strip(net)
    assert folder.result.stripped==['body.0.1.0','body.1.0','body.1.1'] and [len(m) for m in new.body]==[2,0,0]
    assert all(map(torch.equal, run(new, x:=sample()), run(BN_Folder().fold(net, x), x)))

def test_model_that_is_a_container():
    net = randomize_norms(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU()))
    folder,new = strip(net)
    assert folder.result.stripped==['1'] and new(sample()).shape==(2,4,8,8) and [*new._modules]==['0','2']
    assert [*strip(nn.Sequential(nn.Identity()))[1]]==[]

def test_norm_that_stays_after_undo():
    "Folded again with other weights, a norm may have to stay: its slot is not taken out."
    net = randomize_norms(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))).half()
    folder = BN_Folder(strip_identity=True)
    folder.fold(net, sample().half(), inplace=True)
    assert [*net._modules]==['0','2','3']
    folder.undo()
    with torch.no_grad():
        net[1].running_var.fill_(0)
        net[1].weight.fill_(6e4)
    folder.refold()
    assert [*net._modules]==['0','1','2','3'] and isinstance(net[1], nn.BatchNorm2d)

class Box:
    def __init__(self, o): self.o = o

class Hidden(nn.Module):
    "Looks positions up where no container can see it."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.Tanh(), conv(), nn.BatchNorm2d(4), nn.Sigmoid())
        self.entries = Box(self.body._modules) # the dictionary itself, in an object
    def forward(self, x): return self.body(x)+[*self.entries.o.values()][2](x.mean(1, True))

def test_what_nobody_saw_the_proof_sees():
    "All of them stay, and the plan says so."
    net = randomize_norms(Hidden())
    x = sample()
    folder,before = BN_Folder(strip_identity=True),state(net)
    folder.fold(net, x, inplace=True)
    assert not folder.result.stripped and [*net.body._modules]==[*'012345'] and len(folder.result.folded)==2
    assert folder.result.notes==["`nn.Identity` stays in `body.1`, `body.4`: without it, the model did not compute the same."]
    folder.undo()
    assert state(net)==before

def test_positions_that_only_other_sizes_look_up():
    net = Net(lambda b,x: b(x) if x.shape[-1]<9 else b[0](x))
    folder,new = strip(net)
    assert not folder.result.stripped
    for s in (8,9,12): assert distance(run(new, x:=sample(s=s)), run(net, x))<1e-5

def test_model_that_does_not_run_while_watched():
    def f(b, x):
        assert type(b._modules) is type(nn.Sequential()._modules)
        return b(x)
    folder,new = strip(Net(f))
    assert not folder.result.stripped and len(folder.result.folded)==2 and 'does not run while it is watched' in folder.result.notes[0]

def test_copies_made_on_the_way_are_plain():
    "And a deep copy of a container may do with positions what it likes."
    import copy # one line of one test, chkstyle: ignore
    kept = []
    def f(b, x):
        kept.append(copy.deepcopy(b))
        return kept[-1](x)
    folder,new = strip(Net(f))
    assert not folder.result.stripped and not any(isinstance(m._modules, _Entries) for m in kept)

def test_two_threads():
    "Each watches its own model."
    nets = [Net(),Net(BY_POSITION['index'])]
    folders = [BN_Folder(strip_identity=True) for _ in nets]
    threads = [threading.Thread(target=lambda f=f,n=n: [f.fold(n, sample()) for _ in range(3)]) for f,n in zip(folders, nets)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [len(f.result.stripped) for f in folders]==[2,0]

def test_dropout_in_the_place_of_a_norm():
    "timm's norms carry a dropout, which folding leaves behind with the activation."
    from timm.layers import BatchNormAct2d # takes a second, chkstyle: ignore
    net = Net(body=lambda: nn.Sequential(conv(), BatchNormAct2d(4, drop_layer=nn.Dropout), conv(), nn.Dropout()))
    net.body[3].register_forward_hook(seen)
    folder = BN_Folder(strip_dropout=True)
    new = folder.fold(net, x:=sample())
    assert [type(m) for m in new.body[1]]==[nn.Identity,nn.ReLU] and [*new.body[1]._modules]==['0','1'] and isinstance(new.body[3], nn.Dropout)
    assert distance(run(new, x), run(net, x))<1e-6
    folder,new = strip(net, strip_dropout=True)
    assert [*new.body[1]._modules]==['1']

class DropWide(nn.Dropout):
    def forward(self, x): return x*.5 if x.shape[-1]>20 else super().forward(x)

class DropMasked(nn.Dropout):
    def forward(self, x, mask=None): return super().forward(x) if mask is None else x*mask

class Dropped(nn.Module):
    "Hands the output of `norm` to `f`, for which it has a `drop`."
    def __init__(self, drop, f=lambda s,x: s.drop(x)):
        super().__init__()
        self.conv,self.norm,self.drop,self.f = conv(3),nn.BatchNorm2d(4),drop,f
        randomize_norms(self)
    def forward(self, x, *rest): return self.f(self, self.norm(self.conv(x)), *rest)

@pytest.mark.parametrize('net, given, others', [
    (Dropped(DropWide()), [sample(s=12)], [sample(s=30)]),
    (Dropped(DropMasked(), lambda s,x,*m: s.drop(x, *m)), [x:=sample(), (x,torch.rand(1,1,8,8))], []),
    (Dropped(nn.Dropout(), lambda s,x: s.drop(x)*(1-s.drop.p)), [sample()], [])], ids=['works_on_large_inputs','takes_a_mask','is_asked_for_p'])
@pytest.mark.parametrize('inplace', [False,True])
def test_dropout_that_does_more_stays(net, given, others, inplace):
    "It works where the sample does not show it, takes more than an `nn.Identity`, or is read by the code around it."
    net = copy.deepcopy(net)
    refs,folder = [run(net, Sample.of(x)) for x in given+others],BN_Folder(strip_dropout=True)
    new = folder.fold(net, samples=given, inplace=inplace)
    if inplace:
        folder.undo()
        folder.refold()
    for x,ref in zip(given+others, refs): assert distance(run(new, Sample.of(x)), ref)<1e-5
    assert type(new.drop)==type(net.drop) and names_of(folder.result.folded)==['norm']

def test_dropout_that_stays_is_said():
    folder = BN_Folder(strip_dropout=True)
    folder.fold(Dropped(nn.Dropout(), lambda s,x: s.drop(x)*(1-s.drop.p)), sample())
    assert 'Dropout stays in `drop`: without it, the model did not compute the same.' in folder.result.notes

def test_folding_again_strips_the_same_dropout():
    net = Net(body=lambda: nn.Sequential(conv(), nn.Dropout(), nn.BatchNorm2d(4), nn.Dropout2d()))
    folder,refs = BN_Folder(strip_dropout=True),run(net, x:=sample())
    folder.fold(net, x, inplace=True)
    for _ in range(2):
        assert [type(m) for m in net.body]==[nn.Conv2d]+3*[nn.Identity] and distance(run(net, x), refs)<1e-5
        folder.undo()
        assert [type(m) for m in net.body]==[nn.Conv2d,nn.Dropout,nn.BatchNorm2d,nn.Dropout2d]
        folder.refold()
