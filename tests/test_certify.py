"""Certificates: the laws by brute force, folds that are right, folds that are wrong on purpose, and networks at random.

`CERTIFY=1` also takes large models, all samples that PyTorch has for the operations of the laws, and thousands of changed weights, which takes
an hour; `CERTIFY=20000` also takes that many random networks, which takes a day. What was found is printed: `-s` shows it."""
import copy, json, multiprocessing, os, random, re, sys, types, unittest
from collections import Counter
from functools import lru_cache, partial
import pytest, timm, torch, torch.nn.functional as F, torchvision
from fastai.layers import ConvLayer
from fastai.tabular.model import TabularModel
from fastai.vision.learner import Learner, create_vision_model, load_learner
from fastai.vision.models.unet import DynamicUnet
from timm.models.fastvit import RepMixerBlock
from torch import nn
from torch.export import export
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torchvision.ops import FrozenBatchNorm2d
import fasterfold.certify as room
from fasterfold.affine import Affine
from fasterfold.certify import Certificate, Table, Walk, certify
from fasterfold.fold import BN_Folder
from fasterfold.rules import PULL, PUSH
from fasterfold.sample import Sample
from fasterfold.state import FoldError, copy_model
from helpers import *
import fasterfold.export, fasterfold.learner # give learners what they fold by, chkstyle: ignore
from learners import KINDS, MaskBlock, images, mask
from test_cli import assert_refused, box, call, exported # which are fixtures, too, chkstyle: ignore
from test_package import imports_of, root
from test_properties import inputs, network, rounding

how_long = int(os.environ.get('CERTIFY') or 0)
long = how_long>0
pytestmark = [pytest.mark.filterwarnings('ignore'),tells_conditions,*[pytest.mark.timeout(0)]*long]

def program(model, *xs, free=True): return room._exported(model, Sample(xs), lambda i,d: free)

def pair(make, x, **options):
    "A model with norms that do something, and the same, folded without a proof of its own."
    net = made(make)
    return net,BN_Folder(verify=False, **options).fold(net, x),x

def proved(*args):
    res = certify(*args)
    assert res.proved, res
    return res

def test_it_imports_nothing_of_what_folds():
    ours = {o.removeprefix('fasterfold.') for o in imports_of(root/'fasterfold'/'certify.py') if o.startswith('fasterfold.')}
    assert ours=={'interrupt','sample','state','table'}

# ---- The laws, by brute force

def number_of(core, x, f, table):
    "What a core is in numbers, if the input is `x` and `f` made it of what it reads."
    def read(core):
        if core.key[0]=='input': return x
        if core.key[0]=='map': return core.nums[0].m*read(table.byid[core.key[1]])+core.nums[1].m
        listed = core.key[-1] is None or core.key[0] in ('split','chunk','unbind')
        ids = [int(o) for o in re.findall(r"\('core', (\d+),", str(core.key))] or [core.key[-2 if listed else -1]]
        return read(table.byid[ids[0]])
    return read(core) if core.key[0]=='map' else f(read(core))

def image(*shape): return torch.randn(shape, dtype=torch.float64)
LAWS = dict(relu=F.relu, leaky_relu=lambda x: F.leaky_relu(x, .2), max_pool=lambda x: F.max_pool2d(x, 3, 2, 1),
    adaptive_max=lambda x: F.adaptive_max_pool2d(x, 2), avg_pool=lambda x: F.avg_pool2d(x, 2), avg_pool_padded=lambda x: F.avg_pool2d(x, 3, 2, 1),
    avg_pool_counts_no_zeros=lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    avg_pool_ceil=lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), adaptive_avg=lambda x: F.adaptive_avg_pool2d(x, (2,3)),
    mean=lambda x: x.mean((2,3)), mean_kept=lambda x: x.mean(-1, keepdim=True), mean_of_channels=lambda x: x.mean(1), sum=lambda x: x.sum((2,3)),
    sum_of_channels=lambda x: x.sum(1), sum_of_all=lambda x: x.sum(), var=lambda x: x.var((2,3)), std=lambda x: x.std(2),
    pad=lambda x: F.pad(x, (1,2)), pad_reflect=lambda x: F.pad(x, (1,2,1,0), mode='reflect'),
    pad_circular=lambda x: F.pad(x, (1,2,1,0), mode='circular'), pad_value=lambda x: F.pad(x, (1,1), value=.5),
    bilinear=lambda x: F.interpolate(x, scale_factor=2., mode='bilinear'), nearest=lambda x: F.interpolate(x, scale_factor=2.),
    bicubic=lambda x: F.interpolate(x, size=(5,7), mode='bicubic'), flatten=lambda x: x.flatten(2), merge=lambda x: x.transpose(0, 1).flatten(1),
    permute=lambda x: x.permute(2,0,3,1), transpose=lambda x: x.transpose(1, 3), select=lambda x: x.select(1, 2), slice=lambda x: x[:,1:3],
    slice_positions=lambda x: x[:,:,1:], flip=lambda x: x.flip(1), roll=lambda x: x.roll(1, 1), repeat=lambda x: x.repeat(1, 2, 1, 1),
    expand=lambda x: x[None].expand(2, *x.shape), unflatten=lambda x: x.unflatten(1, (2,2)), shuffle=lambda x: F.channel_shuffle(x, 2),
    pixels=lambda x: F.pixel_shuffle(x, 2), chunk=lambda x: x.chunk(2, 1)[1], unbind=lambda x: x.unbind(1)[2], sigmoid=torch.sigmoid,
    softmax=lambda x: x.softmax(1), group_norm=lambda x: F.group_norm(x, 2), layer_norm=lambda x: F.layer_norm(x, x.shape[-1:]),
    amax=lambda x: x.amax(2), square=lambda x: x*x, cumsum=lambda x: x.cumsum(1), to=lambda x: x.float(), neg=lambda x: -x, half=lambda x: x/2,
    times=lambda x: x*-3., less=lambda x: 1-x)

@lru_cache(None)
def walked(kind):
    "All of `f(a·x + d)`, walked through: the numbers, the walk, and the value of each."
    a,d = (image(4, 1, 1) for _ in range(2))
    if kind=='positive': a = a.abs()
    elif kind=='same': a,d = a[:1],d[:1]
    else: a[1] = d[2] = 0
    net = Fn(lambda m,x: [f(x*m.a+m.d) for f in LAWS.values()], a=nn.Parameter(a), d=nn.Parameter(d))
    w = Walk(program(net, image(3, 4, 6, 5)), Table()).run()
    return a,d,w,dict(zip(LAWS, map(w.value, w.program.graph.output_node().args[0])))

@pytest.mark.parametrize('kind', ['mixed','positive','same'])
@pytest.mark.parametrize('name', LAWS)
def test_law(name, kind):
    "What a law says of `f(a·x + d)` is right for numbers and sizes at random, with scales of both signs and zeros."
    f,(a,d,w,vals) = LAWS[name],walked(kind)
    v = vals[name]
    for size in ((3,4,6,5),(2,4,9,8)):
        x,arithmetic = image(*size),name in ('neg','half','times','less') # of no other core
        got = v.s.m*(x if arithmetic else number_of(v.core, x, f, w.table))+v.t.m
        want = f(x*a+d)
        assert distance([got.expand(want.shape).double()], [want.double()])<(1e-6 if name=='to' else 1e-12)

def other_number(v): return not v if isinstance(v, bool) else v+1 if isinstance(v, int) else v*1.01+.001

def test_every_argument_counts():
    "Of a program in which any number that an operation is given is another one, nothing is proved that has become another function."
    p,x,table = walked('mixed')[2].program,image(3, 4, 6, 5),Table()
    want,refs = [end(*o) for o in values(p, table, False)],room._Double(p).on([x])
    given = {n:tree_flatten((n.args,n.kwargs)) for n in p.graph.nodes if n.op=='call_function'}
    places = [(n,i) for n,(vs,_) in given.items() for i,v in enumerate(vs) if isinstance(v, (bool,int,float))]
    found = Counter()
    for n,i in places if long else random.Random(0).sample(places, 8):
        (vs,spec),old = given[n],(n.args,n.kwargs)
        n.args,n.kwargs = tree_unflatten([other_number(v) if j==i else v for j,v in enumerate(vs)], spec)
        try: outs = room._Double(p).on([x])
        except (RuntimeError,IndexError,ValueError): outs = None # nor can it be run
        if outs:
            for o,f,y,z in zip(values(p, once_more(table), True), want, outs, refs):
                assert (e := end(*o))!=f or agrees([y], [z]) or y.shape!=z.shape, (n,i) # sizes are those that the program has for its values
                found[e==f] += 1
        n.args,n.kwargs = old
    assert found[False]>2 and found[True]>100

