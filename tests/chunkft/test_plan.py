"""The cut: a partition, as even as its steps allow, the same wherever it is made; and what it refuses."""

import re
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.chunkft import Segment, plan
from burnish.chunkft.plan import element_bytes

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def module(shapes, dtype=F32, device="meta"):
    """Parameters p0, p1, ... of these shapes; ``dtype`` is one, or one each."""
    out = torch.nn.Module()
    dtypes = dtype if isinstance(dtype, list) else [dtype] * len(shapes)
    for i, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True)):
        out.register_parameter(f"p{i}", torch.nn.Parameter(torch.empty(shape, dtype=kind, device=device)))
    return out


def check_partition(model, cut):
    """Every planned row once, in order; numel, shape, offset and dtype of a segment are those of the rows it names."""
    want = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    starts = dict(zip(want, accumulate((p.numel() for p in want.values()), initial=0), strict=False))
    at = dict.fromkeys(want, 0)
    names = []
    for chunk in (*cut.chunks, cut.always):
        assert len({s.name for s in chunk}) == len(chunk)
        for s in chunk:
            p = want[s.name]
            view = p.view(1) if not p.dim() else p[s.start : s.stop]
            assert s.start == at[s.name] < s.stop
            assert s.numel == view.numel() and s.shape == tuple(view.shape if p.dim() else ()) and s.dtype == p.dtype
            assert s.offset == starts[s.name] + view.storage_offset() - p.storage_offset()
            assert s.whole == (s.numel == p.numel())
            at[s.name] = s.stop
            if not names or names[-1] != s.name:
                names.append(s.name)
    assert at == {n: p.shape[0] if p.dim() else 1 for n, p in want.items()}
    assert names == [*(n for n in want if n not in (a := [s.name for s in cut.always])), *a]
    assert [s.name for s in cut.parameters] == list(want) and all(s.whole for s in cut.parameters)
    assert [s.offset for s in cut.parameters] == list(starts.values())


# --- real models ------------------------------------------------------------------------------------------------------

LLAMA = {
    "Llama-2-7B": ((32000, 4096, 11008, 32, 32, 32), 6.738, 202.4, 131.1),
    "Llama-3-8B": ((128256, 4096, 14336, 32, 32, 8), 8.030, 218.1, 525.3),
    "Llama-3-70B": ((128256, 8192, 28672, 80, 64, 8), 70.55, 855.7, 1050.7),
}


@pytest.fixture(scope="module", params=LLAMA)
def llama(request):
    transformers = pytest.importorskip("transformers")
    sizes, *facts = LLAMA[request.param]
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.LlamaConfig(
        **dict(zip((*keys, "num_key_value_heads"), sizes, strict=True)), tie_word_embeddings=False
    )
    with torch.device("meta"):
        return request.param, transformers.LlamaForCausalLM(config).to(BF16), facts


@pytest.mark.parametrize("small", ["always", "chunk"])
@pytest.mark.parametrize("count", [8, 32, 64, 128])
def test_real_models_are_cut_evenly(llama, count, small):
    _, model, _ = llama
    total = sum(p.numel() for p in model.parameters())
    for align, most in ((False, 1e-3), (True, 1.2e-2)):
        cut = plan(model, count, small=small, align=align)
        check_partition(model, cut)
        assert cut.num_chunks == count and cut.spread <= most
        assert sum(s.numel for c in (*cut.chunks, cut.always) for s in c) == total
        assert {len(s.shape) for s in cut.always} == ({1} if small == "always" else set())
        aligned = [s.start % 16 == 0 for c in cut.chunks for s in c if s.start]
        assert all(aligned) if align else not all(aligned)


def test_sizes_and_active_tensors(llama):
    name, model, (billions, layer, head) = llama
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e9, 2 if billions > 70 else 3) == billions
    assert round(sum(p.numel() for p in model.model.layers[0].parameters()) / 1e6, 1) == layer
    assert round(model.lm_head.weight.numel() / 1e6, 1) == head
    assert sum(r["bytes"] for r in plan(model, 8).table()[:-1]) == 18 * total
    if name == "Llama-2-7B":
        for count, cut_tensors, active in ((32, 30, (6, 12)), (128, 124, (1, 7))):
            cut = plan(model, count, small="chunk", align=False)
            assert len({s.name for c in cut.chunks for s in c if not s.whole}) == cut_tensors
            assert (min(map(len, cut.chunks)), max(map(len, cut.chunks))) == active


