"""Row kernels at their edges: slabs, shapes, strides, masks, labels, ids, offsets and grids; every backend."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rowcheck import FOLDED, check, expected, fold, grad, problem, spec_of

from burnish.kernels import rows_host, rows_torch, rows_triton
from burnish.kernels.contract import COEF, MASKED, STATE, new_state

pytestmark = pytest.mark.usefixtures("small_blocks")

ALL = (*FOLDED, "ids")
INF = float("inf")


def agree(kernels, p, spec, **options):
    """Statistics and gradient equal the definition; returns both."""
    want, want_grad = expected(p, spec)
    stats = fold(kernels, p, spec, slabs=options.get("slabs"))
    for name in sorted(spec.stats):
        check(name, stats[name], want[name])
    g = grad(kernels, p, spec, stats, **options)
    check("grad", g, want_grad)
    return stats, g


# Slabs


@pytest.mark.parametrize("slabs", [
    [37], [17, 20], [1, 36], [36, 1], [13, 11, 7, 5, 1], [16, 16, 5], [1] * 3 + [34], [0, 37],
])  # fmt: skip
def test_slabs_merge_to_the_whole_row(kernels, slabs, device):
    p = problem(3, 37, device=device)
    p.target[0] = 36
    _, g = agree(kernels, p, spec_of(*ALL), slabs=slabs)
    whole = fold(kernels, p, spec_of(*ALL))
    torch.testing.assert_close(g, grad(kernels, p, spec_of(*ALL), whole), rtol=0, atol=1e-13)


def test_a_slab_that_is_wholly_masked(kernels, device):
    p = problem(4, 37, device=device)
    p.tile[:, :10] = -INF  # the first slab leaves the maximum at -inf
    p.tile[1, 10:20] = -INF
    p.teacher[2, 20:] = -INF
    agree(kernels, p, spec_of(*ALL), slabs=[10, 10, 17])


# Shapes and strides


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 2), (1, 16), (2, 17), (3, 31), (2, 61)])
def test_ragged_shapes(kernels, shape, device):
    agree(kernels, problem(*shape, device=device, k=2), spec_of(*ALL))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_tiles_change_nothing(kernels, shape, device):
    p, spec = problem(*shape, device=device), spec_of(*ALL)
    state = new_state(shape[0], torch.float64, p.tile.device)
    before = state.clone()
    kernels.fold(p.tile, p.teacher, state, p.target, spec)
    kernels.fold_jsd(p.tile, p.teacher, state, spec)
    assert torch.equal(state.nan_to_num(), before.nan_to_num())
    out = torch.empty_like(p.tile)
    coef = state.new_zeros(len(COEF), shape[0])
    kernels.grad(p.tile, p.teacher, out, coef, p.target, spec, ids=p.ids, ids_grad=p.upstream["ids"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_place_and_separate_outputs_agree_bit_for_bit(kernels, dtype, device, poison):
    """And every element of a poisoned output is written."""
    p, spec = problem(4, 37, dtype=dtype, device=device), spec_of(*ALL, softcap=5.0)
    stats = fold(kernels, p, spec)
    out = torch.empty(4, 37, dtype=dtype, device=device)
    assert out.isnan().all()
    separate = grad(kernels, p, spec, stats, wide=out)
    assert not separate.isnan().any()
    assert torch.equal(separate, grad(kernels, p, spec, stats, in_place=True))
    assert torch.equal(separate, grad(kernels, p, spec, stats, in_place=True, slabs=[20, 17]))


def test_tiles_cut_from_wider_buffers(kernels, device):
    """Row strides beyond the width, and unlike each other; nothing outside the cut is written."""
    p, spec = problem(4, 37, device=device), spec_of(*ALL)
    whole = grad(kernels, p, spec, fold(kernels, p, spec))
    tile, teacher = (torch.full((4, w), float("nan"), dtype=torch.float64, device=device) for w in (64, 51))
    tile[:, 5:42], teacher[:, 9:46] = p.tile, p.teacher
    p.tile, p.teacher = tile[:, 5:42], teacher[:, 9:46]
    _, g = agree(kernels, p, spec, wide=torch.full((4, 80), 7.0, dtype=torch.float64, device=device)[:, 3:40])
    torch.testing.assert_close(g, whole, rtol=0, atol=1e-14)
    base = g._base if g._base is not None else g
    assert bool((base[:, :3] == 7).all()) and bool((base[:, 40:] == 7).all())


@pytest.mark.parametrize("strict", [rows_triton, rows_host])
def test_a_strided_last_dimension_is_refused(strict, device):
    p = problem(4, 8, device=device)
    state = new_state(8, torch.float64, p.tile.device)
    with pytest.raises(ValueError, match="tile must have unit stride"):
        strict.fold(p.tile.t(), None, state, p.target, spec_of())


# Masks


def _masks(p):
    """Student, teacher, both, the label on either side, everything but the label."""
    n = p.tile.shape[0]
    y = p.target
    p.tile[0, ::3], p.teacher[1, ::4] = -INF, -INF
    p.tile[2, 5:20], p.teacher[2, 10:30] = -INF, -INF
    p.tile[3, y[3]] = -INF
    p.teacher[4, y[4]] = -INF
    p.tile[5, y[5]] = p.teacher[5, y[5]] = -INF
    keep = torch.arange(p.tile.shape[1], device=p.tile.device) == y[6]
    p.tile[6, ~keep] = -INF
    p.teacher[7, ~(torch.arange(p.tile.shape[1], device=p.tile.device) == y[7])] = -INF
    assert n == 8


@pytest.mark.parametrize("slabs", [None, [11, 13, 13]])
@pytest.mark.parametrize("transform", [{}, {"scale": 0.5, "temperature": True, "teacher_temperature": True}])
def test_masked_logits(kernels, slabs, transform, device):
    p = problem(8, 37, device=device)
    _masks(p)
    spec = spec_of(*ALL, **transform)
    stats, g = agree(kernels, p, spec, slabs=slabs)
    assert not any(stats[s].isnan().any() for s in spec.stats - {"ids"}) and not g.isnan().any()
    assert bool((g[p.tile == -INF] == 0).all())
    assert stats["label"][3] == MASKED and 0 * stats["label"][3] == 0


def test_masked_logits_in_low_precision(kernels, device):
    """-inf survives the load of a bf16 tile, and of the columns beyond the row."""
    p = problem(8, 37, device=device, dtype=torch.bfloat16)
    _masks(p)
    spec = spec_of(*ALL)
    stats = fold(kernels, p, spec)
    g = grad(kernels, p, spec, stats)
    assert not any(stats[s].isnan().any() for s in spec.stats - {"ids"}) and not g.isnan().any()
    _, want_grad = expected(p, spec)
    _, plain = expected(p, spec, torch.float32)
    check("grad", g, want_grad, plain.to(torch.bfloat16))


def test_softcap_unmasks(kernels, device):
    """tanh(-inf) is finite: -inf before a softcap is a logit of -softcap, of zero slope."""
    p = problem(3, 37, device=device)
    p.tile[0, 4] = p.teacher[1, 7] = -INF
    p.tile[2, 9] = INF
    _, g = agree(kernels, p, spec_of(*ALL, softcap=5.0, teacher_softcap=5.0))
    assert g[0, 4] == 0 and g[2, 9] == 0


def test_nan_logits_stay_visible(kernels, device):
    """A NaN logit, the label's too, makes its row's loss NaN and no other's."""
    p = problem(3, 37, device=device)
    p.tile[0, 3] = float("nan")
    p.tile[1, p.target[1]] = float("nan")
    with torch.no_grad():
        stats = fold(kernels, p, spec_of("mean"))
    assert stats["logp"].isnan().tolist() == [True, True, False]
    assert stats["label"].isnan().tolist() == [bool(p.target[0] == 3), True, False]


