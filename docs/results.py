"""The page of results, drawn from what the benchmarks wrote to docs/results

`zoo.json` is what `benchmarks/zoo.py` writes. Each `latency-*.json` has `device`, `threads`, `versions` (a dict), and `rows`: dicts with
`model`, `batch`, `engine` ('eager', …), `name` (what was timed; the first of a model is what the others are compared with), `median` and `iqr`
in seconds, and `ratio`. A `note` may say more."""
import html, json
from itertools import groupby
from pathlib import Path

names = {'fasterai':'fasterai', 'torch.fx':'torch.fx', 'aimet':'AIMET', 'fasterfold':'fasterfold'}
zoos = 'timm','torchvision','fastai'

def load(path:Path): return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None

def table(head:list, rows:list, right:set=frozenset())->str:
    "A Markdown table; columns in `right` are numbers."
    cell = lambda s: str(s).replace('|', r'\|').replace('\n', ' ')
    line = lambda r: '| '+' | '.join(map(cell, r))+' |'
    return '\n'.join([line(head), line(['---:' if i in right else '---' for i in range(len(head))]), *map(line, rows)])

def common(zoo:dict)->list:
    "The models with norms that all tools have been tried on."
    return [m for m in zoo['models'] if m.get('norms') and set(names)<=set(m.get('tools', {}))]

def removed(m:dict, tool:str)->int:
    "Norm calls that `tool` removed from `m`; none where it crashed or was wrong."
    t = m['tools'][tool]
    return m['norms']-t['norms'] if t['outcome']=='right' else 0

def share(ms:list, tool:str)->float: return sum(removed(m, tool) for m in ms)/max(sum(m['norms'] for m in ms), 1)
def count(ms:list, tool:str, outcome:str)->int: return sum(m['tools'][tool]['outcome']==outcome for m in ms)

def comparison(zoo:dict|None)->str:
    "The table of all tools in Markdown: how many norm calls are gone, how often a tool crashed, how often it was wrong."
    ms = common(zoo) if zoo else []
    if not ms: return 'No tools have been compared yet: `make zoo` does it.'
    rows = []
    for z in zoos:
        some = [m for m in ms if m['collection']==z]
        if some: rows.append([f"norms removed, {z} ({len(some)} models, {sum(m['norms'] for m in some):,} norms)", *(f'{share(some, t):.0%}' for t in names)])
    rows.append(['models it crashed on', *(count(ms, t, 'crash') for t in names)])
    rows.append(['models it returned wrong', *(count(ms, t, 'wrong') for t in names)])
    if any(count(ms, t, 'over') for t in names): rows.append(['models too slow or too big for it', *(count(ms, t, 'over') for t in names)])
    rows = [[*r[:-1], f'**{r[-1]}**'] for r in rows]
    head = ['', *(f"{n} {zoo['releases'].get(t, '')}".strip() for t,n in names.items())]
    return table(head, rows, {1,2,3,4})

def bars(groups:list, show, label:str, top:float=None)->str:
    "Horizontal bars as SVG in the colours of the page: `groups` are pairs (heading, [(name, value, is it ours?)])."
    top = top or max((v for _,rows in groups for _,v,_ in rows), default=1)
    y,res,width,left = 0,[],640,190
    for head,rows in groups:
        y += 26
        res.append(f'<text x="0" y="{y-8}" font-weight="600">{html.escape(head)}</text>')
        for name,v,ours in rows:
            w = max(1, (width-left-70)*v/top)
            res.append(f'<text x="{left-8}" y="{y+13}" text-anchor="end">{html.escape(name)}</text><rect x="{left}" y="{y+2}" width="{w:.1f}" height="14" rx="2" '
                f'fill="{"#3987e5" if ours else "currentColor"}" fill-opacity="{.9 if ours else .35}"/><text x="{left+w+6:.1f}" y="{y+13}">{html.escape(show(v))}</text>')
            y += 20
    return (f'<svg class="bars" viewBox="0 0 {width} {y+6}" role="img" aria-label="{html.escape(label)}" font-family="system-ui,sans-serif" font-size="12" '
        f'fill="currentColor">{"".join(res)}</svg>')

def details(summary:str, head:list, rows:list, right:set=frozenset())->str:
    "A long table, folded up."
    tr = lambda r,t: '<tr>'+''.join(f'<{t}{" class=num" if i in right else ""}>{html.escape(str(c))}</{t}>' for i,c in enumerate(r))+'</tr>'
    return (f'<details class="long"><summary>{html.escape(summary)}</summary><div class="scroll"><table><thead>{tr(head, "th")}</thead>'
        f'<tbody>{"".join(tr(r, "td") for r in rows)}</tbody></table></div></details>')