# --- any shapes -------------------------------------------------------------------------------------------------------

SMALL = [st.tuples(), st.tuples(st.integers(0, 300)), st.tuples(st.integers(0, 9), st.integers(0, 9))]
EVEN = [st.tuples(st.integers(20, 9000), st.integers(1, 3)), st.tuples(st.integers(20, 90), *[st.integers(1, 5)] * 2)]
HUGE = [st.tuples(st.integers(1, 3), st.just(10**6))]


@st.composite
def problems(draw):
    kinds = draw(st.sampled_from([EVEN, EVEN, EVEN + SMALL, EVEN + SMALL + HUGE]))
    shapes = draw(st.lists(st.one_of(kinds), min_size=1, max_size=6))
    dtypes = [draw(st.sampled_from([BF16, F16, F32])) for _ in shapes]
    options = {
        "small": draw(st.sampled_from(["always", "chunk"])), "align": draw(st.sampled_from([True, False, 1, 3, 64])),
        "whole": draw(st.sampled_from([(), (), (), "p*", "p[02]"])),
    }  # fmt: skip
    return shapes, dtypes, draw(st.integers(1, 14)), options


def expected_cuts(shapes, dtypes, count, small, align, whole):
    """The cuts in bytes from the start: each at the place nearest to its share where one may be, of two the lower."""
    cut = [
        (i, s, torch.Size(s).numel() * {2: 18, 4: 16}[d.itemsize])
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
        if torch.Size(s).numel() and (small == "chunk" or len(s) > 1)
    ]
    mean = Fraction(sum(c for *_, c in cut), count)
    places, before = [0], 0
    for i, shape, cost in cut:
        rows = shape[0] if shape else 1
        row = cost // rows
        step = 1
        if align is True and len(shape) in (1, 2):
            fits = [t for t in ((16,) if len(shape) == 1 else (16, 32, 64, 128)) if t * row <= mean / 200]
            step = max(fits, default=1)
        elif align is not False and len(shape) in (1, 2):
            step = align
        if whole == "p*" or (whole and i in (0, 2)):
            step = rows
        places += [before + row * r for r in (*range(step, rows, step), rows)]
        before += cost
    return [min(places, key=lambda x: (abs(x - j * mean), x)) for j in range(count + 1)]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_any_shapes(problem):
    shapes, dtypes, count, options = problem
    model = module(shapes, dtypes)
    numel = [torch.Size(s).numel() for s in shapes]
    if not any(numel):
        with pytest.raises(ValueError, match="requires a gradient"):
            plan(model, count)
        return
    if options["whole"] == "p[02]" and not any(n for i, n in enumerate(numel) if i in (0, 2)):
        with pytest.raises(ValueError, match="matches none"):
            plan(model, count, **options)
        return
    if options["small"] == "always" and not any(n and len(s) > 1 for n, s in zip(numel, shapes, strict=True)):
        with pytest.raises(ValueError, match="small must be 'chunk'"):
            plan(model, count, **options)
        return
    want = expected_cuts(shapes, dtypes, count, **options)
    if len(set(want)) < len(want):
        with pytest.raises(ValueError, match=f"no chunk to be empty; got {count}: there are") as error:
            plan(model, count, **options)
        fewer = int(re.search(r"at most (\d+)", str(error.value)).group(1))
        assert 1 <= fewer < count
        check_partition(model, plan(model, fewer, **options))  # the number it gives is one that works
        return
    cut = plan(model, count, **options)
    check_partition(model, cut)
    assert list(accumulate((sum(s.cost for s in c) for c in cut.chunks), initial=0)) == want
    assert cut.fingerprint == plan(module(shapes, dtypes), count, **options).fingerprint


@settings(max_examples=150, deadline=None)
@given(problems(), problems(), st.booleans())
def test_the_fingerprint_is_that_of_the_cut(one, other, same_shapes):
    def made(shapes, dtypes, count, options):
        try:
            cut = plan(module(shapes, dtypes), count, **options)
        except ValueError:
            return None
        rows = [[(s.name, s.start, s.stop) for s in c] for c in (*cut.chunks, cut.always)]
        return (rows, [(s.name, s.shape, s.dtype) for s in cut.parameters]), cut.fingerprint

    a, b = made(*one), made(*((*one[:2], *other[2:]) if same_shapes else other))
    if a and b:
        assert (a[0] == b[0]) == (a[1] == b[1])


