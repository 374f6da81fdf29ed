"""Counts against HF PEFT's modules on the meta device and against PEFT-Arena's printed ones; budgets; starts."""

import warnings

import peft
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from burnish.methods.peft_arena import all_techniques, apply, match_budget, trainable_parameters
from burnish.methods.peft_arena.techniques import block_size, linear_layers, shapes

TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3B = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
CASES = [
    *((name, {}) for name in all_techniques()), ("lora", {"r": 3}), ("dora", {"r": 5}), ("adalora", {"r": 6}),
    ("miss", {"r": 16}), ("vera", {"r": 7}), ("boft", {"block_size": 8}),
    *(("oft", {"block_size": b}) for b in (16, 32, 64, 128, 20)),
]  # fmt: skip


def tiny(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(TINY)


@pytest.mark.parametrize("name, arguments", CASES, ids=lambda x: str(x))
def test_count_is_what_peft_trains(name, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = apply(tiny(), name, 20, **arguments)
    got = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_parameters(TINY, name, **arguments) == got


@pytest.mark.parametrize("name, arguments, millions", [
    ("oft", {"block_size": 32}, 17.55), ("oft", {"block_size": 16}, 8.49), ("lora", {"r": 8}, 20.19),
    ("dora", {"r": 8}, 21.58), ("miss", {"r": 8}, 11.12), ("vera", {"r": 256}, 1.44), ("ia3", {}, 1.82),
    ("adalora", {"r": 12}, 30.28), ("pissa", {"r": 8}, 20.19), ("milora", {"r": 8}, 20.19),
])  # fmt: skip
def test_printed_counts_of_qwen(qwen, name, arguments, millions):
    """The paper's table.  Its AdaLoRA "r8" is of rank 12: HF PEFT ignores r."""
    assert round(trainable_parameters(qwen, name, **arguments) / 1e6, 2) == millions


@pytest.fixture(scope="module")
def qwen():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(QWEN)


def test_printed_counts_of_llama():
    for size, millions in ((32, 11.55), (128, 47.34)):
        assert round(trainable_parameters(LLAMA3B, "oft", block_size=size) / 1e6, 2) == millions


def test_real_peft_on_the_meta_device(qwen):
    """The same counts from HF PEFT's own modules at 7B, where nothing is allocated."""
    for name, row in all_techniques().items():
        if name not in ("oft", "lora", "dora", "miss"):
            continue
        import copy

        model = peft.get_peft_model(copy.deepcopy(qwen), row.config(20, row.arguments({})))
        got = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert got == trainable_parameters(qwen, name)


def test_budget_is_the_nearest(qwen):
    found_shapes = shapes(tiny())
    for name, row in all_techniques().items():
        if row.size is None:
            found = match_budget(TINY, name, 5000)
            assert found.parameters == trainable_parameters(TINY, name)
            continue
        for budget in (700, 5000, 14848, 30000):
            found = match_budget(TINY, name, budget)
            assert found.parameters == trainable_parameters(TINY, name, **found.arguments)
            assert found.mismatch == found.parameters / budget - 1
            size = found.arguments[row.size]
            for other in (size - 1, size + 1, size // 2, size * 2):
                bad = other not in row.sizes or ("alpha" in row.defaults and other > 32)
                if bad or (row.size == "block_size" and any(i % other for _, i, _ in found_shapes)):
                    continue
                far = trainable_parameters(TINY, name, **{row.size: other})
                assert max(far / budget, budget / far) >= max(found.parameters / budget, budget / found.parameters)
    exact = match_budget(qwen, "lora", 20_185_088)
    assert exact.arguments["r"] == 8 and exact.mismatch == 0
    assert match_budget(qwen, "oft", 17_000_000).arguments["block_size"] == 32


def test_blocks_are_pefts():
    layer = torch.nn.Linear(96, 8)
    module = peft.tuners.oft.layer.OFTLayer(layer)
    for size in range(1, 130):
        want = module.adjust_oft_parameters(96, size) if 96 % size else size
        assert block_size(96, size) == want


def test_milora_starts_as_the_model_from_its_minor_triples():
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = tiny()
    with torch.no_grad():
        want = plain(ids).logits
        made = apply(tiny(), "milora", 10, r=4, dropout=0.0)
        got = made(ids).logits
        low = tiny().to(torch.float64)(ids).logits
    assert (got - want).abs().max() <= 8 * (want - low).abs().max()
    name, layer, _ = next(linear_layers(plain))
    adapted = made.get_base_model().get_submodule(name)
    product = adapted.scaling["default"] * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    values = torch.linalg.svdvals(layer.weight.double())
    assert torch.allclose(torch.linalg.svdvals(product.double())[:4], values[-4:], rtol=1e-4)
    # orthogonal to the principal part: what is left of the base has the other values
    rest = torch.linalg.svdvals(adapted.base_layer.weight.double())
    assert torch.allclose(rest[: len(values) - 4], values[:-4], rtol=1e-4) and float(rest[-4:].max()) < 1e-5


def test_adalora_trains_its_r_and_ends_with_two_thirds():
    made = apply(tiny(), "adalora", 20, r=6)
    config = made.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (6, 4, 20)
    with pytest.raises(ValueError, match="target_r 9 is above r 6"):
        apply(tiny(), "adalora", 20, r=6, target_r=9)
    with pytest.raises(ValueError, match="at least 3 steps; got 2"):
        apply(tiny(), "adalora", 2, r=6)


def test_ia3_is_of_a_language_model_with_its_feed_forward_layers():
    made = apply(tiny(), "ia3", 5)
    assert made.peft_config["default"].task_type == "CAUSAL_LM"
    down = [m for n, m in made.named_modules() if n.endswith("down_proj")]
    assert all(m.is_feedforward for m in down) and down
    assert not any(m.is_feedforward for n, m in made.named_modules() if n.endswith("_proj") and "down" not in n)


def test_gpt2s_layers_are_no_linear_ones():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1)
    model = __import__("transformers").GPT2LMHeadModel(config)
    assert shapes(model) == []
    for name in ("lora", "oft", "ia3"):
        message = f"method {name}: GPT2LMHeadModel has no layer that is counted: torch.nn.Linear ones but the output"
        with pytest.raises(ValueError, match=message):
            match_budget(config, name, 1000)
        with pytest.raises(ValueError, match=message):
            trainable_parameters(model, name)
    assert trainable_parameters(config, "full") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "milora", "adalora"])
