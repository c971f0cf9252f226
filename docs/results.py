"""The page of results, drawn from what the benchmarks wrote to docs/results: `zoo.json`, `latency-*.json`, `fold.json`, `planning.json`, `certify.json`, `random_folds.json`, `onnx.json` and `validation.json`.

Run as a script, it writes the same numbers as CSV beside them."""
import html, json, statistics, sys
from pathlib import Path
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
from common import by_variant, described, generic, grouped, helped, typical

names = {'fasterai':'fasterai', 'torch.fx':'torch.fx', 'aimet':'AIMET', 'torchao':'torchao', 'mct':'MCT', 'fasterfold':'fasterfold'}
returns = {'fasterai':'a copy of the model', 'torch.fx':'a traced graph', 'aimet':'the model, in place', 'torchao':'an exported graph, for the sizes of the sample',
    'mct':'a rebuilt graph, in float32', 'fasterfold':'the model, in place or a copy, with a way back'}
colors = {'fasterai':'#b0780f', 'torch.fx':'#9468d6', 'aimet':'#1f9494', 'torchao':'#d1524a', 'mct':'#7f8d1f', 'fasterfold':'#3987e5',
    'original':'#8a8984', 'no norms':'#8a8984', 'fasterfold channels_last':'#cf6a1c', 'fasterfold strip_identity':'#c2489b'}
zoos = 'timm','torchvision','fastai'

def load(path:Path): return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None

def table(head:list, rows:list, right:set=frozenset())->str:
    "A Markdown table; columns in `right` are numbers."
    cell = lambda s: str(s).replace('|', r'\|').replace('\n', ' ')
    line = lambda r: '| '+' | '.join(map(cell, r))+' |'
    return '\n'.join([line(head), line(['---:' if i in right else '---' for i in range(len(head))]), *map(line, rows)])

def sides(zoo:dict)->list: # Pairs (tools, models)
    "What can be compared: the tools that most models have been tried with, then all tools, if some have been tried on fewer; each time on the models with norms that all of them share."
    normed = [m for m in zoo['models'] if m.get('norms')]
    n = {t: sum(t in m.get('tools', {}) for m in normed) for t in names}
    both = dict.fromkeys(tuple(t for t in names if n[t]>least) for least in (max(n.values())/2, 0))
    return [(ts, [m for m in normed if set(ts)<=set(m['tools'])]) for ts in both if ts]

def removed(m:dict, tool:str)->int:
    "Norm calls that `tool` removed from `m`; none where it crashed or was wrong."
    t = m['tools'][tool]
    return m['norms']-t['norms'] if t['outcome']=='right' else 0

def share(ms:list, tool:str)->float: return sum(removed(m, tool) for m in ms)/max(sum(m['norms'] for m in ms), 1)
def count(ms:list, tool:str, outcome:str)->int: return sum(m['tools'][tool]['outcome']==outcome for m in ms)

def side_by_side(zoo:dict, tools:tuple, ms:list)->str:
    "A table in Markdown: how many norm calls are gone, how often a tool crashed, how often it was wrong."
    rows = []
    for z in zoos:
        some = [m for m in ms if m['collection'].split()[0]==z]
        if some: rows.append([f"norms removed, {z} ({len(some)} models, {sum(m['norms'] for m in some):,} norms)", *(f'{share(some, t):.0%}' for t in tools)])
    rows.append(['models it crashed on', *(count(ms, t, 'crash') for t in tools)])
    rows.append(['models it returned wrong', *(count(ms, t, 'wrong') for t in tools)])
    if any(count(ms, t, 'over') for t in tools): rows.append(['models too slow or too big for it', *(count(ms, t, 'over') for t in tools)])
    rows.append(['median time to fold', *(seconds(statistics.median(m['tools'][t]['seconds'] for m in ms if m['tools'][t]['outcome']=='right')) for t in tools)])
    rows.append(['what it gives back', *(returns[t] for t in tools)])
    rows = [[*r[:-1], f'**{r[-1]}**'] for r in rows]
    head = ['', *(f"{names[t]} {zoo['releases'].get(t, '')}".strip() for t in tools)]
    return table(head, rows, {*range(1, len(head))})

