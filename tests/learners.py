"Every kind of fastai learner, on small real data, and what users do with one."
import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from fastai.collab import *
from fastai.tabular.all import *
from fastai.vision.all import *
from sklearn import datasets

KINDS = {}

def kind(f):
    KINDS[f.__name__] = f
    return f

DIGITS = datasets.load_digits()

def image(i): return np.repeat((DIGITS.images[i]*15).astype('uint8').repeat(4, 0).repeat(4, 1)[...,None], 3, -1)
def label(i): return str(DIGITS.target[i])
def facts(i): return [o for o,yes in (('even',DIGITS.target[i]%2==0),('big',DIGITS.target[i]>4),('ink',DIGITS.data[i].sum()>310)) if yes]
def mask(i): return (DIGITS.images[i]>8).astype('uint8').repeat(4, 0).repeat(4, 1)
def other(i): return image(i*7%len(DIGITS.images))
def same(i): return str(DIGITS.target[i]==DIGITS.target[i*7%len(DIGITS.images)])

def images(path, *blocks, n=100, bs=16, get_x=(image,), get_y=label, **kwargs):
    "Loaders of `n` digits, 32 by 32 pixels."
    block = DataBlock(blocks=(ImageBlock,)*len(get_x)+blocks, n_inp=len(get_x), getters=[*get_x, get_y],
        splitter=RandomSplitter(0.3, seed=0), **kwargs)
    return block.dataloaders(range(n), bs=bs, path=path, num_workers=0, device='cpu')

@kind
def vision(path):
    return vision_learner(images(path, CategoryBlock, batch_tfms=aug_transforms()), resnet18, pretrained=False, metrics=[accuracy,F1Score(average='macro')])

@kind
def vision_multi(path):
    return vision_learner(images(path, MultiCategoryBlock, get_y=facts), resnet18, pretrained=False, metrics=accuracy_multi)

def _unet(path, **kwargs):
    dls = images(path, MaskBlock(codes=['paper','ink']), n=24, bs=8, get_y=mask)
    return unet_learner(dls, resnet18, pretrained=False, n_out=2, metrics=DiceMulti(), **kwargs)
@kind
def unet(path): return _unet(path)
@kind
def unet_attention_blur(path): return _unet(path, self_attention=True, blur=True)
@kind
def unet_no_last_cross(path): return _unet(path, last_cross=False)

def _table(path, name, cats, y_block, y='target', **kwargs):
    df = getattr(datasets, f'load_{name}')(as_frame=True).frame
    for c in cats: df[c] = pd.qcut(df[c], 5, labels=False, duplicates='drop').astype(str)
    cont = [c for c in df.columns if c not in (*cats,y)]
    return TabularDataLoaders.from_df(df, path=path, procs=[Categorify,FillMissing,Normalize], cat_names=list(cats), cont_names=cont, y_names=y,
        y_block=y_block, bs=32, seed=0, device='cpu', **kwargs)
@kind
def tabular(path): return tabular_learner(_table(path, 'wine', ('alcohol','hue'), CategoryBlock), layers=[40,20], metrics=accuracy)
@kind
def tabular_all_options(path):
    config = tabular_config(embed_p=.1, ps=.1, bn_final=True, y_range=(0,400))
    return tabular_learner(_table(path, 'diabetes', ('age','sex'), RegressionBlock), layers=[40,20], n_out=1, config=config, metrics=rmse)
@kind
def tabular_continuous(path): return tabular_learner(_table(path, 'breast_cancer', (), CategoryBlock), layers=[40,20], metrics=accuracy)

@kind
def collab(path):
    # rows of the handwritten digits rate columns by their ink
    df = pd.DataFrame([(f'digit {i}', f'column {j}', v) for i,im in enumerate(DIGITS.images[:60]) for j,v in enumerate(im.mean(0))],
        columns=['user','item','rating'])
    dls = CollabDataLoaders.from_df(df, bs=64, seed=0, path=path, device='cpu')
    return collab_learner(dls, use_nn=True, layers=[40,20], y_range=(0,16), metrics=rmse)

class Siamese(Module):
    "One body for both images."
    def __init__(self): self.body,self.head = create_body(xresnet18(), pretrained=False),create_head(512*2, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a),self.body(b)], 1))
