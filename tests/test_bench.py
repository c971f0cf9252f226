"Both models in every engine that there is: what is shown, what is left out and why, and that nothing else changes."
import json, os, pickle, subprocess, sys
from unittest.mock import patch
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt, pytest, torch
from fastai.vision.all import CategoryBlock, Learner, Normalize, Resize, SimpleCNN, imagenet_stats
from torch import nn
from fasterfold.bench import Engine, FoldBench, _judge, bench, engines
from fasterfold.cost import Comparison, Latency
from fasterfold.all import BN_Folder
from fasterfold.plan import Folded, FoldPlan
from fasterfold.sample import Sample
from fasterfold.state import copy_model
from helpers import randomize_norms, state
from learners import KINDS, images
from test_cli import call
from test_report import Balance

pytestmark = pytest.mark.filterwarnings('ignore')
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def net(*more): return randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more))

def benched(model, sample, which=('eager',), more=None, sizes=True):
    "A bench of `model` in the engines `which` and `more`, on one item and a batch if `sizes`."
    folder = BN_Folder()
    folded = folder.fold(model, sample)
    some = {k:e for k,e in engines.items() if k in which} | {k:Engine(f, (), False) for k,f in (more or {}).items()}
    with patch.dict(engines, some, clear=True):
        return bench(model, folded, folder.result, Sample.of(sample).by_size(model) if sizes else {'2 items':sample}, seconds=.01)

@pytest.fixture
def uncompiled(moments):
    with patch.dict(engines):
        del engines['torch.compile']
        yield

# By command

def resizing(path):
    "A learner whose loaders resize images to 24 pixels, and normalize them."
    dls = images(path, CategoryBlock, bs=8, item_tfms=Resize(24), batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False))
    learn = Learner(dls, SimpleCNN([3,8,10]), path=path)
    randomize_norms(learn.model)
    return learn

def test_an_image_learner(tmp_path, uncompiled):
    "One table, at the size that the learner was trained with; engines that are not there are named."
    resizing(tmp_path).export()
    gone = [('ONNX Runtime','onnxruntime'),('OpenVINO','openvino')]
    with pytest.MonkeyPatch.context() as m:
        for _,o in gone: m.setitem(sys.modules, o, None)
        res = call('bench', tmp_path/'export.pkl', '--trust', '--batch', 4)
    assert res.exit_code==0 and res.stderr=='', res.output
    lines = res.stdout.splitlines()
    rows = [l for l in lines if any(f' {k}  ' in l for k in engines)]
    assert [next(k for k in engines if f' {k}  ' in l) for l in rows]==['eager','channels_last']*2
    assert rows[0].startswith('1 item ') and rows[2].startswith('batch of 4 ') and not any('  –' in l for l in rows)
    assert all(any(v in l for v in ('helps','no difference measured','takes longer')) for l in rows)
    assert f'Medians on cpu, {torch.get_num_threads()} thread' in res.stdout and '1 item is (1,3,24,24); batch of 4 is (4,3,24,24).' in lines
    assert lines[-3:]==[*(f'{k} is not installed: pip install {o}' for k,o in gone),"Input: a made-up image through the learner's own transforms, (1,3,24,24)."]

def test_a_tabular_learner(tmp_path, uncompiled):
    KINDS['tabular'](tmp_path).export('export.pkl')
    res = call('bench', tmp_path/'export.pkl', '--trust', '--batch', 4, '--json')
    assert res.exit_code==0 and res.stderr=='', res.output
    got = json.loads(res.stdout)
    assert got['sample']=="a made-up row through the learner's own procs, (1,2), (1,11)" and got['shapes']['batch of 4']=='(4,2), (4,11)'
    for by in got['latency'].values():
        assert {'eager','ONNX Runtime'}<={*by}<={*engines}-{'channels_last'}
        for o in by.values():
            assert o['folding'] in ('helps','no difference measured','takes longer') and 0<o['ratio']['low']<=o['ratio']['median']<=o['ratio']['high']
            assert all(len(o[k]['times'])==o[k]['runs']>=6 and o[k]['median']>0 for k in ('original','folded'))
    assert 'channels_last is left out: no weights of this model have four dimensions.' in got['notes']

def test_all_engines_in_a_shell(tmp_path):
    "As it is run, here with a program: nothing of what exporters and compilers say is seen."
    torch.export.save(torch.export.export(net(), (x,)), tmp_path/'model.pt2')
    code = """from functools import partial; import fasterfold.bench as b; from fasterfold.cli import app
b.bench = partial(b.bench, seconds=.01)
app(['bench','model.pt2'])"""
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    said = [l for l in res.stderr.splitlines() if 'No CUDA runtime is found' not in l]
    assert res.returncode==0 and not said, res.stderr
    assert all(f' {k}  ' in res.stdout for k in ('eager','torch.compile','ONNX Runtime')) and res.stdout.endswith('Input: what it was exported with, (2,3,8,8).\n')

# Learners

def test_the_learner_stays_what_it_is(tmp_path, only_eager):
    "Bit for bit, with its modes, its optimizer, its loaders and all random numbers; a second one folds as if nothing had been."
    learn = KINDS['plain_learner'](tmp_path)
    randomize_norms(learn.model).train()
    learn.model[0].eval()
    opt = learn.opt = object()
    with learn.no_bar():
        before,vs,rng = state(learn.model),{**vars(learn)},torch.get_rng_state()
        res = learn.fold_bench(seconds=.01)
        assert state(learn.model)==before and learn.opt is opt and torch.equal(torch.get_rng_state(), rng)
        assert vars(learn).keys()==vs.keys() and all(vs[k] is v for k,v in vars(learn).items())
    assert [*res.latency]==['1 item','batch of 64'] and len(res.plan.folded)==3 and learn.fold_plan().folded

