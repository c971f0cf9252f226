"Real models: how many norms go, why the others stay, and how close to float64 the folded model is."
import pytest, timm, torch, torchvision
from fastai.tabular.all import TabularModel
from fastai.vision.all import create_unet_model,create_vision_model,resnet18,xresnet18,xresnet50
from fastai.vision.gan import basic_critic,basic_generator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from fasterfold.state import FoldError
from fasterfold.sample import tensors_of
from helpers import *

T = torchvision.models

def image(size=64, n=2): return lambda: torch.randn(n, 3, size, size)
def table(): return torch.randint(4, (2,2)),torch.randn(2, 3)
def tm(name, size=64, **kwargs): return (lambda: timm.create_model(name, **kwargs)),image(size)
def tv(name, size=64, **kwargs): return (lambda: getattr(T, name)(weights=None, **kwargs)),image(size)

# name: (model, sample), norm calls before, at most this many after
TABLE = dict(vision_learner=(((lambda: create_vision_model(resnet18, 2, pretrained=False)), image()), 22, 0),
    unet_learner=(((lambda: create_unet_model(resnet18, 2, (64,64), pretrained=False)), image()), 25, 5), xresnet18=((xresnet18, image()), 22, 0),
    xresnet50=((xresnet50, image()), 55, 0), tabular_learner=(((lambda: TabularModel([(5,3),(4,2)], 3, 2, [20,10])), table), 3, 0),
    densenet121=(tv('densenet121'), 121, 62), mobilenet_v3_small=(tv('mobilenet_v3_small'), 34, 0), efficientnet_b0=(tv('efficientnet_b0'), 49, 0),
    shufflenet_v2_x1_0=(tv('shufflenet_v2_x1_0'), 56, 0), regnet_y_400mf=(tv('regnet_y_400mf'), 53, 0),
    resnext50_32x4d=(tv('resnext50_32x4d'), 53, 0), vgg11_bn=(tv('vgg11_bn'), 8, 0),
    deeplabv3_resnet50=(((lambda: T.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)), image()), 60, 0),
    resnet26d=(tm('resnet26d'), 31, 0), levit_128=(tm('levit_128', img_size=64), 64, 0), repvit_m0_9=(tm('repvit_m0_9'), 108, 0))

# small ones of many families, to see at once what a change of the rules does
SMALL = dict(resnet10t=(tm('resnet10t'), 14, 0), seresnet18=(tm('seresnet18'), 20, 0), skresnet18=(tm('skresnet18'), 36, 0),
    mobilenetv3_small_050=(tm('mobilenetv3_small_050'), 34, 0), mobilenetv4_conv_small_035=(tm('mobilenetv4_conv_small_035'), 46, 0),
    lcnet_035=(tm('lcnet_035'), 27, 0), tinynet_e=(tm('tinynet_e'), 31, 0), ghostnet_050=(tm('ghostnet_050'), 80, 0),
    repghostnet_050=(tm('repghostnet_050'), 112, 0), regnetx_002=(tm('regnetx_002'), 44, 0), dla46_c=(tm('dla46_c'), 48, 0),
    ese_vovnet19b_slim_dw=(tm('ese_vovnet19b_slim_dw'), 22, 0), cs3darknet_focus_s=(tm('cs3darknet_focus_s'), 31, 0),
    mobilevit_xxs=(tm('mobilevit_xxs'), 32, 0), mobilevitv2_050=(tm('mobilevitv2_050'), 25, 0),
    efficientformerv2_s0=(tm('efficientformerv2_s0', img_size=64), 75, 0), repvgg_a0=(tm('repvgg_a0'), 61, 0), fastvit_t8=(tm('fastvit_t8'), 70, 0),
    hgnetv2_b0=(tm('hgnetv2_b0'), 42, 0), fasternet_t0=(tm('fasternet_t0'), 17, 0), starnet_s050=(tm('starnet_s050'), 18, 0),
    xcit_nano_12_p16_224=(tm('xcit_nano_12_p16_224', img_size=64), 16, 12), botnet26t_256=(tm('botnet26t_256', img_size=64), 31, 0),
    rexnet_100=(tm('rexnet_100'), 62, 0), googlenet=(tv('googlenet', init_weights=False), 57, 0),
    lraspp_mobilenet_v3_large=(((lambda: T.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)), image()), 47, 0),
    r3d_18=(((lambda: T.video.r3d_18(weights=None)), lambda: torch.randn(1, 3, 4, 32, 32)), 20, 0),
    gan_critic=(((lambda: basic_critic(32, 3, n_features=8)), image(32)), 2, 0),
    gan_generator=(((lambda: basic_generator(32, 3, in_sz=10, n_features=8)), lambda: torch.randn(2, 10)), 3, 0))

