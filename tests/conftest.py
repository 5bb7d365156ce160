import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def root():
    "The repository."
    return Path(__file__).resolve().parent.parent