def counted(zoo:dict)->str:
    "How many models there are, and how many of them count."
    n,normed = len(zoo['models']),sum(bool(m.get('norms')) for m in zoo['models'])
    return (f"{n} models were folded: all of torchvision's, fastai's own, and of timm the smallest of each family. The {normed} of them that run batch norms are what counts here. "
        "A tool that crashes, or returns a model that computes something else, has removed none. Times are CPU time of one core; ours includes a proof, which the others leave to you."
        + (f" Norms of {zoo['earlier']} folds were counted again later; all times are of one run, on one machine." if zoo.get('earlier') else ''))

def comparison(zoo:dict|None)->str:
    "The tables of all tools, all of them together first."
    parts = sides(zoo) if zoo else []
    if not parts: return 'No tools have been compared yet: `make zoo` does it.'
    res = [counted(zoo)]
    for ts,ms in parts[::-1]:
        most = '' if len(parts)<2 or ts!=parts[-1][0] else f', none of more than {max(m["params"] for m in ms)/1e6:.0f} million parameters'
        res += [f"On {len(ms)} model{'s'*(len(ms)!=1)}{most}:", side_by_side(zoo, ts, ms)]
    return '\n\n'.join(res)

def _svg(parts:list, w:int, h:int, label:str, kind:str, limits:str='')->str:
    return (f'<svg class="{kind}"{limits} viewBox="0 0 {w} {h}" role="img" aria-label="{html.escape(label)}" font-family="system-ui,sans-serif" font-size="12" '
        f'fill="currentColor">{"".join(parts)}</svg>')

def curves(
    series:dict, # Tool to the share of norms that it removed from each model
    label:str, # What the picture shows, for those who do not see it
)->str:
    "A dot for each model and tool as SVG, each tool's models in the order of their shares."
    w,h,left,base = 560,250,44,212
    n = max(map(len, series.values()))
    def at(i, v): return left+(w-left-10)*(i+.5)/n, base-(base-14)*v
    res = [f'<text x="{left-6}" y="{at(0, v)[1]+4:.0f}" text-anchor="end">{v:.0%}</text><path d="M{left},{at(0, v)[1]:.1f} H{w-10}" stroke="currentColor" stroke-opacity=".2"/>' for v in (0,.5,1)]
    for t,vs in series.items():
        r = 2.6 if t=='fasterfold' else 1.8
        res += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colors[t]}"/>' for i,v in enumerate(sorted(vs)) for x,y in [at(i, v)]]
    step = (w-left)/len(series)
    res += [f'<circle cx="{left+6+i*step:.0f}" cy="{base+26}" r="4" fill="{colors[t]}"/><text x="{left+14+i*step:.0f}" y="{base+30}">{names[t]}</text>' for i,t in enumerate(series)]
    return _svg(res, w, h, label, 'bars', f' style="max-width:{w}px"')

