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
    names = ("peers", "linear_loss", "docs")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_plain_formulas_are_the_reference(script):
    peers = script("peers")
    p = peers.problem(9, 8, 31, torch.float64, scale=0.5)
    z, t = p.hidden @ p.weight.t(), p.t_hidden @ p.t_weight.t()
    for formula, objective, teacher in peers.OBJECTIVES.values():
        if objective is not None:
            want = reference.row_loss(z, p.target, objective, teacher=t if teacher else None).mean()
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
