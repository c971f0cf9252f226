"What the tests of the engine share: hostile norm statistics, counting norms, distances to float64, and comparing states bit by bit."
import random
import numpy as np, pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fasterfold.proof import distance,run,to_double
from fasterfold.sample import Sample,tensors_of
from fasterfold.fold import BN_Folder
from fasterfold.state import copy_model

tells_conditions = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2]))<(2,9), reason='PyTorch before 2.9 does not tell what a program takes for granted')

def randomize_norms(
    model:nn.Module, # Changed in place
    seed:int=1, # Of the statistics
)->nn.Module: # `model` in eval mode
    "Give every norm random statistics and weights, some of these negative: fresh norms are almost the identity, which hides mistakes."
    g = torch.Generator().manual_seed(seed)
    def draw(t, f): t.copy_(f(torch.rand(t.shape, generator=g, dtype=torch.float64)))
    with torch.no_grad():
        for m in model.modules():
            mean,var = (getattr(m, f'running_{k}', None) for k in ('mean','var'))
            if mean is None or var is None: continue
            draw(mean, lambda u: .6*u-.3)
            draw(var, lambda u: u+.5)
            w,b = getattr(m, 'weight', None),getattr(m, 'bias', None)
            if w is not None:
                draw(w, lambda u: u+.5)
                w[::7] *= -1
            if b is not None: draw(b, lambda u: .6*u-.3)
    return model.eval()

class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 'batch_norm' in func._schema.name
        return func(*args, **(kwargs or {}))

def count_norm_calls(
    model:nn.Module, # Any model
    sample, # What to call it with
)->int: # Kernels, not modules
    "How many batch normalizations one eval forward pass runs."
    with _Count() as c: run(model, sample)
    return c.n

def errors(
    original:nn.Module, # The model before
    folded:nn.Module, # The model after
    sample, # What to call both with
    folder:BN_Folder=None, # Folds the float64 copy; None for one with the default options
)->tuple: # (own, folded, exact): distances to the original in float64 of the original, the folded one, and the original folded in float64
    "How far both models are from a float64 run of the original."
    double,s = to_double(original),Sample.of(sample).to(torch.float64)
    ref = run(double, s)
    own,diff = distance(run(original, sample), ref),distance(run(folded, sample), ref)
    return own,diff,distance(run((folder or BN_Folder(verify=False)).fold(double, s, inplace=True), s), ref)

def eps_of(model): return max((torch.finfo(p.dtype).eps for p in model.parameters()), default=torch.finfo(torch.float32).eps)

def check_fold(
    original:nn.Module, # The model before
    folded:nn.Module, # The model after
    sample, # What to call both with
    folder:BN_Folder=None, # Folds the float64 copy
):
    "Assert that the fold is right in float64, and as close to it as the original in the model's own dtype."
    own,diff,exact = errors(original, folded, sample, folder)
    assert exact<=1e-10, f"wrong in float64: {exact:.1e}"
    assert diff<=10*own+10*eps_of(original), f"{diff:.1e} from float64, the original {own:.1e}"

def without_bias(norm):
    "`norm` as `bias=False` makes it in releases of PyTorch that have that argument."
    norm.bias = None
    return norm

class Fn(nn.Module):
    "`f(self, *inputs)`, with `held` as attributes: modules, parameters, or anything else."
    def __init__(self, f, **held):
        super().__init__()
        for k,v in held.items(): setattr(self, k, v)
        self.f = f
    def forward(self, *xs, **kwargs): return self.f(self, *xs, **kwargs)

class Rewritten(nn.Linear):
    "Writes its weight anew each time it is put into eval mode."
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.source = nn.Parameter(torch.randn(n_out, n_in))
    def train(self, mode=True):
        if not mode: self.weight.data.copy_(self.source)
        return super().train(mode)

def made(make, train=False):
    "What `make` makes, the same each time, with hostile norms."
    torch.manual_seed(0)
    net = randomize_norms(make())
    net.train(train) # which need not return the model
    return net

def now(model, x):
    with torch.no_grad(): return [model(x.clone())]

def every_way(make, x, look, **options):
    """Plan what `make` makes, fold a copy, and fold in place, from either mode, with proof and without: yields the folder, the model before and the folded one, and
    what `look` saw of the former. That may not see that anything was planned, nor that a copy was folded."""
    for train in (False,True):
        net = made(make, train)
        before = look(net)
        BN_Folder(**options).plan(net, x)
        assert look(net)==before
        for verify in (True,False):
            for inplace in (False,True):
                folder,net = BN_Folder(verify=verify, **options),made(make, train)
                before = look(net)
                new = folder.fold(net, x, inplace=inplace)
                assert new.training==train and (inplace or look(net)==before)
                yield folder,net,new,before

def timed_for(seconds):
    "`report` that times for so long, whatever it is told."
    from fasterfold.report import report
    return lambda *args, **kwargs: report(*args, **kwargs|dict(seconds=seconds))

def names_of(items): return [o.norm for o in items]
def reason(plan, norm): return next(o.reason for o in plan.kept if o.norm==norm)

def rng_state(): return random.getstate(),np.random.get_state()[1].tobytes(),bytes(torch.get_rng_state().numpy())

def state(
    model:nn.Module, # Any model
): # To be compared with `==`
    "Everything a fold could disturb: objects, bits, modes, hooks and random numbers."
    def held(t): return t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() and t.dim() else t.item() if t.numel() else None
    def bits(t): return None if t is None else (id(t), t.dtype, tuple(t.shape), t.stride(), t.data_ptr(), t.requires_grad, held(t))
    hooks = ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks')
    mods = [(n, id(m), type(m), getattr(m, 'training', None), tuple(m.__dict__), tuple((k,id(c)) for k,c in m._modules.items()),
        tuple((k,bits(p)) for k,p in m._parameters.items()), tuple((k,bits(b)) for k,b in m._buffers.items()),
        tuple((h,tuple(getattr(m, h).items())) for h in hooks)) for n,m in model.named_modules(remove_duplicate=False)]
    return mods,rng_state(),torch.is_grad_enabled()

# Parts of a model

def heard(
    model:nn.Module, # Any model
    x, # What to call it with
)->dict: # Name of each module to the tensors that it returned
    "What each module of a copy of `model` returns."
    model,res = copy_model(model).eval(),{}
    def hear(name):
        def hook(m, args, out): res.setdefault(name, []).extend(t.clone() for t in tensors_of(out))
        return hook
    for n,m in model.named_modules(remove_duplicate=False):
        if n: m.register_forward_hook(hear(n))
    with torch.no_grad(): Sample.of(x).call(model)
    return res

def outputs_of(model, x, part):
    "What the module or method `part` of `model` returns."
    if not callable(f := getattr(model, part, None)) or isinstance(f, nn.Module): return heard(model, x)[part]
    with torch.no_grad(): return [t.clone() for t in tensors_of(Sample.of(x).call(f))]

def has_changed(model, folded, x, far=1e-9):
    "Names of the modules that return other values once folded, both in float64. Beside zeros, what counts is the size of what else the model computes."
    a,b = heard(model, x),heard(folded, x)
    most = max((t.double().norm().item() for ts in a.values() for t in ts), default=0)
    def rounds(n): return len(a[n])==len(b[n]) and all(o.shape==t.shape and max(o.norm(), t.norm())<1e-14*most for o,t in zip(b[n], a[n]))
    return {n for n in a if n in b and distance(b[n], a[n])>far and not rounds(n)}