def dots(
    rows:list, # Pairs (name, value by what it is)
    label:str, # What the picture shows, for those who do not see it
)->str:
    "A row for each name, and on it a dot for each value, which 1 is a line for, as SVG in the colours of the page."
    kinds = list(dict.fromkeys(k for _,vs in rows for k in vs))
    w,left,top = 560,max(210, 20+7*max(len(name) for name,_ in rows)),24*((len(kinds)+2)//3)+8
    high = max(1.1, *(v for _,vs in rows for v in vs.values()))
    def x(v): return left+(w-left-14)*v/high
    h = top+20*len(rows)+24
    res = [f'<path d="M{x(v):.1f},{top} V{h-22}" stroke="currentColor" stroke-opacity="{.6 if v==1 else .2}"/><text x="{x(v):.1f}" y="{h-6}" text-anchor="middle">{v:g}×</text>' for v in (0,.5,1)]
    res += [f'<circle cx="{8+i%3*(w/3):.0f}" cy="{14+24*(i//3)}" r="4" fill="{colors[k]}"/><text x="{18+i%3*(w/3):.0f}" y="{18+24*(i//3)}">{names.get(k, k)}</text>' for i,k in enumerate(kinds)]
    for i,(name,vs) in enumerate(rows):
        y = top+20*i+12
        res.append(f'<text x="{left-10}" y="{y+4}" text-anchor="end">{html.escape(name)}</text>')
        res += [f'<circle cx="{x(v):.1f}" cy="{y}" r="4" fill="{colors[k]}" fill-opacity=".85"/>' for k,v in vs.items()]
    return _svg(res, w, h, label, 'bars', f' style="max-width:{w}px"')

def details(summary:str, head:list, rows:list, right:set=frozenset())->str:
    "A long table, folded up."
    tr = lambda r,t: '<tr>'+''.join(f'<{t}{" class=num" if i in right else ""}>{html.escape(str(c))}</{t}>' for i,c in enumerate(r))+'</tr>'
    return (f'<details class="long"><summary>{html.escape(summary)}</summary><div class="scroll"><table><thead>{tr(head, "th")}</thead>'
        f'<tbody>{"".join(tr(r, "td") for r in rows)}</tbody></table></div></details>')

def again(script:str)->str: return f'Measured with `python benchmarks/{script}`.'

def kept(models:list, limit:int=12)->list:
    "Rows on the commonest reasons for which norms stay: how many calls, one of them, and where, in three models if there are so many."
    groups = {}
    for m in models:
        for norm,reason,calls in m['tools']['fasterfold'].get('kept', []): groups.setdefault(generic(reason), []).append((calls,reason,m['name'],norm))
    rows = sorted(groups.values(), key=lambda o: -sum(c for c,*_ in o))[:limit]
    def where(o):
        names = [f'{name}: `{norm}`' for _,_,name,norm in o]
        apart = {n.split(':')[0]:n for n in reversed(names)} # the first of each model
        return ', '.join(dict.fromkeys([*[*apart.values()][::-1], *names][:3]))
    return [[sum(c for c,*_ in o), o[0][1], where(o)] for o in rows]

def onnx_part(d:dict|None)->str:
    "How many norms are left in ONNX files."
    if not d: return 'Not measured yet: `python benchmarks/onnx_norms.py` does it.'
    rows = [r for r in d['files'] if r.get('norms')]
    tools,total = [*d['releases']],sum(r['norms'] for r in rows)
    def left(t): return sum(r['tools'][t]['norms'] if r['tools'][t]['outcome']=='right' else r['norms'] for r in rows)
    cells = [['norms left',*(f'{left(t):,}' for t in tools)], ['of all',*(f'{left(t)/max(total, 1):.0%}' for t in tools)],
        *([what,*(sum(r['tools'][t]['outcome']==o for r in rows) for t in tools)] for o,what in (('crash','models it crashed on'),('wrong','models it made wrong')))]
    said = (f"PyTorch's own exporter optimizes what it exports, and there are tools that optimize the file further. {len(rows)} models that it exports, none of more than {max((r['params'] for r in rows), default=0)/1e6:.0f} million parameters, "
        f"run {total:,} norms; these are left in the file as exported, after each tool, and when the model is folded before it is exported. A tool that crashes, or makes a file that computes something else, has removed none.")
    every = [[r['model'],r['norms'],*(_says(r, t) for t in tools)] for r in rows]
    return '\n\n'.join([said, table(['',*(f"{t} {d['releases'][t]}" for t in tools)], cells, {*range(1, len(tools)+1)}), described(d['environment'])+'. '+again('onnx_norms.py'),
        details(f'{len(rows)} models', ['model','norms',*tools], every, {*range(1, len(tools)+2)})])

def _says(m, tool):
    t = m['tools'].get(tool)
    return '' if t is None else str(t['norms']) if t['outcome']=='right' else t['outcome']

def zoo_part(zoo:dict|None)->str:
    if not zoo or not sides(zoo): return comparison(None)
    tried,ours = sides(zoo)[-1][0],[m for m in zoo['models'] if 'fasterfold' in m.get('tools', {})]
    parts = ["All tools folded the same models, with the same weights. Those are random, those of the norms included, so that a norm lost or counted twice shows. "
        "What is counted is norm *calls* in one forward pass. What exactly was measured is said in `benchmarks/README.md`.",
        comparison(zoo), again('zoo.py'), '### Norms removed, model by model']
    for ts,ms in sides(zoo)[::-1]:
        parts += [f"{len(ms)} models, from left to right by the share of their norms that a tool removed:",
            curves({t:[removed(m, t)/m['norms'] for m in ms] for t in ts}, 'Share of the norms of each model that each tool removed')]
    if any(m['tools']['fasterfold'].get('kept') for m in ours):
        parts += ['### Why norms stay', 'The commonest reasons for which fasterfold kept a norm, in the words of one of them. [Limits](limits.ipynb) explains them.', table(['norm calls','for example','layers'], kept(ours), {0})]
    rows = [[f"{m['collection']}/{m['name']}", m['norms'], *(_says(m, t) for t in tried)] for m in ours if m.get('norms')]
    parts += ['### Every model', details(f'Norm calls before and after, for {len(rows)} models', ['model','before',*(names[t] for t in tried)], rows, {*range(1, len(tried)+2)})]
    faults = [o for o in zoo.get('failed', [])]
    if faults:
        rows = [[f"{o['collection']}/{o['name']}", names.get(o['tool'], o['tool']), o['outcome'], (o.get('why') or '')[:160]] for o in faults]
        parts.append(details(f'What went wrong: {len(rows)} crashes, wrong folds, and runs over the limits', ['model','tool','outcome','with'], rows))
    return '\n\n'.join(parts)

def seconds(t:float|None)->str: return '–' if t is None else f'{t:.3g} s' if t>=1 else f'{t*1e3:.3g} ms' if t>=1e-3 else f'{t*1e6:.3g} µs'

def lines(
    series:dict, # Name to points (x, y); those of ours have a name that starts with 'f'
    xlabel:str,
    label:str, # What the picture shows, for those who do not see it
    show=seconds, # How to write a `y`
)->str:
    "Curves from the origin as SVG in the colours of the page."
    top_x,top_y = (max(p[i] for ps in series.values() for p in ps) for i in (0,1))
    w,h,left,base = 420,220,70,190
    at = lambda p: (left+(w-left-90)*p[0]/top_x, base-(base-14)*p[1]/top_y)
    res = [f'<path d="M{left},8 V{base} H{w-80}" fill="none" stroke="currentColor" stroke-opacity=".5"/>',
        f'<text x="{left-6}" y="22" text-anchor="end">{show(top_y)}</text><text x="{left-6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{(left+w-80)/2}" y="{base+28}" text-anchor="middle">{html.escape(xlabel)}</text><text x="{w-90}" y="{base+15}" text-anchor="middle">{top_x:,}</text>']
    for name,ps in series.items():
        color,opacity = ('#3987e5',1) if name.startswith('f') else ('currentColor',.6)
        pts = [at(p) for p in ps]
        res.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x,y in pts)}" fill="none" stroke="{color}" stroke-opacity="{opacity}" stroke-width="2"/>')
        res += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}" fill-opacity="{opacity}"/>' for x,y in pts]
        res.append(f'<text x="{pts[-1][0]+8:.1f}" y="{pts[-1][1]+4:.1f}">{html.escape(name)}</text>')
    return _svg(res, w, h, label, 'lines')