LINEAR = dict(conv=lambda: nn.Conv2d(4, 6, 3), padded=lambda: nn.Conv2d(4, 6, 3, padding=1), groups=lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    same=lambda: nn.Conv2d(4, 4, (3,5), padding='same'),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), linear=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    last=lambda: nn.Linear(5, 3), depthwise=lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False))
@pytest.mark.parametrize('kind', LINEAR)
def test_linear_laws(kind):
    "A norm before or behind goes into it by hand, at scales of both signs, or stays where zeros are padded."
    for before in (False,True):
        def make():
            layer = LINEAR[kind]()
            n = {'linear':5,'last':4}.get(kind) or layer.out_channels
            norm = nn.BatchNorm1d(5) if kind=='linear' else nn.BatchNorm2d(n)
            return nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), layer, nn.Tanh()) if before else nn.Sequential(nn.Sigmoid(), layer, norm, nn.Tanh())
        net,new,x = pair(make, torch.randn(2, 4, 11, 5))
        proved(net, new, x)
        changed = copy.deepcopy(new)
        p = random.Random(0).choice([*changed.parameters()])
        with torch.no_grad(): p.view(-1)[0] += 1e-3*p.abs().max()
        assert not certify(net, changed, x).proved

# ---- The laws, on samples that PyTorch has for its own tests

def op_infos():
    "What PyTorch tests operations with; what its import does to everybody, to forbid flags to be set, is not done."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.backends, 'disable_global_flags', lambda: None)
        if 'expecttest' not in sys.modules: m.setitem(sys.modules, 'expecttest', types.SimpleNamespace(TestCase=unittest.TestCase)) # a base class of other tests
        from torch.testing._internal.common_methods_invocations import op_db
    return op_db

def op_samples():
    "By law, pairs of an operation as a function and an input for it, of two dimensions or more."
    res = {}
    for op in op_infos():
        short = op.name.removeprefix('nn.functional.')
        own = {op.aten_name,short.split('.')[-1],*([k for k in room.LAWS if k.startswith('upsample')] if short in ('interpolate','upsample_bilinear','upsample_nearest') else ())}&room.LAWS.keys()
        if not own or torch.float64 not in op.dtypes: continue
        for o in op.sample_inputs('cpu', torch.float64):
            x,rest = (o.input[0],o.input[1:]) if isinstance(o.input, (list,tuple)) and o.input else (o.input,None)
            if not isinstance(x, torch.Tensor) or x.dim()<2 or not x.numel() or not x.is_floating_point() or x.layout is not torch.strided: continue
            def f(x, op=op.op, o=o, rest=rest):
                args,kwargs = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, (o.args,o.kwargs)) # which it may write to
                return op(x if rest is None else [x,*rest], *args, **kwargs)
            res.setdefault(min(own), []).append((f,x.detach().contiguous()))
    return res

def real(t): return isinstance(t, torch.Tensor) and t.is_floating_point()

def beside(y, s, x):
    "The factors `s` of channels of `x` for `y`, as far as that has these channels."
    return s.reshape(-1, *[1]*(y.dim()-2)) if y.dim()>1 and y.shape[1]==x.shape[1] else s.mean()

WAYS = dict(same=lambda f,x,s,t: f(x*s+t), outside=lambda f,x,s,t: [y*beside(y, s, x)+beside(y, t, x) for y in outs(f(x))],
    scaled=lambda f,x,s,t: [y*beside(y, s, x) for y in outs(f(x+t/s))], twice=lambda f,x,s,t: [y/2 for y in outs(f(2*(x*s+t)))],
    opposite=lambda f,x,s,t: [-y for y in outs(f(-(x*s+t)))], shifted=lambda f,x,s,t: [y-1 for y in outs(f(x*s+t+1))], other=lambda f,x,s,t: f(x*s+t*1.01))
def outs(y): return [t for t in (y if isinstance(y, (list,tuple)) else [y]) if real(t)]

def agrees(ys, zs):
    "Are these the same numbers, but for rounding?"
    def near(y, z): return torch.allclose(y, z, 1e-9, 1e-9*z.nan_to_num(0, 0, 0).norm().item(), True)
    return len(ys)==len(zs) and all(y.shape==z.shape and y.dtype==z.dtype and near(y, z) for y,z in zip(ys, zs))

def values(p, table, folded):
    "Pairs of the walk through a program and a node that it returns."
    w = Walk(p, table, folded).run()
    return ((w,n) for n in p.graph.output_node().args[0])

def end(w, n):
    "What can be compared of the node `n`, None if that is not decided."
    try: return w.table.read(v := w.value(n)).core.id,v.shape,v.dtype
    except room.Undecided: return None

def ways_of(some, kind):
    "Which ways to write `f(s·x + t)` are proved to be the same for pairs of `some`, and which are."
    g = torch.Generator().manual_seed(0)
    def drawn(x, i):
        v = torch.rand((1 if kind=='same' else x.shape[1],*[1]*(x.dim()-2)), generator=g, dtype=torch.float64)+.5
        return v if i or kind=='positive' else v*(1-2*(torch.arange(len(v))%2)).reshape(v.shape)
    held = [[drawn(x, i) for i in (0,1)] for _,x in some]
    nets = [Fn(lambda m,*xs,ways=ways: [outs(WAYS[k](f, x, *st)) for (f,_),x,st in zip(some, xs, held) for k in ways]) for ways in (['same'],WAYS)]
    xs = [x for _,x in some]
    with torch.no_grad(): ran = [[net(*(c*x for x in xs)) for net in nets] for c in (1,3,-1)]
    same = {(i,k):all(agrees(a[i], b[i*len(WAYS)+j]) for a,b in ran) for i in range(len(some)) for j,k in enumerate(WAYS)}
    table,ends = Table(),[]
    for net in nets:
        it = values(program(net, *xs, free=False), table, net is nets[1])
        ends.append([[end(*next(it)) for _ in o] for o in ran[0][len(ends)]])
    return {(i,k):(None not in (a := ends[0][i]) and a==ends[1][i*len(WAYS)+j],same[i,k]) for i in range(len(some)) for j,k in enumerate(WAYS)}

