"Notebooks as pages of the site: nbdev's processors, and links from code that is exported to the reference"
import ast, os, re
from collections import namedtuple
from functools import cache
from pathlib import Path
import nbformat
from nbdev.doclinks import patch_name
from nbdev.process import NBProcessor
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

def notebooks(): return [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(root).parts)]

Room = namedtuple('Room', 'name path page home cells') # a module, its notebook, its page in the reference, the notebook's page

@cache
def rooms()->list: # In the order of the notebooks
    "All modules that notebooks export."
    res = []
    for path in notebooks():
        cells = NBProcessor(path).nb.cells
        name = next((c.directives_['default_exp'] for c in cells if 'default_exp' in c.directives_), None)
        if name: res.append(Room(name, path, 'api/'+name.replace('.', '/'), path.relative_to(root/'nbs').with_suffix('').as_posix(), cells))
    return res

def exported(cell): return cell.cell_type=='code' and 'export' in cell.directives_

def public(
    cell, # An exported cell
)->list: # Pairs (dotted name, syntax tree)
    "The documented functions, classes and patched methods that `cell` defines."
    defs = [o for o in ast.parse(cell.source).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))]
    return [(patch_name(o), o) for o in defs if not o.name.startswith('_') and ast.get_docstring(o)]

def methods(tree):
    "Those of a class that are documented."
    return [o for o in tree.body*isinstance(tree, ast.ClassDef) if isinstance(o, ast.FunctionDef) and not o.name.startswith('_') and ast.get_docstring(o)]

def anchor(
    name:str, # Dotted name
    kind:str='api', # Of its documentation; 'src' is that of its source
)->str: # Where it is on its page
    "Names that differ by case only are different, unlike the anchors that Sphinx gives headings."
    return f'{kind}-{name}'

def notebook(
    cells:list, # Of nbformat
)->nbformat.NotebookNode: # For Sphinx to read
    "A notebook of `cells`."
    return nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec':{'name':'python3','display_name':'python3'}, 'language_info':{'name':'python','pygments_lexer':'ipython3'}})

def code_cell(
    c, # A cell that nbdev has read
): # The same as nbformat has it
    "Code with its outputs, and without what only nbdev asks for."
    meta = {'tags':['remove-input']} if c.directives_.get('echo')=='false' else {}
    return nbformat.v4.new_code_cell(c.source, outputs=[nbformat.from_dict(o) for o in c.outputs], metadata=meta)

def _names_line(cell, room):
    "What `cell` defines, with links to the reference and places that this links back to."
    there = os.path.relpath(room.page, Path(room.home).parent)
    one = lambda n: f'<a class="api" id="{anchor(n, "src")}" href="{there}.html#{anchor(n)}"><code>{n}</code></a>'
    return f'<p class="names">Reference: {", ".join(one(n) for n,_ in public(cell))}</p>'

def page_of(
    path:Path, # A notebook
)->nbformat.NotebookNode: # The same for Sphinx to read
    "What the site shows of the notebook at `path`."
    src,page = path.relative_to(root),path.relative_to(root/'nbs')
    room = next((r for r in rooms() if r.path==path), None)
    proc = NBProcessor(path, [strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_])
    proc.process()
    cells = []
    for c in proc.nb.cells:
        if c.cell_type=='markdown': cells.append(nbformat.v4.new_markdown_cell(relink(c.source, src, page)))
        elif c.cell_type=='code' and c.source.strip():
            if exported(c) and all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in ast.parse(c.source).body): continue
            if exported(c) and public(c): cells.append(nbformat.v4.new_markdown_cell(_names_line(c, room)))
            cells.append(code_cell(c))
    if room: cells[0].source = re.sub('^# .*', f'# How {room.name} is built', cells[0].source)
    if page.parts[0] in taught: cells[0].source = re.sub(r'\n\n(?!>)', f'\n\n{{download}}`Download this page as a notebook <{os.path.relpath(copy_of(page), page.parent)}>`\n\n', cells[0].source, count=1)
    return notebook(cells)

taught = 'tutorials','howto' # folders of notebooks to run oneself
def copy_of(page): return Path('downloads')/page

def download(
    path:Path, # A notebook
)->nbformat.NotebookNode: # The same for a reader to run
    "Without what only nbdev reads, and without links that lead nowhere outside of the site."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if 'nbdev_export' not in c.source]
    for c in nb.cells:
        if c.cell_type=='markdown': c.source = re.sub(r'\[([^\]]+)\]\((?:#|(?![a-z]+:)[^)\s]*\.(?:ipynb|md))[^)]*\)', r'\1', c.source)
        else: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    return nb

def source(
    page:str, # A page
)->str|None: # The file in the repository that it is made from, if it is one
    "Where to edit what the page says."
    of = {r.page:r.home for r in rooms()}
    if page in ('changelog','contributing'): return f'{page.upper()}.md'
    nb = Path('nbs')/f'{of.get(page, page)}.ipynb'
    return nb.as_posix() if (root/nb).exists() else None

def home(
    nb:nbformat.NotebookNode, # The README's page
):
    "Bring what it says first on one screen: a sentence, how to install, a few lines of code, and the report as it looks."
    def take(pattern):
        for i,c in enumerate(nb.cells):
            if c.cell_type=='markdown' and (m := re.search(pattern, c.source, re.S)):
                c.source = c.source.replace(m[0], '')
                return i,m[0].strip()
        raise ValueError(f"nbs/index.ipynb has nothing like {pattern!r}, which the home page shows first.")
    top = take(r'^# [^\n]+\n\n> [^\n]+')[1]
    i,code = take(r'```python\n(?:(?!```).)*learn\.fold\(\)(?:(?!```).)*```')
    picture = take(r'(?:[^\n]+\n\n)?!\[[^\]]*\]\([^)]*report\.png\)')[1]
    if (before := nb.cells[i-1]).source.endswith(':'): before.source = before.source[:-1]+', as above.'
    install = '```sh\npip install .  # in a checkout\n```'
    nb.cells.insert(0, nbformat.v4.new_markdown_cell('\n\n'.join([top, '::::{container} first', install, code, picture, '::::'])))
