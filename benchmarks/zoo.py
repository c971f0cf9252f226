"""Fold every model of the timm, torchvision and fastai zoos with fasterfold and with its peers, and compare.

Each model is built from a fixed seed without pretrained weights, given hostile normalization statistics, and measured against
a float64 run of itself. Every step runs in a forked process of its own with a limit on CPU time and memory, so that no tool
can touch the model another gets, and what crashes or hangs takes nothing else with it. README.md here says what is counted.
"""
import os
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch: one thread a process, so that CPU seconds are seconds

import ctypes, json, math, platform, re, resource, signal, statistics, tempfile, time, warnings, zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import torch
from fastcore.script import call_parse, store_true
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from common import generic, hostile, in_short, results, table
from fasterfold.cost import count_parameters
from peers import Peer, load_peers, peers

root = Path(__file__).parents[1]
work = root/'benchmarks'/'.zoo'   # The log of what has been measured, and the sizes of timm's models
cpu_secs,gigabytes,patience = 300,20,4 # Limits of one step; wall time may be `patience` times the CPU time
base = 'torch','timm','torchvision','fastai' # What all tools run on
wrong_above = 1e-6 # Relative error in float64 from which a fold is wrong; that of a right one is near 1e-13

# ---- The models

@dataclass
class Entry:
    "A model of a zoo that is built when asked for"
    collection:str # Zoo it comes from
    name:str       # Unique in the collection
    build:Callable # `build()`: the model, and a sample (a tuple of its arguments)
    params:int=0   # Number of its parameters, where that is known before it is built
    @property
    def key(self): return f'{self.collection}/{self.name}'

def _images(*size, n=2): return (torch.randn(n, *size),)

# What tells the sizes of one architecture apart, to be left out of the name of its family
_sizes = set('''zepto atto femto pico nano micro tiny mini small little medium betwixt base large huge giant giantopt gigantic
    xxs xs s m l xl xxl xxxs t b h g n p x xx ti wee pwee dwee dlittle dpwee mediumd xsmall xtiny xxtiny xlarge xxlarge kobe plus so'''.split())

def family(
    name:str,   # A timm architecture
    module:str, # timm module that defines it
) -> str:
    "Family of a timm architecture: its module and its name without sizes, in numbers or words"
    words = re.sub(r'(?<![v\d])\d+', ' ', name).replace('_', ' ').split() # the number of a version stays: v2, v3
    return ' '.join([module, *(o for o in words if o not in _sizes)])

def _timm_params():
    "Number of parameters of each timm architecture, counted on the meta device once and then remembered"
    import timm
    cache = work/f'timm-{timm.__version__}.json'
    if cache.exists(): return json.loads(cache.read_text())
    res = {}
    for name in tqdm(timm.list_models(), desc='sizes of timm models'):
        with torch.device('meta'): res[name] = sum(o.numel() for o in timm.create_model(name).parameters())
    cache.write_text(json.dumps(res))
    return res

def timm_models():
    "The smallest architecture of each timm family, at its default input size, small ones first"
    import timm
    from timm.models._registry import _model_to_module
    def _build(name):
        model = timm.create_model(name)
        return model, _images(*model.default_cfg['input_size'])
    smallest = {}
    for name,n in sorted(_timm_params().items(), key=lambda o: o[1]): smallest.setdefault(family(name, _model_to_module[name]), (name,n))
    return [Entry('timm', o, lambda o=o: _build(o), n) for o,n in smallest.values()]

def _side(name):
    "Smallest image side that `name` has weights for"
    from torchvision.models import get_model_weights
    sides = [getattr(t, 'crop_size', None) or getattr(t, 'resize_size', None) for t in (o.transforms() for o in get_model_weights(name))]
    return min((o[0] for o in sides if o), default=224)

