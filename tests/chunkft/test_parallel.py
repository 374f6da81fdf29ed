"""Replicas, DDP and FSDP2 over gloo train as one process with the whole batch, and replicas stay equal to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one(world, tmp_path):
    script = Path(__file__).with_name("parallel_ranks.py")
    common = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    arguments = [str(world), str(tmp_path / "store")]
    ranks = [subprocess.Popen([sys.executable, str(script), str(r), *arguments], **common) for r in range(world)]
    out = []
    try:
        out = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, out, strict=True):
        assert rank.returncode == 0, text
        assert text.endswith("equal\n")
