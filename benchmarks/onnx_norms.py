"""How many norms are left in an ONNX file: as it is exported, after the tools that optimize such files, and folded before it is exported.

Models, weights and limits are those of `zoo.py`. README.md here says what is counted."""
import os
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch, so that seconds are those of one core

import copy, json, shutil, tempfile, time, warnings
from importlib.metadata import version
from pathlib import Path

import onnx, onnxruntime, onnxsim, onnxslim, torch
from fastcore.script import call_parse
from torch.utils._pytree import tree_leaves

from common import described, environment, in_short, registry, results, save, table
from fasterfold.cost import count_parameters
from fasterfold.files import norms_left
from fasterfold.fold import BN_Folder
from fasterfold.sample import Sample
from zoo import Entry, as_dtype, built, distance, go_on, run

def export(model, sample, path):
    args,kwargs = Sample.of(sample).copied()
    torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)

tools = {} # name -> (distribution, `f(model, sample, path, out)`, which writes to `out` what it makes of the model, or of `path`, to which PyTorch has exported it)
tool = registry(tools)

@tool('torch.onnx', 'onnxscript')
def _exported(model, sample, path, out): shutil.copy(path, out) # its own optimizer has folded what it does

@tool('ONNX Runtime', 'onnxruntime')
def _runtime(model, sample, path, out):
    o = onnxruntime.SessionOptions()
    o.optimized_model_filepath,o.graph_optimization_level = str(out),onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED # all that fits every machine
    onnxruntime.InferenceSession(path, o, providers=['CPUExecutionProvider'])

@tool('onnxsim', 'onnxsim')
def _sim(model, sample, path, out): onnx.save(onnxsim.simplify(str(path))[0], out)

@tool('onnxslim', 'onnxslim')
def _slim(model, sample, path, out): onnxslim.slim(str(path), str(out))

@tool('fasterfold', 'fasterfold')
def _ours(model, sample, path, out): export(BN_Folder().fold(model, sample), sample, out)

def outputs(path, feed):
    "What ONNX Runtime computes of the file as it is; an optimizer may have taken inputs away"
    o = onnxruntime.SessionOptions()
    o.graph_optimization_level,o.intra_op_num_threads = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,1
    s = onnxruntime.InferenceSession(path, o, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(t) for t in s.run(None, {i.name:feed[i.name] for i in s.get_inputs()})]

def measure(
    entry:Entry,
    limit:float # Millions of parameters
) -> dict: # A row of results, None if the model is larger
    "Export a model of the zoo, and count the norms that each tool leaves"
    if (found := built(entry, limit)) is None: return None
    model,sample = found
    torch.set_default_dtype(torch.float64)
    exact,norms = run(copy.deepcopy(model).double(), as_dtype(sample, torch.float64))
    torch.set_default_dtype(torch.float32)
    res = dict(model=entry.key, norms=norms, params=count_parameters(model), tools={})
    with tempfile.TemporaryDirectory() as d, torch.no_grad():
        path = Path(d)/'model.onnx'
        export(model, sample, path)
        xs = [t.numpy() for t in tree_leaves(Sample.of(sample).copied()) if isinstance(t, torch.Tensor)]
        feed = {i.name:x for i,x in zip(onnx.load(path).graph.input, xs)}
        res['own'] = max(distance(outputs(path, feed), exact), distance(run(model, sample)[0], exact))
        for name,(_,f) in tools.items():
            out,start = Path(d)/f'{name}.onnx',time.process_time()
            try:
                f(copy.deepcopy(model), sample, path, out)
                row = dict(seconds=time.process_time()-start, norms=len(norms_left(out, False)), error=distance(outputs(out, feed), exact))
                row['outcome'] = 'right' if row['error'] is not None and row['error']<=10*res['own']+1e-6 else 'wrong' # all is float32
            except Exception as e: row = dict(outcome='crash', why=in_short(e))
            res['tools'][name] = row
    return res

def page(
    res:dict # As in onnx.json
) -> str:
    "The results as Markdown"
    rows = [r for r in res['files'] if r.get('norms')]
    def _cell(o): return f"{o['norms']}" if o['outcome']=='right' else o['outcome']
    out = [(r['model'],r['norms'],*(_cell(r['tools'][t]) for t in tools)) for r in rows]
    return '\n\n'.join(['# Norms in ONNX files', f"{described(res['environment'])}. What each column counts is in benchmarks/README.md.", table(['model','norms',*tools], out)]) + '\n'

@call_parse
def main(
    limit:float=8, # Millions of parameters above which a model is left out
    minutes:float=15, # When to stop
    only:str='', # Names of models, comma-separated; by default all, collections in turns
    out:Path=results/'onnx.json', # File to write; a page goes beside it
):
    "Count norms in ONNX files, and write docs/results/onnx.json and onnx.md"
    warnings.simplefilter('ignore')
    res = dict(files=[]) | (json.loads(out.read_text()) if out.exists() else {})
    res = dict(environment=environment(['torch','torchvision','timm','fastai','onnx',*dict.fromkeys(d for d,_ in tools.values())]), releases={t:version(d) for t,(d,_) in tools.items()}, files=res['files'])
    go_on(lambda e: measure(e, limit), res['files'], lambda: save(out, res, page), time.time()+60*minutes, limit, only)
