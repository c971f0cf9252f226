"The package as users get it: its metadata, its names, and that it runs on its own requirements."
import ast, importlib, importlib.metadata as im, re, subprocess, sys
from configparser import ConfigParser
from importlib.machinery import PathFinder
from pathlib import Path
import pytest
from packaging.requirements import Requirement
import fasterfold

root = Path(__file__).parent.parent
modules = sorted((root/'fasterfold').rglob('*.py'))

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

@pytest.mark.parametrize('path', modules, ids=lambda p:str(p.relative_to(root)))
def test_parses_on_the_oldest_python(path):
    oldest = tuple(map(int, re.search(r'(\d+)\.(\d+)', settings()['python']).groups()))
    ast.parse(path.read_text(encoding='utf-8'), feature_version=oldest)

class Hidden:
    "A finder for which distributions outside `kept` are not installed; what setuptools bundles it may use"
    def __init__(self, kept):
        self.tops = {o for o,dists in im.packages_distributions().items() if not kept & set(map(normal, dists))}
        self.installed = str(Path(im.distribution('pytest').locate_file('')).resolve())
    def find_spec(self, name, path=None, target=None):
        if name not in self.tops: return
        elsewhere = [o for o in sys.path if str(Path(o).resolve())!=self.installed]
        spec = PathFinder.find_spec(name, elsewhere)
        if spec is None: raise ModuleNotFoundError(f"{name} is not needed at run time", name=name)
        return spec

def import_hidden():
    "Import every module of the package with all but its runtime requirements hidden"
    hidden = Hidden(set(closure(Requirement('fasterfold'))))
    assert {'pytest','hypothesis','timm','onnx'} <= hidden.tops
    for o in hidden.tops & set(sys.modules): del sys.modules[o]
    sys.meta_path.insert(0, hidden)
    for p in modules: importlib.import_module('.'.join(p.relative_to(root).with_suffix('').parts).removesuffix('.__init__'))
    print('imported', len(modules))

# Data flows down, never up: a module imports from those before it
ROOMS = """affine interrupt state sample guards table trace rules.core rules.check rules.shapes rules.windows rules.arithmetic rules.products rules.norms
    find spread plan cover edit proof cost constants formats strip program fold load bench normalize certify report learner files export cli help""".split()

def imports_of(path):
    "The modules of the package that the module at `path` imports, wherever in it."
    here = path.relative_to(root).with_suffix('').parts
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(o, ast.ImportFrom):
            base = [*here[:len(here)-o.level]] if o.level else []
            full = '.'.join(filter(None, [*base, o.module or '']))
            yield from (f'{full}.{n.name}' if f'{full}.{n.name}'.removeprefix('fasterfold.') in ROOMS else full for n in o.names)
        elif isinstance(o, ast.Import): yield from (n.name for n in o.names)

@pytest.mark.parametrize('room', ROOMS)
def test_data_flows_down(room):
    above = ROOMS[:ROOMS.index(room)]
    used = {o.removeprefix('fasterfold.') for o in imports_of(root/'fasterfold'/f"{room.replace('.', '/')}.py") if o.startswith('fasterfold.')}
    if 'rules' in used: # all of them
        assert 'rules.norms' in above
        used -= {'rules'}
    assert used<={*above}, f"{room} imports from {used-{*above}}, which come after it"

def test_every_module_has_its_place():
    have = {'.'.join(p.relative_to(root/'fasterfold').with_suffix('').parts) for p in modules}
    assert have-{'__init__','all','_modidx','rules.__init__'}=={*ROOMS}

@pytest.mark.skipif(sys.version_info<(3,11), reason='importlib.metadata of Python 3.10 does not know all names that distributions bring')
def test_runs_without_development_tools():
    res = subprocess.run([sys.executable, '-c', 'from test_package import import_hidden; import_hidden()'],
        cwd=Path(__file__).parent, capture_output=True, text=True)
    assert res.stdout.strip()==f'imported {len(modules)}', res.stderr[-2000:]

def test_all_brings_public_names():
    ns = {}
    exec('from fasterfold.all import *', ns)
    public = 'BN_Folder FoldError FoldPlan FoldReport count_parameters latency FoldCallback FoldedValidation'.split()
    assert not [o for o in public if o not in ns]
    from fastai.learner import Learner
    assert all(hasattr(Learner, o) for o in ('fold','fold_bn','fold_plan','fold_bench','folded'))

@pytest.mark.parametrize('lib', ['fastai.vision.all','fastai.tabular.all','fastai.collab'])
def test_all_shadows_nothing_of_fastai(lib):
    theirs,both = {},{}
    exec(f'from {lib} import *', theirs)
    exec(f'from {lib} import *\nfrom fasterfold.all import *', both)
    assert not [k for k,v in theirs.items() if k!='__builtins__' and both[k] is not v]
