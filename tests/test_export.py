"Files for inference engines: they take what decoders give and say what `predict` says, at every size that they say is free, or they are not written."
import json, sys
from copy import deepcopy
import numpy as np, onnx, onnxruntime, pytest, timm, torch
from fastai.vision.all import (CategoryBlock,DiceMulti,Learner,MaskBlock,SimpleCNN,aug_transforms,load_learner,resnet18,unet_learner)
from torch import nn
from fasterfold import export as room
from fasterfold.all import FoldError
from fasterfold.export import Deployed,write_file
from fasterfold.fold import BN_Folder
from fasterfold.proof import distance
from helpers import randomize_norms
from learners import KINDS,image,images,mask
from test_cli import assert_refused,box,call,exported # chkstyle: ignore
from test_normalize import Patches,gray,grays,normalizing,rgb
from test_unfold import everything,same

pytestmark = pytest.mark.filterwarnings('ignore')

def made(learn):
    "`learn` with norms that do something."
    randomize_norms(learn.model)
    return learn

def in_onnx(file, **inputs): return [torch.from_numpy(o) for o in onnxruntime.InferenceSession(file).run(None, inputs)]
def in_torch(file, *inputs):
    with open(file, 'rb') as f: module = torch.export.load(f).module()
    return module(*map(torch.from_numpy, inputs))

def said(learn, pixels):
    "What `predict` says of some images."
    with learn.no_bar(): return torch.stack([learn.predict(o)[2] for o in pixels])

PIXELS = dict( # what gives a learner, whether its norms all go, the pixels of an item
    cnn=(lambda p: Learner(rgb(p, normalizing(), n=60), SimpleCNN([3,16,32,10])), image),
    no_normalization=(lambda p: Learner(images(p, CategoryBlock, n=60), SimpleCNN([3,16,32,10])), image),
    timm=(lambda p: Learner(rgb(p, normalizing(), *aug_transforms(), n=60), timm.create_model('resnet10t', num_classes=10)), image),
    patches=(lambda p: Learner(rgb(p, normalizing()), Patches()), image),
    one_channel=(lambda p: Learner(grays(p, normalizing(1)), SimpleCNN([1,16,32,10])), lambda i: gray(i)[...,None]))

@pytest.mark.parametrize('name', PIXELS)
def test_pixels_in_and_what_predict_says_out(name, tmp_path):
    make,pixels = PIXELS[name]
    learn = made(make(tmp_path))
    before,want = everything(learn),said(learn, range(5))
    x = np.stack([pixels(i) for i in range(5)])
    res = learn.fold_export(tmp_path/'m.onnx', uint8=True, nhwc=True)
    assert res.plan.folded and not [k for k in res.plan.kept if k.norm not in ('normalize','divide')]
    assert res.meta['inputs']['image']['dtype']=='uint8' and res.meta['inputs']['image']['shape'][0]=='batch'
    assert distance(in_onnx(tmp_path/'m.onnx', image=x), [want])<1e-4
    assert distance(in_onnx(tmp_path/'m.onnx', image=x[:1]), [want[:1]])<1e-4
    proto = onnx.load(tmp_path/'m.onnx')
    about = {o.key:json.loads(o.value) for o in proto.metadata_props}
    assert about['classes']==[*'0123456789'] and about['preprocessing']==['ToTensor'] and about['inputs']==res.meta['inputs']
    left = sum(o.op_type=='BatchNormalization' for o in proto.graph.node)
    assert left==('kept' in str(res.plan) and bool(res.plan.kept)), 'the shift of the normalization, at most'
    assert same(everything(learn), before) and torch.equal(said(learn, range(5)), want)

def test_a_program_of_pytorch(tmp_path):
    learn = made(PIXELS['cnn'][0](tmp_path))
    res = learn.fold_export(tmp_path/'m.pt2', normalize=True, nhwc=True)
    x = np.stack([image(i) for i in range(3)])
    assert distance([in_torch(tmp_path/'m.pt2', (x/255).astype('float32'))], [said(learn, range(3))])<1e-4
    files = {'metadata.json': ''}
    with open(tmp_path/'m.pt2', 'rb') as f: torch.export.load(f, extra_files=files)
    assert json.loads(files['metadata.json'])==res.meta
    assert res.meta['preprocessing']==['ToTensor',"IntToFloatTensor -- {'div': 255.0, 'div_mask': 1}"]

def test_images_of_other_sizes(tmp_path):
    "The model takes them, so the file does."
    learn = made(PIXELS['cnn'][0](tmp_path))
    assert learn.fold_export(tmp_path/'m.onnx').meta['inputs']==dict(image=dict(dtype='float32', shape=['batch',3,'height','width']))
    x = torch.randn(3, 3, 57, 40)
    with torch.no_grad(): want = learn.model.eval()(x).softmax(1)
    assert distance(in_onnx(tmp_path/'m.onnx', image=x.numpy()), [want])<1e-4

