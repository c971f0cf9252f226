"The normalization of images that the loaders do, folded into the model."
import subprocess, sys
from pathlib import Path
import matplotlib.pyplot as plt, pytest, timm, torch
from fastai.vision.all import (CategoryBlock,DataBlock,DiceMulti,ImageBlock,Learner,MaskBlock,Normalize,PILImageBW,RandomSplitter,SimpleCNN,accuracy,
    aug_transforms,imagenet_stats,load_learner,resnet18,unet_learner,vision_learner)
from torch import nn
from fasterfold.all import FoldCallback,FoldError
from fasterfold.proof import distance
from helpers import randomize_norms
from learners import image,images,label,mask
from test_unfold import everything,fit,same

pytestmark = pytest.mark.filterwarnings('ignore:load_learner')

def normalizing(channels=3): return Normalize.from_stats(*[s[:channels] for s in imagenet_stats], cuda=False)

class Patches(nn.Module):
    "Without padding, as the patches of a ViT."
    def __init__(self):
        super().__init__()
        self.stem,self.norm,self.head = nn.Conv2d(3, 16, 4, stride=4, bias=False),nn.BatchNorm2d(16),nn.Linear(16, 10)
    def forward(self, x): return self.head(self.norm(self.stem(x)).relu().mean((2,3)))

def gray(i): return image(i)[...,0]
def grays(path, norm):
    block = DataBlock(blocks=(ImageBlock(PILImageBW),CategoryBlock), getters=[gray,label], splitter=RandomSplitter(.3, seed=0), batch_tfms=norm)
    return block.dataloaders(range(100), bs=16, path=path, num_workers=0, device='cpu')

def rgb(path, norm, *augmented, **kwargs): return images(path, CategoryBlock, batch_tfms=[*augmented,norm], **kwargs)

LEARNERS = dict( # the learner, and whether something is left in front
    resnet=(lambda path: vision_learner(rgb(path, normalizing(), *aug_transforms(), n=60), resnet18,
        pretrained=False, normalize=False, metrics=accuracy), True),
    timm=(lambda path: vision_learner(rgb(path, normalizing(), n=60), 'resnet10t', pretrained=False, normalize=False, metrics=accuracy), True),
    convnext=(lambda path: Learner(rgb(path, normalizing(), n=60), timm.create_model('convnext_atto', num_classes=10), metrics=accuracy), False),
    vit=(lambda path: Learner(rgb(path, normalizing(), n=60), timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=10), metrics=accuracy), False),
    patches=(lambda path: Learner(rgb(path, normalizing()), Patches(), metrics=accuracy), False),
    one_channel=(lambda path: Learner(grays(path, normalizing(1)), SimpleCNN([1,16,32,10]), metrics=accuracy), True),
    unet=(lambda path: unet_learner(images(path, MaskBlock(codes=['paper','ink']), n=24, bs=8, get_y=mask, batch_tfms=normalizing()), resnet18, pretrained=False,
        normalize=False, n_out=2, metrics=DiceMulti()), True))

def norms_of(learn): return [f for dl in learn.dls.loaders for f in dl.after_batch.fs if isinstance(f, Normalize)]

def predicted(learn, path):
    "All ways to ask a learner."
    with learn.no_bar():
        preds,targs = learn.get_preds()
        scores = learn.validate()
        others = learn.get_preds(dl=learn.dls.test_dl([1,2,3], num_workers=0))[0]
        one = learn.predict(5)
    return [preds,others,one[-1],torch.tensor([float(s) for s in scores])]

@pytest.mark.parametrize('name', LEARNERS)
def test_all_that_a_learner_does_is_as_before(name, tmp_path, monkeypatch):
    make,rest = LEARNERS[name]
    torch.manual_seed(0)
    learn = make(tmp_path)
    randomize_norms(learn.model)
    model,before,preds = learn.model,everything(learn),predicted(learn, tmp_path)
    report = learn.fold(normalize=True)
    assert not norms_of(learn) and (learn.model is model)!=rest
    assert ['pads with zeros' in o.reason for o in report.plan.kept if o.norm=='normalize']==[True]*rest
    assert [o.direction for o in report.plan.folded if o.norm in ('normalize','divide')]==['forward']
    assert ('with a subtraction, its first layer' if rest else 'within its own layers.') in str(report)
    assert {o.norm for o in report.plan.folded}-{'normalize','divide'}<={n for n,_ in model.named_modules()}
    for a,b in zip(predicted(learn, tmp_path), preds): assert distance([a], [b])<2e-4
    monkeypatch.setattr('matplotlib.pyplot.show', lambda *a, **k: None)
    learn.show_results(max_n=2) # decodes
    plt.close('all')
    raw = learn.dls.valid.one_batch()[0]
    assert 0<=raw.min() and raw.max()<=1
    learn.export('export.pkl')
    again = load_learner(tmp_path/'export.pkl')
    assert not norms_of(again) and distance([again.predict(5)[-1]], [preds[2]])<2e-4
    with learn.no_bar(): learn.unfold()
    assert same(everything(learn), before) and learn.model is model and len(norms_of(learn))==2
    assert distance([learn.get_preds()[0]], [preds[0]])==0