def _says(m, tool):
    t = m['tools'].get(tool)
    return '' if t is None else str(t['norms']) if t['outcome']=='right' else t['outcome']

def zoo_part(zoo:dict|None)->str:
    if not zoo or not common(zoo): return comparison(None)
    ms = common(zoo)
    groups = [(z, [(n, share(some, t), t=='fasterfold') for t,n in names.items()]) for z in zoos if (some := [m for m in ms if m['collection']==z])]
    parts = [f"All tools folded the same {len(ms)} models, with the same weights. Those are random, those of the norms included, so that a norm lost or counted twice shows. "
        "What is counted is norm *calls* in one forward pass; a tool that crashes, or returns a model that computes something else, has removed none. "
        "What exactly was measured, and how to measure it again, is said in `benchmarks/README.md`.",
        comparison(zoo), '### Norms removed', bars(groups, lambda v: f'{v:.0%}', 'Share of norms removed by each tool', 1)]
    ours = [m for m in zoo['models'] if 'fasterfold' in m.get('tools', {})]
    if zoo.get('reasons'):
        rows = [[o['calls'], o['reason'], ', '.join(o['models'][:3])+(f" and {len(o['models'])-3} more" if len(o['models'])>3 else '')] for o in zoo['reasons'][:12]]
        parts += ['### Why norms stay', 'The commonest reasons for which fasterfold kept a norm, with names of layers left out. [Limits](limits.ipynb) explains them.',
            table(['norm calls','reason','in'], rows, {0})]
    rows = [[f"{m['collection']}/{m['name']}", m['norms'], *(_says(m, t) for t in names)] for m in ours if m.get('norms')]
    parts += ['### Every model', details(f'Norm calls before and after, for {len(rows)} models', ['model','before',*names.values()], rows, {1,2,3,4,5})]
    faults = [o for o in zoo.get('failed', [])]
    if faults:
        rows = [[f"{o['collection']}/{o['name']}", names.get(o['tool'], o['tool']), o['outcome'], (o.get('why') or '')[:160]] for o in faults]
        parts.append(details(f'What went wrong: {len(rows)} crashes, wrong folds, and runs over the limits', ['model','tool','outcome','with'], rows))
    return '\n\n'.join(parts)

def seconds(t:float)->str: return f'{t*1e3:.3g} ms' if t>=1e-3 else f'{t*1e6:.3g} µs'

def latency_part(path:Path)->str:
    d = load(path)
    where = f"{d['device']}, {d['threads']} thread{'s'*(d['threads']!=1)}"
    parts = [f'### {where}', ', '.join(f'{k} {v}' for k,v in d['versions'].items())+'.' , d.get('note', '')]
    key = lambda r: (r.get('engine', 'eager'), r['batch'])
    for (engine,batch),rows in groupby(sorted(d['rows'], key=key), key):
        rows = list(rows)
        models = list(dict.fromkeys(r['model'] for r in rows))
        cols = list(dict.fromkeys(r['name'] for r in rows))
        at = {(r['model'],r['name']):r for r in rows}
        say = lambda r: '' if r is None else r.get('failed') or (f"{seconds(r['median'])}" if r['name']==cols[0] else f"{r['ratio']:.2f}×")
        parts += [f'#### {engine}, batch {batch}', table(['model', *cols], [[m, *(say(at.get((m,c))) for c in cols)] for m in models], set(range(1, len(cols)+1))),
            bars([(m, [(c, at[m,c]['ratio'], 'fasterfold' in c or 'folded' in c) for c in cols if (m,c) in at and 'ratio' in at[m,c]]) for m in models],
                lambda v: f'{v:.2f}×', f'Time of each model by that of the first, {engine}, batch {batch}')]
    return '\n\n'.join(filter(None, parts))

def page(
    folder:Path, # Where the benchmarks write
)->str: # Markdown
    "The page of results: whatever is there."
    timed = sorted(folder.glob('latency-*.json'))
    lat = '\n\n'.join(map(latency_part, timed)) or 'No latency has been measured yet: `make bench` does it.'
    return '\n\n'.join(['# Results', '> What folding is worth, measured on public models, side by side with other tools.',
        '## How many norms go', zoo_part(load(folder/'zoo.json')), '## How much faster', 'Times are medians, measured in turns. The first column is the time of one call; the others are its multiples, '
        'so that less than 1 is faster.' if timed else '', lat])+'\n'
