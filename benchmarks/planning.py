"""How planning grows with the model, and what norms cost whose folds fail the proof.

Rules asked and proofs are counted, and are the same on every machine; CPU seconds are measured beside them. README.md here says what is counted."""
from pathlib import Path
from time import process_time

import torch
from fastcore.script import call_parse, store_true
from torch import nn
from tqdm import tqdm

import fasterfold.spread
from common import described, environment, grouped, hostile, in_turns, ms, results, save, slope, stats, table, timer
from fasterfold.fold import BN_Folder
from fasterfold.plan import plan_folds
from fasterfold.trace import trace

depths = 25,50,100,200 # Levels
sizes = 8,16,32,64     # Norms of a model of which some fail

# ---- Models of many levels

# Layers of a level: convolutions of what it gets (a, b, c) and of one feature map for all levels (s), norms (n, m), and a norm of all channels (w);
# and what it does with what it gets, `x`, and with that feature map, `s`
_levels = (('add', 'an', lambda o,x,s: x+o.n(o.a(x)).relu()), ('add, linear stream', 'na', lambda o,x,s: x+o.a(o.n(x))),
    ('add, pre-activation', 'namb', lambda o,x,s: x+o.b(o.m(o.a(o.n(x).relu())).relu())), ('add, in place', 'na', lambda o,x,s: x.add_(o.a(o.n(x)))),
    ('add, norm of the sum', 'an', lambda o,x,s: o.n(x+o.a(x))), ('add, pyramid', 'sn', lambda o,x,s: o.n(x+o.s(s))),
    ('cat', 'an', lambda o,x,s: torch.cat([x,o.n(o.a(x))], 1)), ('cat, pre-activation', 'wa', lambda o,x,s: torch.cat([x,o.a(o.w(x).relu())], 1)),
    ('cat, of all levels', 'wa', lambda o,x,s: (*x,o.a(o.w(torch.cat(x, 1)).relu()))), ('cat, pyramid', 'sw', lambda o,x,s: o.w(torch.cat([o.s(s),x], 1))[:,:4]),
    ('gate', 'an', lambda o,x,s: x*o.n(o.a(x)).sigmoid()), ('gate, pre-activation', 'na', lambda o,x,s: x*o.a(o.n(x)).sigmoid()),
    ('gate, squeeze-excite', 'anbm', lambda o,x,s: (y:=o.n(o.a(x)))*o.m(o.b(y.mean((2,3), keepdim=True))).sigmoid()),
    ('diamond', 'abcn', lambda o,x,s: o.n(o.b(y:=o.a(x))+o.c(y))), ('diamond, norm in each path', 'anbm', lambda o,x,s: (o.n(o.a(x))+o.m(o.b(x))).relu()),
    ('diamond, no layer inside', 'sn', lambda o,x,s: o.n(x.flip(2)+x.flip(3)+o.s(s))))
kinds = {k: (layers,f) for k,layers,f in _levels}
grow = 'cat','cat, pre-activation','cat, of all levels' # those that get more channels from level to level

class Level(nn.Module):
    def __init__(self,
        kind:str,  # Of `kinds`
        width:int, # Channels it gets
        new:int    # Channels of each convolution
    ):
        super().__init__()
        layers,self.f = kinds[kind]
        wide = width+new*('s' in layers)
        for k in layers: self.add_module(k, nn.BatchNorm2d(wide if k=='w' else new) if k in 'nmw' else nn.Conv2d(new if k=='s' else width, new, 1))
    def forward(self, x, s): return self.f(self, x, s)

class Levels(nn.Module):
    "A convolution, `depth` levels of one kind, and a convolution"
    def __init__(self, kind, depth, new=4):
        super().__init__()
        widths = [new*(i+1 if kind in grow else 1) for i in range(depth+1)]
        self.first,self.last,self.all = nn.Conv2d(3, new, 1),nn.Conv2d(widths.pop(), 2, 1),'of all' in kind
        self.levels = nn.ModuleList([Level(kind, n, new) for n in widths])
    def forward(self, x):
        x = self.first(x)
        s = x.tanh()
        if self.all: x = (x,)
        for o in self.levels: x = o(x, s)
        return self.last(torch.cat(x, 1) if self.all else x)

def traced(
    kind:str, # Of `kinds`
    depth:int # Levels
): # A `Graph`
    "The trace of a model with hostile weights"
    torch.manual_seed(0)
    model,sample = Levels(kind, depth).eval(),(torch.randn(2, 3, 4, 4),)
    hostile(model, sample, 0)
    return trace(model, sample)

def asked(
    graph # A trace
) -> tuple: # The plan, and how many rules
    "Plan, and count how often a rule is asked what becomes of a map at an operation"
    count,names = 0,('pull_through','push_through')
    old = [getattr(fasterfold.spread, k) for k in names]
    def _counted(f):
        def _f(*args):
            nonlocal count
            count += 1
            return f(*args)
        return _f
    try:
        for k,f in zip(names, old): setattr(fasterfold.spread, k, _counted(f))
        plan = plan_folds(graph)
    finally:
        for k,f in zip(names, old): setattr(fasterfold.spread, k, f)
    return plan,count

def growth(
    kind:str,    # Of `kinds`
    depths:list, # Levels of each model
    turns:int,
    tick         # Called after each measurement
) -> list: # Rows of results
    "Plan models of one kind and several depths in turns"
    graphs = {d: traced(kind, d) for d in depths}
    timers = {d: timer('plan(graph)', clock=process_time, plan=plan_folds, graph=g) for d,g in graphs.items()} # what else the machine does is not counted
    res = in_turns(timers, turns, lambda t: t.blocked_autorange(min_run_time=0), tick)
    rows = []
    for d,g in graphs.items():
        plan,count = asked(g)
        rows.append(dict(kind=kind, levels=d, operations=len(g.ops), norms=plan.calls, folded=len(plan.folded), asked=count, **stats(res[d])))
    return rows

