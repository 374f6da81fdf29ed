"""``burnish ra-rft``: stages that survive being stopped, one line for bad input, and the demo in small."""

import json
from pathlib import Path

import pytest
import stage_functions

from burnish.cli import main
from burnish.methods.ra_rft import InfoNCELoss, Retriever

KINDS = ("add", "sub", "mul", "tree")


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def files(tmp_path, model_folder, encoder_folder):
    data = [{"prompt": f"{k} {i} and {i}", "answer": str(i), "type": "sum"} for k in KINDS for i in range(3)]
    corpus = [{"problem": f"problem {i} {k}", "trace": f"{k} {i}", "id": f"{k}{i}"} for k in KINDS for i in range(2)]
    return {
        "model": model_folder, "data": write(tmp_path / "data.jsonl", data), "encoder": encoder_folder,
        "corpus": write(tmp_path / "corpus.jsonl", corpus), "judge": "stage_functions:same_word",
        "output": str(tmp_path / "run"), "reward": "stage_functions:length", "candidates": 0, "retriever_epochs": 2,
        "retriever_batch_size": 8, "generations": 2, "batch_size": 4, "max_completion_length": 4, "max_steps": 3,
        "save_steps": 1, "logging_steps": 1, "learning_rate": 0.01,
    }  # fmt: skip


def command(files, *more, **changes) -> list[str]:
    given = {**files, **changes}
    flags = [x for k, v in given.items() if v is not None for x in (f"--{k.replace('_', '-')}", str(v))]
    return ["ra-rft", *flags, "--set", "disable_tqdm=true", *more]


@pytest.fixture(autouse=True)
def fresh():
    stage_functions.calls.update(judge=0, reward=0)
    stage_functions.stop_at.clear()


def test_stopped_in_every_stage_it_goes_on_where_it_was(files, capsys, monkeypatch):
    """In each stage that takes long; what is done is not done again, and the end is that of one run."""
    assert main(command(files, output=files["output"] + "-whole")) == 0
    whole = dict(stage_functions.calls)
    assert whole == {"judge": 12 * 8, "reward": 3}
    stage_functions.calls.update(judge=0, reward=0)
    stage_functions.stop_at.update(judge=50, reward=2)
    assert main(command(files)) == 130
    out = Path(files["output"])
    assert len((out / "labels.jsonl").read_text().splitlines()) == 49 and not (out / "retriever").exists()
    assert main(command(files)) == 2 and "--resume" in capsys.readouterr().err
    steps, real = [], InfoNCELoss.forward

    def stopped(self, *args):
        steps.append(self.training)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(InfoNCELoss, "forward", stopped)
        assert main(command(files, "--resume")) == 130
        kept = [p.name for p in (out / "retriever-training").glob("checkpoint-*")]
        assert kept == ["checkpoint-3"] and not (out / "retriever").exists()  # an epoch of 11 questions' 22 pairs
        assert main(command(files, "--resume")) == 130  # now in the policy
    assert len(steps) == 4 + 3  # the first epoch once
    assert stage_functions.calls == {"judge": 97, "reward": 2}  # the stopped one twice, no other
    assert (out / "contexts.jsonl").exists() and sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-1"]
    stamps = {n: (out / n).stat().st_mtime_ns for n in ("labels.jsonl", "retriever", "contexts.jsonl")}
    assert main(command(files, "--resume")) == 0
    assert stamps == {n: (out / n).stat().st_mtime_ns for n in stamps}
    assert stage_functions.calls["judge"] == 97 and stage_functions.calls["reward"] == 4
    shown = capsys.readouterr()
    assert "3 steps, mean reward" in shown.out and "resuming from checkpoint-1" in shown.err
    for name in ("labels.jsonl", "contexts.jsonl"):
        assert (out / name).read_text() == (Path(f"{out}-whole") / name).read_text()
    rows = [json.loads(x) for x in (out / "contexts.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(len(r["context_ids"]) == 1 and len(r["positive_ids"]) == 2 for r in rows)
    assert all(r["prompt"].startswith("Here is a solved problem") for r in rows)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in log if "retrieval/recall@1" in e] == [1, 2, 3]
    found = Retriever.load(out / "retriever").search(["add 9"])
    assert found[0][0].id in [f"{k}{i}" for k in KINDS for i in range(2)]


def test_yaml_no_judge_late_interaction_and_overwrite(files, tmp_path):
    """The encoder as it is: no label, and a run over what another left."""
    import yaml

    options = {**files, "judge": "none", "late_interaction": True, "head": "trl", "max_steps": 1}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options))
    out = Path(files["output"])
    out.mkdir()
    (out / "labels.jsonl").write_text("of another run\n")
    assert main(["ra-rft", "--config", str(config), "--overwrite", "--set", "disable_tqdm=true"]) == 0
    assert not (out / "labels.jsonl").exists() and (out / "model.safetensors").exists()
    assert json.loads((out / "retriever" / "retriever.json").read_text())["late_interaction"] is True
    assert stage_functions.calls["judge"] == 0


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("no such file", {"data": "nothing.jsonl"}),
        ("no rows", {"data": []}),
        ("row 1 has no column 'prompt'; got question", {"data": [{"prompt": "a", "answer": "1"}, {"question": "b"}]}),
        ("row 0 has no column 'answer'", {"data": [{"prompt": "a"}], "reward": "boxed"}),
        ("no chat template", {"data": [{"prompt": [{"role": "user", "content": "a"}]}]}),
        ("no rows", {"corpus": []}),
        ("no column 'trace'", {"corpus": [{"problem": "a"}]}),
        ("'trace' must be a text", {"corpus": [{"problem": "a", "trace": 1}]}),
        ("is empty once", {"benchmarks": [{"prompt": f"problem {i} {k}"} for k in KINDS for i in range(2)]}),
        ("benchmarks .*no column 'prompt'", {"benchmarks": [{"text": "a"}]}),
        ("--judge must be one of its names or MODULE:FUNCTION; got 'gpt'", {"judge": "gpt"}),
        ("--judge nothing:at_all: cannot be imported", {"judge": "nothing:at_all"}),
        ("--reward stage_functions:calls: is not callable", {"reward": "stage_functions:calls"}),
        ("--reward task needs reasoning-gym data", {"reward": "task"}),
        ("encoder .*cannot be loaded", {"encoder": "/no/such/encoder"}),
        ("no such directory", {"model": "/no/such/model"}),
        ("unknown reasoning-gym task", {"corpus": "reasoning-gym:nothing"}),
        ("corpus-args go with", {"corpus_args": "{size: 3}"}),
        ("--generations must be at least 2", {"generations": 1}),
        ("--temperature must be > 0", {"temperature": 0}),
        ("--corpus is required", {"corpus": None}),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(files, tmp_path, capsys, match, change):
    import re

    change = {k: write(tmp_path / f"other-{k}.jsonl", v) if isinstance(v, list) else v for k, v in change.items()}
    assert main(command(files, **change)) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("burnish: error: ") and re.search(match, last), err
    assert not Path(files["output"]).exists()


