"""The demonstration's parts, and the whole of it at a size that shows nothing but that it runs."""

import copy
import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from burnish.cli import main
from burnish.methods.demo_options import RecallDemoOptions
from burnish.methods.qk_restore import demo, demo_report, toy
from burnish.paths import Additive


def test_a_variant_is_the_layers_and_parts_that_it_says():
    before, after = toy.model(0), toy.model(1)
    heads = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    for layers, parts in demo.VARIANTS.values():
        work = copy.deepcopy(after)
        Additive(before, after, demo.select(after, layers, parts)).load_into(work, 0)
        inside = [h for p, h in heads.items() if p in parts] + (["mlp."] if "m" in parts else [])
        for name, x in work.state_dict().items():
            layer = re.match(r"model\.layers\.(\d)\.", name)
            moved = layer and int(layer[1]) in ((1, 3) if layers == "softmax" else (0, 2))
            moved = moved and any(h in name for h in inside)
            assert torch.equal(x, (before if moved else after).state_dict()[name]), (layers, parts, name)


def test_accuracy_counts_what_is_labelled():
    net = toy.model(0).eval()
    ids, labels = toy.chain(40, torch.Generator().manual_seed(0))
    top = net(ids).logits.argmax(-1)
    asked = labels[:, 1:] != -100
    want = float((top[:, :-1] == labels[:, 1:])[asked].float().mean())
    assert demo.accuracy(net, ids, labels) == pytest.approx(want)


def test_a_few_updates_learn():
    """The chain over six steps is learned in part by a hundred updates; frozen queries and keys stay."""
    net = toy.model(0)
    names = demo.select(net, "softmax", "qk")
    kept = {n: net.get_parameter(n).detach().clone() for n in names}
    for n in names:
        net.get_parameter(n).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    shares = []

    def batches(share):
        shares.append(share)
        return toy.chain(8, g)

    losses = demo.train(net, 40, 3e-3, batches, "", quiet=True)
    assert losses[0] > 3.5 and losses[-1] < 2.5 and shares == [i / 40 for i in range(40)]
    assert all(torch.equal(net.get_parameter(n), x) for n, x in kept.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_whole_run(workers, tmp_path, monkeypatch, capsys):
    for module in (demo, demo_report):
        monkeypatch.setattr(module, "LENGTHS", (32, 40))
    # processes of their own would have the real lengths
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    out = tmp_path / "out"
    flags = {"seeds": 2, "pretrain-steps": 2, "sft-steps": 2, "batch-size": 2, "problems": 32, "seed": 4}
    flags |= {"workers": workers, "output": out}
    arguments = [x for k, v in flags.items() for x in (f"--{k}", str(v))]
    assert main(["demo", "qk-restore", *arguments]) == 0
    result = json.loads((out / "results.json").read_text())
    assert [s["seed"] for s in result["seeds"]] == [4, 5] and (out / "curves.png").stat().st_size > 1000
    for seed in result["seeds"]:
        assert list(seed["regimes"]) == list(demo_report.REGIMES)
        rows = seed["regimes"]["chain"]["rows"]
        assert {"before", "after", *demo.VARIANTS, demo_report.PRO, demo_report.FROZEN} < set(rows)
        assert all(set(row) == {"chain", "recall 32", "recall 40"} for row in rows.values())
        assert seed["bytes_changed"] == 4 * 64 * 64 * 4 and len(seed["regimes"]["chain"]["drift"]) == 16
        assert set(demo_report._DRAWN) <= set(rows)
    assert (out / "seed-5" / "restored" / "qk_restore.json").is_file()
    said = capsys.readouterr().out
    assert "| QK-Restore |" in said and "Fine-tuned on: chain and 5 % recall." in said
    assert demo_report.table(result) in said
    assert main(["demo", "qk-restore", *arguments]) == 2  # its output is never overwritten
    assert "exists already" in capsys.readouterr().err


def test_the_table_pairs_within_seeds():
    """Gains and losses are differences within a seed: a seed's own level is not in their interval."""

    def row(chain, recall):
        return {"chain": chain, "recall 32": recall, "recall 40": recall}

    rows = [
        {"before": row(0, 1), "after": row(0.9 + s, 0.2 + s), "QK-Restore": row(0.8 + s, 0.5 + s)} for s in (0, 0.1)
    ]
    lines = demo_report._regime([{"regimes": {"chain": {"rows": r}}} for r in rows], "chain")
    assert lines[0] == "| | chain | recall 32 | recall 40 | recall, gained | chain, lost |"
    assert lines[-1].endswith("| +30.0 ± 0.0 | +10.0 ± 0.0 |") and lines[-1].startswith("| QK-Restore | 85.0 ± 63.5 |")


def test_paths_are_compared_at_the_same_chain():
    def row(chain, recall):
        return {"chain": chain, "recall 32": recall, "recall 40": recall}

    rows = {"before": row(0, 1), "after": row(1, 0.2), "all weights, 50% of the way back": row(0.8, 0.6)}
    assert demo_report._matched({**rows, "QK-Restore": row(0.9, 0.5)}) == pytest.approx(0.1)
    assert demo_report._matched({**rows, "QK-Restore": row(1.0, 0.5)}) == pytest.approx(0.3)
    del rows["after"]
    assert demo_report._matched({**rows, "QK-Restore": row(0.9, 0.5)}) is None  # out of the line's reach


def test_options():
    for field in dataclasses.fields(RecallDemoOptions):
        if field.name not in ("output", "seed"):
            with pytest.raises(ValueError, match="must be > 0"):
                RecallDemoOptions(**{field.name: 0}).check()
    with pytest.raises(ValueError, match="seed must be >= 0"):
        RecallDemoOptions(seed=-1).check()
