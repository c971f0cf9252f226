"The package as users get it: its metadata, its names, and that it runs on its own requirements."
import ast, importlib.metadata as im, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
import fasterfold

root = Path(__file__).parent.parent
modules = sorted((root/'fasterfold').glob('*.py'))

def settings():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def normal(name): return re.sub(r'[-_.]+', '-', name).lower()

def closure(req, seen=None):
    "Distributions that requirement `req` brings at run time"
    seen = {} if seen is None else seen
    name,extras = normal(req.name),{'', *req.extras}
    new = extras - seen.setdefault(name, set())
    try: reqs = im.requires(name) or []
    except im.PackageNotFoundError: return seen
    seen[name] |= new
    for o in map(Requirement, reqs):
        if new and (o.marker is None or any(o.marker.evaluate({'extra': e}) for e in new)): closure(o, seen)
    return seen

def run(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)

def test_metadata_has_one_home():
    cfg,meta = settings(),im.metadata('fasterfold')
    assert fasterfold.__version__==cfg['version']==meta['Version']
    assert meta['Summary']==cfg['description'] and meta['Requires-Python']==cfg['python']
    reqs = [Requirement(o) for o in im.requires('fasterfold')]
    assert {o.name for o in reqs if o.marker is None}=={'fastai','torch','torchvision','typer'}
    assert {str(o) for o in reqs if o.marker is None}=={str(Requirement(o)) for o in cfg['requirements'].split()}
    assert (root/'fasterfold'/'py.typed').exists()

def test_command_is_installed():
    ep, = im.entry_points(group='console_scripts', name='fasterfold')
    assert callable(ep.load())

@pytest.mark.parametrize('path', modules, ids=lambda p:p.name)
def test_parses_on_the_oldest_python(path):
    oldest = tuple(map(int, re.search(r'(\d+)\.(\d+)', settings()['python']).groups()))
    ast.parse(path.read_text(encoding='utf-8'), feature_version=oldest)

def test_runs_without_development_tools():
    "Every module imports where only the runtime requirements, and what these require, are installed"
    run_time = set(closure(Requirement('fasterfold')))
    tops = {top for top,dists in im.packages_distributions().items() if not run_time & set(map(normal, dists))}
    assert {'nbdev','pytest','hypothesis','timm'} <= tops
    mods = [f'fasterfold.{p.stem}' for p in modules if p.stem not in ('__init__','_modidx')]
    res = run(f"""import sys, importlib
sys.modules.update(dict.fromkeys({sorted(tops)!r}))
for m in {mods!r}: importlib.import_module(m)""")
    assert res.returncode==0, res.stderr[-2000:]

def test_all_brings_public_names():
    ns = {}
    exec('from fasterfold.all import *', ns)
    public = 'BN_Folder FoldError FoldPlan FoldReport count_parameters latency FoldCallback FoldedValidation'.split()
    assert not [o for o in public if o not in ns]
    from fastai.learner import Learner
    assert all(hasattr(Learner, o) for o in ('fold','fold_bn','fold_plan','folded'))

@pytest.mark.parametrize('lib', ['fastai.vision.all','fastai.tabular.all','fastai.collab'])
def test_all_shadows_nothing_of_fastai(lib):
    theirs,both = {},{}
    exec(f'from {lib} import *', theirs)
    exec(f'from {lib} import *\nfrom fasterfold.all import *', both)
    assert not [k for k,v in theirs.items() if k!='__builtins__' and both[k] is not v]
