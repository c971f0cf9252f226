"Every kind of fastai learner, trained on small real data, folded, and used on."
import copy, json, random, re, subprocess, sys, textwrap
from contextlib import suppress
import matplotlib
matplotlib.use('agg')
import fastai, numpy as np, pytest, torch
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.progress import CSVLogger,ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback
from fastai.distributed import DistributedDL
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastcore.basics import defaults
from fastprogress.fastprogress import ProgressBar
from fasterfold.fold import BN_Folder
from fasterfold.load import fold_like
from fasterfold.learner import FoldCallback,FoldedValidation
from fasterfold.state import FoldError
from torch.nn.utils import prune
from helpers import check_fold,timed_for
from learners import KINDS,classes,plain,train,uses

def norms(learn): return [m for m in learn.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]

@pytest.fixture
def quick(monkeypatch):
    "No progress bars, and latency measured for a moment only."
    monkeypatch.setattr('fasterfold.learner.report', timed_for(.02))
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])

@pytest.mark.parametrize('name', KINDS)
def test_kind(name, tmp_path, quick):
    learn = train(KINDS[name], tmp_path)
    before,model = classes(learn),learn.model
    with learn.no_logging(): res = learn.fold()
    assert learn.model is model and learn.opt is None
    assert res.plan.folded
    convs = [m.weight for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels>1 and m.kernel_size!=(1,1)]
    assert name=='channels_last' or {w.is_contiguous(memory_format=torch.channels_last) for w in convs}<={res.plan.format=='channels_last'}
    after = classes(learn)
    if torch.is_tensor(before) and not before.is_floating_point(): assert torch.equal(before, after)
    # the original's own rounding error is the measure for that of the folded model
    r = res.rounding
    assert r.folded <= 4*r.original + 4*torch.finfo(torch.float32).eps*r.scale, r
    for k,(a,b) in res.metrics.items(): assert b==pytest.approx(a, rel=1e-4), k
    assert 'valid_loss' in res.metrics and len(res.metrics)>1
    if name in ('unet_attention_blur','unet_no_last_cross'): return # used like any other unet
    with learn.no_logging(): uses(name, learn)

def identities(learn): return [m for s in learn.model.modules() if isinstance(s, torch.nn.Sequential) for m in s if type(m) is torch.nn.Identity]

@pytest.mark.parametrize('name', ['vision','unet','tabular','timm_body','xresnet'])
def test_stripped(name, tmp_path, quick):
    "Without `nn.Identity` a learner is used on, exported and loaded like any other, and takes the weights of one that has them."
    learn = train(KINDS[name], tmp_path)
    other = copy.deepcopy(learn)
    before,n = classes(learn),len(norms(learn))
    other.fold_bn()
    with learn.no_logging(): res = learn.fold(strip_identity=True)
    assert identities(other) and not identities(learn) and res.plan.stripped and len(res.plan.folded)+len(norms(learn))==n
    if torch.is_tensor(before) and not before.is_floating_point(): assert torch.equal(before, classes(learn))
    assert_same(state(other), state(learn))
    other.save('weights')
    learn.load('weights')
    learn.export('export.pkl')
    again = load_learner(tmp_path/'export.pkl')
    x = next(iter(learn.dls.valid))[:learn.dls.n_inp]
    with torch.no_grad(): assert torch.equal(*(torch.as_tensor(o.model.eval()(*x)) for o in (learn,again)))
    with learn.no_logging(): uses(name, learn)

def test_stripped_for_a_moment_and_by_callback(tmp_path, quick):
    learn = KINDS['plain_learner'](tmp_path)
    with learn.no_logging():
        learn.fit(1, 1e-3)
        before = state(learn)
        with learn.folded(strip_identity=True): assert not norms(learn) and not identities(learn)
        assert norms(learn)
        assert_same(state(learn), before)
        learn.fit(1, 1e-3, cbs=FoldCallback(strip_identity=True))
    assert not norms(learn) and not identities(learn)

