"Parts of a folded model: which of them return other values than before, and those that shall not."
import re, subprocess, sys, warnings
from functools import partial
from pathlib import Path
import pytest, timm, torch, torchvision
from fastai.vision.all import CategoryBlock,ConvLayer,Learner,Resize,accuracy,vision_learner
from torch import nn
from fasterfold.all import BN_Folder,FoldError
from fasterfold.proof import distance
from helpers import Fn,count_norm_calls,has_changed,outputs_of,randomize_norms
from learners import KINDS,images,train

# What changed

def image(n): return torch.randn(1, 3, n, n, dtype=torch.float64)
def of_timm(name, size=96): return lambda: (timm.create_model(name, num_classes=4),image(size))
def of_torchvision(name, size=96): return lambda: (torchvision.models.get_model(name, weights=None, num_classes=4),image(size))
def of_learner(name):
    def make():
        learn = KINDS[name]('.')
        return learn.model,tuple(t.as_subclass(torch.Tensor).double() if t.is_floating_point() else t for t in learn.dls.one_batch()[:learn.dls.n_inp])
    return make

MODELS = {k:of_timm(k) for k in 'resnet18 resnetv2_18 convmixer_768_32 swiftformer_xs repvgg_a0 ghostnet_050'.split()}
MODELS |= {k:of_timm(k, 224) for k in ('visformer_tiny','levit_128s')}
MODELS |= {k:of_torchvision(k) for k in ('densenet121','mobilenet_v3_small','squeezenet1_1','shufflenet_v2_x0_5')}
MODELS |= {f'learner_{k}':of_learner(k) for k in ('unet','tabular','tabular_all_options','siamese','collab')}

@pytest.mark.filterwarnings('ignore:The default weight initialization')
@pytest.mark.parametrize('name', MODELS)
def test_what_is_told_is_what_changed(name):
    torch.manual_seed(0)
    m,x = MODELS[name]()
    m,folder = randomize_norms(m).double(),BN_Folder()
    f = folder.fold(m, x)
    assert folder.result.folded or name.startswith('squeeze')
    told = {k for k in folder.result.changed if k in dict(f.named_modules(remove_duplicate=False))}
    assert told==has_changed(m, f, x)
    if hasattr(m, 'forward_features'): # which `forward` calls
        apart = distance(outputs_of(f, x, 'forward_features'), outputs_of(m, x, 'forward_features'))
        assert (apart>1e-9)==('forward_features' in folder.result.changed)

def test_what_nobody_reads_is_told():
    "The second call of the norm returns what the activation made of the first one's output, since both are the convolution's then."
    def f(s, x):
        y = s.conv(x)
        z = s.act(s.norm(y))
        s.norm(y)
        return s.last(z)
    m,x = Fn(f, conv=nn.Conv2d(3,4,3), norm=nn.BatchNorm2d(4), act=nn.ReLU(inplace=True), last=nn.Conv2d(4,2,1)),torch.randn(2,3,8,8).double()
    m,folder = randomize_norms(m).double(),BN_Folder(verify=False)
    new = folder.fold(m, x)
    assert {*folder.result.changed}==has_changed(m, new, x)=={'conv','norm'}

# What shall not

KEEPS = [('visformer_tiny','forward_features',0), ('convmixer_768_32','forward_features',1), ('swiftformer_xs','forward_features',0),
    ('resnetv2_18','stages.1',2), ('levit_128s','stages.0.blocks.0',0), ('learner_unet','layers.0.4',0), ('learner_tabular','layers.0',1), ('learner_siamese','body',0)]

@pytest.mark.parametrize('name,part,price', KEEPS)
def test_a_part_is_kept(name, part, price):
    torch.manual_seed(0)
    m,x = MODELS[name]()
    m,plain,folder = randomize_norms(m).double(),BN_Folder(),BN_Folder(keep=part)
    plain.fold(m, x)
    f = folder.fold(m, x)
    assert part not in folder.result.changed
    assert distance(outputs_of(f, x, part), outputs_of(m, x, part))<1e-10
    assert len(folder.result.kept)-len(plain.result.kept)==price
    assert not price or any(f"`keep` asks for what `{part}` returns" in o.reason for o in folder.result.kept)

