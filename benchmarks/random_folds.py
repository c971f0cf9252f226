"""Whether random networks compute the same when they are folded, with the proof and without.

Networks, inputs of other values, sizes and arguments, and what is asked of them are those of tests/test_properties.py. README.md here says what is counted."""
import os, sys
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch

import hashlib, json, random, signal, time, warnings
from multiprocessing import Pool
from pathlib import Path

from fastcore.script import call_parse
from tqdm import tqdm

import fasterfold
from common import described, environment, results, save, table

tests = Path(__file__).resolve().parent.parent/'tests'
sys.path.insert(0, str(tests))

secs = 600 # after which a network counts as one that could not be judged

def code() -> str:
    "What the figures are about: a digest of the package and of the test"
    files = [*sorted(Path(fasterfold.__file__).parent.rglob('*.py')),tests/'test_properties.py']
    return hashlib.sha256(b''.join(o.read_bytes() for o in files)).hexdigest()[:12]

def _late(*args): raise TimeoutError

def judge(
    seed:int # Of a random network
) -> dict: # Norms folded and kept, or what went wrong, or that it took too much time or memory
    "Fold a random network in all the ways of the test, and compare what it computes"
    import torch
    from test_properties import check, network
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(secs)
    torch.manual_seed(seed)
    try: plan = check(*network(random.Random(seed).randint))
    except (MemoryError,TimeoutError) as e: return dict(seed=seed, over=type(e).__name__)
    except Exception as e: return dict(seed=seed, why=f'{type(e).__name__}: {e}'[:300])
    finally: signal.alarm(0)
    return dict(seed=seed, folded=len(plan.folded), kept=len(plan.kept))

def page(res):
    o = res['folds'][0]
    rows = [['random networks, folded',f"{o['tried']:,}"], ['norms folded',f"{o['folded']:,}"], ['norms kept',f"{o['kept']:,}"],
        ['networks that compute something else, or fail',len(res['wrong'])], ['networks that took too much time or memory',o['over']]]
    parts = ['# Random networks', described(res['environment'])+f"; digest of the code {o['code']}. What is counted is in benchmarks/README.md.", table(['','how many'], rows)]
    if res['wrong']: parts.append(table(['seed','why'], [[w['seed'],' '.join(w['why'].split())] for w in res['wrong']]))
    return '\n\n'.join(parts) + '\n'

@call_parse
def main(
    minutes:float=60, # When to stop
    most:int=20000, # How many networks there are to be
    jobs:int=2, # How many processes
    out:Path=results/'random_folds.json', # File to write; a page goes beside it
):
    "Fold random networks from where the last run of the same code stopped, and write docs/results/random_folds.json"
    old = json.loads(out.read_text()) if out.exists() else {}
    o = dict(code=code(), tried=0, folded=0, kept=0, over=0)
    wrong = []
    if old and old['folds'][0]['code']==o['code']: o,wrong = old['folds'][0],old['wrong']
    res = dict(environment=environment(['torch','torchvision','fastai','fasterfold']), folds=[o], wrong=wrong)
    end = time.time()+60*minutes
    with Pool(jobs, warnings.simplefilter, ('ignore',), maxtasksperchild=500) as pool:
        for row in (bar := tqdm(pool.imap(judge, range(o['tried'], most)), initial=o['tried'], total=most)):
            o['tried'] += 1
            for k in 'folded','kept': o[k] += row.get(k, 0)
            o['over'] += 'over' in row
            if 'why' in row:
                wrong.append(row)
                bar.write(f"seed {row['seed']}: {row['why']}")
            if row['seed']%20==19 or 'why' in row: save(out, res, page)
            if time.time()>end: break
        pool.terminate()
    save(out, res, page)