@kind
def siamese(path): return Learner(images(path, CategoryBlock, get_x=(image,other), get_y=same), Siamese(), metrics=accuracy)

@kind
def timm_body(path): return vision_learner(images(path, CategoryBlock), 'resnet26d', pretrained=False, metrics=accuracy)

@kind
def xresnet(path): return Learner(images(path, CategoryBlock), xresnet18(n_out=10), metrics=accuracy)

def tensors(): return [(tensor(x).float().view(1,8,8)/16, tensor(y)) for x,y in zip(DIGITS.data, DIGITS.target)]
def small(*head):
    body = [ConvLayer(1, 16), ConvLayer(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(32)]
    return nn.Sequential(*body, *(head or [nn.Linear(32, 10)]))

def plain(path, model=None, loss=None, **kwargs):
    items = tensors()
    dls = DataLoaders.from_dsets(items[:600], items[600:800], bs=64, num_workers=0, path=path, device='cpu')
    return Learner(dls, model or small(), loss_func=loss or CrossEntropyLossFlat(), path=path, **{'metrics':accuracy, **kwargs})
@kind
def plain_learner(path): return plain(path)

@kind
def pytorch_loaders(path):
    items = tensors()
    loader = lambda ds, **kw: torch.utils.data.DataLoader(ds, batch_size=64, **kw)
    dls = DataLoaders(loader(items[:600], shuffle=True), loader(items[600:800]), path=path, device='cpu')
    return Learner(dls, small(), loss_func=CrossEntropyLossFlat(), path=path, metrics=accuracy)

@kind
def half_precision(path): return plain(path).to_fp16()
@kind
def channels_last(path): return plain(path).to_channelslast(use_amp=False)

class Structured(Module):
    "Returns `wrap` of class scores and features."
    def __init__(self, wrap): self.body,self.head,self.wrap = small(nn.Identity()),nn.Linear(32, 10),wrap
    def forward(self, x):
        features = self.body(x)
        return self.wrap(self.head(features), features)

def as_dict(scores, features): return dict(scores=scores, features=features)
def as_tuple(scores, features): return scores,features
def scores_of(p): return p['scores'] if isinstance(p, dict) else p[0]
def structured_loss(p, y): return F.cross_entropy(scores_of(p), y)
def structured_accuracy(p, y): return accuracy(scores_of(p), y)
@kind
def dict_output(path): return plain(path, Structured(as_dict), structured_loss, metrics=structured_accuracy)
@kind
def tuple_output(path): return plain(path, Structured(as_tuple), structured_loss, metrics=structured_accuracy)

# what each kind can do before folding, it must do after
IMAGES = {'vision','vision_multi','unet','unet_attention_blur','unet_no_last_cross','timm_body','xresnet'}
TABLES = {'tabular','tabular_all_options','tabular_continuous','collab'}
DATA_BLOCKS = IMAGES|TABLES|{'siamese'}

def classes(learn):
    "Predictions for the validation set: classes where there are classes."
    preds,_,decoded = learn.get_preds(dl=learn.dls.valid, reorder=False, with_decoded=True)
    return decoded if torch.is_tensor(decoded) and not decoded.is_floating_point() else scores_of(preds).argmax(1) if not torch.is_tensor(preds) else preds

def uses(name, learn):
    "Everything a fastai user does next."
    classes(learn)
    if name in TABLES-{'collab'}: learn.predict(learn.dls.valid_ds.items.iloc[0])
    elif name in DATA_BLOCKS-{'collab'}: learn.predict(learn.dls.valid_ds.items[0])
    if name in IMAGES: learn.tta(n=1)
    if name in DATA_BLOCKS:
        learn.show_results(max_n=2)
        plt.close('all')
    if name in DATA_BLOCKS-{'siamese'}: Interpretation.from_learner(learn).top_losses(2)
    if name!='pytorch_loaders': learn.summary()
    learn.freeze()
    learn.unfreeze()
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    learn.fit(1, 1e-4)

def train(make, path):
    set_seed(0, True)
    learn = make(path)
    with learn.no_logging(): learn.fit_one_cycle(1, 5e-3)
    return learn
