"""Live bytes counted operation by operation: the budget holds, and full logits never exist."""

import pytest
import torch

from burnish import Teacher, linear_loss, objectives, row_loss
from burnish.kernels import gemm_host
from burnish.ops import geometry
from burnish.ops.live_bytes import LiveBytes

V, H = 1024, 32


def peak_extra(n, objective, dtype, *, teacher="", reduction="mean", budget=None, ignored=False, backend="torch"):
    """(peak bytes beyond inputs, outputs and gradients; the geometry)."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    target = torch.randint(0, V, (n,), generator=g)
    if ignored:
        target[::3] = -100
    forms = {
        "": lambda: None,
        "hidden": lambda: Teacher(hidden=hidden.detach(), weight=weight.detach()),
        "topk": lambda: Teacher(ids=torch.arange(4).expand(n, 4), logp=torch.full((n, 4), -2.0), tail="student"),
    }
    t = forms[teacher]()
    make = geometry.slabs if reduction == "none" else geometry.chunks
    shape = make(
        rows=n, vocabulary=V, hidden=H, teacher_hidden=H if teacher == "hidden" else 0, weight_dtype=dtype,
        compute_dtype=dtype, device=hidden.device, teacher=teacher, budget=budget,
        ids=4 if teacher == "topk" else 0, backend=backend,
    )  # fmt: skip
    with LiveBytes() as counter:
        loss = linear_loss(
            hidden, weight, target, objective, teacher=t, reduction=reduction, budget=budget, backend=backend
        )
        loss.sum().backward()
    kept = [hidden.grad, weight.grad, loss]
    return counter.peak - sum(x.numel() * x.element_size() for x in kept), shape


@pytest.mark.parametrize("backend", ["torch", "host"])
@pytest.mark.parametrize("n", [512, 4096, 32768])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("objective", "teacher", "dtype"),
    [
        (objectives.nll(), "", torch.float32),
        (objectives.nll(), "", torch.bfloat16),
        (objectives.target_sft(0.5), "hidden", torch.float32),
        (objectives.jsd(), "hidden", torch.bfloat16),
        (objectives.kd(), "topk", torch.float32),
    ],
    ids=["nll-fp32", "nll-bf16", "target_sft-fp32", "jsd-bf16", "kd-topk"],
)
def test_peak_is_within_the_budget(n, reduction, objective, teacher, dtype, backend):
    options = {"teacher": teacher, "reduction": reduction, "backend": backend}
    extra, shape = peak_extra(n, objective, dtype, **options, ignored=True)
    print(f"{extra / 2**20:.1f} of {shape.budget / 2**20:.1f} MiB, {shape.rows} rows a chunk")
    assert extra <= shape.budget
    if n > 4096:
        return
    if reduction == "mean":
        small = shape.fixed + 40 * shape.per_row
        tight, shape = peak_extra(n, objective, dtype, **options, budget=small)
        assert shape.rows == 40
        tile = 40 * V * 4
    else:
        small = shape.budget - shape.rows * shape.columns * 3
        tight, smaller = peak_extra(n, objective, dtype, **options, budget=small)
        assert smaller.rows < shape.rows
        tile = smaller.rows * smaller.columns * 4
    assert tight <= small
    # the bound means something: without the twin's and the slabs' reserve the chunk itself is most of it
    fused = reduction == "none" and (objective.name, dtype, backend) == ("nll", torch.bfloat16, "host")
    if not (fused and gemm_host.supported()):  # on tile registers logits have no tile
        assert tight >= tile


def test_the_budget_is_not_a_function_of_the_rows():
    """Scratch grows by the few numbers a row that the formula names, not with the logits."""
    small = peak_extra(4096, objectives.nll(), torch.float32)[0]
    large = peak_extra(32768, objectives.nll(), torch.float32)[0]
    # dX and the row numbers are outputs or in the formula
    assert large - small <= 64 * (32768 - 4096)
    assert large < 32768 * V * 4 / 8


@pytest.mark.parametrize(("name", "plan"), [("grpo", "chunks"), ("gspo", "slabs")])
def test_inputs_and_sequences_cost_a_few_numbers_a_row(name, plan):
    """Advantages, two policies' log-probabilities and a mean over sequences, within the budget of the formula."""
    size, length = 128, 256
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(size, length, H, generator=g).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    target = torch.randint(0, V, (size, length), generator=g)
    target[:, ::3] = -100
    o = objectives.get(name, beta=0.1, entropy=0.01)
    inputs = {k: torch.zeros(size, length) for k in ("old_logp", "ref_logp")} | {"advantages": torch.ones(size)}
    shape = getattr(geometry, plan)(
        rows=size * length, vocabulary=V, hidden=H, weight_dtype=torch.float32, compute_dtype=torch.float32,
        device=hidden.device, backend="host", **({"inputs": 3} if plan == "chunks" else {}),
    )  # fmt: skip
    with LiveBytes() as counter:
        loss = linear_loss(hidden, weight, target, o, inputs=inputs, backend="host")
        loss.backward()
    extra = counter.peak - sum(x.numel() * x.element_size() for x in (hidden.grad, weight.grad))
    print(f"{extra / 2**20:.1f} of {shape.budget / 2**20:.1f} MiB")
    assert extra <= shape.budget


