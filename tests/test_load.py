"Weights of folded models, loaded where the model is built anew: in a new process, fresh or trained otherwise, from every kind of file."
import re, subprocess, sys
from pathlib import Path
import pytest, timm, torch, torchvision
from fastai.vision.all import CategoryBlock,DataLoaders,Learner,accuracy,densenet121,vision_learner
from safetensors.torch import save_model
from torch import nn
from fasterfold.all import BN_Folder,FoldError,fold_like
from fasterfold.proof import run
from helpers import randomize_norms
from learners import KINDS,images

pytestmark = pytest.mark.filterwarnings('ignore:load_learner')

def norms(model): return [n for n,m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

def trained(model, seed=1):
    "`model` with hostile norms: some scales are negative, some zero."
    randomize_norms(model, seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None: m.weight[3::11] = 0
    return model

# Learners, in a new process

def timm_learner(name): return lambda path: vision_learner(images(path, CategoryBlock), name, pretrained=False, metrics=accuracy)

LEARNERS = dict(densenet=lambda path: vision_learner(images(path, CategoryBlock), densenet121, pretrained=False), preact=timm_learner('resnetv2_18'),
    norm_act=timm_learner('mobilenetv3_small_050'), **{k:KINDS[k] for k in ('unet','tabular','tabular_all_options','plain_learner','half_precision')})

def plain(ts): return tuple(t.as_subclass(torch.Tensor) for t in ts) # of a class of fastai's they could not be read as mere weights

LOADS = ('with_opt','fresh'),('without','otherwise'),('with_opt','folded')

def load_all(path):
    "What a new process does: build each learner, fresh and trained otherwise, and load."
    for name,make in LEARNERS.items():
        x = torch.load(path/f'{name}.x')
        for file,way in LOADS:
            learn = make(path)
            if way!='fresh': trained(learn.model, 2)
            if way=='folded': learn.fold_bn()
            learn.load(f'{name}_{file}')
            torch.save(dict(outs=plain(run(learn.model.eval(), x)), norms=norms(learn.model), state=learn.model.state_dict()), path/f'{name}_{file}_{way}.res')

@pytest.fixture(scope='session')
def saved(tmp_path_factory):
    "Trained learners folded and saved, and what a new process got of the files."
    path,res = tmp_path_factory.mktemp('saved'),{}
    for name,make in LEARNERS.items():
        learn = make(path)
        trained(learn.model)
        n = len(norms(learn.model))
        learn.fold_bn()
        x = plain(learn.dls.valid.one_batch()[:learn.dls.n_inp])
        torch.save(x, path/f'{name}.x')
        learn.save(f'{name}_without', with_opt=False)
        learn.create_opt()
        learn.save(f'{name}_with_opt')
        res[name] = dict(outs=plain(run(learn.model.eval(), x)), norms=norms(learn.model), had=n, state=learn.model.state_dict())
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__, path], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    return path,res

@pytest.mark.xdist_group('load')
@pytest.mark.parametrize('file,way', LOADS)
@pytest.mark.parametrize('name', LEARNERS)
def test_learners_load(saved, name, file, way):
    path,res = saved
    got,want = torch.load(path/f'{name}_{file}_{way}.res'),res[name]
    assert got['norms']==want['norms'] and len(want['norms'])<want['had']
    assert all(map(torch.equal, got['outs'], want['outs']))
    assert got['state'].keys()==want['state'].keys() and all(torch.equal(t, want['state'][k]) for k,t in got['state'].items())

def test_optimizer_state_is_loaded(tmp_path):
    "Training goes on from a folded file just as in the learner that wrote it."
    learn = KINDS['plain_learner'](tmp_path)
    trained(learn.model)
    learn.fold_bn()
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='without its norms'): learn.fit(1, 1e-3)
    learn.save('folded')
    new = KINDS['plain_learner'](tmp_path)
    with new.no_bar(), new.no_logging(): new.fit(1, 1e-3) # has an optimizer for the parameters of before
    new.load('folded', with_opt=True)
    a,b = (l.opt.state_dict()['state'] for l in (learn,new))
    assert len(a)==len(b)==len([*learn.model.parameters()])
    assert all(torch.equal(p[k], q[k]) if torch.is_tensor(p[k]) else p[k]==q[k] for p,q in zip(a, b) for k in p)

