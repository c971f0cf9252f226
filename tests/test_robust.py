"Whatever goes wrong, the model is as it was; and what is folded keeps its dtype, device, memory format and wrappers."
import copy, gc, io, random, sys
import numpy as np, pytest, torch, torch.nn.functional as F
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
import fasterfold.cover as cover_module, fasterfold.edit as edit_module, fasterfold.fold as fold_module
import fasterfold.proof as proof_module, fasterfold.sample as sample_module
from fasterfold.affine import Affine
from fasterfold.proof import run_as
from fasterfold.state import FoldError
from helpers import *

DRAWS = (lambda: torch.rand(1)),random.random,np.random.rand # of the last two nobody knows whether they decide, so eight more inputs are tried

class Noisy(nn.Module):
    "Draws random numbers and drops them; counts its calls in a buffer."
    def __init__(self, draws):
        super().__init__()
        self.draws = draws
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, x):
        for draw in self.draws: draw()
        self.calls += 1
        return x

def seen(m, args, out): pass

def network(stays=False, draws=DRAWS):
    "Modes, gradients and hooks of every kind, and norms that fold back and forward; if one `stays`, the sample itself is traced too."
    body = nn.Conv2d(3, 4, 3, bias=False),nn.BatchNorm2d(4),nn.ReLU(inplace=True),Noisy(draws),nn.BatchNorm2d(4),nn.Conv2d(4, 6, 3),nn.BatchNorm2d(6)
    net = nn.Sequential(*body, nn.Dropout2d(), nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2))
    net = randomize_norms(net).train()
    for i in (1,7): net[i].eval()
    net[0].weight.requires_grad_(False)
    net[9].bias.requires_grad_(False)
    net[2].register_forward_hook(seen)
    if stays: net[11].register_forward_hook(seen)
    net[12].weight.grad = torch.ones_like(net[12].weight)
    return net
def sample(): return torch.randn(4, 3, 8, 8)

ERRORS = RuntimeError,MemoryError,KeyboardInterrupt,GeneratorExit

def unharmed(net, x, error, folder=None):
    "Fold in place and as a copy while something raises `error`; returns whether it came through, which it does as a `FoldError` only, unless it is Ctrl-C or the like."
    before,grads = state(net),[p.grad for p in net.parameters()]
    folder = folder or BN_Folder()
    came = False
    for inplace in (True,False):
        try: folder.fold(net, x, inplace=inplace)
        except FoldError: came = True
        except error as e:
            came = True
            assert not isinstance(e, Exception)
        else:
            if inplace: folder.undo()
        assert state(net)==before and all(p.grad is g for p,g in zip(net.parameters(), grads))
    return came

STAGES = {cover_module:'trace plan_folds another open_questions', fold_module:'glance Cover widen describe apply_plan Snapshot compare_runs prove run_as copy_model', edit_module:'edited', proof_module:'distance', nn:'Identity',
    sample_module:'infer_sample', Sample:'of copied run resized varied'}
