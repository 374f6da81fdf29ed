"""``burnish qk-restore`` as it is typed."""

import json

import hybrids
import pytest
import torch

from burnish.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("restore")
    pre = hybrids.model("granitemoehybrid")
    pre.save_pretrained(root / "pre")
    hybrids.trained(pre).save_pretrained(root / "post")
    return root


def test_restores_and_reports(folders, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(["qk-restore", str(folders / "pre"), str(folders / "post"), str(out), "--angles"]) == 0
    said = capsys.readouterr().out
    assert "layers 1 by layer_types (model_type granitemoehybrid)" in said and f"written: {out}" in said
    assert "model.layers.1.self_attn.q_proj.weight" in said and "°" in said
    assert json.loads((out / "qk_restore.json").read_text())["layers"] == [1]
    assert main(["qk-restore", str(folders / "pre"), str(folders / "post"), "--dry-run", "--pro", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "QK-Pro, lambda 0.5" in said and "dry run" in said


CASES = {
    "no out": ([], "OUT is missing"),
    "exists": (["."], "exists already"),
    "parts": (["out", "--parts", "q,x"], "'x' is none of"),
    "alpha": (["out", "--alpha", "2"], "alpha must lie"),
    "layers": (["out", "--layers", "some"], "--layers takes softmax, all, or indices"),
    "layer": (["out", "--layers", "1,9"], "layers: 9 is not one of the 3 layers"),
    "linear layer": (["out", "--layers", "0"], "layer 0: no query, key or fused projection"),
    "kind": (["out", "--kind", "attention"], "--kind takes KEY=VALUE"),
    "no softmax layer": (
        ["out", "--kind", "attention=linear", "--kind", "full_attention=linear"], "none of the 3 layers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = CASES[case]
    (tmp_path / "something").write_text("")
    assert main(["qk-restore", str(folders / "pre"), str(folders / "post"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("burnish: error: ") and message in said[0], said
    assert [p.name for p in tmp_path.iterdir()] == ["something"]


def test_missing_shards_and_unknown_architectures(folders, tmp_path, capsys):
    assert main(["qk-restore", str(folders / "pre"), str(tmp_path / "no"), str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err
    odd = tmp_path / "odd"
    hybrids.model("granitemoehybrid").save_pretrained(odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_types"}))
    assert main(["qk-restore", str(odd), str(odd), str(tmp_path / "out")]) == 2
    assert "no field says which layers are softmax attention: give one of mixer_types" in capsys.readouterr().err
    assert main(["qk-restore", str(odd), str(odd), str(tmp_path / "out"), "--layers", "1"]) == 0
    assert "by the option layers" in capsys.readouterr().out


def test_a_full_disk_is_one_line(folders, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    assert main(["qk-restore", str(folders / "pre"), str(folders / "post"), str(tmp_path / "out")]) == 2
    assert "GB are needed" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_adapters_are_dropped(folders, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        hybrids.model("granitemoehybrid"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["qk-restore", str(folders / "pre"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 tensors dropped, 3 kept" in said and (tmp_path / "out" / "adapter_model.safetensors").is_file()
