"The command line: what it writes, what it refuses, and what it says then."
import importlib, inspect, json, os, pickle, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest, torch, timm
from fastai.vision.all import (ConvLayer,CrossEntropyLossFlat,ImageDataLoaders,Learner,Normalize,ResBlock,Resize,accuracy,create_head,get_image_files,
    imagenet_stats,load_learner,set_seed)
from torch import nn
from typer.testing import CliRunner
from safetensors.torch import save_model
import fasterfold
from fasterfold.cli import app,digit_images
from fasterfold.proof import distance,run,to_double
from fasterfold.fold import BN_Folder
from fasterfold.load import fold_like
from helpers import count_norm_calls,randomize_norms

pytestmark = pytest.mark.filterwarnings('ignore:load_learner')
# click before 8.2 mixes both outputs, unless told not to; later it has no such argument
runner = CliRunner(**{k:False for k in inspect.signature(CliRunner).parameters if k=='mix_stderr'})
command = Path(sys.executable).parent/'fasterfold'

def call(*args): return runner.invoke(app, [str(a) for a in args])

def call_process(*args, cwd, **env):
    "The command as a shell runs it"
    return in_shell([command, *map(str, args)], cwd, **env)

def in_shell(args, cwd, **env):
    "Run `args`. Older releases of PyTorch write a line to stderr where they find a CUDA compiler and no GPU: it is none of ours"
    res = subprocess.run(args, cwd=cwd, env=os.environ|{'OMP_NUM_THREADS':'1'}|env, capture_output=True, text=True)
    res.stderr = re.sub('^No CUDA runtime is found, .*\n', '', res.stderr, flags=re.M)
    return res

def tree(path):
    "All files under a folder with their bytes"
    return {p.relative_to(path): p.read_bytes() for p in path.rglob('*') if p.is_file()}

def assert_refused(res, *words, code=2):
    "One line on stderr with all of `words`, nothing on stdout"
    assert res.exit_code==code, res.output
    assert res.stdout=='' and res.stderr.count('\n')==1 and res.stderr.startswith('fasterfold: '), res.output
    for w in words: assert w in res.stderr

def assert_close_to_float64(model, folded, x):
    "`folded` is as close to a float64 run of `model` as that is itself"
    exact = run(to_double(model), x.double())
    own,got = (distance(run(m, x), exact) for m in (model,folded))
    assert got<=10*own, (got,own)

