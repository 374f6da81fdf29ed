"""The demonstration's data, its model, and the whole of it at a size that shows nothing but that it runs."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from burnish.cli import main
from burnish.methods.demo_options import RecallDemoOptions
from burnish.methods.qk_restore import demo


def test_recall_is_answerable_and_labelled_where_it_is_asked():
    ids, labels = demo.recall(50, 40, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (50, 40) and int((labels != -100).sum()) == 50 * demo.PAIRS
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        body = row[: 40 - 3 * demo.PAIRS]
        pairs = {k: v for k, v in itertools.pairwise(body) if demo.KEY <= k < demo.VALUE}
        assert len(pairs) == demo.PAIRS
        for at in range(len(body), 40, 3):
            assert row[at] == demo.ASK and pairs[row[at + 1]] == row[at + 2] == label[at + 2]
            assert label[at] == label[at + 1] == -100


@pytest.mark.parametrize("other", [False, True])
def test_chain_is_local(other):
    ids, labels = demo.chain(50, torch.Generator().manual_seed(0), other=other)
    key, value = (demo.FILLER + 10, demo.FILLER) if other else (demo.KEY, demo.VALUE)
    assert int(ids.max()) < demo.VOCABULARY and int((labels != -100).sum()) == 50 * demo.CHAIN
    for at in range(3, ids.shape[1], 2):
        step = (ids[:, at - 2] - value + ids[:, at - 1] - key) % 10
        assert torch.equal(ids[:, at] - value, step) and torch.equal(labels[:, at], ids[:, at])
    touched = set(ids.flatten().tolist()) & set(range(demo.KEY, demo.FILLER))
    assert bool(touched) != other


def test_softmax_layers_see_no_positions():
    """The rotary angles are divided by 1e9: cosines are 1 and sines 0 at every position."""
    net = demo.model(0).eval()
    assert net.config.layer_types == ["linear_attention", "full_attention"] * 2
    angles = net.model.rotary_emb(torch.zeros(1, 1), torch.arange(1024)[None])
    assert float((angles[0] - 1).abs().max()) < 1e-6 and float(angles[1].abs().max()) < 2e-6
    assert 0.1e6 < sum(p.numel() for p in net.parameters()) < 0.4e6


def test_interval():
    assert demo.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    assert math.isnan(demo.interval([1.0])[1])


def test_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LENGTHS", (32, 40))
    out = tmp_path / "out"
    flags = {"seeds": 2, "pretrain-steps": 2, "sft-steps": 2, "batch-size": 4, "problems": 32, "output": out}
    arguments = [x for k, v in flags.items() for x in (f"--{k}", str(v))]
    assert main(["demo", "qk-restore", *arguments]) == 0
    result = json.loads((out / "results.json").read_text())
    assert len(result["seeds"]) == 2 and (out / "recall.png").stat().st_size > 1000
    for seed in result["seeds"]:
        chain = seed["regimes"]["chain"]
        assert {"after", *demo.VARIANTS, "path", "QK-Pro, lambda 1"} <= set(chain)
        assert [p["t"] for p in chain["path"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert chain["path"][0]["target"] == chain["after"]["chain"]
        assert chain["path"][-1]["target"] == chain["QK-Restore"]["chain"]
        assert chain["bytes_changed"] > 0 and len(chain["drift"]) == 4
    assert (out / "seed-1" / "restored" / "qk_restore.json").is_file()
    said = capsys.readouterr().out
    assert "QK-Restore" in said and "chain and 5 % recall (2 seeds)" in said
    assert main(["demo", "qk-restore", *arguments]) == 2  # its output is never overwritten
    assert "exists already" in capsys.readouterr().err


def test_options():
    for field in dataclasses.fields(RecallDemoOptions):
        if field.name != "output":
            with pytest.raises(ValueError, match="must be > 0"):
                RecallDemoOptions(**{field.name: 0}).check()
