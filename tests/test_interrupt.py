"""Ctrl-C at any moment: everything is as it was, or all is done.

Between two checks of an operation a signal waits, at each call and return, which is looked at for all of them. So what can happen is that it is heard at a check, or before the operation takes the key, or after. A part of these moments is tried here,
and some others; `INTERRUPT=1` tries all that differ, each in a process of its own, and `INTERRUPT=2` all calls and returns in an operation, which takes hours for each."""
import gc, inspect, logging, os, random, shutil, signal, subprocess, sys, textwrap, threading, time, traceback, warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastcore.basics import defaults
from fastcore.foundation import L
from torch import nn
from typer.testing import CliRunner
from torch.nn.modules import module as hooks
from fasterfold import interrupt
from fasterfold.bench import engines
from fasterfold.cli import app
from fasterfold.edit import Snapshot
from fasterfold.all import BN_Folder,FoldCallback,FoldedValidation,fold_like,latency
from fasterfold.interrupt import check
from fasterfold.state import Contents
from helpers import randomize_norms,state,timed_for
from learners import KINDS,train

every = int(os.environ.get('INTERRUPT', 0))

@pytest.fixture(autouse=True)
def quick(ctrl_c, monkeypatch):
    "No bars, latency measured for a moment only, and no plans read again."
    monkeypatch.setattr('fasterfold.learner.report', timed_for(.001))
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])

@pytest.fixture(autouse=True)
def true_reasons(): "The plans made here are those of other tests."

def passed_over(frame, event, arg):
    "At a `yield` and before a block of PyTorch's own ends, an exception of a profile function leaves without the `finally` around it; a signal's never does."
    out = event=='return' and frame.f_code.co_flags & inspect.CO_GENERATOR or event=='c_call' and arg.__name__=='__exit__'
    return frame.f_code is broken_off.__code__ or out

class Presses:
    "Presses Ctrl-C at the calls and returns `at`; if `only` is given, at calls of that function."
    def __init__(self, *at, only=None): self.at,self.first,self.only,self.n,self.stops = at,min(at, default=float('inf')),only,0,0
    @property
    def came(self): return self.n>=self.first
    def __call__(self, frame, event, arg):
        if self.n>=self.first and event=='call' and frame.f_code is check.__code__: self.stops += 1 # where it can be heard from now on
        if passed_over(frame, event, arg) or self.only and (event!='call' or frame.f_code is not self.only.__code__): return
        self.n += 1
        if self.n in self.at: signal.raise_signal(signal.SIGINT)

class Looks:
    "Counts calls and returns, checks, and lists those at which a signal would not wait."
    def __init__(self): self.n,self.checks,self.open,self.places = 0,0,[],[None]
    def __call__(self, frame, event, arg):
        if frame.f_code is broken_off.__code__: return
        if event=='call': self.places.append(interrupt._place(frame))
        here = not passed_over(frame, event, arg)
        self.n += here
        self.checks += event=='call' and frame.f_code is check.__code__
        if here and (self.places[-1] is None or signal.getsignal(signal.SIGINT) is not interrupt._on_signal): self.open.append(self.n)
        if event=='return': self.places.pop()

class Forks(Presses):
    "Presses Ctrl-C at all calls and returns in an operation that differ, or at all that there are, in a process that is forked for that."
    def __init__(self, moved=lambda: None, share=1): # `moved` is called first in each
        self.moved,self.share,self.inside,self.total,self.failed,self.looks,self.draw = moved,share,0,0,[],Looks(),random.Random(0).random
    @property
    def forked(self): return hasattr(self, 'at')
    def __call__(self, frame, event, arg):
        if self.forked: return super().__call__(frame, event, arg)
        if frame.f_code is broken_off.__code__: return
        name,known = frame.f_globals.get('__name__', ''),len(self.looks.open)+self.looks.checks
        ours = event in ('call','return') and name.startswith('fasterfold.') and name!='fasterfold.learner' # whose methods of `Learner` pass on what fastai calls
        self.inside += ours and event=='call'
        self.looks(frame, event, arg)
        if self.inside and not passed_over(frame, event, arg) and (every>1 or len(self.looks.open)+self.looks.checks>known) and self.draw()<self.share:
            self.total += 1
            drawn = random.getstate()
            if pid := os.fork(): self.failed += [self.total]*bool(os.waitpid(pid, 0)[1])
            else:
                random.setstate(drawn) # which Python seeds anew in a new process
                self.moved()
                super().__init__(1)
                super().__call__(frame, 'forked', arg)
        self.inside -= ours and event=='return'

