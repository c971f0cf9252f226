"What the benchmarks share: hostile weights, timing in turns, and the files they write"
import json, math, os, platform, re
from importlib.metadata import distributions, version
from pathlib import Path

import numpy as np, torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as wall

__all__ = ['results', 'hostile', 'chain', 'timer', 'in_turns', 'stats', 'ratio', 'environment', 'described', 'load', 'save', 'table', 'ms', 'times', 'slope',
    'grouped', 'by_variant', 'helped', 'typical', 'generic', 'registry', 'in_short']

results = Path(__file__).parents[1]/'docs'/'results'

# ---- Tools

def registry(
    found:dict, # name -> (what is said of it, function), to be filled
):
    "A decorator `f(name, said)` that registers what it decorates"
    def _named(name, said):
        def _register(f):
            found[name] = said,f
            return f
        return _register
    return _named

def in_short(e:Exception) -> str:
    "Its kind, and the first line of what it says"
    return f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:200]}'

# ---- Models

def _channel_stats(x, n):
    "Mean and biased variance of `x` over all axes but its channel axis, which is the second if it has `n` elements, else the last"
    x = x.transpose(0, 1 if x.ndim>1 and x.shape[1]==n else -1).flatten(1)
    return x.mean(1),x.var(1, correction=0)

def hostile(
    model:nn.Module, # In eval, changed in place
    sample:tuple,    # Its arguments
    seed:int,        # Of the random numbers
):
    """Give `model` weights as after a troubled training, under which activations stay finite.

    No parameter stays constant, so that no branch is multiplied by zero or by a gate near zero and hidden from the comparison.
    Norms get weights of either sign, some of them zero, and statistics around those of their input: mean ± a third of a
    standard deviation, variance times 0.5 to 2."""
    g = torch.Generator().manual_seed(seed)
    def _uniform(n, a, b): return torch.rand(n, generator=g)*(b-a) + a
    def _stats(m, args):
        handles.pop(m).remove()
        mean,var = _channel_stats(args[0].float(), len(m.running_mean))
        var = (var+var.mean())/2 # no channel of a small batch is constant then
        var = torch.where(var>0, var, 1.)
        m.running_mean.copy_(mean + torch.randn(len(mean), generator=g)*var.sqrt()/3)
        m.running_var.copy_(var*_uniform(len(var), 0.5, 2))
    norms = [m for m in model.modules() if getattr(m, 'running_mean', None) is not None]
    scales = {id(m.weight) for m in norms if getattr(m, 'weight', None) is not None}
    handles = {m: m.register_forward_pre_hook(_stats) for m in norms}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in scales:
                sign = 1 - 2*(_uniform(p.shape, 0, 1)<0.1).float()
                p.copy_(_uniform(p.shape, 0.5, 1.5)*sign*(_uniform(p.shape, 0, 1)>0.02))
            elif (p==0).all() or (p.numel()>1 and (p==p.flatten()[0]).all()):
                p.copy_(torch.randn(p.shape, generator=g)*0.1 if p.ndim>1 or (p==0).all() else _uniform(p.shape, 0.5, 1.5))
        model(*sample)
    for h in handles.values(): h.remove() # of norms that did not run