@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    "A folder with `export.pkl`, a trained learner, and some of the images it was trained on"
    path = tmp_path_factory.mktemp('cli')
    digit_images(path/'all')
    for f in sorted(get_image_files(path/'all'))[::30]:
        (path/'some'/f.parent.name).mkdir(parents=True, exist_ok=True)
        f.rename(path/'some'/f.parent.name/f.name)
    shutil.rmtree(path/'all')
    set_seed(42)
    dls = ImageDataLoaders.from_folder(path/'some', valid_pct=0.2, seed=42, bs=16, num_workers=0, item_tfms=Resize(16), device='cpu')
    body = nn.Sequential(ConvLayer(3, 8), nn.Dropout(0.1), ConvLayer(8, 16, stride=2), ResBlock(1, 16, 16))
    learn = Learner(dls, nn.Sequential(body, create_head(16, 10)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    randomize_norms(learn.model)
    learn.export()
    return path

@pytest.fixture
def box(exported, tmp_path):
    "A folder of its own with `export.pkl` and an image"
    shutil.copy(exported/'export.pkl', tmp_path)
    shutil.copy(next((exported/'some'/'3').iterdir()), tmp_path/'image.png')
    return tmp_path

@pytest.fixture(scope='session')
def small_timm(tmp_path_factory):
    "A small model of timm with three classes, and a folder with its weights in both formats"
    path = tmp_path_factory.mktemp('timm')
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model('resnet10t', num_classes=3))
    torch.save(model.state_dict(), path/'weights.pth')
    save_model(model, str(path/'weights.safetensors'))
    return model,path

# What the commands do

@pytest.mark.parametrize('args', [[], ['plan'], ['fold'], ['bench'], ['demo']], ids=lambda a: a[0] if a else 'all')
def test_help(args):
    res = call(*args, '--help')
    assert res.exit_code==0
    for w in (['Examples', '--json'] if args else ['plan', 'fold', 'bench', 'demo', 'Exit codes']): assert w in res.output

def test_version():
    res = call('--version')
    assert res.exit_code==0 and res.stdout==f'fasterfold {fasterfold.__version__}\n' and res.stderr==''
    assert call('--version', 'plan', 'none.pkl').stdout==res.stdout # whatever else is asked
    assert call('plan', '--version').exit_code==2

@pytest.mark.parametrize('asked', ['--help','--version','plan --help'])
def test_some_answers_do_not_wait_for_torch(tmp_path, asked):
    code = f"""import sys; from fasterfold.cli import app
try: app({asked.split()})
finally: print({{'torch','fastai','timm','numpy'}} & set(sys.modules))"""
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==0 and res.stdout.splitlines()[-1]=='set()', res.stderr

def test_plan(box):
    before = tree(box)
    res = call('plan', box/'export.pkl', '--trust')
    assert res.exit_code==0, res.output
    assert res.stdout.startswith('6 of 6 norms fold')
    rows = [l.split() for l in res.stdout.splitlines()]
    assert ['norm','plan','into','/','because'] in rows
    assert ['0.0.1','folded','back','0.0.0'] in rows
    assert tree(box)==before

def test_a_part_is_kept(box):
    res = call('plan', box/'export.pkl', '--trust', '--keep', '1', '--keep', '0.0')
    assert res.exit_code==0 and res.stdout.startswith('6 of 6 norms fold'), res.output
    for name in ('0.0.0','0.0.1'): assert call('plan', box/'export.pkl', '--trust', '--keep', name).exit_code==0
    assert "`keep` asks for what `0.0.0` returns" in call('plan', box/'export.pkl', '--trust', '--keep', '0.0.0').stdout
    assert_refused(call('plan', box/'export.pkl', '--trust', '--keep', 'body'), "`keep='body'`", code=1)

def test_normalization_goes_along(box, only_eager):
    "Into the file; whoever loads it predicts the same, and the loaders normalize no more."
    learn = load_learner(box/'export.pkl')
    learn.path = box
    for dl in learn.dls.loaders: dl.after_batch.add(Normalize.from_stats(*imagenet_stats, cuda=False))
    learn.export('normalizing.pkl')
    want = learn.predict(box/'image.png')
    plan = call('plan', box/'normalizing.pkl', '--trust', '--normalize')
    assert plan.exit_code==0 and 'normalize  kept' in re.sub(' +', '  ', plan.stdout) and 'no longer normalize' in plan.stdout, plan.output
    for sample in ([],['--sample', box/'image.png']):
        res = call('fold', box/'normalizing.pkl', '-o', box/'raw.pkl', '--trust', '--normalize', '--force', *sample)
        assert res.exit_code==0 and 'read back' in res.stdout, res.output
        new = load_learner(box/'raw.pkl')
        got = new.predict(box/'image.png')
        assert got[0]==want[0] and distance([got[2]], [want[2]])<1e-4
        assert not [f for dl in new.dls.loaders for f in dl.after_batch.fs if isinstance(f, Normalize)] and type(new.model.normalize) is nn.BatchNorm2d
    assert call('bench', box/'normalizing.pkl', '--trust', '--normalize', '--batch', '2').exit_code==0
    assert_refused(call('fold', box/'export.pkl', '-o', box/'none.pkl', '--trust', '--normalize'), 'have no `Normalize`', code=1)
    assert not (box/'none.pkl').exists()

def test_options_of_a_folder(box):
    res = call('fold', box/'export.pkl', '-o', box/'folded.pkl', '--trust', '--strip-dropout', '--strip-identity', '--channels-last', '--sample', box/'image.png')
    assert res.exit_code==0 and 'channels_last weights are ' in res.stdout, res.output
    model = load_learner(box/'folded.pkl').model
    used = {m.weight.is_contiguous(memory_format=torch.channels_last) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert used=={': used.' in res.stdout}
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)] and [*model[0]._modules]==['0','2','3']
    assert load_learner(box/'folded.pkl').predict(box/'image.png')[0]==load_learner(box/'export.pkl').predict(box/'image.png')[0]

