"""Norms that go only where several layers change together: part before and part behind, other readers that make up for it, other terms of a sum.

With scales of zero, or that are negative before a ReLU, some of them stay: then each says why, and the model is right all the same."""
import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from torchvision.models import densenet121
from fasterfold.fold import BN_Folder
from fasterfold.proof import distance, run, run_as
from helpers import *

def image(n=2, h=6, w=5): return torch.randn(n, 3, h, w)
def images(): return image(),image(1, 7, 9),image(3, 6, 6)
def conv(i=3, o=4, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
def bn(n=4): return nn.BatchNorm2d(n)

def scaled(make, how):
    "What `make` makes, with scales that are positive, of both signs, or zero in one channel."
    net = made(make)
    for i,m in enumerate(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        m.weight.data = m.weight.data.abs()+.3
        if how=='signs': m.weight.data[i%m.num_features] *= -1
        if how=='zero': m.weight.data[0] = 0
    return net

def goes(make, xs, **gone):
    "How many norms go with each kind of scales, with proof and without, in place and as a copy: on all of `xs` the model is as far from its float64 run as before; undo gives it back."
    for how,n in gone.items():
        for verify in (True,False):
            net,folder = scaled(make, how),BN_Folder(verify=verify)
            want = [(exact := run_as(net, x),distance(run(net, x), exact)) for x in xs]
            before = state(net)
            for inplace in (False,True):
                new = folder.fold(net, xs[0], inplace=inplace)
                assert len(folder.result.folded)==n, (how, str(folder.result))
                for _ in range(2):
                    for x,(exact,own) in zip(xs, want): assert distance(run(new, x), exact)<=10*own+100*eps_of(net)
                    new.train()
                    new.eval()
                assert inplace or state(net)==before
            folder.undo()
            assert state(net)==before
    return folder.result

# ---- Part before, part behind

def test_scale_before_and_shift_behind():
    "s·relu(z)+t is relu(s·z)+t: the scale goes back through the ReLU, the shift on through the sum."
    def f(m, x): return m.c((y:=m.bn(m.a(x).relu()))+m.b(y).relu())
    goes(lambda: Fn(f, a=conv(), bn=bn(), b=conv(4, 4), c=conv(4, 2)), images(), positive=1, signs=0, zero=1)

def test_shift_before_and_scale_behind():
    "relu(s·z+t) is s·relu(z+t/s)."
    def f(m, x): return m.c(m.bn(m.a(x)+m.b(x).sigmoid()).relu())
    goes(lambda: Fn(f, a=conv(), b=conv(), bn=bn(), c=conv(4, 2)), images(), positive=1, signs=0, zero=0)

# ---- Others that read the same

def test_other_readers_make_up_for_it():
    def f(m, x): return m.bn(v:=m.a(x)).relu(),m.k(v).sigmoid()
    goes(lambda: Fn(f, a=conv(), bn=bn(), k=conv(4, 2)), images(), positive=1, signs=1, zero=0)

@pytest.mark.parametrize('reader', [lambda v: v.sigmoid(),lambda v: v,lambda v: v.max(),lambda v: v*v])
def test_reader_that_cannot(reader):
    "What is returned, or read by an operation that lets no map pass, is no place to make up for anything."
    def f(m, x): return m.bn(v:=m.a(x)).relu(),reader(v)
    plan = goes(lambda: Fn(f, a=conv(), bn=bn()), images(), positive=0)
    assert 'also feeds' in reason(plan, 'bn') or 'returns' in reason(plan, 'bn')

def test_two_norms_of_one_value():
    "One goes, and the other one makes up for it: then it can go no more, since its ReLU and the other one want different values."
    def f(m, x): return m.p(v:=m.a(x)).relu()+m.q(v).relu()
    goes(lambda: Fn(f, a=conv(), p=bn(), q=bn()), images(), positive=1, signs=1, zero=0)

class Attention(nn.Module):
    "A layer of graph attention as in PyTorch Geometric: what it averages, its scores read, too."
    def __init__(self, n_in, n_out):
        super().__init__()
        self.lin,self.bias = nn.Linear(n_in, n_out, bias=False),nn.Parameter(torch.randn(n_out))
        self.src,self.dst = (nn.Parameter(torch.randn(1, n_out)) for _ in range(2))
    def forward(self, x, edges):
        x = self.lin(x)
        s,d = edges
        score = F.leaky_relu((x*self.src).sum(-1)[s]+(x*self.dst).sum(-1)[d], .2).exp()
        norm = torch.zeros(len(x), dtype=x.dtype).index_add(0, d, score)
        return torch.zeros_like(x).index_add(0, d, x[s]*(score/norm[d])[:,None])+self.bias

def test_graph_attention():
    def f(m, x, edges): return m.second(m.bn(m.first(x, edges)).relu(), edges)
    def make(): return Fn(f, first=Attention(5, 4), bn=nn.BatchNorm1d(4), second=Attention(4, 3))
    edges = torch.tensor([[0,1,2,3,4,5,0,3],[1,2,3,4,5,0,0,3]])
    for how,n in dict(positive=1, zero=0).items():
        net,x = scaled(make, how),(torch.randn(6, 5), edges)
        folder = BN_Folder()
        check_fold(net, folder.fold(net, x), x)
        assert len(folder.result.folded)==n, str(folder.result)
    assert 'its input also feeds' in reason(folder.result, 'bn') or 'what `first.lin` (Linear) makes also feeds `mul` in `first`' in reason(folder.result, 'bn')

# ---- Other terms of a sum

def test_other_term_of_a_sum():
    "u + (s·r+t) is s·(u/s + r) + t, as in Res2Net, where u is a piece of what a convolution made."
    def f(m, x):
        u,v = m.a(x).chunk(2, 1)
        return m.c(u+m.bn(v.sigmoid()))
    goes(lambda: Fn(f, a=conv(3, 8), bn=bn(), c=conv(4, 2, 3, padding=1)), images(), positive=1, signs=1, zero=0)

class Block(nn.Module):
    "One of a network with norms and activations before each convolution."
    def __init__(self, inplace=False):
        super().__init__()
        self.p,self.q,self.a,self.b,self.act = bn(),bn(),conv(4, 4, 3, padding=1),conv(4, 4, 3, padding=1),nn.ReLU(inplace)
    def forward(self, x): return x+self.b(self.act(self.q(self.a(self.act(self.p(x))))))

@pytest.mark.parametrize('inplace', [False,True])
def test_stream_of_sums_with_norms_in_front(inplace):
    "The convolution that was added last gives the stream the shift that a norm wants over its scale, so all norms go; activations that would overwrite the stream no longer do."
    def make(): return nn.Sequential(conv(), *(Block(inplace) for _ in range(3)), bn(), nn.ReLU(), conv(4, 2))
    goes(make, images(), signs=5, zero=3)
    plan = goes(make, images(), positive=7)
    assert plan.notes==["3 activations no longer work in place."][:inplace]

def test_activations_work_in_place_again_after_undo():
    net,folder = scaled(lambda: nn.Sequential(conv(), Block(True), bn(), nn.ReLU(True), conv(4, 2)), 'positive'),BN_Folder()
    folder.fold(net, image(), inplace=True)
    assert (net[1].act.inplace,net[3].inplace)==(False,True)
    folder.undo()
    folder.refold()
    assert not net[1].act.inplace
    folder.undo()
    assert net[1].act.inplace

def written(m, x):
    x = m.a(x)
    y = m.p(x)
    m.act(y)
    return m.c(x+m.b(y))

@pytest.mark.parametrize('verify', [False,True])
def test_code_that_uses_what_an_activation_wrote(verify):
    "Where what it returns is not used, it must go on to write."
    net = scaled(lambda: Fn(written, a=conv(), p=bn(), act=nn.ReLU(True), b=conv(4, 4), c=conv(4, 2)), 'positive')
    folder = BN_Folder(verify=verify)
    check_fold(net, folder.fold(net, image()), image(3, 8, 8))
    assert not folder.result.folded and net.act.inplace
    assert '`act` (ReLU) writes in place' in reason(folder.result, 'p')

class Aside(nn.Module):
    "Whoever asks for it also gets a value made of what an activation wrote to, and not of what that returned."
    def __init__(self, makes, look=lambda y: y, call=lambda act,y: act(y)):
        super().__init__()
        self.a,self.p,self.act,self.b,self.c,self.aside = conv(),bn(),nn.ReLU(True),conv(4, 4),conv(4, 4),conv(4, 4)
        self.makes,self.look,self.call,self.seen = makes,look,call,[]
    def forward(self, x, asks=False):
        u = self.a(x)
        y = self.p(u)
        seen = self.look(y)
        res = self.b(self.call(self.act, y))+self.c(u)
        if self.makes=='keeps': self.seen[:] = [seen]
        if self.makes=='always' or asks: aside = self.aside(seen)
        return (res,aside) if asks else res

@pytest.mark.parametrize('look', [lambda y: y, lambda y: y[:,:], lambda y: y.permute(0,1,3,2)], ids=['itself','view','permuted'])
@pytest.mark.parametrize('makes', ['on_request','always','keeps'])
@pytest.mark.parametrize('verify', [False,True])
def test_code_that_may_use_what_an_activation_wrote(verify, makes, look):
    "It is the same that it writes in place, be it used only if the model is asked to, for nothing at all, or after the forward pass."
    net,x = scaled(lambda: Aside(makes, look), 'positive'),image()
    folder = BN_Folder(verify=verify)
    new = folder.fold(net, x)
    assert not folder.result.folded and new.act.inplace
    check_fold(net, new, {'x':x, 'asks':True})
    assert not has_changed(net, new, x)

class Silent(nn.ReLU):
    "Only writes."
    def forward(self, x): super().forward(x)

def written_by(act, y):
    act(y)
    return y

@pytest.mark.parametrize('call', [lambda act,y: act(input=y), written_by], ids=['by_keyword','for_what_it_writes'])
@pytest.mark.parametrize('verify', [False,True])
def test_activation_called_in_a_way_of_its_own(verify, call):
    net,x = scaled(lambda: Aside('on_request', call=call), 'positive'),image()
    if call is written_by: net.act = Silent(True)
    new = BN_Folder(verify=verify).fold(net, x)
    check_fold(net, new, {'x':x, 'asks':True})
    assert new.act.inplace and not has_changed(net, new, x)

def test_activation_that_is_called_twice():
    "It works in place in both calls or in none."
    def f(m, x):
        z = m.q(m.d(x))
        m.act(z)
        u = m.a(x)
        return m.b(m.act(m.p(u)))+m.c(u),m.e(z)
    net,x = scaled(lambda: Fn(f, a=conv(), d=conv(), p=bn(), q=bn(), act=nn.ReLU(True), b=conv(4, 4), c=conv(4, 4), e=conv(4, 4)), 'positive'),image()
    for verify in (False,True):
        new = BN_Folder(verify=verify).fold(net, x)
        check_fold(net, new, image(3, 8, 8))
        assert new.act.inplace and not isinstance(new.p, nn.Identity)

def test_hook_that_sees_what_an_activation_wrote_to():
    net,x,seen = scaled(lambda: Aside('on_request'), 'positive'),image(),[]
    net.act.register_forward_hook(lambda m,args,out: seen.append(args[0].clone()))
    new = BN_Folder().fold(net, x)
    for m in (net,new): run(m, x)
    assert distance(seen[-1:], seen[-2:-1])<1e-5

def test_what_was_put_on_a_tensor_passes_an_activation():
    def f(m, x):
        y = m.p(m.a(x))
        y.stride_so_far = 2
        y = m.act(y)
        return m.b(y[:,:,::y.stride_so_far])
    goes(lambda: Fn(f, a=conv(), p=bn(), act=nn.ReLU(True), b=conv(4, 4)), images(), positive=1)

def test_activation_whose_result_alone_is_used():
    "Another name for what it wrote to harms nothing."
    def f(m, x):
        u = m.a(x)
        y = m.p(u)
        y = r = m.act(y)
        return m.b(y+r[:,:])+m.c(u)
    goes(lambda: Fn(f, a=conv(), p=bn(), act=nn.ReLU(True), b=conv(4, 4), c=conv(4, 4)), images(), positive=1)

def test_residual_network_with_norms_in_front():
    "All norms go, if their scales are positive."
    net = scaled(lambda: timm.create_model('resnetv2_50'), 'positive').eval()
    folder,x = BN_Folder(),torch.randn(2, 3, 64, 64)
    check_fold(net, folder.fold(net, x), torch.randn(1, 3, 96, 64))
    assert len(folder.result.folded)==49

def test_dense_network():
    "One norm each of the last three blocks, whose pieces come from convolutions, besides the 59 inside the layers."
    net = scaled(densenet121, 'positive').eval()
    folder,x = BN_Folder(),torch.randn(2, 3, 64, 64)
    check_fold(net, folder.fold(net, x), torch.randn(1, 3, 96, 64))
    assert len(folder.result.folded)>=62

def test_value_that_comes_to_a_norm_in_two_ways():
    "Both want the same of it, and nothing has to be divided by a scale, be it zero."
    def f(m, x): return m.bn((y:=m.a(x)).flip(2)+y.flip(3)+m.k(x).flip(2)).relu()
    goes(lambda: Fn(f, a=conv(), k=conv(), bn=bn()), images(), positive=1, signs=1, zero=1)

def test_convolution_on_both_sides_of_which_values_change():
    "Its weight takes up what comes in and what goes out, one after the other."
    def f(m, x):
        y = m.a(x)
        return m.c(m.bn(y).relu()+m.k(y))
    goes(lambda: Fn(f, a=conv(), bn=bn(), k=conv(4, 4), c=conv(4, 2)), images(), positive=1, signs=1, zero=0)

# ---- Scales that are too small to divide by

def test_scale_too_small_to_divide_by():
    "A shift of a hundred times the scale would cost the others two digits."
    def f(m, x): return m.bn(v:=m.a(x)).relu(),m.k(v).sigmoid()
    for size,n in ((1.,1),(1e-3,0)):
        net = scaled(lambda: Fn(f, a=conv(), bn=bn(), k=conv(4, 2)), 'positive')
        with torch.no_grad():
            net.bn.weight.fill_(size)
            net.bn.bias.fill_(1)
        for verify in (True,False):
            folder = BN_Folder(verify=verify)
            check_fold(net, folder.fold(net, image()), image(3, 8, 8))
            assert len(folder.result.folded)==n

# ---- Layers that are no part of the model

def test_shift_wanted_of_a_layer_that_is_not_registered():
    "It has no bias that could take it up, and nobody would find one that was made for it."
    hidden = [conv(4, 4, bias=False)]
    def f(m, x): return m.c(m.bn(m.a(x)+hidden[0](x.new_ones(1, 4, 1, 1)*x.mean())).relu())
    net = scaled(lambda: Fn(f, a=conv(bias=False), bn=bn(), c=conv(4, 2)), 'positive')
    for verify in (True,False):
        new,x = BN_Folder(verify=verify).fold(net, image()),image(3, 8, 8)
        assert distance(run(new, x), run(net, x))<1e-6