def certify_samples():
    "Print what is proved of all ways, none of which may be proved that numbers show to be another function."
    found,rng = Counter(),random.Random(0)
    every = op_samples()
    for law in sorted(every) if long else rng.sample(sorted(every), 8):
        pairs = [o for o in every[law][::1+len(every[law])//100] if outs(o[0](o[1]))]
        for i in range(0, len(pairs) if long else 1, 4):
            try: res = ways_of(pairs[i:i+4] if long else pairs[:2], ('mixed','positive','same')[i//4%3])
            except Exception as e:
                found[f'failed: {law} {type(e).__name__} {str(e)[:60]}'] += 1
                continue
            for (j,k),(said,true) in res.items():
                assert true or not said, (law,i+j,k)
                found[f"{'the same' if true else 'another function'}, {'proved' if said else 'not proved'}"] += 1
                if k=='same' and not said: found[f'not decided: {law}'] += 1
    print(found, flush=True)
    assert found['the same, proved']>found['the same, not proved']

def test_samples_of_pytorch():
    "In a process of its own, since what PyTorch is tested with changes flags and methods for all that follows."
    child = multiprocessing.get_context('fork').Process(target=certify_samples)
    child.start()
    child.join()
    assert child.exitcode==0

# ---- Folds that are right

class Blocks(nn.Module):
    "A residual stream, gates, a cat, merged branches, and a norm that stays."
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b,self.c = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 8, 3, padding=1),nn.Conv2d(8, 8, 1),nn.Conv2d(16, 8, 1)
        self.n = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.gate,self.head = nn.Conv2d(8, 8, 1),nn.Linear(8, 4)
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.n[0](self.a(x))+self.n[1](self.b(x))+self.n[2](x))
        x = x*self.gate(x.mean((2,3), keepdim=True)).sigmoid()
        x = self.n[3](self.c(torch.cat([x,F.gelu(x)], 1)))
        return self.head(F.hardswish(x).mean((2,3)))

BIG = dict(mobilenet=lambda: torchvision.models.mobilenet_v2(weights=None), densenet=lambda: torchvision.models.densenet121(weights=None),
    resnet50=lambda: torchvision.models.resnet50(weights=None), vision=lambda: create_vision_model(torchvision.models.resnet18, 10, pretrained=False))
def mixers(): return nn.Sequential(nn.Conv2d(3, 8, 3), RepMixerBlock(8), RepMixerBlock(8), nn.Conv2d(8, 4, 1)) # whose sums are read by what is added to them

MODELS = dict(blocks=Blocks, mixers=mixers, resnet18=lambda: torchvision.models.resnet18(weights=None), **(BIG if long else {}))
@pytest.mark.parametrize('name', MODELS)
def test_models(name):
    net,new,x = pair(MODELS[name], torch.randn(2, 3, 64, 64))
    res = proved(net, new, x)
    assert res.inputs and all(k in str(res) for k in ('batch','height','width')) and res.residue<=1+1e-6 and res.radius<1e-4
    outs = [run(to_double(m), x.double()) for m in (new,net)]
    assert distance(*outs)<res.drift<1e-4

def test_tables():
    res = proved(*pair(lambda: TabularModel([(10,6),(5,4)], 4, 2, [20,10]), (torch.randint(5, (8,2)),torch.randn(8, 4))))
    assert res.inputs['x_cont']=='float32[batch, 4]'

@pytest.mark.parametrize('dtype', [torch.float64,torch.float16,torch.bfloat16])
def test_other_types(dtype):
    net,new,x = pair(lambda: Blocks().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype))
    proved(net, new, x)
    with torch.no_grad(): new.head.weight[1,2] += new.head.weight.abs().max()*(.001 if dtype is torch.float64 else .05)
    assert not certify(net, new, x).proved

def test_programs_and_learners(tmp_path):
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    for f in (copy.deepcopy,lambda m: m.train()): proved(f(net), f(new), x)
    assert net.training # and still is
    proved(*(program(m.eval(), x) for m in (net,new)))
    learn = KINDS['plain_learner'](tmp_path)
    randomize_norms(learn.model)
    before = copy.deepcopy(learn)
    proved(before, learn.fold_bn(), torch.randn(2, 1, 8, 8))
    with pytest.raises(FoldError, match='neither'): certify(net, program(new, x), x)

# ---- And folds that are not

def differs(*args, **words):
    res = certify(*args)
    assert res.verdict=='not the same', res
    return res

def changes(n, model, seed=0):
    "Copies of `model` with one weight changed by at least 0.1 % of the largest one beside it."
    rng = random.Random(seed)
    for _ in range(n):
        new = copy.deepcopy(model)
        p = rng.choice([p for p in new.parameters() if p.is_floating_point() and p.numel()])
        i = rng.randrange(p.numel())
        with torch.no_grad(): p.view(-1)[i] += rng.choice((1,-1))*rng.uniform(1e-3, 1e-2)*max(p.abs().max(), 1e-3)
        yield new,p,i

def once_more(table):
    "A copy of `table`, to walk through one more program with."
    new = Table()
    new.cores,new.constants,new.byid = {k:[*v] for k,v in table.cores.items()},{k:[*v] for k,v in table.constants.items()},[*table.byid]
    return new

def ends(p, table, folded):
    "What the program `p` returns, None where that is not decided."
    try: return room._returned(Walk(p, table, folded).run())
    except room.Undecided: return None

def timm_model(name): return lambda: timm.create_model(name)
CHANGED = dict(blocks=Blocks, **({} if not long else dict(tables=lambda: TabularModel([(10,6),(5,4)], 4, 2, [20,10]), **{k:timm_model(k) for k in
    ('test_resnet','test_efficientnet','test_byobnet','test_mambaout','starnet_s050','resnet10t')},
    **{k:partial(getattr(torchvision.models, k), weights=None) for k in ('mobilenet_v3_small','shufflenet_v2_x0_5')})))
@pytest.mark.parametrize('name', CHANGED)
def test_changed_weights(name):
    "All changes of single weights are refused. The original is walked through once."
    net,new,x = pair(CHANGED[name], (torch.randint(5, (8,2)),torch.randn(8, 4)) if name=='tables' else torch.randn(2, 3, 64, 64))
    old,p,table,rng = *(program(m, *(x if isinstance(x, tuple) else (x,))) for m in (net,new)),Table(),random.Random(0)
    want = ends(old, table, False)
    assert ends(p, once_more(table), True)==want
    read = {n.name for n in p.graph.nodes if n.users}
    held = [o.target for o in p.graph_signature.input_specs if o.target in p.state_dict and o.arg.name in read and p.state_dict[o.target].is_floating_point()]
    for _ in range(1000 if long else 40):
        right = p.state_dict[k := rng.choice(held)]
        p.state_dict[k] = t = right.detach().clone(memory_format=torch.contiguous_format)
        i = rng.randrange(t.numel())
        t.view(-1)[i] += rng.choice((1,-1))*rng.uniform(1e-3, 1e-2)*max(t.abs().max().item(), 1e-3)
        assert ends(p, once_more(table), True)!=want, (k,i)
        p.state_dict[k] = right

def test_where_it_differs():
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    with torch.no_grad(): new.c.weight[3,5] *= 1.01
    res = differs(net, new, x)
    assert 'in `c`' in res.why and 'channel 3' in res.why and 'outputs differ by' in res.why and str(res).startswith('Not the same')

def test_wrong_folds():
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    dropped,other = copy.deepcopy(net),made(Blocks)
    dropped.n[3] = nn.Identity()
    differs(net, dropped, x)
    torch.manual_seed(1)
    differs(net, randomize_norms(Blocks(), 2), x)
    permuted = copy.deepcopy(new)
    with torch.no_grad(): permuted.c.weight.copy_(new.c.weight.flip(0))
    differs(net, permuted, x)

@pytest.mark.parametrize('rule', ['convolution','add'])
def test_broken_rules(rule, monkeypatch):
    "Of a folder that forgets shifts."
    right = PULL[rule]
    monkeypatch.setitem(PULL, rule, lambda *args: right(*args)[:1])
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)) if rule=='convolution'
        else Fn(lambda m,x: m.n(m.a(x)+m.b(x)).relu(), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4)))
    new = BN_Folder(verify=False).fold(net, x := torch.randn(2, 3, 8, 8))
    differs(net, new, x)

def test_outputs_in_another_order():
    class Two(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.a,self.b,self.swap = nn.Linear(3, 4),nn.Linear(3, 4),swap
        def forward(self, x): return (self.b(x),self.a(x)) if self.swap else (self.a(x),self.b(x))
    a,b = Two(False),Two(True)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3)
    differs(a, b, x)
    proved(a, copy.deepcopy(a), x)
    assert certify(a, Fn(lambda m,x: {'a':m.m(x)[0],'b':m.m(x)[1]}, m=a), x).verdict=='not decided'

# ---- Sizes: what is the same for the sample only

def by_hand(f, g, **held):
    "A model and another one, that compute `f` and `g`."
    return Fn(f, **held),Fn(g, **held)

def sized(count):
    "A norm before a sum over positions, and its shift in the linear layer behind, for `count` positions."
    torch.manual_seed(0)
    net = randomize_norms(nn.ModuleDict(dict(c=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8), l=nn.Linear(8, 4))))
    new = copy.deepcopy(net)
    n = net['n']
    with torch.no_grad():
        a = n.weight/(n.running_var.double()+n.eps).sqrt()
        new['l'].weight.copy_(net['l'].weight*a)
        new['l'].bias.copy_(net['l'].bias+net['l'].weight.double()@(n.bias-n.running_mean*a)*count)
    return Fn(lambda m,x: m.d['l'](m.d['n'](m.d['c'](x).relu()).sum((2,3))), d=net),Fn(lambda m,x: m.d['l'](m.d['c'](x).relu().sum((2,3))), d=new)

def test_sum_over_positions():
    "Right for one size only."
    x = torch.randn(2, 3, 8, 8)
    a,b = sized(36)
    assert distance(run(b, x), run(a, x))<1e-5
    assert certify(a, b, x).verdict!='proved'
    res = proved(*(program(m, x, free=False) for m in (a,b)))
    assert 'float32[2, 3, 8, 8]' in str(res) and not res.ranges