class Coder(nn.Module):
    "Its last norm goes forward into `dec`, and its `encode` with it."
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.BatchNorm2d(6))
        self.dec = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3))
    def encode(self, x): return self.enc(x)
    def decode(self, z): return self.dec(z)
    def forward(self, x): return self.dec(self.enc(x))

def coder(): return randomize_norms(Coder()).double().requires_grad_(False)

@pytest.mark.parametrize('options', [{}, dict(verify=False), dict(strip_identity=True), dict(channels_last=True)], ids=str)
@pytest.mark.parametrize('way', [lambda m: 'encode', lambda m: 'enc', lambda m: m.enc, lambda m: ['encode','enc'], lambda m: (m.enc[5],)])
def test_an_autoencoder(way, options):
    m,x,folder = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64),BN_Folder()
    assert distance([folder.fold(m, x).encode(x)], [m.encode(x)])>.1
    assert folder.result.changed==['enc','enc.0','enc.5','dec.0','encode']
    assert re.search("`encode` returns other values than before.*fold with `keep='encode'`", ' '.join(folder.result.notes))
    folder = BN_Folder(keep=way(m), **options)
    f = folder.fold(m, x)
    for n in (1,2,3):
        x = torch.randn(n, 3, 9, 7, dtype=torch.float64)
        assert distance([f.encode(x),f(x)], [m.encode(x),m(x)])<1e-12
    assert [o.norm for o in folder.result.folded]==['enc.1','dec.1'] and 'encode' not in folder.result.changed and not folder.result.notes
    assert folder.plan(m, x).rows()==folder.result.rows()

def test_kept_and_folded_again():
    "`undo`, other weights, `refold`: what is kept stays."
    m,x = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folder = BN_Folder(keep='encode')
    folder.fold(m, x, inplace=True)
    folder.undo()
    randomize_norms(m, 5)
    before = m.encode(x)
    folder.refold()
    assert distance([m.encode(x)], [before])<1e-12 and count_norm_calls(m, x)==1

class Writes(Coder):
    "What `enc` returns is written to afterwards."
    def forward(self, x): return self.dec(self.enc(x).mul_(2))

class Both(nn.Sequential):
    def forward(self, x): return dict(first=(y := self[2](self[1](self[0](x)))), last=self[5](self[4](self[3](y))))

class Several(Coder):
    "`enc` returns two tensors, in a dict."
    def __init__(self):
        super().__init__()
        self.enc = Both(*self.enc)
    def encode(self, x): return self.enc(x)['last']
    def forward(self, x): return self.dec(self.encode(x))

class Named(Coder):
    "Has an argument that `encode` has not."
    def forward(self, x, scale=1.): return super().forward(x)*scale

@pytest.mark.parametrize('cls', [Writes,Several,Named])
def test_parts_of_other_forms(cls):
    m = randomize_norms(cls()).double().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folder = BN_Folder()
    f = folder.fold(m, x)
    assert (distance([f.encode(x)], [m.encode(x)])>.1)==('encode' in folder.result.changed)==(cls is not Writes)
    for keep in ('encode','enc'):
        f = (folder := BN_Folder(keep=keep)).fold(m, x)
        assert distance([f.encode(x),f(x)], [m.encode(x),m(x)])<1e-12 and len(folder.result.folded)==2

def test_a_part_in_float16_and_bfloat16():
    for dtype in (torch.float16,torch.bfloat16):
        m,x = coder().to(dtype),torch.randn(2, 3, 8, 8).to(dtype)
        f = (folder := BN_Folder(keep='encode')).fold(m, x)
        assert len(folder.result.folded)==2 and distance([f.encode(x)], [m.encode(x)])<3*torch.finfo(dtype).eps