def test_normalization_is_folded_along(tmp_path, only_eager):
    learn = resizing(tmp_path)
    model,fs = learn.model,learn.dls.valid.after_batch.fs
    with learn.no_bar(): res = learn.fold_bench(normalize=True, seconds=.01)
    assert learn.model is model and learn.dls.valid.after_batch.fs is fs
    assert any('no longer normalize' in o for o in res.plan.notes) and not res.notes and res.shapes['1 item']=='(1,3,24,24)'

# What is left out

class Asks(nn.Sequential):
    "Which way it goes depends on its numbers."
    def forward(self, x): return super().forward(x) if x.sum()>0 else -super().forward(x)

def test_a_model_that_an_engine_refuses():
    res = benched(Asks(*net()), x.abs(), ('eager','ONNX Runtime'), sizes=False)
    assert [*res.latency['2 items']]==['eager']
    note, = res.notes
    assert note.startswith('ONNX Runtime is left out: it failed with GuardOnDataDependentSymNode: ') and len(note)<300 and '\n' not in note

def test_what_is_wrong_is_not_timed():
    "An engine that rounds in its own way is right, one that rounds to bfloat16 is not, nor one that forgets a part; of one that is wrong for one model only, the other is shown."
    def as_dtype(dtype): return lambda case: lambda x, m=copy_model(case.model).to(dtype): m(x.to(dtype)).float()
    def folded_wrong(case): return lambda x: case.model(x)*(1 if hasattr(case.model[1], 'running_var') else 1.001)
    more = dict(exact=as_dtype(torch.float64), half=as_dtype(torch.bfloat16), part=lambda case: lambda x: case.model(x)[:,:2], folded_wrong=folded_wrong)
    res = benched(net(), x, more=more)
    for by in res.latency.values():
        assert [*by]==['eager','exact','folded_wrong'] and [*by['folded_wrong']]==['original'] and [*by['exact']]==['original','folded']
    said = ' '.join(res.notes)
    assert 'part is left out: it computes something else (relative difference inf).' in res.notes
    assert said.count('half is left out')>=1 and said.count('folded_wrong is left out (folded model')>=1 and 'exact' not in said and 'relative difference 0.001' in said
    text = str(res)
    assert '–' in text and 'one of them did not run' in text
    plt.close(res.plot())

def test_rounding_is_judged_where_there_is_no_float64():
    class Refuses(nn.Linear):
        def forward(self, x):
            if x.dtype is torch.float64: raise TypeError('no float64 here')
            return super().forward(x)
    model,s = Refuses(64, 64),Sample.of(torch.randn(2, 64))
    exact,far = _judge(model, s)
    assert torch.equal(exact[0], s.run(model)[0]) and 0<far<1e-4

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half_precision(dtype):
    res = benched(net(nn.Flatten(), nn.Linear(144, 2)).to(dtype), x.to(dtype), ('eager','channels_last'))
    assert not res.notes and all([*by]==['eager','channels_last'] for by in res.latency.values())

class Named(nn.Module):
    "Arguments by name, in any order, and results in a structure."
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x, shift=None, scale=None): return dict(b=[self.net(x*scale)+shift], a=x.sum())

def test_arguments_by_name():
    sample = dict(scale=torch.full((2,1,1,1), 2.), x=x, shift=torch.ones(2, 4, 1, 1))
    res = benched(Named().eval(), sample, ('eager','ONNX Runtime'), sizes=False)
    assert not res.notes and [*res.latency['2 items']]==['eager','ONNX Runtime']

# What is shown

def timed(*ratios): return Comparison(original=Latency('original', [[1.]]*len(ratios), 1, 'cpu'), folded=Latency('folded', [[o] for o in ratios], 1, 'cpu'))

def test_what_helps_and_what_was_not_measured():
    cases = {'helps':(.7,.8,.9,.8,.9,.85), 'takes longer':(1.1,1.2,1.3,1.1,1.1,1.2), 'no difference measured':(.7,.8,.9,.8,.9,1.1)}
    res = FoldBench(FoldPlan([Folded('bn', ['conv'], 'back')], []), {'<1 item>':{k:timed(*v) for k,v in dict(eager=cases['helps'], **cases).items()}})
    assert [res.verdict('<1 item>', k) for k in cases]==[*cases] and res.ratio('<1 item>', 'takes longer')==pytest.approx((1.15,1.1,1.3))
    assert res.verdict('<1 item>', 'eager')=='helps' and '0.82 (0.70–0.90)' in str(res)
    page = Balance(res._repr_html_())
    assert '<1 item>' in page.text and not page.links and all(k in page.text for k in cases)
    fig = res.plot()
    texts = [t.get_text() for ax in fig.axes for t in ax.texts]
    assert '825 ms, 0.82×' in texts and any(t.endswith(', no difference') for t in texts)
    plt.close(fig)

def test_a_result_can_be_kept():
    res = benched(net(), x, ('eager','channels_last'))
    again = pickle.loads(pickle.dumps(res))
    assert str(again)==str(res) and json.loads(again.to_json())==json.loads(res.to_json()) and repr(res)==str(res)
    df = res.to_df()
    assert len(df)==8 and {*df.columns}=={'input','engine','model','median','iqr','runs','ratio','threads','device'} and (df[df.engine.eq('eager') & df.model.eq('original')].ratio==1).all()
    fig = res.plot()
    assert len(fig.axes)==2 and all(len(ax.patches)==4 for ax in fig.axes)
    plt.close(fig)