# --- the fingerprint, tied and frozen weights, whole, bytes, text -----------------------------------------------------

GRID = [(64, 8), (8,), (96, 8)]


def test_what_changes_the_fingerprint():
    base = plan(module(GRID), 3).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert base == plan(module(GRID), 3, align=False).fingerprint  # rows asked for differently, the same rows
    assert base == plan(module([*GRID, (0, 3)]), 3).fingerprint
    assert base == plan(module(GRID, device="cpu"), 3).fingerprint
    renamed = module(GRID[:2])
    renamed.register_parameter("q2", module([GRID[2]]).p0)
    changed = [
        plan(renamed, 3), plan(module([GRID[2], (8,), GRID[0]]), 3), plan(module([(64, 8), (8,), (96, 8, 1)]), 3),
        plan(module(GRID, BF16), 3), plan(module(GRID, F16), 3), plan(module(GRID), 2), plan(module(GRID), 4),
        plan(module(GRID), 3, small="chunk"), plan(module(GRID), 3, align=32), plan(module(GRID), 2, whole="p2"),
    ]  # fmt: skip
    prints = [base, *(c.fingerprint for c in changed)]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_is_not_changed_by_accident():
    """Saved optimizer states carry it: if this fails, plans made by earlier versions no longer match theirs."""
    assert plan(module(GRID), 3).fingerprint == "3922de31e18fc49ccc425062d45764edf291e3cbe6285dd80ae4e5f64e9d34fb"


def test_tied_weights_once_and_frozen_ones_never():
    model = module([(40, 4), (30, 4), (20, 4)])
    model.head = torch.nn.Linear(4, 40, bias=False, device="meta")
    model.head.weight = model.p0
    model.p1.requires_grad_(False)
    model.register_parameter("codes", torch.nn.Parameter(torch.empty(5, 4, dtype=torch.int8), requires_grad=False))
    cut = plan(model, 2)
    check_partition(model, cut)
    assert [p.name for p in cut.parameters] == ["p0", "p2"]
    (first,) = plan(model, 2, whole=["head.weight"]).chunks[0]  # by its other name
    assert first == Segment("p0", 0, 40, 160, (40, 4), 0, True, F32)
    with pytest.raises(ValueError, match="'p1', which matches none"):
        plan(model, 2, whole="p1")
    model.p0.requires_grad_(False)
    assert [p.name for p in plan(model, 2).parameters] == ["p2"]


def test_whole_goes_where_its_middle_falls():
    shapes = [(10, 1), (30, 1), (60, 1)]  # middles at 5, 25 and 70 of 100
    for count in (2, 3):
        cut = plan(module(shapes), count, whole="p1")
        (home,) = [j for j, c in enumerate(cut.chunks) for s in c if s.name == "p1"]
        assert home == 25 * count // 100
    assert [[s.name for s in c] for c in plan(module(shapes), 2, whole=["p?"]).chunks] == [["p0", "p1"], ["p2"]]
    model = torch.nn.Module()
    model.register_parameter("w[0]", torch.nn.Parameter(torch.empty(9, 1)))  # a name, though not a pattern of itself
    assert plan(model, 1, whole="w[0]").num_chunks == 1


@pytest.mark.parametrize(
    "shape,start",
    [
        ((51320, 2), 25600), ((51040, 2), 25536), ((25680, 2), 12864), ((12840, 2), 6432), ((6436, 2), 3216),
        ((6390, 2), 3195), ((6440,), 3216), ((51320,), 25664), ((6390,), 3195), ((51320, 2, 1), 25660),
    ],
)  # fmt: skip
def test_the_tile_is_the_largest_that_costs_little(shape, start):
    """200 tiles fit the mean chunk, half of the rows: 128 from 51200 rows on, 64 from 25600, ..., none below 6400."""
    (_, (second,)) = plan(module([shape]), 2, small="chunk").chunks
    assert second.start == start


def test_the_step_at_its_limits():
    starts = [s.start for c in plan(module([(60, 2), (51140, 2)]), 2).chunks for s in c]
    assert starts == [0, 0, 25600]  # 128 rows are just 0.5 %; at 64 it would be 25536
    assert plan(module([(7, 2, 2)]), 2, align=4).chunks[1][0].start == 3  # an expert is no row of a matrix
    # the last place before the end of 100 rows is 64; 83 is nearer to the end
    assert [str(s) for s in plan(module([(100, 2), (66, 2)]), 2, align=64).chunks[0]] == ["p0"]
    assert [str(s) for s in plan(module([(100, 2), (62, 2)]), 2, align=64).chunks[0]] == ["p0[0:64]"]