@pytest.mark.parametrize('error,stays', [*zip(ERRORS, [False,True]*2),(KeyboardInterrupt,True)])
@pytest.mark.parametrize('home,stage', [(home,o) for home,names in STAGES.items() for o in names.split()])
def test_error_at_a_stage(home, stage, error, stays, monkeypatch):
    "Each stage fails once, at its first, second, … call."
    net,x,right = network(stays, DRAWS[:1] if stays else DRAWS).double(),sample().double(),getattr(home, stage)
    if stage in ('prove','run_as','distance'): net,x = net.bfloat16(),x.bfloat16() # half precision is proved in float64
    failures = 0
    for n in (1,2,3,5,8,13,21):
        calls = 0
        def fails(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls==n: raise error('planted')
            return right(*args, **kwargs)
        with monkeypatch.context() as m:
            m.setattr(home, stage, fails)
            failures += unharmed(net, None if stage=='infer_sample' else x, error)
        if calls<n: break
    spare = 'run','prove','run_as','distance','trace','copied','Cover','glance' # another way is tried
    assert calls and (failures or stage in spare and error is not KeyboardInterrupt)

class Bomb(TorchDispatchMode):
    "Raises `error` instead of running operation number `at`, copies into existing memory not counted: with these a model is put back."
    def __init__(self, at, error):
        super().__init__()
        self.at,self.error,self.n = at,error,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is not torch.ops.aten.copy_.default
        if self.n==self.at and func is not torch.ops.aten.copy_.default: raise self.error('planted')
        return func(*args, **(kwargs or {}))

FORMAT_AND_STRIPS = dict(channels_last=True, strip_dropout=True, strip_identity=True)
@pytest.mark.parametrize('error,options,stays,first', [(torch.OutOfMemoryError,{},False,1), (KeyboardInterrupt,{},True,4), (KeyboardInterrupt,FORMAT_AND_STRIPS,False,7),
    (torch.OutOfMemoryError,FORMAT_AND_STRIPS,True,10)])
def test_error_at_any_operation(error, options, stays, first):
    "Out of memory or Ctrl-C in the middle of tracing, planning, editing or proving; each combination at other operations."
    draws = DRAWS if first==1 else DRAWS[:1]
    net,other,x = network(stays, draws),network(stays, draws),sample()
    before = state(net)
    with Bomb(0, error) as bomb: BN_Folder(**options).fold(other, x, inplace=True)
    assert bomb.n>100
    for at in range(first, bomb.n+1, 53 if draws==DRAWS else 31):
        folder = BN_Folder(**options)
        try:
            with Bomb(at, error): folder.fold(net, x, inplace=True)
        except (error,FoldError): pass
        else: folder.undo()
        assert state(net)==before, f"operation {at}"

@pytest.mark.parametrize('error', ERRORS)
def test_hook_that_raises(error):
    for at in range(1, 6):
        net,x,calls = network(),sample(),0
        def hook(m, args, out):
            nonlocal calls
            calls += 1
            if calls==at: raise error('planted')
        net[8].register_forward_hook(hook)
        unharmed(net, x, error)

def test_plan_changes_nothing():
    net,x = network(),sample()
    before = state(net)
    plan = BN_Folder().plan(net, x)
    assert state(net)==before and names_of(plan.folded)+names_of(plan.kept)

def test_copy_changes_nothing():
    net,x = network(),sample()
    before = state(net)
    new = BN_Folder().fold(net, x)
    assert state(net)==before
    assert not {t.data_ptr() for t in net.state_dict().values()}&{t.data_ptr() for t in new.state_dict().values()}
    assert [m.training for m in new]==[m.training for m in net]

@pytest.mark.parametrize('options', [{},dict(channels_last=True),dict(strip_dropout=True),dict(strip_identity=True),dict(merge_branches=True),dict(verify=False)])
def test_undo_is_exact(options):
    net,x = network(),sample()
    before,folder = state(net),BN_Folder(**options)
    for _ in range(2):
        assert folder.fold(net, x, inplace=True) is net and state(net)!=before
        folder.undo()
        assert state(net)==before
    with pytest.raises(FoldError, match='nothing to undo'): folder.undo()
    folder.fold(net, x, inplace=True)
    folder.undo()
    folder.refold()
    folded = run(net, x)
    folder.undo()
    assert state(net)==before and distance(folded, run(net, x))<1e-5

def test_random_numbers_are_not_used_up():
    net,x,made_up = network(),sample(),pair()
    before = rng_state()
    BN_Folder().fold(net, x)
    BN_Folder().fold(made_up)
    BN_Folder().plan(made_up)
    assert rng_state()==before

@pytest.mark.parametrize('wrapped', [torch.no_grad,torch.enable_grad,torch.inference_mode])
def test_under_any_gradient_mode(wrapped):
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),sample()
    with wrapped(): new = BN_Folder().fold(net, x)
    assert isinstance(new[1], nn.Identity) and distance(run(new, x), run(net, x))<1e-6
    new(x).sum().backward()
    assert new[0].weight.grad is not None

def test_deterministic():
    net,x = network(),sample()
    a,b = (BN_Folder().fold(net, x).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys()==b.keys()

# ---- dtypes, formats, devices

DTYPES = torch.float16,torch.bfloat16,torch.float32,torch.float64
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format,torch.channels_last])
def test_dtype_and_memory_format(dtype, memory_format):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net = randomize_norms(net).to(dtype, memory_format=memory_format)
    net[0].weight.requires_grad_(False)
    x = torch.randn(2, 4, 8, 8).to(dtype, memory_format=memory_format)
    weight,folder = net[0].weight,BN_Folder()
    strides = weight.stride()
    check_fold(net, folder.fold(net, x), x)
    assert folder.fold(net, x, inplace=True) is net and names_of(folder.result.folded)==['1','4']
    assert net[0].weight is weight and weight.stride()==strides and weight.dtype is dtype and not weight.requires_grad
    bias = net[0].bias
    assert isinstance(bias, nn.Parameter) and bias.dtype is dtype and bias.device==weight.device and not bias.requires_grad
    assert net[3].weight.requires_grad and net[3].bias.requires_grad

def test_new_bias_learns_as_its_weight_does():
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    new = BN_Folder().fold(net, sample())
    assert new[0].bias.requires_grad and new[0].bias.is_leaf and 'bias' in dict(new[0].named_parameters())

def test_mixed_dtypes():
    "Half-precision body, float32 head."
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).bfloat16()
            self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        def forward(self, x): return self.head(self.body(x.to(self.body[0].weight)).to(self.head[0].weight))
    net,x = randomize_norms(Head()),sample()
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert len(folder.result.folded)==2 and new.body[0].bias.dtype is torch.bfloat16 and new.head[0].bias.dtype is torch.float32
    assert distance(run(new, x), run(net, x))<.05

class Keeping(nn.Module):
    "Keeps what it computes for later: in a list, a dictionary of a dictionary, an object, and a plain attribute."
    def __init__(self, c):
        super().__init__()
        self.scale,self.kept,self.by,self.other = nn.Parameter(torch.randn(c,1,1)),[],{'a':{}},type('Store', (), {})()
    def forward(self, x):
        self.kept.append(self.scale*2)
        self.by['a'][x.shape] = self.other.last = self.last = self.scale+1
        return x*self.kept[-1]*self.last

