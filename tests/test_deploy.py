"Folded models go on to where models are deployed, by the real library each time, and compute there what the original computes."
import copy
import onnxruntime, pytest, torch
from fastai.layers import ToTensorBase
from fastai.torch_core import set_seed
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx,prepare_fx
from fasterfold.proof import distance,run,to_double
from fasterfold.sample import Sample
from fasterfold.fold import BN_Folder
from fasterfold.sample import tensors_of
from helpers import eps_of,randomize_norms
from learners import KINDS

pytestmark = pytest.mark.filterwarnings('ignore')

LAST = 'vision','plain_learner' # as `Learner.fold` leaves them where that is faster

def folded(name, path):
    "The model of a learner with random statistics, the same one folded, some with `channels_last` weights, the norm calls that are left, and the inputs of two batches that differ in size."
    learn = KINDS[name](path)
    model = randomize_norms(learn.model)
    x = tuple(t.as_subclass(torch.Tensor) for t in learn.dls.valid.one_batch()[:learn.dls.n_inp])
    folder = BN_Folder(channels_last=name in LAST)
    new = folder.fold(model, x)
    assert folder.result.folded and (folder.result.format=='channels_last')==(name in LAST)
    return model,new,sum(k.calls for k in folder.result.kept),(x,tuple(t[:5] for t in x))

def plain(model):
    "A copy without fastai's `ToTensorBase`, which ends a U-Net and which no exporter gets past."
    res = copy.deepcopy(model)
    for m in res.modules(): m._modules.update({k:nn.Identity() for k,o in m._modules.items() if isinstance(o, ToTensorBase)})
    return res

def assert_right(model, x, outs):
    "Assert that `outs` are as close to a float64 run of `model` as it is itself."
    ref = run(to_double(model), Sample.of(x).to(torch.float64))
    own,got = distance(run(model, x), ref),distance(tensors_of(outs), ref)
    assert got<=10*own+10*eps_of(model), f'{got:.1e} from float64, the original {own:.1e}'

def batch_dims(x): return tuple({0:torch.export.Dim('batch', min=2, max=1024)} for _ in x)

@pytest.mark.parametrize('name', ['vision','timm_body','unet','tabular'])
def test_export(name, tmp_path):
    model,new,left,xs = folded(name, tmp_path)
    program = torch.export.export(plain(new), xs[0], dynamic_shapes=batch_dims(xs[0]), strict=False)
    assert sum('batch_norm' in str(n.target) for n in program.graph.nodes)==left
    torch.export.save(program, tmp_path/'folded.pt2')
    module = torch.export.load(tmp_path/'folded.pt2').module()
    for x in xs: assert_right(model, x, module(*x))

# as they were before folding, too
not_in_onnx = pytest.mark.skipif(torch.__version__.startswith('2.6.'), reason='PyTorch 2.6 writes neither adaptive max pooling nor a norm that stays as ONNX')

@pytest.mark.parametrize('name', [pytest.param('vision', marks=not_in_onnx),pytest.param('unet', marks=not_in_onnx),'tabular'])
def test_onnx(name, tmp_path):
    model,new,left,xs = folded(name, tmp_path)
    program = torch.onnx.export(plain(new), xs[0], dynamo=True, dynamic_shapes=batch_dims(xs[0]), verbose=False)
    assert sum(n.op_type=='BatchNormalization' for n in program.model.graph)==left
    program.save(tmp_path/'folded.onnx')
    session = onnxruntime.InferenceSession(tmp_path/'folded.onnx')
    names = [o.name for o in session.get_inputs()]
    for x in xs: assert_right(model, x, [torch.from_numpy(o) for o in session.run(None, {k:t.numpy() for k,t in zip(names, x, strict=True)})])

@pytest.mark.parametrize('name', [pytest.param('unet', marks=not_in_onnx),'tabular'])
def test_stripped_models_go_the_same_ways(name, tmp_path):
    "Gaps between the keys of a container trouble nobody."
    model,_,left,xs = folded(name, tmp_path)
    new = BN_Folder(strip_identity=True).fold(model, xs[0])
    program = torch.export.export(plain(new), xs[0], dynamic_shapes=batch_dims(xs[0]), strict=False)
    with torch.no_grad(): traced,compiled = torch.jit.trace(new, xs[0]),torch.compile(plain(new), backend='aot_eager', dynamic=True)
    onnx = torch.onnx.export(plain(new), xs[0], dynamo=True, dynamic_shapes=batch_dims(xs[0]), verbose=False)
    assert sum(n.op_type=='BatchNormalization' for n in onnx.model.graph)==left
    with torch.no_grad():
        for x in xs:
            for f in (program.module(),traced,compiled): assert_right(model, x, f(*x))

