"""Ctrl-C at any moment: everything is as it was, or all is done.

Where a signal waits, it is heard at the next `check`: so each of these is tried, and a sample of all calls and returns at which Python may take it. `INTERRUPT=1` tries all of them, which takes hours."""
import gc, logging, os, random, signal, subprocess, sys, threading, time, warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from fastcore.basics import defaults
from fastcore.foundation import L
from torch import nn
from torch.nn.modules import module as hooks
from fasterfold import interrupt
from fasterfold.edit import Snapshot
from fasterfold.all import BN_Folder,FoldCallback,FoldError,FoldedValidation,fold_like,latency
from fasterfold.interrupt import block,check,interruptible,whole
from fasterfold.report import report
from fasterfold.state import Contents
from helpers import randomize_norms,state
from learners import KINDS,train

every = int(os.environ.get('INTERRUPT', 0))

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Python's own handler, no bars, latency measured for a moment only, and no plans read again."
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr('fasterfold.learner.report', partial(report, seconds=.001))
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])
    yield
    assert signal.signal(signal.SIGINT, old) is signal.default_int_handler

@pytest.fixture(autouse=True)
def true_reasons(): "The plans made here are those of other tests."

class Presses:
    "Presses Ctrl-C at the calls and returns `at`; if `only` is given, at calls of that function."
    def __init__(self, *at, only=None): self.at,self.only,self.n,self.stops = at,only and only.__code__,0,0
    @property
    def came(self): return bool(self.at) and self.n>=self.at[0]
    def __call__(self, frame, event, arg):
        self.stops += self.came and event=='call' and frame.f_code is check.__code__ # where it can be heard from now on
        if self.only and not (event=='call' and frame.f_code is self.only): return
        self.n += 1
        if self.n in self.at: signal.raise_signal(signal.SIGINT)

def broken_off(f, presses):
    "Was `f` broken off by one of `presses`?"
    sys.setprofile(presses)
    try: f()
    except KeyboardInterrupt: return True
    finally: sys.setprofile(None)
    return False