def torchvision_models():
    "Every classification, segmentation, detection, video and optical flow model of torchvision"
    from torchvision import models as M
    def _classification(o): return M.get_model(o, weights=None), _images(3, _side(o), _side(o))
    def _segmentation(o): return M.get_model(o, weights=None, weights_backbone=None), _images(3, _side(o), _side(o))
    def _video(o): return M.get_model(o, weights=None), _images(3, 16, _side(o), _side(o))
    def _flow(o): return M.get_model(o, weights=None), _images(3, 128, 128)*2
    def _detection(o):
        # Untrained scores are all low: with the usual threshold nothing would be found, and nothing compared
        thresh = 'box_score_thresh' if 'rcnn' in o else 'score_thresh'
        size = {} if o.startswith('ssd') else dict(min_size=320, max_size=320)
        return M.get_model(o, weights=None, weights_backbone=None, **{thresh: 0.}, **size), ([torch.rand(3, 320, 320)],)
    kinds = {'':_classification, 'segmentation':_segmentation, 'detection':_detection, 'video':_video, 'optical_flow':_flow}
    names = {kind: M.list_models(module=getattr(M, kind) if kind else M) for kind in kinds}
    return [Entry(f'torchvision {k}'.replace('_', ' ').strip(), o, lambda k=k, o=o: kinds[k](o)) for k in kinds for o in names[k]]

def fastai_models():
    "fastai's own models: vision, U-Nets, tabular, collaborative filtering, text, xresnets and GANs"
    from fastai.collab import EmbeddingNN
    from fastai.tabular.model import TabularModel
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
    from fastai.text.models.core import get_text_classifier
    from fastai.vision import gan
    from fastai.vision.learner import create_timm_model, create_unet_model, create_vision_model
    from fastai.vision.models import xresnet as X
    from torchvision import models as M
    res = []
    def _add(name, model, sample): res.append(Entry('fastai', name, lambda: (model(), sample())))
    def _vision(arch, **kw): return lambda: create_vision_model(getattr(M, arch), 10, pretrained=False, **kw)
    def _unet(arch, **kw): return lambda: create_unet_model(getattr(M, arch), 3, (128,128), pretrained=False, **kw)
    img = lambda: _images(3, 128, 128)
    for o in 'resnet18','resnet34','resnet50','mobilenet_v3_small','efficientnet_b0','densenet121','squeezenet1_1','vgg11_bn','alexnet':
        _add(f'vision_{o}', _vision(o), img)
    heads = dict(no_concat_pool=dict(concat_pool=False), bn_final=dict(bn_final=True), lin_first=dict(lin_first=True),
        no_first_bn=dict(first_bn=False), deep_head=dict(lin_ftrs=[256,128]), y_range=dict(y_range=(0,1)))
    for name,kw in heads.items(): _add(f'vision_resnet18_{name}', _vision('resnet18', **kw), img)
    for o in 'resnet26d','efficientnet_lite0','convnext_atto':
        _add(f'vision_timm_{o}', lambda o=o: create_timm_model(o, 10, pretrained=False)[0], img)
    for o in 'resnet18','resnet34','resnet50': _add(f'unet_{o}', _unet(o), img)
    unets = dict(self_attention=dict(self_attention=True), blur=dict(blur=True), no_last_cross=dict(last_cross=False),
        bottle=dict(bottle=True), y_range=dict(y_range=(0,1)))
    for name,kw in unets.items(): _add(f'unet_resnet18_{name}', _unet('resnet18', **kw), img)
    embs,rows = [(10,6),(5,4),(100,20)],lambda: (torch.randint(5, (64,3)), torch.randn(64, 4))
    tabular = dict(default={}, bn_final=dict(bn_final=True), lin_last=dict(lin_first=False), no_bn=dict(use_bn=False),
        no_bn_cont=dict(bn_cont=False), dropout=dict(ps=0.1, embed_p=0.1), y_range=dict(y_range=(0,1)))
    for name,kw in tabular.items(): _add(f'tabular_{name}', lambda kw=kw: TabularModel(embs, 4, 2, [200,100], **kw), rows)
    _add('tabular_no_cat', lambda: TabularModel([], 4, 2, [200,100]), lambda: (torch.zeros(64, 0).long(), torch.randn(64, 4)))
    _add('tabular_no_cont', lambda: TabularModel(embs, 0, 2, [200,100]), lambda: (torch.randint(5, (64,3)), torch.zeros(64, 0)))
    _add('collab_nn', lambda: EmbeddingNN([(50,10),(70,12)], [100,50], y_range=(0,5)), lambda: (torch.randint(50, (64,2)),))
    text = dict(awd_lstm_clas_config, emb_sz=40, n_hid=60)
    _add('text_classifier', lambda: get_text_classifier(AWD_LSTM, 200, 4, config=text), lambda: (torch.randint(2, 200, (4,90)),))
    for o in (o for o in X.__all__ if re.match(r'x(se_?)?(res|se)n', o)): _add(o, getattr(X, o), img)
    _add('gan_generator', lambda: gan.basic_generator(64, 3, n_extra_layers=1), lambda: _images(100))
    _add('gan_basic_critic', lambda: gan.basic_critic(64, 3, n_extra_layers=1), lambda: _images(3, 64, 64))
    _add('gan_critic', gan.gan_critic, img)
    return res

