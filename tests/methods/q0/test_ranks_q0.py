"""Several processes: one trajectory on two ranks, and two trajectories under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import q0_tiny as q0
import ranks
import tiny_models as tiny
import torch

from burnish.cli import main


def test_two_ranks_are_one_process(tmp_path):
    ranks.run(Path(__file__).parent / "q0_ranks.py", 2, tmp_path)
    t = q0.for_ranks(tmp_path / "one", 4)
    t.train()
    for cycle in range(3):
        one, two = (q0.stored(tmp_path / name / f"cycle-00{cycle}") for name in ("one", "two"))
        for name in one:
            error = float((one[name] - two[name]).norm() / one[name].norm())
            assert error < 1e-4, f"cycle {cycle}, {name}: {error}"
    a, b = (json.loads((tmp_path / n / "cycle-002" / "snapshot.json").read_text()) for n in ("one", "two"))
    assert a["step"] == b["step"] and a["fitness_tokens"] == b["fitness_tokens"]


def test_trajectories_under_torchrun_are_those_of_one_process(tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", q0.documents())
    model = tiny.save(tmp_path / "model", tiny.llama(3, attention_dropout=0.1))
    arguments = [
        "q0", "--model", model, "--data", data, "--trajectories", "2", "--cycles", "2", "--seq-length", "16",
        "--epochs-per-cycle", "1", "--batch-size", "4", "--fitness-share", "0.2", "--distill-after-cycles", "1",
    ]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launch, "burnish.cli", *arguments, "--output", str(tmp_path / "two")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 4 snapshots") == 1  # the first process collects
    for number in range(2):
        q0.assert_same(*(tmp_path / name / f"trajectory-{number}" for name in ("one", "two")))
    assert (tmp_path / "one" / "weights.json").read_bytes() == (tmp_path / "two" / "weights.json").read_bytes()
    first, second = (q0.stored(tmp_path / "one" / f"trajectory-{n}" / "cycle-000") for n in range(2))
    assert not torch.equal(first["logp"], second["logp"])
