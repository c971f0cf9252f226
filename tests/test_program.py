"Exported programs in, exported programs out: what folds in a graph, what stays as it was, and where the program goes afterwards."
import copy, importlib, io, json, pickle, zipfile
import pytest, timm, torch, torchvision
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from fasterfold.fold import BN_Folder
from fasterfold.program import inputs_of,is_program,module_of,norms_in
from fasterfold.proof import distance,run,to_double
from fasterfold.sample import Sample,tensors_of
from fasterfold.state import FoldError,copy_model
from helpers import Fn,eps_of,names_of,randomize_norms
from learners import KINDS
from test_cli import assert_refused,call,tree

pytestmark = pytest.mark.filterwarnings('ignore')

def learner_model(name, path):
    "The model of a learner without the type that fastai gives what it returns, and an input."
    learn = KINDS[name](path)
    for m in learn.model.modules():
        for k,o in m._modules.items():
            if type(o).__name__=='ToTensorBase': m._modules[k] = nn.Identity()
    return learn.model,tuple(t.as_subclass(torch.Tensor) for t in learn.dls.valid.one_batch()[:learn.dls.n_inp])

def images(size, n=2): return torch.randn(n, 3, size, size),

MODELS = dict(vision=lambda p: learner_model('vision', p), tabular=lambda p: learner_model('tabular', p), unet=lambda p: learner_model('unet', p),
    levit=lambda p: (timm.create_model('levit_128s'),images(224)), resnet18=lambda p: (torchvision.models.resnet18(),images(64)),
    mobilenetv3=lambda p: (torchvision.models.mobilenet_v3_small(),images(64)), densenet=lambda p: (torchvision.models.DenseNet(16, (4,4,4), 16),images(64)))
SIZED = 'resnet18','mobilenetv3' # which take images of any size

def dims(xs, sized=False):
    "All batches but one item, and all sizes of images if `sized`."
    free = {2:Dim('height', min=33, max=512),3:Dim('width', min=33, max=512)} if sized else {}
    return tuple({0:Dim('batch', min=1, max=1024)}|free for _ in xs)

def exported(model, xs, **kwargs): return torch.export.export(model, xs, **kwargs)

def outs(f, xs):
    with torch.no_grad(): return tensors_of(f(*xs))

def assert_right(model, program, xs):
    "Assert that `program` is as close to a float64 run of `model` as that is itself."
    ref = run(to_double(model), Sample.of(xs).to(torch.float64))
    own,got = distance(outs(model, xs), ref),distance(outs(program.module(), xs), ref)
    assert got<=10*own+10*eps_of(model), f'{got:.1e} from float64, the original {own:.1e}'

def assert_same_calls(old, new):
    "Assert that `new` is called and returns as `old`, for the same sizes."
    a,b = old.graph_signature,new.graph_signature
    assert a.user_inputs==b.user_inputs and a.user_outputs==b.user_outputs and a.buffers_to_mutate==b.buffers_to_mutate
    assert old.call_spec==new.call_spec and old.range_constraints==new.range_constraints and old.verifiers==new.verifiers
    assert distance(tensors_of(old.example_inputs), tensors_of(new.example_inputs))==0

def frozen(program):
    "Everything of `program` that a fold could change."
    return str(program), {k:(id(t),t.data_ptr(),t.detach().clone()) for k,t in program.state_dict.items()}

def assert_untouched(program, before):
    text,state = frozen(program)
    assert text==before[0] and state.keys()==before[1].keys()
    assert all(a[:2]==b[:2] and torch.equal(a[2], b[2]) for a,b in zip(state.values(), before[1].values()))

def saved(program):
    "`program`, written and read back."
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)

def net(*layers): return randomize_norms(nn.Sequential(*layers))
def conv(n=3, out=4, **kwargs): return nn.Conv2d(n, out, 3, **kwargs)
def small(): return net( # the second of three norms stays
    conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(144), nn.ReLU(), nn.Linear(144, 5, bias=False), nn.BatchNorm1d(5)),images(8)

# ---- Models