def test_a_sample_may_be_given(tmp_path):
    "Weights of a model that has other norms for other inputs; without data a learner knows no input."
    learn = KINDS['plain_learner'](tmp_path)
    trained(learn.model)
    learn.fold_bn().save('folded')
    new = Learner(DataLoaders([], []), trained(KINDS['plain_learner'](tmp_path).model, 2), loss_func=nn.MSELoss(), path=tmp_path)
    x = learn.dls.valid.one_batch()[0]
    new.load('folded', sample=x)
    assert torch.equal(run(new.model.eval(), x)[0], run(learn.model.eval(), x)[0])

def unchanged(model):
    "What tells whether `model` is as it was."
    return {k:t.clone() for k,t in model.state_dict().items()},[(n,m) for n,m in model.named_modules()]

def assert_unchanged(model, before):
    state,modules = before
    assert [(n,m) for n,m in model.named_modules()]==modules
    assert model.state_dict().keys()==state.keys() and all(torch.equal(t, state[k]) for k,t in model.state_dict().items())

def test_what_does_not_fit(tmp_path):
    "Files of another learner and from before folding: nothing changes, layers are named. Strict as fastai is, and no stricter."
    path,make = tmp_path,KINDS['plain_learner']
    learn = make(path)
    trained(learn.model)
    learn.save('whole')
    learn.fold_bn().save('folded')
    before = unchanged(learn.model)
    with pytest.raises(FoldError, match=re.escape('`learn.unfold()`')): learn.load('whole')
    assert_unchanged(learn.model, before)
    other = Learner(learn.dls, nn.Sequential(*make(path).model[:-1], nn.Linear(32, 10), nn.Linear(10, 10)), loss_func=learn.loss_func, path=path)
    before = unchanged(other.model)
    with pytest.raises(FoldError, match='only the model has.*`6`'): other.load('folded')
    assert_unchanged(other.model, before)
    with pytest.raises(RuntimeError, match='Missing key'): other.load('whole') # what fastai says
    other.load('whole', strict=False)
    assert torch.equal(other.model[0][1].weight, torch.load(path/'models'/'whole.pth', weights_only=True)['0.1.weight'])
    new = make(path).load('folded', strict=False)
    assert norms(new.model)==norms(learn.model) # right, whatever is asked for

# Any model, any file

def of_timm(name): return lambda: timm.create_model(name)
MODELS = {k:(of_timm(k),(1,3,64,64)) for k in ('resnetv2_18','efficientnet_lite0','densenet121')}
MODELS['other_norms'] = (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 8, 1),
    nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4), nn.LayerNorm(4))), (2,3,6,6)
MODELS['in_place'] = (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, bias=False),
    nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(32, 4))), (2,3,6,6)
MODELS['crepe'] = (lambda: nn.Sequential(*[l for i in (1,8,8) for l in (nn.Conv1d(i, 8, 5), nn.ReLU(), nn.BatchNorm1d(8, eps=.001), nn.MaxPool1d(2))],
    nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(24, 4))), (2,1,52)

@pytest.mark.parametrize('name', MODELS)
def test_models_load(name, tmp_path):
    make,size = MODELS[name]
    torch.manual_seed(0)
    x,m = torch.randn(size),trained(make())
    folded = BN_Folder().fold(m, x)
    assert len(norms(folded))<len(norms(m))
    want = run(folded, x)
    torch.save(folded.state_dict(), tmp_path/'folded.pth')
    save_model(folded, str(tmp_path/'folded.safetensors'))
    for state in (folded.state_dict(),tmp_path/'folded.pth',tmp_path/'folded.safetensors'):
        for new in (make(),make().eval(),trained(make(), 2)):
            training = new.training
            assert fold_like(new, state, x) is new and {o.training for o in new.modules()}=={training}
            assert all(map(torch.equal, run(new.eval(), x), want))
            assert norms(new)==norms(folded)
        assert {p.dtype for p in fold_like(make().double(), state, x.double()).parameters()}=={torch.float64}

def stored():
    class Scaled(nn.Conv2d):
        def forward(self, x): return self._conv_forward(x, self.weight/self.weight.norm(), self.bias)
    by_two,by_largest = nn.utils.parametrizations.weight_norm,nn.utils.parametrizations.spectral_norm
    return nn.Sequential(Scaled(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), by_two(nn.Conv2d(8, 8, 3)), nn.ReLU(), by_largest(nn.Conv2d(8, 4, 1)))

