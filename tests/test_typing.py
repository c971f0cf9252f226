"""What type checkers make of the public interface, in a script as users write them.

They read the stubs that the wheel has, where methods added by `@patch` are seen. The methods of fastai's `Learner` cannot be: fastai has no types,
so that to a type checker a learner is anything, and may be asked anything."""
import ast, importlib, inspect, json, os, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

right = '''
from pathlib import Path
import torch
from torch import nn
from fastai.learner import Learner
from fasterfold.all import (BN_Folder, FoldCallback, FoldedValidation, Folded, FoldError, FoldPlan, FoldReport, Kept, compare, count_parameters,
    infer_sample, latency, model_size)

model,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),torch.ones(2, 3, 8, 8)
folder = BN_Folder(strip_dropout=True, merge_branches=False, channels_last='auto', verify=True)
copy: nn.Module = folder.fold(model)
same: nn.Module = BN_Folder(channels_last=True).fold(model, sample=dict(input=x), inplace=True)
folder.undo()
again: FoldPlan = folder.refold()
for f in folder.result.folded: print(f.norm, f.into, f.direction)
plan: FoldPlan = BN_Folder().plan(model, None)
one: Folded = plan.folded[0]
where: str = one.norm+one.direction+', '.join(one.into)
why: list[str] = [k.reason for k in plan.kept]
kept: Kept = plan.kept[0]
print(plan, plan.summary, plan.to_df())
n: int = count_parameters(model)+model_size(copy)
args = infer_sample(model)
one_of = latency(model, x, seconds=.1)
milliseconds: float = 1000*one_of.median+one_of.iqr
both = compare({'original': model, 'folded': copy}, (x,), progress=True)
ratio: float = both.ratio('folded')

def learner(learn: Learner) -> Path:
    learn.fold_bn().validate()
    print(learn.fold_plan().kept)
    learn.fit_one_cycle(1, cbs=[FoldCallback(), FoldedValidation(sample=x)])
    with learn.folded(): learn.validate()
    report: FoldReport = learn.fold(strip_dropout=True)
    text: str = report.headline+report.to_json()
    print(text, report.to_df(), [(f.name, f.before, f.after) for f in report.figures], report.rounding and report.rounding.difference)
    report.plot().savefig('report.png')
    return report.save('report.html')

try: folder.fold(model)
except FoldError as e: print(e)

import fasterfold
from fasterfold import BN_Folder as Same, FoldCallback as Callback, latency as timed
version: str = fasterfold.__version__
door: FoldPlan = Same(channels_last=True).plan(model)
print(timed(model).median, Callback(), fasterfold.count_parameters(model), door)
'''
wrong = '''
from torch import nn
from fasterfold.all import BN_Folder, FoldReport, count_parameters, latency
BN_Folder(strip=True)
BN_Folder().fold('model')
BN_Folder().unfold()
n: str = count_parameters(nn.Linear(1, 1))
latency(nn.Linear(1, 1), seconds='1')
def f(report: FoldReport) -> None: report.save()
from fasterfold import BN_folder
from fasterfold import latency as timed
timed(nn.Linear(1, 1), seconds=None)
'''

@pytest.fixture(scope='session')
def package(tmp_path_factory):
    "The package as it goes into a wheel."
    path = tmp_path_factory.mktemp('typed')
    subprocess.run([sys.executable, '-W', 'ignore', 'setup.py', '-q', 'egg_info', '--egg-base', path, 'build_py', '--build-lib', path], cwd=root, check=True)
    assert (path/'fasterfold'/'py.typed').exists()
    return path

def mypy(folder):
    # torch is followed but not judged, and fastai, which has no types, is anything
    res = subprocess.run([sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent', '--ignore-missing-imports', '--allow-any-generics',
        '--allow-subclassing-any', '--allow-untyped-calls', '--no-error-summary', f'--cache-dir={os.devnull}', 'right.py', 'wrong.py'],
        cwd=folder, capture_output=True, text=True)
    return [(Path(f), int(n)) for f,n in re.findall('^(.+?):(\\d+): error:', res.stdout, re.M)]

def pyright(folder):
    run = lambda *args: subprocess.run([sys.executable, '-m', 'pyright', *args], cwd=folder, capture_output=True, text=True)
    if run('--version').returncode: pytest.skip('pyright has no node to run on')
    res = json.loads(run('--outputjson', '--pythonpath', sys.executable, 'right.py', 'wrong.py').stdout)
    return [(Path(o['file']).relative_to(folder), o['range']['start']['line']+1) for o in res['generalDiagnostics'] if o['severity']=='error']

@pytest.mark.parametrize('checker', [mypy,pyright])
def test_checkers_tell_right_from_wrong(package, checker):
    "Nothing to say about what is right, nor about the stubs; and types that say nothing would let pass what is wrong."
    for name,text in dict(right=right, wrong=wrong).items(): (package/f'{name}.py').write_text(text)
    assert checker(package)==[(Path('wrong.py'), n) for n in (*range(4, 11), 12)]

def test_stubs_have_all_names(package):
    "Each public name, method and property of the package is in its stub."
    for p in sorted((package/'fasterfold').rglob('*.pyi')):
        if p.stem[0]=='_' or p.stem=='cli': continue
        mod,tree = importlib.import_module('.'.join(p.relative_to(package).with_suffix('').parts)),ast.parse(p.read_text(encoding='utf-8'))
        names = {o.name:o for o in tree.body if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
        constants = {o.target.id for o in tree.body if isinstance(o, ast.AnnAssign)}
        imported = {a.asname or a.name for o in tree.body if isinstance(o, ast.ImportFrom) for a in o.names}
        for k in mod.__all__:
            assert k in {*names,*constants,*imported}, f'{p.stem}.{k}'
            if not isinstance(names.get(k), ast.ClassDef): continue
            has = {getattr(o, 'name', getattr(getattr(o, 'target', None), 'id', None)) for o in names[k].body}
            own = {n for n,v in vars(getattr(mod, k)).items() if not n.startswith('_') and (inspect.isroutine(v) or isinstance(v, property))}
            assert own<=has, f'{p.stem}.{k}: {own-has}'
