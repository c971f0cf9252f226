"Draw a traced network: one box for each layer or operation, as data flows through it"
import html
from fasterfold.trace import Graph

_fill = dict(norm='rgba(230,126,34,.35)', takes='rgba(57,135,229,.32)')

def boxes(
    graph:Graph, # A traced forward pass
)->tuple: # Box of each operation by its index (name, label), and arrows between boxes
    "Operations as boxes; those of one call of a layer share one."
    box = {}
    for o in graph.ops:
        if all(v.const for v in o.inputs): continue
        leaf = o.call is not None and o.call.name and not o.call.children
        box[o] = (id(o.call), o.call.name, type(o.call.module).__name__) if leaf else (o.index, '', o.name)
    arrows = [(box[v.op], box[o]) for o in graph.ops if o in box for v in o.inputs if v.op in box and box[v.op]!=box[o]]
    return list(dict.fromkeys(box.values())), list(dict.fromkeys(arrows))

def layout(
    nodes:list, # Boxes in order of execution
    arrows:list, # Pairs of boxes
)->dict: # Box to (column, row)
    "Each box below all that it reads, and beside those of its row."
    row,taken,at = {},{},{}
    for n in nodes: row[n] = 1+max([row[a] for a,b in arrows if b==n], default=-1)
    for n in nodes:
        at[n] = taken.get(row[n], 0),row[n]
        taken[row[n]] = at[n][0]+1
    return at

def draw(
    graph:Graph, # A traced forward pass
    marks:dict=None, # Name of a layer to what it is: 'norm' (goes away) or 'takes' (takes one up)
    title:str='', # Written above
)->str: # SVG in the colours of the page
    "A picture of `graph`, from top to bottom."
    nodes,arrows = boxes(graph)
    at,w,h,dx,dy = layout(nodes, arrows),132,34,146,50
    x,y = (lambda n: 8+at[n][0]*dx),(lambda n: 30+at[n][1]*dy)
    cols,rows = (1+max(p[i] for p in at.values()) for i in (0,1))
    skips = any(at[b][1]-at[a][1]>1 for a,b in arrows)
    width,height = cols*dx+(26 if skips else 0)+4,rows*dy+34
    res = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}" '
        'style="max-width:100%;height:auto" font-family="system-ui,sans-serif" fill="currentColor">',
        f'<text x="{8+w/2}" y="16" font-size="13" font-weight="600" text-anchor="middle">{html.escape(title)}</text>']
    for a,b in arrows:
        x1,y1,x2,y2 = x(a)+w/2,y(a)+h,x(b)+w/2,y(b)
        far = at[b][1]-at[a][1]>1 and at[a][0]==at[b][0]==0
        out = cols*dx+10
        d = f'M{x(a)+w},{y1-h/2} C{out+16},{y1-h/2} {out+16},{y2+h/2} {x(b)+w+3},{y2+h/2}' if far else f'M{x1},{y1} C{x1},{y1+dy/3:.0f} {x2},{y2-dy/3:.0f} {x2},{y2-3}'
        tip = f'M{x(b)+w+1},{y2+h/2} l7,-4 v8z' if far else f'M{x2},{y2-1} l-4,-7 h8z'
        res.append(f'<path d="{d}" fill="none" stroke="currentColor" stroke-opacity=".55" stroke-width="1.3"/><path d="{tip}" fill-opacity=".7"/>')
    for n in nodes:
        _,name,kind = n
        fill = _fill.get((marks or {}).get(name), 'rgba(128,128,128,.12)')
        res.append(f'<rect x="{x(n)}" y="{y(n)}" width="{w}" height="{h}" rx="5" style="fill:{fill}" stroke="currentColor" stroke-opacity=".35"/>')
        lines = [(kind, 12, '')]+([(name, 10.5, ' fill-opacity=".8"')] if name else [])
        for i,(s,size,op) in enumerate(lines):
            res.append(f'<text x="{x(n)+w/2}" y="{y(n)+(21 if len(lines)==1 else 15+13*i)}" font-size="{size}" text-anchor="middle"{op}>{html.escape(s)}</text>')
    return ''.join(res)+'</svg>'

def beside(*svgs)->str: return f'<div style="display:flex;flex-wrap:wrap;gap:2.5rem;align-items:flex-start">{"".join(svgs)}</div>'
