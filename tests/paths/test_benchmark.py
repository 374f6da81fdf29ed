"""benchmarks/post.py at a size that takes no time: its checkpoints are ones, and its three ways write what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

from burnish.paths import Checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "post.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak RSS is read from Linux's /proc")
def test_checkpoint_section(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("post", SCRIPT)
    post = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(post)
    sizes = {"HIDDEN": 2048, "INNER": 8, "KV": 512, "VOCABULARY": 16, "SHARD_MB": 9}
    for name, value in sizes.items():
        monkeypatch.setattr(post, name, value)
    post.write(tmp_path / "pre", 2, 0)
    post.write(tmp_path / "post", 2, 1)
    before, after = Checkpoint(tmp_path / "pre"), Checkpoint(tmp_path / "post")
    assert len(after.files) > 1 and set(after) == set(post.shapes(2)) == set(before)
    names = {f"model.layers.1.self_attn.{p}_proj.weight" for p in "qk"}
    for kind in post.KINDS:
        row = post.child(kind, tmp_path / "pre", tmp_path / "post", tmp_path / kind)
        out = Checkpoint(tmp_path / kind)
        changed = {n for n in after if not torch.equal(out.tensor(n), after.tensor(n))}
        assert changed == {"copy": set(), "qk-restore": names, "path t=0.5": set(after)}[kind]
        # a process that gives heap back to the system ends below where it began
        assert row["seconds"] > 0 and -(4 << 20) < row["peak_rss"] < 256 << 20
    assert all(torch.equal(Checkpoint(tmp_path / "qk-restore").tensor(n), before.tensor(n)) for n in names)