@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', MODELS)
def test_as_from_the_model_itself(name, tmp_path):
    torch.manual_seed(0)
    model,xs = MODELS[name](tmp_path)
    randomize_norms(model)
    program = exported(copy_model(model), xs, dynamic_shapes=dims(xs, name in SIZED)) # what keeps features would keep those of the export
    before,by_model,by_program = frozen(program),BN_Folder(),BN_Folder()
    folded_model,folded = by_model.fold(model, xs),by_program.fold(program)
    assert_untouched(program, before)
    assert_same_calls(program, folded)
    a,b = by_model.result,by_program.result
    assert names_of(a.folded)==names_of(b.folded) and {*names_of(a.kept)}=={*names_of(b.kept)} and norms_in(folded)==names_of(b.kept)
    assert b.proof.ok and len(b.covers[0].split(' and '))>1
    state = folded_model.state_dict()
    assert folded.state_dict.keys()=={k for k in state if k in folded.state_dict} and not {k for k in state if not k.endswith('num_batches_tracked')}-folded.state_dict.keys()
    for n in (xs[0].shape[0],1,5):
        some = tuple(t[:1].repeat(n, *[1]*(t.dim()-1)) for t in xs)
        if name in SIZED: some = torch.randn(n, 3, 67, 96),
        assert_right(model, folded, some)
    assert_right(model, saved(folded), xs)

@pytest.mark.parametrize('name', ['resnet18','small'])
def test_decomposed(name, tmp_path):
    torch.manual_seed(0)
    model,xs = small() if name=='small' else MODELS[name](tmp_path)
    randomize_norms(model)
    program = exported(model, xs, dynamic_shapes=dims(xs)).run_decompositions()
    folded = BN_Folder().fold(program)
    assert_same_calls(program, folded)
    assert norms_in(folded)==['4']*(name=='small')
    for n in (1,2,5): assert_right(model, folded, (torch.randn(n, *xs[0].shape[1:]),))
    assert_right(model, saved(folded), xs)

# ---- Graphs of all kinds

def two_readers(self, x):
    y = self.conv(x)
    return self.norm(y)+y.relu()

def written(self, x):
    y = self.norm(self.conv(x))
    F.relu(y, inplace=True)
    return self.last(y)

def functional(self, x): return F.batch_norm(self.conv(x), self.mean, self.var, self.gain)

def conv_norm(**kwargs): return dict(conv=conv(bias=False), norm=nn.BatchNorm2d(4))|kwargs
def buffers(): return dict(conv=conv(), gain=nn.Parameter(torch.rand(4)+.5), mean=nn.Buffer(torch.randn(4)), var=nn.Buffer(torch.rand(4)+.5))

GRAPHS = dict( # model, and how many of its norms fold and stay
    two_readers=(lambda: Fn(two_readers, **conv_norm()), 0, 1),
    written=(lambda: Fn(written, **conv_norm(last=conv(4))), 1, 0),
    functional=(lambda: Fn(functional, **buffers()), 1, 0),
    shared_norm=(lambda: Fn(lambda s, x: s.norm(s.conv(x))+s.norm(s.other(x)), **conv_norm(other=conv())), 1, 0),
    shared_conv=(lambda: Fn(lambda s, x: s.norm(s.conv(x))+s.norm(s.conv(x.flip(-1))), **conv_norm()), 1, 0),
    no_norm=(lambda: net(conv(), nn.ReLU()), 0, 0),
    no_affine=(lambda: net(conv(), nn.BatchNorm2d(4, affine=False)), 1, 0),
    batch_statistics=(lambda: net(conv(), nn.BatchNorm2d(4, track_running_stats=False)), 0, 1),
    instance_norm=(lambda: net(conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), 1, 0),
    transposed=(lambda: net(nn.ConvTranspose2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), 1, 0),
    grouped=(lambda: net(nn.ConvTranspose2d(3, 6, 3, bias=False, groups=3), nn.BatchNorm2d(6), conv(6, 6, groups=2, padding='same'), nn.BatchNorm2d(6)), 2, 0),
    on_the_input=(lambda: Fn(lambda s, x: (s.norm(x),x), norm=nn.BatchNorm2d(3)), 0, 1),
    double=(lambda: Fn(lambda s, x: s.norm(s.conv(x.double())).float(), **conv_norm()).double(), 1, 0),
    unused=(lambda: Fn(lambda s, x: s.norm(s.conv(x)), **conv_norm(aux=net(conv(), nn.BatchNorm2d(4)))), 1, 0),
    parametrized=(lambda: net(nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)), 1, 0))

