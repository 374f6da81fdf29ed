"""FSDP2 on two gloo ranks, the head inside the root unit, tied, and as a unit of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_fsdp2_gradients_are_those_of_one_process():
    script = Path(__file__).parent / "fsdp_ranks.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr[-3000:]
