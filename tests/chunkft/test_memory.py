"""The predicted peak against the measured one, within 5 %, chunk by chunk; and the shapes nobody can try here."""

import pytest
import tiny_models
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from burnish import ChunkAdamW
from burnish.chunkft import plan
from burnish.chunkft.memory import predict_memory
from burnish.ops.live_bytes import LiveBytes

BATCH, SEQ = 2, 48


def wide(dtype=torch.float32, **options):
    """Large enough that a 5 % error is one of the model, not of the bookkeeping."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).to(dtype)


def measured(model, **options) -> int:
    """Peak live bytes over a cycle, the weights' and the resident state's included."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(0, 1000, (BATCH, SEQ))
    with LiveBytes() as live:
        optimizer = ChunkAdamW(model, **options)
        for _ in range(optimizer.plan.num_chunks + 1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            model.zero_grad()
        return weights + live.peak


@pytest.mark.parametrize("options", [
    {"num_chunks": 4}, {"num_chunks": 4, "small": "chunk"}, {"num_chunks": 1}, {"num_chunks": 8, "moments": "8bit"},
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_is_within_5_percent_of_the_measured_peak(options, checkpointing):
    model = wide().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cut = plan(model, options["num_chunks"], small=options.get("small", "always"))
    guess = predict_memory(
        wide(), cut, batch=BATCH, seq=SEQ, device="cpu", moments=options.get("moments", "fp32"),
        checkpointing=checkpointing,
    )  # fmt: skip
    found = measured(model, **options)
    print(f"predicted {guess.device:,} measured {found:,}")
    assert guess.device == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_low_precision_too(low_precision):
    model = wide(torch.bfloat16).train()
    guess = predict_memory(
        wide(), plan(model, 4), batch=BATCH, seq=SEQ, dtype=torch.bfloat16, device="cpu", low_precision=low_precision
    )
    found = measured(model, num_chunks=4, low_precision=low_precision)
    assert guess.device == pytest.approx(found, rel=0.05)


def test_the_model_asked_about_is_left_alone_and_may_be_on_meta():
    model = tiny_models.llama()
    cut = plan(model, 3)
    before = {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    one = predict_memory(model, cut, batch=2, seq=16)
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == before
    with torch.device("meta"):
        two = predict_memory(tiny_models.llama(), cut, batch=2, seq=16)
    assert one == two
    assert one.host == one.states and one.device < two.device + one.states


def test_what_the_parts_depend_on():
    model = tiny_models.llama()
    base = predict_memory(model, plan(model, 4), batch=2, seq=16)
    half = predict_memory(model, plan(model, 8), batch=2, seq=16)
    assert half.gradients == pytest.approx(base.gradients / 2, rel=0.3) and half.weights == base.weights
    longer = predict_memory(model, plan(model, 4), batch=2, seq=64)
    assert longer.activations > 3 * base.activations
    eight = predict_memory(model, plan(model, 4), batch=2, seq=16, moments="8bit")
    assert eight.states == pytest.approx(base.states * (2 + 8 / 256) / 8, rel=1e-6)
    with pytest.raises(ValueError, match="batch"):
        predict_memory(model, plan(model, 4), batch=0, seq=16)
    with pytest.raises(ValueError, match="device"):
        predict_memory(model, plan(model, 4), batch=1, seq=16, device="tpu")