def latency_part(path:Path)->str:
    "Tables and bars of one device: each engine and type, then growth."
    d = load(path)
    parts = [f"### {'GPU' if 'cuda' in d['environment'] else 'CPU'}: {d['environment'].get('device', path.stem)}", described(d['environment'])+'.', again('latency.py')]
    for (engine,dtype),rows in grouped(d['latency'], 'engine', 'dtype').items():
        cols = list(dict.fromkeys(r['variant'] for r in rows))
        groups = by_variant(rows, 'model', 'batch')
        ratio = lambda r: '' if r is None else 'fails' if 'why' in r else f"{r['ratio'][1]:.2f}×"
        out = [[m, n, seconds(g[cols[0]].get('median')), *(ratio(g.get(c)) for c in cols[1:])] for (m,n),g in groups.items()]
        parts += [f'#### {engine}, {dtype}', table(['model','batch',*cols], out, set(range(1, len(cols)+2)))]
        if set(cols)=={'original','fasterfold'}: parts += filter(None, [helped(groups)])
        shown = [(f'{m}, batch {n}', {c:g[c]['ratio'][1] for c in cols[1:] if 'ratio' in g.get(c, {})}) for (m,n),g in groups.items()]
        if shown and engine=='eager': parts.append(dots(shown, f'Time by that of the original, {engine}, {dtype}'))
    pics = [lines({k:[(r[x], r[k]['median']) for r in d[x]] for k in ('original','folded')}, f'{what} of a plain chain', f'Latency against {x}')
        for x,what in (('depth','layers'),('width','channels')) if len(d.get(x, []))>1]
    return '\n\n'.join(parts+(['#### Growth', '<div class="pics">'+''.join(pics)+'</div>'] if pics else []))

