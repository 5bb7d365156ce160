import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def root():
    "The repository."
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def one_thread():
    "Small nets are fastest on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
