"""How long folded models take, next to those of other tools, to a network built without norms, and in the engines people deploy to.

All that is compared is timed within one run, in turns. README.md here says what is counted."""
import ast, inspect, tempfile, textwrap, warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import timm, torch, torch.nn.functional as F
from fastai.layers import NormType
from fastai.tabular.model import TabularModel
from fastai.text.models import AWD_LSTM, get_text_classifier
from fastai.vision.learner import create_unet_model, create_vision_model
from fastai.vision.models import xresnet
from fastcore.script import call_parse, store_true
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torchvision import models as M
from tqdm import tqdm

from common import (by_variant, chain, described, environment, grouped, helped, hostile, in_short, in_turns, load, ms, ratio, registry,
    results, save, slope, stats, table, timer, times)
from fasterfold.bench import Case, engines as deployed_to
from fasterfold.proof import distance
from fasterfold.fold import BN_Folder
from fasterfold.cost import count_parameters
from fasterfold.sample import Sample, returned
from fasterfold.state import copy_model
from peers import any_shape, load_peers, peers

batches = 1,16
depths = 10,20,40,80,160     # Layers of a chain of 32 channels
widths = 32,64,128,256,512   # Channels of a chain of 10 layers

# ---- The models

def _image(side): return lambda n: (torch.randn(n, 3, side, side),)
def _rows(n): return torch.randint(5, (n,3)),torch.randn(n, 4)
def _torchvision(name): return lambda: M.get_model(name, weights=None)
def _timm(name): return lambda: timm.create_model(name)

class MaxNormConv(nn.Conv2d):
    "A convolution whose filters are at most 1 long, at every call"
    def forward(self, x): return F.conv2d(x, torch.renorm(self.weight, 2, 0, 1.), self.bias, self.stride, self.padding, self.dilation, self.groups)

