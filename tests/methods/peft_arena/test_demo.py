"""The demo, cut short; its arenas read without training."""

import json

import pytest

from burnish.cli import main
from burnish.methods.peft_arena import demo, smollm
from burnish.methods.peft_arena.demo_options import PeftArenaDemoOptions


def test_toy(tmp_path, monkeypatch, capsys):
    config = demo.toy_config(PeftArenaDemoOptions(output=str(tmp_path)))
    assert config.methods[2].budget == 23808 and len(config["seeds"]) == 3
    small = demo.toy_config

    def smaller(options):
        made = small(options)
        suites = {a: {n: {**s, "size": 8} for n, s in made[a].items()} for a in ("target", "retention")}
        return demo.make_config({**made.values, **suites, "lr": None, "methods": [
            {"method": "oft", "label": "oft", "lr": 1e-2}], "rewind": {"grid": [0.5]}})  # fmt: skip

    monkeypatch.setattr(demo, "toy_config", smaller)
    flags = ["--seeds", "1", "--steps", "4", "--pretrain-steps", "5", "--output", str(tmp_path / "demo")]
    assert main(["demo", "peft-arena", *flags]) == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["summary"]["runs"] == 2 and (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    assert "### Rewinding" in capsys.readouterr().out
    assert (tmp_path / "demo" / "base-0" / "model.safetensors").is_file()


def test_smollm2s_arena():
    config = demo.smollm_config(PeftArenaDemoOptions(model="smollm2", output="x", seeds=1))
    assert config.model(0) == "x/base" and config["seeds"] == [0] and len(smollm.reference()) > 200_000
    rows = {s: {r["prompt"] for r in smollm.reversals(16, s)} for s in ("held_out", "test")}
    rows["train"] = {r["prompt"] for r in smollm.reversals(512)}
    sums = {s: [r["prompt"] for r in smollm.sums(16, s)] for s in ("held_out", "test")}
    assert len(sums["held_out"]) == len(sums["test"]) == 16 and not {*sums["held_out"]} & {*sums["test"]}
    assert len(rows["held_out"]) == len(rows["test"]) == 16
    assert not rows["train"] & (rows["held_out"] | rows["test"]) and not rows["held_out"] & rows["test"]


@pytest.mark.parametrize("field, value", [("model", "gpt"), ("seeds", 0), ("pretrain_steps", 0), ("steps", -1)])
def test_options(field, value):
    with pytest.raises(ValueError, match=field.replace("_", "-")):
        PeftArenaDemoOptions(**{field: value}).check()
