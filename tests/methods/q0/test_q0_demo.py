"""The demo: its texts are apart, every arm runs at equal epochs, and the page shows what was measured."""

import json
from pathlib import Path

import pytest
import torch

from burnish.cli import main
from burnish.methods.q0 import demo
from burnish.methods.q0.demo_options import Q0DemoOptions

ROOT = Path(__file__).parents[3]


def test_the_three_texts_are_apart():
    names = [*demo.TRAIN, *demo.FITNESS, *demo.VALIDATION]
    assert len(set(names)) == len(names)
    pieces = {name: demo.documents((name,)) for name in names}
    assert all(len(p) > 1 for p in pieces.values())
    data = demo.texts()
    for kind, own in (("train", demo.TRAIN), ("fitness", demo.FITNESS), ("eval", demo.VALIDATION)):
        assert len(data[kind]) == sum(len(pieces[n]) for n in own)
    assert 0.2e6 < demo.model(0).num_parameters() < 0.3e6


def test_the_mean_decay_is_that_of_what_is_applied():
    assert demo.mean_decay(10) == pytest.approx(
        sum(a * b for a, b in zip([1, 0.908, 0.816, 0.724, 0.632, 0.54, 0.448, 0.356, 0.264, 0.172],
                                  [0.70, 0.73, 0.76, 0.79, 0.82, 0.85, 0.88, 0.91, 0.94, 0.97], strict=True)) / 5.86
    )  # fmt: skip


def test_what_is_chosen_is_chosen_by_the_fitness_text():
    fitness = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.2, 0.9]]).log()
    held_out = torch.tensor([[0.9, 0.9], [0.1, 0.1]]).log()
    found = demo._mixed(fitness, held_out)
    own = found["members_fitness"]
    assert found["best"] == found["members"][own.index(min(own))]
    assert found["learned_fitness"] <= min(own)
    assert found["top"]["refit"][-1] == pytest.approx(found["learned"], abs=1e-3)


def test_every_arm_runs(tmp_path, capsys, monkeypatch):
    for name, few in (("TRAIN", ("sched",)), ("FITNESS", ("reprlib",)), ("VALIDATION", ("sched",))):
        monkeypatch.setattr(demo, name, few)
    monkeypatch.setattr(demo, "DECAYS", (0.1, 1.0))
    monkeypatch.setattr(demo, "ProcessPoolExecutor", Here)
    out = tmp_path / "demo"
    arguments = ["--seeds", "1", "--epochs", "2", "--runs", "2", "--epochs-per-cycle", "1", "--distill-after", "1"]
    arguments += ["--batch-size", "16", "--output", str(out)]
    assert main(["demo", "q0", *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    assert demo.table(results) in capsys.readouterr().out and len(results["seeds"]) == 1
    rows = results["seeds"][0]["rows"]
    assert list(rows) == [demo.SINGLE, demo.STOPPED, demo.LONG, demo.INDEPENDENT, *demo.ARMS, demo.TUNED]
    for name in (demo.LONG, *demo.ARMS, demo.TUNED):
        assert len(rows[name]["members"]) == 2 and sum(rows[name]["weights"]) == pytest.approx(1)
    assert len(rows[demo.INDEPENDENT]["members"]) == 2 and (out / "curves.png").is_file()
    # what is finished is not run again, and other options are refused
    monkeypatch.setattr(demo, "job", None)
    assert main(["demo", "q0", *arguments]) == 0
    with pytest.raises(ValueError, match="of a demo with other options"):
        demo.run(Q0DemoOptions(epochs=8, output=str(out)))


class Here:
    """A pool of this process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.mark.parametrize("flag, value", [("--seeds", "0"), ("--learning-rate", "0"), ("--epochs", "9")])
def test_bad_options(flag, value, tmp_path, capsys):
    assert main(["demo", "q0", flag, value, "--output", str(tmp_path / "x")]) == 2
    assert flag[2:] in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_page_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo_q0.json").read_text())
    assert results["options"]["seeds"] == 3
    free = {"output": "", "processes": 0}
    assert {**Q0DemoOptions().__dict__, **free} == {**results["options"], **free}
    assert demo.table(results) in (ROOT / "docs" / "q0.md").read_text()