def test_geometry_is_a_pure_function_with_a_clear_floor():
    common = {"rows": 4096, "vocabulary": 49152, "hidden": 576, "weight_dtype": torch.bfloat16,
              "compute_dtype": torch.bfloat16, "device": torch.device("cpu")}  # fmt: skip
    assert geometry.chunks(**common) == geometry.chunks(**common)
    default = geometry.chunks(**common)
    assert default.rows == 1024  # a cast head: a quarter of the rows
    for rows, want in ((100, 100), (1024, 256), (2048, 512), (1 << 20, 1024)):
        assert geometry.chunks(**{**common, "rows": rows}).rows == want
    fp32 = dict.fromkeys(("weight_dtype", "compute_dtype"), torch.float32)
    assert geometry.chunks(**{**common, **fp32}).rows == geometry.DEFAULT_ROWS["cpu"]
    assert default.budget == default.fixed + default.rows * default.per_row
    floor = default.fixed + default.per_row
    assert geometry.chunks(**common, budget=floor).rows == 1
    with pytest.raises(ValueError, match=f"budget must be at least {floor} bytes"):
        geometry.chunks(**common, budget=floor - 1)


@pytest.mark.parametrize("backend", ["torch", "host"])
def test_row_loss_keeps_the_logits_and_their_gradient_only(backend):
    logits = torch.randn(512, V, requires_grad=True)
    target = torch.randint(0, V, (512,))
    with LiveBytes() as counter:
        row_loss(logits, target, objectives.nll(), backend=backend).backward()
    from burnish.kernels import rows_torch

    scratch = rows_torch.scratch_bytes(V, 4) if backend == "torch" else 0
    assert counter.peak <= logits.numel() * 4 + scratch + 512 * 8 * 128


def test_the_recomputing_backward_is_counted_too():
    """Its tile is seen: the instrument looks inside the eager backward."""
    extra, shape = peak_extra(512, objectives.nll(), torch.float32, reduction="none")
    hidden = torch.randn(512, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    loss = linear_loss(hidden, weight, torch.zeros(512, dtype=torch.int64), objectives.nll(), reduction="none").sum()
    with LiveBytes() as counter:
        loss.backward()
    assert counter.peak >= shape.rows * shape.columns * 4 + (512 + V) * H * 4
    assert extra >= shape.rows * shape.columns * 4


def test_a_kept_graph_holds_the_gradients_twice():
    """What ``retain_graph=True`` costs: a second dW and dX, since the first must stay as they are."""
    hidden, weight = torch.randn(64, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    loss = linear_loss(hidden, weight, torch.zeros(64, dtype=torch.int64), objectives.nll())
    with LiveBytes() as counter:
        loss.backward(retain_graph=True)
    assert counter.peak >= (64 + V) * H * 4
    hidden.grad = weight.grad = None
    with LiveBytes() as counter:
        loss.backward()
    assert counter.peak <= 4096  # the buffers that forward made become the gradients


def test_counter_counts():
    """The instrument itself: a materialised loss shows its logits."""
    hidden, weight = torch.randn(256, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with LiveBytes() as counter:
        torch.nn.functional.cross_entropy(hidden @ weight.T, torch.zeros(256, dtype=torch.int64)).backward()
    assert counter.peak >= 2 * 256 * V * 4
    gc = counter.live
    assert gc <= (hidden.numel() + weight.numel()) * 4 + 4096
