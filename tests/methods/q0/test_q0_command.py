"""``burnish q0``: from a YAML file to snapshots, weights and a report; bad input is one line."""

import json

import pytest
import q0_tiny as q0
import tiny_models as tiny
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.methods.q0 import Ensemble, log_probs_of
from burnish.methods.q0.prior import mixture_nll
from burnish.methods.q0.text import make_tokenizer, read_texts, tokenized

SHAPE = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("q0")
    sources = folder / "sources" / "deep"
    sources.mkdir(parents=True)
    for i in range(12):
        (sources / f"m{i:02d}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * (2 + i % 3))
    (sources / "notes.md").write_text("not a source")
    (folder / "held.txt").write_text("def f99(x):\n    return x + 99\n" * 3)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    tiny.write_rows(folder / "mixed.jsonl", [{"text": "a"}, {"input_ids": [3]}])
    tiny.write_rows(folder / "ids.jsonl", [{"input_ids": [3, 4, 500]}, {"input_ids": [3]}])
    tiny.write_rows(folder / "none.jsonl", [{"words": "a"}])
    tiny.save(folder / "model")
    (folder / "q0.yaml").write_text(
        f"architecture: {SHAPE}\ntokenizer: bpe:280\ndata: {folder / 'sources'}\neval_data: {folder / 'held.txt'}\n"
        "cycles: 3\nepochs_per_cycle: 2\nseq_length: 16\nbatch_size: 2\nfitness_share: 0.2\ntrajectories: 2\n"
        "distill_after_cycles: 1\nlearning_rate: 1e-2\noptimizer: muon\nsoftcap: 15\nlogging_steps: 5\n"
    )
    return folder


def test_a_run_from_yaml(paths, tmp_path, capfd):
    out = tmp_path / "out"
    run = ["q0", str(paths / "q0.yaml"), "--output", str(out)]
    assert main([*run, "--members", "2"]) == 0
    said = capfd.readouterr()
    assert "of 6 snapshots" in said.out and "fitness=" in said.err and "cycle=3" in said.err
    report, weights = (json.loads((out / f"{name}.json").read_text()) for name in ("report", "weights"))
    names = [f"trajectory-{t}/cycle-00{c}" for t in range(2) for c in range(3)]
    assert [m["folder"] for m in report["members"]] == names
    fitness = load_file(out / "fitness.safetensors")["logp"]
    assert torch.equal(fitness, log_probs_of([out / n for n in names]))
    w = torch.tensor([m["weight"] for m in report["members"]], dtype=torch.float64)
    assert float(w.sum()) == pytest.approx(1) and 1 <= int((w > 0).sum()) <= 2
    kept = report["nll"]["kept"]
    assert kept["fitness"] == pytest.approx(mixture_nll(fitness, w))
    assert kept["eval"] == pytest.approx(mixture_nll(log_probs_of([out / n for n in names], "eval"), w))
    assert report["nll"]["learned"]["fitness"] <= min(kept["fitness"], report["nll"]["uniform"]["fitness"]) + 1e-6
    assert {e["folder"]: e["weight"] for e in weights["members"]} == {
        m["folder"]: m["weight"] for m in report["members"] if m["weight"] > 0
    }
    from transformers import AutoTokenizer

    snapshot = out / names[-1]
    assert AutoTokenizer.from_pretrained(snapshot).eos_token == "<eos>"
    assert (out / "trajectory-1" / "model.safetensors").is_file()
    assert json.loads((snapshot / "config.json").read_text())["final_logit_softcapping"] == 15
    assert len(Ensemble.from_pretrained(out)) == len(weights["members"])
    # a run that is done is only weighed again; one with other options is refused
    assert main([*run, "--resume", "--prior", "uniform"]) == 0
    said = capfd.readouterr()
    assert "trajectory 1 is done" in said.err and "6 of 6 snapshots, 6.00 effective" in said.out
    assert main([*run, "--resume", "--prior", "uniform", "--members", "2"]) == 0
    assert "2 of 6 snapshots, 2.00 effective" in capfd.readouterr().out
    assert main([*run, "--resume", "--cycles", "4"]) == 2
    assert "cycles is 4, but the run in" in capfd.readouterr().err
    assert main(run) == 2 and "is not empty" in capfd.readouterr().err
    assert main([*run, "--overwrite", "--cycles", "1", "--trajectories", "1"]) == 0
    assert [p.name for p in out.glob("trajectory-*/cycle-*")] == ["cycle-000"]


def test_from_a_model_with_ids(paths, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", q0.documents())
    out = tmp_path / "out"
    arguments = ["--model", str(paths / "model"), "--data", data, "--output", str(out), "--cycles", "1"]
    assert (
        main(
            [
                "q0",
                *arguments,
                "--seq-length",
                "16",
                "--fitness-share",
                "0.2",
                "--save-steps",
                "2",
                "--set",
                "save_total_limit=1",
            ]
        )
        == 0
    )
    assert (out / "trajectory-0" / "cycle-000").is_dir() and len(list(out.glob("trajectory-0/checkpoint-*"))) == 1


def test_tokenizers_write_any_text():
    texts = ["def f(x):\n    return 'é∑'\n", "naïve\tx\n\n"]
    for name, size in (("bytes", 257), ("bpe:300", 300)):
        tokenizer = make_tokenizer(name, texts * 9)
        assert len(tokenizer) <= size and tokenizer.pad_token_id == tokenizer.eos_token_id
        for text, ids in zip(texts, tokenized(texts, tokenizer), strict=True):
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == text
    assert [len(x) for x in tokenized(texts, make_tokenizer("bytes", []))] == [len(t.encode()) + 1 for t in texts]
    with pytest.raises(ValueError, match="bpe:256: at least 257 tokens"):
        make_tokenizer("bpe:256", [])


def test_texts_of_folders_and_files(paths):
    assert len(read_texts(str(paths / "sources"))) == 12
    assert read_texts(str(paths / "sources"), "*.md") == ["not a source"]
    assert len(read_texts(str(paths / "held.txt"))) == 1 and read_texts(str(paths / "ids.jsonl"))[1] == [3]


BASE = {"architecture": SHAPE, "tokenizer": "bytes", "data": "sources", "output": "out"}
CASES = {
    "no model": ({"architecture": None}, "--model or --architecture is required"),
    "two models": ({"model": "model"}, "--model or --architecture is required, and not both"),
    "no tokenizer": ({"tokenizer": None}, "--architecture needs --tokenizer"),
    "no model type": ({"architecture": "{hidden_size: 4}"}, "--architecture needs model_type; got hidden_size"),
    "model type": ({"architecture": "{model_type: lama}"}, "--architecture: "),
    "heads": ({"architecture": "{model_type: llama, hidden_size: 10, num_attention_heads: 4}"}, "--architecture: "),
    "vocabulary": ({"architecture": SHAPE[:-1] + ", vocab_size: 99}"}, "vocab_size is 99, the tokenizer has 257"),
    "model's tokenizer": ({"architecture": None, "model": "model"}, "--tokenizer goes with --architecture"),
    "missing data": ({"data": "nowhere"}, "data nowhere: no such file or folder"),
    "pattern": ({"pattern": "*.rs"}, "no file below it matches *.rs"),
    "empty": ({"data": "empty.txt"}, "data empty.txt: is empty"),
    "binary": ({"data": "binary.txt"}, "binary.txt: not UTF-8"),
    "mixed rows": ({"data": "mixed.jsonl"}, "mixed.jsonl:2: this row has input_ids"),
    "no text": ({"data": "none.jsonl"}, "none.jsonl:1: a row needs text, or input_ids"),
    "ids": ({"data": "ids.jsonl"}, "token 500 is outside the vocabulary of 257"),
    "one document": ({"data": "held.txt"}, "fitness_share=0.02 takes all 1 documents"),
    "eval data": ({"eval-data": "nowhere"}, "eval_data nowhere: no such file"),
    "range": ({"wd-floor": "1.5"}, "wd_floor must lie in [0, 1]; got 1.5"),
    "choice": ({"prior": "best"}, "--prior must be one of em, adamw, uniform; got 'best'"),
    "members": ({"members": "9"}, "--members must be at most the 8 snapshots; got 9"),
    "set ours": ({"set": "cycles=3"}, "--set cycles: use --cycles"),
    "set decided": ({"set": "warmup_steps=3"}, "warmup_steps=3: cycles decide it"),
    "set unknown": ({"set": "warmup_step=3"}, "HyperEpochConfig has no such field"),
    "two files": ({"config": "q0.yaml", None: "q0.yaml"}, "CONFIG.yaml and --config exclude each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_written(case, paths, monkeypatch, capfd):
    monkeypatch.chdir(paths)
    before = sorted(paths.rglob("*"))
    changes, expected = CASES[case]
    arguments = ["q0"]
    for key, value in {**BASE, **changes}.items():
        arguments += [value] if key is None else [f"--{key}", value] if value is not None else []
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith("burnish: error: ") and err.count("\n") == 1 and expected in err and not out, err
    assert sorted(paths.rglob("*")) == before