def test_pad_to_a_multiple():
    "None where the size is one already."
    net = randomize_norms(nn.ModuleDict(dict(n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 4, 4, stride=4))))
    new = copy.deepcopy(net)
    n = net['n']
    with torch.no_grad():
        a = n.weight/(n.running_var.double()+n.eps).sqrt()
        new['c'].weight.copy_(net['c'].weight*a[:,None,None])
        new['c'].bias.copy_(net['c'].bias+(net['c'].weight.double()*(n.bias-n.running_mean*a)[:,None,None]).sum((1,2,3)))
    def padded(x): return F.pad(x, (0,-x.shape[-1]%8,0,-x.shape[-2]%8))
    a,b = Fn(lambda m,x: m.d['c'](padded(m.d['n'](x))), d=net),Fn(lambda m,x: m.d['c'](padded(x)), d=new)
    x = torch.randn(2, 3, 16, 16)
    assert distance(run(b, x), run(a, x))<1e-5 and certify(a, b, x).verdict!='proved'

def test_size_as_a_number():
    x = torch.randn(2, 3, 8)
    for f,g in ((lambda m,x: x/x.shape[-1],lambda m,x: x/8), (lambda m,x: x+x.shape[0],lambda m,x: x+2),
        (lambda m,x: x.new_ones(x.shape[-1]).sum()*x,lambda m,x: 8*x),
        (lambda m,x: x[...,:x.shape[-1]//2],lambda m,x: x[...,:4]), (lambda m,x: x.reshape(x.shape[0], -1),lambda m,x: x.reshape(-1, 24))):
        a,b = by_hand(f, g)
        assert distance(run(b, x), run(a, x))==0 and certify(a, b, x).verdict!='proved'

def test_conditions():
    "A size that decides is said to be what it must be, and so is an argument."
    def f(m, x, route=0): return m.c(x) if x.shape[-1]>9 and not route else m.c(x)*2
    net = Fn(f, c=nn.Conv1d(3, 4, 3))
    res = proved(net, copy.deepcopy(net), Sample((torch.randn(2, 3, 20),), dict(route=0)))
    assert '≥ 10' in str(res) and any(v=='0' for v in res.inputs.values())

def test_conditions_in_words():
    "What all of them leave of a size; and they are worked out, not run, since they come from a file."
    net = Fn(lambda m,x: m.c(x) if all(n%32==0 for n in x.shape[2:]) else m.c(x)*2, c=nn.Conv2d(3, 4, 3, padding=1))
    res = proved(net, copy.deepcopy(net), torch.randn(2, 3, 32, 64))
    assert 'batch ≥ 2, height multiples of 32, width multiples of 32 (2 conditions' in str(res) and 'must fit' not in str(res), res
    assert [g for g in res.guards if '32' in g]==['(height % 32) == 0','(width % 32) == 0']
    res = proved(*[made(lambda: torchvision.models.resnet18(weights=None))]*2, torch.randn(2, 3, 64, 64))
    assert 'height ≥ 33, width ≥ 33 (15 conditions' in str(res), res
    few = dict(height='≥ 2', width='from 2 to 90')
    for gs,sizes,rest in (([],few,[]), (['height != width'],few,['height != width']), (['2*width >= height'],few,['2*width >= height']),
        (['height*width >= 4'],few,[]), (['height == 4 or (height % 9) == 0','height > 4'],few|dict(height='multiples of 9'),[]), (['torch.sym_max(3, height) == height'],few|dict(height='≥ 3'),[]), (['width % 7 == 3'],few|dict(width='3, 10, 17, … to 87'),[]),
        (['height % 3 != 1'],few,['height % 3 != 1']), (['width == 0'],few,['width == 0']), (["L['x'][0].size()[1] != height"],few,["L['x'][0].size()[1] != height"])):
        assert room._left(few, gs)==(sizes,rest), gs
    for r,gs,told in (('≥ 0',[],'≥ 0'), ('≥ 0',['height != 0'],'≥ 1'), ('from 2 to 8, ≥ 3',[],'from 2 to 8, ≥ 3'), ('from 2 to 8, ≥ 3',['height != 3'],'from 4 to 8'),
        ('from 2 to 1024',['height != 2'],'from 3 to 1024'), ('from 2 to 5000',['height != 2'],None), ('of any number',[],'of any number'), ('≥ 2000',['height != 2000'],None)):
        assert room._left(dict(height=r), gs)==(dict(height=told or r),[] if told else gs), r
    assert room._left(dict(height='≥ 2000', width='≥ 2'), gs := ['height*width != 6'])[1]==gs
    for g in ("__import__('os').abort() or height != 1","[height for _ in range(10**9)] != 1",'height**(10**9) != 1','1'+'+height'*9999+' != 1','height % 0 != 1','height ! 1',
        f'height*{2**80} != 1',"height != 'x'",'1 < height < 9'): assert room._left(few, [g])[1]==[g], g

def test_what_asks_for_numbers():
    res = certify(*[Fn(lambda m,x: x*2 if x.sum()>0 else x)]*2, torch.randn(2, 3))
    assert res.verdict=='not decided' and 'exported' in res.why

# ---- Whatever else may be in a model

def not_proved(a, b, x): assert certify(a, b, x).verdict!='proved'

def test_numbers_that_are_none():
    for v in (float('nan'),float('inf')):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        with torch.no_grad(): net[0].weight[1,1] = v
        res = certify(net, copy.deepcopy(net), torch.randn(2, 3))
        assert res.verdict=='not decided' and 'not finite' in res.why

def test_numbers_that_cancel():
    "Rows of which rounding is all that is left: they are near zero, and nothing else is a multiple of them."
    W,V,U = (image(3, 4) for _ in range(3))
    Z = -(W+V)
    Z[0],Z[1:] = 2*Z[0]+.1,Z[1:]*(1+2**-52)
    def three(m, x): return F.linear(x, m.w)+F.linear(x, m.v)+F.linear(x, m.z)
    a,x = Fn(three, **{k:nn.Parameter(t) for k,t in dict(w=W, v=V, z=Z).items()}),image(2, 4)
    for rest in (U,1e-6*U,0*U):
        new = (W+V+Z).where(torch.arange(3)[:,None]==0, rest)
        assert certify(a, Fn(lambda m,x: F.linear(x, m.w), w=nn.Parameter(new)), x).proved==(not rest.any())

def test_numbers_that_are_too_large():
    "Which float64 cannot tell apart any more."
    def make(k, w): return Fn(lambda m,x: F.linear(x*m.a*m.a, m.w), a=nn.Parameter(image(1)*0+k), w=nn.Parameter(w))
    w,x = image(3, 4),image(2, 4)
    for k in (1e200,1e150): not_proved(make(k, w), make(k, 2*w), x)
    res = certify(make(1e200, w), make(1e200, w), x)
    assert res.verdict=='not decided' and 'too large' in res.why
    for k in (1e150,1e300): not_proved(*(Fn(lambda m,x: F.linear(x, m.w*m.a), a=nn.Parameter(image(1)*0+1e150), w=nn.Parameter(w*k*f)) for f in (1,2)), x)

def test_small_differences():
    "All is calculated in float64, whatever a factor goes through first."
    c,k,x = nn.Conv1d(3, 4, 1).double(),nn.Parameter(image(4, 1)),image(2, 3, 5)
    for f in (lambda m,x: m.c(x)*m.v,lambda m,x: (m.c(x)+x[:,:1].sigmoid())*m.v,lambda m,x: (m.c(x)*m.k).relu()*m.v,lambda m,x: m.c(x).mean(2)*m.v):
        a,b = (Fn(f, c=c, k=k, v=v) for v in (.1,.1+1e-9))
        not_proved(a, b, x)
        proved(a, a, x)

def test_numbers_that_rounding_hides():
    "What a factor makes of a number that is next to none may be anything."
    def make(w, k): return Fn(lambda m,x: x*m.w*k, w=nn.Parameter(torch.tensor(w)))
    for a,b in ((make(1., 1.), make(2e-38, 1e38)),(make(1., 1e-38), make(2e-38, 1.))): not_proved(a, b, torch.randn(3, 4))

class Ghost(nn.Module):
    "A block of RepGhost: beside a convolution that pads, a norm reads what another norm made."
    def __init__(self):
        super().__init__()
        self.first,self.beside = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),nn.BatchNorm2d(4)
        self.cheap = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4))
    def forward(self, x):
        x = self.first(x)
        return self.cheap(x)+self.beside(x)