@pytest.mark.parametrize('name', [*TABLE,*SMALL])
def test_folds(name):
    (make,draw),before,after = (TABLE | SMALL)[name]
    model,sample = randomize_norms(make()),draw()
    assert count_norm_calls(model, sample)==before
    was = {k:(v,v.clone()) for k,v in model.state_dict(keep_vars=True).items()}
    folder = BN_Folder()
    new = folder.fold(model, sample)
    plan = folder.result
    left = count_norm_calls(new, sample)
    assert left<=after
    assert sum(o.calls for o in plan.folded)>=before-left and sum(o.calls for o in plan.kept)>=left
    assert {*names_of(plan.folded),*names_of(plan.kept)}>={n for n,m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert all(o.reason and 'failed' not in o.reason for o in plan.kept)
    assert all(o.into and o.direction in ('back','forward','both ways','beside') for o in plan.folded)
    now = model.state_dict(keep_vars=True)
    assert list(was)==list(now) and all(now[k] is v and torch.equal(v, t) for k,(v,t) in was.items())
    check_fold(model, new, sample)

@pytest.mark.parametrize('bias', [False,True])
def test_first_layers_of_resnet18(bias):
    "The comparison a published recipe makes, which forgets a bias the convolution has; another divides by the variance and not its root."
    net = T.resnet18()
    conv,norm = net.conv1 if not bias else nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=True),net.bn1
    model,x = randomize_norms(nn.Sequential(conv, norm)),torch.randn(16, 3, 256, 256)
    new = BN_Folder().fold(model, x)
    assert isinstance(new[1], nn.Identity)
    with torch.no_grad(): diff = model(x).double()-new(x).double()
    assert abs(diff.mean())<1e-8 and diff.abs().max()<1e-5

def test_detector_that_finds_nothing():
    "Its mask head ran on nothing, and what it returns proves nothing."
    model = randomize_norms(T.detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, min_size=64, max_size=64, rpn_post_nms_top_n_test=8))
    model.roi_heads.score_thresh = 1.1
    sample,folder = ([torch.rand(3, 64, 64)],),BN_Folder(verify=False)
    with pytest.raises(FoldError, match='no numbers'): BN_Folder().fold(model, sample)
    new = folder.fold(model, sample)
    assert len(folder.result.folded)==65
    assert [(o.norm,'empty' in o.reason) for o in folder.result.kept]==[(f'roi_heads.mask_head.{i}.1',True) for i in range(4)]
    check_fold(model.roi_heads.mask_head, new.roi_heads.mask_head, torch.randn(2, 256, 14, 14))

class Neighbours(nn.Module):
    "A layer of a graph network: each node's neighbours, weighted by how many there are, through a linear layer."
    def __init__(self, ni, nf):
        super().__init__()
        self.lin,self.bias = nn.Linear(ni, nf, bias=False),nn.Parameter(torch.randn(nf))
    def forward(self, x, frm, to):
        n = x.new_zeros(len(x)).index_add(0, to, torch.ones_like(to, dtype=x.dtype)).clamp(min=1)
        msgs = self.lin(x).index_select(0, frm)*n.rsqrt().index_select(0, to)[:,None]
        return x.new_zeros(len(x), len(self.bias)).scatter_add_(0, to[:,None].expand_as(msgs), msgs) + self.bias

