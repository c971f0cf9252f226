"Run `nbs/index.ipynb`, and write `README.md` from it: what nbdev shows a reader of it, as Markdown"
import os,re
from pathlib import Path
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, strip_ansi
import nbformat

root = Path(__file__).resolve().parent.parent
readme_nb = root/'nbs'/'index.ipynb'
shown = 'text/markdown', 'image/svg+xml', 'text/plain'  # code hosts strip the styles that HTML tables need

def relink(
    md:str, # Markdown with links relative to the notebook
    start:Path, # folder of the notebook, relative to the repository
):
    "`md` with the same links relative to the repository"
    def _f(m): return f'{m[1]}{Path(os.path.normpath(start/m[2])).as_posix()}'
    return re.sub(r'(\]\(|src="|href=")(?![a-z]+:|[#/])([^)\s"]+)', _f, md)

def refresh(path:Path):
    "Run the cells of the notebook at `path` that have outputs, and keep what they show now"
    nb = nbformat.read(path, as_version=4)
    os.chdir(path.parent)
    shell = CaptureShell()
    for c in nb.cells:
        if c.cell_type!='code' or 'nbdev_export' in c.source: continue
        outs = shell.run(c.source)
        if shell.exc: raise shell.exc
        if c.outputs: c.outputs = [nbformat.from_dict({k:v for k,v in o.items() if k!='execution_count'} | dict(execution_count=None)) for o in outs]
    nbformat.write(nb, path)

def to_markdown(path:Path):
    "Markdown of the notebook at `path`, hidden cells and nbdev's directives left out"
    proc = NBProcessor(path, [strip_ansi, hide_line, filter_stream_, rm_export, clean_magics, hide_])
    proc.process()
    start = path.parent.relative_to(root)
    cells = []
    for c in proc.nb.cells:
        if c.cell_type=='markdown': cells.append(nbformat.v4.new_markdown_cell(relink(c.source, start)))
        else: cells.append(nbformat.v4.new_code_cell('' if c.directives_.get('echo')=='false' else c.source, outputs=[nbformat.from_dict(o) for o in c.outputs]))
    exp = MarkdownExporter()
    exp.config.NbConvertBase.display_data_priority = list(shown)
    body,res = exp.from_notebook_node(nbformat.v4.new_notebook(cells=cells, metadata={'language_info': {'name': 'python'}}))
    if res['outputs']: raise ValueError(f"{path.name} has images as outputs: save them in docs/ and show them as Markdown images.")
    body = re.sub(r'```python\s*```', '', body) # cells of which only the output is shown
    body = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', body, flags=re.M)).strip()
    return f'<!-- Written from {path.relative_to(root).as_posix()} by `make readme`: edit that. -->\n\n{body}\n'

if __name__ == '__main__':
    refresh(readme_nb)
    (root/'README.md').write_text(to_markdown(readme_nb), encoding='utf-8')