def test_a_norm_beside_a_convolution_that_pads():
    net,new,x = pair(Ghost, torch.randn(2, 3, 7, 6))
    assert not [m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]
    proved(net, new, x)
    for t in (new.cheap[0].weight[1,0,1,1],new.cheap[0].bias[1],new.first[0].bias[1],new.first[0].weight[1,0,0,0]):
        with torch.no_grad():
            old = t.clone()
            t += .01
            assert certify(net, new, x).verdict=='not the same'
            t.copy_(old)

def test_merged_kernels_of_even_size():
    "They have no middle."
    same,wide = partial(nn.Conv1d, 4, 4, 2, padding='same', groups=4, bias=False),partial(nn.Conv2d, 3, 3, 2, dilation=2, padding=1, groups=3, bias=False)
    for make,x in ((same,image(2, 4, 9)),(wide,image(2, 3, 8, 8))):
        a = make().double()
        b = copy.deepcopy(a)
        with torch.no_grad(): b.weight += 1
        not_proved(Fn(lambda m,x: m.c(x)+x, c=a), Fn(lambda m,x: m.c(x), c=b), x)

def test_linear_layers_of_what_is_computed_or_stored():
    "Sums of those whose weight is computed, and those of as many zeros as there are inputs."
    def sums(m, x): return F.linear(x, x.mean(0, keepdim=True))+F.linear(x, x.amax(0, keepdim=True))*m.a
    def queries(f): return lambda m,x: f(torch.zeros(len(x), 4, dtype=x.dtype)+m.q, m.w, m.b)*m.a+F.linear(x, m.w, m.b)
    def times(f, k): return lambda m,x: queries(f)(m, x)*k/2
    held = dict(a=image(1), w=image(3, 4), b=image(3), q=image(4))
    proved(*by_hand(sums, lambda m,x: sums(m, x)*2/2, **held), image(5, 4))
    for f in (F.linear,lambda q,w,b: q@w.mT+b,lambda q,w,b: torch.addmm(b, q, w.mT)):
        proved(*by_hand(queries(f), times(f, 2), **held), image(5, 4))
        not_proved(*by_hand(queries(f), times(f, 2.01), **held), image(5, 4))

def test_sums_along_another_dimension():
    "Of the same size, with the same factors."
    a,b = (nn.Parameter(image(4)) for _ in range(2))
    def make(size, dims):
        def f(m, x):
            y = F.linear(x, torch.ones(size.numel(), 3, dtype=x.dtype)).unflatten(1, size)
            return y.sigmoid()*m.a.reshape(dims)+y.tanh()*m.b.reshape(dims)
        return Fn(f, a=a, b=b)
    for dims,other,same in (((4,1),(1,4),False),((4,1,1),(1,1,4),False),((4,1),(1,4,1),True),((1,4),(4,),True)):
        size = torch.Size([4]*max(len(dims), len(other)))
        assert certify(make(size, dims), make(size, other), image(2, 3)).proved==same

@pytest.mark.parametrize('fill,dtype', [(2.7,torch.int64),(-1.5,torch.int32),(2,torch.bool),(2049.,torch.float16)])
def test_numbers_that_a_type_has_not(fill, dtype):
    for f in (lambda m,x: x+torch.full_like(x, fill, dtype=dtype),lambda m,x: x+torch.full((x.shape[0],1), fill, dtype=dtype)):
        not_proved(*by_hand(f, lambda m,x: x+fill), torch.randn(3, 4))

@torch.library.custom_op('fasterfold_tests::clone', mutates_args=())
def doubled(x:torch.Tensor)->torch.Tensor: return x*2
doubled.register_fake(torch.empty_like)

def rebound(x):
    y,z = x*2,x*1
    torch.ops.aten.set_(z, y)
    z.mul_(3)
    return y

def through_memory(x):
    y = x*2
    torch.unsafe_chunk(y, 2, 1)[0].mul_(3)
    return y

def lifted(x):
    y = x*2
    torch.ops.aten.lift(y).add_(1)
    return y

looks_like = dict(zeros=(lambda x: torch.atan2(x.relu(), -x.relu()),lambda x: torch.atan2(x.relu(), 0-x.relu())),
    copied_bits=(lambda x: torch.ops.aten.view_copy.dtype(x.half(), torch.int16),lambda x: torch.ops.aten.view_copy.dtype(x.bfloat16(), torch.int16)),
    rank=(lambda x: torch.linalg.matrix_rank(x.float()),lambda x: torch.linalg.matrix_rank(x.double())),
    constants=(lambda x: x*torch.full_like(x, 257.),lambda x: x*torch.full_like(x, 257.).bfloat16().float()),
    lift=(lambda x: lifted(x),lambda x: x*2), training=(lambda x: torch.ops.aten.native_dropout(x, .5, None)[0],lambda x: x*1),
    bits=(lambda x: x.half().view(torch.int16),lambda x: x.bfloat16().view(torch.int16)),
    largest=(lambda x: x.relu().log().half().nan_to_num().double(),lambda x: x.relu().log().bfloat16().nan_to_num().double()),
    smallest=(lambda x: F.rms_norm(x.float(), (4,)).double(),lambda x: F.rms_norm(x.double(), (4,)).double()),
    type=(lambda x: x.view(torch.int32)+.5*x,lambda x: 1.5*x), namespace=(lambda x: torch.ops.fasterfold_tests.clone(x),torch.clone),
    memory=(lambda x: (x*2).t().contiguous().as_strided((6,), (1,)),lambda x: (x*2).t().as_strided((6,), (1,))), alias=(through_memory,lambda x: x*2),
    other_memory=(lambda x: rebound(x),lambda x: x*2), eight_bits=(lambda x: x.to(torch.float8_e4m3fn).float(),lambda x: x+0.))

@pytest.mark.parametrize('f,g', looks_like.values(), ids=looks_like)
def test_operations_that_look_like_others(f, g): not_proved(*by_hand(lambda m,x: f(x), lambda m,x: g(x)), torch.randn(3, 4))

whole = dict(resized=lambda x: F.interpolate(x, size=(9,9), mode='bilinear')/255., differences=lambda x: x.diff()/255., squares=lambda x: x.square()>300,
    products=lambda x: x@x.mT>300, copied=lambda x: x.clone().copy_(x*.7)>.5)

@pytest.mark.parametrize('f', whole.values(), ids=whole)
def test_whole_numbers_are_no_real_ones(f):
    "They are cut off, and begin anew where their type ends."
    x = torch.randint(0, 255, (2,3,6,6), dtype=torch.uint8)
    not_proved(*by_hand(lambda m,x: f(x), lambda m,x: f(x*1.)), x)
    proved(*by_hand(lambda m,x: f(x), lambda m,x: f(x)), x)

def test_whole_weights():
    x,w = torch.full((4,6), 15, dtype=torch.int8),torch.ones(3, 6, dtype=torch.int8)
    for f in (lambda x,w: F.linear(x, w),lambda x,w: x@w.mT): not_proved(*by_hand(lambda m,x: f(x, m.w)/1., lambda m,x: f(x, 2*m.w)/2., w=w), x)
    x,mask = torch.ones(4, 6, dtype=torch.int64),torch.tensor([2**52-1])
    not_proved(Fn(lambda m,x: x&m.w, w=mask), Fn(lambda m,x: x&m.w, w=mask-1), x)
    not_proved(*by_hand(lambda m,x: x-torch.full_like(x, 2**53), lambda m,x: x-torch.full_like(x, 2**53+1)), x)

def test_what_a_certificate_must_not_run():
    "Random numbers, and what writes to the model, also where all it gets is stored."
    x = torch.randn(5, 6)
    for seed in range(6):
        torch.manual_seed(seed)
        not_proved(Fn(lambda m,x: x*F.dropout(m.w, .5, True), w=torch.ones(1)), Fn(lambda m,x: x*2), x)
    def normed(momentum):
        net = Fn(lambda m,x: x+F.batch_norm(m.w, m.mean, m.var, None, None, True, momentum))
        for k,t in dict(w=torch.ones(5, 6)*3, mean=torch.zeros(6), var=torch.ones(6)).items(): net.register_buffer(k, t)
        return net
    a,b = normed(.1),normed(.5)
    before = state(a),state(b)
    not_proved(a, b, x)
    assert (state(a),state(b))==before

