"""What folding costs: seconds next to the other tools, memory, and how both grow with the model.

Everything is compared within one run, in turns, on one thread, in CPU seconds. README.md here says what is counted."""
import os
os.environ.setdefault('KINETO_LOG_LEVEL', '5') # before torch: its profiler has nothing to say

import gc, warnings
from functools import partial
from pathlib import Path
from time import process_time

import torch
from fastcore.script import call_parse, store_true
from torch.autograd.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model
from tqdm import tqdm

from common import chain, described, environment, hostile, in_turns, load, ms, ratio, results, save, slope, stats, table, timer, times, typical
from fasterfold.fold import BN_Folder
from fasterfold.cost import count_parameters, model_size
from fasterfold.state import copy_model
from peers import any_shape, load_peers, peers

all_models = 'resnet18','resnet50','mobilenet_v3_large','efficientnet_b0','regnet_y_800mf','wide_resnet50_2'
depths = 100,300,1000,3000    # Norms in a chain of 16 channels
widths = 64,128,256,512,1024  # Channels of a chain of 20 norms

def build(
    name:str, # A torchvision model
    size:int, # Pixels along a side
    batch:int # Images
) -> tuple: # The model, in eval, and its sample, a tuple
    "A model with hostile weights, the same ones each time"
    torch.manual_seed(0)
    model,sample = get_model(name, weights=None).eval(),(torch.randn(batch, 3, size, size),)
    hostile(model, sample, 0)
    return model,sample

# ---- Time

cpu_timer = partial(timer, clock=process_time) # what else the machine does is not counted

class Proof64(TorchDispatchMode):
    "Has a convolution run in float64? Then the fold could not be proved in the model's own dtype: `seen`"
    seen = False
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= func is torch.ops.aten.convolution.default and args[0].dtype is torch.float64
        return func(*args, **(kwargs or {}))

ours = 'fasterfold','fasterfold in place','fasterfold without proof'

def once(t):
    "A `Measurement` of a single run, after one to warm up: `timeit(1)` warms up with two"
    return t.blocked_autorange(min_run_time=0)

def checked(
    fold # As in `peers.py`, for a tool that proves nothing
): # The same, and the two forward passes with which its user checks it
    def _f(model, sample):
        ref = model(*sample)
        out = fold(model, sample)[0](*sample)
        return (out-ref).norm()/ref.norm()
    return _f

def speed(
    name:str,  # A torchvision model
    tools:dict,# name -> `Peer`
    size:int,  # Pixels along a side
    batch:int, # Images
    turns:int,
    tick,      # Called after each measurement
    best:str=None # The fastest of the other tools, if that is known: then only it and ours are timed
) -> dict: # A row of results
    "Fold a model with each of the tools in turns, with the two models' runs between; then with ours and with the fastest of the others and a check"
    model,sample = build(name, size, batch)
    folder = BN_Folder()
    with Proof64() as double: folded = folder.fold(model, sample)
    def _fold(f): return cpu_timer('f(m, sample)', 'm = copy(model)', f=f, copy=copy_model, model=model, sample=sample)
    def _run(m): return cpu_timer('model(*sample)', model=m, sample=sample)
    row = dict(model=name, input=[batch,3,size,size], parameters=count_parameters(model), norms=folder.result.calls,
        proof='float64' if double.seen else 'own dtype', seconds={})
    if best is None:
        timers = {k: _fold(o.fold) for k,o in tools.items()}
        if ours[0] in timers:
            timers[ours[1]] = _fold(lambda m,s: BN_Folder().fold(m, s, inplace=True))
            timers[ours[2]] = _fold(lambda m,s: BN_Folder(verify=False).fold(m, s))
        timers.update({'run original': _run(model), 'run folded': _run(folded)})
        with torch.no_grad(): res = in_turns(timers, turns, once, tick)
        row['seconds'] = {k: stats(o) for k,o in res.items()}
        best = min((k for k in tools if k!=ours[0]), key=lambda k: row['seconds'][k]['median'], default=None)
    if best is None or ours[0] not in tools: return row | dict(fastest=best, against={}, ratio=None)
    pair = {ours[0]: _fold(tools[ours[0]].fold), best: _fold(checked(tools[best].fold))}
    with torch.no_grad(): both = in_turns(pair, turns, once, tick)
    return row | dict(fastest=best, against={k: stats(o) for k,o in both.items()}, ratio=ratio(times(both[ours[0]]), times(both[best])))

