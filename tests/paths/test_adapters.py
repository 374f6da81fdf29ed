"""Paths through adapter space, against HF PEFT's own merge and its own files."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from burnish.paths import (
    Additive,
    LoRAScale,
    OFTGenerator,
    Selection,
    as_tensors,
    attention,
    cayley_neumann,
    equalised,
    read_adapter,
    save,
    split_model,
)

peft = pytest.importorskip("peft")


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )).to(dtype).eval()  # fmt: skip


def adapted(config, base=None):
    """(base model's tensors, PeftModel whose adapter is not zero)."""
    base = llama() if base is None else base
    before = {n: x.clone() for n, x in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return before, model


def merged(model):
    return copy.deepcopy(model).merge_and_unload().state_dict()


def close(a, b, times=8):
    scale = b.double().abs().max()
    return (a.double() - b.double()).abs().max() <= times * torch.finfo(b.dtype).eps * scale


LORAS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3},
    },
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "v_proj"]},
    "whole": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_lora_scale_is_pefts_merge_at_one_and_the_base_at_zero(name):
    config = peft.LoraConfig(**{"target_modules": "all-linear" if name != "whole" else ["q_proj"], **LORAS[name]})
    base, model = adapted(config)
    path = LoRAScale.of(model)
    assert all(torch.equal(x, base[n]) for n, x in path.at(0).items())
    want = merged(model)
    got = dict(path.at(1))
    assert got.keys() == want.keys()
    assert all(close(got[n], want[n]) for n in want)
    moved = {n for n in want if not torch.equal(want[n], base[n])}
    assert moved == {n for n in want if not path.kept(n, 0.5)} and moved
    # in between, additive's own line
    line = Additive(base, want)
    for n in moved:
        assert close(path.tensor(n, 0.3), line.tensor(n, 0.3))


def test_lora_of_conv1d_stores_its_weight_the_other_way():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    before, model = adapted(config, base)
    want, path = merged(model), LoRAScale.of(model)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(want[name], before[name])
    assert close(path.tensor(name, 1), want[name])


def test_from_files_and_to_a_file(tmp_path):
    """A base checkpoint in shards and an adapter's directory: nothing of either is loaded whole."""
    base, model = adapted(peft.LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    path = LoRAScale(tmp_path / "base", tmp_path / "adapter")
    assert len(path.template.files) > 2
    save(path, 0.5, tmp_path / "out")
    got = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        got |= load_file(file)
    want = LoRAScale.of(model)
    assert got.keys() == base.keys() and all(torch.equal(got[n], want.tensor(n, 0.5)) for n in base)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, got["lm_head.weight"])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_oft_is_pefts_merge_at_one_and_a_rotation_everywhere(exact, share):
    config = peft.OFTConfig(
        r=0, oft_block_size=8, target_modules="all-linear", use_cayley_neumann=not exact, block_share=share
    )
    base, model = adapted(config)
    path = OFTGenerator.of(model)
    assert all(torch.equal(x, base[n]) for n, x in path.at(0).items())
    want = merged(model)
    assert want.keys() == set(path.at(1))
    for n in want:
        assert close(path.tensor(n, 1), want[n]), n
    for n in path.modules:
        before = torch.linalg.svdvals(base[n].double())
        theta = torch.linalg.eigvals(path.generator(n).double()).imag.abs().max()
        for t in (0.1, 0.5, 1.0):
            r = path.rotation(n, t).double()
            error = (r @ r.transpose(1, 2) - torch.eye(8)).abs().max()
            # exact Cayley is a rotation; its truncation has singular values |1 - theta^4|
            bound = 1e-5 if exact else 2.1 * float(theta * t**0.5) ** 4 + 1e-5
            assert error < bound
            after = torch.linalg.svdvals(path.tensor(n, t).double())
            assert (after - before).abs().max() < bound * float(before.max()) + 1e-5
        dense = Additive(base, want).tensor(n, 0.3).double()
        if exact:
            lost = (torch.linalg.svdvals(dense) - before).abs().max()
            assert lost > 10 * (torch.linalg.svdvals(path.tensor(n, 0.3).double()) - before).abs().max()