def test_numbers_that_a_common_factor_hides():
    "What may be zero is taken for that, and how far it may be off counts."
    big,less = (nn.Parameter(torch.tensor([2.**24-k])) for k in (0,1))
    for k in (1,2): not_proved(Fn(lambda m,x: F.relu(x*0+1)), Fn(lambda m,x: F.relu(x*m.a-x*m.b+k)/k, a=big, b=less), torch.randn(4, 6))
    a = 2.**19+torch.tensor([0,-2.**-5,0,-2.**-5]).reshape(4, 1, 1)
    def shuffled(f): return Fn(lambda m,x: F.pixel_shuffle(f(m, x*.001+.001), 2), k=nn.Parameter(a), l=nn.Parameter(a.flip(0)))
    not_proved(shuffled(lambda m,y: y), shuffled(lambda m,y: y+m.k-m.l), torch.randn(2, 4, 3, 3))

def test_more_is_demanded():
    "A program that refuses inputs which the original takes is not the same."
    def demanding(m, x):
        torch.ops.aten._assert_async.msg((x>0).all(), 'not positive')
        return x*1
    x = torch.rand(3, 4)
    not_proved(*by_hand(lambda m,x: x*1, demanding), x)
    proved(*by_hand(demanding, demanding), x)
    proved(*by_hand(demanding, lambda m,x: x*1), x)

@pytest.mark.parametrize('asks,always', [(lambda h,w: h*h+1!=3*w*w, True),(lambda h,w: h*h%3!=2, True),(lambda h,w: h*w!=35, False),
    (lambda h,w: h%1000!=999, False),(lambda h,w: h*w<1_000_000, False)])
def test_more_is_asked_of_sizes(asks, always):
    "Of two sizes, an answer for all of them up to 1,024 is known."
    a,b = by_hand(lambda m,x: x*1, lambda m,x: x*1 if asks(*x.shape[2:]) else x*2)
    res = certify(a, b, torch.randn(2, 3, 9, 11))
    assert (res.verdict,len(res.guards))==(('proved',1) if always else ('not decided',0)), res
    if not always: assert 'takes less than the original' in res.why

def test_rounding_is_no_difference():
    "Of a number that is zero but for rounding nothing can be told, and it is not said that two models differ."
    def f(m, x): return x.softmax(1).sum(1)
    assert certify(*by_hand(lambda m,x: f(m, x)-f(m, x), lambda m,x: f(m, x)-1), torch.randn(3, 4)).verdict=='not decided'

def test_weights_of_other_kinds_have_a_hash():
    for w in (torch.randn(6, dtype=torch.cfloat).conj(),torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])):
        net = Fn(lambda m,x: x*2)
        net.register_buffer('w', w)
        assert len(certify(net, net, torch.randn(4, 6)).folded)==64

def test_a_remainder_is_a_condition():
    "Only a size of one has other code for reasons of memory alone."
    f = lambda m,x: x*3 if x.shape[1]%3==1 else x*2 # chkstyle: ignore
    not_proved(*by_hand(lambda m,x: x*2, f), torch.randn(3, 6))
    assert any('% 3' in g for g in proved(*by_hand(f, lambda m,x: x*2), torch.randn(3, 6)).guards)

def test_conditions_that_pytorch_does_not_tell():
    "Before 2.9, a program did not say that it is about even sizes alone: nothing is decided then, unless no size is free."
    f = lambda m,x: x*3 if x.shape[1]%3==1 else x*2 # chkstyle: ignore
    for free,verdict in ((True,'not decided'),(False,'proved')):
        ps = [program(Fn(g), torch.randn(3, 6), free=free) for g in (lambda m,x: x*2,f)]
        for p in ps: del p._guards_code
        assert certify(*ps).verdict==verdict

def test_channels_of_any_number():
    "A deformable convolution says how many it takes by its kernel alone."
    w = nn.Parameter(torch.randn(4, 3, 3, 3))
    def f(m, x, o): return torchvision.ops.deform_conv2d(x, o, m.w, padding=1)
    x,o = torch.randn(2, 3, 6, 7),torch.randn(2, 18, 6, 7)
    res = certify(Fn(f, w=w), Fn(f, w=w), (x, o))
    assert res.proved and 'fails' not in res.why, res

@pytest.mark.parametrize('held', [torch.eye(3).to_sparse(),torch.eye(3, device='meta')], ids=['sparse','meta'])
def test_weights_that_cannot_be_read(held):
    net = nn.Sequential(nn.Linear(3, 4))
    net.register_buffer('held', held)
    assert certify(net, net, torch.randn(2, 3)).verdict=='proved'

def test_numbers_that_all_but_cancel():
    "What two ways to compute the same are apart by rounding shows no difference."
    assert certify(*by_hand(lambda m,x: torch.expm1(x*1e-6), lambda m,x: torch.exp(x*1e-6)-1), image(3, 4)).verdict=='not decided'

def test_masks():
    "Infinity is no number to calculate with, and the same as itself."
    def f(m, x): return (m.n(m.l(x))+torch.full_like(x, m.v).triu(1)).softmax(-1)
    net = made(lambda: Fn(f, l=nn.Linear(3, 3), n=nn.BatchNorm1d(3), v=float('-inf')))
    proved(net, new := BN_Folder(verify=False).fold(net, x := torch.randn(2, 3, 3)), x)
    new.v = -1e30
    not_proved(net, new, x)

def test_random_numbers():
    for f in (lambda m,x: F.dropout(x, .5, True),lambda m,x: x+torch.rand_like(x),lambda m,x: x+torch.empty_like(x),
        lambda m,x: F.scaled_dot_product_attention(x, x, x, dropout_p=.5)):
        res = certify(*[Fn(f)]*2, torch.randn(2, 3, 4))
        assert res.verdict=='not decided', res

def test_norms_of_batches():
    "In training a norm takes statistics, and writes them."
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    with torch.no_grad(): ps = [export(net.train(), (torch.randn(4, 3, 5),)) for _ in range(2)]
    assert certify(*ps).verdict=='not decided'
    for f in (lambda m,x: x+m.n.running_mean.sum(),lambda m,x: x+1): # where nobody reads what the norm gives
        two = by_hand(lambda m,x: (F.batch_norm(x, m.n.running_mean, m.n.running_var, training=True),f(m, x))[1], f, n=nn.BatchNorm1d(3))
        with torch.no_grad(): ps = [export(m.train(), (torch.randn(4, 3, 5),)) for m in two]
        assert certify(*ps).verdict=='not decided'

def test_writes():
    "What is written to through another name is not what it was."
    def aliased(m, x):
        y = m.c(x)
        y[:,:1].mul_(2)
        return y
    def twice(m, x):
        y = m.c(x)
        y.add_(1)
        return y.relu_()*y
    def plain(m, x): return (m.c(x)+1).relu()**2
    c = nn.Conv1d(3, 4, 1)
    x = torch.randn(2, 3, 5)
    not_proved(Fn(aliased, c=c), Fn(lambda m,x: m.c(x), c=c), x)
    proved(Fn(twice, c=c), Fn(lambda m,x: (y := (m.c(x)+1).relu())*y, c=c), x)
    not_proved(Fn(lambda m,x: (x.mul_(2),m.c(x))[1], c=c), Fn(lambda m,x: m.c(x*2), c=c), x) # the caller sees it
    def counted(m, x):
        m.n.add_(1)
        return x+m.n
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(1))
        forward = counted
    not_proved(Counts(), Counts(), x)

class Contexts(nn.Module):
    "Lines that run without gradients, in which others are left alone by autocast, and one that writes."
    def __init__(self, to=1., autocast=False):
        super().__init__()
        self.c,self.n,self.to,self.autocast = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),to,autocast
    def forward(self, x):
        x = self.n(self.c(x))
        with torch.no_grad():
            x.add_(self.to)
            with torch.autocast('cpu', enabled=self.autocast): y = (x.float()*2).mean((2,3), keepdim=True)
            z = self.c.weight.sum()
        with torch.enable_grad(): return x.relu()*y+z