class PlainNorm(nn.BatchNorm1d):
    def forward(self, x, batch=None): return super().forward(x)

class GraphNet(nn.Module):
    def __init__(self, more=()):
        super().__init__()
        self.conv1,self.norm1,self.conv2,self.norm2,self.more = Neighbours(5, 8),PlainNorm(8),Neighbours(8, 6),PlainNorm(6),more
    def forward(self, x, frm, to): return self.norm2(self.conv2(self.norm1(self.conv1(x, frm, to), *self.more).relu(), frm, to))

def graph(n=9, k=20): return torch.randn(n, 5),torch.randint(n, (k,)),torch.randint(1, n, (k,)) # nothing leads to the first node

def test_graph_network():
    "A norm after a sum over neighbours goes into the linear layer before it; an `nn.Identity` cannot be called like one that is given more."
    model,folder = randomize_norms(GraphNet()),BN_Folder()
    new = folder.fold(model, graph())
    assert names_of(folder.result.folded)==['norm1','norm2']
    for sample in (graph(),graph(30, 7)): check_fold(model, new, sample)
    model.more = (None,)
    new = folder.fold(model, graph())
    assert [(o.norm,'more than its input' in o.reason) for o in folder.result.kept]==[('norm1',True)]
    check_fold(model, new, graph())

class SparseGraphNet(nn.Module):
    "A graph network whose edges are a sparse matrix, given or its own."
    def __init__(self, product, adj=None, n=(5,8,6)):
        super().__init__()
        self.lins,self.norms = (nn.ModuleList(o) for o in ([nn.Linear(i, o, bias=False) for i,o in zip(n, n[1:])],[nn.BatchNorm1d(o) for o in n[1:]]))
        self.bias,self.product = nn.ParameterList([torch.randn(o) for o in n[1:]]),product
        self.register_buffer('adj', adj)
    def forward(self, x, adj=None):
        for lin,norm,b in zip(self.lins, self.norms, self.bias): x = norm(self.product(self.adj if adj is None else adj, lin(x))+b).relu()
        return x

@pytest.mark.parametrize('product', [torch.mm,torch.sparse.mm,torch.spmm])
@pytest.mark.parametrize('layout', [torch.sparse_coo,torch.sparse_csr])
def test_sparse_graph_network(product, layout):
    "Kipf's graph convolution: a sparse matrix times what a linear layer made."
    def edges(): return (torch.rand(7, 7)*(torch.rand(7, 7)>.6)).to_sparse(layout=layout)
    given,own = SparseGraphNet(product),SparseGraphNet(product, edges())
    for model,sample in ((given,lambda: (torch.randn(7, 5),edges())),(own,lambda: (torch.randn(7, 5),))):
        folder = BN_Folder()
        new = folder.fold(randomize_norms(model), sample())
        assert names_of(folder.result.folded)==['norms.0','norms.1']
        x = sample()
        assert distance(run(new, x), run(model, x))<1e-5 and count_norm_calls(new, x)==0

def test_sparse_weight_stays():
    "One channel could be scaled in the matrix as well."
    model = randomize_norms(SparseGraphNet(torch.mm, torch.eye(7).to_sparse(), (5,1)))
    before,new = model.adj.to_dense(),BN_Folder().fold(model, torch.randn(7, 5), inplace=True)
    assert torch.equal(new.adj.to_dense(), before)

class Ragged(nn.Module):
    "Texts of different lengths: a transformer that skips the padding, and a list of texts."
    def __init__(self):
        super().__init__()
        self.embed,self.norm,self.head = nn.Embedding(9, 8),nn.BatchNorm1d(8),nn.Linear(8, 4)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.last = nn.BatchNorm1d(4)
    def forward(self, x):
        y = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        y = self.body(y, src_key_padding_mask=x==0)
        y = self.last(self.head(y).transpose(1, 2)).transpose(1, 2)
        return y,torch.nested.as_nested_tensor([t[:int(n)] for t,n in zip(y, (x>0).sum(1))])