def test_what_a_model_keeps_for_later_is_its_own():
    "A fold leaves nothing of it in the modules, nor in what these hold."
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Keeping(4))).bfloat16()
    x,folder = sample().bfloat16(),BN_Folder()
    folder.fold(net, x, inplace=True)
    k = net[3]
    assert folder.result.proof.exact is not None and not k.kept and not hasattr(k, 'last')
    assert k.by=={'a':{}} and not hasattr(k.other, 'last')

class Streaming(nn.Module):
    "Each call goes on where the last one ended, and the first makes a layer."
    def __init__(self):
        super().__init__()
        self.body,self.head,self.hidden,self.calls = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),None,0,0
    def forward(self, x):
        if self.head is None: self.head = nn.Linear(4, 2)
        self.calls += 1
        self.hidden = torch.tanh(self.body(x)+self.hidden)
        return self.head(self.hidden)*self.calls

def test_model_with_a_memory():
    net,x = randomize_norms(Streaming()),torch.randn(3, 5)
    before,kept = state(net),copy.deepcopy(net)
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert names_of(folder.result.folded)==['body.1'] and state(net)==before
    assert new.head is None and new.hidden==new.calls==0 and not torch.is_tensor(new.hidden)
    torch.manual_seed(3)
    ref = [kept(x) for _ in range(3)]
    torch.manual_seed(3)
    assert all(distance([new(x)], [r])<1e-5 for r in ref)

class Batch:
    "What a data loader of another library may give: an object, which here knows itself."
    def __init__(self, x): self.x,self.me = x,self

class WritesToIt(nn.Sequential):
    def forward(self, b):
        b.x = super().forward(b.x.mul_(2))
        return b

def test_sample_that_is_an_object():
    net,batch = randomize_norms(WritesToIt(nn.Linear(5, 4), nn.BatchNorm1d(4))),Batch(torch.randn(3, 5))
    x,old = batch.x,batch.x.clone()
    folder = BN_Folder()
    new = folder.fold(net, batch)
    assert names_of(folder.result.folded)==['1'] and batch.x is x and torch.equal(x, old)
    check_fold(nn.Sequential(*net), nn.Sequential(*new), old)

class Recurrent(nn.Module):
    "Its dtypes are checked before PyTorch sees an operation."
    def __init__(self):
        super().__init__()
        self.body,self.rnn,self.cell = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),nn.LSTM(4, 5, bidirectional=True),nn.GRUCell(10, 6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    def forward(self, x): return self.head(self.cell(self.rnn(self.body(x).permute(2,0,1).to(self.cell.weight_hh.dtype))[0][-1]))

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float32])
def test_float64_run_of_a_recurrent_model(dtype):
    net,x = randomize_norms(Recurrent()).to(dtype),torch.randn(4, 3, 9).to(dtype)
    assert distance(run_as(net, x), run(to_double(net), x.double()))<1e-14
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert len(folder.result.folded)==2 and (folder.result.proof.exact is not None)==(dtype is torch.bfloat16)
    check_fold(net, new, x)

def test_float64_model_that_magnifies_rounding():
    "The norm takes away what the convolution adds: eight digits are lost, which a float64 run of a float64 model cannot tell."
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        net[0].bias += 1e8
        net[1].running_mean += 1e8
    folder = BN_Folder()
    new = folder.fold(net, torch.randn(2, 3, 6, 5).double())
    assert isinstance(new[1], nn.Identity) and 1e-10<folder.result.proof.exact<1e-7

class LastBits(nn.Module):
    "Returns as many numbers as rounding will have it, as a detector returns boxes."
    def __init__(self, bits=24):
        super().__init__()
        self.bits = bits
    def forward(self, x): return x[(x*2**self.bits).round().long()%2==0]

def test_outputs_whose_shape_hangs_on_rounding():
    "In float32 the original differs from its own float64 run as much as from the folded model; in float64 both agree."
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LastBits())),torch.randn(2, 3, 9, 8)
    folder = BN_Folder()
    new = folder.fold(net, x)
    proof = folder.result.proof
    assert isinstance(new[1], nn.Identity) and proof.diff==proof.own==float('inf') and proof.exact<1e-13

def test_outputs_whose_shape_hangs_on_magnified_rounding():
    "Where the original has no distance to its own float64 run, weights and an input that are a little off tell how much it magnifies rounding."
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LastBits(10))),torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        net[0].bias += 1e6
        net[1].running_mean += 1e6
    folder = BN_Folder()
    new = folder.fold(net, x)
    proof = folder.result.proof
    assert isinstance(new[1], nn.Identity) and proof.own==float('inf') and 1e-10<proof.exact<1e-7, proof

class Steps(nn.Module):
    def forward(self, x): return (x*2**10).round()

