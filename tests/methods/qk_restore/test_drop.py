"""Adapters without their share in the softmax layers' queries and keys."""

import copy
import json

import hybrids
import pytest
import torch
from safetensors.torch import load_file

from burnish.methods.qk_restore import QKRestoreOptions, drop_adapters, dropped, restore_path
from burnish.paths import Adapter, LoRAScale, StateDict, read_adapter, split_model

peft = pytest.importorskip("peft")
TARGETS = r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj"


def adapted(config, name="qwen3_next"):
    base = hybrids.model(name)
    start = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return start, model


def test_dropping_is_restoring_the_merged_model(tmp_path):
    """Fact 9, with a gated query: its gate's share of the adapter stays."""
    base, model = adapted(peft.LoraConfig(r=4, target_modules=TARGETS))
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    result = drop_adapters(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = copy.deepcopy(model).merge_and_unload()
    want = dict(restore_path(base, merged).at(0))
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    got = fresh.merge_and_unload().state_dict()
    for n in want:
        assert (got[n] - want[n]).abs().max() < 1e-6, n
    q = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(got[q], base.state_dict()[q])
    rows = got[q].view(4, 2, 8, -1)
    before = base.state_dict()[q].view(4, 2, 8, -1)
    assert torch.equal(rows[:, 0], before[:, 0]) and (rows[:, 1] != before[:, 1]).any()
    files = load_file(tmp_path / "out" / "adapter_model.safetensors")
    old = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert files.keys() == old.keys()
    assert {n for n in old if not torch.equal(files[n], old[n])} == set(result.tensors)
    assert sorted(round(s, 2) for s in result.tensors.values()) == [0.5, 1.0]
    assert "2 tensors dropped" in str(result)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_oft_and_a_dry_run(tmp_path):
    base, model = adapted(
        peft.OFTConfig(r=0, oft_block_size=8, target_modules=r".*self_attn\.(q|k|v)_proj"), "granitemoehybrid"
    )
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert "dry run" in str(drop_adapters(tmp_path / "base", tmp_path / "adapter"))
    drop_adapters(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload().state_dict()
    merged = copy.deepcopy(model).merge_and_unload()
    want = dict(restore_path(base, merged).at(0))
    assert all((got[n] - want[n]).abs().max() < 1e-6 for n in want)
    gated, model = adapted(peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="cannot be dropped in part"):
        dropped(gated, split_model(model)[1], restore_path(gated, gated).selector)


def test_trained_biases_go_back_too(tmp_path):
    """A run with bias="all" trains the model's biases in place: they are the base's again in the adapter's file."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**hybrids.BASE, num_hidden_layers=1))
    start = {n: x.clone() for n, x in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)
    with pytest.raises(ValueError, match="trained the model's own"):
        split_model(model)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    changes = dropped(start, adapter, restore_path(start, start, base.config).selector)
    path = LoRAScale(start, Adapter(adapter.config, StateDict({n: changes.get(n, adapter.tensors.tensor(n))
                                                               for n in adapter.tensors})))  # fmt: skip
    got = dict(path.at(1))
    want = model.merge_and_unload().state_dict()
    at = "model.layers.0.self_attn."
    for n in got:
        back = n in {f"{at}{p}_proj.{leaf}" for p in "qk" for leaf in ("weight", "bias")}
        assert torch.allclose(got[n], start[n] if back else want[n], atol=1e-6), n
    assert not torch.equal(want[at + "k_proj.bias"], start[at + "k_proj.bias"])


def test_what_cannot_be_dropped(tmp_path):
    base, model = adapted(peft.LoraConfig(r=4, target_modules=["v_proj"]))
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"trains nothing of q\+k"):
        drop_adapters(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="alpha must be 1"):
        drop_adapters(tmp_path / "base", tmp_path / "adapter", None, QKRestoreOptions(alpha=0.5))
    _, model = adapted(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="IA3 adapter cannot be dropped"):
        drop_adapters(tmp_path / "base", tmp_path / "ia3")
    assert not (tmp_path / "out").exists()
    assert read_adapter(tmp_path / "adapter").kind == "LORA"