def test_a_method_that_takes_something_else():
    with pytest.raises(FoldError, match='does not run on the sample'): BN_Folder(keep='decode').fold(coder(), torch.randn(2, 3, 8, 8, dtype=torch.float64))

def test_parts_that_are_none():
    m,x = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    m.spare = nn.Conv2d(3, 3, 1)
    m.more = nn.ModuleList([nn.Identity()])
    for keep,why in (('nothing','no module and no method of that name'),('enc.7','is it `enc'),(nn.ReLU(),'no module of this model'),('spare','not called on the sample'),
        ('more','not called on the sample'),('train','no module and no method')):
        for do in (BN_Folder(keep=keep).plan,BN_Folder(keep=keep).fold):
            with pytest.raises(FoldError, match=why): do(m, x)
    for keep in (None,3,[3],{'a':1}):
        with pytest.raises(FoldError, match='`keep` is a list of modules or names'): BN_Folder(keep=keep)

@pytest.mark.parametrize('wrap', [nn.DataParallel,lambda m: torch.compile(m, backend='eager'),lambda m: nn.parallel.DataParallel(torch.compile(m, backend='eager'))])
def test_parts_of_a_wrapped_model(wrap):
    "Named as in the model that is wrapped."
    m,x = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = m.encode(x)
    for keep in ('encode',m.enc): assert len((folder := BN_Folder(keep=keep)).plan(wrap(m), x).folded)==2
    folder.fold(wrap(m), x, inplace=True)
    assert distance([m.encode(x)], [before])<1e-12 and count_norm_calls(m, x)==1

class Unsigned:
    "A function of which nobody knows what it takes."
    __signature__ = 'none'
    def __init__(self, f): self.f = f
    def __get__(self, o, cls=None): return self if o is None else partial(self.f, o)
    def __call__(self, *args): return self.f(*args)

