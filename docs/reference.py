"The reference: of each name that notebooks export its signature, what each argument is, and an example"
import ast, inspect, os, re
from collections import namedtuple
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
import nbformat
from fastcore.docments import docments
from pages import anchor, code_cell, exported, methods, notebook, public, relink, rooms, root

def _default(value):
    "The default of a field as one would write it."
    if not isinstance(value, ast.Call) or getattr(value.func, 'id', '')!='field': return value
    given = {o.arg:o.value for o in value.keywords}
    return given.get('default') or 'default_factory' in given and ast.Call(given['default_factory'], [], []) or None

def _params(tree, obj):
    "Parameters of a function, or fields of a dataclass, in order: triples (name, annotation, default) as written, with `*` and `/` as names."
    f = tree if isinstance(tree, ast.FunctionDef) else next((o for o in tree.body if getattr(o, 'name', '')=='__init__'), None)
    text = lambda o: None if o is None else ast.unparse(o)
    if f is None: return [(o.target.id, text(o.annotation), text(_default(o.value))) for o in tree.body if isinstance(o, ast.AnnAssign) and o.target.id[0]!='_']
    a = f.args
    pos = a.posonlyargs+a.args
    res = [(o.arg, text(o.annotation), text(d)) for o,d in zip(pos, [None]*(len(pos)-len(a.defaults))+a.defaults)]
    if a.posonlyargs: res.insert(len(a.posonlyargs), ('/', None, None))
    if a.vararg: res.append(('*'+a.vararg.arg, text(a.vararg.annotation), None))
    only = [(o.arg, text(o.annotation), text(d)) for o,d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: # what `delegates` found behind it
        known = {n for n,*_ in res+only}
        more = [p for p in inspect.signature(obj).parameters.values() if p.name not in known and p.kind is p.KEYWORD_ONLY]
        only += [(p.name, None if p.annotation is p.empty else inspect.formatannotation(p.annotation).replace('torch.nn.modules.module', 'nn'), repr(p.default)) for p in more]
    if only and not a.vararg: res.append(('*', None, None))
    res += only
    if a.kwarg and not more: res.append(('**'+a.kwarg.arg, text(a.kwarg.annotation), None))
    return [o for o in res if o[0] not in ('self','cls')]

def _fenced(doc):
    "Docstring `doc` with its examples as blocks of code, as Markdown has them."
    return re.sub('^>>> .*(?:\\n.+)*', lambda m: f'```pycon\n{m[0]}\n```', doc, flags=re.M)

def table(
    heads:tuple, # Of the columns
    rows:list, # Of cells, Markdown
)->str: # Markdown, which a phone shows as a list
    "A table in which a phone shows each row as a paragraph."
    return '\n'.join([':::{container} args', *(f"| {' | '.join(o)} |" for o in (heads, ['---']*len(heads), *rows)), ':::'])

def arguments(
    heads:tuple, # Of the columns
    rows:list, # Of name, type, default, and what it is
)->str: # Markdown
    "The name, type and default of each as code."
    code = lambda o: '`'+o.replace('|', r'\|')+'`' if o else ''
    return table(heads, [(n if n=='returns' else code(n), code(t), code(d), what) for n,t,d,what in rows])

def document(
    name:str, # Dotted name
    tree, # Its syntax tree
    obj, # The object itself
    level:int=3, # Of its heading
    more:str='', # What else to say at the end, Markdown
)->str: # Markdown
    "Heading, signature, docstring, and a table of the parameters that have a docment."
    params,doc = _params(tree, obj),docments(obj, full=True, args_kwargs=True)
    sig = [n if d is None else f'{n}={d}' for n,_,d in params]
    is_prop = any(getattr(o, 'id', '') in ('property','cached_property') for o in getattr(tree, 'decorator_list', []))
    head = name if is_prop else f"{name}({', '.join(sig)})"
    if len(head)>88: head = f'{name}(\n    ' + ',\n    '.join(sig) + ')'
    ret = getattr(tree, 'returns', None)
    if ret is not None: head += ' -> ' + ast.unparse(ret)
    say = lambda n: ((doc.get(n.lstrip('*')) or {}).get('docment') or '').replace('\n', ' ').replace('|', r'\|')
    rows = [(n, t, d, say(n)) for n,t,d in params if n not in ('*','/')]
    if say('return'): rows.append(('returns', ret and ast.unparse(ret), None, say('return')))
    parts = [f'<span id="{anchor(name)}"></span>', f"{'#'*level} {name}", f'```python\n{head}\n```', _fenced(ast.get_docstring(tree)),
        arguments(('argument','type','default','what it is'), rows) if any(o[-1] for o in rows) else '', more]
    return '\n\n'.join(filter(None, parts))

def command_line(
    name:str, # A command
    level:int=3, # Of its heading
    more:str='', # What else to say at the end, Markdown
)->str: # Markdown
    "What `fasterfold NAME --help` says."
    import typer
    from fasterfold.cli import app
    cmd = typer.main.get_command(app).commands[name]
    option = lambda p: p.opts[0].startswith('-')
    usage = ' '.join([f'fasterfold {name}', *(p.metavar if p.required else f'[{p.metavar}]' for p in cmd.params if not option(p)), '[OPTIONS]'])
    said = lambda o: re.sub(r'(?<!\w)(--[a-z][\w-]*|[\w.]*\w\(\)|\.[a-z]\w+\b)', r'`\1`', o) # options, calls and endings as code
    def row(p):
        named,default = (', '.join(p.opts),p.metavar) if option(p) else (p.metavar,None),None if p.default in (None,False,Ellipsis) else str(p.default)
        return *named,default,said(p.help)
    lines = re.sub(r'\\\[', '[', cmd.epilog.partition('[/b]')[2]).strip().split('\n\n') # examples, and sentences about them
    shell = [o for o in lines if o.startswith('fasterfold ')]
    parts = [f'<span id="{anchor(name)}"></span>', f"{'#'*level} fasterfold {name}", f'```text\n{usage}\n```', said(cmd.help), '```sh\n'+'\n'.join(shell)+'\n```',
        *(said(o) for o in lines if o not in shell), arguments(('option','value','default','what it is'), map(row, cmd.params)), more]
    return '\n\n'.join(parts)

Name = namedtuple('Name', 'name page home public line') # its page in the reference, the notebook it is made in, whether users call it, what it does in a line

def is_public(
    name:str, # Dotted name
    room:str, # Its module
): # Is it for users? What `fasterfold.all` brings, methods of learners, and commands
    from fasterfold.all import __all__ as shown
    return name.partition('.')[0] in (*shown,'Learner') or (room,name) in _commands()

@cache
def _commands():
    from fasterfold.cli import app
    return {('cli',c.callback.__name__) for c in app.registered_commands}

@cache
def names()->list: # Of `Name`
    "All documented names, as the site's pages have them."
    res = []
    for r in rooms():
        for c in filter(exported, r.cells):
            for name,tree in public(c):
                all = [(name,tree)] + [(f'{name}.{m.name}',m) for m in methods(tree)]
                res += [Name(n, r.page, r.home, is_public(n, r.name), ast.get_docstring(t).split('\n\n')[0].replace('\n', ' ')) for n,t in all]
    return res

def api_names()->dict: # Name to (page, for users?, notebook); where modules share a name, that which users call
    return {o.name:(o.page, o.public and o.page!='api/cli', o.home) for o in sorted(names(), key=lambda o: o.public)}

def example(
    cells, # Those that follow where `name` is exported
    name:str, # Dotted name
): # The first one before the next export that uses it, shows something, and is no test
    for c in cells:
        if exported(c): return
        if c.cell_type=='code' and c.outputs and 'hide' not in c.directives_ and re.search(rf"\b{name.split('.')[-1]}\(", c.source) and not re.search(r'\btest_|\bassert\b|\bmock\b', c.source): return c

def documented(
    room, # A `Room`
)->list: # Triples (for users?, Markdown, example or None), one for each name, methods with their class
    mod,res = import_module(f'fasterfold.{room.name}'),[]
    for i,c in enumerate(room.cells):
        if not exported(c): continue
        for name,tree in public(c):
            obj,known = reduce(getattr, name.split('.'), mod),is_public(name, room.name)
            more = f'<p class="more"><a href="{os.path.relpath(room.home, Path(room.page).parent)}.html#{anchor(name, "src")}">Source, and how it is tried</a></p>'
            md = command_line(name, 2, more) if (room.name,name) in _commands() else document(name, tree, obj, 2, more)
            parts = [md] + [document(f'{name}.{m.name}', m, getattr(obj, m.name), 3) for m in methods(tree)]
            res.append((known, '\n\n'.join(parts), example(room.cells[i+1:], name) if known else None))
    return res

def reference(
    room, # A `Room`
)->nbformat.NotebookNode|None: # Its page in the reference, if there is something to say
    "What users call first, then the rest."
    from fasterfold import _home, __all__ as plain
    docs = documented(room)
    if not docs: return None
    mine = [k for k,v in _home.items() if v==room.name]
    how = f"from fasterfold{'' if set(mine)<={*plain} else '.all'} import {', '.join(mine)}" if mine else 'from fasterfold.all import *' if any(k for k,*_ in docs) and room.name!='cli' else ''
    title = 'Command line: fasterfold' if room.name=='cli' else f'fasterfold.{room.name}'
    about = re.search('^> .*', room.cells[0].source, re.M)[0]
    cells = ['\n\n'.join(filter(None, [f'# {title}', relink(about, room.path.relative_to(root), Path(room.page)), f'```python\n{how}\n```' if how else '']))]
    for known in (True,False):
        part = [o for o in docs if o[0]==known]
        if part and not known: cells.append(f"*{'What follows is' if len(part)<len(docs) else 'All of this is'} internal: import it from `fasterfold.{room.name}`. It may change with any release.*")
        for _,md,shown in part:
            cells.append(md)
            if shown is not None: cells += ['For example:', shown]
    return notebook([nbformat.v4.new_markdown_cell(o) if isinstance(o, str) else code_cell(o) for o in cells])

def _row(o, *more):
    "The name, `more`, and what it does."
    link = f"<a href=\"{o.page[4:]}.html#{anchor(o.name)}\"><code>{'fasterfold '*(o.page=='api/cli' and o.public)}{o.name}</code></a>"
    return link,*more,o.line.replace('|', r'\|')

def overview()->str: # Markdown
    "What users call, module by module."
    shown = [o for r in rooms() for o in names() if o.public and o.page==r.page]
    kinds = {'Methods of a learner':[o for o in shown if o.name.startswith('Learner.')], 'Commands':[o for o in shown if o.page=='api/cli']}
    kinds = {'Functions, classes and callbacks':[o for o in shown if not any(o in v for v in kinds.values())]} | kinds
    parts = [f"## {k}\n\n{table(('name','what it does'), map(_row, v))}" for k,v in kinds.items()]
    return '\n\n'.join(['# API reference', '> Each name that users call: signature, what each argument is, what is raised, and an example.',
        '`from fasterfold import BN_Folder` is for any PyTorch model. `from fasterfold.all import *` brings all of it, and gives learners their methods. '
        'All names there are, those of the inside too, stand in the [index of names](names.md).', *parts])

def index()->str: # Markdown
    "All names, A to Z, each by its last part."
    last = lambda o: o.name.split('.')[-1].lower()
    parts = ['---\nnosearch: true\n---', '# Index of names', '> All functions, classes and methods, A to Z, methods by their own name.']
    for k in sorted({last(o)[0] for o in names()}):
        mine = sorted((o for o in names() if last(o)[0]==k), key=lambda o: (last(o), o.name))
        parts += [f'## {k.upper()}', table(('name','module','what it does'), [_row(o, o.page[4:].replace('/', '.')) for o in mine])]
    return '\n\n'.join(parts)

def internals(
    of:list, # Of `Room`, those without anything for users
    tree:str, # Their place in the sidebar, Markdown
)->str: # Markdown
    "The inner modules, in the order in which they build on each other."
    rows = [(f'[{r.name}]({r.page[4:]}.ipynb)', re.search('^> (.*)', r.cells[0].source, re.M)[1]) for r in of]
    return '\n\n'.join(['# Internals', '> Modules that users need not know. Their names may change with any release.',
        table(('module','what it is'), rows), tree])