# ---- Folds that fail

class Branches(nn.Module):
    "The sum of `n` linear layers with a norm each; it adds 1 for each norm that is gone and in `failing`"
    def __init__(self, n, failing, width=8):
        super().__init__()
        self.failing = failing
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(n)])
    def forward(self, x): return sum(o(x)+(i in self.failing and not isinstance(o[-1], nn.BatchNorm1d)) for i,o in enumerate(self.branches))

def which(n): return dict(one={n//3}, half={*range(0, n, 2)}, all={*range(n)})

def proofs(
    n:int,      # Norms
    failing:set # Of them, those whose folds fail
) -> dict: # A row of results
    "Fold a model, and count how often the folded model is compared with the original"
    torch.manual_seed(0)
    model,sample = Branches(n, failing).eval(),(torch.randn(4, 8),)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d): nn.init.uniform_(m.weight, .5, 1.5)
    class _Counts(BN_Folder):
        count = 0
        def _check(self, *args):
            self.count += 1
            return super()._check(*args)
    folder = _Counts()
    start = process_time()
    folder.fold(model, sample)
    seconds = process_time()-start
    assert {int(o.norm.split('.')[1]) for o in folder.result.kept}==failing
    return dict(norms=n, failing=len(failing), proofs=folder.count, each=folder.count/len(failing), seconds=seconds)

# ---- The page

def figure(
    res:dict, # As in planning.json
    path:Path # Of the picture
):
    "Draw both, in colours that can be read on light and on dark pages"
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    gray = '#888888'
    with plt.rc_context({k: gray for k in ('text.color','axes.labelcolor','axes.edgecolor','xtick.color','ytick.color')} | {'svg.hashsalt':'planning','font.size':9}):
        fig,axs = plt.subplots(2, 3, figsize=(11,6.5), layout='constrained')
        *families,all_rules,all_proofs = axs.flat
        for ax,family in zip(families, ('add','cat','gate','diamond')):
            rows = {k: rs for (k,),rs in grouped(res['planning'], 'kind').items() if k.startswith(family)}
            for (k,rs),dash in zip(rows.items(), ('-','--','-.',':',(0,(6,2)),(0,(1,3)))):
                levels = [r['levels'] for r in rs]
                ax.plot(levels, [r['median']*1e3 for r in rs], ls=dash, marker='.', label=k)
                all_rules.plot(levels, [r['asked'] for r in rs], ls=dash, marker='.', color=f'C{families.index(ax)}', label=f'{family}s' if k==family else None)
            ax.set(title=f'{family}s: ms of CPU time to plan', xlabel='levels')
        all_rules.set(title='rules asked', xlabel='levels')
        for (k,),rs in grouped(res['proofs'], 'which').items(): all_proofs.plot([r['norms'] for r in rs], [r['proofs'] for r in rs], marker='.', label=f'fail: {k}')
        all_proofs.set(title='proofs', xlabel='norms')
        for ax in axs.flat:
            ax.set(xlim=(0,None), ylim=(0,1.3*ax.get_ylim()[1]))
            ax.legend(frameon=False, fontsize=7.5, loc='upper left')
        fig.savefig(path, transparent=True, metadata={'Date':None})
        plt.close(fig)

def page(
    res:dict # As in planning.json
) -> str:
    "The results as Markdown"
    parts = ['# How planning grows', f"{described(res['environment'])}. Times are CPU time. What each column counts is in benchmarks/README.md.", '![Rules asked, time to plan, and proofs](planning.svg)']
    def _power(rows, k): return f"{slope([r['levels'] for r in rows], [r[k] for r in rows]):.2f}" if len(rows)>1 else '–'
    def _row(kind, rows): return kind,*(r['asked'] for r in rows),_power(rows, 'asked'),*(ms(r['median']) for r in rows),_power(rows, 'median'),f"{rows[-1]['folded']} of {rows[-1]['norms']}"
    groups = grouped(res['planning'], 'kind')
    at = [r['levels'] for r in next(iter(groups.values()))]
    head = ['kind',*(f'rules asked, {n} levels' for n in at),'power',*(f'ms, {n} levels' for n in at),'power',f'folded, {at[-1]} levels']
    parts += ['## Levels', table(head, [_row(k, rows) for (k,),rows in groups.items()])]
    def _row(r): return r['norms'],r['failing'],r['proofs'],f"{r['each']:.1f}",ms(r['seconds'])
    return '\n\n'.join([*parts, '## Folds that fail', table(['norms','failing','proofs','proofs per failing norm','ms to fold'], map(_row, res['proofs']))]) + '\n'

@call_parse
def main(
    turns:int=5, # How often each measurement is taken
    quick:store_true=False, # Only try whether it runs: two turns, few levels?
    out:Path=results/'planning.json', # File to write; a page and a picture go beside it
):
    "Measure how planning grows, and write docs/results/planning.json, planning.md and planning.svg"
    torch.set_num_threads(1)
    turns,deep,many = (2,depths[:1],sizes[:1]) if quick else (turns,depths,sizes)
    res = dict(environment=environment(['torch','fasterfold']), planning=[], proofs=[])
    with tqdm(total=turns*len(kinds)*len(deep)+3*len(many)) as bar:
        for o in kinds:
            bar.set_postfix_str(o)
            res['planning'] += growth(o, deep, turns, bar.update)
        for n in many:
            for k,failing in which(n).items():
                bar.set_postfix_str(f'{k} of {n} norms')
                res['proofs'].append(dict(which=k, **proofs(n, failing)))
                bar.update()
    save(out, res, page)
    figure(res, out.with_suffix('.svg'))
