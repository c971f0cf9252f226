"Memory formats: the faster one is kept, proved and undone, and the folded model goes wherever the original went."
import json, signal, time
from functools import partial
import matplotlib
matplotlib.use('agg')
import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.layers import ConvLayer
from fastai.learner import Learner,load_learner
from fastai.vision.all import CategoryBlock
from fastcore.basics import defaults
from torch import nn
from fasterfold.cost import compare
from fasterfold.fold import BN_Folder
from fasterfold.learner import FoldCallback
from fasterfold.proof import distance,run
from helpers import check_fold,eps_of,randomize_norms,timed_for
from learners import KINDS,images as digits,plain,small,train

LAST = torch.channels_last
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No progress bars, and latency measured for a moment only."
    monkeypatch.setattr('fasterfold.learner.report', timed_for(.03))
    monkeypatch.setattr('fasterfold.formats.compare', lambda *args, **kwargs: compare(*args, **kwargs|dict(seconds=.03)))
    monkeypatch.setattr(defaults, 'callbacks', [o for o in defaults.callbacks if o is not ProgressCallback])

class Sleeps(nn.Conv2d):
    "Takes long if its weight is in the format `slow`."
    slow = torch.contiguous_format
    def forward(self, x):
        if self.weight.is_contiguous(memory_format=self.slow): time.sleep(.003)
        return super().forward(x)

def sleepy(slow, *more):
    conv = Sleeps(1, 4, 3)
    conv.slow = slow
    last = Sleeps(4, 4, 3)
    last.slow = slow
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), last, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *more, nn.Linear(4, 10))

def learner(path, model):
    learn = plain(path, model)
    randomize_norms(learn.model).train()
    return learn

def norms(learn): return [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
def weights(model): return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels>1 and m.kernel_size!=(1,1)]
def are_last(model): return {w.is_contiguous(memory_format=LAST) for w in weights(model)}
def held(model):
    ts = *model.named_parameters(),*model.named_buffers()
    return [(k, id(t), t.data_ptr(), t.stride(), t.requires_grad, t.detach().clone()) for k,t in ts]
def same(a, b): return len(a)==len(b) and all(o[:5]==p[:5] and torch.equal(o[5], p[5]) for o,p in zip(a, b))
def images(): return torch.randn(4, 1, 8, 8)

# ---- What Learner.fold keeps

def test_the_faster_format_is_kept_and_reported(tmp_path):
    learn = learner(tmp_path, sleepy(torch.contiguous_format))
    before,original = held(learn.model),BN_Folder(verify=False).fold(learn.model, images())
    with learn.no_logging(): res = learn.fold()
    assert res.plan.format=='channels_last' and are_last(learn.model)=={True}
    for k,c in res.latency.items(): assert list(c)==['original','folded','channels_last'] and c['channels_last'].interval(c['folded'])[1]<1, k
    assert 'channels_last weights are faster here (1 item: 0.' in str(res) and res._columns[-1]=='channels_last'
    js = json.loads(res.to_json())
    assert js['format']=='channels_last' and js['formats']['1 item']['channels_last']<js['formats']['1 item']['contiguous']
    assert res.plan.proof.ok and are_last(original)=={False}
    assert all(b==pytest.approx(a, rel=1e-4) for a,b in res.metrics.values()) and 'valid_loss' in res.metrics
    learn.unfold()
    assert same(held(learn.model), before)

def test_nothing_changes_where_nothing_is_faster(tmp_path):
    learn = learner(tmp_path, sleepy(LAST))
    before,alone = held(learn.model),BN_Folder().fold(learn.model, images())
    folder = BN_Folder(channels_last='auto')
    auto = folder.fold(learn.model, images())
    with learn.no_logging(): res = learn.fold()
    for new in (learn.model,auto):
        assert [w.stride() for w in weights(new)]==[w.stride() for w in weights(alone)]
        for a,b in zip(new.state_dict().values(), alone.state_dict().values(), strict=True): assert torch.equal(a, b)
    for plan in (res.plan,folder.result):
        assert not plan.format and plan.notes[-1].startswith('channels_last weights are slower here (1 item: ') and plan.notes[-1].endswith(': kept as they were.')
    assert res._columns==['original','folded'] and list(res.latency['1 item'])==['original','folded','channels_last']
    learn.unfold()
    assert same(held(learn.model), before)

