"""An arena's file: errors name the option and what it got; which runs it asks for."""

import json
from pathlib import Path

import arenas
import pytest
import torch

from burnish.cli import main
from burnish.methods.options import parse_yaml
from burnish.methods.peft_arena import make_config, plan_runs, read_config, toy


def config(tmp_path, **more):
    return make_config({**arenas.values("m", tmp_path / "out"), **more})


@pytest.mark.parametrize("more, message", [
    ({"methods": ["lorra"]}, "unknown method 'lorra'"),
    ({"methods": [{"r": 3}]}, "a mapping with 'method', is needed"),
    ({"methods": [{"method": "lora", "rank": 3}]}, "no argument 'rank'"),
    ({"methods": ["lora", "lora"]}, "two are called 'lora'"),
    ({"methods": [{"method": "lora", "r": 3, "budget": 10}]}, "give r or budget, not both"),
    ({"methods": [{"method": "ia3", "budget": 10}]}, "it has no size that a budget could set"),
    ({"methods": [{"method": "lora", "budget": 0}]}, "budget must be a whole number, at least 1; got 0"),
    ({"methods": [{"method": "lora", "lr": [0]}]}, r"lr must be a number above 0, or a list of such; got \[0\]"),
    ({"methods": [{"method": "lora", "label": "a/b"}]}, "label must be a word"),
    ({"rewind": {"grid": [0, 2]}}, r"rewind: grid must be a list of numbers in \[0, 1\]; got \[0, 2\]"),
    ({"rewind": {"variants": ["dense"]}}, "variants are line, scale, generator, safe, min; got 'dense'"),
    ({"rewind": {"power": 0}}, "power must be above 0; got 0"),
    ({"rewind": {"alpha": 1}}, "rewind has grid, variants, power; got 'alpha'"),
    ({"controls": {"steps": [4]}}, "steps must be whole numbers below 4; got 4"),
    ({"controls": {"lr_scale": [1.0]}}, "between 0 and 1"),
    ({"rule": {"best_sum": 1, "best_target": 0.1}}, "rule must be one of .*; got {'best_sum': 1, 'best_target': 0.1}"),
    ({"rule": {"furthest": 1, "best_target": 0.1}}, "rule must be one of"),
    ({"rule": {"furthest": "much"}}, "with a number, at least 0; got {'furthest': 'much'}"),
    ({"rewind": {"variants": "dense"}}, "variants are line, scale, generator, safe, min; got 'dense'"),
    ({"rewind": {"grid": ["x"]}}, r"rewind: grid must be a list of numbers in \[0, 1\]; got \['x'\]"),
    ({"controls": {"lr_scale": []}}, "between 0 and 1"),
    ({"controls": {"steps": "2"}}, "steps must be whole numbers below 4; got '2'"),
    ({"rule": {"best": 1}}, "rule must be one of best_target, furthest, best_sum with a number"),
    ({"metrics": {"rows": "abc"}}, "metrics: rows must be a whole number, at least 1; got 'abc'"),
    ({"metrics": {"rows": 0}}, "metrics: rows must be a whole number, at least 1; got 0"),
    ({"metrics": {"weights": "maybe"}}, "metrics: weights must be true or false; got 'maybe'"),
    ({"metrics": {"modules": [3]}}, r"metrics: modules must be a name, or a list of names; got \[3\]"),
    ({"metrics": {"weight": True}}, "metrics has weights, activations, modules, rows; got 'weight'"),
    ({"retention": {}}, "retention: at least one suite is needed"),
    ({"retention": {"prefix": arenas.suite("copy")}}, "the suite 'prefix' is of both"),
    ({"sead": 1}, "unknown option 'sead'; did you mean seeds"),
    ({"model": None}, "model is required"),
])  # fmt: skip
def test_errors(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **more)