def test_distance_travelled_depends_on_the_path():
    """2.4, fact 4: at 0.3 the line has gone 0.3 of the way, the generator's root 0.548 for small rotations and more
    for large."""
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], use_cayley_neumann=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    gone = {}
    for size in (0.01, 30.0):
        _base, model = adapted(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(size)
        for power in (0.5, 1.0):
            path = OFTGenerator(*split_model(model), power=power)
            full, part = (path.rotation(name, t) - torch.eye(8) for t in (1.0, 0.3))
            gone[size, power] = float(part.norm() / full.norm())
    assert abs(gone[0.01, 0.5] - 0.3**0.5) < 0.01 and abs(gone[0.01, 1.0] - 0.3) < 0.01
    assert gone[30.0, 0.5] > 0.6 and gone[30.0, 1.0] > 0.4


@pytest.mark.parametrize("terms", range(1, 9))
def test_truncated_cayley_is_pefts(terms):
    from peft.tuners.oft.layer import OFTRotationModule

    torch.manual_seed(0)
    module = OFTRotationModule(3, 28, 8, 24, num_cayley_neumann_terms=terms).double()
    with torch.no_grad():
        module.weight.copy_(0.1 * torch.randn(3, 28))
    q = module._pytorch_skew_symmetric(module.weight.detach(), 8)
    want = module._cayley_batch(module.weight.detach(), 8, True, terms)
    got = cayley_neumann(q, terms)
    assert torch.allclose(got, want, atol=1e-14, rtol=0)
    if terms == 5:
        one = torch.eye(8, dtype=q.dtype)
        assert torch.allclose(got, (one + q) @ (one + q) @ (one + q @ q), atol=1e-14, rtol=0)
        theta = torch.linalg.eigvals(q).imag.abs().sort(-1).values
        sizes = torch.linalg.svdvals(got).sort(-1).values
        assert torch.allclose(sizes, (1 - theta**4).abs().sort(-1).values, atol=1e-13, rtol=0)


def test_layer_wise_rewinding():
    """MinScale and SafeScale: after it no layer's generator is stronger than the reference."""
    _, model = adapted(peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and ".1." in n:
                p.mul_(3)
    path = OFTGenerator.of(model)
    by_layer = {int(n.split(".")[2]): s for n, s in path.strength().items()}
    assert by_layer[1] > 2 * by_layer[0]
    t = equalised(by_layer, 1.0, reference=min(by_layer.values()))
    assert t[0] == 1 and t[1] == pytest.approx((by_layer[0] / by_layer[1]) ** 2)
    name = "model.layers.1.self_attn.q_proj.weight"
    scaled = path.generator(name) * t[1] ** path.power
    assert float(scaled.flatten(1).norm(dim=1).mean() / math.sqrt(8)) == pytest.approx(by_layer[0], rel=1e-5)
    assert torch.equal(path.tensor(name, {**t, None: 1.0}), path.tensor(name, t[1]))
    assert equalised({0: 0.0, 1: 2.0}, 0.5, 1.0, power=1.0) == {0: 0.5, 1: 0.25}


def test_a_selector_rewinds_only_its_part():
    base, model = adapted(peft.LoraConfig(r=4, target_modules="all-linear"))
    picked = attention(as_tensors(base), model.config, layers=[1])
    path = LoRAScale.of(model, selector=picked)
    full = LoRAScale.of(model)
    for n in base:
        assert torch.equal(path.tensor(n, 0.0), base[n] if n in picked else full.tensor(n, 1.0))
        assert path.kept(n, 0.0) == torch.equal(path.tensor(n, 0.0), base[n])
    # rows of a tensor: the rest has the adapter in full
    n = "model.layers.0.mlp.up_proj.weight"
    rows = LoRAScale.of(model, selector={n: Selection(((3, 9),))}).tensor(n, 0.0)
    assert torch.equal(rows[3:9], base[n][3:9]) and torch.equal(rows[9:], full.tensor(n, 1.0)[9:])
    assert not torch.equal(rows[9:], base[n][9:])


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_bf16_is_rounded_once(kind):
    configs = {"lora": peft.LoraConfig(r=4, target_modules=["q_proj"]),
               "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"])}  # fmt: skip
    _, model = adapted(configs[kind], llama(torch.bfloat16))
    path = (LoRAScale if kind == "lora" else OFTGenerator).of(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = path.template.tensor(name)
    wide = type(path)({n: path.template.tensor(n).double() for n in path.template}, path.adapter)
    got, exact = path.tensor(name, 0.7), wide.tensor(name, 0.7)
    assert got.dtype == torch.bfloat16 and base.dtype == torch.bfloat16 and exact.dtype == torch.float64
    half = 0.501 * 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((got.double() - exact).abs() <= half).all()


def test_what_is_no_such_path_is_refused(tmp_path):
    base, model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        LoRAScale.of(model)
    _, model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="'pissa' changed the base"):
        LoRAScale.of(model)
    _, model = adapted(peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], coft=True))
    with pytest.raises(ValueError, match="constrained OFT"):
        OFTGenerator.of(model)
    _, model = adapted(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="needs a LORA adapter; got IA3"):
        LoRAScale.of(model)
    _, model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs a OFT adapter"):
        OFTGenerator.of(model)
    with pytest.raises(ValueError, match="the model has default"):
        split_model(model, "other")
    with pytest.raises(ValueError, match="power"):
        OFTGenerator(
            *split_model(adapted(peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))[1]), power=0
        )
    base, adapter = split_model(model)
    smaller = {n: x for n, x in base.tensors.items() if "layers.1" not in n}
    with pytest.raises(ValueError, match=r"has no tensor model.layers.1"):
        LoRAScale(smaller, adapter)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        LoRAScale.of(model)
    with pytest.raises(ValueError, match=r"no adapter_config.json"):
        read_adapter(tmp_path)
