"""Right for every input: what a sample does not show is asked, run or said.

Each situation is a small model, a sample, and inputs unlike it: another size, batch, length, argument or route. Folded with the proof on, the model
must be right for all of them. With the proof off it must be, too, wherever no data decides: a rule that counts on a property of the sample is wrong."""
import copy, enum, math, numpy as np, pickle, pytest, random, torch, torch.nn.functional as F, torchvision
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple
from torch import nn
from torch.nn.utils import prune
from fasterfold.sample import Sample
from fasterfold.state import FoldError
from helpers import *

class Destandardize(nn.Module):
    "The mean and spread that a target had before it was standardized, given back."
    def __init__(self):
        super().__init__()
        self.register_buffer('std', torch.tensor([2.]))
        self.register_buffer('mean', torch.tensor([5.]))
    def forward(self, y): return y*self.std+self.mean

class Attends(nn.Module):
    "Values with a table of positions, and a mean for each of the nodes that ask."
    def __init__(self):
        super().__init__()
        self.q,self.k,self.v,self.norm = *(nn.Linear(4,4) for _ in range(3)),Destandardize()
        self.norm.mean,self.positions = torch.randn(5,1),nn.Parameter(torch.randn(5,4))
    def forward(self, x): return self.norm((self.q(x)@self.k(x).transpose(1,2)).softmax(-1)@(self.v(x)+self.positions)).tanh()

def conv(i=3, o=4, k=3, **kw): return nn.Conv2d(i, o, k, **kw)
def norms(n, c=4): return nn.ModuleList([nn.BatchNorm2d(c) for _ in range(n)])
def image(*shape): return torch.randn(*shape)

def padded(self, x):
    y = self.norm(self.conv(x).relu())
    h,w = y.shape[-2:]
    return self.last(F.pad(y, (0,-w%32,0,-h%32)))

def padded_1d(self, x):
    y = self.norm(self.conv(x).relu())
    return self.last(F.pad(y, (0,-y.shape[-1]%8)))

def guarded(self, x):
    "Pads only where there is something to pad."
    y = self.norm(self.conv(x).relu())
    if y.shape[-1]%8: y = F.pad(y, (0,-y.shape[-1]%8))
    return self.last(y)

def skip(self, x):
    a = self.conv(x).relu()
    b = self.norm(self.up(F.max_pool2d(a, 2)).relu())
    b = F.pad(b, (0,a.shape[3]-b.shape[3],0,a.shape[2]-b.shape[2]))
    return self.last(torch.cat([a,b], 1))

def masked(self, x, mask):
    y = self.conv(x)
    if mask.any(): y = y.masked_fill(mask[:,None], 0.)
    return self.norm(y)

def routed(self, x):
    y = self.norm(self.conv(x))
    return self.experts[int(self.gate(x.mean((2,3))).sum(0).argmax())](y)

def early(self, x):
    y = self.norm(self.conv(x)).relu()
    e = self.head(self.norm2(y.mean((2,3))))
    return e if e.softmax(1).max()>.9 else self.head2(self.norm3(self.conv2(y)).mean((2,3)))

def related(self, x, near, far):
    x,y = self.norm(x),torch.zeros_like(x)
    for edges,layer in ((near,self.near),(far,self.far)):
        if edges.shape[1]: y = y.index_add(0, edges[1], layer(x)[edges[0]])
    return y

def agreeing(self, x):
    "Compares all sizes at once, the batch first, and takes a width of 3 and no height below that."
    y,z = self.conv(self.width(x)),self.other(F.max_pool2d(x, (3,1)))
    return self.norm(y)+z if y.shape==z.shape else y

def cut(self, x):
    "Of a short one there is less than 10."
    y = self.norm(x)[...,:10]
    return self.last(F.pad(y, (0,4)) if y.shape[-1]<10 else y)

def cut_twice(self, x):
    "A question that comes up only where less than 100 is left."
    y = self.norm(x)[:,:,-100:]
    return self.last(F.pad(y, (0,4)) if y.shape[-1]<50 else y)

def segments(self, x):
    "The first one has nothing before it."
    res = []
    for y in self.norm(x).split(100, 2): res.append(self.conv(F.pad(y, (1,0)) if res else y))
    return torch.cat(res, 2)

class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.emb,self.norm = conv(padding=1),conv(padding=1),nn.BatchNorm2d(4)
    def forward(self, x, cond=None):
        h = self.conv(x)
        return self.norm(h if cond is None else self.emb(cond)+h).relu()

def seen_from(self, views):
    h = self.ways[-1](views[-1])
    for way,x in zip(self.ways, views[:-1]): h = way(x)+h
    return self.norm(h).relu()

def sensed(self, sensors):
    first,*rest = (self.ways[k](x) for k,x in sensors['found'].items())
    for y in rest: first = y+first
    return self.norm(first).relu()

def even(x): return F.pad(x, (0,1)) if x.shape[-1]%2 else x

def channels_last(self, x):
    y = self.norm(self.conv(x.permute(0,3,1,2)).relu())
    return self.last(F.pad(y, (0,0,0,1)) if y.shape[2]%2 else y)

def clips(self, x):
    "In batches of clips of several frames."
    b,t = x.shape[:2]
    y = self.norm(self.conv(x.flatten(0,1)).relu().mean((2,3)).view(b,t,-1).transpose(1,2))
    return self.last(F.pad(y, (0,4-t%4)) if t%4 else y)

