"""Whole arenas: what a run writes, what a killed one does again, how several processes share the runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import arenas
import pytest
import torch
import yaml

from burnish.cli import main
from burnish.methods import load_model
from burnish.methods.peft_arena import all_techniques, make_config, read_planned
from burnish.methods.peft_arena import arena as arena_module
from burnish.methods.peft_arena.arena import Arena, snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return arenas.base(tmp_path_factory.mktemp("model") / "base")


def write(folder, values):
    file = folder / "arena.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_every_technique_runs(model, tmp_path, capsys):
    methods = [
        {"method": name, "lr": 1e-2, **({"r": 2} if t.size == "r" else {})} for name, t in all_techniques().items()
    ]
    values = arenas.values(model, tmp_path / "out", methods=methods, steps=6, metrics={"rows": 2})
    assert main(["peft-arena", "run", write(tmp_path, values)]) == 0
    runs = [json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").glob("*.json")]
    assert len(runs) == len(methods)
    for run in runs:
        assert set(run["final"]["test"]["suites"]) == {"prefix", "copy", "sort"}
        # General is the mean of the named suites, and of nothing else
        suites = run["final"]["test"]["suites"]
        assert run["final"]["test"]["retention"] == pytest.approx((suites["copy"] + suites["sort"]) / 2)
        assert run["distance"] > 0 and all(torch.isfinite(torch.tensor(v)) for v in run["metrics"].values())
        family = all_techniques()[run["run"]["technique"]].family
        own = {"full": ["line"], "lora": ["scale"], "oft": ["generator", "safe", "min", "line"]}
        assert list(run["paths"]) == own[family]
        for path in run["paths"].values():
            first, *_, last = path["points"]
            assert (first["alpha"], first["distance"], first["target"]) == (0, 0, run["base"]["held_out"]["target"])
            assert last["distance"] <= 1 + 1e-5
    assert not list((tmp_path / "out" / "training").glob("*"))
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in html and "src=" not in html and "@import" not in html and "<link" not in html
    assert all("w3.org" in part[:40] for part in html.split("http")[1:])  # names of XML, which nothing fetches
    # a second time nothing is left to do
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*.json")}
    assert main(["peft-arena", "run", write(tmp_path, values)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*.json")} == stamps
    assert f"{len(runs)} of {len(runs)} runs are done already" in capsys.readouterr().err


class Killed(Exception):
    pass


@pytest.mark.parametrize("name, arguments", [
    ("lora", {"r": 2}), ("pissa", {"r": 2}), ("milora", {"r": 2}), ("adalora", {"r": 3}), ("oft", {"block_size": 16}),
    ("chunkft", {"chunks": 2, "steps_per_chunk": 2}), ("vera", {"r": 8}),
])  # fmt: skip
def test_a_cut_training_has_the_bits_of_a_whole_one(model, tmp_path, monkeypatch, name, arguments):
    """Cut within step 6, saved at every second step; once more where it was cut after the last step."""
    from burnish.methods.peft_arena import train
    from burnish.methods.peft_arena.plan import Run

    values = arenas.values(model, tmp_path / "out", save_steps=2, methods=[{"method": name, **arguments}])
    config = make_config(values)
    from burnish.methods.peft_arena import all_techniques

    full = all_techniques()[name].arguments(arguments)
    run = Run(name, name, full, 1e-2, 7, 3, "", 0, None)
    rows = arenas.toy.rows("prefix", 64)

    def go(folder, control=""):
        net, tok = load_model(model)
        trained = train.train(config, dataclasses.replace(run, control=control), net, tok, rows, folder)
        return snapshot(trained.model), trained.loss

    whole, loss = go(tmp_path / "whole")
    step, count = train.TargetSFTTrainer.training_step, []

    def breaks(self, *args, **kwargs):
        count.append(1)
        if len(count) == 6:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train.TargetSFTTrainer, "training_step", breaks)
    with pytest.raises(Killed):
        go(tmp_path / "cut")
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    again, losses = go(tmp_path / "cut")
    assert len(count) == 6 + 3 and losses == loss
    assert all(torch.equal(x, again[n]) for n, x in whole.items())
    third, _ = go(tmp_path / "cut", "lr x 0.5")  # as a control it is the same training
    assert len(count) == 9 and all(torch.equal(x, third[n]) for n, x in whole.items())


def command(file):
    return [sys.executable, "-m", "burnish.cli", "peft-arena", "run", file]


@pytest.mark.slow
def test_killed_and_run_again(model, tmp_path):
    methods = [{"method": "lora", "r": 2, "lr": [1e-3, 1e-2]}, {"method": "oft", "block_size": 16}]
    values = arenas.values(
        model, tmp_path / "whole", methods=methods, steps=12, save_steps=3, metrics={"rows": 2}, controls={"steps": [6]}
    )
    Arena(make_config(values)).run()
    file = write(tmp_path, {**values, "output": str(tmp_path / "cut")})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(file), env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    # one run done, the next with a checkpoint
    while time.monotonic() < deadline and process.poll() is None:
        done = len(list((tmp_path / "cut" / "runs").glob("*.json")))
        if done >= 1 and any((tmp_path / "cut" / "training").glob("*/checkpoint-*")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut" / "runs").glob("*.json")}
    assert 1 <= len(kept) < 5
    subprocess.run(command(file), env=environment, check=True, capture_output=True)
    for p, stamp in kept.items():
        assert p.stat().st_mtime_ns == stamp
    for p in (tmp_path / "whole" / "runs").glob("*.json"):
        one, other = (json.loads((tmp_path / d / "runs" / p.name).read_text()) for d in ("whole", "cut"))
        assert arenas.without_times(one) == arenas.without_times(other)
        assert bool(one["paths"]) == (not one["run"]["control"])  # a control is not rewound


def test_two_processes_share_the_runs(model, tmp_path, monkeypatch, capsys):
    """Each has every other run, as RANK says, and the last one reports; within, nothing sees a process group."""
    values = arenas.values(model, tmp_path / "out", methods=[{"method": "lora", "r": r, "lr": 1e-2} for r in (1, 2, 3)],
                           metrics={"weights": False, "activations": False})  # fmt: skip
    seen = {}
    one = Arena.one

    def watched(self, run, progress=""):
        assert "WORLD_SIZE" not in os.environ and "RANK" not in os.environ
        seen.setdefault(rank, []).append(run.label)
        return one(self, run, progress)

    monkeypatch.setattr(Arena, "one", watched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arenas_of = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        arenas_of.append(Arena(make_config(values)))
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        arenas_of[rank].run()
        assert os.environ["RANK"] == str(rank) and os.environ["WORLD_SIZE"] == "2"
        assert (tmp_path / "out" / "report.html").exists() == (rank == 1)
    assert seen == {0: ["lora-r1", "lora-r3"], 1: ["lora-r2"]}
    # where all is done one of them reports, too
    capsys.readouterr()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        arenas_of[rank].run()
    assert capsys.readouterr().out.count("written: ") == 1


def test_two_that_end_together_report_once(model, tmp_path, monkeypatch, capsys):
    """The second process writes its run before the first, which has written its own, looks whether all are there."""
    values = arenas.values(model, tmp_path / "out", methods=[{"method": "full", "lr": [1e-3, 1e-2]}],
                           metrics={"weights": False, "activations": False})  # fmt: skip
    first, second = (Arena(make_config(values)) for _ in range(2))
    one = Arena.one

    def both(self, run, progress=""):
        one(self, run, progress)
        if self is first:
            with monkeypatch.context() as within:
                within.setenv("WORLD_SIZE", "2")
                within.setenv("RANK", "1")
                second.run()

    monkeypatch.setattr(Arena, "one", both)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first.run()
    assert capsys.readouterr().out.count("written: ") == 1


def test_each_process_sees_one_gpu(monkeypatch):
    for given, local, want in ((None, 1, "1"), ("4,5", 1, "5"), ("7", 3, "7"), (None, None, None)):
        for name, value in (("CUDA_VISIBLE_DEVICES", given), ("LOCAL_RANK", local)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        before = dict(os.environ)
        with arena_module.alone():
            assert os.environ.get("CUDA_VISIBLE_DEVICES") == want and "LOCAL_RANK" not in os.environ
        assert dict(os.environ) == before


def test_an_arena_may_grow_and_not_change(model, tmp_path):
    out = tmp_path / "out"
    Arena(make_config(arenas.values(model, out, metrics={"rows": 2}))).run()
    Arena(make_config(arenas.values(model, out, seeds=[0, 1], metrics={"rows": 2})))
    with pytest.raises(ValueError, match=r"its runs have steps 4, the file 5"):
        Arena(make_config(arenas.values(model, out, steps=5, metrics={"rows": 2})))
    other = arenas.values(
        model, out, metrics={"rows": 2}, methods=[{"method": "oft", "block_size": 8, "lr": 1e-2, "label": "oft-b16"}]
    )
    with pytest.raises(ValueError, match=r"arguments is .*16.*, but .*8.* in the file: remove it"):
        Arena(make_config(other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="is not empty, and no arena's"):
        Arena(make_config(arenas.values(model, tmp_path / "full")))


@pytest.mark.parametrize("modules, message", [
    (["q_proj", "nope"], "metrics: modules: nope is no module of the model"),
    ("mlp", "metrics: modules: model.layers.0.mlp is LlamaMLP, which is no linear layer"),
])  # fmt: skip
def test_modules_are_looked_for_before_any_training(model, tmp_path, modules, message):
    with pytest.raises(ValueError, match=message):
        Arena(make_config(arenas.values(model, tmp_path / "out", metrics={"modules": modules})))
    assert not (tmp_path / "out").exists()


def test_a_control_that_becomes_a_rate_of_the_grid_is_run_again(model, tmp_path):
    method = {"method": "oft", "block_size": 16}
    more = {"metrics": {"weights": False, "activations": False}}
    values = arenas.values(
        model, tmp_path / "out", methods=[{**method, "lr": 1e-2}], controls={"lr_scale": [0.5]}, **more
    )
    arena = Arena(make_config(values))
    arena.run()
    control = next(r for r in arena.runs if r.control)
    assert arena.done(control) and not json.loads(arena.path(control).read_text())["paths"]
    grown = Arena(make_config({**values, "methods": [{**method, "lr": [5e-3, 1e-2]}]}))
    run = next(r for r in grown.runs if r.rate == 5e-3)
    assert run.name == control.name and not grown.done(run)
    grown.run()
    assert grown.done(run) and json.loads(grown.path(run).read_text())["paths"]
    # the other way round it has all that a control has
    assert arena.done(control)


def test_the_report_has_the_runs_that_the_file_asks_for(model, tmp_path, capsys):
    more = {"metrics": {"weights": False, "activations": False}}
    lora, oft = {"method": "lora", "r": 2, "lr": 1e-2}, {"method": "oft", "block_size": 16}
    values = arenas.values(model, tmp_path / "out", methods=[lora, {**oft, "lr": [5e-3, 1e-2]}], **more)
    Arena(make_config(values)).run()
    assert "left out" not in capsys.readouterr().out
    # the lower rate is a control from now on, another lora would be trained
    values |= {"methods": [{**oft, "lr": 1e-2}, {**lora, "r": 3, "label": "lora-r2"}], "controls": {"lr_scale": [0.5]}}
    assert main(["peft-arena", "report", write(tmp_path, values)]) == 0
    assert "2 runs, 1 seed." in (said := capsys.readouterr().out)
    assert "1 other run lies in the directory, not asked for by the file: left out." in said.splitlines()[0]
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(summary["methods"]) == ["oft-b16"] and summary["others"] == 1
    assert [(r["rate"], r["control"]) for r in summary["rows"]] == [(1e-2, ""), (5e-3, "lr x 0.5")]
    with pytest.raises(ValueError, match="has no finished run of those that the file asks for"):
        read_planned(tmp_path / "out", [])


def test_scores_before_training_are_of_the_models_files(tmp_path, monkeypatch):
    model, rows = arenas.base(tmp_path / "model", 0), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in arenas.toy.rows("copy", 32)))
    values = arenas.values(model, tmp_path / "out")
    values["retention"] = {"copy": {"evaluator": "exact", "by": "token", "rows": str(rows)}}
    made = []
    scores = Arena.scores
    monkeypatch.setattr(Arena, "scores", lambda self, *args: made.append(args[-1]) or scores(self, *args))

    def base(**more):
        made.clear()
        arena = Arena(make_config({**values, **more}))
        arena.output.mkdir(exist_ok=True)
        (arena.output / arena_module.RECORD).write_text(json.dumps(dict(arena.config.values)))
        return arena._base_scores(0), len(made)

    first, count = base()
    assert count == 2 and base() == (first, 0)
    arenas.base(tmp_path / "model", 1)
    second, count = base()
    assert count == 2 and second != first
    net, tok = load_model(model)
    goal, kept = scores(Arena(make_config(values)), net, tok, "test")
    assert {**goal, **kept} == second["test"]["suites"]
    rows.write_text("".join(json.dumps(r) + "\n" for r in arenas.toy.rows("sort", 32)))
    assert base()[1] == 2 and base()[1] == 0
    assert base(eval_batch_size=3)[1] == 2


def test_metrics_may_change(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    before = make_config(arenas.values(model, out, metrics={"modules": "nope"}))
    (out / arena_module.RECORD).write_text(json.dumps(dict(before.values)))
    Arena(make_config(arenas.values(model, out, metrics={"modules": "q_proj", "rows": 2})))


def test_the_rule_that_an_earlier_version_wrote(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    config = make_config(arenas.values(model, out, rule={"best_target": "5e-2"}))
    before = {**config.values, "rule": {"best_sum": 1.0, "best_target": 0.05}}
    (out / arena_module.RECORD).write_text(json.dumps(before))
    Arena(config)


def test_a_run_that_diverges_is_said_and_left_out(model, tmp_path, capsys):
    values = arenas.values(model, tmp_path / "out", methods=[{"method": "full", "lr": [1e-3, 1e30]}])
    Arena(make_config(values)).run()
    assert "Diverged, and left out: full 1e+30, seed 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["runs"] == 1
    assert not list((tmp_path / "out" / "training").glob("*"))


@pytest.mark.parametrize("evaluator", ["exact", "task"])
def test_a_run_whose_outputs_are_not_finite_has_diverged(model, tmp_path, monkeypatch, capsys, evaluator):
    from burnish.methods.peft_arena import train

    trained = train.train

    def explodes(config, run, *args):
        made = trained(config, run, *args)
        if run.rate == 1e-2:
            with torch.no_grad():
                made.model.model.norm.weight.fill_(1e30)
                made.model.lm_head.weight.mul_(1e30)
        return made

    monkeypatch.setattr(train, "train", explodes)
    values = arenas.values(model, tmp_path / "out", methods=[{"method": "full", "lr": [1e-3, 1e-2]}])
    if evaluator == "task":  # greedy answers of NaNs are wrong, and no more
        task = {"evaluator": "task", "task": "chain_sum", "size": 2, "max_new_tokens": 2}
        values |= {"target": {"sums": task}, "retention": {"more": {**task, "task": "basic_arithmetic"}}}
    Arena(make_config(values)).run()
    said = capsys.readouterr()
    assert "Diverged, and left out: full 0.01, seed 0." in said.out
    assert "diverged: the model's outputs are not finite" in said.err
    file = next((tmp_path / "out" / "runs").glob("full-lr0.01-*.json"))
    assert json.loads(file.read_text())["diverged"] is True and not list((tmp_path / "out" / "training").glob("*"))


def test_what_is_kept_loads_as_the_trained_model(model, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    methods = [{"method": "lora", "r": 2, "dropout": 0.0, "lr": 1e-2}, {"method": "dora", "r": 2, "lr": 1e-2}]
    values = arenas.values(model, tmp_path / "out", methods=methods, keep=True, metrics={"rows": 2})
    arena = Arena(make_config(values))
    arena.run()
    for run in arena.runs:
        folder = tmp_path / "out" / "models" / run.name
        scores = json.loads(arena.path(run).read_text())["final"]["test"]["suites"]
        net, tok = load_model(model)
        if run.technique == "lora":
            net = peft.PeftModel.from_pretrained(net, str(folder)).merge_and_unload()
        else:
            net = AutoModelForCausalLM.from_pretrained(folder)
        goal, kept = arena.scores(net, tok, "test")
        assert {**goal, **kept} == scores


def test_training_data_loses_the_suites_problems(model, tmp_path):
    values = arenas.values(model, tmp_path / "out")
    task = {"max_terms": 2, "max_digits": 1}
    values |= {
        "data": "reasoning-gym:chain_sum", "data_args": {"size": 300, "seed": 0, **task},
        "target": {"sums": {"evaluator": "exact", "rows": "reasoning-gym:chain_sum", "args": task, "size": 30}},
    }  # fmt: skip
    arena = Arena(make_config(values))
    asked = arena.suites["target"]["sums"].questions
    assert len(asked) == 60 and 0 < len(arena.data.entries) < 300
    assert not asked & {e["question"] for e in arena.data.entries}
    values["data_args"] = {"size": 5, "seed": 1_000_003, **task}  # the tests' own seed
    with pytest.raises(ValueError, match="every problem of it is in a suite"):
        Arena(make_config(values))


def test_splits_of_one_file_have_no_row_in_common(model, tmp_path, monkeypatch):
    import tiny_models as tiny

    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+1=", "completion": "2"} for i in range(12)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = {"train": slice(6), "held_out": slice(6, 9), "test": slice(9, 12), "leak": slice(4, 11)}

    def part(path, split, size=None):
        return [json.loads(line) for line in open(path)][parts[split]]

    monkeypatch.setattr(tiny, "part", part, raising=False)
    values = arenas.values(model, tmp_path / "out")
    values |= {
        "data": "tiny_models:part", "data_args": {"path": str(file), "split": "train"},
        "target": {"it": {"evaluator": "exact", "rows": "tiny_models:part", "args": {"path": str(file)}}},
    }  # fmt: skip
    Arena(make_config(values))
    message = rf"^data and target: it read one file, {file.resolve()}, and {{}} rows of the data are in the suite; "
    values["data_args"] = {"path": str(file), "split": "leak"}
    with pytest.raises(ValueError, match=message.format(5)):
        Arena(make_config(values))
    with pytest.raises(ValueError, match=message.format(6)):  # which trains on all rows
        Arena(make_config({**values, "data": str(file), "data_args": {}}))


def test_bad_data(model, tmp_path, monkeypatch):
    import tiny_models as tiny

    monkeypatch.setattr(tiny, "bad", lambda task, size: [{"prompt": "a"}], raising=False)
    with pytest.raises(ValueError, match="data tiny_models:bad: row:1: 'prompt' without 'completion'"):
        Arena(make_config({**arenas.values(model, tmp_path / "out"), "data": "tiny_models:bad"}))
    assert arena_module.RECORD.endswith(".json")