def test_plan_json(box):
    res = json.loads(call('plan', box/'export.pkl', '--trust', '--sample', box/'image.png', '--json').stdout)
    assert res['norms']==dict(found=6, folded=6, merged=0, kept=0)
    assert len(res['layers'])==6 and {o['result'] for o in res['layers']}=={'folded'}
    assert {o['direction'] for o in res['layers']}=={'back','forward'}

def test_fold(box):
    export = (box/'export.pkl').read_bytes()
    res = call('fold', box/'export.pkl', '-o', box/'folded.pkl', '--trust', '--sample', box/'image.png', '--report', box/'report.html')
    assert res.exit_code==0, res.output
    assert 'Folded 6 of 6' in res.stdout and 'read back' in res.stdout
    assert set(tree(box))==set(map(Path, ['export.pkl','folded.pkl','image.png','report.html']))
    assert (box/'export.pkl').read_bytes()==export
    old,new = (load_learner(box/f) for f in ('export.pkl','folded.pkl'))
    x = old.dls.test_dl([box/'image.png']).one_batch()[0]
    assert_close_to_float64(old.model, new.model, x)
    assert count_norm_calls(old.model, x)==6 and count_norm_calls(new.model, x)==0
    assert old.predict(box/'image.png')[0]==new.predict(box/'image.png')[0]
    assert (box/'folded.pkl').stat().st_mode==(box/'export.pkl').stat().st_mode
    page = (box/'report.html').read_text(encoding='utf8')
    assert 'Folded 6 of 6' in page and page.count('<tr>')>6

def test_nothing_left_to_fold(box):
    learn = load_learner(box/'export.pkl')
    BN_Folder().fold(learn.model, inplace=True)
    torch.save(learn, box/'folded.pkl')
    res = call('fold', box/'folded.pkl', '-o', box/'again.pkl', '--trust')
    assert res.exit_code==0 and 'nothing to fold' in res.stdout
    a,b = (load_learner(box/f).model.state_dict() for f in ('folded.pkl','again.pkl'))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_fold_in_a_shell(box):
    "The installed command: results on stdout, nothing on stderr, and a file that loads and predicts without the package"
    res = call_process('fold', 'export.pkl', '-o', 'folded.pkl', '--trust', '--json', cwd=box)
    assert res.returncode==0 and res.stderr=='', res.stderr
    got = json.loads(res.stdout)
    assert got['norms']==dict(found=6, folded=6, merged=0, kept=0) and got['output']=='folded.pkl'
    assert got['parameters']['after']<got['parameters']['before'] and got['bytes']==(box/'folded.pkl').stat().st_size
    code = '''import sys; sys.modules['fasterfold'] = None
from fastai.learner import load_learner
print(load_learner('folded.pkl').predict('image.png')[0], load_learner('export.pkl').predict('image.png')[0])'''
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=box, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    a,b = res.stdout.split()[-2:]
    assert a==b

def test_bench(box, only_eager):
    before = tree(box)
    res = call('bench', box/'export.pkl', '--trust', '--batch', 4)
    assert res.exit_code==0, res.output
    assert res.stdout.startswith('6 of 6 norms fold') and '1 item is (1,3,16,16); batch of 4 is (4,3,16,16).' in res.stdout
    assert tree(box)==before

def test_bench_json(box, small_timm, only_eager):
    def latencies(*args): return json.loads(call('bench', *args, '--batch', 4, '--json').stdout)['latency']
    for res in latencies(box/'export.pkl', '--trust'), latencies('--timm', 'resnet10t', '--weights', small_timm[1]/'weights.pth'):
        assert [*res]==['1 item','batch of 4'] and all(group['eager'][k]['median']>0 for group in res.values() for k in ('original','folded'))