CONSTANTS = dict(own=(stored, (1,3,8,8), {}), nfnet=(lambda: timm.create_model('nf_resnet26'), (1,3,64,64), {}),
    bit=(lambda: timm.create_model('resnetv2_50x1_bit', num_classes=3), (1,3,32,32), {}),
    repvgg=(lambda: timm.create_model('repvgg_a0'), (1,3,64,64), dict(merge_branches=True)),
    mobileone=(lambda: timm.create_model('mobileone_s0'), (1,3,64,64), dict(merge_branches=True)))

@pytest.mark.parametrize('name', CONSTANTS)
def test_computed_weights_and_branches_load(name):
    "Layers that compute their weights no more, and branches that were merged."
    make,size,options = CONSTANTS[name]
    torch.manual_seed(0)
    x,m = torch.randn(size),trained(make())
    folded = BN_Folder(**options).fold(m, x)
    for new in (make(),trained(make(), 2)):
        assert all(map(torch.equal, run(fold_like(new, folded.state_dict(), x).eval(), x), run(folded, x)))
        assert sum(p.numel() for p in new.parameters())==sum(p.numel() for p in folded.parameters())

def test_what_never_ran_is_gone():
    def make(): return torchvision.models.googlenet(init_weights=False, num_classes=4)
    x,m = torch.randn(1,3,64,64),trained(make())
    folded = BN_Folder(strip_unused=True).fold(m, x)
    new = fold_like(make(), folded.state_dict(), x).eval()
    assert all(map(torch.equal, run(new, x), run(folded, x)))
    assert not [*new.aux1.parameters()]

def test_state_dicts_that_strict_false_would_take():
    "What names alone do not show: other shapes, one bias too many, weights of a model that was never folded, and of one that folds less."
    torch.manual_seed(0)
    x,make = torch.randn(2,3,6,6),MODELS['in_place'][0]
    m = trained(make())
    state = BN_Folder().fold(m, x).state_dict()
    new = make()
    before = unchanged(new)
    for wrong in ({**state, '0.weight':torch.zeros(8,3,1,1)},{**state, '3.bias':torch.zeros(8)},{k:t for k,t in state.items() if k!='7.bias'},{}, {**state, '4.bias':torch.zeros(3)}):
        with pytest.raises(FoldError, match='not those of this model'): fold_like(new, wrong, x)
        assert_unchanged(new, before)
    fold_like(new, m.state_dict())
    assert all(map(torch.equal, run(new.eval(), x), run(m, x)))

def test_files_that_are_none(tmp_path):
    (tmp_path/'text.pth').write_text('no weights')
    torch.save([1,2], tmp_path/'list.pth')
    torch.save(nn.Linear(2, 2), tmp_path/'whole.pth')
    for name,why in (('text','cannot be read'),('list','no weights by name'),('whole','cannot be read')):
        with pytest.raises(FoldError, match=why): fold_like(nn.Linear(2, 2), tmp_path/f'{name}.pth')
    with pytest.raises(FileNotFoundError): fold_like(nn.Linear(2, 2), tmp_path/'none.pth')

def test_tied_weights_load(tmp_path):
    "safetensors leaves out the second name of a shared weight."
    def make():
        m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
        m[4].weight = m[3].weight
        return m
    torch.manual_seed(0)
    x,folded = torch.randn(2,4),BN_Folder().fold(trained(make()))
    save_model(folded, str(tmp_path/'folded.safetensors'))
    new = fold_like(make(), tmp_path/'folded.safetensors')
    assert torch.equal(run(new.eval(), x)[0], run(folded, x)[0]) and new[4].weight is new[3].weight

def test_plain_loading_is_refused():
    "Whoever loads folded weights as they would load others hears of it, also where no name is gone."
    torch.manual_seed(0)
    for make,x in ((lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False, track_running_stats=True)), torch.randn(1,3,5,5)),
        (lambda: stored(), torch.randn(1,3,8,8))):
        state = BN_Folder().fold(trained(make()), x).state_dict()
        with pytest.raises(RuntimeError): make().load_state_dict(state)

def test_an_interrupted_load_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    make,size = MODELS['crepe']
    x,m = torch.randn(size),trained(make())
    state,new = BN_Folder().fold(m, x).state_dict(),make()
    before = unchanged(new)
    def broken(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(new, 'load_state_dict', broken)
    with pytest.raises(KeyboardInterrupt): fold_like(new, state, x)
    assert_unchanged(new, before)

if __name__=='__main__':
    torch.set_num_threads(1)
    load_all(Path(sys.argv[1]))