@pytest.mark.parametrize('seed', range(20))
def test_outputs_that_jump(seed):
    "One number in some thousands is so near the edge of a step that rounding decides: by luck the original is right everywhere, and the folded model is not."
    torch.manual_seed(seed)
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Steps())),torch.randn(2, 3, 31, 31)
    new = BN_Folder().fold(net, x)
    assert isinstance(new[1], nn.Identity)

class Insists(nn.Module):
    "Computes in float32 and float16 whatever it is given, and writes into what it makes."
    def forward(self, x):
        res = torch.zeros(x.shape, dtype=torch.float32)
        res[:,1:] = x[:,1:].float().half()
        return res.type(torch.float16).to(x.dtype)

def test_model_that_insists_on_a_dtype_is_proved_in_float64():
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Insists(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))).bfloat16()
    x,folder = sample().bfloat16(),BN_Folder()
    folder.fold(net, x)
    assert len(folder.result.folded)==2 and folder.result.proof.exact<1e-13<1e-5<folder.result.proof.own

class Widths(TorchDispatchMode):
    "Notes how wide the inputs of convolutions in float64 are."
    def __init__(self):
        super().__init__()
        self.seen = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'convolution' in func._schema.name and args[0].dtype is torch.float64: self.seen.add(args[0].shape[-1])
        return func(*args, **(kwargs or {}))

class Unbiased(nn.Conv2d):
    "Has no use for a bias."
    def forward(self, x): return F.conv2d(x, self.weight, None, self.stride, self.padding)

@pytest.mark.parametrize('verify', (True,False))
def test_layer_that_does_not_ask_for_its_bias(verify):
    class Scores(nn.Module):
        "Beside -1e9, no difference would show."
        def __init__(self):
            super().__init__()
            self.conv,self.norm = Unbiased(3, 4, 3, bias=False),nn.BatchNorm2d(4)
        def forward(self, x): return self.norm(self.conv(x)).masked_fill(x[:,:1,1:-1,1:-1]>1, -1e9)
    net,x,folder = randomize_norms(Scores()),sample(),BN_Folder(verify=verify)
    check_fold(net, folder.fold(net, x), x)
    assert 'norm' in names_of(folder.result.kept)

@pytest.mark.parametrize('verify', (True,False))
def test_positions_that_a_pool_returns(verify):
    "A scale of zero would make all of them the same."
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm,self.pool = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.MaxPool2d(2, return_indices=True)
        def forward(self, x):
            y,at = self.pool(self.conv(x))
            return self.norm(y),at
    net,x,folder = randomize_norms(Pools()),sample(),BN_Folder(verify=verify)
    with torch.no_grad(): net.norm.weight.abs_()[1] = 0
    check_fold(net, folder.fold(net, x), x)
    assert 'also says which values it picks' in reason(folder.result, 'norm')

@torch.library.custom_op('fasterfold_robust::clone', mutates_args=())
def doubled(x:torch.Tensor)->torch.Tensor: return x*2+1

@torch.library.custom_op('fasterfold_robust::relu', mutates_args=())
def limited(input:torch.Tensor)->torch.Tensor: return input.clamp(0, 1)

@pytest.mark.parametrize('verify', (True,False))
@pytest.mark.parametrize('f', [doubled,limited,lambda x: x.to(torch.float8_e4m3fn).float(),lambda x: x.view(torch.bfloat16).float()], ids=['clone','relu','eight_bits','bits'])
def test_operations_that_look_like_others(f, verify):
    class Between(nn.Module):
        def forward(self, x): return f(x)
    net,folder,x = randomize_norms(nn.Sequential(nn.BatchNorm2d(4), Between(), nn.Conv2d(4, 2, 1, bias=False))),BN_Folder(verify=verify),torch.randn(2, 4, 8, 8)
    new = folder.fold(net, x)
    with torch.no_grad(): assert torch.equal(new(x).nan_to_num(), net(x).nan_to_num())
    assert not folder.result.folded

def magnifying(by=700):
    "The norm takes away what the convolution adds, and some digits with it."
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    with torch.no_grad():
        net[0].bias += by
        net[1].running_mean += by
    return net

@pytest.mark.parametrize('samples', (1,2))
def test_float64_runs_on_a_smaller_input(samples):
    "Rounding takes the folded model further from the original than plainly is rounding; how far it may, a smaller input shows."
    net,xs = magnifying(),[torch.randn(1, 3, 200, 150+i) for i in range(samples)]
    with Widths() as w: new = (folder := BN_Folder()).fold(net, samples=xs)
    proof = folder.result.proof
    assert isinstance(new[1], nn.Identity) and proof.diff>1e-5 and proof.exact<1e-12 and proof.own>1e-6, proof
    assert max(w.seen)<80, w.seen
    for x in xs: check_fold(net, new, x)

def test_float64_runs_where_nothing_is_smaller():
    class OneSize(nn.Sequential):
        def forward(self, x): return super().forward(x.view(1, 3, 40, 200))
    net,x = OneSize(*magnifying()),torch.randn(1, 3, 40, 200)
    with Widths() as w: new = (folder := BN_Folder()).fold(net, x)
    assert isinstance(new[1], nn.Identity) and folder.result.proof.diff>1e-5 and max(w.seen)>=200
    check_fold(net, new, x)