def test_export_needs_no_fasterfold(tmp_path, quick, request):
    "Folded learners load and predict where fasterfold cannot be imported, also if they were trained with our callbacks."
    image,table = KINDS['vision'](tmp_path),KINDS['tabular'](tmp_path)
    image.add_cbs((FoldCallback,FoldedValidation))
    with image.no_logging(), table.no_logging():
        image.fit(1, 1e-3)
        table.fit(1, 1e-3)
    table.fold_bn()
    row = table.dls.valid_ds.items.iloc[0]
    row.to_pickle(tmp_path/'row.pkl')
    want = [image.predict(7),table.predict(row)]
    assert not norms(image) and not norms(table)
    for name,learn in (('image',image),('table',table)): learn.export(f'{name}.pkl')
    code = f"""
        import json, pandas as pd, sys, warnings
        warnings.simplefilter('ignore')
        sys.modules['fasterfold'] = None # importing it raises
        sys.path.insert(0, {str(request.path.parent)!r})
        from fastai.learner import load_learner
        path = {str(tmp_path)!r}
        image,table = load_learner(path+'/image.pkl'),load_learner(path+'/table.pkl')
        res = [image.predict(7),table.predict(pd.read_pickle(path+'/row.pkl'))]
        assert not any(k.startswith('fasterfold.') for k in sys.modules)
        print(json.dumps([p[2].tolist() for p in res]))
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    for p,q in zip(json.loads(done.stdout.splitlines()[-1]), want): assert torch.allclose(torch.tensor(p), q[2], rtol=1e-4)

def test_load_learner_without_data(tmp_path, quick):
    "Folds on an inferred sample, or on a given one."
    for name,x in (('vision',torch.rand(4,3,32,32)),('tabular',None),('siamese',(torch.rand(3,3,32,32),)*2)):
        train(KINDS[name], tmp_path).export('export.pkl')
        for sample in (None,x):
            learn = load_learner(tmp_path/'export.pkl')
            n = len(norms(learn))
            if name=='siamese' and sample is None: # nobody can know that it takes two images
                with pytest.raises(FoldError, match='sample='): learn.fold()
                assert len(norms(learn))==n
                continue
            res = learn.fold(sample)
            assert len(res.plan.folded)==n and not norms(learn) and not res.metrics
            assert list(res.latency)[1]==f'batch of {dict(vision=4, siamese=3)[name] if sample is not None else 2}'
            if name!='tabular': assert learn.predict(7)[0]==load_learner(tmp_path/'export.pkl').predict(7)[0]

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

def assert_same(a, b):
    assert a.keys()==b.keys()
    for k in a: assert torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])), k

def test_interrupted_fold_is_undone(tmp_path, quick, monkeypatch):
    learn = train(KINDS['plain_learner'], tmp_path)
    before,opt = state(learn),learn.opt
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('fasterfold.learner.report', interrupt)
    with pytest.raises(KeyboardInterrupt): learn.fold()
    assert_same(state(learn), before)
    assert learn.opt is opt
    with pytest.raises(ZeroDivisionError), learn.folded(): 1/0
    assert_same(state(learn), before)
    assert learn.opt is opt

def test_unfit_sample_changes_nothing(tmp_path, quick):
    learn = train(KINDS['plain_learner'], tmp_path)
    before = state(learn)
    for f in (learn.fold, learn.fold_bn, learn.fold_plan):
        with pytest.raises(FoldError, match='sample'): f(torch.rand(2,5,8,8))
    assert_same(state(learn), before)

def random_states(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()

@pytest.mark.parametrize('name', ['vision','pytorch_loaders','tabular'])
def test_data_does_not_notice(name, tmp_path, quick):
    "Neither random numbers nor loops under way change when a learner takes its sample."
    learn = KINDS[name](tmp_path)
    def batches(interrupt):
        set_seed(0)
        for i,b in enumerate(learn.dls.train):
            if i==1: interrupt()
            yield b[0].clone()
    def fold():
        before = random_states()
        learn.fold_plan()
        with learn.folded(): pass
        assert random_states()==before
    if name!='pytorch_loaders': rng = learn.dls.train.rng.getstate()
    want = list(batches(lambda: None))
    if name!='pytorch_loaders': learn.dls.train.rng.setstate(rng)
    assert all(torch.equal(a, b) for a,b in zip(batches(fold), want, strict=True))

def test_sample_in_distributed_training(tmp_path, quick):
    "A process takes its sample for itself, from the loader that fastai has wrapped."
    learn = KINDS['vision'](tmp_path)
    want = str(learn.fold_plan())
    learn.dls.loaders = [DistributedDL(dl, rank=1, world_size=2) for dl in learn.dls.loaders]
    assert str(learn.fold_plan())==want

def test_validation_of_fold_keeps_training_callbacks_out(tmp_path, quick):
    cb = SaveModelCallback(monitor='accuracy')
    learn = plain(tmp_path, cbs=[cb,CSVLogger(tmp_path/'log.csv')])
    with learn.no_logging(): learn.fit(2, 1e-2)
    history,log,saved = list(learn.recorder.losses),(tmp_path/'log.csv').read_text(),(tmp_path/'models/model.pth').stat().st_mtime_ns
    learn.fold()
    assert learn.recorder.losses==history and cb in learn.cbs
    assert (tmp_path/'log.csv').read_text()==log and (tmp_path/'models/model.pth').stat().st_mtime_ns==saved

def test_fold_callback_folds_once_at_the_end(tmp_path, quick):
    for fit in (lambda l,cb: l.fit(2, 1e-3, cbs=cb), lambda l,cb: l.fit_one_cycle(2, 1e-3, cbs=cb), lambda l,cb: l.fine_tune(1, 1e-3, cbs=cb)):
        learn,cb = plain(tmp_path),FoldCallback()
        with learn.no_logging(): fit(learn, cb)
        assert len(cb.plan.folded)==3 and not norms(learn) and learn.opt is None
    with learn.no_logging(): learn.fit(1, 1e-4) # and on, without norms

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fine_tune'])
def test_fold_callback_folds_the_best_weights(fit, tmp_path, quick):
    "Training goes wrong after the best epoch; what is folded is what `SaveModelCallback` kept of that."
    class Spoil(Callback):
        "From the second epoch of the last training on, weights are noise."
        def after_train(self):
            if self.epoch and self.n_epoch>1: [p.data.normal_() for p in self.learn.model.parameters()]
    learn = plain(tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-2)
    save = SaveModelCallback(monitor='valid_loss')
    with learn.no_logging(): getattr(learn, fit)(3, 1e-3, cbs=[FoldCallback(),Spoil(),save])
    assert not norms(learn) and len(learn.recorder.values)==3
    assert learn.recorder.values[-1][1]>save.best # the last weights are not the best
    best = plain(tmp_path).load('model')
    x = torch.stack([o[0] for o in learn.dls.valid.dataset])
    check_fold(best.model, learn.model, x)
    assert learn.validate()[0]==pytest.approx(save.best, rel=1e-4)

@pytest.mark.parametrize('ex', [KeyboardInterrupt(),CancelFitException(),RuntimeError('out of luck')], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fine_tune'])
def test_fold_callback_when_interrupted(fit, ex, tmp_path, quick):
    "Broken off within an epoch, in whichever way, nothing is folded; the next training that ends is."
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter==2: raise ex
    learn = plain(tmp_path, cbs=FoldCallback())
    with learn.no_logging(), suppress(KeyboardInterrupt,RuntimeError): getattr(learn, fit)(2, 1e-3, cbs=Stop())
    assert len(norms(learn))==3 and learn.fold_callback.plan is None
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert not norms(learn)

def test_callbacks_rest_where_nothing_trains(tmp_path, quick):
    "Neither looking for a learning rate nor validating nor predicting folds, and weights stay as they are."
    learn = plain(tmp_path, cbs=[FoldCallback(),FoldedValidation()])
    before = state(learn)
    with learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
        learn.validate()
        learn.get_preds()
    assert_same(state(learn), before)
    assert len(norms(learn))==3 and learn.fold_callback.plan is None

def test_early_stopping_ends_a_training(tmp_path, quick):
    learn = plain(tmp_path)
    with learn.no_logging(): learn.fit(5, 1e-9, cbs=[FoldCallback(),EarlyStoppingCallback(min_delta=1)])
    assert len(learn.recorder.values)==2 and not norms(learn)

def test_folded_validation_is_traced_once(tmp_path, quick, monkeypatch):
    "Later validations reuse the plan, with the weights they find."
    called = []
    for name in 'fold','refold':
        f = getattr(BN_Folder, name)
        def count(self, *args, f=f, name=name, **kwargs):
            called.append(name)
            return f(self, *args, **kwargs)
        monkeypatch.setattr(BN_Folder, name, count)
    learn = plain(tmp_path)
    with learn.no_logging(): learn.fit(3, 1e-2, cbs=FoldedValidation())
    assert called==['fold','refold','refold'] and len(norms(learn))==3

def moved(model): model.double().float() # buffers are other tensors then, as after `.cuda()`
def reparametrized(model): torch.nn.utils.parametrizations.weight_norm(model[1][0])
def pruned(model): prune.l1_unstructured(model[1][0], 'weight', .3)

@pytest.mark.parametrize('change', [moved,reparametrized,pruned])
def test_folded_validation_of_a_model_that_changes(change, tmp_path):
    "It validates what trains now."
    class Change(Callback):
        def before_epoch(self):
            if self.epoch==1: change(self.model)
    res = []
    for cbs in ([Change()],[Change(),FoldedValidation()]):
        set_seed(0, True)
        learn = plain(tmp_path, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(3)
        res.append([list(o) for o in learn.recorder.values])
    for a,b in zip(*res, strict=True): assert a==pytest.approx(b, rel=1e-4)

@pytest.mark.parametrize('ex', [KeyboardInterrupt(),ZeroDivisionError('by zero'),CancelFitException()], ids=lambda o: type(o).__name__)
def test_folded_validation_broken_off(ex, tmp_path, quick):
    class Stop(Callback):
        def after_pred(self):
            if not self.training:
                assert not norms(self.learn)
                raise ex
    learn = plain(tmp_path)
    with learn.no_logging(), suppress(KeyboardInterrupt,ZeroDivisionError): learn.fit(2, 1e-2, cbs=[FoldedValidation(),Stop()])
    assert len(norms(learn))==3
    with learn.no_logging(): learn.fit(1, 1e-2) # goes on as ever

def test_save_and_load(tmp_path, quick):
    "Folded weights load into a new learner, folded or not; those from before folding into one that is not."
    learn = train(KINDS['vision'], tmp_path)
    learn.save('whole', with_opt=not fastai.__version__.startswith('2.7.')) # which writes optimizers that it cannot read by PyTorch's new defaults
    want = learn.fold_bn().get_preds()[0]
    learn.save('folded')
    for new in (KINDS['vision'](tmp_path),KINDS['vision'](tmp_path).fold_bn()):
        assert_same(state(new.load('folded')), state(learn))
        assert torch.equal(new.get_preds()[0], want)
    with pytest.raises(FoldError, match=re.escape("`learn.unfold()`")): learn.load('whole')
    assert_same(state(learn), state(new))
    assert_same(state(KINDS['vision'](tmp_path).load('whole').fold_bn()), state(learn))

def test_folded_validation_leaves_training_alone(tmp_path, quick):
    "Training is bit for bit that without the callback, also with others at work."
    def run(*cbs):
        set_seed(0, True)
        learn = KINDS['timm_body'](tmp_path).to_fp16()
        with learn.no_logging(): learn.fit_one_cycle(2, 1e-3, cbs=[*cbs, SaveModelCallback(monitor='train_loss', comp=np.less), EarlyStoppingCallback(monitor='train_loss')])
        return learn
    a,b = run(),run(FoldedValidation())
    assert_same(state(a), state(b))
    assert a.recorder.losses==b.recorder.losses
    for p,q in zip(a.opt.all_params(), b.opt.all_params(), strict=True): assert_same(p[3], q[3])
    for p,q in zip(a.recorder.values, b.recorder.values): assert q[1]==pytest.approx(p[1], rel=1e-4)

def test_callbacks_survive_a_copy():
    cb = copy.deepcopy(FoldCallback(channels_last=True))
    assert isinstance(cb, FoldCallback) and cb.kwargs==dict(channels_last=True)

def test_safetensors(tmp_path, quick):
    from safetensors.torch import save_file
    learn = train(KINDS['plain_learner'], tmp_path).fold_bn()
    save_file(state(learn), tmp_path/'folded.safetensors')
    new = KINDS['plain_learner'](tmp_path)
    fold_like(new.model, tmp_path/'folded.safetensors')
    assert_same(state(new), state(learn))

def test_what_takes_long_can_be_skipped(tmp_path, monkeypatch):
    "Without validation and timing, `fold` runs nothing twice: no metrics, no latency, weights in the format that they have; the rest of the report is there."
    learn = train(KINDS['vision'], tmp_path)
    monkeypatch.setattr('fasterfold.cost.Timer', None)
    monkeypatch.setattr(learn, 'validate', None)
    res = learn.fold(validate=False, seconds=0)
    assert not norms(learn) and not res.metrics and not res.latency and res.plan.format=='' and res.rounding.folded>0
    assert 'channels_last weights were not tried, as nothing was timed.' in res.plan.notes and 'latency' not in str(res).split('Proved')[0]
    assert json.loads(res.to_json())['model']=='resnet18'
    matplotlib.pyplot.close(res.plot())
    learn.unfold()
    assert learn.fold(validate=False, seconds=0, channels_last=True).plan.format=='channels_last'

def test_progress_says_what_is_running(tmp_path, monkeypatch, capsys):
    "Each stage has a bar with its name, in that order; there is none under `no_bar`; and validating names its own."
    learn = train(KINDS['vision'], tmp_path)
    seen = []
    monkeypatch.setattr(ProgressBar, 'update_bar', lambda self, val: seen.append(self.comment))
    with learn.no_logging(): learn.fold(seconds=.01)
    labels = list(dict.fromkeys(o for o in seen if o))
    assert labels==['validating, original','folding','timing, 1 item','timing, batch of 16','validating, folded']
    other = train(KINDS['plain_learner'], tmp_path)
    seen.clear()
    with other.no_bar(): other.fold(seconds=.01)
    assert not seen
