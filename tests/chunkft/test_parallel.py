"""Replicas, DDP and FSDP2 over gloo train as one process with the whole batch, and replicas stay equal to the bit."""

from pathlib import Path

import pytest
import ranks


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one(world, tmp_path):
    ranks.run(Path(__file__).with_name("parallel_ranks.py"), world, tmp_path)