def chain(
    depth:int, # Convolutions, each with its norm
    width:int, # Channels
    size:int=8, # Pixels along a side
    kernel:int=1, # Of the convolutions
    act:bool=False # A ReLU after each norm?
) -> tuple: # The model, in eval, and its sample, a tuple
    """A plain chain of convolutions and norms, as well-conditioned at any depth.

    Convolutions are orthogonal, and norms, whatever their statistics, multiply by ±0.9: rounding dies out along the chain and does not add up."""
    g = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(depth):
        conv,norm = nn.Conv2d(width, width, kernel, padding=kernel//2, bias=False),nn.BatchNorm2d(width)
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[:,:,kernel//2,kernel//2] = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
            norm.running_mean.copy_(torch.randn(width, generator=g)*.1)
            norm.running_var.copy_(torch.rand(width, generator=g)*1.5 + .5)
            sign = torch.randint(2, (width,), generator=g)*2 - 1
            norm.weight.copy_(.9*sign*(norm.running_var+norm.eps).sqrt())
            norm.bias.copy_(torch.randn(width, generator=g)*.1)
        layers += [conv,norm] + [nn.ReLU()]*act
    return nn.Sequential(*layers).eval(), (torch.randn(2, width, size, size, generator=g),)

# ---- Timing

def in_turns(
    timers:dict,  # name -> `Timer`
    turns:int,    # How often each has its turn; every other time in reverse order
    measure,      # `measure(timer)`: a `Measurement`
    tick=lambda: None # Called after each measurement
) -> dict: # name -> for each turn, its seconds per run
    "Time several things side by side, so that what slows the machine down for a while slows all of them down"
    res = {k: [] for k in timers}
    for i in range(turns):
        for k in list(timers)[::(-1)**i]:
            res[k].append(measure(timers[k]).times)
            tick()
    return res

def timer(
    stmt:str, # What to time
    setup:str='pass', # What to do before, untimed
    clock=wall, # Gives seconds
    **names # Objects that both may use
) -> Timer: # With PyTorch's present number of threads
    "A `Timer` under which Python collects garbage as usual: what folding leaves behind is part of its cost"
    return Timer(stmt, f'import gc; gc.enable(); {setup}', timer=clock, globals=names, num_threads=torch.get_num_threads())

def _quartiles(o): return [float(q) for q in np.percentile(o, [25,50,75])]

def stats(
    turns:list # As `in_turns` gives them
) -> dict: # Seconds
    "Median, interquartile range and number of runs"
    runs = [t for turn in turns for t in turn]
    low,median,high = _quartiles(runs)
    return dict(median=median, iqr=high-low, runs=len(runs))

def times(turns): return [float(np.median(o)) for o in turns]

def ratio(
    a:list, # Seconds in each turn
    b:list, # Seconds in each turn of what it is compared with
) -> list: # Lower quartile, median and upper quartile
    "`a` over `b`, turn by turn"
    return _quartiles(np.divide(a, b))

def slope(
    x:list,
    y:list,
) -> float: # 1 for a straight line through the origin, 2 for a parabola
    "Exponent k of the power law y = c·xᵏ that fits best"
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])

# ---- Files

def _processor():
    "Name of the processor, and the vector instructions that PyTorch uses on it"
    info = Path('/proc/cpuinfo')
    names = [o.partition(':')[2].strip() for o in info.read_text().splitlines() if o.startswith('model name')] if info.exists() else []
    return f'{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})'

def environment(
    dists:list, # Distributions whose releases matter, where they are installed
    device:str='cpu', # What PyTorch calls the device
) -> dict:
    "On what the figures were measured: releases, device and threads"
    releases = {o: version(o) for o in dict.fromkeys(dists) if any(distributions(name=o))}
    res = dict(releases=releases, python=platform.python_version(), threads=torch.get_num_threads(), cores=os.cpu_count())
    if device=='cpu': return dict(res, device=_processor())
    conv,matmul = torch.backends.cudnn,torch.backends.cuda.matmul
    tf32 = dict(conv=conv.allow_tf32, matmul=matmul.allow_tf32)
    return dict(res, device=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=conv.version(), tf32=tf32)

def described(
    env:dict # As from `environment`
) -> str:
    "The environment in one line"
    what = f"{env['device']}, {env['threads']} thread" + 's'*(env['threads']!=1)
    return f"{what}; Python {env['python']}, " + ', '.join(f'{k} {v}' for k,v in env['releases'].items())

def load(
    path:Path,
    env:dict # As from `environment`
) -> dict: # Empty if there are none, or they were measured in another environment
    "Earlier results, for a run that measures a part of them again"
    old = json.loads(path.read_text()) if path.exists() else {}
    return old if old.get('environment')==env else {}

