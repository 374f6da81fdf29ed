"""The demo on a tiny model: every part of it runs, and what it reports is what happened."""

import json

import pytest

from burnish.cli import main
from burnish.methods import demo
from burnish.methods.demo_options import DemoOptions


def test_demo_end_to_end(model_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    code = main(["demo", "sft", "--model", model_folder, "--steps", "3", "--batch-size", "4", "--problems", "5",
                 "--output", str(out)])  # fmt: skip
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == {"nll", "target_sft"}
    for method in results["methods"].values():
        assert len(method["loss"]) == len(method["token_accuracy"]) == 3
        assert method["tokens_per_second"] > 0
        assert 0 <= method["after"] <= 1
    assert (out / "curves.png").stat().st_size > 5000
    assert {p.name for p in out.iterdir()} == {"results.json", "curves.png"}  # nothing half written beside them
    text = capsys.readouterr().out
    assert "accuracy before" in text and "MiB" in text
    # both began at the same weights: the first loss of SFT is the NLL, Target-SFT's is another number
    assert results["methods"]["nll"]["loss"][0] != results["methods"]["target_sft"]["loss"][0]
    assert results["methods"]["nll"]["token_accuracy"][0] == results["methods"]["target_sft"]["token_accuracy"][0]


def test_rows_answers_and_verifier_agree():
    """The gold completion, read back as an answer, solves its own problem; a wrong order does not."""
    data = demo.load_task(demo.TASK, size=20, seed=3, **demo.TASK_ARGUMENTS)
    for entry in data.entries:
        row = demo.row(entry)
        assert demo.words(entry) in row["prompt"]
        assert data.task.score_answer(demo.answer(row["completion"]), entry) == 1.0
        assert data.task.score_answer(demo.words(entry), entry) < 1.0


def test_memory_report_measures_the_fused_loss():
    import tiny_models

    model = tiny_models.llama(vocabulary=4096)
    for row in demo.memory(model, tokens=512):
        assert row["gradient_error"] < 1e-5
        assert row["materialised"] >= 512 * 4096 * 4
        assert row["fused"] < row["materialised"]


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("--eta", "2", "eta must lie in"),
        ("--steps", "0", "steps must be at least 1"),
        ("--model", "./nowhere", "no such directory"),
    ],
)  # fmt: skip
def test_bad_options(flag, value, text, capsys, tmp_path):
    assert main(["demo", "sft", flag, value, "--output", str(tmp_path / "x")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_defaults_check_themselves():
    assert DemoOptions().check() == DemoOptions()
