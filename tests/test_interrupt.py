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
from fasterfold.all import BN_Folder,FoldCallback,FoldError,FoldedValidation,fold_like,latency
from fasterfold.interrupt import block,check,interruptible,whole
from fasterfold.report import report
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

def moments(calls, checks, n):
    "Presses at `n` of `calls` calls, spread over all of them, and at all of `checks` checks; every other time, a second press follows."
    g = random.Random(0)
    for i,k in enumerate(range(1, calls) if every else [g.randint(1+calls*i//n, max(1, calls*(i+1)//n-1)) for i in range(n)]):
        yield Presses(k, *([k+int(10**(5*g.random()))] if i%2 else []))
    for k in range(1, checks+1): yield Presses(k, *([k+1] if k%2 else []), only=check)

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

def folds(learn): return not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in learn.model.modules())
def is_folded(learn): return folds(learn) and learn.opt is None and learn._past is not None

@pytest.fixture(params=['plain_learner','half_precision','tabular','pytorch_loaders'])
def learn(request, tmp_path):
    learn = train(KINDS[request.param], tmp_path)
    randomize_norms(learn.model).train()
    learn.model[0].eval() if isinstance(learn.model, nn.Sequential) else learn.model.embeds.eval()
    with learn.no_logging(): yield learn

def fold(learn): learn.fold()
def fold_bn(learn): learn.fold_bn(strip_dropout=True, strip_identity=True)
@pytest.mark.parametrize('f', [fold,fold_bn])
def test_fold(f, learn):
    assert_as_it_was(lambda: Seen(learn.model, learn), partial(f, learn), done=lambda: is_folded(learn), again=learn.unfold)
