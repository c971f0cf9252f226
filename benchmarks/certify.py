"""How many models of the zoo have a certificate: folded, exported with free sizes, and compared for every input.

Models, weights and limits are those of `zoo.py`. README.md here says what is counted."""
import os
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch, so that seconds are those of one core

import json, time, warnings, zlib
from collections import Counter
from pathlib import Path

import torch
from fastcore.script import call_parse
from tqdm import tqdm

from common import described, environment, hostile, results, save, table
from fasterfold.certify import certify
from fasterfold.fold import BN_Folder
from fasterfold.state import FoldError
from zoo import Entry, collections, in_fork

def measure(
    entry:Entry,
    limit:float # Millions of parameters
) -> dict: # A row of results, None if the model is larger
    "Fold a model of the zoo, and ask for a certificate"
    seed = zlib.crc32(entry.key.encode()) # the same weights each time
    torch.manual_seed(seed)
    model,sample = entry.build()
    res = dict(model=entry.key, params=sum(o.numel() for o in model.parameters()))
    if res['params']>limit*1e6: return None
    hostile(model.eval(), sample, seed)
    folder = BN_Folder()
    try: new = folder.fold(model, sample)
    except FoldError as e: return dict(res, verdict='not folded', why=str(e)[:200])
    cert = certify(model, new, sample)
    exports = not cert.why.startswith('it cannot be exported')
    return dict(res, norms=len(folder.result.folded), kept=len(folder.result.kept), exports=exports, free=sorted(cert.ranges), verdict=cert.verdict,
        why=cert.why[:300], operations=sum(cert.laws.values()), residue=cert.residue, radius=cert.radius, **cert.seconds)

def counts(
    rows:list # As in certify.json
) -> list: # Pairs (what, models)
    "What became of the models"
    folded = [r for r in rows if r.get('norms')]
    exported = [r for r in folded if r['exports']]
    free = [r for r in exported if r['free']]
    return [('with norms that fold',len(folded)), ('can be exported',len(exported)), ('with free sizes',len(free)),
        ('proved for all of those sizes',sum(r['verdict']=='proved' for r in free)), ('said to be not the same',sum(r['verdict']=='not the same' for r in folded))]

def page(
    res:dict # As in certify.json
) -> str:
    "The results as Markdown"
    rows = [r for r in res['certificates'] if r.get('norms')]
    out = [(r['model'],f"{r['params']/1e6:.1f}",r['norms'],r['kept'],', '.join(r['free']),r['verdict'],f"{r['export']:.1f}",f"{r['proof']:.2f}") for r in rows]
    why = Counter(r['why'].split(' (')[0][:80] for r in rows if r['verdict']!='proved')
    return '\n\n'.join(['# Certificates', f"{described(res['environment'])}. What each column counts is in benchmarks/README.md.", table(['models','how many'], counts(res['certificates'])),
        table(['not proved because','models'], why.most_common()), table(['model','M parameters','folded','kept','free','verdict','s to export both','s to compare'], out)]) + '\n'

@call_parse
def main(
    limit:float=8, # Millions of parameters above which a model is left out
    minutes:float=15, # When to stop
    only:str='', # Names of models, comma-separated; by default all, collections in turns
    out:Path=results/'certify.json', # File to write; a page goes beside it
):
    "Ask for a certificate of each model, and write docs/results/certify.json and certify.md"
    warnings.simplefilter('ignore')
    res = dict(environment=environment(['torch','torchvision','timm','fastai','fasterfold']), certificates=[])
    if out.exists(): res['certificates'] = json.loads(out.read_text())['certificates']
    end,done,todo = time.time()+60*minutes,{r['model'] for r in res['certificates']},[f() for f in collections.values()]
    todo = [es[i] for i in range(max(map(len, todo))) for es in todo if i<len(es)]
    for entry in (bar := tqdm([e for e in todo if e.params<=limit*1e6 and (e.name in only.split(',') if only else e.key not in done)])):
        if time.time()>end: break
        bar.set_postfix_str(entry.key)
        row = in_fork(lambda: measure(entry, limit))
        if row is None: continue
        if 'over' in row: row = dict(model=entry.key, verdict='over', why=str(row['over'])[:200])
        others = [r for r in res['certificates'] if r['model']!=entry.key]
        res['certificates'] = sorted([*others,row], key=lambda r: r['model'])
        save(out, res, page)