def test_inputs_are_named(box, small_timm):
    "Made up by the learner's own transforms, which resize to 16 pixels; a file by its name; numbers as what they are."
    learner,weights = [box/'export.pkl','--trust'],['--timm','resnet10t','--weights',small_timm[1]/'weights.pth']
    for args,said in [(learner, "a made-up image through the learner's own transforms, (1,3,16,16)"), ([*learner,'--sample',box/'image.png'], 'image.png, (1,3,16,16)'),
        (weights, 'random numbers, (2,3,176,176)'), ([*weights,'--sample',box/'image.png'], 'image.png, (1,3,176,176)')]:
        assert json.loads(call('plan', *args, '--json').stdout)['sample']==said
    assert call('plan', *learner).stdout.endswith("\n\nInput: a made-up image through the learner's own transforms, (1,3,16,16).\n")
    assert '\nInput: image.png, (1,3,16,16).\nWrote' in call('fold', *learner, '-o', box/'folded.pkl', '--sample', box/'image.png').stdout

# What they refuse

@pytest.mark.parametrize('command', ['plan','fold','bench'])
def test_pickles_need_trust(box, command):
    "Not a line of a pickle's code runs without --trust"
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(box/'pwned'),))
    (box/'evil.pkl').write_bytes(pickle.dumps(Evil()))
    args = ['-o', box/'folded.pkl'] if command=='fold' else []
    assert_refused(call(command, box/'evil.pkl', *args), '--trust', 'runs the code')
    assert not (box/'pwned').exists() and not (box/'folded.pkl').exists()

def test_weights_run_no_code(box):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(box/'pwned'),))
    torch.save({'fc.weight': Evil()}, box/'evil.pth')
    assert_refused(call('plan', '--timm', 'resnet10t', '--weights', box/'evil.pth', '--trust'), 'evil.pth', 'weights alone')
    assert not (box/'pwned').exists()

def missing(box): pass
def folder(box): (box/'bad.pkl').mkdir()
def empty(box): (box/'bad.pkl').touch()
def text(box): (box/'bad.pkl').write_text('These are not the bytes you are looking for.\n')
def half(box): (box/'bad.pkl').write_bytes((box/'export.pkl').read_bytes()[:-2000])
def head(box): (box/'bad.pkl').write_bytes((box/'export.pkl').read_bytes()[:50])
def weights(box): torch.save(load_learner(box/'export.pkl').model.state_dict(), box/'bad.pkl')
def model(box): torch.save(load_learner(box/'export.pkl').model, box/'bad.pkl')

@pytest.mark.parametrize('make,words', [(missing, ['does not exist']), (folder, ['not a file']), (empty, ['learn.export()']), (text, ['learn.export()']),
    (half, ['learn.export()']), (head, ['learn.export()']), (weights, ['OrderedDict','not a Learner']), (model, ['Sequential','not a Learner'])])
def test_bad_file(box, make, words):
    make(box)
    before = tree(box)
    for args in (['plan'], ['fold', '-o', box/'folded.pkl', '--report', box/'report.html'], ['bench']):
        assert_refused(call(args[0], box/'bad.pkl', '--trust', *args[1:]), 'bad.pkl', *words)
    assert tree(box)==before

def test_bad_file_in_a_shell(box):
    half(box)
    res = call_process('fold', 'bad.pkl', '-o', 'folded.pkl', '--trust', cwd=box)
    assert res.returncode==2 and res.stdout=='' and res.stderr.count('\n')==1, res.stderr
    assert not (box/'folded.pkl').exists()

def test_missing_classes(box, monkeypatch):
    "A model whose module is not here, or no longer has the class; the recipe in the message works"
    module = box/'lib'/'my_layers.py'
    module.parent.mkdir()
    module.write_text('from torch import nn\nclass Scale(nn.Conv2d): pass\n')
    def forget():
        sys.modules.pop('my_layers', None)
        importlib.invalidate_caches()
    fold = lambda: call('fold', box/'mine.pkl', '-o', box/'folded.pkl', '--trust')
    with monkeypatch.context() as m:
        m.syspath_prepend(module.parent)
        learn = load_learner(box/'export.pkl')
        learn.model[0][0][0].__class__ = importlib.import_module('my_layers').Scale
        torch.save(learn, box/'mine.pkl')
    forget()
    assert_refused(fold(), 'my_layers', 'PYTHONPATH')
    assert not (box/'folded.pkl').exists()
    monkeypatch.syspath_prepend(module.parent)
    assert fold().exit_code==0 and (box/'folded.pkl').exists()
    forget()
    module.write_text('Scale_was_here = True\n')
    assert_refused(fold(), '--force')
    assert_refused(call('plan', box/'mine.pkl', '--trust'), 'Scale', 'PYTHONPATH')