def test_a_forward_without_a_signature():
    class Odd(Coder): forward = Unsigned(Coder.forward)
    m,x = randomize_norms(Odd()).double(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert len(BN_Folder().plan(m, x).folded)==3 and len(BN_Folder(keep='enc').plan(m, x).folded)==2

def test_the_model_itself_is_kept_anyway():
    m,x = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for keep in ([m],['']): assert BN_Folder(keep=keep).plan(m, x).rows()==BN_Folder().plan(m, x).rows()

class Collects(nn.Module):
    "A hook keeps what the convolution returned, which an activation would overwrite if the norm between them were gone."
    def __init__(self):
        super().__init__()
        self.conv,self.norm,self.act,self.last = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.ReLU(inplace=True),nn.Conv2d(4, 2, 1)
    def forward(self, x): return self.last(self.act(self.norm(self.conv(x))))

def test_what_is_kept_is_not_overwritten_later():
    m,x = randomize_norms(Collects()).double().requires_grad_(False),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    m.norm.weight.abs_() # a positive scale alone goes on through the activation
    for t in (m.norm.running_mean,m.norm.bias): t.zero_()
    f = (folder := BN_Folder(keep='conv')).fold(m, x)
    assert [o.direction for o in folder.result.folded]==['forward']
    held = []
    f.conv.register_forward_hook(lambda m, args, out: held.append(out)) # and no copy of it
    f(x)
    assert distance(held, [m.conv(x)])<1e-12

def test_parts_with_other_options(tmp_path):
    from fasterfold.all import FoldCallback
    learn = KINDS['plain_learner'](tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=FoldCallback(keep='0'))
    assert '0' not in learn._past.folders[0].plan.changed
    m,x = coder(),torch.randn(2, 3, 8, 8, dtype=torch.float64)
    m.spare = nn.Linear(9, 9)
    f = (folder := BN_Folder(keep=['encode','enc.2'], strip_identity=True, strip_unused=True)).fold(m, x)
    assert not [*f.spare.parameters()] and folder.result.stripped==['enc.1','dec.1'] and distance([f.encode(x)], [m.encode(x)])<1e-12
    f = (folder := BN_Folder(keep='enc.1', strip_identity=True)).fold(m, x)
    assert 'enc.1' not in folder.result.stripped and '`keep` names it' in ' '.join(folder.result.notes)

def test_branches_with_a_part_in_them_stay():
    m,x = randomize_norms(timm.create_model('repvgg_a0')),torch.randn(1, 3, 64, 64)
    part = 'stages.0.0.conv_kxk'
    f = BN_Folder(merge_branches=True, keep=part).fold(m, x)
    assert distance(outputs_of(f, x, part), outputs_of(m, x, part))<1e-5
    f = BN_Folder(merge_branches=True, keep='stages.0').fold(m, x)
    assert distance(outputs_of(f, x, 'stages.0'), outputs_of(m, x, 'stages.0'))<1e-5
    assert not [n for n,_ in f.named_modules() if 'conv_kxk' in n]

# Learners

def body_learner(path): return vision_learner(images(path, CategoryBlock, n=24, bs=4, item_tfms=Resize(224)), 'vit_tiny_patch16_224', pretrained=False)

def test_embeddings_of_a_body(tmp_path):
    "The last norm of a ViT takes up the head's: right for the learner, wrong for whoever takes embeddings from its body."
    torch.manual_seed(0)
    learn = body_learner(tmp_path)
    randomize_norms(learn.model)
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    def embed():
        with torch.no_grad(): return [learn.model.eval()[0](x)]
    before,preds = embed(),learn.get_preds()[0]
    with learn.no_bar(): report = learn.fold()
    assert '0' in report.plan.changed and distance(embed(), before)>.1
    for shown in (str(report),report._repr_html_(),str(report.plan)): assert re.search("(`0`|<code>0</code>) returns other values than before", shown)
    assert distance([learn.get_preds()[0]], [preds])<1e-5
    learn.unfold()
    with learn.folded(keep='0'): assert distance(embed(), before)<1e-6
    learn.fold_bn(keep=[learn.model[0]])
    assert distance(embed(), before)<1e-6 and distance([learn.get_preds()[0]], [preds])<1e-5
    assert '0' not in learn.fold_plan().changed

def test_a_body_that_stays_is_not_spoken_of(tmp_path):
    learn = train(KINDS['vision'], tmp_path)
    plan = learn.fold_plan()
    assert '0' not in plan.changed and 'other values' not in str(plan)

def forward_only(path):
    "A learner whose norms can only go forward, the last one of its body into the head."
    def layer(ni, nf): return ConvLayer(ni, nf, stride=2, padding=0, bn_1st=False)
    body = nn.Sequential(layer(3,8), layer(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Learner(images(path, CategoryBlock), nn.Sequential(body, nn.Linear(16, 10)), metrics=accuracy, path=path)

def day_after(path):
    "What a new process does with a folded learner whose body was kept."
    learn,x = forward_only(path),torch.load(path/'x.pt')
    learn.load('folded')
    with torch.no_grad(): torch.save([learn.model.eval()[0](x),learn.model(x)], path/'outs.pt')
    for said in (1,0):
        with learn.no_bar(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(1, 1e-3)
        assert len([o for o in told if 'without its norms' in str(o.message)])==said
    try: learn.unfold()
    except FoldError as e: assert 'loaded from a file that was folded already' in str(e)
    else: raise AssertionError('unfolded')

def test_the_day_after(tmp_path):
    learn = train(forward_only, tmp_path)
    randomize_norms(learn.model)
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): want = [learn.model.eval()[0](x),learn.model(x)]
    learn.fold_bn(keep='0').save('folded')
    torch.save(x, tmp_path/'x.pt')
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert distance(torch.load(tmp_path/'outs.pt'), want)<1e-5
    assert [k.norm for k in learn.fold_plan(keep='0').kept]==['0.1.2'] and count_norm_calls(learn.model, x)==1

if __name__=='__main__': day_after(Path(sys.argv[1]))