@pytest.mark.parametrize('decomposed', [False,True])
@pytest.mark.parametrize('name', GRAPHS)
def test_graphs(name, decomposed):
    torch.manual_seed(0)
    make,goes,stays = GRAPHS[name]
    model,xs = randomize_norms(make()),images(8)
    program = exported(model, xs, dynamic_shapes=dict(xs=dims(xs)) if isinstance(model, Fn) else dims(xs))
    if decomposed: program = program.run_decompositions()
    if decomposed and name=='instance_norm': goes,stays = 0,1 # which then computes its statistics for each item of the batch
    before,folder = frozen(program),BN_Folder()
    folded = folder.fold(program)
    assert_untouched(program, before)
    assert_same_calls(program, folded)
    assert (len(folder.result.folded),len(folder.result.kept))==(goes,stays) and {*norms_in(folded)}=={*names_of(folder.result.kept)}
    assert BN_Folder().plan(program).rows()==folder.result.rows()
    assert distance(outs(folded.module(), xs), outs(model, xs))<1e-5
    assert distance(outs(saved(folded).module(), xs), outs(folded.module(), xs))==0

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    model,xs = net(conv(bias=False), nn.BatchNorm2d(4)).to(dtype),(torch.randn(2, 3, 8, 8).to(dtype),)
    folded = BN_Folder().fold(exported(model, xs))
    assert norms_in(folded)==[] and {t.dtype for t in folded.state_dict.values()}=={dtype}
    assert_right(model, folded, xs)

def test_free_sizes_of_no_batch():
    torch.manual_seed(0)
    model,xs = net(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),(torch.randn(2, 3, 20),)
    program = exported(model, xs, dynamic_shapes=({2:Dim('length', min=8, max=99)},))
    folded = BN_Folder().fold(program)
    assert norms_in(folded)==[] and '(2,3,' in BN_Folder().plan(program).covers[0]
    for n in (8,50,99): assert_right(model, folded, (torch.randn(2, 3, n),))
    for bad in (torch.randn(2, 3, 100),torch.randn(3, 3, 20)):
        with pytest.raises(Exception): folded.module()(bad)

def test_arguments_by_name_and_structures():
    torch.manual_seed(0)
    def f(self, x, *, more): return dict(a=self.norm(self.conv(x)), b=[self.last(self.conv2(more['y'])),more['n']])
    model = randomize_norms(Fn(f, **conv_norm(conv2=conv(), last=nn.BatchNorm2d(4))))
    (x,),kwargs = images(8),dict(more=dict(y=torch.randn(2, 3, 9, 9), n=3))
    program = exported(model, (x,), kwargs=kwargs)
    folded = BN_Folder().fold(program)
    assert_same_calls(program, folded)
    assert norms_in(folded)==[]
    a,b = model(x, **kwargs),folded.module()(x, **kwargs)
    assert a.keys()==b.keys() and b['b'][1]==3 and distance(tensors_of(b), tensors_of(a))<1e-5

def test_training_mode():
    model,xs = small()
    program = exported(model.train(), xs)
    for p in (program,program.run_decompositions()):
        folder = BN_Folder()
        folded = folder.fold(p)
        assert_same_calls(p, folded)
        assert folder.result.folded==[] and {k.norm for k in folder.result.kept}=={'1','4','7'}
        assert all('training mode' in k.reason for k in folder.result.kept)

def test_reasons_name_norms_by_their_weights():
    xs = images(8)
    plan = BN_Folder().plan(exported(Fn(two_readers, **conv_norm()).eval(), xs))
    assert names_of(plan.kept)==['norm'] and 'its input also feeds `relu`' in plan.kept[0].reason

def test_notes_on_calls_stay():
    "Where each call came from, which quantizers ask for."
    model,xs = small()
    program = exported(model, xs)
    folded = BN_Folder().fold(program)
    notes = {n.name:n.meta for n in program.graph.nodes}
    calls = [n for n in folded.graph.nodes if n.op=='call_function']
    assert len(calls)>3 and all(n.meta['nn_module_stack'] for n in calls)
    assert all(n.meta['val'].shape==notes[n.name]['val'].shape for n in calls)

# ---- Modules of programs

def test_module():
    torch.manual_seed(0)
    model,xs = small()
    program = exported(model, xs, dynamic_shapes=dims(xs))
    module = program.module()
    before = {k:t.clone() for k,t in module.state_dict().items()}
    for given in (module,module_of(module)):
        folded = BN_Folder().fold(given)
        assert is_program(folded) and isinstance(folded, torch.fx.GraphModule)
        assert norms_in(given)==['1','4','7'] and norms_in(folded)==['4']
        assert '1.weight' not in folded.state_dict() and '0.bias' in folded.state_dict()
        for n in (1,2,7):
            x = torch.randn(n, *xs[0].shape[1:])
            assert distance(outs(folded, (x,)), outs(model, (x,)))<1e-5
    assert all(torch.equal(t, before[k]) for k,t in module.state_dict().items())