def test_never_overwrites(box):
    (box/'folded.pkl').write_text('precious')
    (box/'report.html').write_text('precious')
    (box/'link.pkl').symlink_to(box/'export.pkl')
    os.link(box/'export.pkl', box/'hard.pkl')
    before = tree(box)
    fold = lambda *args: call('fold', box/'export.pkl', '--trust', '--sample', box/'image.png', *args)
    assert_refused(fold('-o', box/'folded.pkl'), '--force')
    assert_refused(fold('-o', box/'new.pkl', '--report', box/'report.html'), '--force')
    for o in 'export.pkl','link.pkl','hard.pkl','image.png': assert_refused(fold('-o', box/o, '--force'), 'never overwritten')
    assert_refused(fold('-o', box/'new.pkl', '--report', box/'export.pkl', '--force'), 'never overwritten')
    assert_refused(fold('-o', box/'new.pkl', '--report', box/'new.pkl'), 'two outputs')
    assert_refused(fold('-o', box/'none'/'new.pkl'), 'not a folder')
    assert_refused(fold('-o', box), 'is a folder')
    assert_refused(fold('-o', box/'new.safetensors'), '.pkl')
    assert tree(box)==before
    assert fold('-o', box/'folded.pkl', '--report', box/'report.html', '--force').exit_code==0
    after = tree(box)
    assert after.keys()==before.keys() and after[Path('export.pkl')]==before[Path('export.pkl')]
    assert zipfile.is_zipfile(box/'folded.pkl') and b'Folded 6 of 6' in after[Path('report.html')]

class Forgetful(nn.Linear):
    "Is not the same when it comes back from a file"
    def __setstate__(self, state):
        super().__setstate__(state)
        self.weight.data.mul_(1.01)

class Moody(nn.Module):
    "Is not the same twice"
    n = 0
    def forward(self, x):
        Moody.n += 1
        return x*Moody.n

class Picky(nn.Module):
    "Takes no input that could be made up"
    def forward(self, x, n): return x

def exported_with(box, layer, name='odd.pkl'):
    "The learner in `export.pkl` with another layer behind its model"
    learn = load_learner(box/'export.pkl')
    learn.model.append(layer)
    torch.save(learn, box/name)
    return box/name

@pytest.mark.parametrize('layer,code,words', [(Forgetful(10, 10), 1, ['Nothing was written']), (Moody(), 1, ['deterministic']), (Picky(), 2, ['--sample'])],
    ids=['forgetful','moody','picky'])
def test_what_fails_is_not_written(box, layer, code, words):
    odd = exported_with(box, layer)
    before = tree(box)
    assert_refused(call('fold', odd, '-o', box/'folded.pkl', '--report', box/'report.html', '--trust'), *words, code=code)
    assert tree(box)==before

def test_bad_sample(box):
    assert_refused(call('plan', box/'export.pkl', '--trust', '--sample', box/'none.png'), 'none.png', 'does not exist')
    assert_refused(call('plan', box/'export.pkl', '--trust', '--sample', box/'export.pkl'), 'give an image')

def test_one_model_at_a_time(box, small_timm):
    both = ['--timm', 'resnet10t', '--weights', small_timm[1]/'weights.pth']
    for args in [[], [box/'export.pkl', '--trust', *both], both[:2], both[2:], [box/'export.pkl', '--trust', *both[2:]]]:
        assert_refused(call('plan', *args), 'Give either')

# Weights alone

def test_timm_plan(small_timm):
    res = json.loads(call('plan', '--timm', 'resnet10t', '--weights', small_timm[1]/'weights.safetensors', '--json').stdout)
    assert res['norms']['found']==res['norms']['folded']>0

