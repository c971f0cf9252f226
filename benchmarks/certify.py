"""How many models of the zoo have a certificate: folded, exported with free sizes, and compared for every input.

Models, weights and limits are those of `zoo.py`. README.md here says what is counted."""
import os
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch, so that seconds are those of one core

import json, re, subprocess, tempfile, time, warnings
from collections import Counter
from pathlib import Path

import torch
from fastcore.script import call_parse
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import fasterfold.certify
from common import described, environment, results, save, table
from fasterfold.cost import count_parameters
from fasterfold.certify import certify
from fasterfold.fold import BN_Folder
from fasterfold.sample import Sample
from fasterfold.state import FoldError
from zoo import Entry, built, go_on, in_fork, in_turn

fasterfold.certify.default_timer = time.process_time # seconds of one core, whatever else runs on the machine

def folded(
    model, # As from `built`
    sample
) -> tuple: # The model, the same folded, its sample, and the plan
    "A model of the zoo, folded"
    folder = BN_Folder()
    return model,folder.fold(model, sample),sample,folder.result

def measure(
    entry:Entry,
    limit:float # Millions of parameters
) -> dict: # A row of results, None if the model is larger
    "Fold a model of the zoo, and ask for a certificate"
    if (found := built(entry, limit)) is None: return None
    res = dict(model=entry.key, params=count_parameters(found[0]))
    try: model,new,sample,plan = folded(*found)
    except FoldError as e: return dict(res, verdict='not folded', why=str(e)[:200])
    cert = certify(model, new, sample)
    exports = not cert.why.startswith('it cannot be exported')
    return dict(res, norms=len(plan.folded), kept=len(plan.kept), exports=exports, free=sorted(cert.ranges), verdict=cert.verdict,
        why=cert.why[:300], operations=sum(cert.laws.values()), residue=cert.residue, radius=cert.radius, drift=cert.drift, **cert.seconds)

# Run by a Python that has onnxsim, with the folder of both files: its prover wants bounds for inputs, and may take a minute
PROVER = """
import json, sys, time, onnx
from onnxsim.certify import certify
a,b = (onnx.load(f'{sys.argv[1]}/{k}.onnx') for k in 'ab')
start = time.process_time()
res = certify(a, b, input_ranges={i.name:(-3,3) for i in a.graph.input}, total_timeout_ms=60000)
why = '' if res.ok else next(w.detail for w in res.windows if w.status in ('skipped','refuted'))
print(json.dumps(dict(proved=res.ok, refuted='refuted' in res.outputs.values(), why=why, seconds=time.process_time()-start)))
"""

def ask_onnxsim(
    entry:Entry,
    python:str # A Python that has it
) -> dict: # What it says
    "Have onnxsim's prover compare a model of the zoo and the same folded, as ONNX of one size"
    model,new,sample,_ = folded(*built(entry))
    args,kwargs = Sample.of(sample).copied()
    with tempfile.TemporaryDirectory() as d:
        for k,m in dict(a=model, b=new).items():
            with torch.no_grad(): n = len(tree_leaves(m(*args, **kwargs)))
            torch.onnx.export(m, args, f'{d}/{k}.onnx', kwargs=kwargs, dynamo=True, optimize=False, external_data=False, verbose=False,
                input_names=[f'in{i}' for i in range(len(args)+len(kwargs))], output_names=[f'out{i}' for i in range(n)])
        res = json.loads(subprocess.run([python, '-c', PROVER, d], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    said = re.sub(r'^(input \S+ ~ \S+: )+', '', res['why'])
    return dict(res, why=re.split(r'[;(]', said)[0].strip()[:100])

def counts(
    rows:list # As in certify.json
) -> list: # Pairs (what, models)
    "What became of the models"
    folded = [r for r in rows if r.get('norms')]
    exported = [r for r in folded if r['exports']]
    free = [r for r in exported if r['free']]
    asked = [r['onnxsim'] for r in folded if 'proved' in r.get('onnxsim', ())]
    other = [('shown to onnxsim, of one size and for inputs from -3 to 3',len(asked)), ('proved by onnxsim',sum(o['proved'] for o in asked)),
        ('said by onnxsim to be not the same',sum(o['refuted'] for o in asked))]
    return [('with norms that fold',len(folded)), ('can be exported',len(exported)), ('with free sizes',len(free)),
        ('proved for all of those sizes',sum(r['verdict']=='proved' for r in free)), ('said to be not the same',sum(r['verdict']=='not the same' for r in folded)), *other*bool(asked)]

def page(
    res:dict # As in certify.json
) -> str:
    "The results as Markdown"
    rows = [r for r in res['certificates'] if r.get('norms')]
    out = [(r['model'],f"{r['params']/1e6:.1f}",r['norms'],r['kept'],', '.join(r['free']),r['verdict'],f"{r['export']:.1f}",f"{r['proof']:.2f}") for r in rows]
    why = Counter(r['why'].split(' (')[0][:80] for r in rows if r['verdict']!='proved')
    other = Counter(r['onnxsim']['why'] for r in rows if not r.get('onnxsim', {}).get('proved', True))
    return '\n\n'.join(['# Certificates', f"{described(res['environment'])}. What each column counts is in benchmarks/README.md.", table(['models','how many'], counts(res['certificates'])),
        table(['not proved because','models'], why.most_common()), *[table(['not proved by onnxsim because','models'], other.most_common())]*bool(other), table(['model','M parameters','folded','kept','free','verdict','s to export both','s to compare'], out)]) + '\n'

@call_parse
def main(
    limit:float=8, # Millions of parameters above which a model is left out
    minutes:float=15, # When to stop
    only:str='', # Names of models, comma-separated; by default all, collections in turns
    onnxsim:str='', # A Python that has onnxsim, z3-solver and onnxruntime, whose prover is asked about the models that have been measured
    out:Path=results/'certify.json', # File to write; a page goes beside it
):
    "Ask for a certificate of each model, and write docs/results/certify.json and certify.md"
    warnings.simplefilter('ignore')
    res = dict(certificates=[]) | (json.loads(out.read_text()) if out.exists() else {})
    res = dict(environment=environment(['torch','torchvision','timm','fastai','fasterfold'])) | {k:v for k,v in res.items() if k!='environment'} # what was tried besides stays
    end,entries = time.time()+60*minutes,{e.key:e for e in in_turn()}
    go_on(lambda e: measure(e, limit), res['certificates'], lambda: save(out, res, page), end, limit, only)
    for row in tqdm([r for r in res['certificates'] if onnxsim and r.get('norms') and r['model'] in entries and 'onnxsim' not in r]):
        if time.time()>end: break
        row['onnxsim'] = in_fork(lambda: ask_onnxsim(entries[row['model']], onnxsim))
        save(out, res, page)