@pytest.mark.parametrize("axis, given", [
    ("target", {"evaluator": "exact", "rows": "link.jsonl"}),
    ("retention", {"evaluator": "choice", "rows": "sub/../rows.jsonl"}),
    ("retention", {"evaluator": "nll", "text": "rows.jsonl"}),
])  # fmt: skip
def test_a_suite_reads_no_file_that_is_trained_on(tmp_path, monkeypatch, axis, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("rows.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1", "completion": "2"}\n')
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    key = "text" if given["evaluator"] == "nll" else "rows"
    message = f"^data and {axis}: it: {key} are one file, {tmp_path.resolve() / 'rows.jsonl'}: "
    with pytest.raises(ValueError, match=message):
        config(tmp_path, data="rows.jsonl", data_args={}, **{axis: {"it": given}})
    config(tmp_path, data="other.jsonl", data_args={}, **{axis: {"it": given}})


def test_runs_seed_by_seed_with_controls_at_the_highest_rate(tmp_path):
    c = config(
        tmp_path, seeds=[3, 5], budget=5000, lr=[1e-3, 2e-3, 1e-2], controls={"steps": [2], "lr_scale": [0.2, 0.5]},
        methods=["lora", {"method": "oft", "block_size": 8, "lr": 0.5}, "full"],
    )  # fmt: skip
    with torch.device("meta"):
        model = toy.model(0)
    runs = plan_runs(c, model)
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    mine = [(r.rate, r.steps, r.control) for r in runs if r.label == "lora" and r.seed == 3]
    # 0.2 x 0.01 is in the grid already
    assert mine == [(1e-3, 4, ""), (2e-3, 4, ""), (1e-2, 4, ""), (1e-2, 2, "2 steps"), (5e-3, 4, "lr x 0.5")]
    assert len({r.name for r in runs}) == len(runs)
    lora = next(r for r in runs if r.label == "lora")
    assert lora.budget == 5000 and lora.arguments["r"] == 2 and lora.parameters == 6528
    assert next(r for r in runs if r.label == "oft-b8").budget is None
    assert next(r for r in runs if r.label == "full").parameters == sum(p.numel() for p in model.parameters())


def test_defaults(tmp_path):
    c = config(tmp_path, methods={"lora": {"r": 4}, "full": None}, rewind={})
    assert [(m.label, m.rates) for m in c.methods] == [("lora", (2e-4,)), ("full", (5e-5,))]
    assert c.grid == tuple(i / 10 for i in range(11)) and c.rule == ("best_sum", 1.0) and c.power == 0.5
    assert c.paths("oft") == ("generator", "safe", "min", "line") and c.paths("lora") == ("scale",)
    assert config(tmp_path, rewind={"variants": ["line"]}).paths("lora") == ()
    assert c["training"]["adam_beta2"] == 0.95
    assert config(tmp_path, training={"adam_beta2": 0.5})["training"]["max_grad_norm"] == 1.0


def test_numbers_may_be_text_and_lists_of_one_bare(tmp_path):
    text = config(
        tmp_path, rewind={"grid": ["1e-1", 0.5], "variants": "line", "power": "5e-1"}, rule={"best_target": "2e-2"},
        controls={"lr_scale": ["1e-1"], "steps": 2},
    )  # fmt: skip
    plain = config(
        tmp_path, rewind={"grid": [0.1, 0.5], "variants": ["line"], "power": 0.5}, rule={"best_target": 0.02},
        controls={"lr_scale": [0.1], "steps": [2]},
    )  # fmt: skip
    assert text == plain and text.grid == (0.0, 0.1, 0.5, 1.0) and text.rule == ("best_target", 0.02)
    assert text.variants == ("line",) and config(tmp_path, controls={"lr_scale": "5e-1"})["controls"]["lr_scale"] == [
        0.5
    ]


def test_two_rules_of_a_file_are_refused(tmp_path):
    file = tmp_path / "a.yaml"
    values = arenas.values("m", tmp_path / "out", rule={"best_sum": 2.0, "best_target": 0.05})
    file.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in values.items()))
    with pytest.raises(ValueError, match="rule must be one of"):
        read_config(str(file))


def test_the_file_of_the_documentation():
    text = (Path(__file__).parents[3] / "docs" / "peft_arena.md").read_text()
    c = make_config(parse_yaml(text.split("```yaml\n")[1].split("```")[0]))
    assert [m.label for m in c.methods] == ["lora", "oft", "dora-small", "full"]
    assert [m.budget for m in c.methods] == [2400000, 2400000, None, None] and c.rule == ("best_target", 0.02)


def test_seed_in_the_models_name(tmp_path):
    c = make_config({**arenas.values("base-{seed}", tmp_path)})
    assert c.model(7) == "base-7"


def test_file_and_command(tmp_path, capsys):
    arenas.base(tmp_path / "model")
    file = tmp_path / "a.yaml"
    file.write_text(f"""
model: {tmp_path / "model"}
output: {tmp_path / "out"}
data: {arenas.ROWS}
data-args: {{task: prefix, size: 8}}
target: {{prefix: {{evaluator: exact, rows: {arenas.ROWS}, args: {{task: prefix}}}}}}
retention: {{copy: {{evaluator: exact, rows: {arenas.ROWS}, args: {{task: copy}}}}}}
methods: [{{method: oft}}, {{method: lora, lr: [1e-3, 1e-2]}}, full]
budget: 23808
rule: {{best_target: 0.05}}
steps: 10
""")
    assert read_config(str(file)).rule == ("best_target", 0.05)
    assert main(["peft-arena", "budgets", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["oft", "block_size", "32", "23,808", "23,808", "+0.0%", "3"]
    assert lines[2].split() == ["lora", "r", "7", "22,848", "23,808", "-4.0%", "6"]
    assert lines[4] == "12 runs" and not (tmp_path / "out").exists()
    file.write_text("model: x\nstep: 3\n")
    assert main(["peft-arena", "run", str(file)]) == 2
    assert "unknown key 'step'; did you mean steps?" in capsys.readouterr().err