def fold_part(d:dict|None)->str:
    "What folding itself costs."
    if not d: return 'Not measured yet: `python benchmarks/fold.py` does it.'
    parts = [described(d['environment'])+'. '+again('fold.py')]
    if rows := d.get('speed'):
        cols = list(dict.fromkeys(k for r in rows for k in r['seconds']))
        out = [[r['model'], r['input'][0], r['norms'], *(seconds(r['seconds'].get(c, {}).get('median')) for c in cols), f"{r['ratio'][1]:.2f}" if r['ratio'] else ''] for r in rows]
        parts += ['CPU time to fold. The last column compares folding *with* its proof to the fastest other tool and the two forward passes that it takes to check that one by hand.',
            table(['model','batch','norms',*cols,'ratio'], out, set(range(1, len(cols)+4)))]
        if said := typical(rows): parts.append(f'Median over the models: {said}.')
    if rows := d.get('memory'):
        mb = lambda n: f'{n/2**20:.1f}'
        parts += ['Memory to fold in place, in MB. The ratio is that of the peak to edited parameters and one forward pass.',
            table(['model','parameters','edited','forward pass','peak','ratio'], [[r['model'], *(mb(r[k]) for k in ('parameters','edited','forward','fold')), f"{r['ratio']:.2f}"] for r in rows], {1,2,3,4,5})]
    pics = [lines({'folding':[(r[x], r['median']) for r in d[x]]}, f'{what} of a plain chain', f'Time to fold against {x}') for x,what in (('depth','norms'),('width','channels')) if len(d.get(x, []))>1]
    return '\n\n'.join(parts+(['<div class="pics">'+''.join(pics)+'</div>'] if pics else []))

def planning_part(d:dict|None)->str:
    "How planning grows, and what folds that fail cost."
    if not d: return 'Not measured yet: `python benchmarks/planning.py` does it.'
    kinds = {k:rows for (k,),rows in grouped(d['planning'], 'kind').items()}
    pics = [lines({k:[(r['levels'], r['median']) for r in rows]}, 'levels', f'CPU time to plan against levels: {k}') for k,rows in kinds.items()]
    failed = {f'fail: {w}':[(r['norms'], r['proofs']) for r in rows] for (w,),rows in grouped(d['proofs'], 'which').items()}
    return '\n\n'.join([described(d['environment'])+'. '+again('planning.py'), 'CPU time to plan models of many levels, in which what one level makes is added to, joined with, or multiplied by what it got, or runs through two paths that meet again.',
        '<div class="pics">'+''.join(pics)+'</div>', 'Comparisons with the original until all is folded that can be, in models of which one norm, half of them, or all cannot.',
        '<div class="pics">'+lines(failed, 'norms', 'Proofs against norms', '{:,}'.format)+'</div>'])

def validation_part(d:dict|None)->str:
    "What validating the folded model after each epoch saves."
    if not d: return 'Not measured yet: `python benchmarks/validation.py` does it.'
    rows = [[r['batches'], *(seconds(r['seconds'][k]['median']) for k in ('without','with')), f"{r['ratio'][1]:.2f}×", seconds(r['again']['median'])] for r in d['validation']]
    return '\n\n'.join([described(d['environment'])+'. '+again('validation.py'), table(['batches of 64 images','without','with `FoldedValidation`','ratio','of it to fold again'], rows, {0,1,2,3,4})])