def test_bytes_balance_where_elements_do_not():
    assert [element_bytes(d) for d in (F32, BF16, F16)] == [4 + 4 + 8, 2 + 4 + 8 + 4, 2 + 4 + 8 + 4]
    cut = plan(module([(900, 2), (800, 2)], [F32, BF16]), 2, align=False)
    assert cut.spread == 0 and [sum(s.numel for s in c) for c in cut.chunks] == [1800, 1600]
    cut = plan(module([(1, 2), (2, 2)]), 2)
    assert cut.spread == 2 / 3  # 32 and 64 bytes


def test_table_and_text_say_the_same():
    cut = plan(module([(64, 8), (8,), (96, 8), ()]), 2)
    one, two, always, total = cut.table()
    assert one == {
        "chunk": 0, "tensors": 2, "rows": 80, "elements": 640, "bytes": 10240, "share": 10240 / 20624,
        "first": "p0", "last": "p2[0:16]",
    }  # fmt: skip
    assert (two["first"], two["last"]) == ("p2[16:96]", "p2[16:96]")
    assert (always["elements"], always["first"], always["last"]) == (9, "p1", "p3") and total["bytes"] == 20624
    head, *lines = str(cut).splitlines()
    assert head.split()[:6] == ["chunk", "tensors", "rows", "elements", "MiB", "share"]
    assert lines[0].split() == ["0", "2", "80", "640", "0.0", "49.65%", "p0", "..", "p2[0:16]"]
    assert lines[1].split()[6:] == ["p2[16:96]"]
    assert [line.split()[0] for line in lines[:4]] == ["0", "1", "always", "total"] and "spread 0.000%" in lines[4]
    assert "none" in str(plan(module([(4, 4)]), 2))  # nothing is always trained
    nested = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([module([(4, 4)]), module([(4, 4)])])})
    assert "layers.{0.p0 .. 1.p0}" in str(plan(nested, 1))


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "zero chunks": ({"num_chunks": 0}, "num_chunks must be a whole number, at least 1; got 0"),
    "not an int": ({"num_chunks": 2.0}, "num_chunks must be a whole number, at least 1; got 2.0"),
    "a bool": ({"num_chunks": True}, "got True"),
    "more than rows": (
        {"num_chunks": 161},
        "must be at most 160 for no chunk to be empty; got 161: there are 160 rows, the largest, in p2, of 128 of",
    ),
    "far more": ({"num_chunks": 10**15}, "there are 160 rows"),
    "coarse tiles": ({"num_chunks": 9, "align": 64}, "at most 2 .* there are 3 pieces .*tiles of align"),
    "small": ({"small": "never"}, "small must be 'always' or 'chunk'; got 'never'"),
    "align": ({"align": 0}, "align must be True, False or a number of rows, at least 1; got 0"),
    "align type": ({"align": "yes"}, "got 'yes'"),
    "pattern": ({"whole": ["p2", "p22"]}, "whole must match trainable parameters; got 'p22'.*did you mean p2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        plan(module(GRID), **{"num_chunks": 2, **changes})


def test_bad_models():
    with pytest.raises(ValueError, match="requires a gradient; got none"):
        plan(module(GRID).requires_grad_(False), 2)
    with pytest.raises(ValueError, match="small must be 'chunk' for this model; got 'always'"):
        plan(module([(8,), ()]), 2)
    split = module(GRID)
    split.register_parameter("far", torch.nn.Parameter(torch.empty(3, 3, device="cpu")))
    with pytest.raises(ValueError, match="one device; got p0 on meta and far on cpu"):
        plan(split, 2)
    with pytest.raises(
        TypeError, match=r"parameter p1 .*got torch.float64; no float64: cast the model with .float\(\)"
    ):
        plan(module(GRID, [F32, torch.float64, F32]), 2)
    with pytest.raises(TypeError, match=r"parameter p0 .*got torch.complex64"):
        plan(module([(4, 4)], torch.complex64), 2)
    sparse = torch.nn.Module()
    sparse.register_parameter("p0", torch.nn.Parameter(torch.eye(3).to_sparse()))
    with pytest.raises(TypeError, match=r"parameter p0 .*sparse"):
        plan(sparse, 2)