class Flat(nn.Module):
    "For images of one size."
    def __init__(self):
        super().__init__()
        self.conv,self.norm,self.head = nn.Conv2d(3, 8, 3),nn.BatchNorm2d(8),nn.Linear(8*30*30, 10)
    def forward(self, x): return self.head(self.norm(self.conv(x)).relu().flatten(1))

class Single(Flat):
    "For one image at a time."
    def forward(self, x): return super().forward(x) if int(x.shape[0])==1 else super().forward(x)+x.shape[0]

def test_what_is_not_free_is_not_said_to_be(tmp_path):
    learn = made(Learner(rgb(tmp_path, normalizing()), Flat()))
    res = learn.fold_export(tmp_path/'m.onnx')
    assert res.meta['inputs']['image']['shape']==['batch',3,32,32] and res.shapes==['(8,3,32,32)','(1,3,32,32)','(9,3,32,32)']
    learn = made(Learner(rgb(tmp_path, normalizing()), Single()))
    res = learn.fold_export(tmp_path/'m.onnx')
    assert res.meta['inputs']['image']['shape']==[1,3,32,32] and res.shapes==['(1,3,32,32)']

def test_unets(tmp_path):
    dls = images(tmp_path, MaskBlock(codes=['paper','ink']), n=24, bs=8, get_y=mask, batch_tfms=normalizing())
    learn = made(unet_learner(dls, resnet18, pretrained=False, normalize=False, n_out=2, metrics=DiceMulti()))
    learn.fold_export(tmp_path/'m.onnx', uint8=True)
    with learn.no_bar(): want = learn.get_preds(dl=dls.test_dl([0,1,2], num_workers=0))[0]
    x = np.stack([image(i) for i in range(3)]).transpose(0,3,1,2)
    assert distance(in_onnx(tmp_path/'m.onnx', image=x), [want])<1e-4
    learn.fold_bn() # its hooks keep nothing of the export

@pytest.mark.parametrize('name,inputs,output', [('tabular',['x_cat','x_cont'],'probabilities'), ('tabular_all_options',['x_cat','x_cont'],'output'), ('dict_output',['image'],'output_0')])
def test_names(name, inputs, output, tmp_path):
    learn = made(KINDS[name](tmp_path))
    res = learn.fold_export(tmp_path/'m.onnx')
    assert [*res.meta['inputs']]==inputs and [*res.meta['outputs']][0]==output
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    assert [o.name for o in session.get_inputs()]==inputs and [o.name for o in session.get_outputs()]==[*res.meta['outputs']]
    for o in session.get_inputs(): assert o.shape==res.meta['inputs'][o.name]['shape'] and o.shape[0]=='batch'

def test_items_to_compare_on(tmp_path):
    "An exported learner has no data; it is asked for."
    made(PIXELS['cnn'][0](tmp_path)).export('export.pkl')
    learn = load_learner(tmp_path/'export.pkl')
    with pytest.raises(FoldError, match='pass `items=`'): learn.fold_export(tmp_path/'m.pt2')
    assert learn.fold_export(tmp_path/'m.pt2', items=[3], uint8=True).shapes[0]=='(2,3,32,32)'

def refused(learn, file, *words, **kwargs):
    before,had = everything(learn),file.exists() and file.read_bytes()
    with pytest.raises(FoldError) as e: learn.fold_export(file, **kwargs)
    for w in words: assert w in str(e.value)
    assert same(everything(learn), before) and (file.exists() and file.read_bytes())==had
    assert not [o for o in file.parent.iterdir() if '.tmp' in o.name]

def test_what_no_file_can_do(tmp_path):
    file = tmp_path/'m.onnx'
    file.write_text('old')
    resized = Learner(rgb(tmp_path, normalizing(), *aug_transforms(size=16)), SimpleCNN([3,8,10]))
    refused(resized, file, 'do more to a batch of images', '`item_tfms`', "'size': 16", uint8=True)
    refused(resized, file, 'do more to a batch of images', normalize=True, uint8=True)
    refused(KINDS['siamese'](tmp_path), file, 'takes several', uint8=True)
    refused(KINDS['tabular'](tmp_path), file, 'is no image', nhwc=True)
    refused(KINDS['plain_learner'](tmp_path), file, 'make no floats of pixels', uint8=True)
    refused(KINDS['plain_learner'](tmp_path), tmp_path/'m.tflite', '.onnx and .pt2')
    resized.fold_export(file, normalize=False) # takes what the loaders have made

