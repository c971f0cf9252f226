"One thread and the same random numbers for every test."
import random
import numpy as np, pytest, torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeded():
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
