"Two processes on the CPU train together, fold each for itself, and validate together, as one process does alone."
import os, socket, sys, warnings
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from fasterfold.proof import distance,run,to_double
from fasterfold.fold import BN_Folder
from fasterfold.state import FoldError
from helpers import eps_of,randomize_norms

pytestmark = pytest.mark.xdist_group('distributed') # which import once what all need
N = 2
DIGITS = load_digits()
X,Y = torch.tensor(DIGITS.images, dtype=torch.float32)[:,None]/16,torch.tensor(DIGITS.target)
TRAIN,VALID = slice(1000),slice(1000, None) # 797 items: the processes get different numbers of them

class Net(nn.Module):
    "Norms behind convolutions, one of them behind a sum, and one in front of the linear layer."
    def __init__(self):
        super().__init__()
        def conv(i, o, **kw): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **kw), nn.BatchNorm2d(o))
        self.a,self.b,self.c = conv(1, 16),conv(16, 16),conv(16, 32, stride=2)
        self.norm,self.head = nn.BatchNorm1d(32),nn.Linear(32, 10)
    def forward(self, x):
        x = self.a(x).relu()
        x = (x+self.b(x)).relu()
        return self.head(self.norm(self.c(x).relu().mean((2,3))))

def new_net():
    torch.manual_seed(0)
    return Net()

def state(model): return {k:v.clone() for k,v in model.state_dict().items()}

def assert_same(a, b):
    assert a.keys()==b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def _start(rank, f, port, path, n):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    if sys.platform=='linux': os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.save(f(rank, path), path/f'{rank}.pt')
    if dist.is_initialized(): dist.destroy_process_group()

def together(f, path, n=N):
    "What `f(rank, path)` returns in each of `n` processes."
    mp.set_forkserver_preload([__name__,'fastai.vision.all']) # what takes longest is to import these, once for all
    mp.start_processes(_start, (f, free_port(), path, n), n, start_method='forkserver')
    return [torch.load(path/f'{rank}.pt') for rank in range(n)]

def scores(preds, targs): return dict(n=len(targs), loss=cross_entropy(preds.double(), targs, reduction='sum'), classes=preds.argmax(1).bincount(minlength=10))

def reduced(scores):
    "The sums of `scores` over all processes."
    res = {k:torch.as_tensor(v) for k,v in scores.items()}
    for v in res.values(): dist.all_reduce(v)
    return res

def assert_validates_like(got, original, folded):
    "Assert that `got` are the scores of one process: the same classes, and a loss that is off by rounding."
    def alone(model, x=X[VALID]): return scores(run(model, x)[0], Y[VALID])
    own,want,ref = alone(original),alone(folded),alone(to_double(original), X[VALID].double())
    assert got['n']==want['n']
    for o in (got,own): assert torch.equal(o['classes'], want['classes'])
    off = lambda o: (o['loss']-ref['loss']).abs()/ref['loss']
    assert off(got)<=10*off(own)+10*eps_of(original)

def assert_like_one_process(a, b):
    "Assert that both processes had the same weights before and after folding, and that these and their scores are those of one process."
    for k in 'original','folded': assert_same(a[k], b[k])
    original = Net().eval()
    original.load_state_dict(a['original'])
    folded = BN_Folder().fold(original, X[:8])
    assert_same(state(folded), a['folded'])
    for o in a,b: assert_validates_like(o['scores'], original, folded)

def steps(model, opt, batches, backward=lambda loss: loss.backward()):
    for x,y in batches:
        backward(cross_entropy(model(x), y))
        opt.step()
        opt.zero_grad()

def _ddp(rank, path):
    dist.init_process_group('gloo')
    res = []
    for prepare in (nn.Module.eval,randomize_norms):
        model = nn.parallel.DistributedDataParallel(new_net())
        mine = slice(rank, 1000, N)
        opt = torch.optim.SGD(model.parameters(), .1)
        steps(model, opt, zip(X[mine].split(100), Y[mine].split(100)))
        # `SyncBatchNorm` trains on GPUs only, and would have kept the statistics the same; it runs anywhere
        stats = torch.cat([b.flatten().double() for b in model.module.buffers()])
        for b in model.module.buffers(): dist.broadcast(b, 0)
        model.module = nn.SyncBatchNorm.convert_sync_batchnorm(prepare(model.module))
        model.eval()
        original,part = state(model.module),slice(1000+rank, None, N)
        folder = BN_Folder()
        assert folder.fold(model, X[part][:8], inplace=True) is model # each on data of its own
        with torch.no_grad(): got = reduced(scores(model.module(X[part]), Y[part]))
        res.append(dict(stats=stats, original=original, folded=state(model.module), scores=got, norms=[o.norm for o in folder.result.folded],
            sync=sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules())))
    return res

