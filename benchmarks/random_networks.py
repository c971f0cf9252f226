"""Whether a random network, a tenth of which are folded wrongly on purpose, is certified as the same where other inputs show that it is not.

Networks, ways to fold wrongly, and inputs of other values, sizes and arguments are those of the tests. README.md here says what is counted."""
import os, sys
for o in 'OMP','MKL','OPENBLAS': os.environ[f'{o}_NUM_THREADS'] = '1' # before torch

import json, time, warnings
from pathlib import Path

from fastcore.script import call_parse
from tqdm import tqdm

from certify import page
from common import results, save
from fasterfold.certify import certify
from zoo import in_fork

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tests'))

kinds = dict(right='random networks, folded', wrong='random networks, folded by a broken rule, with a changed weight or without a norm, which shows in their outputs',
    hidden='the same where no output shows it', over='random networks that could not be judged: an error, or too much time or memory')

def judge(
    seed:int # Of a random network
) -> dict: # Its kind, whether it is proved, and whether that is wrong
    "Fold a random network, certify it, and run both"
    from test_certify import inputs, off, random_pair, run
    net,new,sample,how = random_pair(seed, .1)
    proved = certify(net, new, sample).proved
    shown = any(off(run(new, o), refs, net, o) for o,refs in inputs(net, sample) if not o.kwargs)
    return dict(kind='right' if not how else 'wrong' if shown else 'hidden', proved=proved, wrong=proved and shown)

@call_parse
def main(
    minutes:float=15, # When to stop
    most:int=20000, # How many networks there are to be
    out:Path=results/'certify.json', # File to write; a page goes beside it
):
    "Certify random networks from where the last run stopped, and add what was found to docs/results/certify.json"
    warnings.simplefilter('ignore')
    judge(0) # imports, and what export works out once, for all processes
    end = time.time()+60*minutes
    res = json.loads(out.read_text())
    others = {o['what']:o for o in res.get('tried', [])}
    found = {k:others.pop(what, dict(what=what, tried=0, proved=0, wrong=0)) for k,what in kinds.items()}
    for seed in (bar := tqdm(range(sum(o['tried'] for o in found.values()), most))):
        if time.time()>end: break
        row = in_fork(lambda: judge(seed))
        o = found[row.get('kind', 'over')]
        o['tried'] += 1
        o['proved'] += row.get('proved', False)
        o['wrong'] += row.get('wrong', False)
        if row.get('wrong'): bar.write(f'seed {seed} is proved and wrong')
        res['tried'] = [*others.values(), *(v for v in found.values() if v['tried'])]
        save(out, res, page)
