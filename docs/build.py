"Build the site into docs/_build/html: notebooks and Markdown become pages, Sphinx the rest"
import shutil, sys
from pathlib import Path
import nbformat
from sphinx.cmd.build import main as sphinx

docs = Path(__file__).parent
sys.path.insert(0, str(docs))
import pages, results

# captions and pages of the sidebar, in reading order; a pattern stands for all notebooks it matches
sidebar = dict(Learn=['tutorials/*'], **{'How to':['howto/*']}, Understand=['how_it_works','limits','results'], Reference=['0[0-4]*','rules/*','0[5-9]*','1*'], Project=['changelog','contributing'])

def toctree(nbs:Path)->str:
    "The sidebar as Markdown."
    def names(p): return [o.relative_to(nbs).with_suffix('').as_posix() for o in sorted(nbs.glob(p+'.ipynb'))] if '*' in p else [p]
    return '\n\n'.join('\n'.join(['```{toctree}', ':hidden:', f':caption: {k}', '', *(n for p in v for n in names(p)), '```']) for k,v in sidebar.items())

def stage(
    out:Path, # Folder to fill; what is there goes
):
    "Write what Sphinx reads."
    shutil.rmtree(out, ignore_errors=True)
    nbs = pages.root/'nbs'
    for path in pages.notebooks():
        page = out/path.relative_to(nbs)
        page.parent.mkdir(parents=True, exist_ok=True)
        nb = pages.page_of(path)
        if page==out/'index.ipynb': nb.cells.append(nbformat.v4.new_markdown_cell(toctree(nbs)))
        nbformat.write(nb, page)
    for src,page in (('CHANGELOG.md','changelog.md'), ('CONTRIBUTING.md','contributing.md')):
        (out/page).write_text(pages.relink((pages.root/src).read_text(encoding='utf-8'), Path(src), Path(page)), encoding='utf-8')
    (out/'results.md').write_text(results.page(docs/'results'), encoding='utf-8')
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
