"""``burnish chunkft plan``: from a config alone, and one line for bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")

import torch
import transformers

from burnish.chunkft import plan
from burnish.cli import main
from burnish.methods.chunkft_plan import empty_model
from burnish.methods.models import packaged_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for name, tied in (("model", False), ("tied", True)):
        transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied).save_pretrained(root / name)
    for name, text in {
        "empty": None, "broken": '{"model_type', "unknown": '{"model_type": "nope"}',
        "typed": '{"model_type": "llama", "hidden_size": "x"}', "other": '{"model_type": "t5"}',
    }.items():  # fmt: skip
        (root / name).mkdir()
        if text:
            (root / name / "config.json").write_text(text)
    (root / "file").write_text("x")
    return root


def lines(capfd, *arguments):
    assert main(["chunkft", "plan", *map(str, arguments)]) == 0
    out, err = capfd.readouterr()
    assert not err
    return {line.split()[0]: line.split() for line in out.splitlines() if line}


def test_prints_the_plan_of_a_config(folder, capfd):
    got = lines(capfd, "--model", folder / "model", "--chunks", 4)
    assert got["always"][1:4] == ["5", "160", "160"]  # norms of two layers and the last one, 32 each
    assert [r for r in got if r.isdigit()] == ["0", "1", "2", "3"]
    # embedding and head 4096 x 32; a layer: q and o 32 x 32, k and v 16 x 32, three of 48 x 32
    elements = 2 * 4096 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 160
    assert got["total"][3] == f"{elements:,}" and got["total"][4] == f"{18 * elements / 2**20:.1f}"
    assert "lm_head.weight" in got["3"][-1]


def test_options_reach_the_plan(folder, capfd):
    tied = lines(capfd, "--model", folder / "tied", "--chunks", 4)
    whole = lines(capfd, "--model", folder / "model", "--chunks", 4)
    assert int(whole["total"][1]) - int(tied["total"][1]) == 1 and "lm_head" not in "".join(tied["total"])
    cut = lines(capfd, "--model", folder / "model", "--chunks", 4, "--small", "chunk", "--dtype", "float32")
    assert cut["always"][1] == "0" and cut["total"][3] == whole["total"][3]
    assert float(cut["total"][4]) < float(whole["total"][4])  # 16 bytes an element and not 18


def test_memory_follows_the_batch_and_the_checkpointing(folder, capfd):
    small = lines(capfd, "--model", folder / "model", "--chunks", 4, "--seq", 512)
    large = lines(capfd, "--model", folder / "model", "--chunks", 4, "--seq", 512, "--batch", 4)
    plain, checkpointed, eight = (float(x) for x in large["activations"][1:])
    assert plain > checkpointed == eight and plain > 3.5 * float(small["activations"][1])
    assert small["weights"] == large["weights"] and {"ring", "gradients", "device,", "host,"} <= small.keys()


def test_the_model_is_empty(folder):
    model = empty_model(str(folder / "tied"), torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_align(folder, capfd, monkeypatch):
    seen = []
    monkeypatch.setattr("burnish.chunkft.plan", lambda *a, **k: seen.append((a[1:], k)) or "cut")
    monkeypatch.setattr("burnish.methods.chunkft_plan.report", lambda model, cut, batch, seq: cut)
    lines(capfd, "--model", folder / "model", "--chunks", 3, "--no-align")
    lines(capfd, "--model", folder / "model", "--chunks", 3)
    assert seen == [((3,), {"small": "always", "align": False}), ((3,), {"small": "always", "align": True})]


def test_the_packaged_model(capfd):
    try:
        packaged_weights()
    except ValueError as error:
        pytest.skip(str(error))
    got = lines(capfd, "--model", "smollm2", "--chunks", 8)
    assert got["total"][1] == "272" and got["total"][3] == "134,515,008" and "7" in got  # tied: no head of its own
    page = (Path(__file__).parents[2] / "docs" / "chunkft.md").read_text()
    for line in str(plan(empty_model("smollm2", torch.bfloat16), 4)).splitlines():
        assert f"    {line}\n" in page


BAD = {
    "no chunks": (["--model", "model"], "--chunks"),
    "no model": (["--chunks", "2"], "--model"),
    "not a number": (["--model", "model", "--chunks", "two"], "argument --chunks: invalid int value: 'two'"),
    "no rows": (["--model", "model", "--chunks", "2", "--batch", "0"], "batch must be a whole number, at least 1"),
    "zero": (["--model", "model", "--chunks", "0"], "num_chunks must be a whole number, at least 1; got 0"),
    "too many": (["--model", "model", "--chunks", "8641"], "for no chunk to be empty; got 8641: there are 8640 rows"),
    "small": (["--model", "model", "--chunks", "2", "--small", "x"], "argument --small: invalid choice: 'x'"),
    "dtype": (["--model", "model", "--chunks", "2", "--dtype", "float64"], "argument --dtype: invalid choice"),
    "nowhere": (["--model", "./nowhere", "--chunks", "2"], "nowhere: no such directory"),
    "a file": (["--model", "file", "--chunks", "2"], "a directory or a hub name is needed, this is a file"),
    "no config": (["--model", "empty", "--chunks", "2"], "the directory has no config.json"),
    "not json": (["--model", "broken", "--chunks", "2"], "model broken: cannot be loaded: "),
    "unknown type": (["--model", "unknown", "--chunks", "2"], "model unknown: cannot be loaded: "),
    "wrong type": (
        ["--model", "typed", "--chunks", "2"],
        "model typed: cannot be loaded: Field 'hidden_size' expected",
    ),
    "not causal": (["--model", "other", "--chunks", "2"], "model other: cannot be loaded: Unrecognized configuration"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    arguments, message = BAD[case]
    assert main(["chunkft", "plan", *arguments]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("burnish: error: ") and err.count("\n") == 1 and message in err and not out, err


def test_no_action(capfd):
    assert main(["chunkft"]) == 2 and "ACTION" in capfd.readouterr().err


def test_the_command_line_is_light():
    code = "import sys, burnish.cli, burnish.chunkft; print({'transformers', 'trl', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