collections = dict(fastai=fastai_models, torchvision=torchvision_models, timm=timm_models)

def in_turn()->list: # Of `Entry`
    "All models, one of each collection after the other"
    todo = [f() for f in collections.values()]
    return [es[i] for i in range(max(map(len, todo))) for es in todo if i<len(es)]

def built(
    entry:Entry,
    limit:float=math.inf # Millions of parameters
): # Model in eval and sample, or `None` if it is larger
    "A model of the zoo with hostile weights, the same each time"
    seed = zlib.crc32(entry.key.encode())
    torch.manual_seed(seed)
    model,sample = entry.build()
    if count_parameters(model)>limit*1e6: return None
    hostile(model.eval(), sample, seed)
    return model,sample

# ---- Measuring

_norm_kernels = {'native_batch_norm', 'cudnn_batch_norm', 'miopen_batch_norm', '_native_batch_norm_legit_no_training'}

class NormCalls(TorchDispatchMode):
    "Count the batch norms that run, and on running statistics: `calls`"
    calls = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # The one that is never in training has a float, the momentum, where the others have their training flag
        self.calls += name in _norm_kernels and args[5] is not True
        return func(*args, **(kwargs or {}))

def as_dtype(x, dtype): return tree_map(lambda o: o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o, x)

def run(model, sample):
    "Tensors that `model` gives for `sample`, and how many batch norms it ran for them"
    torch.manual_seed(0)
    with torch.no_grad(), NormCalls() as n: out = model(*sample)
    return [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)],n.calls

def distance(
    out:list, # Tensors
    ref:list, # What they should be, in float64
) -> float: # `None` where shapes differ or something is not finite
    "Largest relative error ‖out-ref‖/‖ref‖ of any of the tensors; of integers, the share that differs"
    if [o.shape for o in out] != [o.shape for o in ref]: return None
    def _one(a, b):
        if not b.is_floating_point(): return (a!=b).double().mean()
        return (a.double()-b).norm()/b.norm().clamp(min=torch.finfo(torch.float64).tiny)
    errs = [float(_one(a, b)) for a,b in zip(out, ref) if b.numel()]
    return max(errs, default=0.) if all(map(math.isfinite, errs)) else None

def measure(
    model:nn.Module,  # In eval
    sample:tuple,     # Its arguments
    dtype:torch.dtype,# To fold and run in
    fold:Callable,    # As in `Peer`
    ref:list,         # Outputs of the original in float64
    same_as:list=None # Outputs of the original in `dtype`
) -> dict: # Seconds to fold, norms left, error, whether no bit of the outputs changed, norms kept; or what it crashed with, and when
    "Fold `model` in `dtype` and run what comes of it"
    torch.set_default_dtype(dtype)
    model,sample,stage = model.to(dtype),as_dtype(sample, dtype),'fold'
    try:
        start = time.process_time()
        with torch.no_grad(): folded,kept = fold(model, sample)
        secs,stage = time.process_time()-start,'run'
        out,norms = run(folded, sample)
    except MemoryError: raise
    except Exception as e:
        if _no_memory(e): raise
        return dict(crash=in_short(e), stage=stage)
    same = same_as is not None and len(out)==len(same_as) and all(map(torch.equal, out, same_as))
    return dict(out=out if same_as is None else None, seconds=secs, norms=norms, error=distance(out, ref), same=same, kept=kept)

def _no_memory(e): return isinstance(e, MemoryError) or 't allocate memory' in str(e)

