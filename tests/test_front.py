"The front door: what `from fasterfold import …` gives and imports, what `?` says, which options there are, and what pickles name."
import copy, importlib, inspect, io, json, pickle, pkgutil, re, subprocess, sys
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from torch import nn
import fasterfold, fasterfold.all
from fasterfold import BN_Folder, FoldCallback, FoldedValidation, FoldError, FoldPlan, FoldReport, Folded, Kept, count_parameters
from fasterfold.fold import _values
from fasterfold.report import report
from fasterfold.trace import trace
from helpers import randomize_norms
from learners import KINDS

def python(code, *args):
    "What `code` prints in a process of its own."
    res = subprocess.run([sys.executable, '-W', 'ignore', *args, '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return res.stdout

def module_names(): return {m.name for m in pkgutil.iter_modules(fasterfold.__path__)}

# Names

def test_names_are_those_of_all():
    "One table, two doors."
    assert set(fasterfold._home)==set(fasterfold.all.__all__)
    for k in fasterfold._home: assert getattr(fasterfold, k) is getattr(fasterfold.all, k), k
    assert set(fasterfold._homes)<=module_names()

def test_no_name_is_a_modules():
    "Once `fasterfold.x` is imported, `fasterfold.x` is that module, and no name may depend on what was imported before."
    assert not {*fasterfold._home} & module_names()

everything = '; '.join(f'import fasterfold.{m}' for m in sorted(module_names()))
names = "from fasterfold import BN_Folder, compare, latency; assert latency.__name__=='latency' and callable(compare) and isinstance(BN_Folder, type); del BN_Folder, compare, latency"

@pytest.mark.parametrize('first', [everything,'import fasterfold.cost; from fasterfold import *'], ids=['modules','star'])
def test_any_order_of_imports(first):
    "Names are what they are, whatever was imported before, and by whom; and after it."
    python('\n'.join([first, names, everything, names, 'import fasterfold; assert callable(fasterfold.latency) and not hasattr(fasterfold.latency, "__path__")']))

def test_only_what_is_asked_for_is_imported():
    "The package alone imports nothing heavy; the names for plain PyTorch do not import fastai; those for fastai do, and work."
    code = """
        import json, sys
        def loaded(): return [o for o in ('torch','fastai','matplotlib') if o in sys.modules]
        import fasterfold
        fasterfold.__version__, dir(fasterfold), hasattr(fasterfold, 'nothing')
        seen = [loaded()]
        from fasterfold import BN_Folder, FoldError, count_parameters, latency
        seen.append(loaded())
        from fasterfold import *
        seen.append(loaded())
        from fasterfold import FoldCallback
        from fastai.learner import Learner
        print(json.dumps([*seen, loaded(), callable(Learner.fold)]))"""
    assert json.loads(python(inspect.cleandoc(code)))==[[], ['torch'], ['torch','matplotlib'], ['torch','fastai','matplotlib'], True]

def test_works_without_fastai():
    "Where fastai cannot be imported, all names for plain PyTorch are there, and a model folds."
    code = """import sys; sys.modules['fastai'] = None
from fasterfold import *
from torch import nn
folder = BN_Folder()
folder.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
print(len(folder.result.folded))"""
    assert python(code).strip()=='1'

def test_the_package_is_a_module_like_others():
    with pytest.raises(AttributeError, match="^module 'fasterfold' has no attribute 'BN_folder'$"): fasterfold.BN_folder
    with pytest.raises(ImportError, match="cannot import name 'BN_folder' from 'fasterfold'"): exec('from fasterfold import BN_folder')
    assert not hasattr(fasterfold, '__wrapped__') and getattr(fasterfold, 'x', None) is None
    assert {*fasterfold._home,'__version__','__all__','fold'}<={*dir(fasterfold)} and sorted(dir(fasterfold))==dir(fasterfold)
    assert importlib.reload(fasterfold) is fasterfold and fasterfold.BN_Folder is BN_Folder
    for o in (BN_Folder,FoldReport,count_parameters,FoldError): assert pickle.loads(pickle.dumps(o)) is o

def test_star_import_is_for_plain_pytorch():
    ns = {}
    exec('from fasterfold import *', ns)
    assert {k for k in ns if k!='__builtins__'}=={*fasterfold._home}-{'FoldCallback','FoldedValidation','Exported'}

def test_reloaded_modules_are_seen():
    "The package keeps no object of its own that a reload would leave behind."
    code = """import importlib, fasterfold
old,fold = fasterfold.BN_Folder,importlib.import_module('fasterfold.fold')
importlib.reload(fold)
assert fasterfold.BN_Folder is fold.BN_Folder is not old and 'Arguments' in fasterfold.BN_Folder.fold.getdoc()"""
    python(code)

def test_completion():
    from IPython.core.completerlib import module_completion
    assert {*fasterfold._home}<={*module_completion('from fasterfold import B')}

# What `?` says

def asked(*objects):
    "What IPython shows of each: by object, title to text."
    code = '\n'.join(["import os; os.environ['PAGER'] = 'cat'", 'from fastai.learner import Learner', 'from fasterfold.all import *', 'from fasterfold.rules import pull', 'folder = BN_Folder()',
        *(f"print('=== {o}')\n{o}?" for o in objects)])
    res = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'IPython', '--no-banner', '--colors=NoColor', '--no-confirm-exit', '-c', code], capture_output=True, text=True)
    text = re.sub('\x1b\\[[0-9;]*m', '', res.stdout)
    return {k:v for k,v in re.findall(r'=== (\S+)\n(.*?)(?=\n=== |\Z)', text, re.S)}