def test_float64_runs_for_another_way():
    "A large input goes through other layers than the smaller one, which says nothing of it then."
    class Other(nn.Sequential):
        def forward(self, x): return super().forward(F.pad(x, (0,1)) if x.shape[3]>100 else x)
    net,x = Other(*magnifying()),torch.randn(1, 3, 200, 200)
    with Widths() as w: new = (folder := BN_Folder()).fold(net, x)
    assert isinstance(new[1], nn.Identity) and folder.result.proof.diff>1e-5 and max(w.seen)>=200
    check_fold(net, new, x)

@pytest.mark.parametrize('by', (1e-9,3e-5))
def test_rule_that_is_off_by_less_than_rounding(by, monkeypatch):
    "Hidden below what rounding does in float32; the float64 run on the smaller input tells."
    right = fold_module.apply_plan
    def off(target, graph, plan):
        plan.edits = {v:[Affine(m.scale*(1+by), m.shift) for m in maps] for v,maps in plan.edits.items()}
        return right(target, graph, plan)
    monkeypatch.setattr(fold_module, 'apply_plan', off)
    net = magnifying()
    new = (folder := BN_Folder()).fold(net, torch.randn(1, 3, 200, 150))
    assert isinstance(new[1], nn.BatchNorm2d) and 'the folded model did not compute the same' in folder.result.kept[0].reason, folder.result

def test_float64_run_holds_one_weight_at_a_time():
    live = []
    class Weigher(nn.Module):
        def forward(self, x):
            gc.collect()
            with torch._C.DisableTorchFunction(): # else every tensor says that it is float64
                live.append(sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor,nn.Parameter) and t.dtype is torch.float64))
            return x
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64),nn.BatchNorm1d(64))]
    net,x,folder = randomize_norms(nn.Sequential(*layers, Weigher())).bfloat16(),torch.randn(4, 64).bfloat16(),BN_Folder()
    folder.fold(net, x)
    assert len(folder.result.folded)==6 and folder.result.proof.exact is not None and max(live)-live[0]<2*64*64

def test_under_autocast():
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2), nn.BatchNorm1d(2))),sample()
    with torch.autocast('cpu', dtype=torch.bfloat16): new = BN_Folder().fold(net, x)
    assert new[0].weight.dtype is torch.float32 and distance(run(new, x), run(net, x))<1e-5

def test_float16_overflow_is_kept():
    "The scale of one channel is beyond what float16 holds."
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).half()
    with torch.no_grad():
        for p in net[0].parameters(): p.mul_(.01)
        net[0].weight[1:] = 0
        net[0].weight[0,0,0,0] = 5.
        net[1].running_mean.zero_()
        net[1].running_var.fill_(1e-7)
        net[1].weight.fill_(30.)
    net[1].eps = 0.
    x,folder = (torch.randn(2, 3, 8, 8)*1e-3).half(),BN_Folder()
    new = folder.fold(net, x)
    assert 'overflow float16' in reason(folder.result, '1') and names_of(folder.result.folded)==['4']
    assert torch.equal(new[0].weight, net[0].weight) and isinstance(new[1], nn.BatchNorm2d)

def test_subnormal_weights_become_zero():
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    net[1].weight.data[0] = 1e-38
    w = BN_Folder().fold(net, sample())[0].weight
    assert not ((w!=0) & (w.abs()<torch.finfo(torch.float32).tiny)).any()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda():
    net,x = network().cuda(),sample().cuda()
    before,folder = [(k,v.data_ptr(),v.clone()) for k,v in net.state_dict().items()],BN_Folder()
    check_fold(net.eval(), new:=folder.fold(net, x), x)
    assert names_of(folder.result.folded) and new[0].bias.is_cuda
    folder.fold(net, x, inplace=True)
    folder.undo()
    assert all(k==n and p==v.data_ptr() and torch.equal(t, v) for (k,p,t),(n,v) in zip(before, net.state_dict().items()))

# ---- samples

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.norm = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4)
    def forward(self, x, y=None, *, z=0.): return dict(out=self.norm(self.conv(x if y is None else x+y)), z=[z])

@pytest.mark.parametrize('given', [lambda x: x, lambda x: (x,), lambda x: (x,x*2), lambda x: dict(x=x, y=x*2, z=1.), lambda x: dict(x=x, z=x[0])])
def test_samples(given):
    net,x = randomize_norms(Two()),given(sample())
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert names_of(folder.result.folded)==['norm'] and distance(run(new, x), run(net, x))<1e-6

def test_list_is_one_argument():
    class First(Two):
        def forward(self, xs): return super().forward(xs[0])
    folder = BN_Folder()
    folder.fold(randomize_norms(First()), [sample(),sample()])
    assert names_of(folder.result.folded)==['norm']

def test_sample_stays():
    "Also where the model writes to it."
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True))),sample()
    was = x.clone()
    BN_Folder().fold(net, x)
    assert torch.equal(x, was) and not x.requires_grad