def test_an_engine_that_is_wrong(tmp_path, monkeypatch):
    learn = made(PIXELS['cnn'][0](tmp_path))
    write,read,engine = room.FORMATS['.pt2']
    monkeypatch.setitem(room.FORMATS, '.pt2', (write, lambda path: lambda *xs: read(path)(*xs)*1.001, engine))
    refused(learn, tmp_path/'m.pt2', 'PyTorch computes something else')
    def failing(*args): raise OSError('no space left')
    monkeypatch.setitem(room.FORMATS, '.pt2', (failing, read, engine))
    refused(learn, tmp_path/'m.pt2', 'no space left')
    def pressed(*args): raise KeyboardInterrupt
    monkeypatch.setitem(room.FORMATS, '.pt2', (pressed, read, engine))
    before = everything(learn)
    with pytest.raises(KeyboardInterrupt): learn.fold_export(tmp_path/'m.pt2')
    assert same(everything(learn), before) and not [*tmp_path.glob('*m.pt2*')]

@pytest.mark.parametrize('missing', ['onnxscript','onnxruntime'])
def test_packages_that_are_missing(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    refused(made(KINDS['plain_learner'](tmp_path)), tmp_path/'m.onnx', missing, 'fasterfold[onnx]')

def test_batch_of_one_and_half_precision(tmp_path):
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval())
    for m,x in ((model,torch.randn(1,3,8,8)), (deepcopy(model).half(),torch.randn(1,3,8,8).half())):
        folder = BN_Folder()
        res = write_file(tmp_path/'m.pt2', Deployed(m), Deployed(folder.fold(m, x)), (x,), folder.result)
        assert res.meta['inputs']['image']['shape'][0]=='batch'
        with torch.no_grad(): assert distance([in_torch(tmp_path/'m.pt2', x.numpy())], [m(x)])<100*torch.finfo(x.dtype).eps

def test_command(box):
    learn = load_learner(box/'export.pkl')
    res = call('export', box/'export.pkl', '-o', box/'m.onnx', '--trust', '--uint8', '--nhwc', '--sample', box/'image.png')
    assert res.exit_code==0 and 'batch × height × width × 3' in res.stdout, res.output
    pixels = learn.dls.test_dl([box/'image.png']).do_item(0)[0].numpy().transpose(1,2,0)[None] # as resized
    assert distance(in_onnx(box/'m.onnx', image=pixels), [learn.predict(box/'image.png')[2][None]])<1e-4
    res = call('export', box/'export.pkl', '-o', box/'m.pt2', '--trust', '--json', '--sample', box/'image.png')
    found = json.loads(res.stdout)
    assert found['norms']['folded']==6 and found['inputs']['image']['dtype']=='float32' and found['compared']['engine']=='PyTorch' and found['bytes']==(box/'m.pt2').stat().st_size
    assert 'a made-up image through' in call('export', box/'export.pkl', '-o', box/'m.pt2', '--trust', '--uint8', '--force').stdout
    assert_refused(call('export', box/'export.pkl', '-o', box/'m.onnx', '--trust'), 'exists already')
    assert_refused(call('export', box/'export.pkl', '-o', box/'m.tflite', '--trust', '--sample', box/'image.png'), '.onnx and .pt2', code=1)
    assert_refused(call('fold', box/'export.pkl', '-o', box/'folded.onnx', '--trust'), 'fasterfold export', '.safetensors')

def test_commands_for_models_that_are_no_learners(tmp_path):
    model = randomize_norms(timm.create_model('resnet10t', num_classes=3)).eval()
    torch.save(model.state_dict(), tmp_path/'w.pth')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): want = model(x)
    res = call('export', '--timm', 'resnet10t', '--weights', tmp_path/'w.pth', '-o', tmp_path/'m.onnx', '--json')
    assert res.exit_code==0 and json.loads(res.stdout)['norms']['kept']==0, res.output
    assert distance(in_onnx(tmp_path/'m.onnx', image=x.numpy()), [want])<1e-4
    program = torch.export.export(model, (x,), dynamic_shapes=({0:torch.export.Dim('batch')},))
    torch.export.save(program, tmp_path/'p.pt2')
    res = call('export', tmp_path/'p.pt2', '-o', tmp_path/'p.onnx', '--json')
    assert res.exit_code==0 and json.loads(res.stdout)['inputs']['image']['shape']==['batch',3,64,64], res.output
    assert distance(in_onnx(tmp_path/'p.onnx', image=x.numpy()), [want])<1e-4
    assert_refused(call('export', tmp_path/'p.pt2', '-o', tmp_path/'q.onnx', '--uint8'), 'for learners')