def test_no_rank_is_above_the_narrowest_layers(name):
    found = match_budget(TINY, name, 10**7)
    assert found.arguments["r"] == 32  # of the key and value projections
    apply(tiny(), name, 20, **found.arguments)


@pytest.mark.parametrize("name, arguments, message", [
    ("lorra", {}, "unknown method 'lorra'; did you mean lora"),
    ("lora", {"rank": 4}, "method lora has no argument 'rank'"),
    ("lora", {"r": 0}, "r must be a whole number, at least 1; got 0"),
    ("ia3", {"r": 4}, "it has none"),
    ("full", {"r": 4}, "it has none"),
])  # fmt: skip
def test_errors_name_the_argument(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainable_parameters(TINY, name, **arguments)
    with pytest.raises(ValueError, match="budget must be a whole number, at least 1; got 0"):
        match_budget(TINY, "lora", 0)
    with pytest.raises(ValueError, match="r is what a budget sets"):
        match_budget(TINY, "lora", 100, r=4)
    with pytest.raises(ValueError, match=r"HF PEFT .* refuses"):
        apply(tiny(), "boft", 5, block_size=7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there HF PEFT's own kernel is of use")
def test_boft_compiles_nothing_without_cuda(monkeypatch):
    """A process that is killed while HF PEFT compiles leaves a lock on which every later one would wait for ever."""
    import torch.utils.cpp_extension as extension
    from peft.tuners.boft import layer

    built, own = [], layer.get_fbd_cuda
    monkeypatch.setattr(extension, "load", lambda **_: built.append(1))
    apply(tiny(), "boft", 20)
    assert not built and layer.get_fbd_cuda is own
