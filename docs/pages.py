"Notebooks as pages of the site: nbdev's processors, and documentation where code is exported"
import ast, inspect, os, re
from functools import reduce
from importlib import import_module
from pathlib import Path
import nbformat
from fastcore.docments import docments
from fastcore.nbio import mk_cell
from nbdev.doclinks import patch_name
from nbdev.process import NBProcessor, Processor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi

root = Path(__file__).parent.parent
# where on the site are files of the repository that lie outside nbs/
elsewhere = {'CHANGELOG.md':'changelog.md', 'CONTRIBUTING.md':'contributing.md', 'LICENSE':'LICENSE', 'docs/images/':'images/',
    'docs/results/zoo.md':'results.md', 'README.md':'index.ipynb'}

def relink(
    md:str, # Markdown
    src:Path, # Its file, relative to the repository
    page:Path, # Its page, relative to the site's root
)->str: # The same with links that work on the site
    "Turn links between files of the repository into links between pages."
    def one(m):
        to = Path(os.path.normpath(src.parent/m[2])).as_posix()
        if to.startswith('nbs/'): to = to[4:]
        else:
            hit = next((k for k in elsewhere if to==k or k.endswith('/') and to.startswith(k)), None)
            if hit is None: raise ValueError(f"{src} links to {m[2]}, which is not on the site.")
            to = elsewhere[hit]+to[len(hit):]
        return m[1]+os.path.relpath(to, page.parent)
    return re.sub(r'(\]\(|src="|href=")(?![a-z]+:|[#/])([^)\s"#]+)', one, md)

def public(
    cell, # An exported cell
)->list: # Pairs (dotted name, syntax tree)
    "The documented functions, classes and patched methods that `cell` defines."
    defs = [o for o in ast.parse(cell.source).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))]
    return [(patch_name(o), o) for o in defs if not o.name.startswith('_') and ast.get_docstring(o)]

def methods(tree): return [o for o in tree.body if isinstance(o, ast.FunctionDef) and not o.name.startswith('_') and ast.get_docstring(o)]

def _params(tree, obj):
    "Parameters of a function, or fields of a dataclass, in order: triples (name, annotation, default) as written, with `*` and `/` as names."
    f = tree if isinstance(tree, ast.FunctionDef) else next((o for o in tree.body if getattr(o, 'name', '')=='__init__'), None)
    text = lambda o: None if o is None else ast.unparse(o)
    if f is None: return [(o.target.id, text(o.annotation), text(o.value)) for o in tree.body if isinstance(o, ast.AnnAssign)]
    a = f.args
    pos = a.posonlyargs+a.args
    res = [(o.arg, text(o.annotation), text(d)) for o,d in zip(pos, [None]*(len(pos)-len(a.defaults))+a.defaults)]
    if a.posonlyargs: res.insert(len(a.posonlyargs), ('/', None, None))
    if a.vararg: res.append(('*'+a.vararg.arg, text(a.vararg.annotation), None))
    only = [(o.arg, text(o.annotation), text(d)) for o,d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: # what `delegates` found behind it
        known = {n for n,*_ in res+only}
        more = [p for p in inspect.signature(obj).parameters.values() if p.name not in known and p.kind is p.KEYWORD_ONLY]
        only += [(p.name, None, repr(p.default)) for p in more]
    if only and not a.vararg: res.append(('*', None, None))
    res += only
    if a.kwarg and not more: res.append(('**'+a.kwarg.arg, text(a.kwarg.annotation), None))
    return [o for o in res if o[0] not in ('self','cls')]

def _fenced(doc):
    "Docstring `doc` with its examples as blocks of code, as Markdown has them."
    return re.sub('^>>> .*(?:\\n.+)*', lambda m: f'```pycon\n{m[0]}\n```', doc, flags=re.M)

def anchor(
    name:str, # Dotted name
)->str: # Where it is on its page
    "Names that differ by case only are different, unlike the anchors that Sphinx gives headings."
    return 'api-'+name

def document(
    name:str, # Dotted name
    tree, # Its syntax tree
    obj, # The object itself
    level:int=3, # Of its heading
)->str: # Markdown
    "Heading, signature, docstring, and a table of the parameters that have a docment."
    params,doc = _params(tree, obj),docments(obj, full=True, args_kwargs=True)
    sig = [n if d is None else f'{n}={d}' for n,_,d in params]
    is_prop = any(getattr(o, 'id', '')=='property' for o in getattr(tree, 'decorator_list', []))
    head = name if is_prop else f"{name}({', '.join(sig)})"
    if len(head)>88: head = f'{name}(\n    ' + ',\n    '.join(sig) + ')'
    ret = getattr(tree, 'returns', None)
    if ret is not None: head += ' -> ' + ast.unparse(ret)
    say = lambda n: ((doc.get(n.lstrip('*')) or {}).get('docment') or '').replace('\n', ' ').replace('|', r'\|')
    rows = [(f'`{n}`' if t is None else f'`{n}: {t}`', say(n)) for n,t,_ in params if n not in ('*','/')]
    if say('return'): rows.append(('returns', say('return')))
    cell = lambda s: s.replace('|', r'\|') if s.startswith('`') else s
    table = '\n'.join(['| argument | what it is |','| --- | --- |', *(f'| {cell(a)} | {b} |' for a,b in rows)]) if any(b for _,b in rows) else ''
    parts = [f'<span id="{anchor(name)}"></span>', f"{'#'*level} {name}", f'```python\n{head}\n```', _fenced(ast.get_docstring(tree)), table]
    return '\n\n'.join(filter(None, parts))

class AddDocs(Processor):
    "Before each exported cell, documentation of what it defines; its source stays, folded up"
    def begin(self):
        exp = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_), None)
        mod = import_module(f'fasterfold.{exp}') if exp else None
        cells,level = [],2
        for c in self.nb.cells:
            if 'default_exp' in c.directives_ or 'nbdev_export' in c.source: continue
            if c.cell_type=='markdown': level = 3 if level==3 or re.search('^## ', c.source, re.M) else 2
            if 'export' in c.directives_:
                if all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in ast.parse(c.source).body): continue
                cells += [mk_cell(md, 'markdown') for md in documented(c, mod, level)]
                c.metadata['tags'] = ['hide-input']
            cells.append(c)
        self.nb.cells = cells