def test_ddp_with_sync_batchnorm(tmp_path):
    for a,b in zip(*together(_ddp, tmp_path), strict=True):
        assert not torch.equal(a['stats'], b['stats']) # they did train on different data
        assert len(a['norms'])==4 and a['norms']==b['norms'] and not a['sync']
        assert_like_one_process(a, b)

def _call_wrapped(rank, path):
    dist.init_process_group('gloo')
    model = nn.parallel.DistributedDataParallel(randomize_norms(new_net()))
    x,res = X[rank:8+rank],[]
    for last in (False,True):
        folder = BN_Folder(channels_last=last)
        with torch.no_grad():
            before = model.eval()(x)
            folder.fold(model, x, inplace=True)
            inside,want = model(x),model.module(x)
            formats = {m.weight.is_contiguous(memory_format=torch.channels_last) for m in (model.module.b[0],model.module.c[0])}
            folder.undo()
            again = model(x)
        model.train()
        model(x+rank).mean().backward()
        same = dict(inside=torch.equal(inside, want), again=torch.equal(again, before), close=distance([inside], [before])<1e-5, format=formats=={last})
        res.append((same, len(model.modules_buffers), len(list(model.buffers()))))
    return res

def test_ddp_forward_of_folded(tmp_path):
    "The wrapper runs the folded model, in either memory format, and after undoing goes on to keep buffers the same."
    for res in together(_call_wrapped, tmp_path):
        for same,synced,buffers in res:
            assert all(same.values()), same
            assert synced==buffers

def _train_folded(rank, path):
    "Gradients of a model folded before it is wrapped, in either memory format; the whole batch is seen by each process."
    dist.init_process_group('gloo')
    res = []
    for last in (False,True):
        model = nn.parallel.DistributedDataParallel(BN_Folder(channels_last=last).fold(randomize_norms(new_net()), X[:8]))
        steps(model, torch.optim.SGD(model.parameters(), .1), zip(X[:64].split(16), Y[:64].split(16)))
        res.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return res

def test_ddp_trains_folded_models_in_either_format(tmp_path):
    for a,b in together(_train_folded, tmp_path): assert distance([b], [a])<1e-4

def _accelerate(rank, path):
    from accelerate import Accelerator
    from accelerate.utils import broadcast
    from torch.utils.data import DataLoader,TensorDataset
    acc,net = Accelerator(cpu=True),new_net()
    train,valid = (DataLoader(TensorDataset(X[o], Y[o]), batch_size=64, shuffle=o is TRAIN) for o in (TRAIN,VALID))
    model,opt,train,valid = acc.prepare(net, torch.optim.SGD(net.parameters(), .1), train, valid)
    steps(model, opt, train, acc.backward)
    for b in net.buffers(): b.copy_(broadcast(b))
    original = state(acc.unwrap_model(model))
    BN_Folder().fold(model, next(iter(valid))[0], inplace=True)
    net.eval()
    with torch.no_grad(): parts = [acc.gather_for_metrics((net(x),y)) for x,y in valid]
    preds,targs = map(torch.cat, zip(*parts, strict=True))
    assert acc.num_processes==N and isinstance(model, nn.parallel.DistributedDataParallel)
    return dict(original=original, folded=state(acc.unwrap_model(model)), scores=scores(preds, targs))

def test_accelerate(tmp_path): assert_like_one_process(*together(_accelerate, tmp_path))

def get_learner(path):
    from fastai.learner import DataLoaders,Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    import fastai.distributed, fasterfold.learner # both give learners methods, chkstyle: ignore
    items = list(zip(X, Y))
    dls = DataLoaders.from_dsets(items[TRAIN], items[VALID], bs=64, num_workers=0, device='cpu')
    return Learner(dls, new_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)

def _needs_cuda(rank, path):
    said = []
    for sync_bn in (True,False):
        learn = get_learner(path)
        with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=sync_bn, cpu=True):
            try: learn.fit(1, 1e-2)
            except Exception as e: said.append(str(e))
    return said

@pytest.mark.skipif(torch.cuda.is_available(), reason='There is a GPU')
def test_what_of_fastai_needs_cuda(tmp_path):
    "As the tutorial says: `SyncBatchNorm` under the wrapper, and the loader. Once this fails, the tutorial may say less."
    for norm,loader in together(_needs_cuda, tmp_path):
        assert 'SyncBatchNorm layers only work with GPU modules' in norm
        assert 'NVIDIA' in loader or 'CUDA' in loader