class EEGNet(nn.Sequential):
    "EEGNet-8,2 for 22 electrodes and `times` samples, as Lawhern et al. have it"
    def __init__(self, times=1125, classes=4):
        time,space = nn.Conv2d(1, 8, (1,64), padding='same', bias=False),MaxNormConv(8, 16, (22,1), groups=8, bias=False)
        depth,point = nn.Conv2d(16, 16, (1,16), padding='same', groups=16, bias=False),nn.Conv2d(16, 16, 1, bias=False)
        def _end(n): return nn.BatchNorm2d(16),nn.ELU(),nn.AvgPool2d((1,n))
        super().__init__(time, nn.BatchNorm2d(8), space, *_end(4), depth, point, *_end(8), nn.Flatten(), nn.Linear(16*(times//4//8), classes))

def _text(classes=2):
    "What `text_classifier_learner` makes: an AWD-LSTM and its head, for a vocabulary of 10,000 words"
    return get_text_classifier(AWD_LSTM, 10000, classes)

deployed = { # name -> (what builds it, what makes a sample of n items): run with every engine, which takes minutes each to compile
    'vision_learner resnet18': (lambda: create_vision_model(M.resnet18, 10, pretrained=False), _image(64)),
    **{o: (_torchvision(o), _image(224)) for o in ('resnet18','resnet50','densenet121','mobilenet_v3_large','efficientnet_b0','convnext_tiny')},
    'xresnet50': (lambda: xresnet.xresnet50(n_out=10), _image(128)),
    'unet_learner resnet18': (lambda: create_unet_model(M.resnet18, 3, (128,128), pretrained=False), _image(128)),
    'tabular': (lambda: TabularModel([(10,6),(5,4),(100,20)], 4, 2, [200,100]), _rows),
    'text_classifier AWD_LSTM': (_text, lambda n: (torch.randint(2, 10000, (n,60)),)),
    'EEGNet (time series)': (EEGNet, lambda n: (torch.randn(n, 1, 22, 1125),))}
all_models = deployed | { # the others only with those engines that run every variant
    **{o: (_torchvision(o), _image(224)) for o in ('regnet_y_800mf','shufflenet_v2_x1_0','mnasnet1_0')},
    'xresnet18': (lambda: xresnet.xresnet18(n_out=10), _image(128)),
    **{o: (_timm(o), _image(224)) for o in ('nfnet_l0','resnetv2_50x1_bit')}, # these, what follows, and EEGNet compute weights at every call
    'unet_learner spectral norm': (lambda: create_unet_model(M.resnet18, 3, (128,128), pretrained=False, norm_type=NormType.Spectral), _image(128))}

def build(
    name:str # Key of `all_models`
) -> nn.Module: # In eval
    "A model with hostile weights, the same ones each time"
    torch.manual_seed(0)
    make,sample = all_models[name]
    model = make().eval()
    hostile(model, sample(2), 0)
    return model

# ---- The network built with no norms

class _Uncall(ast.NodeTransformer):
    "Replace `self.name(x)` by `x` for every name in `names`"
    def __init__(self, names): self.names = names
    def visit_Call(self, node):
        self.generic_visit(node)
        f = node.func
        own = isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id=='self' and f.attr in self.names
        return node.args[0] if own else node

@lru_cache(None)
def _uncalled(cls, names):
    "A subclass of `cls` whose methods do not call the children called `names`"
    found = {k: f for base in reversed(cls.__mro__) for k,f in vars(base).items() if inspect.isfunction(f)}
    methods = {}
    for k,f in found.items():
        if k=='__init__' or not names & set(f.__code__.co_names): continue
        tree = _Uncall(names).visit(ast.parse(textwrap.dedent(inspect.getsource(f))))
        tree.body[0].decorator_list = []
        exec(compile(ast.fix_missing_locations(tree), inspect.getfile(f), 'exec'), scope := {**f.__globals__})
        methods[k] = scope[f.__name__]
    return type(cls.__name__, (cls,), methods)

def normless(
    model:nn.Module # A folded model, in eval
) -> nn.Module: # A copy
    "The same network as if it had been built with neither norms nor `nn.Identity`: their calls are gone from the code"
    model = copy_model(model)
    for m in list(model.modules()):
        names = frozenset(k for k,o in m.named_children() if isinstance(o, (nn.Identity, nn.modules.batchnorm._NormBase)))
        if not names: continue
        if type(m).forward is nn.Sequential.forward or isinstance(m, nn.ModuleList): m._modules = {k: o for k,o in m._modules.items() if k not in names}
        else:
            m.__class__ = _uncalled(type(m), names)
            m._modules.update(dict.fromkeys(names)) # code may ask whether there is one: there is none
    return model

# ---- The network that holds its weights

def _standardized(m, scale=None):
    return F.batch_norm(m.weight.reshape(1, m.out_channels, -1), None, None, scale, training=True, momentum=0., eps=m.eps).reshape(m.weight.shape)
# What weight the forward of each class computes
by_hand = dict(StdConv2d=_standardized, ScaledStdConv2d=lambda m: _standardized(m, (m.gain*m.scale).view(-1)),
    MaxNormConv=lambda m: torch.renorm(m.weight, 2, 0, 1.))

def holding(
    model:nn.Module # In eval
) -> nn.Module: # A copy
    "The same network with each weight that it computes at every call stored by hand, if there are any"
    model = copy_model(model)
    for m in list(model.modules()):
        if any(isinstance(h, SpectralNorm) for h in m._forward_pre_hooks.values()): nn.utils.remove_spectral_norm(m)
        for k,o in m.named_children():
            if (f := by_hand.get(type(o).__name__)) is None: continue
            new = nn.Conv2d(o.in_channels, o.out_channels, o.kernel_size, o.stride, o.padding, o.dilation, o.groups, o.bias is not None)
            new.weight,new.bias = nn.Parameter(f(o).detach()),o.bias
            m._modules[k] = new.eval()
    return model

# ---- What is compared

base,ours,stripped,last,limit = 'original','fasterfold','fasterfold strip_identity','fasterfold channels_last','no norms'

def variants(
    model:nn.Module, # In eval
    sample:tuple,    # Its arguments
    tools:dict       # name -> `Peer`
) -> dict: # name -> module, or a text that says why there is none
    "The model as it is, as each tool folds it, and without norms and with all weights stored by hand"
    res = {base: model}
    def _try(name, f):
        try:
            with torch.no_grad(), redirect_stdout(StringIO()): res[name] = f()
        except Exception as e: res[name] = in_short(e)
    for k,o in tools.items(): _try(k, lambda: o.fold(copy_model(model), sample)[0])
    _try(stripped, lambda: BN_Folder(strip_identity=True).fold(model, sample))
    if any(p.ndim==4 for p in model.parameters()): _try(last, lambda: BN_Folder(channels_last=True).fold(model, sample))
    _try(limit, lambda: normless(BN_Folder(store_weights=False).fold(holding(model), sample)))
    return res

all_engines = {} # name -> (devices it runs on, `f(model, sample)`, which returns something to call with the arguments in `sample`)
engine = registry(all_engines)

@engine('eager', ('cpu','cuda'))
def _eager(model, sample): return model

@engine('CUDA graph', ('cuda',))
def _graph(model, sample):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): model(*sample) # libraries choose their kernels before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = model(*sample)
    def _replay(*_):
        graph.replay()
        return out
    return _replay

def _deployed(name):
    "What readies a model for the engine that `fasterfold bench` calls `name`"
    def _ready(model, sample):
        with tempfile.TemporaryDirectory() as d, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return deployed_to[name].ready(Case(model, Sample.of(sample), d))
    return _ready

for _k,_name,*_devices in ('torch.compile','torch.compile','cpu','cuda'),('onnxruntime','ONNX Runtime','cpu'),('OpenVINO','OpenVINO','cpu'): engine(_k, _devices)(_deployed(_name))

whole = 'eager','CUDA graph' # Engines that run every variant; the others have passes of their own, and run the original and ours
dists = {'onnxruntime': ['onnx','onnxscript','onnxruntime'], 'OpenVINO': ['onnx','onnxscript','openvino']} # Where the engines come from that are not PyTorch's own

# ---- Measuring

def _tensors(out): return [o.float() for o in returned(out)[0]]

def measure(
    what:dict,    # The group: model, batch, dtype, engine
    cands:dict,   # As from `variants`
    sample:tuple, # Arguments
    refs:list,    # What the original returns, in float32
    turns:int,
    seconds:float # At least so long is timed in each turn
) -> list: # Rows of results
    "Ready every variant for the engine, check what it computes, and time them in turns"
    ready,rows = {},{k: dict(what, variant=k) for k in cands}
    for k,m in cands.items():
        if isinstance(m, str): rows[k]['why'] = m
        else:
            try:
                ready[k] = all_engines[what['engine']][1](m, sample)
                for _ in range(2): out = ready[k](*sample)
                if k!=limit: rows[k]['error'] = distance(_tensors(out), refs) # with norms that stay, it computes something else
            except Exception as e:
                ready.pop(k, None)
                rows[k]['why'] = in_short(e)
    timers = {k: timer('f(*sample)', f=f, sample=sample) for k,f in ready.items()}
    res = in_turns(timers, turns, lambda t: t.blocked_autorange(min_run_time=seconds))
    t = {k: times(o) for k,o in res.items()}
    for k,o in res.items():
        rows[k].update(stats(o))
        if base in t: rows[k]['ratio'] = ratio(t[k], t[base])
        if ours in t: rows[k]['ours'] = ratio(t[ours], t[k])
        if stripped in t: rows[k]['stripped'] = ratio(t[stripped], t[k])
    return list(rows.values())

def growth(
    chains:list, # (depth, width) of each
    turns:int,
    seconds:float, # At least so long is timed in each turn
    device:str
) -> list: # Rows of results
    "Time plain chains of several sizes and what they fold to, in turns"
    timers,built = {},{}
    for o in chains:
        model,sample = chain(*o, size=16, kernel=3, act=True)
        model,sample = model.to(device),tuple(x.to(device) for x in sample)
        built[o] = model
        for k,m in (base,model),(ours,BN_Folder().fold(model, sample)): timers[o,k] = timer('f(*sample)', f=m, sample=sample)
    res = in_turns(timers, turns, lambda t: t.blocked_autorange(min_run_time=seconds))
    def _row(o):
        a,b = res[o,base],res[o,ours]
        return dict(depth=o[0], width=o[1], parameters=count_parameters(built[o]), original=stats(a), folded=stats(b), ratio=ratio(times(b), times(a)))
    return [_row(o) for o in chains]

def counts(
    model:nn.Module,
    sample:tuple # Its arguments
) -> dict: # How many norms fold and stay, and parameters before and after
    "What folding takes away"
    folder = BN_Folder()
    new = folder.fold(model, sample)
    return dict(folded=len(folder.result.folded), kept=len(folder.result.kept), parameters=[count_parameters(model),count_parameters(new)])

# ---- The page

def _cell(r): return '–' if r is None else 'fails' if 'why' in r else f"{r['ratio'][1]:.2f}" if 'ratio' in r else '–'

def against(
    group:dict, # variant -> row, of one model, batch and engine
    names:list  # Variants
) -> tuple: # Name of the fastest of them, and fasterfold's time over its time: lower quartile, median, upper quartile
    "fasterfold next to the fastest of the variants called `names`"
    found = [group[k] for k in names if 'ours' in group.get(k, {})]
    best = min(found, key=lambda r: r['median'], default=None)
    return (best['variant'],best['ours']) if best else (None,None)

def page(
    res:dict # As in latency-cpu.json
) -> str:
    "The results as Markdown"
    parts = ['# Latency', f"{described(res['environment'])}. What each column counts is in benchmarks/README.md."]
    rivals = [k for k in any_shape if k!=ours]
    for (kind,dtype),rows in grouped(res['latency'], 'engine', 'dtype').items():
        groups = by_variant(rows, 'model', 'batch')
        names = list(dict.fromkeys(k for g in groups.values() for k in g if k!=base))
        def _row(model, batch, g):
            peer,lim = against(g, rivals)[1],against(g, [limit])[1]
            more = [f'{o[1]:.2f}' if o else '–' for o in (peer,lim,g.get(limit, {}).get('stripped'))] if limit in names else []
            return model,batch,ms(g[base].get('median')),*(_cell(g.get(k)) for k in names),*more
        cols = ['model','batch','original, ms',*names] + (['ours ÷ fastest peer','ours ÷ no norms','strip_identity ÷ no norms'] if limit in names else [])
        parts += [f'## {kind}, {dtype}', table(cols, [_row(*k, g) for k,g in groups.items()])]
        if kind!='eager' and limit not in names: parts += filter(None, [helped(groups)])
        bad = [f"- {r['model']} ({r['batch']}), {r['variant']}: {r['why']}" for g in groups.values() for r in g.values() if 'why' in r]
        if bad: parts.append('Fails:\n\n' + '\n'.join(bad))
    for k,title in ('depth','Growth with depth'),('width','Growth with width'):
        if rows := res[k]:
            def _row(r): return r['depth'],r['width'],f"{r['parameters']:,}",ms(r['original']['median']),ms(r['folded']['median']),f"{r['ratio'][1]:.2f}"
            parts += [f'## {title}', table(['layers','channels','parameters','original, ms','folded, ms','ratio'], map(_row, rows))]
            if len(rows)>1:
                x = [r['depth'] if k=='depth' else r['parameters'] for r in rows]
                parts.append(f"Folded, time grows as {'layers' if k=='depth' else 'parameters'} to the power {slope(x, [r['folded']['median'] for r in rows]):.2f}.")
    return '\n\n'.join(parts) + '\n'

def _chosen(names, among):
    "The comma-separated `names`, all of which are in `among`"
    if unknown := [o for o in names.split(',') if o not in among]: raise SystemExit(f"Unknown: {', '.join(unknown)}. Choose among {', '.join(among)}")
    return names.split(',')

@call_parse
def main(
    tools:str=','.join(any_shape), # Tools to fold with, comma-separated
    models:str=None, # Models to time, comma-separated; by default all, of which some only with eager and CUDA graph
    engines:str=','.join(all_engines), # What to run them with, comma-separated; those that the device lacks are left out
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # 'cpu' or 'cuda'
    turns:int=11,     # How often each is timed
    seconds:float=.2, # At least so long is timed in each turn
    threads:int=0,    # CPU threads; 0 is PyTorch's choice
    quick:store_true=False, # Only try whether it runs: batch 1, three short turns, one small chain?
    out:Path=None,    # File to write, with a page beside it; docs/results/latency-DEVICE.json by default
):
    "Measure latency, and write docs/results/latency-DEVICE.json and .md"
    warnings.simplefilter('ignore')
    if threads: torch.set_num_threads(threads)
    if quick: turns,seconds = 3,.01
    kinds = [o for o in _chosen(engines, all_engines) if device in all_engines[o][0]]
    names = {o: [k for k in kinds if models or k in whole or o in deployed] for o in (_chosen(models, all_models) if models else all_models)}
    sizes,out = batches[:1] if quick else batches,Path(out or results/f'latency-{device}.json')
    dtypes,tools = [torch.float32,torch.float16] if device=='cuda' else [torch.float32],load_peers(tools.split(','))
    if missing := [k for k in kinds if any(find_spec(d) is None for d in dists.get(k, []))]:
        raise SystemExit(f"{', '.join(missing)} cannot be imported: pip install -e '.[dev,bench]', or choose other --engines")
    env = environment(['torch','torchvision','fastai',*(peers[o][0] for o in any_shape),*(o for d in dists.values() for o in d)], device)
    res,order = dict(environment=env, models={}, latency=[], depth=[], width=[]) | load(out, env),list(all_models)
    with torch.no_grad(), tqdm(total=sum(map(len, names.values()))*len(dtypes)*len(sizes)+2) as bar:
        for name,kinds in names.items():
            model,sample = build(name),all_models[name][1]
            res['models'][name] = counts(model, sample(2))
            found = variants(model, sample(2), tools)
            for dtype in dtypes:
                def _cast(o): return tuple(x.to(device, dtype if x.is_floating_point() else None) for x in o)
                cands = {k: m if isinstance(m, str) else copy_model(m).to(device, dtype) for k,m in found.items()}
                for n in sizes:
                    x = sample(n)
                    refs = _tensors(model(*x))
                    for kind in kinds:
                        bar.set_postfix_str(f'{name}, {n}, {kind}')
                        what = dict(model=name, input=[list(o.shape) for o in x], batch=n, dtype=str(dtype).partition('.')[2], engine=kind)
                        some = cands if kind in whole else {k: cands[k] for k in (base,ours) if k in cands}
                        rows = measure(what, some, _cast(x), refs, turns, seconds)
                        def _same(r): return all(r[k]==what[k] for k in ('model','batch','dtype','engine'))
                        res['latency'] = sorted([r for r in res['latency'] if r['model'] in order and not _same(r)] + rows, key=lambda r: order.index(r['model']))
                        res['models'] = {k: res['models'][k] for k in order if k in res['models']}
                        save(out, res, page)
                        torch.compiler.reset() # compiled code would pile up
                        bar.update()
        for k,chains in ('depth',[(o,32) for o in depths]),('width',[(10,o) for o in widths]):
            bar.set_postfix_str(f'growth with {k}')
            res[k] = growth(chains[:1] if quick else chains, turns, seconds, device)
            save(out, res, page)
            bar.update()