def test_batch_of_one():
    folder = BN_Folder()
    folder.fold(network(), sample()[:1])
    assert names_of(folder.result.folded)+names_of(folder.result.kept)

@pytest.mark.parametrize('model', [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv1d(2, 4, 3), lambda: nn.Conv3d(1, 4, 3), lambda: nn.Linear(7, 4)])
def test_sample_is_made_up(model):
    first = model()
    norm = {nn.Conv1d:nn.BatchNorm1d,nn.Conv2d:nn.BatchNorm2d,nn.Conv3d:nn.BatchNorm3d,nn.Linear:nn.BatchNorm1d}[type(first)](4)
    assert isinstance(BN_Folder().fold(randomize_norms(nn.Sequential(first, norm)))[1], nn.Identity)

# ---- wrappers

def pair(): return randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))

def test_data_parallel():
    net,x = nn.DataParallel(pair()),sample()
    ref,folder = run(net, x),BN_Folder()
    assert folder.fold(net, x, inplace=True) is net
    assert isinstance(net.module[1], nn.Identity) and names_of(folder.result.folded)==['1'] and distance(run(net, x), ref)<1e-6
    assert isinstance(BN_Folder().fold(nn.DataParallel(pair()), x), nn.Sequential)

def test_distributed_data_parallel(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net,x = nn.parallel.DistributedDataParallel(pair()),sample()
        ref,folder = run(net, x),BN_Folder()
        assert folder.fold(net, x, inplace=True) is net
        assert isinstance(net.module[1], nn.Identity) and distance(run(net, x), ref)<1e-6
        folder.undo()
        assert isinstance(net.module[1], nn.BatchNorm2d) and distance(run(net, x), ref)==0
        assert isinstance(BN_Folder().fold(net, x)[1], nn.Identity)
    finally: dist.destroy_process_group()

def test_sync_batchnorm():
    net,x = nn.SyncBatchNorm.convert_sync_batchnorm(pair()),sample()
    folder = BN_Folder()
    assert isinstance(folder.fold(net, x)[1], nn.Identity)

def test_compiled():
    net,x = torch.compile(pair(), backend='eager'),sample()
    with torch.no_grad(): ref = [net(x)]
    assert BN_Folder().fold(net, x, inplace=True) is net
    with torch.no_grad(): assert distance([net(x)], ref)<1e-6
    assert isinstance(net._orig_mod[1], nn.Identity)

# ---- TorchScript inside a plain model

class Remembering(nn.Module):
    "An activation with a weight, which counts its calls in every way TorchScript has."
    seen: list[torch.Tensor]
    named: dict[str,int]
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
        self.register_buffer('last', torch.zeros(2))
        self.weight,self.act,self.drop,self.calls,self.seen,self.named = nn.Parameter(torch.rand(4, 1, 1)+.5),nn.ReLU(),nn.Dropout(),0,[],{}
    def forward(self, x):
        self.n += 1
        self.last = self.last+x.mean()
        self.calls += 1
        self.seen.append(x)
        self.named['calls'] = self.calls
        return self.drop(self.act(x))*self.weight

class OldStyle(torch.jit.ScriptModule):
    @torch.jit.script_method
    def forward(self, x): return x.relu()

def loaded(m):
    f = io.BytesIO()
    torch.jit.save(m, f)
    f.seek(0)
    return torch.jit.load(f)

def block(): return randomize_norms(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
def traced(m): return torch.jit.trace(m.eval(), torch.randn(2, 4, 6, 6))
def frozen(m): return torch.jit.freeze(torch.jit.script(m.eval()))
def optimized(m): return torch.jit.optimize_for_inference(torch.jit.script(m.eval()))

SCRIPTS = dict(activation=lambda: torch.jit.script(nn.ReLU()), in_place=lambda: torch.jit.script(nn.ReLU(inplace=True)), old_style=OldStyle,
    dropout=lambda: torch.jit.script(nn.Dropout()), traced_activation=lambda: traced(nn.SiLU()), frozen_activation=lambda: frozen(nn.ReLU()),
    remembering=lambda: torch.jit.script(Remembering()), loaded=lambda: loaded(torch.jit.script(Remembering())), block=lambda: torch.jit.script(block()),
    loaded_block=lambda: loaded(torch.jit.script(block())), traced=lambda: traced(block()), frozen=lambda: frozen(block()),
    optimized=lambda: optimized(block()))

class Around(nn.Module):
    "Norms behind a convolution, in front of the TorchScript module `m`, behind it, and of its input beside it."
    def __init__(self, m):
        super().__init__()
        self.conv,self.norm,self.m = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),m
        self.conv2,self.norm2 = nn.Conv2d(4, 4, 1),nn.BatchNorm2d(4)
    def forward(self, x): return self.norm2(self.conv2(self.m(self.norm(self.conv(x)))))

def remembered(m):
    "What TorchScript holds, and Python sees."
    return [repr((k,getattr(o, k))) for o in m.modules() if isinstance(o, torch.jit.ScriptModule) for k in ('training','n','last','calls','seen','named') if hasattr(o, k)]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('train', [False,True])
@pytest.mark.parametrize('name', SCRIPTS)
def test_torchscript_child_is_left_alone(name, train):
    torch.manual_seed(0)
    net,x = randomize_norms(Around(SCRIPTS[name]())),sample()
    net.train(train)
    before,kept,refs = state(net),remembered(net),run(net, x)
    for _ in range(3): # TorchScript compiles anew after its first runs
        folder = BN_Folder()
        new = folder.fold(net, x)
        assert names_of(folder.result.folded)==['norm','norm2'] and distance(run(new, x), refs)<1e-6
        assert 'failed' not in str(folder.result) and isinstance(new.m, torch.jit.ScriptModule) and new.m is not net.m
        assert not {t.data_ptr() for t in net.state_dict().values()}&{t.data_ptr() for t in new.state_dict().values()}
        m,folder = net.m,BN_Folder()
        folder.fold(net, x, inplace=True)
        assert net.m is m and distance(run(net, x), refs)<1e-6 and remembered(net)==kept
        folder.undo()
        folder.refold()
        assert distance(run(net, x), refs)<1e-6
        folder.undo()
        assert state(net)==before and remembered(net)==kept
    if name in ('block','traced','loaded_block'): assert 'TorchScript' in reason(folder.result, 'm')

@pytest.mark.filterwarnings('ignore')
def test_error_at_any_operation_around_torchscript():
    "What TorchScript holds is put back, too; an error inside it may pass for one of a sample that the model does not take."
    net,x = randomize_norms(Around(torch.jit.script(Remembering()))).train(),sample()
    before,kept = state(net),remembered(net)
    with Bomb(0, MemoryError) as bomb: BN_Folder().fold(net, x)
    for at in range(1, bomb.n+1, 9):
        folder = BN_Folder()
        try:
            with Bomb(at, MemoryError): folder.fold(net, x, inplace=True)
        except (MemoryError,RuntimeError,FoldError): pass
        else: folder.undo()
        assert state(net)==before and remembered(net)==kept, f"operation {at}"

@pytest.mark.parametrize('make', [torch.jit.script,traced])
def test_torchscript_norm_stays(make):
    "And no other folds into it."
    norm,folder = randomize_norms(nn.BatchNorm2d(4)),BN_Folder()
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4))),sample()
    net.append(make(norm))
    for verify in (True,False):
        folder = BN_Folder(verify=verify)
        new = folder.fold(net, x)
        assert not folder.result.folded and 'TorchScript' in reason(folder.result, '3') and 'is part of TorchScript' in reason(folder.result, '2')
        assert torch.equal(*run(new, x), *run(net, x))