def _distrib_ctx(rank, path):
    learn = get_learner(path)
    from fastai.distributed import DistributedDL
    def broadcast(self, t, rank):
        "As fastai has it, but for the copy to the GPU, which gloo can do without."
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1, 1e-2)
        for b in learn.model.buffers(): dist.broadcast(b, 0)
        original = state(learn.model)
        learn.fold_bn()
        preds,targs = learn.get_preds(act=nn.Identity())
    return dict(original=original, folded=state(learn.model), scores=scores(preds, targs))

def test_distrib_ctx(tmp_path):
    "All else of fastai's distributed training runs on the CPU, folds, and gathers predictions of the folded model."
    assert_like_one_process(*together(_distrib_ctx, tmp_path))

def _fsdp1(model, mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'))

def _fsdp2(model, mesh):
    from torch.distributed.fsdp import fully_shard
    return fully_shard(model, mesh=mesh)

def _fsdp2_of_parts(model, mesh):
    for m in model.a,model.head: _fsdp2(m, mesh)
    return model

def _fsdp2_that_ran(model, mesh):
    "After its forward pass, the weights of the outermost module are still whole, and nothing but its class shows that they will not stay so."
    model = _fsdp2(model, mesh)
    with torch.no_grad(): model(X[:2])
    assert type(model.head.weight) is nn.Parameter
    return model

def _tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel,parallelize_module
    return parallelize_module(model, mesh, dict(head=ColwiseParallel()))

def _replicated(model, mesh):
    from torch.distributed.tensor import distribute_module
    return distribute_module(model, mesh)

def _one_buffer(model, mesh):
    from torch.distributed.tensor import distribute_tensor
    model.norm.running_mean = distribute_tensor(model.norm.running_mean, mesh)
    return model

def _bits(model):
    "What each process holds itself: the objects, and their numbers."
    held = [*model.named_parameters(),*model.named_buffers()]
    return [(k, id(t), type(t), type(m)) for k,t in held for m in model.modules()],[getattr(t, '_local_tensor', t).detach().clone() for _,t in held]

def _spread(rank, path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions,get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group('gloo')
    mesh,res = init_device_mesh('cpu', (dist.get_world_size(),)),{}
    for spread in (_fsdp1,_fsdp2,_fsdp2_of_parts,_fsdp2_that_ran,_tensor_parallel,_replicated,_one_buffer):
        try: model,said = spread(randomize_norms(new_net()), mesh),[]
        except AttributeError: continue # the forward pass of torch 2.6 needs a GPU
        what,numbers = _bits(model)
        for f in (BN_Folder.plan,BN_Folder.fold,lambda *args: BN_Folder.fold(*args, inplace=True)):
            for args in ((),(X[:2],)):
                try: f(BN_Folder(), model, *args)
                except FoldError as e: said.append(str(e))
        after,same = _bits(model)
        assert what==after and all(map(torch.equal, numbers, same)), spread.__name__
        whole = new_net().eval()
        whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))) # as the error says
        original = randomize_norms(new_net())
        assert_same(state(whole), state(original))
        res[spread.__name__] = said,state(BN_Folder().fold(whole, X[:8]))
    return res

@pytest.mark.parametrize('n', [1,2])
def test_weights_spread_over_processes(tmp_path, n):
    "All processes refuse alike, whatever is called, and nothing has changed; gathered as the error says, the model folds."
    first,*others = together(_spread, tmp_path, n)
    assert len(first)>=6
    want = state(BN_Folder().fold(randomize_norms(new_net()), X[:8]))
    for name,(said,folded) in first.items():
        assert len(said)==6 and len(set(said))==1 and 'Gather them first' in said[0], (name, said)
        assert_same(folded, want)
        for o in others:
            assert o[name][0]==said
            assert_same(o[name][1], folded)

def _learner_of_shards(rank, path):
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group('gloo')
    learn,said = get_learner(path),[]
    _fsdp2(learn.model, init_device_mesh('cpu', (N,)))
    calls = []
    learn.model.register_forward_hook(lambda *_: calls.append(1))
    with learn.no_bar(), learn.no_logging():
        for f in (learn.fold,learn.fold_bn,learn.fold_plan,learn.folded().__enter__):
            try: f()
            except FoldError as e: said.append(str(e))
    return said,len(calls)

def test_learner_with_weights_spread_over_processes(tmp_path):
    "It says so before it validates anything."
    (said,calls),other = together(_learner_of_shards, tmp_path)
    assert len(said)==4 and all('Gather them first' in o for o in said) and (said,calls)==other and not calls
