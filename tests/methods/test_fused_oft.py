"""``fuse_oft`` on real PEFT models: outputs and gradients are PEFT's, and what is not fused runs PEFT's own forward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import OFTConfig, get_peft_model
from peft.tuners.oft import layer as peft_oft
from tiny_models import batch, llama, rows, tokenizer
from torch import nn

from burnish.methods import fused_oft
from burnish.methods.fused_oft import fuse_oft

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def oft(model=None, *, size=0.05, modules=MODULES, dtype=torch.float64, block=16, **options):
    """A PEFT model whose rotations are not I, in one dtype unless its adapters are cast after."""
    model = (model or llama()).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a block size that PEFT adjusts
        config = OFTConfig(target_modules=modules, r=0, oft_block_size=block, **options)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return turned(model, size)


def turned(model, size=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "oft_R" in name:
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * size)
    return model


def step(model, **inputs):
    """Logits and the gradient of each parameter that has one."""
    model.zero_grad()
    out = model(**(inputs or batch()))
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """Grows by one for each rotation of ours."""
    seen = []
    real = fused_oft.block_rotation
    monkeypatch.setattr(fused_oft, "block_rotation", lambda *a, **k: seen.append(k) or real(*a, **k))
    return seen


def far(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a) if isinstance(a, dict) else float((a - b).abs().max())


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("backend", ["torch", "host"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"block": 32}, {"block": 8}, {"block_share": True}, {"num_cayley_neumann_terms": 7},
        {"num_cayley_neumann_terms": 3}, {"use_cayley_neumann": False}, {"coft": True, "eps": 1e-2},
        {"coft": True, "eps": 1e-2, "block_share": True},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_peft_s(options, backend, calls):
    model = oft(**options)
    start = copy.deepcopy(model.state_dict())
    logits, grads = step(model)
    model.load_state_dict(start)  # constrained OFT writes its parameters
    with fuse_oft(model, backend=backend) as handle:
        got_logits, got = step(model)
    assert len(handle.fused) == len(calls) == 12 and handle.left == {}
    assert grads.keys() == got.keys() and len(grads) == 12
    # PEFT's exact Cayley takes its identity in fp32
    tol = 1e-6 if options.get("use_cayley_neumann") is False else 1e-11
    assert far(logits, got_logits) <= tol * logits.abs().max() and far(grads, got) <= tol
    assert all(g.abs().max() > 1e-6 for g in grads.values())
    assert all(not torch.equal(start[n], p) for n, p in model.named_parameters() if "oft_R" in n) == ("coft" in options)


def test_fp32_loses_no_more_than_peft():
    exact_logits, exact = step(oft())
    model = oft(dtype=torch.float32)
    logits, grads = step(model)
    fuse_oft(model)
    got_logits, got = step(model)

    assert relative(got_logits, exact_logits) <= 1.5 * relative(logits, exact_logits) + 1e-7
    for name, truth in exact.items():
        assert relative(got[name], truth) <= 2 * relative(grads[name], truth) + 1e-7


class Layer(nn.Module):
    """One linear layer as PEFT wraps it."""

    def __init__(self, dtype=torch.float32, d=64, **options):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential()
        inner.proj = nn.Linear(d, 24, bias=False, dtype=dtype)
        self.model = get_peft_model(
            inner, OFTConfig(target_modules=["proj"], r=0, oft_block_size=16, **options), autocast_adapter_dtype=False
        )
        self.layer.oft_R.float()

    @property
    def layer(self):
        return self.model.base_model.model.proj

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_low_precision_is_nearer_to_the_exact_result_than_peft(how):
    """bf16 weights with fp32 adapters, and fp32 weights under autocast, where PEFT rounds R to bf16."""
    layer = turned(Layer(torch.bfloat16 if how == "bf16" else torch.float32), size=2e-3)
    exact = copy.deepcopy(layer).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=g).bfloat16()
    if how == "autocast":
        x = x.float()
    up = torch.randn(256, 24, generator=g)

    def run(module, dtype, cast):
        z = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            y = module(z)
        module.zero_grad()
        y.backward(up.to(y.dtype))
        return y.detach().double(), z.grad.double(), module.layer.oft_R["default"].weight.grad.double()

    want = run(exact, torch.float64, False)
    theirs = run(layer, x.dtype, how == "autocast")
    fuse_oft(layer)
    ours = run(layer, x.dtype, how == "autocast")
    errors = [[relative(a, b) for a, b in zip(found, want, strict=True)] for found in (theirs, ours)]
    assert all(o <= 1.05 * t for t, o in zip(*errors, strict=True)), errors
    if how == "autocast":
        # the movement x (R - I) W that PEFT's bf16 R has lost: a turn of 2e-3 is less than a step of bf16 at 1
        still = exact.layer.base_layer(x.double()).detach()
        moved = want[0] - still
        lost = [float((y - want[0]).norm() / moved.norm()) for y in (theirs[0], ours[0])]
        assert lost[1] < lost[0]


def test_peft_keeps_a_copy_of_x_and_ours_does_not():
    """bf16 activations, fp32 adapter: PEFT saves x in fp32 and powers of Q, ours x itself."""
    layer = turned(Layer(torch.bfloat16))
    x = torch.randn(512, 64).bfloat16().requires_grad_()

    def saved() -> int:
        held = {}

        def keep(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x)
        own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
        return sum(n for at, n in held.items() if at not in own)

    theirs = saved()
    fuse_oft(layer)
    assert theirs >= 4 * x.numel() and saved() == 0


def test_several_adapters_turn_in_their_order(calls):
    model = oft()
    model.add_adapter("second", OFTConfig(target_modules=MODULES[:2], r=0, oft_block_size=8))
    turned(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    logits, grads = step(model)
    with fuse_oft(model):
        got_logits, got = step(model)
    assert len(calls) == 12 + 4 and grads.keys() == got.keys() and len(grads) == 16
    assert far(logits, got_logits) < 1e-11 and far(grads, got) < 1e-11
    model.base_model.set_adapter("second")
    alone, _ = step(model)
    with fuse_oft(model):
        assert far(step(model)[0], alone) < 1e-11 < far(alone, logits)


def test_merged_and_disabled_layers_and_dropped_blocks_run_peft_s_forward(calls):
    model = oft(module_dropout=0.5).train()
    fuse_oft(model)
    step(model)
    assert not calls
    model.eval()
    with torch.no_grad():
        fused = model(**batch()).logits
        assert len(calls) == 12
        with model.disable_adapter():
            base = model(**batch()).logits
        model.merge_adapter()
        merged = model(**batch()).logits
        assert len(calls) == 12
        model.unmerge_adapter()
        again = model(**batch()).logits
    # PEFT inverts R in fp32 to unmerge
    assert len(calls) == 24 and far(fused, merged) < 1e-10 < 1 < far(fused, base) and far(again, fused) < 1e-4
    assert far(llama().double()(**batch()).logits, base) < 1e-10


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table, self.proj = nn.Conv2d(4, 4, 2), nn.Embedding(9, 16), nn.Linear(16, 8)

    def forward(self, ids):
        return self.proj(self.table(ids))


def test_layers_of_other_kinds_are_left_and_named():
    model = get_peft_model(Mixed(), OFTConfig(target_modules=["conv", "proj"], r=0, oft_block_size=8))
    handle = fuse_oft(model)
    assert [n.rsplit(".", 1)[1] for n in handle.fused] == ["proj"]
    assert {n.rsplit(".", 1)[1]: why for n, why in handle.left.items()} == {
        "conv": "Conv2d is not peft.tuners.oft.layer.Linear"
    }
    only = get_peft_model(Mixed(), OFTConfig(target_modules=["conv"], r=0, oft_block_size=8))
    with pytest.raises(ValueError, match="none but 1 of other kinds"):
        fuse_oft(only)
    with pytest.raises(ValueError, match=r"Mixed has none$"):
        fuse_oft(Mixed())


def test_the_patch_is_undone_and_does_not_stack():
    model = oft()
    layers = [m for m in model.modules() if type(m) is peft_oft.Linear]
    keys = list(model.state_dict())
    handle = fuse_oft(model)
    assert all("forward" in vars(m) for m in layers) and list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="fused already"):
        fuse_oft(model)
    handle.restore()
    handle.restore()
    assert not any("forward" in vars(m) for m in layers)
    with fuse_oft(model):
        pass
    assert not any("forward" in vars(m) for m in layers)


def test_correction_makes_the_rotation_more_orthogonal():
    layer = turned(Layer(), size=0.1).double()
    x = torch.eye(64, dtype=torch.float64)
    layer.layer.base_layer = nn.Identity()
    errors = []
    for correction in (False, True):
        with fuse_oft(layer, correction=correction):
            r = layer.layer(x)
        errors.append(float((r.T @ r - torch.eye(64)).abs().max()))
    assert 0 < errors[1] < 2 * errors[0] ** 2 < errors[0]


@pytest.mark.parametrize("coft", [False, True])
def test_two_forwards_before_a_backward_and_checkpointing(coft):
    def twice(model):
        model.zero_grad()
        a, b = (model(**batch(seed)).loss for seed in (0, 1))
        (a + b).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = oft(coft=coft, eps=1e-2)
    want = twice(model)
    fuse_oft(model)
    assert far(twice(model), want) < 1e-11
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert far(twice(model), want) < 1e-11


@pytest.mark.parametrize("options", [{}, {"block_share": True}, {"use_cayley_neumann": False}], ids=str)
def test_a_compiled_layer_without_graph_breaks(options):
    torch._dynamo.reset()
    layer = turned(Layer(**options))
    x = torch.randn(2, 5, 64, requires_grad=True)
    fuse_oft(layer)
    want = layer(x)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    leaves = (x, layer.layer.oft_R["default"].weight)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_trainer_s_losses_are_those_without(tmp_path, calls):
    """TRL's SFTTrainer makes the PEFT model; the patch comes after, and the saved adapter is the same."""
    from datasets import Dataset
    from safetensors.torch import load_file
    from trl import SFTConfig, SFTTrainer

    def train(fused: bool):
        arguments = SFTConfig(
            output_dir=str(tmp_path / str(fused)), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            llama(), args=arguments, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer(),
            peft_config=OFTConfig(target_modules=MODULES, r=0, oft_block_size=16, task_type="CAUSAL_LM"),
        )  # fmt: skip
        if fused:
            fuse_oft(trainer.model)
        trainer.train()
        trainer.save_model()
        saved = load_file(tmp_path / str(fused) / "adapter_model.safetensors")
        return [r["loss"] for r in trainer.state.log_history if "loss" in r], saved

    want, adapter = train(False)
    assert not calls
    got, own = train(True)
    assert len(calls) >= 6 * 12 and len(want) == 6 and want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)
    assert adapter.keys() == own.keys()
    # Adam's first steps have the sign of a gradient: an entry near 0 may go the other way
    assert all((own[n] - adapter[n]).norm() < 1e-2 * adapter[n].norm() for n in adapter)
