"""The benchmark scripts at sizes that take seconds: formulas, columns, targets, generated tables."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from burnish import reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ as it would import its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("peers", "linear_loss", "docs", "target_sft", "chunkft", "oft")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_plain_formulas_are_the_reference(script):
    peers = script("peers")
    p = peers.problem(9, 8, 31, torch.float64, scale=0.5)
    z, t = p.hidden @ p.weight.t(), p.t_hidden @ p.t_weight.t()
    for name, (formula, objective, teacher) in peers.OBJECTIVES.items():
        if objective is not None:
            given = peers.beside(name, p)
            given |= {"teacher_softcap": given.get("softcap")}
            want = reference.row_loss(z, p.target, objective, teacher=t if teacher else None, **given).mean()
            torch.testing.assert_close(formula(z, p.target, t if teacher else None, p), want, rtol=1e-10, atol=1e-12)


def test_ours_against_the_exact_gradients(script):
    peers = script("peers")
    p = peers.problem(9, 8, 31, torch.float32)
    for way in peers.our_ways(("torch",)):
        for name in way.objectives:
            q = p.trainable()
            way.loss(name, q).backward()
            _, dx, dw = peers.exact(name, p)
            torch.testing.assert_close(q.hidden.grad.double(), dx, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(q.weight.grad.double(), dw, rtol=1e-4, atol=1e-8)


def test_linear_loss_script(script, monkeypatch, tmp_path, capsys):
    module, out = script("linear_loss"), tmp_path / "linear_loss_cpu.json"
    command = ["x", "--shapes", "40,16,257", "--dtypes", "float32", "bfloat16", "--objectives", "nll", "kd",
               "--ways", "burnish_host", "burnish_torch", "torch", "torch_upcast", "--repeats", "2",
               "--output", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    result = json.loads(out.read_text())
    assert len(result["cells"]) == 4
    for cell in result["cells"]:
        assert not cell["failed"]
        ways = {r["way"]: r for r in cell["rows"]}
        assert ways["floor"]["of_floor"] == 1.0
        assert ways["torch"]["dw_error"] < 0.05 and ways["torch"]["memory_rows"] == 40
        assert {t["target"] for t in cell["targets"]} >= {"time / floor"} or cell["objective"] == "kd"
    assert "targets met" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    monkeypatch.setattr(module.Cell, "measure", lambda self: pytest.fail("a cell that was there"))
    module.main()
    docs = script("docs")
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert "| nll, float32 |" in docs.linear_loss_cpu()
    assert docs.correctness() == docs.NOT_YET


def test_a_slow_way_gets_fewer_rows(script):
    module = script("linear_loss")

    class Clock:
        def seconds(self, call):
            return call()

    rows, whole = module.affordable(lambda n: lambda: 2 + 0.1 * n, 4096, 20.0, Clock())
    assert rows == 128 and whole == pytest.approx(411.6)
    rows, _ = module.affordable(lambda n: lambda: 0.001 * n, 4096, 20.0, Clock())
    assert rows == 4096


def test_memory_of_the_process_sees_a_buffer(script):
    device = script("linear_loss").Device("cpu")
    extra = device.extra_bytes(lambda: torch.ones(16 << 20))
    if extra is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 < extra < 80 << 20


def test_oft_script(script):
    """Errors are those of a rotation, what is kept is what the page says, and the table has every column."""
    module = script("oft")
    for dtype in module.DTYPES:
        row = module.measure((40, 96, 32), 16, dtype, 2)
        eps = {"fp32": 1e-6, "bf16": 4e-3}[dtype]
        assert all(row["error"][name] < eps for name in ("peft", "burnish", "burnish torch"))
        memory, x = row["memory"], 40 * 96 * 4 / 2**20
        assert memory["burnish"]["kept_mib"] == 0 and memory["peft"]["kept_mib"] > (x if dtype == "bf16" else 0)
        assert all(ms > 0 for ms in row["ms"].values()) and {"peft layer", "burnish layer"} <= row["ms"].keys()
    result = {"machine": "m", "threads": 1, "torch": "t", "peft": "p", "rows": [row]}
    assert "| 40 x 96 -> 32 | 16 | bf16 |" in module.table(result) and "adapter in bf16" in module.table(result)


def test_chunkft_script(script, monkeypatch, tmp_path, capsys, one_thread):
    study, module, out = script("target_sft"), script("chunkft"), tmp_path / "chunkft.json"
    study.model(study.Settings(width=64, layers=3), 0).save_pretrained(tmp_path / "model")
    study.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(module, "TASKS", {"spell_backward": module.TASKS["spell_backward"]})
    sizes = {"length": 80, "updates": 8, "batch": 1, "held-out": 2, "evaluations": 2, "rounds": 2}
    methods = ["adamw", "adamw_default", "chunkft_8", "adalomo", "lora", "pair"]
    command = ["x", "--model", str(tmp_path / "model"), "--one-process", "--output", str(out), "--methods", *methods]
    command += [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    result = json.loads(out.read_text())
    rows = result["methods"]
    assert [name for name, row in rows.items() if "failed" in row] == ["adalomo"]  # needs a GPU, or is not installed
    parameters = 4 * sum(p.numel() for p in study.model(study.Settings(width=64, layers=3), 0).parameters())
    assert rows["adamw"]["gradients"] == parameters
    assert 2 * parameters <= rows["adamw"]["state"] < 2.01 * parameters
    ours = rows["chunkft_8"]
    assert ours["gradients"] < parameters / 2 and 0 < ours["state"] < parameters and ours["store"] > ours["state"]
    assert rows["adamw"]["curve"][0]["loss"] == ours["curve"][0]["loss"] == rows["lora"]["curve"][0]["loss"]
    assert [p["tokens"] for p in ours["curve"]] == [0, 320, 640] and not rows["adamw_default"]["curve"]
    assert len(result["pair"]["seconds"]["chunkft_8"]) == 2 and len(result["targets"]) == 2
    assert out.with_suffix(".png").exists() and "does not run here" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    monkeypatch.setattr(module, "work", lambda *_: pytest.fail("a method that was there"))
    module.main()
    docs = script("docs")
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert "| ChunkFT, N = 8 | 0.0001 |" in docs.chunkft() and "AdaLomo (lomo-optim" in docs.chunkft()


def test_chunkft_targets_can_be_missed(script):
    module = script("chunkft")

    def met(resident, ratio):
        rows = {"adamw": {"resident": 100}, "chunkft_8": {"resident": resident}}
        return [t["met"] for t in module.targets({"methods": rows, "pair": {"ratio": ratio}})]

    assert met(16, 0.76) == [False, False] and met(15, 0.75) == [True, True]
    assert module.targets({"methods": {"chunkft_8": {"failed": "why"}}, "pair": {"failed": "why"}}) == []