def test_questions_are_answered():
    "In a real IPython: functions, methods, patched ones, those that hand arguments on, constructors, dataclasses."
    options = 'strip_dropout   Also replace dropout','channels_last   Also use channels_last weights?'
    says = {'BN_Folder':options, 'folder.fold':('model    Any model','inplace  Fold `model` itself?','Returns: The folded copy'), 'BN_Folder.plan':(' What to call it with',),
        'Learner.fold':('sample          Input to trace',*options,'Returns: What it changed'), 'Learner.folded':options, 'latency':('seconds   About how long',),
        'FoldCallback':('sample          Input to trace',*options), 'FoldReport':('rounding     How far outputs moved',), 'FoldReport.save':('path  File to write',),
        'pull':('names  Of operations','pull(*names: str)'), 'folder.undo':('Give the last model',)}
    got = asked(*says)
    assert got.keys()==says.keys()
    for k,parts in says.items():
        for p in parts: assert got[k].count(p)==1, (k, p, got[k])
    assert 'Arguments' not in got['folder.undo']

def test_every_argument_of_the_public_interface_is_explained():
    from fastai.learner import Learner
    fs = [getattr(fasterfold, k) for k in fasterfold._home]
    fs += [f for c in fs if isinstance(c, type) for k,f in vars(c).items() if inspect.isfunction(f) and k[0]!='_' and f.__doc__]
    fs += [Learner.fold,Learner.fold_bn,Learner.fold_plan,Learner.fold_bench,Learner.folded]
    for f in fs:
        f = f.__init__ if isinstance(f, type) else f
        if not inspect.isfunction(f): continue # an exception
        names = [p.name for p in inspect.signature(f).parameters.values() if p.name!='self']
        said = re.findall(r'^  (\w+)  +\S', f.getdoc(), re.M)
        assert said==names, f.__qualname__

def test_without_sources_docstrings_are_left(monkeypatch):
    "Where a package has bytecode only there are no comments to read."
    from IPython.core.oinspect import getdoc
    assert 'Arguments' in getdoc(BN_Folder.plan)
    def gone(*args, **kwargs): raise OSError('could not get source code')
    monkeypatch.setattr('fasterfold.help.docments', gone)
    assert getdoc(BN_Folder.plan)==inspect.getdoc(BN_Folder.plan)

def test_docstrings_stay_as_they_are(): assert 'Arguments' not in BN_Folder.fold.__doc__ and BN_Folder.__init__.__doc__ is None

# Options

class Huge(nn.Sequential):
    def __repr__(self): return 'layers\n'*1000