# ---- Memory

def memory(
    name:str, # A torchvision model
    size:int, # Pixels along a side
    batch:int # Images
) -> dict: # A row of results, in bytes
    """Tensor memory that a forward pass takes at its peak, its input included, and that folding in place takes.

    PyTorch's profiler sees every tensor that is allocated and freed, also inside kernels and in float64 copies. The model is
    built under it too, so that it knows the size of what is freed later."""
    with profile(use_kineto=True, profile_memory=True) as prof:
        model,sample = build(name, size, batch)
        with torch.no_grad(): model(*sample) # what libraries set up once
        with record_function('forward'), torch.no_grad(): model(*sample)
        gc.collect() # nothing older is freed while it folds
        before,folder = model_size(model),BN_Folder()
        with record_function('fold'): folder.fold(model, sample, inplace=True)
        edited = sum(v.tensor.nbytes for v in folder.result.edits if v.tensor is not None)
        with record_function('drop'): del folder
        with record_function('collect'): gc.collect()
        after = model_size(model)
    events = prof.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name()=='[memory]'), key=lambda o: o[0])
    def _during(stage):
        "Bytes at the peak and at the end of `stage`, over those at its start"
        e = next(o for o in events if o.name()==stage)
        now = peak = 0
        for at,n in changes:
            if e.start_ns()<=at<=e.start_ns()+e.duration_ns(): peak = max(peak, now := now+n)
        return peak,now
    (forward,_),(fold,held),(_,drop),(_,collect) = map(_during, ('forward','fold','drop','collect'))
    held -= after-before
    forward += sum(o.nbytes for o in sample)
    return dict(model=name, input=[batch,3,size,size], parameters=before, edited=edited,
        forward=forward, fold=fold, ratio=fold/(edited+forward), held=held, left=held+drop, leaked=held+drop+collect)

# ---- Growth

def growth(
    chains:list, # (depth, width) of each
    turns:int,
    tick         # Called after each measurement
) -> list: # Rows of results
    "Fold plain chains of several sizes in turns"
    built = [chain(*o) for o in chains]
    timers = {o: cpu_timer('fold(*built)', fold=BN_Folder().fold, built=b) for o,b in zip(chains, built)}
    res = in_turns(timers, turns, once, tick)
    def _row(o, b):
        per_norm = [t/o[0] for t in times(res[o])]
        first = [t/chains[0][0] for t in times(res[chains[0]])]
        return dict(depth=o[0], width=o[1], parameters=count_parameters(b[0]), **stats(res[o]), per_norm=stats([per_norm])['median'], ratio=ratio(per_norm, first))
    return [_row(*o) for o in zip(chains, built)]

# ---- The page