def _round(o):
    "Six digits; what is not finite becomes `None`, which JSON has"
    if isinstance(o, float): return float(f'{o:.6g}') if math.isfinite(o) else None
    if isinstance(o, dict): return {k: _round(v) for k,v in o.items()}
    return [_round(v) for v in o] if isinstance(o, (list,tuple)) else o

def save(
    path:Path, # Of the JSON file; the page goes beside it
    res:dict,  # The results: lists of rows, and what goes before them
    page,      # `page(res)`: the same as Markdown
):
    "Write the results, each row of a list on a line of its own, so that differences read well"
    res = _round(res)
    def _value(v):
        if not isinstance(v, list) or not v: return json.dumps(v)
        return '[\n' + ',\n'.join(f'  {json.dumps(o, ensure_ascii=False)}' for o in v) + ']'
    path.parent.mkdir(parents=True, exist_ok=True)
    for p,text in (path,'{\n' + ',\n'.join(f' {json.dumps(k)}: {_value(v)}' for k,v in res.items()) + '\n}\n'), (path.with_suffix('.md'),page(res)):
        tmp = p.with_name(p.name + '.tmp')
        tmp.write_text(text)
        tmp.replace(p)

def table(
    head:list, # Names of the columns
    rows:list, # Cells
) -> str:
    "A Markdown table, numbers to the right"
    cells = [[str(o).replace('|', '\\|') for o in r] for r in rows]
    right = [all(r[i][:1].isdigit() or r[i].startswith('–') for r in cells) for i in range(len(head))]
    lines = [head, ['---:' if o else '---' for o in right], *cells]
    return '\n'.join('| ' + ' | '.join(o) + ' |' for o in lines)

def ms(
    seconds:float, # Or `None`
) -> str:
    "Milliseconds with three digits"
    if seconds is None: return '–'
    t = seconds*1e3
    return f'{t:.{0 if t>=100 else 1 if t>=10 else 2 if t>=1 else 3}f}'

# ---- Rows of results

def grouped(
    rows:list, # Dicts
    *keys      # Of what is the same within a group
) -> dict: # Tuple of the values of `keys` -> rows, in the order in which they come
    "`rows` by the values of `keys`"
    res = {}
    for r in rows: res.setdefault(tuple(r[k] for k in keys), []).append(r)
    return res

def by_variant(rows, *keys):
    "As `grouped`, each group a dict of its rows by what was timed"
    return {k: {r['variant']: r for r in rs} for k,rs in grouped(rows, *keys).items()}

def generic(
    reason:str # For which a norm stays
) -> str:
    "`reason` without the names and numbers of one model"
    return re.sub(r'\d+', 'n', re.sub(r'[`\'"][^`\'"]*[`\'"]', '…', reason))

def typical(
    rows:list # Of folding: dicts with `input`, whose first number is the batch, and `ratio`
) -> str: # Empty if nothing was compared
    "Median ratio over the models, for each batch"
    def _median(rs): return float(np.median([r['ratio'][1] for r in rs]))
    batches = grouped([dict(r, batch=r['input'][0]) for r in rows if r['ratio']], 'batch')
    return ', '.join(f'{_median(rs):.2f} with a batch of {n}' for (n,),rs in batches.items())

noise = .03 # Ratios that are no further from 1 count as no difference

def helped(
    groups:dict # As from `by_variant`, by model and batch
) -> str: # Empty if nothing was timed
    "Where folding first makes an engine faster, and where it adds nothing"
    ratios = {f'{m} ({n})': g['fasterfold']['ratio'] for (m,n),g in groups.items() if 'ratio' in g.get('fasterfold', {})}
    if not ratios: return ''
    said = {'Folding first helps': [k for k,(_,_,high) in ratios.items() if high<1-noise],
        'It adds nothing beyond noise': [k for k,(low,_,high) in ratios.items() if high>=1-noise and low<=1+noise],
        'It is slower': [k for k,(low,_,_) in ratios.items() if low>1+noise]}
    return ' '.join(f"{k}: {', '.join(v)}." for k,v in said.items() if v) + ' Batch sizes are in brackets.'