def documented(
    cell, # An exported cell
    mod, # The module it is exported to
    level:int, # Of the headings
): # Markdown for each name it defines, and each method of a class
    for name,tree in public(cell):
        obj = reduce(getattr, name.split('.'), mod)
        yield document(name, tree, obj, level)
        if isinstance(tree, ast.ClassDef):
            for m in methods(tree): yield document(f'{name}.{m.name}', m, getattr(obj, m.name), level+1)

def page_of(
    path:Path, # A notebook
)->nbformat.NotebookNode: # The same for Sphinx to read
    "What the site shows of the notebook at `path`."
    src,page = path.relative_to(root),path.relative_to(root/'nbs')
    proc = NBProcessor(path, [AddDocs, strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_])
    proc.process()
    cells = []
    for c in proc.nb.cells:
        if c.cell_type=='markdown': cells.append(nbformat.v4.new_markdown_cell(relink(c.source, src, page)))
        elif c.cell_type=='code':
            tags = ['remove-input'] if c.directives_.get('echo')=='false' else c.metadata.get('tags')
            meta = {'tags':tags} if tags else {}
            cells.append(nbformat.v4.new_code_cell(c.source, outputs=[nbformat.from_dict(o) for o in c.outputs], metadata=meta))
    return nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec':{'name':'python3','display_name':'python3'}, 'language_info':{'name':'python','pygments_lexer':'ipython3'}})

def notebooks(): return [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(root).parts)]

def api_names()->dict: # Name to (page, does `fasterfold.all` bring it?)
    "All documented names, as the site's pages have them."
    from fasterfold.all import __all__ as shown
    res = {}
    for path in notebooks():
        page = path.relative_to(root/'nbs').with_suffix('').as_posix()
        for c in NBProcessor(path).nb.cells:
            if c.cell_type!='code' or 'export' not in c.directives_: continue
            for name,tree in public(c):
                known = name in shown or name.startswith('Learner.')
                res[name] = page,known
                if isinstance(tree, ast.ClassDef): res |= {f'{name}.{m.name}':(page, known) for m in methods(tree)}
    return res
