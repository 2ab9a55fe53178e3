"Every test runs on one thread, without a screen; the order is: the cheap checks of the checkout, the parts, the browser, the wheel."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import pytest
from checkout import ROOT

FIRST, LAST = ('test_packaging', 'test_notebooks', 'test_readme'), ('test_report', 'test_wheel')

def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem
        return FIRST.index(name) - len(FIRST) if name in FIRST else 1 + LAST.index(name) if name in LAST else 0
    items.sort(key=rank)  # stable: the order within a file stays

@pytest.fixture(scope='session')
def root():
    "The top of the checkout."
    return ROOT

@pytest.fixture(scope='module')
def one_thread():
    "Torch on one thread, whatever OMP_NUM_THREADS says; as it was afterwards."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