def test_graphs_inside_a_graph(tmp_path):
    "A context that changes no number has no law, and hides nothing."
    a,b,x = pair(Contexts, torch.randn(2, 3, 9, 9))
    other = copy.deepcopy(b)
    other.to = 1.001
    p,q,wrong = (export(m, (x,)) for m in (a,b,other))
    torch.export.save(q, tmp_path/'q.pt2')
    stored = torch.export.load(tmp_path/'q.pt2')
    assert any('wrap_with_autocast' in str(n.target) for m in q.graph_module.children() for n in m.graph.nodes)
    before = str(q.graph)
    file = proved(p, q).save(tmp_path/'c.json')
    assert [certify(p, o).verdict for o in (stored,wrong)]==['proved','not the same']
    assert [Certificate.check(file, o) for o in (q,stored,wrong)]==[True,True,False]
    assert str(q.graph)==before and proved(a, b, x).ranges
    cast = certify(*[Contexts(autocast=True).eval()]*2, x)
    assert cast.verdict=='not decided' and 'wrap_with_autocast' in cast.why

def test_smaller_sizes_that_are_repeated():
    "A sum over what is the same for a dimension is not the sum of one."
    c = nn.Parameter(torch.zeros(1, 5))
    x = torch.randn(3, 1)
    not_proved(Fn(lambda m,x: (x+m.c).sum(1), c=c), Fn(lambda m,x: x.sum(1), c=c), x)
    not_proved(Fn(lambda m,x: (x+m.c).reshape(-1), c=c), Fn(lambda m,x: x.expand(3, 5).t().reshape(-1), c=c), x)

def test_shared_weights_and_zero_scales():
    def make():
        net = Blocks()
        net.b.weight = net.gate.weight
        return net
    net = made(make)
    for n in net.n: n.weight.data[2] = 0
    x = torch.randn(2, 3, 16, 16)
    proved(net, BN_Folder(verify=False).fold(net, x), x)

class Computes(nn.Module):
    "A norm that computes its scale and shift at every call, and reads its weight as `seen` does."
    def __init__(self, seen=None):
        super().__init__()
        self.c,self.n,self.seen = nn.Conv2d(3, 64, 3, bias=False),FrozenBatchNorm2d(64),seen or (lambda w: w)
        for b,lo,hi in ((self.n.weight,-1.5,1.5),(self.n.bias,-1,1),(self.n.running_mean,-1,1),(self.n.running_var,.3,2)): b.uniform_(lo, hi)
    def forward(self, x):
        n = self.n
        s = self.seen(n.weight)*(n.running_var+n.eps).rsqrt()
        return F.relu(self.c(x)*s.view(1, -1, 1, 1)+(n.bias-n.running_mean*s).view(1, -1, 1, 1))

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16])
def test_constants_that_are_computed(dtype):
    "A fold rounds once; a norm that computes its scale at every call rounds at each step."
    for m in (nn.Sequential(nn.Conv2d(3, 64, 3), FrozenBatchNorm2d(64), nn.ReLU()),Computes()):
        m,x = m.eval().to(dtype),torch.randn(2, 3, 9, 9, dtype=dtype)
        for n in m.modules():
            if isinstance(n, FrozenBatchNorm2d): n.running_var.uniform_(.3, 2), n.weight.normal_(), n.bias.normal_()
        new = BN_Folder().fold(m, x)
        proved(m, new, x)
        w = max(new.parameters(), key=torch.numel)
        with torch.no_grad(): w.view(-1)[5] += w.abs().max()*max(1e-3, 8*torch.finfo(dtype).eps)
        not_proved(m, new, x)

SEEN = dict(type=lambda w: w.bfloat16().float(), whole=lambda w: (w*8).round()/8, cut=lambda w: w.div(.125, rounding_mode='floor')*.125, sign=torch.sign,
    bits=lambda w: (w+0).view(torch.int32).bitwise_and(-65536).view(torch.float32), written=lambda w: (w*0).bfloat16().copy_(w).float(),
    products=lambda w: (w.bfloat16()*.7).float()/.7)
@pytest.mark.parametrize('seen', SEEN.values(), ids=SEEN)
def test_what_a_model_rounds_away_is_its_own(seen):
    "Steps that float64 takes as well are no rounding error."
    a,x = Computes(seen).eval(),torch.randn(2, 3, 9, 9)
    proved(a, copy.deepcopy(a), x)
    b = copy.deepcopy(a)
    b.seen = None
    not_proved(a, b, x)

def test_stored_weights():
    "A weight that is computed at every call, and the same, stored."
    class Standard(nn.Conv2d):
        def forward(self, x):
            w,dims = self.weight,(1,2,3)
            return self._conv_forward(x, (w-w.mean(dims, keepdim=True))/w.std(dims, keepdim=True), self.bias)
    class Normed(nn.Conv2d):
        def forward(self, x):
            w = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
            return self._conv_forward(x, w.view_as(self.weight), self.bias)
    for kind in (Standard,Normed): proved(*pair(lambda: nn.Sequential(kind(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), kind(6, 4, 3)), torch.randn(2, 3, 12, 12)))

def test_recurrent_layers():
    def f(m, x): return m.r(m.n(x.sigmoid()).permute(2, 0, 1))[0]
    net,new,x = pair(lambda: Fn(f, n=nn.BatchNorm1d(4), r=nn.LSTM(4, 5, bidirectional=True)), torch.randn(2, 4, 3))
    proved(net, new, x)
    with torch.no_grad(): new.r.weight_ih_l0[3,1] += .01
    differs(net, new, x)

# ---- Networks at random

def off(outs, refs, model, o):
    "Are outputs further off than rounding?"
    if [t.shape for t in outs]!=[t.shape for t in refs]: return True
    noise = rounding(model, o, refs)
    return any((a-b).nan_to_num(0, 0, 0).norm()>10*n+1e-9*b.nan_to_num(0, 0, 0).norm() for a,b,n in zip(outs, refs, noise))

def spoiled(pairs, rng):
    "`pairs` of values and maps, of which one is lost, without its shift, or with another scale."
    pairs = [*pairs]
    if not pairs: return pairs
    i,how = rng.randrange(len(pairs)),rng.randrange(3)
    v,a = pairs.pop(i)
    if how: pairs.insert(i, (v,Affine(a.scale,0*a.shift) if how==1 and a.shifts else Affine(a.scale*1.25,a.shift)))
    return pairs

def broken_rule(net, sample, rng):
    "`net`, folded by rules of which one that it needs is broken."
    used = set()
    def noted(rule, key): return lambda *args: (used.add(key),rule(*args))[1]
    with pytest.MonkeyPatch.context() as m:
        for i,rules in enumerate((PULL,PUSH)):
            for k in [*rules]: m.setitem(rules, k, noted(rules[k], (i,k)))
        right = BN_Folder(verify=False).fold(net, sample)
    if not used: return right
    i,k = rng.choice(sorted(used))
    rule,seed = (PULL,PUSH)[i][k],rng.random()
    def wrong(*args):
        rng = random.Random(seed)
        return (spoiled(res, rng) if not i else tuple(spoiled([o for o in some if o[0] is not None], rng) for some in res)) if (res := rule(*args)) else res
    with pytest.MonkeyPatch.context() as m:
        m.setitem((PULL,PUSH)[i], k, wrong)
        return BN_Folder(verify=False).fold(net, sample)

def changed_weight(net, sample, rng):
    new = BN_Folder(verify=False).fold(net, sample)
    return next(changes(1, new, rng.random()))[0] if any(p.numel() for p in new.parameters()) else new

def dropped_norm(net, sample, rng):
    "`net` without one of its norms, folded."
    new = copy_model(net)
    slots = [(m,k) for m in new.modules() for k,o in m.named_children() if isinstance(o, (nn.modules.batchnorm._NormBase,nn.GroupNorm,nn.LayerNorm))]
    if slots:
        m,k = rng.choice(slots)
        m._modules[k] = nn.Identity()
    return BN_Folder(verify=False).fold(new, sample)

def random_pair(seed, wrongly):
    "A random network, folded, a share of all `wrongly`."
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net,sample = network(rng.randint)
    how = rng.choice((broken_rule,changed_weight,dropped_norm)) if rng.random()<wrongly else None
    return net,how(net, sample, rng) if how else BN_Folder(verify=False).fold(net, sample),sample,how.__name__ if how else ''