def test_what_set_may_not_have(files, capsys):
    assert main(command(files, "--set", "torch_compile=true")) == 2
    assert "--set torch_compile=true needs --head trl" in capsys.readouterr().err
    assert main(command(files, "--set", "num_generations=4")) == 2
    assert "--set num_generations: use --generations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("reward words must return finite numbers; got 'good'", {"reward": "stage_functions:words", "judge": "none"}),
        ("no label is positive", {"judge": "stage_functions:never"}),
    ],
)
def test_what_turns_out_on_the_way_is_one_line(files, match, change):
    with pytest.raises(SystemExit, match=match):
        main(command(files, **change))


def test_the_demo_in_small(tmp_path, capsys):
    """All arms, table, plot and JSON, at sizes that show nothing but that it runs."""
    pytest.importorskip("matplotlib")
    small = {
        "seeds": 2,
        "steps": 2,
        "prompts": 4,
        "generations": 4,
        "corpus": 60,
        "problems": 16,
        "base_steps": 4,
        "workers": 1,
    }
    flags = [x for k, v in small.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["demo", "ra-rft", *flags, "--output", str(tmp_path)]) == 0
    from burnish.methods.ra_rft import demo_report as demo

    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "curves.png").exists() and demo.table(results) in capsys.readouterr().out
    assert [s["seed"] for s in results["seeds"]] == [0, 1]
    assert all(set(s["arms"]) == set(demo.ARMS) and len(s["reward"]["ra_rft"]) == 2 for s in results["seeds"])
    assert main(["demo", "ra-rft", "--generations", "1"]) == 2


def test_the_toy_is_what_it_says():
    """Answers follow from the table; the base model copies; the guard and the random arm keep to their rules."""
    import torch

    from burnish.methods.ra_rft import demo, demo_report

    toy = demo.Toy(3)
    for _ in range(50):
        row = toy.draw()
        topic, again, *structure, a, b = row["prompt"].split()
        name = toy.operation[tuple(int(s[1]) for s in structure)]
        assert topic == again == row["type"] and row["operation"] == name
        assert row["answer"] == f"d{demo.OPERATIONS[name](int(a[1]), int(b[1]))}"
    corpus = toy.corpus(40)
    found = demo.RandomOfTopic(corpus, 0).search([corpus[0].problem, row["prompt"]])
    assert all(not hits or corpus[hits[0].place].type == q.split()[0]
               for q, hits in zip([corpus[0].problem, row["prompt"]], found, strict=True))  # fmt: skip
    assert not found[0] or corpus[found[0][0].place].problem != corpus[0].problem
    towers = demo.train_towers([row] * 9, corpus, 0, steps=2)
    hits = demo.TowerRetriever(towers, corpus).search([d.problem for d in corpus])
    assert all(corpus[h[0].place].problem != d.problem for h, d in zip(hits, corpus, strict=True))
    assert demo_report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))
    # the expectation over both tokens, against samples
    model = demo.base_model(2, 0)
    prompts, answers = [row["prompt"]] * 4000, [row["answer"]] * 4000
    exact = demo.accuracy(model, prompts[:1], answers[:1])["sampled"]
    torch.manual_seed(0)
    x = demo.ids(prompts)
    for _ in range(2):
        x = torch.cat([x, torch.multinomial(model(x).logits[:, -1].softmax(-1), 1)], 1)
    assert exact == pytest.approx(float((x[:, -1] == demo.ids(answers)[:, 0]).float().mean()), abs=0.015)