def page(
    res:dict # As in fold.json
) -> str:
    "The results as Markdown"
    parts = ['# What folding costs', f"{described(res['environment'])}. Times are CPU time. What each column counts is in benchmarks/README.md."]
    def _mb(n): return f'{n/2**20:.1f}'
    if rows := res['speed']:
        names = list(dict.fromkeys(k for r in rows for k in r['seconds']))
        def _row(r): return r['model'],r['input'][0],r['norms'],*(ms(r['seconds'][k]['median']) if k in r['seconds'] else '–' for k in names),r['proof']
        parts += ['## Milliseconds to fold', table(['model','batch','norms',*names,'proof in'], [_row(r) for r in rows if r['seconds']])]
        if rows := [r for r in rows if r['ratio']]:
            def _row(r):
                lo,mid,hi = r['ratio']
                return r['model'],r['input'][0],r['proof'],ms(r['against'][ours[0]]['median']),r['fastest'],ms(r['against'][r['fastest']]['median']),f'{mid:.2f}',f'{lo:.2f}–{hi:.2f}'
            names = 'model','batch','proof in','folded and proved','fastest peer','folded and checked','ratio','quartiles'
            parts += ['## Milliseconds to a model that is known to be right', table(names, map(_row, rows))]
            parts.append(f'Median ratio of folding with proof to the fastest peer and two forward passes: {typical(rows)}.')
    if rows := res['memory']:
        def _row(r): return r['model'],r['proof'],*(_mb(r[k]) for k in ('parameters','edited','forward','fold')),f"{r['ratio']:.2f}",*(_mb(r[k]) for k in ('held','left','leaked'))
        parts += ['## Megabytes to fold in place', table('model,proof in,parameters,edited,forward pass,peak,ratio,kept for undo,left,leaked'.split(','), map(_row, rows))]
    for k,title in ('depth','Growth with depth'),('width','Growth with width'):
        if rows := res[k]:
            def _row(r): return r['depth'],r['width'],f"{r['parameters']:,}",ms(r['median']),ms(r['per_norm']),f"{r['ratio'][1]:.2f}"
            x = [r['depth'] if k=='depth' else r['parameters'] for r in rows]
            parts.append(f'## {title}')
            parts.append(table(['norms','channels','parameters','ms','ms per norm','ratio to the first'], map(_row, rows)))
            if len(rows)>1: parts.append(f"Time grows as {'norms' if k=='depth' else 'parameters'} to the power {slope(x, [r['median'] for r in rows]):.2f}.")
    return '\n\n'.join(parts) + '\n'

@call_parse
def main(
    tools:str=','.join(any_shape),    # Tools to fold with, comma-separated
    models:str=','.join(all_models),  # torchvision models to fold, comma-separated
    size:int=224,     # Pixels along a side of the images
    batches:str='8,1,32', # Images in the sample, comma-separated; all is measured with the first, ours and the fastest other tool with the rest
    turns:int=5,      # How often each measurement is taken
    quick:store_true=False, # Only try whether it runs: two turns, small chains?
    out:Path=results/'fold.json', # File to write; a page goes beside it
):
    "Measure what folding costs, and write docs/results/fold.json and fold.md"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    names,sizes,tools,turns = models.split(','),[int(o) for o in batches.split(',')],load_peers(tools.split(',')),2 if quick else turns
    env = environment(['torch','torchvision',*(peers[o][0] for o in any_shape)])
    res = dict(environment=env, speed=[], memory=[], depth=[], width=[]) | load(out, env)
    def _key(r): return r['model'],r['input']
    def _put(kind, row): res[kind] = sorted([r for r in res[kind] if _key(r)!=_key(row)] + [row], key=_key)
    deep,wide = [(o,16) for o in (depths[:1]*quick or depths)],[(20,o) for o in (widths[:1]*quick or widths)]
    first,*others = sizes
    pair = 2*('fasterfold' in tools and len(tools)>1)
    timed = len(tools) + 2 + 2*('fasterfold' in tools)
    with tqdm(total=len(names)*(turns*(timed+pair+len(others)*(pair or timed))+1) + turns*(len(deep)+len(wide))) as bar:
        for o in names:
            bar.set_postfix_str(o)
            row = speed(o, tools, size, first, turns, bar.update)
            _put('speed', row)
            for n in others: _put('speed', speed(o, tools, size, n, turns, bar.update, row['fastest'] if pair else None))
            _put('memory', dict(memory(o, size, first), proof=row['proof']))
            bar.update()
            save(out, res, page)
        for k,chains in ('depth',deep),('width',wide):
            bar.set_postfix_str(f'growth with {k}')
            res[k] = growth(chains, turns, bar.update)
            save(out, res, page)
