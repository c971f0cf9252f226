"One thread and the same random numbers for every test."
import random
import numpy as np, pytest, torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeded():
    for seed in (random.seed,np.random.seed,torch.manual_seed): seed(0)