def everywhere(f, verdict, **kwargs):
    "`verdict` of what each process found that pressed somewhere in `f`: a function of who pressed, and of whether `f` was broken off."
    forks = Forks(**kwargs)
    gc.collect()
    gc.freeze() # else each process copies what its collector looks at
    stopped = broken_off(f, forks)
    if forks.forked:
        try: verdict(forks, stopped)
        except BaseException: # this process must not go on as if it were the first
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(f'{forks.total} calls and returns')
    assert not stopped and not forks.failed and forks.total>20

def broken_off(f, presses):
    "Was `f` broken off by one of `presses`? Where something is thrown away, Python loses what is raised, and goes on as if nobody had pressed."
    lost,tell = [],sys.unraisablehook
    def hook(u): lost.append(True) if u.exc_type is KeyboardInterrupt else tell(u)
    with patch.object(sys, 'unraisablehook', hook):
        sys.setprofile(presses)
        try: f()
        except KeyboardInterrupt: return True
        finally: sys.setprofile(None)
    if lost: presses.first = float('inf')
    return False

def looked_at(f, again=lambda: None, Looks=Looks):
    "What there is to press at in `f`, once that is set up which is so at first."
    f()
    again()
    looks = Looks()
    assert not broken_off(f, looks)
    again()
    return looks

class Counts(Looks):
    "Without the list, where that would have nearly all."
    def __call__(self, frame, event, arg):
        self.n += not passed_over(frame, event, arg)
        self.checks += event=='call' and frame.f_code is check.__code__

