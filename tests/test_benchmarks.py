"The benchmarks run, and write what they say they write; how fast anything is, no test says."
import json, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from fasterfold.fold import BN_Folder
from helpers import tells_conditions

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'benchmarks'))
import certify, latency, peers, planning, random_folds, random_networks, validation, zoo
from common import chain, slope

def measured(script, out, *args):
    "What `script` writes to `out` when it is run with `args` in short turns, and the page beside it"
    cmd = [sys.executable, root/'benchmarks'/f'{script}.py', '--tools', 'fasterfold', '--quick', '--out', out, *args]
    res = subprocess.run(cmd, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    def _constant(o): raise ValueError(f'{o} is no JSON')
    return json.loads(out.read_text(), parse_constant=_constant), out.with_suffix('.md').read_text()

def test_fold(tmp_path):
    res,page = measured('fold', tmp_path/'fold.json', '--models', 'resnet18', '--size', '32', '--batches', '1', '--tools', 'torch.fx,fasterfold')
    assert res['environment']['threads']==1 and 'torch' in res['environment']['releases']
    (speed,),(memory,),(depth,),(width,) = (res[k] for k in ('speed','memory','depth','width'))
    assert speed['model']==memory['model']=='resnet18' and speed['norms']==20
    assert set(speed['seconds'])=={'torch.fx','fasterfold','fasterfold in place','fasterfold without proof','run original','run folded'}
    assert speed['fastest']=='torch.fx' and set(speed['against'])=={'torch.fx','fasterfold'} and len(speed['ratio'])==3
    assert memory['leaked']==0 < memory['held'] <= memory['fold'] and 0<memory['edited']<=memory['parameters']
    assert depth['depth']==100 and width['width']==64
    assert '| resnet18 | 1 | 20 |' in page and 'with a batch of 1' in page

def test_planning(tmp_path):
    out = tmp_path/'new'/'planning.json' # the folder is made
    planning.main.__wrapped__(quick=True, out=out)
    res,page = json.loads(out.read_text()),out.with_suffix('.md').read_text()
    assert [r['kind'] for r in res['planning']]==[*planning.kinds] and all(0<r['median'] and 0<=r['folded']<=r['norms'] for r in res['planning'])
    assert [(r['which'],r['norms'],r['failing']) for r in res['proofs']]==[('one',8,1),('half',8,4),('all',8,8)]
    assert f"| 8 | 8 | {res['proofs'][-1]['proofs']} |" in page and '(planning.svg)' in page
    assert all(k in out.with_suffix('.svg').read_text() for k in ('<svg','#888888'))

@tells_conditions
def test_certify(tmp_path):
    out = tmp_path/'certify.json'
    for name in ('tabular_default','tabular_no_bn'): certify.main.__wrapped__(only=name, out=out)
    rows = {r['model']:r for r in json.loads(out.read_text())['certificates']}
    row = rows['fastai/tabular_default']
    assert len(rows)==2 and row['verdict']=='proved' and row['free'] and row['exports'] and row['norms']==3 and row['residue']<=1
    assert '| with free sizes | 2 |' in out.with_suffix('.md').read_text()

def test_onnx_norms(tmp_path):
    for o in 'onnxsim','onnxslim': pytest.importorskip(o, reason=f'{o} is compared with in benchmarks, and is no requirement of the tests')
    import onnx_norms
    out = tmp_path/'onnx.json'
    onnx_norms.main.__wrapped__(only='tabular_default', out=out)
    row, = json.loads(out.read_text())['files']
    assert row['norms']==3 and row['tools'].keys()==onnx_norms.tools.keys() and all(o['outcome']=='right' for o in row['tools'].values())
    assert row['tools']['fasterfold']['norms']==0<row['tools']['torch.onnx']['norms'] and '| fastai/tabular_default | 3 |' in out.with_suffix('.md').read_text()

def test_random_networks(tmp_path):
    out = tmp_path/'certify.json'
    certify.main.__wrapped__(only='tabular_default', out=out)
    for n in (2,3): random_networks.main.__wrapped__(most=n, out=out) # the second goes on from the first
    res = json.loads(out.read_text())
    assert sum(o['tried'] for o in res['tried'])==3 and not sum(o['wrong'] for o in res['tried'])
    assert {o['what'] for o in res['tried']} <= {*random_networks.kinds.values()} and [r['model'] for r in res['certificates']]==['fastai/tabular_default']

def test_validation(tmp_path):
    out = tmp_path/'validation.json'
    def measure():
        validation.main.__wrapped__(quick=True, threads=1, out=out)
        return json.loads(out.read_text())
    res,again = measure(),measure()
    for o in res,again:
        row, = o['validation'] # a row takes the place of the earlier one
        assert row['batches']==1 and row['input']==[8,3,32,32]
        assert row['seconds']['with']['runs']==row['seconds']['without']['runs']==row['again']['runs']==2
        assert 0<row['again']['median']<row['seconds']['with']['median'] and len(row['ratio'])==3
    assert again['environment']==res['environment'] and '| 1 | 8 |' in out.with_suffix('.md').read_text()

def test_latency(tmp_path):
    out = tmp_path/'latency.json'
    res,page = measured('latency', out, '--models', 'tabular', '--engines', 'eager', '--device', 'cpu', '--threads', '1')
    rows = {r['variant']: r for r in res['latency']}
    assert set(rows)=={'original','fasterfold','fasterfold strip_identity','no norms'} and not any('why' in r for r in rows.values())
    assert rows['original']['error']==0 < rows['fasterfold']['error'] < 100*torch.finfo(torch.float32).eps
    assert all(r['runs']>0 and len(r['ratio'])==len(r['ours'])==len(r['stripped'])==3 for r in rows.values())
    assert '| tabular | 1 |' in page
    latency.main.__wrapped__('fasterfold', 'tabular', 'eager', 'cpu', threads=1, quick=True, out=out)
    again = json.loads(out.read_text())
    assert again['environment']==res['environment'] and len(again['latency'])==len(rows) # a row takes the place of the earlier one

def test_latency_names_what_it_does_not_know(tmp_path):
    with pytest.raises(SystemExit, match='Unknown: resnet99. Choose among vision_learner resnet18'): latency._chosen('resnet99', latency.all_models)

@pytest.mark.parametrize('name', ['vision_learner resnet18','tabular','xresnet18','mobilenet_v3_large'])
def test_normless(name):
    model,sample = latency.build(name),latency.all_models[name][1](1)
    folder = BN_Folder()
    folded = folder.fold(model, sample)
    limit = latency.normless(folded)
    assert not folder.result.kept
    assert not any(isinstance(m, (nn.Identity, nn.modules.batchnorm._NormBase)) for m in limit.modules())
    with torch.no_grad(): assert torch.equal(limit(*sample), folded(*sample))

@pytest.mark.parametrize('name,n', [('EEGNet (time series)',1),('unet_learner spectral norm',18)])
def test_weights_stored_by_hand(name, n):
    model,sample = latency.build(name),latency.all_models[name][1](1)
    folder = BN_Folder()
    folder.fold(model, sample)
    assert len(folder.result.stored)==n
    held = latency.holding(model)
    assert not BN_Folder().plan(held, sample).stored
    with torch.no_grad(): assert torch.equal(held(*sample), model(*sample))

def test_chain_shrinks_what_comes_in():
    model,sample = chain(50, 8)
    double,x = model.double(),sample[0].double()
    with torch.no_grad(): moved = double(x+(d:=torch.randn_like(x)))-double(x)
    assert moved.norm()/d.norm()==pytest.approx(.9**50, rel=50*torch.finfo(torch.float32).eps) # its weights are rounded

def test_slope(): assert slope([1,2,4], [3,6,12])==pytest.approx(1)

def test_zoo_goes_on_from_its_results(tmp_path, monkeypatch):
    "Where the log is not, as in a fresh checkout, the published rows are not measured again"
    monkeypatch.setattr(zoo, 'collections', dict(fastai=zoo.fastai_models))
    for k in 'work','results': monkeypatch.setattr(zoo, k, tmp_path)
    def _row(key, tool, **kw): return dict(key=key, tool=tool, **kw)
    rows = [*(_row('', o, version='2') for o in zoo.base), _row('fastai/tabular_default', 'original', params=10, norms=3, own=1e-7), _row('fastai/gan_critic', 'original', params=7, over='time'),
        _row('fastai/tabular_default', 'fasterfold', version='1', outcome='right', seconds=.1, norms=0, error=1e-7, structural=1e-15)]
    for r in rows: zoo.write_log(r)
    zoo.merge()
    (tmp_path/'log.jsonl').unlink()
    assert zoo.read_log()=={(r['key'],r['tool']): r for r in rows}
    zoo.write_log(newer := dict(rows[-1], seconds=.2))
    assert zoo.read_log()[newer['key'],newer['tool']]==newer

def test_zoo_counts_norms_again(tmp_path, monkeypatch):
    "On another machine, seconds and errors stay those of the run of all tools, and the pages say so"
    monkeypatch.setattr(zoo, 'collections', dict(fastai=zoo.fastai_models))
    for k in 'work','results': monkeypatch.setattr(zoo, k, tmp_path)
    for o in zoo.base: zoo.write_log(dict(key='', tool=o, version='2'))
    for r in (dict(tool='original', params=10, norms=3, own=1e-7), dict(tool='fasterfold', version='1', outcome='right', seconds=1234., norms=1, error=1e-7, structural=1e-15)):
        zoo.write_log(dict(key='fastai/tabular_default', **r))
    for again in (False,True):
        zoo.run_zoo([e for e in zoo.fastai_models() if e.key=='fastai/tabular_default'], ['fasterfold'], True, 1e3, again)
        zoo.merge()
        z,page = json.loads((tmp_path/'zoo.json').read_text()),(tmp_path/'zoo.md').read_text()
        row, = (m['tools']['fasterfold'] for m in z['models'])
        assert row['norms']==0 and (row['seconds']==before if again else row['seconds']<1234) and z['earlier']==again and ('counted again' in page)==again
        before = row['seconds']
        if not again: error,own = row['error'],z['models'][0]['own']
        assert (row['error'],z['models'][0]['own'])==(error,own)

def test_zoo_tells_partly_tried_tools_apart(tmp_path, monkeypatch):
    "A tool that few models have been tried with is compared on those, and releases are those that were measured, not those that merge"
    monkeypatch.setattr(zoo, 'collections', dict(fastai=zoo.fastai_models))
    for k in 'work','results': monkeypatch.setattr(zoo, k, tmp_path)
    tools = 'fasterai','torch.fx','aimet','fasterfold'
    for o in zoo.base: zoo.write_log(dict(key='', tool=o, version='0.0.1'))
    for i,key in enumerate(('tabular_default','tabular_bn_final','tabular_lin_last')):
        zoo.write_log(dict(key=f'fastai/{key}', tool='original', params=(i+1)*10**6, norms=4, own=1e-7))
        for t in (*tools, 'torchao')[:5 if i==1 else 4]:
            zoo.write_log(dict(key=f'fastai/{key}', tool=t, version='1', outcome='right', seconds=.1, norms=i, error=1e-7, structural=1e-15,
                **({'positive':0} if t=='fasterfold' and i else {})))
    zoo.merge()
    z,page = json.loads((tmp_path/'zoo.json').read_text()),(tmp_path/'zoo.md').read_text()
    assert {z['releases'][o] for o in zoo.base}=={'0.0.1'} and z['releases']['torchao']=='1'
    assert {r['models'] for r in z['summary_alike']}=={1} and '## On the models that all tools' in page
    assert [(o['left'],o['positive']) for o in z['positive']]==[(1,0),(2,0)] and '| fastai/tabular_bn_final | 4 | 1 | 0 |' in page
    monkeypatch.syspath_prepend(str(root/'docs'))
    import results
    assert [(ts, [m['name'] for m in ms]) for ts,ms in results.sides(z)]==[
        (tools, [m['name'] for m in z['models']]),
        ((*tools[:3],'torchao','fasterfold'), ['tabular_bn_final'])]
    text = results.comparison(z)
    assert 'On 1 model, none of more than 2 million parameters:' in text and text.index('torchao')<text.index('On 3 models:') and 'fastai (3 models, 12 norms)' in text

@pytest.mark.parametrize('name,module', [('torchao','torchao'),('mct','model_compression_toolkit'),('aimet','aimet_torch'),('fasterai','fasterai'),
    ('torch.fx','torch'),('fasterfold','fasterfold')])
def test_peers_fold(name, module):
    "Each tool that is installed folds a convolution and its norm, in float64 too"
    pytest.importorskip(module)
    tool = peers.load_peers([name])[name]
    x = (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    model = peers._Small().double().eval()
    zoo.hostile(model, x, 0)
    ref,norms = zoo.run(model, x)
    before = torch.get_default_dtype()
    try: res = zoo.measure(model, x, torch.float64, tool.fold, ref)
    finally: torch.set_default_dtype(before)
    assert norms==1 and res['norms']==0 and res['error']<1e-14

def test_random_folds(tmp_path, monkeypatch):
    out = tmp_path/'folds.json'
    for n in (2,3): random_folds.main.__wrapped__(most=n, jobs=1, out=out) # the second goes on from the first
    res = json.loads(out.read_text())
    assert res['folds'][0]['tried']==3 and res['folds'][0]['code']==random_folds.code() and not res['wrong']
    assert '| random networks, folded | 3 |' in out.with_suffix('.md').read_text()
    monkeypatch.setattr(random_folds, 'code', lambda: 'other')
    random_folds.main.__wrapped__(most=1, jobs=1, out=out)
    assert json.loads(out.read_text())['folds'][0]['tried']==1, "figures about other code were added to"
    def off(net, sample): assert not sample, 'off'
    monkeypatch.setattr('test_properties.check', off)
    assert random_folds.judge(7)['why'].startswith('AssertionError: off')

def test_figures_as_csv(tmp_path):
    "The CSV in docs/results have the numbers of the JSON beside them."
    sys.path.insert(0, str(root/'docs'))
    import results
    for f in (root/'docs'/'results').glob('*.json'): shutil.copy(f, tmp_path)
    results.to_csv(tmp_path)
    made = sorted(o.name for o in tmp_path.glob('*.csv'))
    assert made==sorted(o.name for o in (root/'docs'/'results').glob('*.csv')) and len(made)>3
    for name in made: assert (tmp_path/name).read_text()==(root/'docs'/'results'/name).read_text(), f'{name}: run `python docs/results.py`'
