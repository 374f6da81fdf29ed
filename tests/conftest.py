"""Test-wide setup: the Triton interpreter must be chosen before a kernel is decorated."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `cases`, `interpreter` and `ranks`

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.install()
torch.set_num_threads(2)


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def poison(monkeypatch):
    """torch.empty returns NaN: an element that nobody writes is seen."""
    real, like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(real(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))


@pytest.fixture(scope="module")
def one_thread():
    """Models this small lose more to waiting for a second thread on a busy machine than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
