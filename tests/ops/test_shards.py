"""A head sharded over gloo ranks equals the whole head in one process: every objective, uneven and empty shards."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_head_equals_the_whole_one(world, tmp_path):
    script = Path(__file__).with_name("shard_ranks.py")
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