@pytest.mark.parametrize('options', [dict(channels_last=True),dict(channels_last=False)], ids=str)
def test_what_is_asked_for_is_done(options, tmp_path):
    "Where it is slower, too, and then the report says so; other ways to fold are as they were."
    learn = learner(tmp_path, sleepy(LAST))
    with learn.no_logging(): res = learn.fold(**options)
    assert are_last(learn.model)=={options['channels_last']} and len(res._columns)==(3 if options['channels_last'] else 2)
    assert ('are slower here' in str(res) and 'used, as asked for' in str(res))==options['channels_last']

def test_other_ways_to_fold_change_no_format(tmp_path):
    learn = learner(tmp_path, sleepy(torch.contiguous_format))
    with learn.no_logging():
        with learn.folded(): assert are_last(learn.model)=={False}
        assert not learn.fold_plan().notes
        learn.fit(1, cbs=FoldCallback())
    assert norms(learn)==[] and are_last(learn.model)=={False}
    assert are_last(learn.unfold().fold_bn().model)=={False}
    assert are_last(learn.unfold().fold_bn(channels_last=True).model)=={True}

def test_no_word_where_there_is_no_choice(tmp_path):
    "Tables have no images, 1-pixel windows are the same in both formats, and who trained in channels_last has it."
    learn = train(KINDS['tabular'], tmp_path)
    with learn.no_logging(): res = learn.fold()
    assert res._columns==['original','folded'] and list(res.latency['1 item'])==['original','folded']
    assert 'channels_last' not in str(res) and not res.plan.format and json.loads(res.to_json())['formats']=={}
    pixels = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    for net in (pixels,small().to(memory_format=LAST)):
        folder,strides = BN_Folder(channels_last='auto'),[p.stride() for p in net.parameters() if p.dim()==4]
        assert [p.stride() for p in folder.fold(net, images()).parameters() if p.dim()==4]==strides
        assert folder.formats is None and not folder.result.format and 'channels_last' not in str(folder.result)

def test_undo_and_fold_again():
    net,x,folder = randomize_norms(sleepy(LAST)).train(),images(),BN_Folder(channels_last=True)
    before = held(net)
    folder.fold(net, x, inplace=True)
    once = run(net, x)
    for _ in range(2):
        folder.undo()
        assert same(held(net), before)
        folder.refold()
        assert are_last(net)=={True} and torch.equal(run(net, x)[0], once[0]) and folder.result.format=='channels_last'
    folder.undo()
    assert same(held(net), before)

def test_no_second_copy_of_what_was_folded():
    "What undoing needs are the weights from before, not those in between."
    net,x,folder = randomize_norms(sleepy(LAST)),images(),BN_Folder(channels_last=True)
    folder.fold(net, x, inplace=True)
    held = [id(t) for s in folder._undo for t,_ in s.datas]
    assert len(held)==len({*held})==4 and folder.formats.weights==[]

# ---- The proof after the change

class Views(nn.Conv2d):
    def forward(self, x): return (y := super().forward(x)).view(len(y), -1)

class Strides(nn.Conv2d):
    "Reads memory as it lies."
    def forward(self, x):
        y = super().forward(x)
        return y.as_strided(y.shape, torch.empty(y.shape).stride()).flatten(1)

class Written(nn.Conv2d):
    "Takes the sum of what lies first in its weight."
    def forward(self, x): return super().forward(x).flatten(1)*self.weight.as_strided((5,), (1,)).sum()

WRONG = [(Views,'the folded model does not run with them (RuntimeError: view size is not compatible'),(Strides,'does not compute the same with them'),
    (Written,'does not compute the same with them')]
@pytest.mark.parametrize('channels_last', [True,'auto'])
@pytest.mark.parametrize('kind,why', WRONG)
def test_a_model_that_breaks_keeps_its_format(kind, why, channels_last):
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), kind(4, 4, 3), nn.Linear(144, 3))),images()
    folder,alone = BN_Folder(channels_last=channels_last),BN_Folder().fold(net, x)
    new = folder.fold(net, x)
    assert folder.result.notes[-1].startswith('channels_last weights are not used: ') and why in folder.result.notes[-1]
    assert len(folder.result.folded)==1 and not folder.result.format and folder.result.proof.ok and folder.formats is None
    assert torch.equal(run(new, x)[0], run(alone, x)[0]) and are_last(new)=={False}

def test_a_learner_whose_model_breaks_says_so(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Views(4, 4, 3), nn.Linear(144, 10))
    learn = learner(tmp_path, net)
    before = held(net)
    with learn.no_logging(): res = learn.fold()
    assert 'channels_last weights are not used: the folded model does not run' in str(res) and res._columns==['original','folded']
    assert are_last(net)=={False}
    learn.unfold()
    assert same(held(net), before)