def certify_part(d:dict|None)->str:
    "How many models have a certificate, and what that costs."
    if not d: return 'Not measured yet: `python benchmarks/certify.py` does it.'
    rows = [r for r in d['certificates'] if r.get('norms')]
    free = [r for r in rows if r['free']]
    done = [r for r in free if r['verdict']=='proved']
    if not rows: return 'No model has been measured yet.'
    said = (f"Of {len(rows)} models of which norms fold, {sum(r['exports'] for r in rows)} can be exported, {len(free)} of them with free sizes, and of those {len(done)} ({len(done)/max(len(free), 1):.0%}) are "
        f"proved to compute the same for every input of all those sizes. {sum(r['verdict']=='not the same' for r in rows)} are said to be not the same. Exporting both models took {seconds(statistics.median(r['export'] for r in rows))}, "
        f"comparing them {seconds(statistics.median(r['proof'] for r in rows))}, at the median, of one core.")
    if asked := [r['onnxsim'] for r in rows if 'proved' in r.get('onnxsim', ())]:
        said += (f" [onnxsim](https://github.com/onnxsim/onnxsim) has a prover by SMT for its own simplifications. Shown {len(asked)} of these pairs as ONNX files of one size, for inputs from -3 to 3, "
            f"it proves {sum(o['proved'] for o in asked)}, says of {sum(o['refuted'] for o in asked)} that they are not the same, and leaves the others open, mostly since a part is too large to be solved.")
    out = [[r['model'], r['norms'], ', '.join(r['free']), r['verdict'], f"{r['export']:.1f}", f"{r['proof']:.2f}", r['why'] if r['verdict']!='proved' else ''] for r in rows]
    tried = [[o['what'], f"{o['tried']:,}", f"{o['proved']:,}", f"{o['wrong']:,}"] for o in d.get('tried', ())]
    tried = ['How it was tried to get a wrong one: changed weights and operations by `CERTIFY=1 python -m pytest -s tests/test_certify.py`, of which this is what it printed, random networks by `python benchmarks/random_networks.py`.', table(['what was certified','how many','proved','wrongly'], tried, {1,2,3})] if tried else []
    return '\n\n'.join([described(d['environment'])+'. '+again('certify.py'), said, *tried, details(f'{len(rows)} models', ['model','norms folded','free','verdict','s to export both','s to compare','why'], out, {1,4,5})])

def dozen(d:dict|None)->str:
    "What folding is worth for models that people use, on the CPU: the first table of the README."
    if not d or 'models' not in d: return 'Not measured yet: `python benchmarks/latency.py` does it.'
    engines = [k for k in ('torch.compile','onnxruntime','OpenVINO') if any(r['engine']==k for r in d['latency'])]
    found = {(r['model'],r['engine'],r['variant']):r for r in d['latency'] if r['batch']==1 and r['dtype']=='float32'}
    shown = {m:o for m,o in d['models'].items() if any((m,e,'fasterfold') in found for e in engines)}
    noise = {e:max((abs(r['ratio'][1]-1) for m,o in shown.items() if not o['folded'] for r in [found[m,e,'fasterfold']] if 'ratio' in r), default=0) for e in ('eager',*engines)}
    def cell(m, engine, variant):
        if (r := found.get((m,engine,variant))) is None: return '–'
        if 'ratio' not in r: return 'fails'
        lo,mid,hi = r['ratio']
        return f'{mid:.2f}×' if (hi<1 or lo>1) and abs(mid-1)>max(noise[engine], .005) else 'same'
    rows = []
    for m,o in shown.items():
        a,b = o['parameters']
        n = o['folded']+o['kept']
        rows.append([m, f"{o['folded']} of {n}" if n else 'none', (f'{a/1e6:.2f} M' if a>=1e5 else f'{a/1e3:.1f} k')+f', {100*(b-a)/a:+.2f} %'*(a!=b), *(cell(m, 'eager', v) for v in ('fasterfold','fasterfold channels_last')), *(cell(m, e, 'fasterfold') for e in engines)])
    called = {e:e for e in noise}|dict(onnxruntime='ONNX Runtime')
    head = ['','norms folded','parameters','folded','and `channels_last`',*(called[e] for e in engines)]
    said = ("Time of one call with one item, by that of the original in the same engine; less than 1 is faster. *Same*: 1 lies in the middle half of the turns, or is no further off than for models of which nothing folds "
        f"({', '.join(f'{called[e]} {n:.0%}' for e,n in noise.items() if n>.005)}); –: no such weights; *fails*: could not be exported, folded or not. {described(d['environment'])}.")
    return f"{table(head, rows, set(range(1, len(head))))}\n\n{said}"