def test_folder_shows_its_options():
    assert repr(BN_Folder())=='BN_Folder(strip_dropout=False, strip_identity=False, merge_branches=False, channels_last=False, verify=True, store_weights=True, strip_unused=False, keep=())'
    given = dict(strip_dropout=True, strip_identity=True, merge_branches=True, channels_last='auto', verify=False)
    assert vars(eval(repr(BN_Folder(**given))))==vars(BN_Folder(**given))
    folder = BN_Folder(channels_last=True)
    folder.fold(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert repr(folder)==repr(BN_Folder(channels_last=True)) # not what it has done

def test_every_option_is_looked_at(): assert [*_values]==[k for k in inspect.signature(BN_Folder).parameters if k!='keep'] # which `_listed` looks at

WRONG = ['False','True','Auto','','no',None,0,1,1.,np.True_,torch.tensor(True),torch.zeros(3),np.zeros(3),[],{},Huge(),nn.Linear]

@pytest.mark.parametrize('option', _values)
@pytest.mark.parametrize('value', WRONG, ids=[f'{type(o).__name__}{i}' for i,o in enumerate(WRONG)])
def test_wrong_options(option, value):
    "Refused when the folder, or the callback, is made; the message is short and says which values there are."
    for make in (BN_Folder,FoldCallback):
        with pytest.raises(FoldError) as e: make(**{option:value})
        said = str(e.value)
        assert f'`{option}` is True' in said and all(repr(v) in said for v in _values[option]) and len(said)<150 and '\n' not in said

@pytest.mark.parametrize('make', [BN_Folder,FoldCallback,FoldedValidation])
def test_unknown_options(make):
    with pytest.raises(TypeError, match='chanels_last'): make(chanels_last=True)

@pytest.mark.parametrize('how', ['fold','fold_bn','fold_plan','fold_bench','folded'])
def test_learners_refuse_wrong_options_first(how, tmp_path, monkeypatch):
    "Before a batch is drawn, metrics are computed or the model is copied."
    learn = KINDS['vision'](tmp_path)
    def touched(*args, **kwargs): raise AssertionError('something was done')
    for f in ('_samples','_scores','copy_model','report','bench'): monkeypatch.setattr(f'fasterfold.learner.{f}', touched)
    opt = learn.opt = object()
    with pytest.raises(FoldError, match="`channels_last` is True, False or 'auto', and not 'Auto'"):
        res = getattr(learn, how)(channels_last='Auto')
        if how=='folded': res.__enter__()
    assert learn.opt is opt

# What pickles name

def named(data):
    "The classes and functions that reading `data` asks for; a pickle, or what `torch.save` writes."
    res = set()
    class Noting(pickle.Unpickler):
        def find_class(self, module, name):
            res.add(f'{module}.{name}')
            return super().find_class(module, name)
    if data[:2]==b'PK': torch.load(io.BytesIO(data), pickle_module=SimpleNamespace(__name__='noting', Unpickler=Noting, load=pickle.load), weights_only=False)
    else: Noting(io.BytesIO(data)).load()
    return res

def saved(o):
    buf = io.BytesIO()
    torch.save(o, buf)
    return buf.getvalue()

def ours(data): return {o for o in named(data) if o.startswith('fasterfold')}

def net():
    "Two norms, of which one stays."
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.BatchNorm2d(4), nn.ReLU())
    return randomize_norms(model, seed=torch.randint(99, (1,)).item())

def test_pickles_that_name_us_are_found():
    for data in (pickle.dumps([1,FoldError('x')]),saved([1,FoldError('x')])): assert ours(data)=={'fasterfold.state.FoldError'}

@pytest.mark.parametrize('inplace', [False,True])
@pytest.mark.parametrize('options', [{},dict(strip_dropout=True),dict(channels_last=True),dict(channels_last='auto'),dict(merge_branches=True),dict(verify=False)], ids=str)
def test_pickled_models_name_nothing_of_ours(options, inplace):
    model,x = net(),torch.randn(2,3,9,9)
    folder = BN_Folder(**options)
    folded = folder.fold(model, x, inplace=inplace)
    for m in (folded,model,copy.deepcopy(folded)): assert not ours(pickle.dumps(m)) and not ours(saved(m)) and not ours(saved(m.state_dict()))
    folder.undo()
    assert not ours(pickle.dumps(folded))

class ExportsAlways(Callback):
    "Writes the learner at each event that allows it."
    order = 100
    def __init__(self): self.files = {}
    def __reduce__(self): return Callback,()
    def __call__(self, event_name):
        if event_name in ('before_fit','before_epoch','before_train','after_train','before_validate','after_validate','after_epoch','after_fit'): self.files[event_name] = saved(self.learn)