def test_inputs_of_a_module_fix_no_size():
    model,xs = small()
    module = exported(model, xs, dynamic_shapes=dims(xs)).module()
    assert inputs_of(module).args[0].shape==xs[0].shape
    assert module(torch.randn(7, 3, 8, 8)).shape==(7,5)

# ---- What is refused

def branch(self, x): return torch.cond(x.sum()>0, lambda x: self.norm(self.conv(x)), lambda x: self.conv(x), (x,))

def test_refused():
    model,xs = small()
    program = exported(model, xs)
    for fold,why in [
        (lambda: BN_Folder().fold(program, inplace=True), 'never changed in place'),
        (lambda: BN_Folder(keep='0').fold(program), '`keep` are for models'),
        (lambda: BN_Folder(channels_last=True).plan(program), '`channels_last`'),
        (lambda: BN_Folder().fold(program, torch.randn(2, 4, 8, 8)), 'does not run on the sample'),
        (lambda: BN_Folder().fold(exported(Fn(branch, **conv_norm()).eval(), xs)), 'runs a graph inside its graph'),
        (lambda: BN_Folder().fold(nn.Sequential(program.module()), xs), 'Fold the model that it was exported from')]:
        with pytest.raises(FoldError, match=why): fold()

def test_nothing_to_undo():
    model,xs = small()
    folder = BN_Folder()
    folder.fold(exported(model, xs))
    for again in (folder.undo,folder.refold):
        with pytest.raises(FoldError, match='There is nothing to'): again()

def test_samples():
    model,xs = small()
    program = exported(model, xs, dynamic_shapes=dims(xs))
    for given in (dict(sample=torch.randn(5, 3, 8, 8)),dict(samples=[xs,images(8, 3)])): assert norms_in(BN_Folder().fold(program, **given))==['4']

# ---- Where a program goes

def pt2e():
    "`prepare_pt2e`, `convert_pt2e` and a quantizer, wherever they are installed."
    for home,at in ('torchao.quantization.pt2e','torchao.testing.pt2e._xnnpack_quantizer'),('torch.ao.quantization','torch.ao.quantization.quantizer.xnnpack_quantizer'):
        try: m,q = importlib.import_module(f'{home}.quantize_pt2e'),importlib.import_module(at)
        except ImportError: continue
        return m.prepare_pt2e,m.convert_pt2e,q.XNNPACKQuantizer().set_global(q.get_symmetric_quantization_config())
    pytest.skip('needs torchao')

@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', ['vision','levit'])
def test_quantized(name, tmp_path):
    prepare,convert,quantizer = pt2e()
    torch.manual_seed(0)
    model,xs = MODELS[name](tmp_path)
    randomize_norms(model)
    folded = BN_Folder().fold(exported(model, xs, dynamic_shapes=dims(xs)))
    prepared = prepare(folded.module(), quantizer)
    prepared(*xs)
    quantized = convert(prepared)
    assert norms_in(quantized)==[] and any('quantize_per' in str(n.target) for n in quantized.graph.nodes)
    assert distance(outs(quantized, xs), outs(model, xs))<.5
    again = exported(quantized, xs)
    assert norms_in(saved(again))==[]

def test_compiled_ahead():
    "Decomposed for a backend afterwards, the program computes the same."
    model,xs = small()
    folded = BN_Folder().fold(exported(model, xs, dynamic_shapes=dims(xs)))
    lowered = folded.run_decompositions()
    assert norms_in(lowered)==['4']
    assert_right(model, lowered, (torch.randn(5, 3, 8, 8),))
    assert not copy.deepcopy(lowered.graph).find_nodes(op='call_module')

# ---- On the command line

@pytest.fixture(scope='session')
def box(tmp_path_factory):
    "A folder with a program that has three norms, of which one stays"
    path = tmp_path_factory.mktemp('programs')
    torch.manual_seed(0)
    model,xs = small()
    torch.export.save(exported(model, xs, dynamic_shapes=dims(xs)), path/'model.pt2')
    torch.export.save(exported(model, xs), path/'fixed.pt2')
    return path

def test_fold_on_the_command_line(box, tmp_path):
    before,out = tree(box),tmp_path/'folded.pt2'
    res = call('fold', box/'model.pt2', '-o', out, '--report', tmp_path/'report.html')
    assert res.exit_code==0 and 'Folded 2 of 3 normalization layers' in res.stdout and 'read back, it computes the same' in res.stdout, res.output
    folded,model = torch.export.load(out),torch.export.load(box/'model.pt2')
    assert norms_in(folded)==['4'] and {o.name for o in tmp_path.iterdir()}=={'folded.pt2','report.html'}
    x = torch.randn(5, 3, 8, 8)
    assert distance(outs(folded.module(), (x,)), outs(model.module(), (x,)))<1e-5
    assert_refused(call('fold', box/'model.pt2', '-o', out), '--force')
    assert_refused(call('fold', box/'model.pt2', '-o', box/'model.pt2', '--force'), 'never overwritten')
    for a,b in ('model.pt2','folded.pkl'),('model.pt2','folded.safetensors'),('export.pkl','other.pt2'):
        assert_refused(call('fold', box/a, '-o', tmp_path/b, '--trust'), 'let both names end in .pt2')
    assert tree(box)==before