def some(items, n, g): return items if len(items)<=n else [items[g.randrange(len(items)*i//n, len(items)*(i+1)//n)] for i in range(n)]

def moments(looks, n):
    "Presses at `n` checks, `n` calls and returns at which a signal does not wait, and some at which it does; every other time, a second press follows."
    g = random.Random(0)
    calls = some(looks.open or range(1, looks.n+1), n, g)+[g.randint(1, looks.n) for _ in range(n//2)]
    for i,k in enumerate(calls): yield Presses(k, *([k+int(10**(5*g.random()))] if i%2 else []))
    for k in some(range(1, looks.checks+1), n, g): yield Presses(k, *([k+1] if k%2 else []), only=check)

def world():
    "What is everybody's."
    stacks = torch._C._len_torch_function_stack(),torch._C._len_torch_dispatch_stack(),torch._C._is_torch_function_enabled()
    modes = torch.is_grad_enabled(),torch.is_inference_mode_enabled(),torch.is_autocast_enabled('cpu'),torch.get_default_dtype(),torch.get_num_threads()
    listening = [{**v} for k,v in vars(hooks).items() if k.startswith('_global_') and isinstance(v, dict) and 'with_kwargs' not in k] # from which PyTorch takes nothing
    return dict(handler=signal.getsignal(signal.SIGINT), waits=interrupt._pressed.at, stacks=stacks, modes=modes, listening=listening, gc=gc.isenabled(),
        warnings=[*warnings.filters], logging=logging.root.manager.disable)

def short(v): return v if v is None or isinstance(v, (int,float,str)) else id(v)
def bits(v): return v.detach().cpu().numpy().tobytes() if torch.is_tensor(v) else v

class Seen:
    "All that a Ctrl-C must leave alone."
    def __init__(self, model, learn=None, *others):
        self.objs = [*others] if learn is None else [learn, *learn.cbs, *learn.metrics, learn.recorder.loss, learn.recorder.smooth_loss]
        self.keep = [{**vars(o)} for o in self.objs] # no other object may have their ids meanwhile
        self.all = world()|dict(model=state(model), dicts=[{type(v) for v in vars(m).values() if isinstance(v, dict)} for m in model.modules()])
        for o,held in zip(self.objs, self.keep):
            lists = {k:[*map(short, v)] for k,v in held.items() if isinstance(v, (list,L))}
            self.all[type(o).__name__,id(o)] = {k:short(v) for k,v in held.items() if (k,v)!=('_past',None)},lists
        opt = learn and learn.opt
        if opt: self.all['opt'] = id(opt),[({k:bits(v) for k,v in s.items()},{**h}) for *_,s,h in opt.all_params()]
    def changed(self, other): return [k for k in self.all.keys()|other.all.keys() if self.all.get(k)!=other.all.get(k)]

def assert_waits(looks):
    "Only before an operation begins and after its end, a signal does not wait."
    inner = [b-a for a,b in zip(looks.open, looks.open[1:]) if b-a>1]
    assert len(inner)==1 and len(looks.open)<100

def assert_as_it_was(see, f, n=20, done=lambda: False, again=lambda: None):
    "Broken off at any of `n` moments of a kind, `f` leaves what `see` sees; or it is `done`, if it could not stop any more, and `again` makes that as before."
    looks = looked_at(f, lambda: done() and again())
    assert_waits(looks)
    before = see()
    def verdict(p, stopped):
        assert stopped==p.came, f"pressed at {p.at}, and not heard"
        if done(): assert not p.stops, f"pressed at {p.at}, and heard too late"
        elif stopped: assert not before.changed(see()), f"pressed at {p.at}"
    if every:
        everywhere(f, verdict)
        return done() and again()
    for p in moments(looks, n):
        stopped = broken_off(f, p)
        verdict(p, stopped)
        late = done()
        if late: again()
        if late or not stopped: before = see()

def norms(model): return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
def is_folded(learn): return not norms(learn.model) and learn.opt is None and learn._past is not None

def trained(kind, path):
    "A learner with hostile norms, some of its layers in training mode."
    learn = train(KINDS[kind], path)
    randomize_norms(learn.model).train()
    next(learn.model.children()).eval()
    return learn

@pytest.fixture(params=['plain_learner','half_precision','pytorch_loaders'])
def learn(request, tmp_path):
    learn = trained(request.param, tmp_path)
    with learn.no_logging(): yield learn
@pytest.fixture
def plain(tmp_path):
    learn = trained('plain_learner', tmp_path)
    with learn.no_logging(): yield learn
def seen_by(learn): return lambda: Seen(learn.model, learn)

# Learners

def test_fold(learn): assert_as_it_was(seen_by(learn), learn.fold, 6, lambda: is_folded(learn), learn.unfold)

def test_fold_with_every_option(plain):
    f = partial(plain.fold_bn, strip_dropout=True, strip_identity=True, strip_unused=True, channels_last=True)
    assert_as_it_was(seen_by(plain), f, 6, lambda: is_folded(plain), plain.unfold)

def test_fold_plan(plain): assert_as_it_was(seen_by(plain), plain.fold_plan, 6)

def test_fold_bench(plain):
    with patch.dict(engines, {k:engines[k] for k in ('eager','channels_last')}, clear=True): # the others are not ours
        assert_as_it_was(seen_by(plain), partial(plain.fold_bench, seconds=.001), 6)

def test_folded(plain):
    inside = 0
    def f():
        nonlocal inside
        with plain.folded(): inside += 1
    assert_as_it_was(seen_by(plain), f, 8)
    assert inside
    with plain.folded(): assert not norms(plain.model)

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
    assert_as_it_was(seen_by(plain), plain.unfold, 15, lambda: bool(norms(plain.model)), again)

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
    looks,before = looked_at(f, Looks=Counts),world()
    assert folded
    def verdict(p, stopped):
        assert stopped==p.came
        assert [*plain.model.modules()]==modules and len(norms(plain.model))==3 and 'all_batches' not in vars(plain)
        if not plain.training and plain.held_now is not None: assert plain.held_now==bytes_of(plain.model)
        if p.only: assert world()==before # else it may have been between fastai's own
    if every: return everywhere(f, verdict)
    for p in moments(looks, 8):
        plain.training,plain.held_now = True,None
        verdict(p, broken_off(f, p))
        torch.set_grad_enabled(True)
        plain.remove_cbs([cb for cb in plain.cbs if cb in cbs])
    f() # goes on as ever

def test_fold_callback(plain):
    "The fold at the end is whole, or there is none."
    cb = FoldCallback()
    def f(): plain.fit(1, 1e-3, cbs=cb)
    def fresh(): plain.remove_cbs([o for o in plain.cbs if o is cb])
    looks = looked_at(f, plain.unfold, Counts)
    n,times = len(norms(plain.model)),[0,0]
    def verdict(p, stopped):
        assert stopped==p.came
        assert is_folded(plain) or len(norms(plain.model))==n and plain.opt is not None
    if every: return everywhere(f, verdict)
    for p in moments(looks, 8):
        verdict(p, broken_off(f, p))
        times[is_folded(plain)] += 1
        if is_folded(plain): plain.unfold()
        fresh()
        torch.set_grad_enabled(True)
    assert times[0]


def test_fine_tune_leaves_no_count(plain):
    "Else a `FoldCallback` would wait for a second training that never comes."
    plain.add_cb(FoldCallback())
    two = type(plain).fine_tune.__globals__['_two_fits'].__wrapped__
    def f():
        try: plain.fine_tune(1, 1e-3)
        finally: plain.opt = plain.opt or plain._past and plain.unfold().opt
    calls = Presses(only=two) # it is called to begin, and again to end
    broken_off(f, calls)
    for k in range(1, calls.n+1):
        p = Presses(k, only=two)
        assert broken_off(f, p) and p.came
        assert 'fits_left' not in vars(plain) and len(norms(plain.model))==3
        torch.set_grad_enabled(True)

# Any model

class Pressing(nn.Sequential):
    "In whose forward pass Ctrl-C is pressed."
    def __init__(self, times=1):
        super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.times = times
    def forward(self, x):
        for _ in range(self.times): signal.raise_signal(signal.SIGINT)
        return super().forward(x)

class Net(nn.Module):
    "All that a folder has to do: weights that are computed, norms that go both ways and one that stays, dropout, a layer that never runs."
    def __init__(self):
        super().__init__()
        conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        body = conv,nn.BatchNorm2d(4),nn.ReLU(inplace=True),nn.Conv2d(4, 4, 1),nn.Sigmoid(),nn.BatchNorm2d(4)
        self.body = nn.Sequential(*body, nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 3))
        self.aux = nn.Linear(2, 2)
    def forward(self, x): return self.body(x)

def net():
    torch.manual_seed(0)
    model = randomize_norms(Net()).train()
    model.body[1].eval()
    return model
options = dict(strip_dropout=True, strip_identity=True, strip_unused=True, channels_last=True)
x = torch.linspace(-1, 1, 2*3*8*8).view(2, 3, 8, 8)

def test_folder_in_place():
    model,folder = net(),BN_Folder(**options)
    assert_as_it_was(lambda: Seen(model, None, folder), lambda: folder.fold(model, x, inplace=True), 8, lambda: bool(folder._undo), folder.undo)

def test_folder_keeps_what_it_can_undo():
    "A fold of another model that is broken off takes nothing from the last one."
    model,other,folder = net(),Pressing(),BN_Folder()
    before = Seen(model)
    folder.fold(model, x, inplace=True)
    with pytest.raises(KeyboardInterrupt): folder.fold(other, torch.ones(2, 3), inplace=True)
    folder.undo()
    assert not before.changed(Seen(model))

def test_copies_and_plans():
    "The model is as it was in any case, and so is the folder, unless it has another copy."
    model,folder = net(),BN_Folder(**options)
    for f in (folder.fold,folder.plan):
        f(model, x)
        last = [folder.result]
        def renew(): last[:] = [folder.result]
        assert_as_it_was(lambda: Seen(model, None, folder), partial(f, model, x), 5, lambda: folder.result is not last[0], renew)

def test_undo_and_refold():
    model,folder = net(),BN_Folder(**options)
    original = Seen(model)
    folder.fold(model, x, inplace=True)
    assert_as_it_was(lambda: Seen(model, None, folder), folder.undo, 10, lambda: not folder._undo, folder.refold)
    folder.undo()
    assert not original.changed(Seen(model))
    assert_as_it_was(lambda: Seen(model, None, folder), folder.refold, 10, lambda: bool(folder._undo), folder.undo)

def test_fold_like(tmp_path):
    folded = BN_Folder(**options).fold(net(), x)
    torch.save(folded.state_dict(), tmp_path/'folded.pth')
    model = net()
    for given in (folded.state_dict(),tmp_path/'folded.pth'):
        assert_as_it_was(lambda: Seen(model), lambda: fold_like(model, given, x), 15, lambda: not norms(model)[1:], keeper(model))

def test_latency():
    model = net()
    assert_as_it_was(lambda: Seen(model), lambda: latency(model, x, .001), 10)

# The command

@pytest.fixture
def box(tmp_path, monkeypatch):
    "A folder with an exported learner and an old report."
    train(KINDS['tabular'], tmp_path).export('export.pkl')
    (tmp_path/'report.html').write_text('old')
    monkeypatch.chdir(tmp_path)
    return tmp_path

def files(path): return {p.name:p.read_bytes() for p in path.iterdir() if p.is_file()}
ARGS = 'fold','export.pkl','--trust','-o','folded.pkl','--report','report.html','--force'

def right(before, path, code, said):
    "Are files all there or as before, is nothing else left, and is it said? Were they written?"
    after = files(path)
    if after==before: return code==130 and said in ('','fasterfold: Interrupted: nothing was written.\n'),False
    new = {*after}==before.keys()|{'folded.pkl'} and after['report.html']!=b'old' and after['export.pkl']==before['export.pkl']
    return new and (code,said) in ((0,''),(130,'fasterfold: Interrupted after folded.pkl and report.html had been written.\n'),(130,'')),True

def test_command(box, monkeypatch):
    monkeypatch.setattr('fasterfold.report.report', timed_for(.001))
    before,runner,res = files(box),CliRunner(**{k:False for k in inspect.signature(CliRunner).parameters if k=='mix_stderr'}),[]
    def f(): res[:] = [runner.invoke(app, ARGS)]
    looks = looked_at(f, Looks=Counts)
    assert res[0].exit_code==0 and files(box)!=before
    def anew():
        (box/'folded.pkl').unlink(missing_ok=True)
        (box/'report.html').write_text('old')
        res.clear()
    def verdict(p, stopped):
        if not p.came: return
        ok,written = right(before, Path.cwd(), *((res[0].exit_code,res[0].stderr) if res else (130,'')))
        assert ok and not (written and p.stops), (p.at, res)
        now = world()
        assert {k for k in now if now[k]!=around[k]} <= {'modes'} # which a block of PyTorch's own, broken off at its ends where no operation is, may leave
        if every: shutil.rmtree(Path.cwd())
    around = world()
    if every:
        anew()
        apart = lambda: os.chdir(shutil.copytree(box, box.parent/f'box{os.getpid()}'))
        return everywhere(f, verdict, moved=apart, share=1 if every>1 else .01) # where no operation is, it is heard at once, and that is nearly everywhere
    for p in moments(looks, 5):
        anew()
        around = world()
        broken_off(f, p) # outside of the command, too
        verdict(p, None)

@pytest.mark.parametrize('writing', [True,False])
def test_command_in_its_process(writing, box):
    "Pressed as in a terminal, while a file is being written or at any other time."
    before = files(box)
    run = subprocess.Popen([Path(sys.executable).parent/'fasterfold', *ARGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if writing:
        while run.poll() is None and not [*box.glob('.folded.*.tmp.pkl')]: time.sleep(.01)
    else: time.sleep(random.uniform(2, 5))
    run.send_signal(signal.SIGINT)
    said = run.communicate()[1]
    early = run.returncode==-signal.SIGINT # it was still being imported
    ok,_ = right(before, box, 130 if early else run.returncode, '' if early else ''.join(l for l in said.splitlines(True) if l.startswith('fasterfold: ')))
    assert ok, said

# As it comes: between any two steps, from outside

def test_at_any_time(plain):
    g = random.Random()
    f = plain.fold
    start = time.perf_counter()
    f()
    took = time.perf_counter()-start
    plain.unfold()
    for _ in range(30):
        before = seen_by(plain)()
        timer = threading.Timer(g.uniform(0, took), os.kill, (os.getpid(),signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            f()
            time.sleep(10)
        timer.join()
        if is_folded(plain): plain.unfold()
        else: assert not before.changed(seen_by(plain)())

def test_a_script(tmp_path):
    "Ctrl-C at random moments of a script that folds, and shows bars."
    code = f"""
        import sys, time, warnings
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_interrupt as t
        learn = t.trained('plain_learner', t.Path({str(tmp_path)!r}))
        def say(s): print(s, file=sys.stderr, flush=True)
        for i in range(6):
            before = t.Seen(learn.model, learn)
            try:
                say('go')
                learn.fold()
                time.sleep(60)
            except KeyboardInterrupt: pass
            if t.is_folded(learn): learn.unfold()
            else: say(before.changed(t.Seen(learn.model, learn)))
        say('end')"""
    run = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = []
    for line in run.stderr:
        said.append(line.strip())
        if said[-1]=='go':
            time.sleep(random.uniform(0, 3))
            run.send_signal(signal.SIGINT)
    assert run.wait()==0 and said[-1]=='end', said
    assert all(o=='[]' for o in said if o[0]=='[')

# Who hears of it

def test_nobody_is_asked_in_other_threads():
    "They are not interrupted; a Ctrl-C is for the main thread, which is not asked to wait for them."
    model,seen = net(),[]
    def f(): seen.append(BN_Folder().plan(model, x))
    thread = threading.Thread(target=f)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        signal.raise_signal(signal.SIGINT)
    thread.join()
    assert seen and world()['waits'] is None

def test_a_handler_of_the_program_hears_of_each():
    "And if it does not raise, the fold goes on."
    heard,model = [],Pressing()
    old = signal.signal(signal.SIGINT, lambda *args: heard.append(args[0]))
    BN_Folder().fold(model, torch.ones(2, 3), inplace=True)
    assert signal.getsignal(signal.SIGINT) is not old and signal.signal(signal.SIGINT, old) and heard
    assert not norms(model) and {*heard}=={signal.SIGINT}

@pytest.mark.parametrize('handler', [signal.SIG_IGN,signal.SIG_DFL])
def test_programs_that_do_not_ask_python(handler):
    "One that ignores the signal goes on doing so, and one that ends by it is asked for nothing."
    old,seen = signal.signal(signal.SIGINT, handler),[]
    class Look(Pressing):
        def forward(self, x):
            seen.append(signal.getsignal(signal.SIGINT))
            return super().forward(x)
    try: BN_Folder().fold(Look(times=handler==signal.SIG_IGN), torch.ones(2, 3))
    finally: signal.signal(signal.SIGINT, old)
    assert {*seen}=={handler}

def test_a_model_that_takes_the_signal_keeps_it():
    class Takes(Pressing):
        def forward(self, x):
            signal.signal(signal.SIGINT, mine)
            return super().forward(x)
    heard = []
    def mine(*args): heard.append(args)
    model,old = Takes(),signal.getsignal(signal.SIGINT)
    BN_Folder().fold(model, torch.ones(2, 3), inplace=True)
    assert signal.signal(signal.SIGINT, old) is mine and heard and not norms(model)

# What never ends

class Hanging(Pressing):
    "Sleeps on, and only a second Ctrl-C ends it."
    def forward(self, x):
        end = time.monotonic()+30
        for wait in (.2,1.): threading.Timer(wait, os.kill, (os.getpid(),signal.SIGINT)).start()
        while time.monotonic()<end: time.sleep(.01)
        raise AssertionError

def test_a_second_press_ends_what_hangs(monkeypatch):
    monkeypatch.setattr(interrupt, 'patience', .5)
    model = Hanging()
    before,start = Seen(model),time.monotonic()
    with pytest.raises(KeyboardInterrupt): BN_Folder().fold(model, torch.ones(2, 3), inplace=True)
    assert 1<=time.monotonic()-start<10 and not before.changed(Seen(model))

def test_a_second_press_ends_a_validation_that_hangs(plain, monkeypatch):
    monkeypatch.setattr(interrupt, 'patience', -1)
    class Press(Callback):
        "Twice in a batch, in the middle of what fastai does."
        def after_pred(self):
            for _ in range(2): signal.raise_signal(signal.SIGINT)
    plain.add_cb(Press())
    before = seen_by(plain)()
    with pytest.raises(KeyboardInterrupt): plain.fold()
    assert not before.changed(seen_by(plain)())