def random_part(d:dict|None)->str:
    "How many networks that nobody wrote are right when they are folded."
    if not d: return 'No random networks have been folded yet: `python benchmarks/random_folds.py` does it.'
    o, = d['folds']
    said = (f"{o['tried']:,} random networks were folded with the proof and without: layers, functions, views, writes in place, pads and sums that depend on the size, Python numbers and routes by an argument, put together at random, "
        f"with {o['folded']+o['kept']:,} norms, of which {o['folded']:,} fold. Each ran on its sample and on other values, another batch, other sizes and other arguments, and was compared with the original in float64.")
    said += f" {len(d['wrong'])} computed something else"+f", and {o['over']} took too much time or memory to be judged."*bool(o['over'])+'.'*(not o['over'])
    wrong = [table(['seed','why'], [[r['seed'],r['why']] for r in d['wrong']], {0})] if d['wrong'] else []
    return '\n\n'.join([said+f" {described(d['environment'])}; digest of the code {o['code']}. "+again('random_folds.py'), *wrong])

proofs = """| | for which inputs | by what |
| --- | --- | --- |
| every fold | the sample, and inputs of another batch, size, type and value as far as the model takes them; the report lists them | both models run, and the distance is judged against the original's own rounding |
| `certify`, on request | all of the sizes that the export leaves free, and all values | arithmetic on the weights of both programs, operation by operation; it knows nothing of how they were folded |
| the zoo above | one sample for each model | the same fold in float64, where a right one is off by about 1e-14 |
| where it gets faster | one machine, one release of each engine | measured; it may be otherwise on yours: `fasterfold bench` |"""

def to_csv(
    folder:Path, # With the JSON of the benchmarks; one CSV is written beside each
):
    "The numbers as tables, a row for each measurement."
    parts = dict(fold='speed', planning='planning', certify='certificates', validation='validation', onnx='files', random_folds='folds')
    for f in sorted(folder.glob('*.json')):
        d = load(f)
        rows = d['latency'] if f.stem.startswith('latency') else d['models'] if f.stem=='zoo' else d[parts[f.stem]]
        if f.stem=='zoo': rows = [{k:v for k,v in m.items() if k!='tools'}|dict(tool=t)|{k:v for k,v in r.items() if k!='kept'} for m in rows for t,r in m['tools'].items()]
        pd.json_normalize(rows).to_csv(f.with_suffix('.csv'), index=False)

def page(
    folder:Path, # Where the benchmarks write
)->str: # Markdown
    "The page of results: whatever is there."
    timed = '\n\n'.join(map(latency_part, sorted(folder.glob('latency-*.json'))))
    says = 'Times are medians, measured in turns; the column of the original is the time of one call, the others are its multiples: less than 1 is faster. "no norms" is the same network built without any.'
    parts = ['# Results', '> What folding is worth, measured on public models, side by side with other tools.', '## How many norms go', zoo_part(load(folder/'zoo.json')), '### In ONNX files', onnx_part(load(folder/'onnx.json')),
        '## What is proved, and what is tested', proofs, random_part(load(folder/'random_folds.json')), '## How much faster', '### Models that people use', dozen(load(folder/'latency-cpu.json')), *([says,timed] if timed else ['No latency has been measured yet: `make bench` does it.']), '## What folding costs', fold_part(load(folder/'fold.json')),
        '### How planning grows', planning_part(load(folder/'planning.json')),
        '## What is certified', certify_part(load(folder/'certify.json')),
        '## What folded validation saves', validation_part(load(folder/'validation.json'))]
    return '\n\n'.join(parts)+'\n'

if __name__ == '__main__': to_csv(Path(__file__).resolve().parent/'results')