def trained(path): return Learner(rgb(path, normalizing()), SimpleCNN([3,16,32,10]), metrics=accuracy)

def test_folded_in_a_block_and_by_a_callback(tmp_path):
    learn = trained(tmp_path)
    fit(learn, warned=False)
    before,preds = everything(learn),learn.get_preds()[0]
    with learn.no_bar(), learn.folded(normalize=True):
        assert not norms_of(learn)
        assert distance([learn.get_preds()[0]], [preds])<1e-5
    assert same(everything(learn), before) and len(norms_of(learn))==2
    fit(learn, warned=False, cbs=FoldCallback(normalize=True))
    assert not norms_of(learn) and any('no longer normalize' in n for n in learn._past.folders[0].plan.notes)
    learn.unfold()
    assert len(norms_of(learn))==2
    plan = learn.fold_plan(normalize=True)
    assert len(norms_of(learn))==2 and [o.norm for o in plan.folded][0]=='divide'

def test_folded_twice(tmp_path):
    "First the norms, then the images' normalization: both come back."
    learn = trained(tmp_path)
    randomize_norms(learn.model)
    before,preds = everything(learn),learn.get_preds()[0]
    learn.fold_bn()
    learn.fold_bn(normalize=True)
    assert distance([learn.get_preds()[0]], [preds])<1e-5
    learn.unfold()
    assert same(everything(learn), before) and len(norms_of(learn))==2

@pytest.mark.parametrize('name', ['patches','one_channel'])
def test_weights_are_not_taken_for_others(name, tmp_path):
    "A learner that normalizes must not load weights of a model that does so itself."
    make,_ = LEARNERS[name]
    learn = make(tmp_path).fold_bn(normalize=True)
    learn.save('raw')
    for strict in (True,False):
        with pytest.raises(FoldError, match='normalizes its input itself'): make(tmp_path).load('raw', strict=strict)
    new = make(tmp_path).fold_bn(normalize=True).load('raw')
    assert distance([new.get_preds()[0]], [learn.get_preds()[0]])==0

def test_without_fasterfold(tmp_path):
    learn = trained(tmp_path)
    learn.fold_bn(normalize=True).export('export.pkl')
    want = learn.get_preds()[0]
    torch.save(want.as_subclass(torch.Tensor), tmp_path/'want.pt')
    code = f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import learners; sys.modules['fasterfold'] = None\n" \
        "from fastai.learner import load_learner; learn = load_learner('export.pkl')\n" \
        "got = learn.get_preds(dl=learn.dls.test_dl(range(100), num_workers=0))[0]; print(len(got), type(learn.model[0]).__module__)"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.strip().endswith('100 torch.nn.modules.batchnorm'), done.stderr

def test_all_of_it_may_stay(tmp_path):
    "A body of timm's in a fastai learner has a head that never runs, and might read what it reads."
    learn = vision_learner(rgb(tmp_path, normalizing(), n=60), 'convnext_atto', pretrained=False, normalize=False)
    randomize_norms(learn.model)
    preds = learn.get_preds()[0]
    with learn.no_bar(): report = learn.fold(normalize=True)
    assert 'with a first layer, `normalize`' in str(report) and '`0.model.head.norm` did not run' in report.plan.kept[0].reason
    assert distance([learn.get_preds()[0]], [preds])<1e-5 and not [*learn.model.normalize.parameters()]

def test_whatever_goes_wrong_afterwards(tmp_path, monkeypatch):
    learn = trained(tmp_path)
    before = everything(learn)
    for broken in ('without_norm','left','renamed'):
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(f'fasterfold.learner.{broken}', lambda *args: 1/0)
            learn.fold_bn(normalize=True)
        assert same(everything(learn), before) and len(norms_of(learn))==2

class Own(Normalize): pass

def test_what_is_refused(tmp_path):
    def refused(learn, why):
        before = everything(learn)
        for do in (learn.fold,learn.fold_bn,learn.fold_plan):
            with pytest.raises(FoldError, match=why): do(normalize=True)
        assert same(everything(learn), before)
    refused(Learner(images(tmp_path, CategoryBlock), SimpleCNN([3,8,10])), 'have no `Normalize`')
    refused(Learner(rgb(tmp_path, Own.from_stats(*imagenet_stats, cuda=False)), SimpleCNN([3,8,10])), 'no fixed map')
    both = DataBlock((ImageBlock,ImageBlock), getters=[image,image], splitter=RandomSplitter(.3, seed=0), batch_tfms=normalizing())
    refused(Learner(both.dataloaders(range(20), bs=4, num_workers=0, device='cpu'), nn.Conv2d(3, 3, 3, padding=1), loss_func=nn.MSELoss()), 'targets')
    with pytest.raises(FoldError, match='True or False'): trained(tmp_path).fold_bn(normalize='yes')