def test_what_cannot_be_compared_keeps_its_format():
    class Hides(nn.Conv2d):
        def forward(self, x): return iter([super().forward(x)])
    net,x,folder = Hides(2, 4, 3),torch.randn(2, 2, 8, 8),BN_Folder(channels_last=True)
    assert are_last(folder.fold(net, x))=={False} and 'are not used: The model returns' in folder.result.notes[-1]
    assert are_last(BN_Folder(channels_last=True, verify=False).fold(net, x))=={True}

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32,torch.bfloat16,torch.float16])
def test_dtypes_and_modes(dtype):
    for train in (False,True):
        net,x,folder = randomize_norms(sleepy(LAST, nn.BatchNorm1d(4))).to(dtype).train(train),images().to(dtype),BN_Folder(channels_last=True)
        new = folder.fold(net, x)
        assert are_last(new)=={True} and len(folder.result.folded)==3 and folder.result.format and new.training==train, folder.result
        if dtype in (torch.float32,torch.float64): check_fold(net, new, x)

# ---- Ctrl-C

class Pressed(nn.Conv2d):
    "Ctrl-C comes when it runs in `channels_last` for the last time of these."
    left = [0]
    def forward(self, x):
        if self.weight.is_contiguous(memory_format=LAST):
            self.left[0] -= 1
            if not self.left[0]: signal.raise_signal(signal.SIGINT)
        return super().forward(x)

@pytest.mark.parametrize('times', [1,12]) # in the proof, and in the middle of a turn
def test_interrupted(times, ctrl_c, tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Pressed(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    learn = learner(tmp_path, net)
    learn.create_opt()
    for f in (learn.fold,partial(BN_Folder(channels_last='auto').fold, net, images(), inplace=True)):
        before,opt,Pressed.left[0] = held(net),learn.opt,times
        with learn.no_logging(), pytest.raises(KeyboardInterrupt): f()
        assert Pressed.left[0]<=0 and same(held(net), before) and learn.opt is opt and net.training and isinstance(net[1], nn.BatchNorm2d)

# ---- Where it goes

@pytest.fixture
def folded(tmp_path):
    "A learner left in channels_last, and a batch."
    learn = learner(tmp_path, small()).fold_bn(channels_last=True)
    assert are_last(learn.model)=={True}
    return learn,learn.dls.valid.one_batch()[0]

def assert_close(a, b, like): assert distance(a, b)<=100*eps_of(like)

def test_export(tmp_path):
    net = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(digits(tmp_path, CategoryBlock, n=60, bs=4), net)
    x = learn.dls.valid.one_batch()[0]
    with learn.no_logging(): learn.fold(channels_last=True)
    learn.export('last.pkl')
    again = load_learner(tmp_path/'last.pkl')
    assert are_last(again.model)=={True} and torch.equal(run(again.model, x)[0], run(learn.model, x)[0])
    assert [p.stride() for p in again.model.parameters()]==[p.stride() for p in learn.model.parameters()]

@pytest.mark.parametrize('last', [False,True])
def test_save_and_load(last, folded, tmp_path):
    "Each learner keeps its own format, and gets the numbers of the file."
    learn,x = folded
    learn.save('last')
    new = plain(tmp_path).fold_bn(channels_last=last).load('last')
    assert are_last(new.model)=={last}
    for a,b in zip(new.model.state_dict().values(), learn.model.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert_close(run(new.model, x), run(learn.model, x), new.model)
    fresh = plain(tmp_path).load('last')
    assert_close(run(fresh.model, x), run(learn.model, x), fresh.model)

def test_safetensors(folded, tmp_path):
    from safetensors.torch import save_model
    from fasterfold.load import fold_like
    learn,x = folded
    save_model(learn.model, str(tmp_path/'last.safetensors'))
    new = fold_like(plain(tmp_path).model, tmp_path/'last.safetensors')
    assert_close(run(new, x), run(learn.model, x), new)

def test_compiled_before(tmp_path):
    "A model that was compiled, and called, before it is folded and gets another format."
    learn,x = learner(tmp_path, sleepy(torch.contiguous_format)),images()
    inner = learn.model.eval()
    learn.model = torch.compile(inner, backend='eager')
    with torch.no_grad():
        refs = [learn.model(x)]
        with learn.no_logging(): learn.fold()
        inner.eval()
        assert are_last(inner)=={True}
        assert_close([learn.model(x)], refs, inner)
        learn.unfold()
        inner.eval()
        assert are_last(inner)=={False}
        assert_close([learn.model(x)], refs, inner)