def clips_of_eight(self, x):
    y = self.norm(self.conv(x).relu())
    y = y.view(len(x)//8,8,*y.shape[1:])
    return self.last((F.pad(y, (1,1)) if len(y)==1 else y).flatten(0,1))

def square(self, x):
    assert x.shape[2]==x.shape[3]
    return self.last(even(self.norm(self.conv(x).relu())))

def levels(self, x):
    res = []
    for norm,last in zip(self.norms, self.lasts):
        x = F.max_pool2d(even(self.conv(x).relu()), 2)
        res.append(last(even(norm(x))).mean((2,3)))
    return torch.stack(res)

def wide(x): return F.pad(x, (0,1)) if x.shape[-1]>400 else x

def two_levels(self, x): return wide(F.max_pool2d(self.last(wide(self.norm(self.conv(x).relu()))), 2))

def halves(self, a, b):
    "As if both had one length."
    u,v = torch.cat([self.norm(self.first(a).relu()),self.second(b).relu()], 2).chunk(2, 2)
    return self.third(u).mean(2)+self.fourth(v).mean(2)

def twins(self, a, b):
    u,v = (self.norm(self.conv(x).relu()) for x in (a,b))
    if u.shape[3]<v.shape[3]: u = F.pad(u, (0,v.shape[3]-u.shape[3]))
    return self.last(u).mean((2,3))+v.mean((2,3))[:,:2]

def hinted(self, x, hint=None):
    "Pads only what comes with a hint, and only where there is something to pad."
    y = self.norm(self.conv(x).relu())
    if hint is not None and hint is not False and y.shape[3]%8: y = F.pad(y, (0,8-y.shape[3]%8))
    y = self.last(y)
    return y*hint if isinstance(hint, torch.Tensor) else y

def halved_often(self, x):
    "One pixel is left of 32, 39 and 49, two of 64."
    y = self.norm(self.conv(x).relu())
    for _ in range(5): y = F.avg_pool2d(y, 2)
    return self.last(F.avg_pool2d(y, 3, 2, 1) if y.shape[-1]>1 else y).mean((2,3))

def windows(self, x):
    y = F.avg_pool1d(self.norm(self.conv(x).relu()), 16)
    return self.last(F.pad(y, (1,1)) if y.shape[2]>1 else y).mean(2)

def with_alpha(self, x):
    alpha = 1
    if x.shape[1]==4: x,alpha = x[:,:3],x[:,3:]
    return self.last(self.norm(self.conv(x).relu())*alpha)

def fitted(y): return F.pad(y, (0,2)) if y.shape[-1]<12 else y

def compared(self, x, ref=None):
    "One line for two inputs, of which one may be left out."
    def out(x, i): return self.lasts[i](fitted(self.norms[i](self.conv(x).relu()))).mean((2,3))
    return out(x, 0) if ref is None else out(ref, 1)+out(x, 0)

def of_kinds(self, found): return sum(self.lasts[k](fitted(self.norms[k](self.convs[k](x).relu()))).mean((2,3)) for k,x in found.items())

def alone_padded(self, views):
    ys = [self.norm(self.conv(v).relu()) for v in views]
    if len(ys)==1: ys = [F.pad(ys[0], (1,1,1,1))]
    return torch.stack([self.last(y).mean((2,3)) for y in ys]).amax(0)

def with_mask(self, batch):
    x,mask = batch
    y = self.norm(self.conv(x).relu())
    return self.last(F.pad(y, (1,1,1,1))) if mask is None else self.last(y)*mask

class Masked(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor = None

def streamed(self, x, caches):
    "At the first call there is nothing in them."
    for norm,layer,cache in zip(self.norms, self.layers, caches):
        x = norm(x.relu())
        x = layer(F.pad(x, (2,0))) if cache is None else layer(x)+cache
    return x

class Pool(enum.IntEnum): MEAN,FIRST,SECOND,SUM,LAST = range(5)
def pooled(self, x, pool):
    pools = [lambda y: y.mean((2,3)), lambda y: y[:,:,0,0], lambda y: y[:,:,0,1], lambda y: y.sum((2,3)), lambda y: y[:,:,-1,-1]]
    return self.head(pools[pool](self.norm(self.conv(x).relu())))

def far(x): return x.shape[3]>20

def written_unseen(self, x):
    "By NumPy, in the memory of a tensor, which no trace sees."
    y = self.norm(self.conv(x).relu())
    if far(x): np.maximum(y.numpy(), 0, out=y.numpy())
    return self.last(y)

def rounded(y): return torch.zeros(y.shape, dtype=torch.int64).copy_(y*9).to(y.dtype)

class Optional(nn.Module):
    "Two arguments that matter only together."
    def __init__(self, off):
        super().__init__()
        self.conv,self.norm,self.off = conv(),nn.BatchNorm2d(4),off
    def forward(self, x, a=None, b=None): return self.conv(x) if self.off(a, b) else self.norm(self.conv(x))

class Encoder(nn.Module):
    "Leaves out what is padded where PyTorch may take its faster way."
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.norm = nn.BatchNorm1d(8)
    def forward(self, x, mask): return self.norm(self.encoder(x, src_key_padding_mask=mask).transpose(1,2)).tanh()

class Ways(nn.Module):
    "One way has norm 0, the other one norm 1, or both have one norm, and then a layer each; statistics of the batch hide from a batch of one what came before."
    def __init__(self, n, k):
        super().__init__()
        self.first,self.norms,self.layers = nn.Sequential(nn.Conv1d(3,3,1), nn.BatchNorm1d(3)),norms_1d(n),nn.ModuleList([nn.Conv1d(3,3,1) for _ in range(k)])
        self.last = nn.BatchNorm1d(3, track_running_stats=False)
    def forward(self, x, way=0):
        x = self.norms[way%len(self.norms)](self.first(x).relu())
        return self.last(self.layers[way%len(self.layers)](x)).mean(2)
def norms_1d(n): return nn.ModuleList([nn.BatchNorm1d(3) for _ in range(n)])

def larger(n, k): return n>k
def fits(x, k=100): return x.shape[2]<=k

def two_thresholds(self, x):
    y,h = self.conv(x),x.shape[2]
    if h%2==0: return self.norm(y) if larger(h, 40) else y
    return y if larger(h, 4000) else self.norm(y)

def nearer_thresholds(self, x):
    y,h = self.conv(x),x.shape[2]
    if h>50: return self.norm(y) if larger(h, 55) else y
    return y if larger(h, 100) else self.norm(y)

def two_tensors(self, x):
    y = self.conv(x)
    if x.shape[3]%2==0: return self.norm(y) if fits(x) else y
    return self.norm(y) if fits(F.max_pool2d(x, 8)) else self.norm(y).relu()

asked_in_one_place = dict(two_thresholds=two_thresholds, nearer_thresholds=nearer_thresholds, two_tensors_in_one_place=two_tensors)

# Numbers made of a size that are compared with nothing, and choose channels, or what is done
def again(f, y, n):
    for _ in range(n): y = f(y)
    return y
channels_by_size = dict(narrow=lambda y,n: y.repeat(1,3,1,1).narrow(1, n, 8), slice=lambda y,n: y.repeat(1,3,1,1)[:,n:n+8], roll=lambda y,n: y.roll(n, 1),
    flip=lambda y,n: y.flip(2-n%2), channel_shuffle=lambda y,n: F.channel_shuffle(y, 2**n),
    view=lambda y,n: y.view(len(y),1+n%2,-1,*y.shape[2:]).transpose(1,2).reshape(y.shape))
few_of_many = dict(step=lambda y,n: y[:,::n+1], start=lambda y,n: y[:,n:], shuffle=lambda y,n: F.pixel_shuffle(y, n+1))
by_number = dict(rounds=lambda y,h: again(torch.relu, y, h//100), copies=lambda y,h: nn.Sequential(*[nn.ReLU()]*(h//100))(y),
    entry=lambda y,h: [y,y.relu(),-y][h//100], root=lambda y,h: y.relu() if math.sqrt(h//100)>.5 else y,
    nearest=lambda y,h: [y,y.relu(),-y][min(round(h/100), 2)], bits=lambda y,h: [y,y.relu(),-y][(h>>6)%3])

def either(by): return Fn(lambda s,x: s.norm(s.conv(x)) if by(x) else s.conv(x), conv=conv(padding=1), norm=nn.BatchNorm2d(4))
def edges(n): return torch.randint(5, (2,n))
def loud(x): return [x*k+b for k in (.1,1.,30.) for b in (-3.,0.,3.)]

def situations():
    "Name to (model, sample, other inputs)."
    lin,bn1,bn2 = nn.Linear,nn.BatchNorm1d,nn.BatchNorm2d
    x,y = image(2,3,16,16),image(2,3,8,8)
    res = {}
    def add(name, model, x, *others): res[name] = model,x,others
    add('set_of_another_size', Fn(lambda s,x: s.norm(s.phi(x).sum(1)), phi=lin(4,6), norm=bn1(6)), image(3,10,4), image(3,25,4))
    add('sum_over_pixels', Fn(lambda s,x: s.head(s.norm(x).sum((2,3))), norm=bn2(4), head=lin(4,3)), image(2,4,32,32), image(2,4,48,40))
    add('energy_of_more_atoms', Fn(lambda s,x: s.norm(s.phi(x).sum(1)), phi=lin(4,1), norm=Destandardize()), image(3,9,4), image(3,21,4))
    add('vector_of_ones_before', Fn(lambda s,x: s.norm(s.phi(x).transpose(1, 2)@x.new_ones(x.shape[0],x.shape[1],1)), phi=lin(4,6), norm=bn1(6)),
        image(3,9,4), image(3,21,4))
    add('vector_of_ones_after', Fn(lambda s,x: s.head((s.norm(x)@torch.ones(x.shape[2],1, dtype=x.dtype))[...,0]), norm=bn1(4), head=lin(4,3)),
        image(3,4,9), image(3,4,21))
    add('divisor_of_a_mean', Fn(lambda s,x: s.head(F.avg_pool2d(s.norm(x), x.shape[2:], divisor_override=256)[:,:,0,0]), norm=bn2(4), head=lin(4,3)),
        image(2,4,16,16), image(2,4,21,23))
    add('divisor_that_fits', Fn(lambda s,x: s.conv(F.avg_pool2d(s.norm(x), 2, divisor_override=4)), norm=bn2(4), conv=conv(4,3,1)),
        image(2,4,16,16), image(2,4,21,23))
    add('pad_to_a_multiple', Fn(padded, conv=conv(padding=1), norm=bn2(4), last=conv(4,2)), image(2,3,64,64), image(2,3,65,64), image(1,3,79,97))
    add('pad_to_a_multiple_1d', Fn(padded_1d, conv=nn.Conv1d(3,4,3,padding=1), norm=bn1(4), last=nn.Conv1d(4,2,3)), image(2,3,64), image(2,3,65), image(2,3,71))
    add('pad_if_needed', Fn(guarded, conv=conv(padding=1), norm=bn2(4), last=conv(4,2)), image(2,3,64,64), image(2,3,64,65))
    add('pad_to_the_skip', Fn(skip, conv=conv(padding=1), up=nn.ConvTranspose2d(4,4,2,2), norm=bn2(4), last=conv(8,2)),
        image(2,3,64,64), image(2,3,65,64), image(2,3,33,31))
    add('gain_as_argument', Fn(lambda s,x,gain: s.norm(s.conv(x)*gain), conv=conv(), norm=bn2(4)), (x,.5), (x,2.))
    add('gain_for_each_domain', Fn(lambda s,x,i: s.norm(s.conv(x)*s.gain[i]), conv=conv(), norm=bn2(4), gain=nn.Parameter(torch.tensor([.5,2.,3.]))),
        (x,0), (x,1), (x,2))
    add('gain_as_length', Fn(lambda s,x: s.norm(s.conv(x)/x.shape[-1]), conv=conv(padding=1), norm=bn2(4)), x, image(2,3,5,7))
    add('domain', Fn(lambda s,x,i: s.norms[i](s.conv(x)), conv=conv(), norms=norms(3)), (x,0), (x,1), (x,2))
    add('domain_of_two_lists', Fn(lambda s,x,i: s.norms[i%2](s.convs[i%3](x)), convs=nn.ModuleList(conv() for _ in range(3)), norms=norms(2)), (x,0), (x,1), (x,2))
    add('domain_with_a_norm_that_has_no_weights', Fn(lambda s,x,i: s.norms[i](s.conv(x)), conv=conv(), norms=nn.ModuleList([bn2(4),nn.InstanceNorm2d(4)])), (x,0), (x,1))
    add('domain_by_keyword', Fn(lambda s,x,domain=0: s.norms[domain](s.conv(x)), conv=conv(), norms=norms(2)), dict(x=x), dict(x=x, domain=1))
    add('domain_as_tensor', Fn(lambda s,x,i: s.norms[i.item()](s.conv(x)), conv=conv(), norms=norms(2)), (x,torch.tensor(0)), (x,torch.tensor(1)))
    add('truth_as_argument', Fn(lambda s,x,on: s.norm(s.conv(x) if on else s.conv(x).relu()), conv=conv(), norm=bn2(4)), (x,True), (x,False))
    add('relation_without_edges', Fn(related, norm=bn1(4), near=lin(4,4), far=lin(4,4)),
        (image(5,4),edges(6),edges(0)), (image(5,4),edges(6),edges(4)), (image(5,4),edges(0),edges(4)))
    add('nothing_masked', Fn(masked, conv=conv(padding=1), norm=bn2(4)), (y,torch.zeros(2,8,8)>0), (y,torch.rand(2,8,8)>.5))
    add('top_1_router', Fn(routed, conv=conv(padding=1), norm=bn2(4), gate=lin(3,4), experts=nn.ModuleList([conv(4,2,1) for _ in range(4)])), y, *loud(y))
    add('early_exit', Fn(early, conv=conv(padding=1), norm=bn2(4), norm2=bn1(4), head=lin(4,3), conv2=conv(4,4), norm3=bn2(4), head2=lin(4,3)),
        y[:1]*.1, *loud(y[:1]))
    z = image(3,3,7)
    for name,n,k in (('way_with_its_own_norm',2,1),('way_with_its_own_layer',1,2),('way_with_both',2,2)): add(name, Ways(n, k), z, (z,1), dict(x=z, way=1))
    add('short_batch', Fn(lambda s,x: s.conv(x) if len(x)>4 else s.norm(s.conv(x)), conv=conv(padding=1), norm=bn2(4)), y, image(6,3,8,8))
    add('odd_width', Fn(lambda s,x: s.norm(s.conv(x)) if x.shape[3]%2==0 else s.conv(x), conv=conv(padding=1), norm=bn2(4)), y, image(2,3,8,9))
    add('wide', Fn(lambda s,x: s.norm(s.conv(x)) if x.shape[3]<=300 else s.conv(x), conv=conv(padding=1), norm=bn2(4)),
        image(2,3,64,64), image(1,3,64,301))
    def decided(name, by, *others): add(name, either(by), image(2,3,64,64), *others)
    for name,by,v,*others in (('large_integer', lambda i: i<50, 3, 50, -3), ('negative_integer', lambda i: i>=0, 3, -1, 0), ('large_float', lambda g: g<50, .5, 50., 51.),
        ('negative_float', lambda g: g>0, .5, -1., 2.), ('fifth_of_many', lambda i: i%7!=5, 0, 5, 12)):
        add(name, Fn(lambda s,x,v,by=by: s.conv(s.norm(x) if by(v) else F.pad(s.norm(x), (1,0))), norm=bn2(3), conv=conv()), (x,v), *((x,o) for o in others))
    decided('larger_side', lambda x: max(x.shape[2:])<=300, image(1,3,64,301), image(1,3,301,64))
    decided('sizes_together', lambda x: x.shape[2:]!=(64,301), image(2,3,64,301), image(1,3,65,301))
    decided('area', lambda x: x.shape[2]*x.shape[3]!=64*71, image(2,3,64,71), image(2,3,71,64))
    decided('twice_as_high', lambda x: x.shape[2]!=2*x.shape[3], image(2,3,64,32), image(2,3,128,64))
    decided('two_remainders', lambda x: x.shape[3]%7!=3 or x.shape[2]%5!=2, image(2,3,67,66), image(2,3,42,45))
    def halved(x):
        n = x.shape[3]
        while n>8: n //= 2
        return n!=5
    decided('halved_in_a_loop', halved, image(2,3,64,5), image(2,3,64,160))
    decided('bits_of_a_size', lambda x: x.shape[3]&256==0 and 300|x.shape[2]<1000 and x.shape[2]>>8==0, image(2,3,64,256), image(2,3,256,64))
    decided('division_by_a_size', lambda x: divmod(300, x.shape[3])[0]>0, image(2,3,64,301))
    add('shapes_that_agree', Fn(agreeing, width=lin(3,3), conv=conv(k=(3,1)), other=conv(k=1), norm=bn2(4)), image(2,3,3,3), image(2,3,5,3), image(1,3,3,3))
    for name,f in (('cut_at_a_number',cut),('cut_at_a_larger_number',cut_twice)):
        add(name, Fn(f, norm=bn1(3), last=nn.Conv1d(3,2,3)), *(image(2,3,n) for n in (224,7,9,10,11,49,50,99,300)))
    add('pieces_of_a_length', Fn(segments, norm=bn1(3), conv=nn.Conv1d(3,2,3)), image(2,3,30), image(2,3,130), image(2,3,100), image(2,3,230))
    add('two_questions_in_one_line', Fn(lambda s,x: s.norm(s.conv(x)) if len(x.shape)==4 and x.shape[0]<10**6 and x.shape[3]<=300 else s.conv(x), conv=conv(padding=1), norm=bn2(4)),
        image(2,3,64,64), image(1,3,64,301))
    add('condition_left_out', Conditioned(), (x,-x), x, (x,None))
    add('condition_left_out_by_name', Conditioned(), dict(x=x, cond=-x), dict(x=x), dict(x=x, cond=None))
    def seen(): return dict(ways=nn.ModuleList([conv() for _ in range(3)]), norm=bn2(4))
    add('one_view_less', Fn(seen_from, **seen()), ([x,-x,2*x],), ([x,-x],), ([x],))
    add('one_view_less_in_a_tuple', Fn(seen_from, **seen()), ((x,-x,2*x),), ((x,-x),), ((x,),))
    add('one_sensor_less', Fn(sensed, ways=nn.ModuleDict(dict(left=conv(), right=conv())), norm=bn2(4)), (dict(found=dict(left=x, right=-x)),),
        (dict(found=dict(left=x)),), (dict(found=dict(right=x)),))
    add('one_argument_less', Fn(lambda s,*xs: seen_from(s, xs), **seen()), (x,-x,2*x), (x,-x), (x,))
    add('sign_of_the_mean', Fn(lambda s,x: s.norm(s.conv(x)) if x.mean()>0 else s.conv(x), conv=conv(padding=1), norm=bn2(4)), y.abs(), -y.abs())
    add('domain_of_a_whole_batch', Fn(lambda s,x,i: s.norm(s.conv(x) if i[0]==0 else s.conv(x).relu()), conv=conv(), norm=bn2(4)),
        (x,torch.tensor([0,0])), (x,torch.tensor([1,1])))
    def last(o=2, **kw): return dict(conv=conv(padding=1), norm=bn2(4), last=conv(4,o), **kw)
    add('channels_last', Fn(channels_last, **last()), image(2,64,64,3), image(2,65,64,3), image(1,77,64,3))
    add('frames_of_a_clip', Fn(clips, conv=conv(padding=1), norm=bn1(4), last=nn.Conv1d(4,2,2)), image(2,4,3,8,8), image(2,9,3,8,8), image(1,3,3,8,8))
    add('clips_of_eight_frames', Fn(clips_of_eight, **last()), image(16,3,8,8), image(8,3,8,8), image(32,3,8,8))
    add('square_images_only', Fn(square, **last()), image(2,3,32,32), image(2,3,33,33), image(1,3,65,65))
    add('one_function_at_every_level', Fn(levels, conv=conv(3,3,padding=1), norms=norms(3, 3), lasts=nn.ModuleList([conv(3,2,1) for _ in range(3)])),
        image(2,3,32,32), image(2,3,36,36), image(2,3,44,52), image(2,3,40,36))
    add('one_function_at_two_sizes', Fn(two_levels, **last()), image(1,3,64,64), image(1,3,8,411), image(2,3,8,900))
    add('padding_from_a_size', Fn(lambda s,x: s.last(F.conv2d(s.norm(s.conv(x).relu()), s.last.weight.new_ones(4,4,3,3), padding=x.shape[2]//128)), **last()),
        y, image(2,3,64,64), image(1,3,130,130))
    add('window_from_a_size', Fn(lambda s,x: s.last(F.avg_pool2d(s.norm(s.conv(x).relu()), k := x.shape[2]//32+1, 1, k//2)), **last()), y, image(2,3,64,64), image(1,3,32,32))
    def layers(n): return [nn.Conv1d(3,3,1) for _ in range(n)]
    add('one_input_longer', Fn(halves, norm=bn1(3), **dict(zip(('first','second','third','fourth'), layers(4)))), (image(2,3,6),image(2,3,6)), (image(2,3,8),image(2,3,4)))
    add('one_twin_larger', Fn(twins, **last()), (x,x), (y,x), (x,y))
    add('two_conditions_left_out', Optional(lambda a,b: a is None and b is None), (x,-x,2*x), x, (x,None,x))
    add('two_flags_on', Optional(lambda a,b: bool(a) and bool(b)), (x,False,False), (x,True,True), (x,False,True))
    add('view_of_what_a_norm_made', Fn(lambda s,x: s.norm(s.layer(x.transpose(1,2)).transpose(1,2)).view(len(x),-1), layer=lin(3,4), norm=bn1(4)), image(2,3,1), image(2,3,5))
    add('written_to_after_a_norm', Fn(lambda s,x: s.norm((c := s.conv(x)).mean((2,3), keepdim=True).expand_as(c)).add_(1), conv=conv(), norm=bn2(4)), image(2,3,3,3), y)
    add('pads_if_asked', Fn(hinted, **last()), (x,False), (x,True), (image(2,3,16,17),True), (image(2,3,16,17),False))
    add('halved_often', Fn(halved_often, conv=conv(padding=1), norm=bn2(4), last=conv(4,2,1)), image(2,3,32,32), image(2,3,64,64), image(1,3,64,70))
    add('windows_of_a_length', Fn(windows, conv=nn.Conv1d(3,4,1), norm=bn1(4), last=nn.Conv1d(4,2,1)), image(2,3,20), image(2,3,32), image(1,3,99))
    add('fourth_channel', Fn(with_alpha, **last()), x, image(2,4,16,16))
    add('reference_as_small', Fn(compared, conv=conv(), norms=norms(2), lasts=nn.ModuleList([conv(4,2), conv(4,2)])),
        (image(2,3,7,7),image(2,3,24,24)), (image(2,3,7,7),image(2,3,9,9)), image(2,3,24,24))
    def by_kind(f): return nn.ModuleDict(dict(rgb=f(3), depth=f(1)))
    add('entry_as_small', Fn(of_kinds, convs=by_kind(conv), norms=by_kind(lambda i: bn2(4)), lasts=by_kind(lambda i: conv(4,2))),
        (dict(rgb=image(2,3,24,24), depth=image(2,1,7,7)),), (dict(rgb=image(2,3,9,9), depth=image(2,1,7,7)),))
    views = [image(2,3,8,8) for _ in range(4)]
    add('one_view_of_four', Fn(alone_padded, **last()), (views,), (views[:1],), (views[:2],))
    add('none_in_a_tuple', Fn(with_mask, **last()), ((y,y[:,:1,1:-1,1:-1]),), ((y,None),))
    add('none_in_a_named_tuple', Fn(with_mask, **last()), (Masked(y,y[:,:1,1:-1,1:-1]),), (Masked(y),))
    add('caches_at_the_first_call', Fn(streamed, norms=norms_1d(2), layers=nn.ModuleList([nn.Conv1d(3,3,3) for _ in range(2)])),
        (image(2,3,16),[image(2,3,1),image(2,3,1)]), (image(2,3,16),[None,None]))
    add('enumeration', Fn(pooled, conv=conv(), norm=bn2(4), head=lin(4,2)), (y,Pool.MEAN), *((y,p) for p in Pool))
    add('mean_for_each_query', Attends(), image(2,5,4), image(3,5,4))
    add('written_to_unseen', Fn(written_unseen, **last()), image(2,3,12,12), image(2,3,30,30))
    add('rounded_by_a_copy', Fn(lambda s,x: s.conv(rounded(s.norm(x))), conv=conv(), norm=bn2(3)), y, image(1,3,9,9))
    add('rounded_where_it_is_large', Fn(lambda s,x: s.conv(rounded(s.norm(x)) if far(x) else s.norm(x)), conv=conv(), norm=bn2(3)), y, image(1,3,30,30))
    gain = Destandardize()
    gain.mean.zero_()
    add('sum_in_integers', Fn(lambda s,x: s.head(s.norm(x*9).sum((2,3), dtype=torch.int64).to(x.dtype)), head=lin(3,2), norm=gain), y, image(1,3,9,9))
    wide = image(2,3,32,32),image(2,3,120,32),image(1,3,250,40)
    for k,f in asked_in_one_place.items(): add(k, Fn(f, **last()), image(2,3,64,64), image(2,3,32,32), image(2,3,53,64), image(2,3,140,64))
    for k,f in channels_by_size.items(): add(k, Fn(lambda s,x,f=f: s.norm(f(s.conv(x), x.shape[2]//100)).relu(), conv=conv(3,8), norm=bn2(8)), *wide)
    for k,f in few_of_many.items(): add(k, Fn(lambda s,x,f=f: s.norm(f(s.conv(x), x.shape[2]//100)[:,:2]).relu(), conv=conv(3,36), norm=bn2(2)), *wide)
    add('gate_of_tokens', Fn(lambda s,x: s.last(torch.mul(*s.norm(s.layer(x.flatten(2).transpose(1,2)).transpose(1,2)).transpose(1,2).split(x.shape[1], 2))),
        layer=lin(6,12), norm=bn1(12), last=lin(6,2)), image(2,6,5,5), image(1,6,7,9))
    for k,f in by_number.items(): add(k, Fn(lambda s,x,f=f: s.norm(f(s.conv(x), x.shape[2])), **last()), *wide)
    words,none = image(3,6,8),torch.zeros(3,6)>0
    some = torch.arange(6)>=torch.tensor([[4],[3],[6]])
    add('padding_mask', Encoder(), (words,none), (words,some))
    add('padding_mask_that_masks', Encoder(), (words,some), (words,none))
    add('table_cut_at_a_size', Fn(lambda s,x: s.norm(s.layer(x).mean(1)/s.ones[:x.shape[1]].sum()).relu(), layer=lin(4,4), norm=bn1(4), ones=nn.Parameter(torch.ones(100))),
        image(2,6,4), image(2,9,4), image(2,3,4))
    add('loudness', Fn(lambda s,x: s.norm(s.conv(x)) if x.std()<2.5 else s.conv(x), conv=conv(padding=1), norm=bn2(4)), y, y*4)
    return res

by_data = {*asked_in_one_place,*by_number,'view',
    'nothing_masked','short_batch','odd_width','wide','sign_of_the_mean','loudness','truth_as_argument','pad_if_needed','shapes_that_agree','two_questions_in_one_line',
    'area','twice_as_high','two_remainders','halved_in_a_loop','large_integer','negative_integer','large_float','negative_float','fifth_of_many',
    'cut_at_a_number','larger_side','sizes_together','bits_of_a_size','division_by_a_size','cut_at_a_larger_number','pieces_of_a_length',
    'channels_last','frames_of_a_clip','clips_of_eight_frames','square_images_only','one_function_at_every_level','one_function_at_two_sizes','padding_from_a_size','window_from_a_size',
    'one_input_longer','one_twin_larger','two_conditions_left_out','two_flags_on','view_of_what_a_norm_made','written_to_after_a_norm','pads_if_asked',
    'one_view_of_four','none_in_a_tuple','none_in_a_named_tuple','caches_at_the_first_call','enumeration','written_to_unseen','rounded_where_it_is_large','halved_often','windows_of_a_length','fourth_channel','reference_as_small','entry_as_small',
    'condition_left_out','condition_left_out_by_name','one_view_less','one_view_less_in_a_tuple','one_sensor_less','one_argument_less','domain_of_a_whole_batch'} # what only a run can show

def right(model, folded, inputs):
    for x in inputs: check_outputs(model, folded, x)

def check_outputs(model, folded, x):
    "Assert that `folded` is as close to a float64 run of `model` as `model` itself."
    ref = run(to_double(model), Sample.of(x).to(torch.float64))
    own,off = distance(run(model, x), ref),distance(run(folded, x), ref)
    assert off<=10*own+10*eps_of(model), f"{off:.1e} off for {Sample.of(x)}, the original {own:.1e}"

@pytest.mark.parametrize('name', situations())
def test_right_for_inputs_unlike_the_sample(name):
    model,x,others = situations()[name]
    model = randomize_norms(model)
    right(model, BN_Folder().fold(model, x), [x,*others])

@pytest.mark.parametrize('name', sorted(situations().keys()-by_data))
def test_right_without_the_proof(name):
    model,x,others = situations()[name]
    model = randomize_norms(model)
    right(model, BN_Folder(verify=False).fold(model, x), [x,*others])

def covers(model, sample, **kw):
    "What folding says of the inputs that it tried."
    folder = BN_Folder()
    folder.fold(randomize_norms(model), sample, **kw)
    return ' '.join(folder.result.covers)

def simple(): return nn.Sequential(conv(padding=1), nn.BatchNorm2d(4))

def test_what_was_covered_is_said():
    text = covers(simple(), image(2,3,64,64))
    assert text=='Proved on inputs of (2,3,64,64) and (1,3,79,97). It reads no data.'
    def f(s, x): return s.last(s.norm(s.conv(F.pad(x, (0,1)) if x.shape[3]%2 else x)))
    text = covers(Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4), last=conv(4,2)), image(2,3,64,64))
    assert 'at 1 place (`(shape[3] % 2) != 0`, test_inputs.py:' in text and 'both answers were run' in text

def test_what_was_not_covered_is_said():
    def far(s, x): return s.norm(s.conv(x)) if x.shape[3]<=10**5 else s.conv(x)
    text = covers(Fn(far, conv=conv(padding=1), norm=nn.BatchNorm2d(4)), image(2,3,64,64))
    assert 'no single size up to 512 turns `shape[3] <= 100000`, test_inputs.py:' in text
    class Masks(nn.Sequential):
        def forward(self, x, mask=None): return super().forward(x if mask is None else x*mask)
    assert 'Not covered: the model with `mask`, which no sample has.' in covers(Masks(conv(), nn.BatchNorm2d(4)), image(2,3,64,64))
    text = covers(Masks(conv(), nn.BatchNorm2d(4)), (image(2,3,64,64),image(2,1,64,64)))
    assert 'Not covered' not in text and 'with mask=None' in text
    class Open(nn.Sequential):
        def forward(self, x, **options): return super().forward(x)
    assert 'Not covered: the model with other `options`, which no sample has.' in covers(Open(conv(), nn.BatchNorm2d(4)), image(2,3,64,64))

get_away = dict(int=lambda n: int(n)<=300, float=lambda n: float(n)<=300, hash=lambda n: n not in {301,302}, bit_length=lambda n: n.bit_length()<9,
    numpy=lambda n: np.array([n]).max()<=300)

@pytest.mark.parametrize('how,by', get_away.items())
def test_sizes_that_get_away_are_said(how, by):
    text = covers(either(lambda x: by(x.shape[3])), image(2,3,64,64))
    assert f"Not followed: sizes that become plain numbers (`{how.replace('numpy','int')}(shape[3])`, test_inputs.py:" in text

@pytest.mark.parametrize('value,other', [('mean','sum'), (None,1), ([],[1]), (torch.float32,torch.float64), (dict(how='mean'),dict(how='sum')), (F.relu,F.gelu)])
def test_arguments_that_are_no_numbers_are_said(value, other):
    class Takes(nn.Sequential):
        def forward(self, x, how): return super().forward(x)
    said = 'Not covered: other values of `how`, which no sample has.'
    model,x = Takes(conv(), nn.BatchNorm2d(4)),image(2,3,8,8)
    assert said in covers(model, (x,value)) and said not in covers(model, None, samples=[(x,value),(x,other)])
    for v in (.5,True,x,[x,.2],(.1,False)): assert said not in covers(model, (x,v))

def test_integers_that_choose_are_said():
    "Code that compares them tells where it turns; an entry of a list does not."
    def picks(s, x, way): return [s.norm,s.norm,s.norm,torch.neg,s.norm][way](s.conv(x))
    said = 'Not covered: other values of `argument 2`, which no sample has.'
    assert said in covers(Fn(picks, conv=conv(), norm=nn.BatchNorm2d(4)), (image(2,3,8,8),0))
    def compares(s, x, way): return s.norm(s.conv(x)) if way<5 else s.norm(s.conv(-x))
    assert said not in covers(Fn(compares, conv=conv(), norm=nn.BatchNorm2d(4)), (image(2,3,8,8),0))

class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.norm,self.head = conv(),nn.BatchNorm2d(4),nn.Linear(4,2)
    def forward(self, x, n=1, pool=0): return sum(pooled(self, v.flip(3) if n>3 else v, pool) for v in ([x] if isinstance(x, torch.Tensor) else x))

@pytest.mark.parametrize('sample', [lambda x: (x,), lambda x: (x,2), lambda x: dict(x=x, pool=0, n=2), lambda x: ([x,x,x],2,0)],
    ids=['left_out','one_left_out','by_keyword','behind_a_list'])
def test_an_integer_that_chooses_is_said_wherever_it_is(sample):
    assert 'Not covered: other values of `pool`, which no sample has.' in covers(Chooses(), sample(image(2,3,8,8)))

def test_numbers_of_pieces_are_said():
    def frames(s, x): return torch.stack([s.norm(s.conv(f)) for f in x.unbind(1)])
    def looped(s, x): return torch.stack([s.norm(s.conv(f[None])) for f in x])
    def pieces(s, x): return torch.stack([s.norm(s.conv(p)).mean((2,3)) for p in x.split(16, 3)])
    def channels(s, x): return torch.cat(s.norm(s.conv(x)).split(2, 1))
    parts = dict(conv=conv(padding=1), norm=nn.BatchNorm2d(4))
    for f,x,name in ((frames,image(2,8,3,8,8),'unbind'),(looped,image(2,3,8,8),'unbind'),(pieces,image(2,3,8,24),'split')):
        assert f'Not followed: sizes that become plain numbers (`{name}`, test_inputs.py:' in covers(Fn(f, **parts), x)
    assert 'Not followed' not in covers(Fn(channels, **parts), image(2,3,8,8))

@pytest.mark.parametrize('given', [lambda x: SimpleNamespace(x=x), lambda x: x.numpy()])
def test_what_is_passed_as_it_is_is_said(given):
    def take(o): return torch.from_numpy(o) if isinstance(o, np.ndarray) else o.x
    text = covers(Fn(lambda s,o: s.norm(s.conv(take(o))), conv=conv(), norm=nn.BatchNorm2d(4)), (given(image(2,3,8,8)),))
    assert f'Not covered: other sizes and numbers in `{type(given(image(1))).__name__}`, which is tried as it is.' in text and 'reads no data' not in text

def test_sizes_that_nothing_changes_are_said():
    def far(s, x):
        y = s.conv(x.view(x.shape[0], -1, 160).transpose(1,2))
        return s.norm(y) if x.shape[1]<=32000 else y
    text = covers(Fn(far, conv=nn.Conv1d(160,4,1), norm=nn.BatchNorm1d(4)), image(2,1600))
    assert 'on inputs of (2,1600) and (1,800).' in text and '`shape[1] <= 32000`' in text
    def frames(s, x, f):
        y = s.norm(s.conv(x))
        return y+f if f.shape[2]<=16 else y+2*f
    text = covers(Fn(frames, conv=nn.Conv1d(1,4,160,160), norm=nn.BatchNorm1d(4)), (image(2,1,1600),image(2,4,10)))
    assert 'Not covered: `shape[2] <= 16`, test_inputs.py:' in text and 'which went one way only' in text

def test_sizes_that_are_asked_only_with_another_argument():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm,self.last = conv(),nn.BatchNorm2d(4),conv(4,2)
        def forward(self, x, wide=False):
            y = self.norm(self.conv(x).relu())
            return self.last(F.pad(y, (1,1)) if wide and y.shape[3]>400 else y)
    assert ' with wide=True, where `constant_pad_nd` ' in reason(BN_Folder().plan(randomize_norms(Wide()), image(2,3,16,16)), 'norm')

def test_attributes_of_tensors_are_given():
    def f(s, x): return s.norm(s.conv(x)) if hasattr(x, 'lengths') else s.norm(s.conv(x).relu())
    x = image(2,3,8,8)
    x.lengths = [3]
    model = randomize_norms(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4)))
    with torch.no_grad(): assert distance([BN_Folder().fold(model, x)(x)], [model(x)])<1e-5

def counting(self, x):
    self.count = getattr(self, 'count', 0)+1
    y = self.conv(x)
    return self.norm(y) if self.count%2 else y

def following(self, x):
    "The first frame has none before it."
    y = self.conv(x) if getattr(self, 'before', None) is None else self.conv(x)+self.before
    self.before = x.mean().expand_as(y)
    return self.norm(y)

def joining(self, x):
    "What came before lies beside it, as high as the sample is."
    y = self.norm(self.conv(x).relu())
    y = torch.cat([getattr(self, 'kept', None) if hasattr(self, 'kept') else y[...,:0],y], 3)
    self.kept = torch.zeros(len(x),4,8,1, dtype=x.dtype)
    return self.last(y)

def fading(self, x):
    y = self.norm(self.conv(x)*self.gain.view(1,-1,1,1))
    self.gain.mul_(.5)
    return y

def measuring(self, x):
    y = self.norm(self.conv(x)*self.gain.view(1,-1,1,1))
    self.gain = x.mean((0,2,3)).sum().expand(4)
    return y

@pytest.mark.parametrize('f', [counting,following,joining,fading,measuring])
def test_calls_in_a_row(f):
    "A model that keeps something from one call to the next may do something else then."
    model = Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4), last=conv(4,2,1))
    model.register_buffer('gain', torch.ones(4))
    model,x = randomize_norms(model),image(2,3,8,8)
    model.gain.fill_(1)
    for verify in (True,*(False,)*(f in (fading,measuring))):
        new,old = BN_Folder(verify=verify).fold(model, x),copy.deepcopy(model)
        with torch.no_grad():
            for a in (x,-x,2*x): assert distance([new(a)], [old(a)])<1e-5

class Layer: last = None
class Cache:
    "An object with a list of objects."
    def __init__(self): self.layers = [Layer()]

CACHES = dict(object=(Cache, lambda c: c.layers[0]), dict=(lambda: dict(encoder=Cache()), lambda c: c['encoder'].layers[0]), tuple=(lambda: (Layer(),), lambda c: c[0]))

@pytest.mark.parametrize('held,layer', CACHES.values(), ids=CACHES)
@pytest.mark.parametrize('inplace', [False,True])
def test_calls_in_a_row_with_a_cache(held, layer, inplace):
    "What it holds is put back wherever it is, and a second call is run."
    def f(s, x):
        y,l = s.norm(s.conv(x).relu()),layer(s.cache)
        if l.last is not None: y = y*l.last
        l.last = x.abs().mean()
        return s.last(y)
    model,x = randomize_norms(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4), last=conv(4,2,1))),image(2,3,8,8)
    model.cache = held()
    old = copy.deepcopy(model)
    new = BN_Folder().fold(model, x, inplace=inplace)
    assert layer(model.cache).last is None and layer(new.cache).last is None
    with torch.no_grad():
        for a in (x,-x,2*x): assert distance([new(a)], [old(a)])<1e-5

def test_calls_in_a_row_are_said():
    def caches(s, x):
        s.seen = x.shape[3]
        return s.norm(s.conv(x))
    text = covers(Fn(caches, conv=conv(), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert 'with a call before it' in text and 'The model keeps `seen` from one call to the next: two calls in a row were run.' in text
    def refuses(s, x):
        assert not hasattr(s, 'done')
        s.done = True
        return s.norm(s.conv(x))
    text = covers(Fn(refuses, conv=conv(), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert 'Not covered: a second call, since the model keeps `done` from one call to the next.' in text
    assert 'call' not in covers(simple(), image(2,3,8,8))

def test_a_norm_that_returns_another_type_stays():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('scale', torch.randn(1,4,1,1))
        def forward(self, x): return x*self.scale+self.scale
    for verify in (True,False):
        folder,model = BN_Folder(verify=verify),nn.Sequential(conv().bfloat16(), Frozen()).eval()
        assert folder.fold(model, image(2,3,8,8).bfloat16())(image(2,3,8,8).bfloat16()).dtype==torch.float32
        assert reason(folder.result, '1')=='it returns float32 for bfloat16'

@torch.library.custom_op('fasterfold_tests::peek', mutates_args=())
def peek(x: torch.Tensor) -> torch.Tensor: return x.flatten()[:1 if x.max()>9 else 2].clone()

deep = dict(one_hot=lambda x: F.one_hot(x.flatten().long().abs()).shape[1]<10**6, cut=lambda x: x.flatten()[:x.numel()*(x.mean()>-9)].shape[0]>0,
    sparse=lambda x: x.relu().to_sparse()._nnz()<10**6, boxes=lambda x: torchvision.ops.nms(x.flatten(1)[:,:4], x[:,0,0,0], .5).shape[0]<10**6,
    peek=lambda x: peek(x).shape[0]<10**6,
    fill=lambda x: torch.arange(x.abs().max()).shape[0]<10**6, repeat=lambda x: x.repeat_interleave((x.flatten()[:2]>0).long(), 0).shape[0]<3)

@pytest.mark.parametrize('by', deep.values(), ids=deep)
def test_data_that_is_read_deep_inside_is_said(by):
    "Where no function of the code says so."
    text = covers(Fn(lambda s,x: s.norm(s.conv(x) if by(x) else s.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert 'The code reads data (' in text and 'test_inputs.py:' in text and 'trace.py' not in text

def test_data_that_is_read_is_said():
    def f(s, x): return s.norm(s.conv(x))*(1 if x.mean().item()<9 else 1)
    text = covers(Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4), last=conv(4,4)), image(2,3,8,8))
    assert text==''  # `last` did not run, so nothing folds
    text = covers(Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert 'The code reads data (`item`, test_inputs.py:' in text and 'with 8 further inputs it took' in text

def test_a_model_that_takes_one_size_only():
    class Fixed(nn.Sequential):
        def forward(self, x): return super().forward(x.view(2,3,8,8))
    text = covers(Fixed(conv(), nn.BatchNorm2d(4)), image(2,3,8,8))
    assert text.startswith('Proved on inputs of (2,3,8,8). It took no input of another size that was tried.')

def test_several_samples():
    "Each shows its own way; what none of them reaches stays dark."
    model,x,others = situations()['domain']
    model,folder = randomize_norms(model),BN_Folder()
    new = folder.fold(model, samples=[x,*others])
    right(model, new, [x,*others])
    assert 'its fold would be wrong on inputs of' in reason(folder.result, 'norms.0')
    torch.manual_seed(0) # so that some of its experts run on no input that is made from the first sample
    router,x,others = situations()['top_1_router']
    router,plans = randomize_norms(router),[]
    for samples in ([x],[x,*others]):
        right(router, folder.fold(router, samples=samples), [x,*others])
        plans.append(folder.result)
    assert [k.norm for k in plans[0].kept]==['norm'] and 'did not run on the sample' in reason(plans[0], 'norm')
    for bad in (dict(samples=[]),dict(sample=x, samples=[x])):
        with pytest.raises(FoldError): folder.fold(router, **bad)

def test_each_sample_is_tried_at_other_sizes():
    "The second one shows what the code asks where there is a hint; neither shows that it depends on the width."
    x,wide,hint = image(2,3,16,16),image(2,3,16,17),image(1,2,1,1)
    model,folder = randomize_norms(Fn(hinted, conv=conv(padding=1), norm=nn.BatchNorm2d(4), last=conv(4,2))),BN_Folder()
    right(model, folder.fold(model, samples=[x,(x,hint)]), [x,wide,(x,hint),(wide,hint)])
    assert 'where `constant_pad_nd` in `the model` runs' in reason(folder.result, 'norm')

class Branches(nn.Module):
    "timm merges its branches by `fuse`; the second one runs on small inputs only."
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b = conv(3,3,padding=1),nn.BatchNorm2d(3),conv(3,3,1)
    def forward(self, x): return self.norm(self.a(x)) if far(x) else self.norm(self.a(x))+self.b(x)
    def fuse(self):
        res = nn.utils.fusion.fuse_conv_bn_eval(self.a.eval(), self.norm.eval())
        with torch.no_grad():
            res.weight[:,:,1:2,1:2] += self.b.weight
            res.bias += self.b.bias
        return res

@pytest.mark.parametrize('verify, given', [(True,1),(True,2),(False,2)])
def test_merged_branches_are_tried_on_all_inputs(verify, given):
    xs = [image(1,3,12,12),image(1,3,30,30)]
    model,folder = randomize_norms(nn.Sequential(Branches(), nn.ReLU(), conv(), nn.BatchNorm2d(4))),BN_Folder(verify=verify, merge_branches=True)
    right(model, folder.fold(model, samples=xs[:given]), xs)
    assert not folder.result.merged and 'Branches are not merged: the model would compute something else.' in folder.result.notes

def test_formats_are_tried_on_all_inputs():
    def f(s, x):
        y = s.last(s.norm(s.conv(x)))
        return y.view(len(x), -1).mean(1) if far(x) else y.mean((1,2,3))
    model,x = randomize_norms(Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4), last=conv(4,4))),image(1,3,12,12)
    right(model, BN_Folder(channels_last=True).fold(model, x), [x,image(1,3,30,30)])

def test_folding_again_with_other_weights():
    "What stayed with the old ones was never proved."
    def f(s, x):
        h = s.conv(x).relu()
        y = s.norm(h)
        return s.last((y+h if far(x) else y).relu())
    model,x = randomize_norms(Fn(f, conv=nn.Sequential(conv(3,3,1), nn.BatchNorm2d(3), conv(3,4,1)), norm=nn.BatchNorm2d(4), last=conv(4,2))),image(1,3,12,12)
    with torch.no_grad():
        for o in (model.norm.bias,model.norm.running_mean): o.zero_()
        model.norm.weight[0] = -1
    folder = BN_Folder()
    folder.fold(model, x, inplace=True)
    folder.undo()
    with torch.no_grad(): model.norm.weight.abs_()
    old = copy.deepcopy(model)
    plan = folder.refold()
    right(old, model, [x,image(1,3,30,30)])
    assert names_of(plan.folded)==['conv.1'] and 'which nobody has proved: call `fold` again' in reason(plan, 'norm')

others_now = dict(cast=lambda m: m.double().float(), assigned=lambda m: m.load_state_dict({k:v.clone() for k,v in m.state_dict().items()}, assign=True),
    eps=lambda m: setattr(m[1], 'eps', .5), norm=lambda m: m._modules.update({'1':nn.BatchNorm2d(4)}),
    pruned=lambda m: prune.l1_unstructured(m[0], 'weight', .5),
    normed=lambda m: nn.utils.parametrizations.weight_norm(m[0]), hooked=lambda m: m[1].register_forward_hook(lambda *a: None), half=lambda m: m[3].half())

@pytest.mark.parametrize('change', others_now.values(), ids=others_now)
def test_a_model_that_has_become_another_one_is_not_folded_again(change):
    "What a trace noted of its buffers, attributes and modules holds no more."
    x,folder = image(2,3,8,8),BN_Folder()
    model = randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4,4))).train()
    folder.fold(model, x, inplace=True)
    folder.undo()
    model(x)
    folder.refold()
    folder.undo()
    change(model)
    before = state(model)
    with pytest.raises(FoldError, match='call `fold` again'): folder.refold()
    assert state(model)==before

@pytest.mark.parametrize('move', [nn.Module.double,nn.Module.half,lambda m: m.to(torch.bfloat16)])
def test_undo_of_a_model_that_was_cast(move):
    model,folder,x = randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4,4))),BN_Folder(),image(2,3,8,8)
    before,ref = state(model),run(model, x)
    folder.fold(model, x, inplace=True)
    move(model)
    folder.undo()
    assert state(model)==before and all(map(torch.equal, run(model, x), ref))

unseen = dict(numpy=lambda y: torch.from_numpy(y.numpy().clip(0)), array=lambda y: torch.from_numpy(np.asarray(y).clip(0)),
    list=lambda y: torch.tensor(y.tolist()).relu(), storage=lambda y: torch.tensor([]).set_(y.untyped_storage(), 0, y.shape).relu())

@pytest.mark.parametrize('verify', [True,False])
@pytest.mark.parametrize('read', unseen.values(), ids=unseen)
def test_what_is_read_unseen_stays(read, verify):
    "Whether the sample shows that, another size, or other numbers."
    for when in (lambda x: True, lambda x: x.shape[3]>20, lambda x: x.max().item()>9):
        def f(s, x):
            y = s.conv(x)
            return s.norm(y).relu()+read(y) if when(x) else s.norm(y).relu()
        model,x = randomize_norms(Fn(f, conv=conv(padding=1), norm=nn.BatchNorm2d(4))),image(2,3,8,8)
        folder = BN_Folder(verify=verify)
        inputs = [x,image(2,3,8,30),10*x] if verify else [x]
        right(model, folder.fold(model, x), inputs)
    folder.fold(model:=randomize_norms(Fn(lambda s,x: s.norm(y:=s.conv(x)).relu()+read(y), conv=conv(), norm=nn.BatchNorm2d(4))), x)
    assert 'sees what lies in between' in reason(folder.result, 'norm')

@torch.jit.script
def is_wide(x): return bool(x.size(3)>500)
@torch.jit.script
def half_if_wide(x): return x/2 if is_wide(x) else x
@torch.jit.script
def is_more(n: int): return n>300
@torch.jit.script
def leads(x): return x.stride(1)>300
@torch.jit.script
def columns(x): return x.unbind(3)
@torch.jit.script
def smooth(x): return x*torch.sigmoid(x)

def test_a_scripted_function_that_asks_nothing():
    run_scripted,model = torch.jit.ScriptFunction.__call__,Fn(lambda s,x: smooth(s.norm(s.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4))
    assert 'Not followed' not in covers(model, image(2,3,8,8)) and torch.jit.ScriptFunction.__call__ is run_scripted

def test_scripted_functions_that_somebody_else_listens_to(monkeypatch):
    run_scripted,heard = torch.jit.ScriptFunction.__call__,[]
    def theirs(f, *args): return heard.append(f.name) or run_scripted(f, *args)
    monkeypatch.setattr(torch.jit.ScriptFunction, '__call__', theirs)
    covers(Fn(lambda s,x: smooth(s.norm(s.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert torch.jit.ScriptFunction.__call__ is theirs and len(heard)>2

draws = {'random':random.random, 'numpy.random':np.random.rand, 'torch.random':lambda: torch.rand(()).item()}

@pytest.mark.parametrize('name, draw', draws.items(), ids=draws)
def test_random_numbers_that_decide(name, draw):
    "Several draws are tried, and nobody's random numbers are used up."
    def seed(i):
        for f in (random.seed,np.random.seed,torch.manual_seed): f(i)
    def states(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    model = randomize_norms(Fn(lambda s,x: s.norm(s.conv(x)) if draw()<.8 else s.conv(x), conv=conv(), norm=nn.BatchNorm2d(4)))
    x,folder = image(2,3,8,8),BN_Folder()
    seed(1)
    before = states()
    folded = folder.fold(model, x)
    assert states()==before
    for i in range(20):
        seed(i)
        right(model, folded, [x])
    assert 'would be wrong on inputs of' in reason(folder.result, 'norm')
    text = covers(Fn(lambda s,x: s.norm(s.conv(x))*(1 if draw()<.8 else 2), conv=conv(), norm=nn.BatchNorm2d(4)), x)
    assert f'The code draws random numbers (`{name}`)' in text and 'further draws it took 1 ways' in text

def test_another_generator_of_numpy():
    "Its state is a dict."
    old = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        BN_Folder().fold(simple(), image(2,3,8,8))
        first = np.random.rand()
        np.random.set_bit_generator(np.random.PCG64(3))
        assert np.random.rand()==first
    finally: np.random.set_bit_generator(old)

def test_folds_in_two_threads_that_draw():
    "Neither uses up, or gives back, what the other one seeded."
    def f(s, x): return s.norm(s.conv(x))*(1 if random.random()+np.random.rand()<3 else 2)
    models = [randomize_norms(Fn(f, conv=conv(), norm=nn.BatchNorm2d(4))) for _ in range(2)]
    before = random.getstate(),np.random.get_state()[1].tolist()
    with ThreadPoolExecutor(2) as pool: folded = [*pool.map(lambda m: BN_Folder().fold(m, image(2,3,8,8)), models)]
    assert (random.getstate(),np.random.get_state()[1].tolist())==before
    for m,new in zip(models, folded): right(m, new, [image(2,3,8,8)])

def test_numbers_made_of_numbers():
    "A number that occurs twice in the next one is reckoned once at each level, and a long chain comes to an end."
    def levels(h, n):
        for _ in range(n): h = h+(4-h%4)%4
        return h
    def steps(n):
        while n>0: n -= 2
        return n
    for by,size in ((lambda x: levels(x.shape[2], 40)>300, 8),(lambda x: steps(x.shape[2])<-9, 1500)):
        text = covers(Fn(lambda s,x,by=by: s.norm(s.conv(x))*(2 if by(x) else 1), conv=nn.Conv1d(3,4,1), norm=nn.BatchNorm1d(4)), image(2,3,size))
        assert 'Proved on inputs of' in text
    assert 'Not followed: sizes that become plain numbers (' in text

def test_what_is_out_of_reach_is_not_reckoned():
    "An extent beside a long one."
    def f(s, x): return s.norm(s.layer(x).transpose(1,2)) if x.shape[1]<300 else s.layer(x).transpose(1,2)
    assert 'Not covered: `shape[1] < 300`' in covers(Fn(f, layer=nn.Linear(2**16,4), norm=nn.BatchNorm1d(4)), image(2,10,2**16))

@pytest.mark.parametrize('own', [random.Random(0), np.random.default_rng(0), np.random.RandomState(0)])
def test_a_generator_of_its_own_is_said(own):
    "It draws the same in each run of the proof, so two calls in a row are run."
    model = Fn(lambda s,x: s.norm(s.conv(x))*(1 if s.own.uniform(0, 1)<.9 else 1), conv=conv(), norm=nn.BatchNorm2d(4), own=own)
    before = pickle.dumps(own)
    text = covers(model, image(2,3,8,8))
    assert 'The model keeps `own` from one call to the next: two calls in a row were run.' in text and pickle.dumps(own)==before

class Mine(torch.Tensor): pass

def test_a_class_of_tensors_that_decides():
    "The trace and the proof take plain tensors."
    x = image(2,3,8,8).as_subclass(Mine)
    model = randomize_norms(Fn(lambda s,x: s.norm(s.conv(x)) if type(x) is torch.Tensor else s.conv(x), conv=conv(), norm=nn.BatchNorm2d(4)))
    before = state(model)
    with pytest.raises(FoldError, match='something else for a Mine than for a plain tensor'): BN_Folder().fold(model, x, inplace=True)
    assert state(model)==before
    BN_Folder().fold(model, x.as_subclass(torch.Tensor))
    model.f = lambda s,x: s.norm(s.conv(x))
    folder = BN_Folder()
    folded = folder.fold(model, x)
    assert folder.result.folded and type(folded(x)) is Mine
    right(model, folded, [x])

lost = dict(ceil=lambda x: int(np.ceil(x.shape[2]/320))>1, chunk=lambda x: len(x.chunk(40, 2))==40, tensor_split=lambda x: len(x.tensor_split([3,50], 2))>3,
    nbytes=lambda x: x.nbytes>50000, storage=lambda x: x.untyped_storage().nbytes()>50000, scripted=is_wide, scripted_stride=leads,
    index=lambda x: x.shape[2].__index__()>300, ratio=lambda x: (x.shape[2]/640).as_integer_ratio()[1]==1, scripted_number=lambda x: is_more(x.shape[3]),
    scripted_list=lambda x: len(columns(x))>300, scripted_deep=lambda x: half_if_wide(x).shape[3]>10**6,
    fraction=lambda x: Fraction(x.shape[2], 100)>5, modulus=lambda x: pow(x.shape[2], 2, 641)==1)

def test_channels_and_heights_cut_at_once():
    model,x = randomize_norms(Fn(lambda s,x: s.norm((y := s.conv(x))[:,:y.shape[1]//2,:y.shape[2]-1]), conv=conv(3,10), norm=nn.BatchNorm2d(5))),image(2,3,8,8)
    folder = BN_Folder()
    right(model, folder.fold(model, x), [x,image(1,3,9,12)])
    assert folder.result.folded

@pytest.mark.parametrize('by', lost.values(), ids=lost)
def test_sizes_that_become_plain_numbers_are_said(by):
    text = covers(Fn(lambda s,x: s.norm(s.conv(x))*(2 if by(x) else 1), conv=conv(), norm=nn.BatchNorm2d(4)), image(2,3,8,8))
    assert 'Not followed: sizes that become plain numbers (`' in text and any(f in text for f in ('test_inputs.py:','fractions.py:'))

@pytest.mark.parametrize('by, wide', [(lambda x: +x.shape[2]>50, 60),(lambda x: (x.shape[2]/30).is_integer(), 30),(lambda x: ~x.shape[2]<-50, 60),
    (lambda x: torch.ops.aten.sym_size(x, 2)>50, 60),(lambda x: torch.ops.aten.sym_size(x)[2]>50, 60),(lambda x: torch.ops.aten.sym_numel(x)>3000, 80)])
def test_what_is_made_of_sizes_is_followed(by, wide):
    model,x = randomize_norms(Fn(lambda s,x: s.norm(s.conv(x)) if not by(x) else s.conv(x), conv=conv(), norm=nn.BatchNorm2d(4))),image(2,3,8,8)
    right(model, BN_Folder().fold(model, x), [x,image(2,3,wide,8)])

def test_sizes_that_a_cache_keeps():
    "What was computed in one pass turns up in the next ones."
    @lru_cache
    def half(n): return n//2
    model,x = randomize_norms(Fn(lambda s,x: s.norm(s.conv(x)[:,:,:half(x.shape[2])]), conv=conv(), norm=nn.BatchNorm2d(4))),image(2,3,8,8)
    for _ in range(2): right(model, BN_Folder().fold(model, x), [x,image(1,3,11,9)])

def test_arguments_of_the_second_sample_are_given():
    class Masks(nn.Sequential):
        def forward(self, x, mask=None): return super().forward(x if mask is None else x*mask)
    x = image(2,3,64,64)
    assert 'Not covered' not in covers(Masks(conv(), nn.BatchNorm2d(4)), None, samples=[x,(x,image(2,1,64,64))])

def test_layers_for_training_do_no_harm():
    "An auxiliary head is not reached by any input, and never will be."
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm,self.head,self.aux = conv(),nn.BatchNorm2d(4),conv(4,2),conv(4,2)
        def forward(self, x):
            y = self.norm(self.conv(x))
            return (self.head(y.relu()),self.aux(y)) if self.training else self.head(y.relu())
    folder = BN_Folder(verify=False)
    folder.fold(randomize_norms(Auxiliary()), image(2,3,8,8))
    assert names_of(folder.result.folded)==['norm']

def test_plan_and_fold_agree():
    for name in ('set_of_another_size','pad_to_a_multiple','gain_as_argument','relation_without_edges','truth_as_argument','way_with_its_own_norm'):
        model,x,_ = situations()[name]
        folder = BN_Folder()
        plan = folder.plan(randomize_norms(model), x)
        folder.fold(model, x)
        assert plan.rows()==folder.result.rows(), name
    model,x,_ = situations()['domain']
    assert 'where `norms.1` (BatchNorm2d) runs instead of `norms.0` (BatchNorm2d)' in reason(BN_Folder().plan(randomize_norms(model), x), 'norms.0')

def test_sizes_that_remember_stay_inside():
    "What a model keeps of a size is a plain number afterwards."
    kept = []
    class Keeps(nn.Sequential):
        def forward(self, x):
            kept.append(x.shape[2])
            self.size = x.shape
            return super().forward(x)
    model = randomize_norms(Keeps(conv(), nn.BatchNorm2d(4)))
    BN_Folder().fold(model, image(2,3,8,8), inplace=True)
    assert not hasattr(model, 'size') and all(type(n+1) is int and n==int(n) for n in kept)