@pytest.mark.parametrize('name', ['plain_learner','tabular'])
def test_compile(name, tmp_path):
    model,new,_,xs = folded(name, tmp_path)
    compiled = torch.compile(new, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in xs: assert_right(model, x, compiled(*x))

@pytest.mark.parametrize('name', ['vision','timm_body','unet','tabular'])
def test_jit_trace(name, tmp_path):
    model,new,left,xs = folded(name, tmp_path)
    with torch.no_grad(): torch.jit.trace(new, xs[0]).save(tmp_path/'folded.pt')
    traced = torch.jit.load(tmp_path/'folded.pt')
    assert str(traced.inlined_graph).count('aten::batch_norm')==left
    with torch.no_grad():
        for x in xs: assert_right(model, x, traced(*x))

def quantized(model, x):
    "`model` with 8-bit weights and activations, calibrated on `x`, by torch.fx."
    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping(), x)
        prepared(*x)
        return convert_fx(prepared)

def integer_layers(model): return [m for m in model.modules() if type(m).__module__.startswith(('torch.ao.nn.quantized','torch.ao.nn.intrinsic.quantized'))]

def fused(model): return sum(type(m).__name__=='ConvReLU2d' for m in model.modules())

class Slim(torch.fx.Transformer):
    "Leaves out each `nn.Identity`."
    def call_module(self, target, args, kwargs):
        return args[0] if isinstance(self.fetch_attr(target), nn.Identity) else super().call_module(target, args, kwargs)

def slim(model): return Slim(torch.fx.symbolic_trace(copy.deepcopy(model))).transform()

# PyTorch quantizes a convolution and its ReLU as one layer only where nothing stands between them. As folded, `nn.Identity` does, and what
# lies in between is rounded with its negative half, by steps twice as long; without it, folding costs quantization nothing.
# `strip_identity` takes it out of `nn.Sequential`s, of which fastai's models are made; a ResNet of torchvision calls it by name.
AS_FOLDED,WITHOUT = 4,1.5

@pytest.mark.parametrize('name', ['vision','xresnet','plain_learner'])
def test_quantization(name, tmp_path):
    "Folded and quantized, a model is about as far from float64 as the original is quantized, whose norms PyTorch fuses where it can."
    model,new,_,(x,_) = folded(name, tmp_path)
    ref = run(to_double(model), Sample.of(x).to(torch.float64))
    stripped = BN_Folder(strip_identity=True).fold(model, x)
    a,b,c = quantized(model, x),quantized(new, x),quantized(slim(new) if name=='vision' else stripped, x)
    assert len(integer_layers(b))>=len(integer_layers(a))>0 and not [m for m in b.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert fused(c)==fused(a)>fused(b)==0 and fused(quantized(stripped, x))>0
    lost,*after = (distance(run(m, x), ref) for m in (a,b,c))
    for o,most in zip(after, (AS_FOLDED,WITHOUT)): assert o<=most*lost, f'{o:.1e} from float64, without folding {lost:.1e}'

def test_quantized_classes(tmp_path):
    "A trained classifier decides as before, up to what quantization alone changes."
    set_seed(0, True)
    learn = KINDS['plain_learner'](tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 1e-2)
    x = torch.stack([o[0] for o in learn.dls.valid.dataset])
    new = BN_Folder(strip_identity=True).fold(learn.model, x)
    want,after,a,b = (run(m, x)[0].argmax(1) for m in (learn.model, new, quantized(learn.model, (x,)), quantized(new, (x,))))
    assert torch.equal(after, want)
    changed,changed_folded = ((o!=want).sum().item() for o in (a,b))
    assert changed_folded<=WITHOUT*changed+len(x)/50, f'{changed_folded} of {len(x)} classes differ, without folding {changed}'