class AloneOnly(nn.Sequential):
    "Another way for a batch than for a single input."
    def forward(self, x): return super().forward(x) if len(x.chunk(2))==1 else x

def test_what_strides_leave_of_small_images_is_one():
    "As deeper variants of xresnet have it: PyTorch gives the output of a norm one row then, and that of a convolution a formula."
    def build(): return nn.Sequential(*(o for a,b in ((3,4),(4,4),(4,5)) for o in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())))
    net,new,x = pair(build, torch.randn(2, 3, 8, 8))
    assert proved(net, new, x).ranges['height']=='from 2 to 8'
    with torch.no_grad(): new[6].bias[0] += 1
    assert certify(net, new, x).verdict=='not the same'

def test_a_sample_of_one_is_covered():
    "It is exported as two only where these stand for any batch."
    net,new,x = pair(lambda: AloneOnly(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(1, 4))
    assert [*proved(net, new, x).inputs.values()]==['float32[1, 4]']
    with torch.no_grad(): new[0].bias += 1
    assert not certify(net, new, x).proved
    net,new,x = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), x)
    assert 'batch' in str(proved(net, new, x))

def test_random_networks():
    "None is proved that other sizes show to be wrong, and most of those that are right are proved."
    found = Counter()
    for seed in range(max(how_long, 200) if long else 8):
        net,new,sample,how = random_pair(seed, .1 if long else .4)
        res = certify(net, new, sample)
        assert 'has a law that fails' not in res.why, (seed,res)
        found[how,res.verdict] += 1
        for o,refs in inputs(net, sample) if res.proved else ():
            if not o.kwargs: assert not off(run(new, o), refs, net, o), (seed,how)
    print(found)
    assert found['','proved']>sum(n for (how,_),n in found.items() if not how)/2

# ---- The paper itself

def test_a_certificate_is_a_file(tmp_path):
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    res = proved(net, new, x)
    file = res.save(tmp_path/'c.json')
    assert Certificate.load(file)==res and json.loads(file.read_text())['verdict']=='proved' and 'Proved' in res._repr_html_()
    assert Certificate.check(file, new) and not Certificate.check(file, net)
    p = program(new, x)
    assert Certificate.check(file, p)
    of_programs = proved(program(net, x), p).save(tmp_path/'p.json')
    class Negated(Blocks):
        def forward(self, x): return -super().forward(x)
    other = copy.deepcopy(new)
    other.__class__ = Negated
    torch.export.save(p, tmp_path/'p.pt2')
    assert [Certificate.check(of_programs, o) for o in (p,torch.export.load(tmp_path/'p.pt2'),new,program(other, x))]==[True,True,True,False]
    with torch.no_grad(): new.head.bias[0] += 1e-6
    assert not Certificate.check(file, new)
    file.write_text('{}')
    with pytest.raises(FoldError, match='cannot be read'): Certificate.load(file)

class Named(nn.Module):
    "Two outputs by name."
    def __init__(self, names):
        super().__init__()
        self.a,self.b,self.names = nn.Linear(6, 6),nn.Linear(6, 6),names
    def forward(self, x): return dict(zip(self.names, (self.a(x),self.b(x))))

def test_a_certificate_knows_names_sizes_and_weights(tmp_path):
    "Which output has which name, which weight goes where, and which sizes are free."
    first,x = Named('pq'),torch.randn(4, 6)
    other = Named('qp')
    other.load_state_dict(first.state_dict())
    p = program(first, x)
    file = proved(p, p).save(tmp_path/'c.json')
    swapped = copy.deepcopy(p)
    specs = [o for o in swapped.graph_signature.input_specs if o.target]
    for o,t in zip(specs, [o.target for o in specs[2:]+specs[:2]]): o.target = t
    assert [Certificate.check(file, o) for o in (p,program(other, x),swapped,program(first, x, free=False))]==[True,False,False,False]

def test_nothing_changes():
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    net.train()
    before = state(net),state(new)
    certify(net, new, x)
    assert (state(net),state(new))==before

def test_command(tmp_path):
    net,new,x = pair(Blocks, torch.randn(2, 3, 16, 16))
    for k,m in dict(a=net, b=new).items(): torch.export.save(program(m, x), tmp_path/f'{k}.pt2')
    with torch.no_grad(): new.head.weight[1,1] += .1
    torch.export.save(program(new, x), tmp_path/'c.pt2')
    a,b,c = (tmp_path/f'{k}.pt2' for k in 'abc')
    res = call('verify', a, b, '-o', tmp_path/'paper.json')
    assert res.exit_code==0 and res.stdout.startswith('Proved') and Certificate.load(tmp_path/'paper.json').proved, res.output
    res = call('verify', a, c, '--json')
    assert res.exit_code==1 and json.loads(res.stdout)['verdict']=='not the same'
    assert_refused(call('verify', b, '--check', tmp_path/'none.json'), 'cannot be read as a certificate')
    assert_refused(call('verify', b, '--check', tmp_path/'paper.json', '-o', tmp_path/'more.json'), 'leave -o and --json out')
    assert call('verify', b, '--check', tmp_path/'paper.json').exit_code==0 and call('verify', c, '--check', tmp_path/'paper.json').exit_code==1
    assert_refused(call('verify', a, b, '-o', tmp_path/'paper.json'), 'exists already')
    assert_refused(call('verify', a), 'two files')

def test_command_for_learners(box):
    "Two pickles, and an image to export them with."
    learn = load_learner(box/'export.pkl')
    learn.path = box
    learn.fold_bn().export('folded.pkl')
    with torch.no_grad(): learn.model[0][0][0].weight[1,1] *= 1.1
    learn.export('changed.pkl')
    a,b,c,paper = (box/k for k in ('export.pkl','folded.pkl','changed.pkl','paper.json'))
    how = '--trust','--sample',box/'image.png'
    res = call('verify', a, b, *how, '-o', paper)
    assert res.exit_code==0 and res.stdout.startswith('Proved') and 'height' in res.stdout, res.output
    assert call('verify', a, c, *how).exit_code==1 and call('verify', a, b, '--trust').exit_code==0
    assert [call('verify', o, '--trust', '--check', paper).exit_code for o in (b,c)]==[0,1]
    assert_refused(call('verify', a, b, *how[1:]), '--trust')

def test_learners_ask_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr('fasterfold.learner.report', timed_for(.001))
    learn = KINDS['plain_learner'](tmp_path)
    randomize_norms(learn.model)
    res = learn.fold_export(tmp_path/'m.pt2', certify=True)
    assert res.certificate.proved and 'Certificate: Proved' in str(res)
    with open(tmp_path/'m.pt2', 'rb') as f: assert Certificate.check(tmp_path/'m.certificate.json', torch.export.load(f))
    for last in (False,True): # of memory formats, a program has rules for its sizes that no other has
        res = learn.fold(certify=True, channels_last=last)
        weights = {n:(t.stride(),t.data_ptr()) for n,t in learn.model.named_parameters()}
        assert res.plan.format==('channels_last' if last else '')
        assert res.certificate.proved and 'Certificate: Proved' in str(res) and json.loads(res.to_json())['certificate']['verdict']=='proved'
        certify(learn.model, learn.model, learn.dls.valid.one_batch()[0])
        assert {n:(t.stride(),t.data_ptr()) for n,t in learn.model.named_parameters()}==weights
        learn.unfold()

def test_unets_have_one(tmp_path, monkeypatch):
    "Layers of fastai that give a tensor another type are left out while it is exported, and are there again."
    monkeypatch.setattr('fasterfold.learner.report', timed_for(.001))
    dls = images(tmp_path, MaskBlock(codes=['paper','ink']), n=8, bs=4, get_y=mask)
    net = DynamicUnet(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2)), 2, (32,32))
    learn = Learner(dls, randomize_norms(net))
    before,kinds = copy.deepcopy(net),[type(m).__name__ for m in net.modules()]
    res = learn.fold(certify=True)
    assert res.plan.folded and res.certificate.proved, res.certificate
    proved(before, learn, dls.valid.one_batch()[0])
    assert 'ToTensorBase' in kinds and [type(m).__name__ for m in before.modules()]==kinds
