"Build the site into docs/_build/html: notebooks and Markdown become pages, Sphinx the rest"
import re, shutil, sys
from pathlib import Path
import nbformat
from sphinx.cmd.build import main as sphinx

docs = Path(__file__).parent
sys.path.insert(0, str(docs))
import pages, reference, results

lead = 'learner','fold','plan','report' # modules that most users need, before the others

def sections()->dict:
    "Captions and pages of the sidebar, in reading order; a pattern stands for all notebooks it matches."
    called = {o.page for o in reference.names() if o.public}
    shown = sorted((r for r in reversed(pages.rooms()) if r.page in called), key=lambda r: lead.index(r.name) if r.name in lead else len(lead))
    return dict(Learn=['tutorials/*'], **{'How to':['howto/*']}, Understand=['how_it_works','limits','results'],
        Reference=['api/index','api/names',*(r.page for r in shown),'api/internals'], **{'How it is built':['0[0-4]*','rules/*','0[5-9]*','1*']}, Project=['changelog','contributing'])

def toctree(
    pages:list, # Their names
    *options, # Lines
)->str: # Markdown
    "A list of pages for the sidebar."
    return '\n'.join(['```{toctree}', *options, '', *pages, '```'])

def sidebar()->str:
    "The sidebar as Markdown; what has a colon in its title is called by what is before it."
    nbs = pages.root/'nbs'
    def entry(path):
        title = re.match('# (.*)', pages.nbformat.read(path, as_version=4).cells[0].source)[1]
        return f"{title.split(':')[0]} <{path.relative_to(nbs).with_suffix('').as_posix()}>"
    def named(p): return [entry(o) for o in sorted(nbs.glob(p+'.ipynb'))] if (nbs/f'{p}.ipynb').exists() or '*' in p else [p]
    lists = {k:[n for p in v for n in named(p)] for k,v in sections().items()}
    return '\n\n'.join(toctree(v, ':hidden:', f':caption: {k}') for k,v in lists.items() if v)

def stage(
    out:Path, # Folder to fill; what is there goes
):
    "Write what Sphinx reads."
    shutil.rmtree(out, ignore_errors=True)
    def write(name, page):
        (path := out/name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page if isinstance(page, str) else nbformat.writes(page), encoding='utf-8')
    for path in pages.notebooks():
        name,nb = path.relative_to(pages.root/'nbs'),pages.page_of(path)
        if name.name=='index.ipynb':
            pages.home(nb)
            nb.cells.append(nbformat.v4.new_markdown_cell(sidebar()))
        if name.parts[0] in pages.taught: write(pages.copy_of(name), pages.download(path))
        write(name, nb)
    rest = []
    for room in pages.rooms():
        if (nb := reference.reference(room)) is None: continue
        write(f'{room.page}.ipynb', nb)
        if not any(o.public for o in reference.names() if o.page==room.page): rest.append(room)
    write('api/index.md', reference.overview())
    write('api/names.md', reference.index())
    write('api/internals.md', reference.internals(rest, toctree([f'{r.name} </{r.page}>' for r in rest], ':hidden:')))
    for src,page in (('CHANGELOG.md','changelog.md'), ('CONTRIBUTING.md','contributing.md')):
        write(page, pages.relink((pages.root/src).read_text(encoding='utf-8'), Path(src), Path(page)))
    write('results.md', results.page(docs/'results'))
    shutil.copy(pages.root/'LICENSE', out/'LICENSE')
    if (docs/'images').exists(): shutil.copytree(docs/'images', out/'images')

def build(
    out:Path=docs/'_build', # Folder for the site (`html`) and what it is made of
    *args, # More options for sphinx-build
)->int: # 0 if there was no warning
    stage(out/'src')
    return sphinx(['-W','--keep-going','-q','-c',str(docs),'-d',str(out/'doctrees'),*args,str(out/'src'),str(out/'html')])

if __name__ == '__main__':
    code = build(docs/'_build', *sys.argv[1:])
    if not code: print(f"Open {docs/'_build'/'html'/'index.html'}")
    sys.exit(code)
