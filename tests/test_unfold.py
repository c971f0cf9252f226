"The day after: a folded learner that is trained, unfolded, copied and exported."
import gc, pickle, subprocess, sys, textwrap, warnings, weakref
from copy import deepcopy
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from torch import nn
from fasterfold.all import FoldCallback,FoldError,FoldedValidation
from helpers import randomize_norms
from learners import KINDS,train

pytestmark = pytest.mark.filterwarnings('ignore:load_learner')

def norms(learn): return [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

def everything(learn):
    "What `unfold` gives back: objects and bits of the model, its modes, and the optimizer."
    model = learn.model
    tensors = [(k,id(t),t.detach().clone(),t.requires_grad) for k,t in (*model.named_parameters(), *model.named_buffers())]
    opt = learn.opt and deepcopy(learn.opt.state_dict())
    return [(n,id(m),m.training) for n,m in model.named_modules(remove_duplicate=False)],tensors,id(learn.opt),opt

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(v, b[k]) for k,v in a.items())
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

def fit(learn, warned=True, **kwargs):
    "Train one epoch, which must warn if `warned`, and else not."
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(1, 1e-2, **kwargs)
    assert len([o for o in told if 'without its norms' in str(o.message)])==warned

def by_report(learn): learn.fold()
def by_line(learn): learn.fold_bn()
def twice(learn):
    learn.fold_bn()
    learn.fold_bn()
def by_callback(learn): fit(learn, warned=False, cbs=FoldCallback())

def nothing(learn): pass
def training(learn):
    fit(learn)
    fit(learn, warned=False)
def looking_for_a_rate(learn):
    with learn.no_bar(), pytest.warns(UserWarning, match='without its norms'): learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
def using(learn):
    with learn.no_bar():
        learn.get_preds()
        learn.validate()
def folding_for_a_while(learn):
    with learn.folded(): pass
def freezing(learn):
    learn.freeze()
    fit(learn)

AFTERS,HOWS = [nothing,training,looking_for_a_rate,using,folding_for_a_while,freezing],[by_report,by_line,twice,by_callback]
@pytest.mark.parametrize('how,after', [(by_line,o) for o in AFTERS]+[(o,training) for o in HOWS if o is not by_line])
def test_unfold(how, after, tmp_path):
    "Bit for bit what it was, the same objects, with the optimizer and its state; and trains and folds on as if nothing had been."
    learn = train(KINDS['plain_learner'], tmp_path)
    if how is not by_callback: before = everything(learn)
    else: # what the training that ends in a fold has made of it
        class Look(Callback):
            order = FoldCallback.order-1
            def after_fit(self): self.learn.seen = everything(self.learn)
        learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging(): how(learn)
    if how is by_callback: before = learn.seen
    assert not norms(learn)
    after(learn)
    assert learn.unfold() is learn
    assert same(everything(learn), before)
    fit(learn, warned=False)
    assert not [m for m in learn.fold_bn().model.modules() if isinstance(m, nn.BatchNorm2d)]

@pytest.mark.parametrize('name', ['vision','unet','tabular','timm_body','siamese','half_precision','channels_last'])
def test_every_kind_unfolds(name, tmp_path):
    learn = train(KINDS[name], tmp_path)
    randomize_norms(learn.model)
    before = everything(learn)
    learn.fold_bn(strip_dropout=True, strip_identity=True)
    fit(learn)
    assert same(everything(learn.unfold()), before)

def test_unfold_refuses_what_it_cannot_do(tmp_path):
    learn = train(KINDS['plain_learner'], tmp_path)
    with pytest.raises(FoldError, match='nothing to unfold'): learn.unfold()
    learn.save('whole')
    learn.fold_bn().save('folded')
    with torch.no_grad(): learn.model[-1].bias += 1
    folded = everything(learn)
    with pytest.raises(FoldError, match='`5.bias` was changed'): learn.unfold()
    assert same(everything(learn), folded)
    for other,why in ((train(KINDS['plain_learner'], tmp_path).fold_bn(undo=False),'`undo=False`'),(KINDS['plain_learner'](tmp_path).load('folded'),'loaded from a file'),
        (deepcopy(learn),'nothing to unfold'),(pickle.loads(pickle.dumps(learn)),'nothing to unfold')):
        folded = everything(other)
        with pytest.raises(FoldError, match=why): other.unfold()
        assert same(everything(other), folded) and not norms(other)
    learn = KINDS['plain_learner'](tmp_path).load('whole').fold_bn()
    learn.load('folded')
    with pytest.raises(FoldError, match='was changed'): learn.unfold()
    learn.model = deepcopy(learn.model)
    with pytest.raises(FoldError, match='nothing to unfold'): learn.unfold()

def test_folded_refuses_to_train(tmp_path):
    "Before the first step, and the block still gives the model back."
    learn = train(KINDS['plain_learner'], tmp_path)
    before = everything(learn)
    for way in (lambda: learn.fit(1),lambda: learn.fit_one_cycle(1),lambda: learn.fine_tune(1),lambda: learn.lr_find()):
        with learn.no_bar(), learn.folded():
            inside = [p.detach().clone() for p in learn.model.parameters()]
            with pytest.raises(FoldError, match='thrown away'): way()
            assert same(inside, [*learn.model.parameters()])
            with pytest.raises(FoldError, match='when the block ends'): learn.unfold()
        assert same(everything(learn), before)
    fit(learn, warned=False)
    with learn.folded(), pytest.raises(FoldError, match='thrown away'): learn.fit(1)
    learn.fold_bn()
    fit(learn)

def test_a_loaded_learner_warns_too(tmp_path):
    learn = train(KINDS['plain_learner'], tmp_path)
    learn.fold_bn().save('folded')
    new = KINDS['plain_learner'](tmp_path).load('folded')
    fit(new)
    fit(new, warned=False)

def test_folded_validation_warns_not(tmp_path):
    learn = KINDS['plain_learner'](tmp_path)
    fit(learn, warned=False, cbs=FoldedValidation())
    fit(learn, warned=False, cbs=FoldedValidation())

def test_memory_is_kept_or_not(tmp_path):
    "By default what the fold changed stays in memory; with `undo=False` it is freed."
    for undo in (True,False):
        learn = train(KINDS['plain_learner'], tmp_path)
        norm = weakref.ref(norms(learn)[0])
        learn.opt = None
        learn.fold_bn(undo=undo)
        gc.collect()
        assert (norm() is not None)==undo

def test_exported_without_a_past(tmp_path):
    "Where fasterfold is not installed, a learner that remembers loads; the file is no larger for it."
    learn = train(KINDS['vision'], tmp_path)
    sizes = []
    for kw in (dict(undo=False),{}):
        learn.fold_bn(**kw)
        learn.export('export.pkl')
        sizes.append((tmp_path/'export.pkl').stat().st_size)
        learn = train(KINDS['vision'], tmp_path)
    assert abs(sizes[0]-sizes[1])<100
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import learners # whose functions the transforms are
        sys.modules['fasterfold'] = None
        from fastai.learner import load_learner
        assert load_learner('export.pkl')._past is None"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
