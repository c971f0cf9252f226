"""What `FoldedValidation` saves: seconds of validation with it and without, at several lengths, and what folding costs an epoch.

Both are measured within one training, in turns. README.md here says what is counted."""
import warnings
from pathlib import Path
from time import perf_counter

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.learner import create_vision_model
from fastcore.script import call_parse, store_true
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torchvision.models import resnet18
from tqdm import tqdm

from common import described, environment, load, ms, ratio, results, save, stats, table, times
from fasterfold.learner import FoldedValidation

all_lengths = '10,30,100' # Batches in a validation

class Digits:
    "The first `n` handwritten digits of scikit-learn, `size` pixels along a side and in three channels, over again where they end"
    def __init__(self, n, size):
        x,self.y = (torch.as_tensor(o) for o in load_digits(return_X_y=True))
        self.n,self.x = n,interpolate(x.float().view(-1,1,8,8)/16, size)
    def __len__(self): return self.n
    def __getitem__(self, i):
        i %= len(self.x)
        return self.x[i].expand(3,-1,-1),self.y[i]

def learner(
    length:int, # Batches in a validation
    batch:int,  # Images in a batch
    size:int    # Pixels along a side
) -> Learner:
    "A vision learner's ResNet-18 that trains on one batch an epoch, which is enough for its weights and statistics to change"
    torch.manual_seed(0)
    dls = DataLoaders.from_dsets(Digits(batch, size), Digits(length*batch, size), bs=batch, num_workers=0, device='cpu')
    return Learner(dls, create_vision_model(resnet18, 10, pretrained=False), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

class TimedFolding(FoldedValidation):
    "Keeps the seconds that folding and undoing took at each validation: `cost`"
    def __init__(self):
        super().__init__()
        self.cost = []
    def around(self, batches):
        inside = 0
        def _batches():
            nonlocal inside
            start = perf_counter()
            batches()
            inside = perf_counter()-start
        start = perf_counter()
        super().around(_batches)
        self.cost.append(perf_counter()-start-inside)

class Turns(Callback):
    "Fold at every other validation, pairs of them in turned order, and keep the seconds that each took: `seconds`"
    def __init__(self, tick): self.tick,self.seconds = tick,{True:[], False:[]}
    def before_epoch(self): self.timed_folding.run = self.epoch%4 in (0,3)
    def before_validate(self): self.start = perf_counter()
    def after_validate(self):
        self.seconds[self.timed_folding.run].append(perf_counter()-self.start)
        self.tick()

def measure(
    length:int, # Batches in a validation
    batch:int,  # Images in a batch
    size:int,   # Pixels along a side
    turns:int,  # Validations with folding, and as many without, after the first of each
    tick        # Called after each validation
) -> dict: # A row of results
    "Train, and validate with and without folding in turns"
    folding,timing = TimedFolding(),Turns(tick)
    learn = learner(length, batch, size)
    with learn.no_bar(), learn.no_logging(): learn.fit(2*turns+2, 1e-3, cbs=[folding,timing])
    first,*cost = folding.cost
    on,off = ([[t] for t in timing.seconds[o][1:]] for o in (True,False))
    return dict(batches=length, input=[batch,3,size,size], seconds={'with': stats(on), 'without': stats(off)}, first=first,
        again=stats([[t] for t in cost]), ratio=ratio(times(on), times(off)))

def page(
    res:dict # As in validation.json
) -> str:
    "The results as Markdown"
    def _row(r):
        low,mid,high = r['ratio']
        return (r['batches'], r['batches']*r['input'][0], *(f"{r['seconds'][k]['median']:.2f}" for k in ('without','with')),
            f'{mid:.2f}', f'{low:.2f} to {high:.2f}', ms(r['again']['median']), ms(r['first']))
    head = ['batches','images','s without','s with','ratio','quartiles','ms to fold again','ms to fold first']
    what = "Validation of a vision learner's ResNet-18 with `FoldedValidation` and without"
    return '\n\n'.join(['# What folded validation saves', f"{described(res['environment'])}. What each column counts is in benchmarks/README.md.",
        f'{what}.', table(head, map(_row, res['validation']))]) + '\n'

@call_parse
def main(
    lengths:str=all_lengths, # Batches in a validation, comma-separated
    batch:int=64,     # Images in a batch
    size:int=64,      # Pixels along a side of the images
    turns:int=3,      # How often each is measured
    threads:int=0,    # CPU threads; 0 is PyTorch's choice
    quick:store_true=False, # Only try whether it runs: one batch of small images?
    out:Path=results/'validation.json', # File to write; a page goes beside it
):
    "Measure what folded validation saves, and write docs/results/validation.json and validation.md"
    warnings.simplefilter('ignore')
    if threads: torch.set_num_threads(threads)
    if quick: lengths,batch,size,turns = '1',8,32,2
    env = environment(['torch','torchvision','fastai','fasterfold'])
    res = dict(environment=env, validation=[]) | load(out, env)
    chosen = [int(o) for o in lengths.split(',')]
    with tqdm(total=len(chosen)*(2*turns+2)) as bar:
        for o in chosen:
            bar.set_postfix_str(f'{o} batches')
            row = measure(o, batch, size, turns, bar.update)
            others = [r for r in res['validation'] if (r['batches'],r['input'])!=(o,row['input'])]
            res['validation'] = sorted(others+[row], key=lambda r: (r['input'],r['batches']))
            save(out, res, page)