def test_plan_and_bench(box, only_eager):
    res = json.loads(call('plan', box/'model.pt2', '--json').stdout)
    assert res['norms']==dict(found=3, folded=2, merged=0, kept=1) and res['sample'].startswith('what it was exported with, (')
    for name,sizes in ('model',['1 item','batch of 4']),('fixed',['batch of 2']):
        res = call('bench', box/f'{name}.pt2', '--batch', '4', '--json')
        assert res.exit_code==0 and [*json.loads(res.stdout)['latency']]==sizes, res.output
    assert_refused(call('plan', box/'model.pt2', '--sample', box/'model.pt2'), 'leave --sample out')

def test_check_programs(box, tmp_path):
    call('fold', box/'model.pt2', '-o', tmp_path/'folded.pt2')
    for file,n in (box/'model.pt2',3),(tmp_path/'folded.pt2',1):
        for norms,code in (0,1),(n-1,1),(n,0),(n+1,0):
            res = call('check', file, '--norms', norms, '--json')
            got = json.loads(res.stdout)
            assert res.exit_code==code and got['norms']==dict(left=n, allowed=norms) and got['input']==str(file)
            assert {o['norm'] for o in got['left']}==({'1','4','7'} if n==3 else {'4'}) and all(o['reason'] for o in got['left'])
    res = call('check', tmp_path/'folded.pt2')
    assert res.exit_code==1 and '1 norm is left, 0 are allowed.' in res.stdout and 'does not let a shift pass' in res.stdout

def test_check_what_cannot_be_planned(tmp_path):
    torch.export.save(exported(Fn(branch, **conv_norm()).eval(), images(8)), tmp_path/'branch.pt2')
    torch.export.save(exported(net(conv(), nn.ReLU()), images(8)), tmp_path/'none.pt2')
    res = call('check', tmp_path/'branch.pt2')
    assert res.exit_code==1 and 'a graph inside its graph' in res.stdout
    res = call('check', tmp_path/'none.pt2')
    assert res.exit_code==0 and '0 norms are left' in res.stdout

def test_check_onnx(tmp_path):
    pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    model,xs = small()
    torch.onnx.export(BN_Folder().fold(model, xs), xs, tmp_path/'model.onnx', dynamo=True, verbose=False)
    for norms,code in (0,1),(1,0):
        res = call('check', tmp_path/'model.onnx', '--norms', norms, '--json')
        assert res.exit_code==code and json.loads(res.stdout)['left']==[dict(norm='4', reason='')], res.output

def test_check_learners(tmp_path):
    learn = KINDS['vision'](tmp_path)
    randomize_norms(learn.model)
    learn.export(tmp_path/'export.pkl')
    n = BN_Folder().plan(learn.model).calls
    res = call('check', tmp_path/'export.pkl', '--trust', '--json')
    assert res.exit_code==1 and json.loads(res.stdout)['norms']==dict(left=n, allowed=0) and n>0
    assert call('check', tmp_path/'export.pkl', '--trust', '--norms', n).exit_code==0
    assert_refused(call('check', tmp_path/'export.pkl'), '--trust')

class Harmful:
    def __reduce__(self): return exec, ("raise SystemExit('ran')",)

def test_check_refuses(box, tmp_path):
    for name in 'half.pt2','half.onnx': (tmp_path/name).write_bytes((box/'model.pt2').read_bytes()[:1000])
    assert_refused(call('check', tmp_path/'none.pt2'), 'does not exist')
    assert_refused(call('check', tmp_path/'half.pt2'), 'torch.export.save')
    assert_refused(call('check', tmp_path/'half.onnx'), 'ONNX')
    with zipfile.ZipFile(box/'model.pt2') as old, zipfile.ZipFile(tmp_path/'odd.pt2', 'w') as new:
        for o in old.namelist(): new.writestr(o, old.read(o))
        new.writestr('model/data/constants/opaque_obj_0', pickle.dumps(Harmful()))
    assert_refused(call('check', tmp_path/'odd.pt2'), '--trust')