def _child(f, result, output):
    "In a forked process: save what `f` returns to `result`, with what it prints in `output`, and end"
    code = 1
    ctypes.CDLL(None).prctl(1, signal.SIGKILL) # PR_SET_PDEATHSIG: nothing runs on when the benchmark is stopped
    try:
        with open(output, 'w') as o:
            for fd in 1,2: os.dup2(o.fileno(), fd)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_secs, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_DATA, (gigabytes*2**30, resource.RLIM_INFINITY))
        try: res = f()
        except BaseException as e: res = dict(over='memory' if _no_memory(e) else f'{type(e).__name__}: {str(e)[:300]}')
        torch.save(res, result)
        code = 0
    finally: os._exit(code)

def in_fork(
    f:Callable,     # Called without arguments
    wall:bool=True, # Limit the wall time too?
): # What `f` returns, or `dict(over=...)` where it went over a limit or died
    "Run `f` in a forked process within the limits on CPU time, memory and wall time"
    with tempfile.TemporaryDirectory() as d:
        result,end = Path(d)/'result',time.time() + cpu_secs*patience
        if not (pid := os.fork()): _child(f, result, Path(d)/'output')
        while (status := os.waitpid(pid, os.WNOHANG))[0]==0:
            if wall and time.time()>end: os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if os.WIFSIGNALED(status[1]):
            sig = signal.Signals(os.WTERMSIG(status[1]))
            return dict(over='time' if sig==signal.SIGXCPU or (wall and time.time()>end) else sig.name)
        return torch.load(result, weights_only=False) if result.exists() else dict(over=f'exit status {status[1]}')

def go_on(
    measure:Callable, # Makes a row of an entry, or `None` if it is left out
    rows:list,        # Of `dict(model=…)`, sorted; each new one goes into its place
    write:Callable,   # Called after each
    end:float,        # The time at which to stop
    limit:float,      # Millions of parameters above which a model is left out
    only:str=''       # Names of models, comma-separated; by default all that have no row yet
):
    "Measure models of the zoos in forked processes, collections in turns, from where the last run stopped"
    done = {r['model'] for r in rows}
    for entry in (bar := tqdm([e for e in in_turn() if e.params<=limit*1e6 and (e.name in only.split(',') if only else e.key not in done)])):
        if time.time()>end: break
        bar.set_postfix_str(entry.key)
        row = in_fork(lambda: measure(entry))
        if row is None: continue
        if 'over' in row: row = dict(model=entry.key, verdict='over', why=str(row['over'])[:200])
        rows[:] = sorted([*(r for r in rows if r['model']!=entry.key),row], key=lambda r: r['model'])
        write()

def fold_with(
    tool:Peer,
    model:nn.Module, # In eval
    sample:tuple,    # Its arguments
    ref:list,        # Outputs of the original in float64
    own:list,        # Outputs of the original in float32
) -> dict:
    "How folding `model` with `tool` goes: in float32, then, if a bit has changed, in float64, where an error is not rounding"
    def _fold(dtype): return in_fork(lambda: measure(model, sample, dtype, tool.fold, ref, own))
    r = _fold(torch.float32)
    if 'over' in r: return dict(outcome='over', over=r['over'])
    if 'crash' in r: return dict(outcome='crash', **r)
    res = {o: r[o] for o in ('seconds','norms','error','kept') if r[o]!=[]}
    if r['same']: return dict(outcome='right', **res)
    r = _fold(torch.float64)
    if 'over' in r: return dict(outcome='over', over=r['over'], dtype='float64')
    if 'crash' in r: return dict(outcome='crash', dtype='float64', **r)
    if r['norms']!=res['norms']: res.update(norms_float64=r['norms'], kept_float64=r['kept'])
    right = r['error'] is not None and r['error']<=wrong_above
    return dict(outcome='right' if right else 'wrong', structural=r['error'], **res)

def exact(model, sample):
    "What `model`, which is float64 afterwards, returns in float64"
    torch.set_default_dtype(torch.float64)
    return run(model.double(), as_dtype(sample, torch.float64))[0]

def left_if_positive(
    model:nn.Module, # In eval
    sample:tuple,    # Its arguments
    tool:Peer
): # `None` where that fold is not right
    "Norm calls left by `tool` where all scales of norms are positive"
    def _fold():
        with torch.no_grad():
            for m in model.modules():
                if getattr(m, 'running_mean', None) is not None and m.weight is not None: m.weight.abs_().clamp_(min=0.1)
        return measure(model, sample, torch.float64, tool.fold, exact(model, sample))
    r = in_fork(_fold)
    return r['norms'] if r.get('error') is not None and r['error']<=wrong_above else None