def test_exported_learners_name_nothing_of_ours(tmp_path):
    "Whenever a learner is written, with our callbacks in it, while it is folded and after: no name of ours, and what is read back validates."
    learn = KINDS['tabular'](tmp_path)
    exports = ExportsAlways()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=[exports,FoldedValidation(),FoldCallback()])
        assert len(exports.files)==8
        with learn.folded(): exports.files['folded'] = saved(learn)
        learn.export('final.pkl')
        exports.files['final'] = (tmp_path/'final.pkl').read_bytes()
        for k,data in exports.files.items():
            assert not ours(data), k
            again = torch.load(io.BytesIO(data), weights_only=False)
            if k!='final':
                with again.no_bar(), again.no_logging(): assert len(again.validate(cbs=again.cbs[:0]))==2, k
    for cb in (FoldCallback(),FoldedValidation()): assert not ours(pickle.dumps(cb)) and type(pickle.loads(pickle.dumps(cb))) is Callback

def test_plans_and_reports_can_be_pickled():
    "They say the same afterwards, name classes of ours and nothing of PyTorch, and are small: neither model nor trace comes along."
    model,x = net(),torch.randn(2,3,9,9)
    folder = BN_Folder()
    folded = folder.fold(model, x)
    res = report(model, folded, folder.result, {'1 item':x[:1]}, seconds=.02)
    assert folder.result.edits and folder.result.removed and len(res.plan.kept)==len(res.plan.folded)==1
    for how in (lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy, copy.copy, lambda o: torch.load(io.BytesIO(saved(o)), weights_only=False)):
        plan,again = how(folder.result),how(res)
        assert isinstance(plan, FoldPlan) and str(plan)==str(folder.result) and plan.to_df().equals(folder.result.to_df())
        assert {k:str(v) for k,v in vars(plan.proof).items()}=={k:str(v) for k,v in vars(folder.result.proof).items()}
        assert not plan.edits and not plan.sources and not plan.removed
        assert isinstance(again, FoldReport) and str(again)==str(res) and again._repr_html_()==res._repr_html_() and again.to_json()==res.to_json()
    assert folder.result.edits # a copy takes nothing away
    for o in (folder.result,BN_Folder().plan(model, x),res):
        data = pickle.dumps(o)
        assert all(k.startswith('fasterfold.') for k in named(data)) and len(data)<10_000, named(data)
    assert pickle.loads(pickle.dumps([Folded('a', ['b'], 'back'),Kept('c', 'why')]))==[Folded('a', ['b'], 'back'),Kept('c', 'why')]

def test_a_folder_is_pickled_without_its_model():
    model = net()
    folder = BN_Folder(strip_dropout=True)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    folder.fold(model, torch.randn(2,3,9,9), inplace=True)
    for again in (pickle.loads(pickle.dumps(folder)),copy.deepcopy(folder),copy.copy(folder)):
        assert repr(again)==repr(folder) and str(again.result)==str(folder.result)
        with pytest.raises(FoldError, match='nothing to undo'): again.undo()
        with pytest.raises(FoldError, match='call `fold` first'): again.refold()
        assert len(again.fold(net(), torch.randn(2,3,9,9))) and again.result.folded
    assert {o for o in named(pickle.dumps(folder)) if not o.startswith('fasterfold.')}<={'copyreg._reconstructor','builtins.object'} and len(pickle.dumps(folder))<2000
    folder.undo() # which the copies did not disturb
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

# How a trace reads

def test_traced_values_have_names():
    "Parameters and buffers by their own, inputs in order, the rest after what made them; all different."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.bn,self.w = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.Parameter(torch.ones(4, 1, 1))
        def forward(self, x, y):
            x = self.bn(self.conv(x))*self.w+y
            a,b = x.chunk(2, 1)
            return a,b.topk(2)[1]
    g = trace(Net(), (torch.randn(2,3,8,8),torch.ones(1)))
    made = [v for o in g.ops for v in o.outs if v is not None]
    assert [repr(v) for v in g.inputs]==['input_0 [2,3,8,8]','input_1 [1]']
    assert {'conv.weight [4,3,3,3]','bn.running_mean [4]','bn.num_batches_tracked []','w [4,1,1]'}<={repr(v) for v in g.leaves}
    assert repr(made[0])=='convolution_0 [2,4,6,6]' and repr(g.ops[0])=='convolution_0(input_0 [2,3,8,8], conv.weight [4,3,3,3], conv.bias [4])'
    assert [o.name for o in g.outputs]==[f'split_{g.outputs[0].op.index}',f'topk_{g.outputs[1].op.index}.1']
    seen = [v.name for v in (*made,*g.inputs,*g.leaves)]
    assert len(set(seen))==len(seen)
    assert repr(trace(Net(), dict(y=torch.ones(1), x=torch.randn(1,3,8,8))).inputs[0])=='input_0 [1]'