def test_weight_shared_with_torchscript():
    conv = nn.Conv2d(3, 3, 1)
    for first,last in ((conv,torch.jit.script(conv)), (torch.jit.script(conv),conv)):
        net,folder = randomize_norms(nn.Sequential(first, nn.BatchNorm2d(3), nn.Sigmoid(), last)),BN_Folder(verify=False)
        new = folder.fold(net, sample(), inplace=True)
        assert reason(folder.result, '1') and isinstance(new[1], nn.BatchNorm2d)

def test_torchscript_activation_of_a_norm_takes_its_place():
    class NormAct(nn.BatchNorm2d):
        def __init__(self, c):
            super().__init__(c)
            self.act = torch.jit.script(nn.SiLU())
        def forward(self, x): return self.act(super().forward(x))
    net,x = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))),sample()
    new = BN_Folder().fold(net, x)
    assert isinstance(new[1], torch.jit.ScriptModule) and distance(run(new, x), run(net, x))<1e-6

@pytest.mark.parametrize('make', [torch.jit.script,traced])
def test_norm_folds_through_torchscript(make):
    "What passes a map as a plain module does so as TorchScript, and lets go of what it returns."
    net,x,folder = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), make(nn.AvgPool2d(2)), nn.BatchNorm2d(4), nn.ReLU())),sample(),BN_Folder()
    new = folder.fold(net, x)
    assert names_of(folder.result.folded)==['2'] and distance(run(new, x), run(net, x))<1e-6

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('by_name', [False,True])
def test_torchscript_that_reads_unseen(by_name):
    "Its kernels pass by the tracer: that it reads what the norm makes shows only in that its result comes from nowhere."
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm,self.conv,self.m = nn.BatchNorm2d(4),nn.Conv2d(4, 4, 1),optimized(block())
        def forward(self, x):
            y = self.norm(x.sigmoid())
            return self.conv(y)+(self.m(input=y) if by_name else self.m(y))
    net,x = randomize_norms(Beside()),torch.randn(2, 4, 6, 5)
    for verify in (True,False):
        folder = BN_Folder(verify=verify)
        new = folder.fold(net, x)
        assert 'TorchScript (`m`) sees what lies in between' in reason(folder.result, 'norm') and distance(run(new, x), run(net, x))==0

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['activation','remembering','block','traced','loaded_block','optimized'])
def test_proof_with_torchscript_in_half_precision(name):
    "In float64, or where it does not run in that, in its own dtype, in which nothing passes for proved."
    net,x = randomize_norms(Around(SCRIPTS[name]())),sample()
    if name!='optimized': net,x = net.bfloat16(),x.bfloat16()
    folder = BN_Folder()
    new = folder.fold(net, x)
    proof = folder.result.proof
    assert names_of(folder.result.folded)==['norm','norm2']
    if name=='optimized': assert proof.exact is None
    else:
        assert proof.exact<1e-12
        assert distance(run_as(net, x), run(to_double(net), x.double()))<1e-13 and all(p.dtype is torch.bfloat16 for p in net.parameters())
        check_fold(net, new, x)