def measure_model(
    entry:Entry,
    tools:list,    # Of `Peer`
    write:Callable,# Takes each row
    limit:float=math.inf, # Millions of parameters above which nothing is measured
    measured:dict=None# Of each tool, seconds and error that count instead of those there are now
):
    "Run a model in float32 and float64, fold it with each of the tools; a row for each"
    if (found := built(entry, limit)) is None: return
    model,sample = found
    row = dict(key=entry.key, tool='original', params=count_parameters(model))
    ref = in_fork(lambda: dict(out=exact(model, sample)))
    own = ref if 'over' in ref else in_fork(lambda: measure(model, sample, torch.float32, lambda m,s: (m,[]), ref['out']))
    if why := own.get('over') or own.get('crash'): return write(dict(row, over=why))
    if not all(o.isfinite().all() for o in ref['out']): return write(dict(row, over='outputs are not finite'))
    if not measured: write(dict(row, norms=own['norms'], own=own['error']))
    for tool in tools:
        row = fold_with(tool, model, sample, ref['out'], own['out'])
        if tool.name=='fasterfold' and row.get('norms'): row['positive'] = left_if_positive(model, sample, tool)
        if measured and row['outcome']=='right' and tool.name in measured: row.update(measured[tool.name], earlier=True)
        write(dict(key=entry.key, tool=tool.name, version=tool.version, **row))

# ---- The log and the tables

def _log(): return (work/'log.jsonl').read_text() if (work/'log.jsonl').exists() else ''

def _published():
    "The rows of which zoo.json was made: the log of whoever measured them may be elsewhere"
    if not (results/'zoo.json').exists(): return
    z = json.loads((results/'zoo.json').read_text())
    for o in base:
        if o in z['releases']: yield dict(key='', tool=o, version=z['releases'][o])
    for m in z['models']:
        key = f"{m['collection']}/{m['name']}"
        yield dict(key=key, tool='original', **{k: m[k] for k in ('params','norms','own')})
        for t,r in m['tools'].items(): yield dict(key=key, tool=t, version=z['releases'][t], **r)
    for m in z['unmeasured']: yield dict(key=f"{m['collection']}/{m['name']}", tool='original', params=m['params'], over=m['why'])

def read_log():
    "The last row of each (model, tool): of the log, or else of the published results"
    rows = [*_published(), *map(json.loads, _log().splitlines())]
    return {(o['key'],o['tool']): o for o in rows}

def write_log(row):
    with open(work/'log.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')

def run_zoo(
    entries:list, # Of `Entry`
    names:list,   # Of tools
    redo:bool,    # Also what has been measured?
    limit:float,  # Millions of parameters above which a model is left for another time
    norms_only:bool # Keep the seconds and errors there are?
):
    "Measure what is not in the log yet"
    before = read_log()
    log = {} if redo else before
    def _measured(o): return {n: {k: before[o.key,n][k] for k in ('seconds','error')} for n in names if before.get((o.key,n), {}).get('outcome')=='right'} if norms_only else {}
    def _todo(o): return [] if 'over' in log.get((o.key,'original'), {}) else [n for n in names if (o.key,n) not in log]
    def _params(o): return log.get((o.key,'original'), {}).get('params') or o.params
    todo = [(o,missing) for o in entries if _params(o)<=limit*1e6 and (missing := _todo(o))]
    if not todo: return
    tools = load_peers(names)
    for o in base: write_log(dict(key='', tool=o, version=version(o)))
    for entry,missing in (bar := tqdm(todo)):
        bar.set_postfix_str(entry.key)
        r = in_fork(lambda: measure_model(entry, [tools[o] for o in missing], write_log, limit, _measured(entry)), wall=False)
        if r: write_log(dict(key=entry.key, tool='original', **r))

# ---- The tables

def _pct(a, b): return f'{a/b:.1%}' if b else '–'
def _median(o): return statistics.median(o) if o else None
def _fmt(o, spec): return '–' if o is None else format(o, spec)

