"""An arena under torchrun: two processes are one, each with runs of its own."""

import json
import os
import re
import subprocess
import sys

import arenas
import yaml

from burnish.methods.peft_arena import make_config
from burnish.methods.peft_arena.arena import Arena


def test_an_arena_under_torchrun_is_that_of_one_process(tmp_path, one_thread):
    methods = [{"method": "lora", "r": 2, "lr": 1e-2}, {"method": "oft", "block_size": 16, "lr": [5e-3, 1e-2]}]
    values = arenas.values(
        arenas.base(tmp_path / "model"), tmp_path / "one", methods=methods, seeds=[0, 1], metrics={"rows": 2}
    )
    one = Arena(make_config(values))
    one.run()
    file = tmp_path / "arena.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "two")}))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--redirects", "3",
            "--log-dir", str(tmp_path / "log"), "-m", "burnish.cli", "peft-arena", "run", str(file),
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    said = {
        rank: {kind: next((tmp_path / "log").glob(f"*/attempt_0/{rank}/{kind}.log")).read_text()
               for kind in ("stdout", "stderr")}
        for rank in (0, 1)
    }  # fmt: skip
    assert done.returncode == 0, (done.stderr[-2000:], said)
    names = [run.name for run in one.runs]
    trained = {rank: re.findall(r"\[\d+/6\] (\S+):", said[rank]["stderr"]) for rank in said}
    assert trained == {0: names[0::2], 1: names[1::2]}
    folders = [tmp_path / name / "runs" for name in ("one", "two")]
    assert [sorted(p.name for p in f.iterdir()) for f in folders] == [sorted(f"{n}.json" for n in names)] * 2
    for name in names:
        alone, shared = (json.loads((f / f"{name}.json").read_text()) for f in folders)
        assert arenas.without_times(alone) == arenas.without_times(shared)
    # one of them, whichever is the last, reports
    assert sorted(said[rank]["stdout"].count("written: ") for rank in said) == [0, 1]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["methods"] == reports[1]["methods"] and reports[1]["runs"] == 6