def test_full_disk(box):
    "No file may grow beyond 100 kilobytes, which the folded learner does: half of it must not be left."
    before,args = tree(box),'export.pkl -o folded.pkl --trust --sample image.png --report report.html'
    res = in_shell(['bash','-c',f'ulimit -f 100; {command} fold {args}'], box)
    assert res.returncode==1 and 'make room' in res.stderr and res.stderr.count('\n')==1, res.stderr
    assert tree(box)==before

@pytest.mark.parametrize('suffix', ['pth','safetensors'])
def test_timm_weights(small_timm, tmp_path, box, suffix):
    "What is written fits a new model, by `fold_like`"
    model,path = small_timm
    res = call('fold', '--timm', 'resnet10t', '--weights', path/f'weights.{suffix}', '-o', tmp_path/f'folded.{suffix}', '--sample', box/'image.png', '--json')
    assert res.exit_code==0 and json.loads(res.stdout)['model']=='resnet10t', res.output
    new = fold_like(timm.create_model('resnet10t', num_classes=3), tmp_path/f'folded.{suffix}').eval()
    x = torch.randn(2, 3, 64, 64)
    assert_close_to_float64(model, new, x)
    assert count_norm_calls(new, x)==0

def test_timm_whole(small_timm, tmp_path):
    model,path = small_timm
    assert call('fold', '--timm', 'resnet10t', '--weights', path/'weights.pth', '-o', tmp_path/'folded.pkl').exit_code==0
    assert_close_to_float64(model, torch.load(tmp_path/'folded.pkl', weights_only=False), torch.randn(2, 3, 64, 64))

def test_timm_refusals(small_timm, tmp_path):
    path = small_timm[1]
    timm_plan = lambda name, file: call('plan', '--timm', name, '--weights', file)
    (tmp_path/'half.safetensors').write_bytes((path/'weights.safetensors').read_bytes()[:1000])
    (tmp_path/'half.pth').write_bytes((path/'weights.pth').read_bytes()[:1000])
    torch.save([1,2], tmp_path/'list.pth')
    assert_refused(timm_plan('resnet10', path/'weights.pth'), 'do you mean', 'resnet10t')
    assert_refused(timm_plan('resnet18', path/'weights.pth'), 'does not fit resnet18')
    assert_refused(timm_plan('resnet10t', tmp_path/'none.pth'), 'does not exist')
    for o in 'half.safetensors','half.pth','list.pth': assert_refused(timm_plan('resnet10t', tmp_path/o), o, 'weights alone')

# The demo

@pytest.mark.timeout(900) # trains for a minute of a free core
def test_demo(tmp_path):
    "The main job, as a user runs it"
    res = call_process('demo', '--json', cwd=tmp_path)
    assert res.returncode==0, res.stderr
    got = json.loads(res.stdout)
    assert got['norms']==dict(found=22, folded=22, merged=0, kept=0)
    assert got['images']==got['same']==359 and got['right']['before']==got['right']['after']>=0.85*359
    before,after = got['metrics']['accuracy'].values()
    assert before==after==pytest.approx(got['right']['before']/359)
    assert 'epoch' in res.stderr
    assert [o.name for o in tmp_path.iterdir()]==['folded.pkl']
    res = call_process('demo', cwd=tmp_path)
    assert res.returncode==2 and '--force' in res.stderr and res.stderr.count('\n')==1

def test_demo_on_other_images(exported, tmp_path):
    res = call('demo', '--data', exported/'some', '-o', tmp_path/'mine.pkl')
    assert res.exit_code==0, res.output
    n = len(get_image_files(exported/'some'))//5
    assert 'Folded 22 of 22' in res.stdout and f'same class as the original for all {n} validation images' in res.stdout
    assert count_norm_calls(load_learner(tmp_path/'mine.pkl').model, torch.randn(2, 3, 32, 32))==0

def test_demo_refusals(exported, tmp_path):
    demo = lambda data: call('demo', '--data', data, '-o', tmp_path/'folded.pkl')
    assert_refused(demo(tmp_path/'none'), 'not a folder')
    assert_refused(demo(exported/'some'/'3'), 'of 1 classes')
    (tmp_path/'empty').mkdir()
    assert_refused(demo(tmp_path/'empty'), '0 images')
    assert [o.name for o in tmp_path.iterdir()]==['empty']
