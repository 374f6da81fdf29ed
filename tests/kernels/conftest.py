import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `rowcheck`


@pytest.fixture(params=["torch", "triton", "host"])
def kernels(request, device):
    """Each backend's module of row kernels."""
    from burnish.kernels import dispatch

    if request.param == "host" and device.type != "cpu":
        pytest.skip("the host backend serves the CPU")
    return dispatch.rows(request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row and a row of blocks, at sizes the interpreter can afford."""
    from burnish.kernels import rows_host, rows_torch, rows_triton

    monkeypatch.setattr(rows_triton, "BLOCK", 16)
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 512)
    monkeypatch.setattr(rows_host, "BLOCK", 16)