def test_torchscript_in_a_learner(tmp_path):
    from learners import plain,small # fastai takes seconds to import, chkstyle: ignore
    model = small(nn.Linear(32, 16), torch.jit.script(nn.ReLU()), nn.BatchNorm1d(16), nn.Linear(16, 10))
    learn = plain(tmp_path, model)
    import fasterfold.learner # gives learners methods, chkstyle: ignore
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        before,res = learn.get_preds()[0],learn.fold()
        assert not res.plan.kept and len(res.plan.folded)==4 and distance([learn.get_preds()[0]], [before])<1e-5

# ---- bad input

class Lazy(nn.Sequential):
    def __init__(self): super().__init__(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))

def quantized():
    from torch.ao.nn.quantized import Conv2d
    return nn.Sequential(Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()

class Learnerish: dls,model = None,nn.Linear(2, 2)

BAD = dict(script=(lambda: torch.jit.script(pair()), 'TorchScript'), traced=(lambda: torch.jit.trace(pair(), sample()), 'TorchScript'),
    wrapped_script=(lambda: nn.DataParallel(torch.jit.script(pair())), 'TorchScript'), quantized=(quantized, 'quantized'), meta=(lambda: pair().to('meta'), 'meta'),
    lazy=(Lazy, 'initialised'), function=(lambda: (lambda x: x), 'torch.nn.Module'), none=(lambda: None, 'torch.nn.Module'), weights=(lambda: pair().state_dict(), 'torch.nn.Module'),
    kind=(lambda: nn.BatchNorm2d, 'torch.nn.Module'), learner=(Learnerish, 'learn.model'))
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('method', ['fold','plan'])
def test_bad_models(name, method):
    make,says = BAD[name]
    model,x = make(),sample()
    before = state(model) if isinstance(model, nn.Module) and name not in ('meta','lazy','quantized') else None
    with pytest.raises(FoldError, match=says) as e: getattr(BN_Folder(), method)(model, x)
    assert len(str(e.value))>40 # it says what to do, too
    if before is not None: assert state(model)==before

REJECTED = dict(channels=torch.randn(2, 5, 8, 8), dimensions=torch.randn(3), too_many=(torch.randn(2, 3, 8, 8),1), name=dict(y=torch.randn(2, 3, 8, 8)), text='cat',
    integers=torch.randint(3, (2,3,8,8)), nothing=())
@pytest.mark.parametrize('bad', REJECTED.values(), ids=REJECTED)
def test_samples_the_model_rejects(bad):
    net = network()
    before = state(net)
    for method in (lambda f: f.fold(net, bad, inplace=True), lambda f: f.fold(net, bad), lambda f: f.plan(net, bad)):
        with pytest.raises(FoldError, match='sample'): method(BN_Folder())
        assert state(net)==before

def test_no_sample_can_be_made_up():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4)
        def forward(self, images, boxes): return self.norm(self.conv(images)).sum()+boxes.sum()
    with pytest.raises(FoldError, match='sample='): BN_Folder().fold(Odd())

@pytest.mark.parametrize('model', [lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Identity])
def test_model_without_norms_folds_to_itself(model):
    net,x,folder = model(),sample(),BN_Folder()
    new = folder.fold(net, x)
    assert type(new) is type(net) and 'no norm' in str(folder.result) and 'no norm' in folder.result._repr_html_()
    assert folder.fold(net, x, inplace=True) is net
    folder.undo()

def test_outputs_that_are_not_finite():
    net,x = pair(),sample()
    x[0,0,0,0] = float('nan')
    folder = BN_Folder()
    new = folder.fold(net, x)
    assert distance(run(new, x), run(net, x))<1e-6

def test_merge_branches_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm.utils', None)
    net,x = network(),sample()
    before = state(net)
    with pytest.raises(FoldError, match='pip install timm'): BN_Folder(merge_branches=True).fold(net, x, inplace=True)
    assert state(net)==before

def test_merge_branches_of_what_timm_cannot_merge():
    "It takes any attribute of that name for a method; layers of graph networks have a flag there."
    net,x = network(),sample()
    next(net.children()).fuse = True
    before = state(net)
    with pytest.raises(FoldError, match='without `merge_branches'): BN_Folder(merge_branches=True).fold(net, x, inplace=True)
    assert state(net)==before
    BN_Folder().fold(net, x)