def summarise(
    models:list # As in zoo.json
) -> list:
    "One row for each zoo and tool, and for all zoos together, of the models that have norms. What a wrong or crashed fold removes does not count as removed"
    res,models = [],[o for o in models if o['norms']]
    zoos = list(dict.fromkeys(o['collection'] for o in models))
    for zoo in [*zoos, 'all']:
        ms = [o for o in models if zoo in (o['collection'],'all')]
        for tool in peers:
            rs = [(o,o['tools'][tool]) for o in ms if tool in o['tools']]
            if not rs: continue
            right = [(o,r) for o,r in rs if r['outcome']=='right']
            norms,removed = sum(o['norms'] for o,_ in rs),sum(o['norms']-r['norms'] for o,r in right)
            n = Counter(r['outcome'] for _,r in rs)
            ratios = [r['error']/o['own'] for o,r in right if r['norms']<o['norms'] and r['error'] is not None and o['own']]
            res.append(dict(zoo=zoo, tool=tool, models=len(rs), norms=norms, removed=removed, crashes=n['crash'], wrong=n['wrong'],
                over=n['over'], seconds=_median([r['seconds'] for _,r in right]), error_ratio=_median(ratios)))
    return res

def merge():
    "Write docs/results/zoo.json and zoo.md from the log"
    log,models,unmeasured,releases = read_log(),[],[],{}
    entries = {o.key: o for f in collections.values() for o in f()}
    for (key,tool),r in log.items():
        if tool!='original' or key not in entries: continue
        e = entries[key]
        if 'over' in r: unmeasured.append(dict(collection=e.collection, name=e.name, params=r.get('params'), why=r['over']))
        else:
            tools = {t: {k: v for k,v in log[key,t].items() if k not in ('key','tool','version')} for t in peers if (key,t) in log}
            models.append(dict(collection=e.collection, name=e.name, params=r['params'], norms=r['norms'], own=r['own'], tools=tools))
    order = list(entries).index
    for o in models,unmeasured: o.sort(key=lambda m: order(f"{m['collection']}/{m['name']}"))
    for r in log.values():
        if 'version' in r: releases[r['tool']] = r['version']
    releases = {o: releases[o] for o in [*base,*peers] if o in releases}
    tried = {t for m in models for t in m['tools']}
    alike = [m for m in models if len(m['tools'])==len(tried)]
    kept = defaultdict(list)
    for m in models:
        for norm,reason,calls in m['tools'].get('fasterfold', {}).get('kept', []): kept[generic(reason)].append((calls, m['name']))
    reasons = [dict(reason=k, calls=sum(c for c,_ in v), norms=len(v), models=list(dict.fromkeys(n for _,n in v))) for k,v in kept.items()]
    reasons.sort(key=lambda o: -o['calls'])
    def _left(m, tool):
        r = m['tools'].get(tool, {})
        return r['norms'] if r.get('outcome')=='right' else m['norms']
    earlier = sum(bool(r.get('earlier')) for m in models for r in m['tools'].values())
    def _row(m, tool, **kw): return dict(collection=m['collection'], name=m['name'], tool=tool, **kw)
    ahead = [_row(m, t, norms=m['norms'], left=_left(m, t), ours=_left(m, 'fasterfold')) for m in models for t in peers
        if 'fasterfold' in m['tools'] and _left(m, t)<_left(m, 'fasterfold')]
    def _why(r):
        if r['outcome']=='wrong': return f"off by {_fmt(r['structural'], '.2g')} in float64"
        return (r.get('crash') or r['over']) + (' (in float64)' if 'dtype' in r else '')
    failed = [_row(m, t, outcome=r['outcome'], why=_why(r)) for m in models for t,r in m['tools'].items() if r['outcome']!='right']
    def _kept(m): return m['tools'].get('fasterfold', {}).get('norms')
    positive = [dict(collection=m['collection'], name=m['name'], norms=m['norms'], left=_kept(m), positive=m['tools']['fasterfold'].get('positive'))
        for m in models if _kept(m)]
    head = dict(releases=releases, python=platform.python_version(), limits=dict(cpu_seconds=cpu_secs, gigabytes=gigabytes), wrong_above=wrong_above,
        summary=summarise(models), summary_alike=summarise(alike) if len(alike)<len(models) else [],
        reasons=reasons, positive=positive, earlier=earlier, peers_ahead=ahead, failed=failed, unmeasured=unmeasured)
    results.mkdir(parents=True, exist_ok=True)
    rows = ',\n'.join(json.dumps(o) for o in models) # one model a line, so that differences read well
    (results/'zoo.json').write_text(json.dumps(head, indent=1)[:-2] + f',\n "models": [\n{rows}\n]}}\n')
    (results/'zoo.md').write_text(_page(head))