# Labels and ids


@pytest.mark.parametrize("slabs", [None, [20, 17], [3, 3, 31]])
def test_ties_go_to_the_lowest_column(kernels, slabs, device):
    # within a lane, across lanes, across blocks, across slabs
    p, spec = problem(8, 37, device=device), spec_of("hit")
    p.tile.clamp_(max=4.0)
    for row, columns in enumerate([(2, 30), (2, 30), (19, 20), (19, 20), (3, 35), (0, 36), (4, 5), (4, 5)]):
        p.tile[row, list(columns)] = 9.0
    p.target[:] = torch.tensor([2, 30, 19, 20, 3, 36, 4, 5])
    assert fold(kernels, p, spec, slabs=slabs)["hit"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("slabs", [None, [32, 5]])
def test_label_in_the_last_ragged_column(kernels, slabs, device):
    p = problem(2, 37, device=device)
    p.target[:] = 36
    agree(kernels, p, spec_of(*ALL), slabs=slabs)


@pytest.mark.parametrize("label", [-100, -1, 37, 38, 48, 1 << 40])
@pytest.mark.parametrize("slabs", [None, [20, 17]])
def test_label_outside_the_vocabulary(kernels, label, slabs, device):
    """NaN for that row's label statistics, no gradient at any column from it, no other row touched."""
    p, spec = problem(3, 37, device=device), spec_of("label", "logp", "lse", "teacher_logp", "hit", "mean")
    whole = fold(kernels, p, spec)
    g_whole = grad(kernels, p, spec, whole)
    p.target[1] = label
    stats = fold(kernels, p, spec, slabs=slabs)
    for name in ("label", "logp", "teacher_logp"):
        assert stats[name].isnan().tolist() == [False, True, False]
    assert stats["hit"][1] == 0
    torch.testing.assert_close(stats["lse"], whole["lse"])
    buffer = torch.full((5, 37), 7.0, dtype=torch.float64, device=device)
    g = grad(kernels, p, spec, stats, slabs=slabs, wide=buffer[1:4])
    assert bool((buffer[0] == 7).all()) and bool((buffer[4] == 7).all())
    torch.testing.assert_close(g[[0, 2]], g_whole[[0, 2]])


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("slabs", [None, [5, 32]])
def test_ids_scatter(kernels, count, slabs, device):
    """Duplicates add, -1 is padding wherever its column would fall, ids in any slab and at the label."""
    p = problem(3, 37, device=device, k=count)
    p.ids[0, 0] = 36
    p.ids[1, 0] = p.target[1]
    p.ids[2, -1] = -1
    p.upstream["ids"] = torch.where(p.ids < 0, float("nan"), 1.5)
    agree(kernels, p, spec_of("ids"), slabs=slabs)


# Offsets and grids


def test_a_row_of_zero_stride_has_room_for_any_number_of_rows(kernels, device):
    """Expanded views: rows that share memory."""
    p = problem(3, 37, device=device)
    p.tile, p.teacher = p.tile[:1].expand(3, 37), p.teacher[:1].expand(3, 37)
    p.target[:] = p.target[0]
    stats, _ = agree(kernels, p, spec_of(*[s for s in FOLDED if s != "ids"]))
    assert len(set(stats["lse"].tolist())) == 1


@pytest.mark.parametrize("backend", [rows_triton, rows_host])
def test_row_offsets_are_64_bit(backend, device):
    """Two rows 2^31 + 2^12 elements apart, in pages that nobody touches: int32 offsets would miss the second."""
    if device.type != "cpu":
        pytest.skip("needs sparse memory")
    far = (1 << 31) + 4096
    p, spec = problem(2, 37, dtype=torch.float16), spec_of(*FOLDED)
    want = fold(backend, p, spec)
    want_grad = grad(backend, p, spec, want)
    wide, into = (torch.as_strided(torch.empty(far + 64, dtype=torch.float16), (2, 37), (far, 1)) for _ in range(2))
    p.tile = wide.copy_(p.tile)
    got = fold(backend, p, spec)
    for name in spec.stats:
        assert torch.equal(got[name], want[name]), name
    p.teacher = into.copy_(p.teacher)  # the teacher's rows as well, and then the output's
    assert torch.equal(fold(backend, p, spec)["cross"], want["cross"])
    p.teacher = p.teacher.clone()
    assert torch.equal(grad(backend, p, spec, got, wide=into), want_grad)


class _Grid:
    """Stands for a kernel: remembers the grid of each launch and runs nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(("rows", "columns"), [(100_000, 64), (3, 300_001), (1, 1 << 26)])
def test_grids_stay_within_the_limits(monkeypatch, rows, columns):
    """Axis 0 takes 2^31 - 1 programs, axis 1 only 65,535."""
    monkeypatch.setattr(rows_triton, "BLOCK", 2048)
    grid = _Grid()
    for name in ("fold_kernel", "jsd_kernel", "grad_kernel"):
        monkeypatch.setattr(rows_triton, name, grid)
    tile = torch.zeros(1, columns, dtype=torch.bfloat16).expand(rows, columns)  # pages that nobody touches
    state, coef = torch.zeros(len(STATE), rows), torch.zeros(len(COEF), rows)
    target = torch.zeros(1, dtype=torch.long).expand(rows)
    rows_triton.fold(tile, tile, state, target, spec_of("jsd"))
    rows_triton.fold_jsd(tile, tile, state, spec_of("jsd"))
    rows_triton.grad(tile, tile, tile, coef, target, spec_of("jsd"))
    assert [len(g) for g in grid.grids] == [1, 1, 2]
    assert all(g[0] == rows for g in grid.grids)
    assert grid.grids[2][1] * 2048 >= columns and grid.grids[2][1] <= 65_535


def test_many_rows_and_many_columns(kernels, monkeypatch, device):
    """70,000 rows (beyond a grid's axis 1) on the twin and the host, and V beyond 262,144 on all."""
    monkeypatch.setattr(rows_triton, "BLOCK", 1 << 17)  # three blocks
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 2 << 20)
    monkeypatch.setattr(rows_host, "BLOCK", 1024)
    p = problem(2, 262_147, device=device, k=2)
    p.target[0] = 262_146
    agree(kernels, p, spec_of(*ALL))
    if kernels is not rows_triton:
        agree(kernels, problem(70_000, 3, device=device), spec_of("mean", "mix"))


def test_the_compiled_kernels_multiply_rows_in_64_bits(tmp_path):
    """In Triton's IR every product with the row index, and every use of it as an offset, is i64."""
    code = """
import static
from burnish.kernels import rows_triton as r
spec, target = static.SPECS["everything"], static.TARGETS["sm_90"]
for kernel, constants in static.launches(spec, static.DTYPES["bf16"][0]):
    print("KERNEL", kernel.__name__)
    print(static.build(kernel, constants, static.DTYPES["bf16"], target).asm["ttir"])
"""
    folder = Path(__file__).parents[2] / "benchmarks"
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = run.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 3
    for text in kernels:
        (pid,) = set(re.findall(r"(%\S+) = tt.get_program_id x", text))
        (row,) = set(re.findall(rf"(%\S+) = arith.extsi {pid} : i32 to i64", text))
        lines = [line for line in text.splitlines() if "get_program_id" not in line]
        uses = [line for line in lines if re.search(rf"{pid}\b(?!_)", line)]
        assert len(uses) == 1, uses  # the program id is used once: to be widened
        assert len(re.findall(rf"arith.muli .*{row}\b.* : i64", text)) >= 1