@pytest.mark.filterwarnings('ignore:.*nested tensors')
def test_nested_tensors():
    model,folder = randomize_norms(Ragged()),BN_Folder()
    x = torch.randint(1, 9, (3, 7)).where(torch.arange(7)<torch.tensor([[7],[4],[2]]), 0)
    new = folder.fold(model, x)
    assert names_of(folder.result.folded)==['norm','last'] and not folder.result.kept
    outs,refs = run(new, x),run(model, x)
    assert len(outs)==4 and distance(outs, refs)<1e-5

class Padded(nn.Sequential):
    def forward(self, x): return super().forward(x.to_padded_tensor(0.).transpose(1, 2))

@pytest.mark.parametrize('layout', [torch.strided,torch.jagged])
def test_nested_sample(layout):
    model,folder = randomize_norms(Padded(nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4))),BN_Folder()
    x = torch.nested.nested_tensor([torch.randn(n, 5) for n in (3,6)], layout=layout)
    new = folder.fold(model, x)
    assert names_of(folder.result.folded)==['1'] and distance(run(new, x), run(model, x))<1e-5

class OwnTexts(Padded):
    def forward(self, x): return super().forward(self.texts*x)

@pytest.mark.parametrize('layout', [torch.strided,torch.jagged])
def test_nested_buffer(layout):
    model,folder = randomize_norms(OwnTexts(nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4))),BN_Folder()
    model.register_buffer('texts', torch.nested.nested_tensor([torch.randn(n, 5) for n in (3,6)], layout=layout))
    x = torch.randn(())
    new = folder.fold(model, x)
    assert names_of(folder.result.folded)==['1'] and distance(run(new, x), run(model, x))<1e-5
    assert new.texts is not model.texts and distance(tensors_of(new.texts), tensors_of(model.texts))==0

def test_crop():
    "A convolution, a crop, a norm: what is cropped may be scaled too, unless it is read elsewhere."
    class Crop(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.conv,self.norm,self.f = nn.Conv2d(3, 4, 3, padding=1),nn.BatchNorm2d(4),f
        def forward(self, x):
            y = self.conv(x)
            return self.norm(self.f(y)).relu(),self.f(y) if self.also else 0
    for f in (lambda y: y[:,:,1:,1:], lambda y: y[:,:,:,-1:], lambda y: y.select(3, 2).unsqueeze(3), lambda y: y.narrow(2, 3, 5)):
        for also in (False,True):
            model,folder = randomize_norms(Crop(f)),BN_Folder()
            model.also = also
            new = folder.fold(model, image()())
            assert names_of(folder.result.kept)==['norm']*also
            check_fold(model, new, image()())

class GhostNorm(nn.Module):
    "TabNet's norm: one for all chunks of a batch."
    def __init__(self, n):
        super().__init__()
        self.bn = nn.BatchNorm1d(n)
    def forward(self, x): return torch.cat([self.bn(o) for o in x.chunk(-(-len(x)//4), 0)])

@pytest.mark.parametrize('rows', [3,4,9,16])
def test_ghost_norm(rows):
    model,folder = randomize_norms(nn.Sequential(nn.Linear(5, 8), GhostNorm(8), nn.ReLU(), GhostNorm(8), nn.Linear(8, 2))),BN_Folder()
    x = torch.randn(rows, 5)
    assert [(o.norm,o.direction,o.calls) for o in folder.plan(model, x).folded]==[('1.bn','back',-(-rows//4)),('3.bn','forward',-(-rows//4))]
    new = folder.fold(model, x)
    assert not folder.result.kept
    for n in (1,7,16): check_fold(model, new, torch.randn(n, 5))