def _earlier(z): return f" Norms of {z['earlier']:,} folds were counted again later; their seconds and errors are of the run of all tools, on one machine." if z.get('earlier') else ''

def _page(z):
    "The results as Markdown"
    def _name(o): return f"{o['collection']}/{o['name']}"
    def _few(names): return ', '.join(names[:4]) + (f' and {len(names)-4} more' if len(names)>4 else '')
    def _sums(o): return o['zoo'],o['tool'],o['models'],f"{o['norms']:,}",f"{o['removed']:,}",_pct(o['removed'], o['norms'])
    def _faults(o): return o['crashes'],o['wrong'],o['over'],_fmt(o['seconds'], '.2f'),_fmt(o['error_ratio'], '.2f')
    head = 'zoo,tool,models,norm calls,removed,%,crashes,wrong,over limits,median s to fold,median error ÷ own'.split(',')
    def _summary(rows): return table(head, [[*_sums(o), *_faults(o)] for o in rows])
    releases = ', '.join(f'{k} {v}' for k,v in z['releases'].items())
    parts = ['# The zoos, side by side', f'{releases}. What each column counts is in benchmarks/README.md.'+_earlier(z), _summary(z['summary'])]
    if z['summary_alike']: parts += ['## On the models that all tools have been tried with', _summary(z['summary_alike'])]
    if z['reasons']:
        rows = [[o['calls'],o['norms'],o['reason'],_few(o['models'])] for o in z['reasons']]
        parts += ['## Norms fasterfold keeps, and why', table(['calls','norms','reason','models'], rows)]
    if rows := [[_name(o),o['norms'],o['left'],o['positive']] for o in z['positive'] if o['positive'] is not None]:
        parts += ['## Norms fasterfold keeps where all scales are positive',
            'A negative scale stops at a ReLU, and nothing can be divided by a scale of zero. Everywhere else on this page, a tenth of the scales of every norm is negative and one in fifty zero.',
            table(['model','norm calls','kept','kept with positive scales'], rows)]
    if z['peers_ahead']:
        rows = [[_name(o),o['tool'],o['norms'],o['left'],o['ours']] for o in z['peers_ahead']]
        parts += ['## Where a peer leaves fewer norms', table(['model','tool','norms','it leaves','fasterfold leaves'], rows)]
    for tool in peers:
        rows = [[_name(o),o['outcome'],o['why']] for o in z['failed'] if o['tool']==tool]
        if rows: parts += [f'## {tool}: crashed, wrong or over the limits', table(['model','outcome','with'], rows)]
    if z['unmeasured']:
        rows = [[_name(o),_fmt(o['params'], ',d'),o['why']] for o in z['unmeasured']]
        parts += ['## Not measured: the model itself is over the limits or does not run', table(['model','parameters','why'], rows)]
    return '\n\n'.join(parts) + '\n'

@call_parse
def main(
    tools:str=','.join(peers), # Tools to fold with, comma-separated
    models:str='*',            # Models to fold: comma-separated patterns such as timm/resnet*,fastai/*
    limit_size:float=math.inf, # Leave models of more than this many million parameters for another time
    redo:store_true=False,     # Measure again what is in the log already?
    list_models:store_true=False, # Only list the models?
    merge_only:store_true=False,  # Measure nothing, only write the results from the log?
    norms_only:store_true=False,  # Keep the seconds and errors there are, of all tools on one machine?
):
    "Fold the model zoos with fasterfold and its peers, and write docs/results/zoo.json and zoo.md"
    work.mkdir(exist_ok=True)
    (work/'.gitignore').write_text('*\n')
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    entries = [o for f in collections.values() for o in f() if any(fnmatch(o.key, p) for p in models.split(','))]
    if not entries: raise SystemExit(f'No model matches {models!r}: --list-models shows them all')
    if list_models: return print('\n'.join(o.key for o in entries))
    if not merge_only: run_zoo(entries, tools.split(','), redo, limit_size, norms_only)
    merge()