def spread(total, n, g):
    "`n` numbers up to `total`, from all of its parts."
    return range(1, total+1) if every or total<=n else [g.randint(1+total*i//n, total*(i+1)//n) for i in range(n)]

def moments(calls, checks, n):
    "Presses at `n` calls and twice as many checks; every other time, a second press follows."
    g = random.Random(0)
    for i,k in enumerate(spread(calls-1, n, g)): yield Presses(k, *([k+int(10**(5*g.random()))] if i%2 else []))
    for k in spread(checks, 2*n, g): yield Presses(k, *([k+1] if k%2 else []), only=check)

def world():
    "What is everybody's."
    stacks = torch._C._len_torch_function_stack(),torch._C._len_torch_dispatch_stack()
    modes = torch.is_grad_enabled(),torch.is_inference_mode_enabled(),torch.is_autocast_enabled('cpu'),torch.get_default_dtype(),torch.get_num_threads()
    listening = [{**v} for k,v in vars(hooks).items() if k.startswith('_global_') and isinstance(v, dict) and 'with_kwargs' not in k] # from which PyTorch takes nothing
    return dict(handler=signal.getsignal(signal.SIGINT), waits=interrupt._pressed.at, stacks=stacks, modes=modes, listening=listening, gc=gc.isenabled(),
        warnings=[*warnings.filters], logging=logging.root.manager.disable)

def short(v): return v if v is None or isinstance(v, (int,float,str)) else id(v)
def bits(v): return v.detach().cpu().numpy().tobytes() if torch.is_tensor(v) else v

class Seen:
    "All that a Ctrl-C must leave alone."
    def __init__(self, model, learn=None):
        self.objs = [] if learn is None else [learn, *learn.cbs, *learn.metrics, learn.recorder.loss, learn.recorder.smooth_loss]
        self.keep = [{**vars(o)} for o in self.objs] # no other object may have their ids meanwhile
        self.all = world()|dict(model=state(model), dicts=[{type(v) for v in vars(m).values() if isinstance(v, dict)} for m in model.modules()])
        for o,held in zip(self.objs, self.keep):
            lists = {k:[*map(short, v)] for k,v in held.items() if isinstance(v, (list,L))}
            self.all[type(o).__name__,id(o)] = {k:short(v) for k,v in held.items() if (k,v)!=('_past',None)},lists
        opt = learn and learn.opt
        if opt: self.all['opt'] = id(opt),[({k:bits(v) for k,v in s.items()},{**h}) for *_,s,h in opt.all_params()]
    def changed(self, other): return [k for k in self.all.keys()|other.all.keys() if self.all.get(k)!=other.all.get(k)]

def assert_as_it_was(see, f, n=20, done=lambda: False, again=lambda: None):
    "Broken off at any of `n` moments, `f` leaves what `see` sees; or it is `done`, if it could not stop any more, and `again` makes that as before."
    def whole_run(presses):
        assert not broken_off(f, presses)
        if done(): again()
        return presses.n
    for _ in range(2): counts = [whole_run(Presses(only=o)) for o in (None,check)] # at first, things are set up that are once
    before,late = see(),0
    for p in moments(*counts, n):
        stopped = broken_off(f, p)
        assert stopped==p.came, f"pressed at {p.at}, and not heard"
        if done():
            assert not p.stops, f"pressed at {p.at}, and heard too late"
            late += stopped
            again()
            before = see()
        elif stopped: assert not before.changed(see()), f"pressed at {p.at}"
        else: before = see()
    return late

def norms(model): return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
def is_folded(learn): return not norms(learn.model) and learn.opt is None and learn._past is not None

def trained(kind, path):
    "A learner with hostile norms, some of its layers in training mode."
    learn = train(KINDS[kind], path)
    randomize_norms(learn.model).train()
    next(learn.model.children()).eval()
    return learn

@pytest.fixture(params=['plain_learner','half_precision','tabular','pytorch_loaders'])
def learn(request, tmp_path):
    learn = trained(request.param, tmp_path)
    with learn.no_logging(): yield learn
@pytest.fixture
def plain(tmp_path):
    learn = trained('plain_learner', tmp_path)
    with learn.no_logging(): yield learn
def seen_by(learn): return lambda: Seen(learn.model, learn)

# Learners

def test_fold(learn):
    assert_as_it_was(seen_by(learn), learn.fold, 10, lambda: is_folded(learn), learn.unfold)

def test_fold_with_every_option(plain):
    for f in (plain.fold,plain.fold_bn):
        f = partial(f, strip_dropout=True, strip_identity=True, strip_unused=True, channels_last=True)
        assert_as_it_was(seen_by(plain), f, 10, lambda: is_folded(plain), plain.unfold)

def test_fold_plan(plain): assert_as_it_was(seen_by(plain), plain.fold_plan, 10)

def test_folded(learn):
    inside = 0
    def f():
        nonlocal inside
        with learn.folded():
            assert not norms(learn.model)
            inside += 1
    assert_as_it_was(seen_by(learn), f, 10)
    assert inside

def test_in_the_body_of_a_block_it_is_heard_at_once(plain):
    before,steps = seen_by(plain)(),[]
    for use in (lambda: steps.append('more'),plain.fold_plan,plain.unfold):
        with pytest.raises(KeyboardInterrupt), plain.folded():
            steps.append('in')
            signal.raise_signal(signal.SIGINT)
            steps.append('not here')
        assert not before.changed(seen_by(plain)())
    assert steps==['in']*3

def test_unfold(plain):
    "Before or after, and nothing in between."
    original = Seen(plain.model)
    plain.fold_bn()
    def again():
        assert not original.changed(Seen(plain.model))
        plain.fold_bn()
    assert_as_it_was(seen_by(plain), plain.unfold, 40, lambda: bool(norms(plain.model)), again)

def keeper(model, learn=None):
    "A function that gives back what is now, whatever was done."
    snap,held,opt = Snapshot(model),Contents(model),learn and learn.opt
    def again():
        snap.restore()
        held.restore()
        if learn: learn.opt,learn._past = opt,None
    return again

@pytest.mark.parametrize('what', ['whole','folded'])
def test_load(what, plain, tmp_path):
    "A file is loaded wholly or not at all, folded or not."
    plain.save('whole')
    plain.fold_bn().save('folded')
    want = torch.load(tmp_path/'models'/f'{what}.pth', weights_only=False)
    want = want.get('model', want)
    learn = trained('plain_learner', tmp_path)
    def done():
        have = learn.model.state_dict()
        return have.keys()==want.keys() and all(torch.equal(v, want[k]) for k,v in have.items())
    with torch.no_grad(): learn.model[-1].bias += 1
    assert_as_it_was(seen_by(learn), partial(learn.load, what), 20, done, keeper(learn.model, learn))

# Training

class Now(Callback):
    "Notes what training has made of the model, before it may be folded."
    order = -20
    def before_validate(self): self.learn.held_now = bytes_of(self.model)
def bytes_of(model): return [(id(t),bits(t)) for t in (*model.parameters(),*model.buffers())]

def test_folded_validation(plain):
    "Whenever training is broken off, the model has its norms, and in a validation also the numbers that it had."
    modules,folded = [*plain.model.modules()],0
    class Folded(Callback):
        def after_pred(self):
            nonlocal folded
            folded += not norms(self.model)
    cbs = [FoldedValidation(),Now(),Folded()]
    def f(): plain.fit(2, 1e-3, cbs=cbs)
    counts = []
    for only in (None,None,check):
        counts.append(Presses(only=only))
        broken_off(f, counts[-1])
    assert folded
    before = world()
    for p in moments(counts[1].n, counts[2].n, 20):
        plain.training,plain.held_now = True,None
        assert broken_off(f, p)==p.came
        assert [*plain.model.modules()]==modules and len(norms(plain.model))==3 and 'all_batches' not in vars(plain)
        if not plain.training and plain.held_now is not None: assert plain.held_now==bytes_of(plain.model)
        if p.only: assert world()==before # else it may have been between fastai's own
        torch.set_grad_enabled(True)
        plain.remove_cbs([cb for cb in plain.cbs if cb in cbs])
    with torch.no_grad(): f() # goes on as ever

def test_fold_callback(plain):
    "The fold at the end is whole, or there is none."
    cb = FoldCallback()
    def f(): plain.fit(1, 1e-3, cbs=cb)
    def fresh(): plain.remove_cbs([o for o in plain.cbs if o is cb])
    counts = []
    for only in (None,None,check):
        counts.append(Presses(only=only))
        broken_off(f, counts[-1])
        plain.unfold()
    n,times = len(norms(plain.model)),[0,0]
    for p in moments(counts[1].n, counts[2].n, 20):
        assert broken_off(f, p)==p.came
        assert is_folded(plain) or len(norms(plain.model))==n and plain.opt is not None
        times[is_folded(plain)] += 1
        if is_folded(plain): plain.unfold()
        fresh()
        torch.set_grad_enabled(True)
    assert times[0]

