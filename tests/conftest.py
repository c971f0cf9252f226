"One thread and the same random numbers for every test; and every plan that a test makes keeps norms for true reasons only."
import random, signal
from functools import partial
from unittest.mock import patch
import numpy as np, pytest, torch
import fasterfold.cover, fasterfold.fold, fasterfold.plan
from fasterfold.bench import bench, engines
from reasons import with_true_reasons

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeded():
    for seed in (random.seed,np.random.seed,torch.manual_seed): seed(0)

@pytest.fixture(autouse=True)
def true_reasons(monkeypatch):
    for m in (fasterfold.cover,fasterfold.fold,fasterfold.plan): monkeypatch.setattr(m, 'plan_folds', with_true_reasons(m.plan_folds))

@pytest.fixture
def ctrl_c():
    "Python's own handler of Ctrl-C, which a shell that runs the tests in the background has ignored; it is there afterwards, too."
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, old) is signal.default_int_handler

@pytest.fixture
def moments(monkeypatch):
    "Engines are timed for a moment only."
    monkeypatch.setattr('fasterfold.bench.bench', partial(bench, seconds=.01))

@pytest.fixture
def only_eager(moments):
    "To compile and to export takes its time."
    with patch.dict(engines, {'eager':engines['eager']}, clear=True): yield # gives them back in their order
