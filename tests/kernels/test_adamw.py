"""AdamW over tiles, every backend: the bits of torch.optim.AdamW, its roundings by chance, moments of 8 bits."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from burnish.kernels import adamw as contract
from burnish.kernels import adamw_host, adamw_torch, adamw_triton, dispatch, host_build
from burnish.kernels.adamw import QUANT_BLOCK, STREAMS, TILE, AdamWSpec, TileTable, Update, quantize, random_bits

SIZES = (1, 7, 1023, 1025, 4099)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SPECS = {
    "fp32": (FP32, AdamWSpec()),
    "fp32, 8bit": (FP32, AdamWSpec("8bit")),
    "fp32, rounded root": (FP32, AdamWSpec(exact=False)),
    "bf16, nearest": (BF16, AdamWSpec()),
    "bf16, master": (BF16, AdamWSpec(master=True)),
    "bf16, master, rounded root": (BF16, AdamWSpec(master=True, exact=False)),
    "bf16, master, 8bit": (BF16, AdamWSpec("8bit", master=True)),
    "bf16, stochastic": (BF16, AdamWSpec(rounding="stochastic")),
    "bf16, stochastic, 8bit": (BF16, AdamWSpec("8bit", "stochastic")),
    "fp16, master": (FP16, AdamWSpec(master=True)),
    "fp16, stochastic": (FP16, AdamWSpec(rounding="stochastic")),
    "fp16, stochastic, 8bit": (FP16, AdamWSpec("8bit", "stochastic")),
}


@pytest.fixture(params=["torch", "triton", "host"])
def kernels(request, device):
    if request.param == "host" and device.type != "cpu":
        pytest.skip("the host backend serves the CPU")
    return dispatch.adamw(request.param)


# Problems


def gradients(n, seed):
    """Over many orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * torch.randn(n, generator=g).mul(3).exp()


class Problem:
    """Weights of some sizes, lying at odd places within a larger tensor, and their flat state, poisoned with NaN."""

    def __init__(self, sizes=SIZES, dtype=FP32, spec=None, *, device="cpu", seed=0, gap=3, first=0, index=2**32 - 1500):
        self.spec, self.dtype, self.sizes = spec or AdamWSpec(), dtype, sizes
        g = torch.Generator().manual_seed(seed)
        self.area = torch.full((first + sum(sizes) + gap * len(sizes) + gap,), 7.0, dtype=dtype, device=device)
        self.weights, segments, at = [], [], first
        for n in sizes:
            self.area[at : at + n] = torch.randn(n, generator=g).to(dtype)
            self.weights.append(self.area[at : at + n])
            segments.append((self.weights[-1], index))
            at, index = at + n + gap, index + n
        self.table = TileTable.build(segments)
        n = len(self.table) * TILE
        moment = torch.uint8 if self.spec.quantized else FP32
        self.m, self.v = (torch.zeros(n, dtype=moment, device=device) for _ in range(2))
        nothing = torch.full((n // QUANT_BLOCK,), float("nan"), device=device)
        self.m_scale, self.v_scale = (nothing.clone(), nothing.clone()) if self.spec.quantized else (None, None)
        self.master = torch.full((n,), float("nan"), device=device) if self.spec.master else None
        self.grad = torch.full((n,), float("nan"), device=device)
        padding = torch.ones(n, dtype=torch.bool, device=device)
        for flat, weight in zip(self.own(torch.arange(n, device=device)), self.weights, strict=True):
            padding[flat] = False
            if self.master is not None:
                self.master[flat] = weight.float()
            if self.spec.quantized:
                blocks = slice(int(flat[0]) // QUANT_BLOCK, int(flat[-1]) // QUANT_BLOCK + 1)
                self.m_scale[blocks], self.v_scale[blocks] = 0.0, 0.0
        for x in (self.m, self.v):
            x[padding] = 77 if self.spec.quantized else float("nan")
        self.padding = padding

    def own(self, flat):
        """A flat buffer's part of each segment."""
        return [flat[t * TILE : t * TILE + n] for t, n in zip(self.table.first_tile, self.sizes, strict=True)]

    def set_grad(self, seed):
        for i, part in enumerate(self.own(self.grad)):
            part.copy_(gradients(part.numel(), 1000 * seed + i))

    def step(self, kernels, step, *, part=None, scale=None, found_inf=None, **options):
        """One update of all tiles, or of tiles [first, last)."""
        first, last = part or (0, len(self.table))
        tiles, blocks = slice(first * TILE, last * TILE), slice(first * TILE // QUANT_BLOCK, last * TILE // QUANT_BLOCK)
        flat = [x if x is None else x[tiles] for x in (self.grad, self.master, self.m, self.v)]
        scales = [x if x is None else x[blocks] for x in (self.m_scale, self.v_scale)]
        options = {"lr": 1e-2, "weight_decay": 0.1, "step_m": step, "step_v": step, "seed": 11, "step": step, **options}
        table = self.table if part is None else self.table.slice(first, last)
        kernels.adamw(table, *flat, *scales, self.dtype, self.spec, Update(**options), scale, found_inf)

    def state(self):
        named = {"weights": self.area, "m": self.m, "v": self.v, "master": self.master, "m_scale": self.m_scale,
                 "v_scale": self.v_scale}  # fmt: skip
        return {name: x.clone() for name, x in named.items() if x is not None}


def bits(x):
    """So that NaN is equal to itself and 0 is not -0."""
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def same(a, b):
    return all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def train(kernels, name, *, steps=4, device="cpu", **options):
    p = Problem(dtype=SPECS[name][0], spec=SPECS[name][1], device=device)
    for step in range(1, steps + 1):
        p.set_grad(step)
        p.step(kernels, step, **options)
    return p


# The bits of torch

OPTIONS = [
    {"lr": 1e-3, "weight_decay": 0.0}, {"lr": 0.3, "weight_decay": 0.1}, {"lr": 1e-5, "weight_decay": 0.1, "eps": 1e-6},
    {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.3, "beta2": 0.95}, {"lr": 1e-2, "beta1": 0.5},
]  # fmt: skip


def optimizer(p, weights, *, beta1=0.9, beta2=0.999, **options):
    options = {"weight_decay": 0.0, **options, "betas": (beta1, beta2)}
    return torch.optim.AdamW([torch.nn.Parameter(w.float().cpu().clone()) for w in weights], foreach=False, fused=False,
                             **options)  # fmt: skip


def follow(kernels, p, options, steps=25):
    """(torch's parameters, m, v) and ours after the same gradients."""
    reference = optimizer(p, p.weights, **options)
    parameters = reference.param_groups[0]["params"]
    for step in range(1, steps + 1):
        p.set_grad(step)
        for parameter, grad in zip(parameters, p.own(p.grad), strict=True):
            parameter.grad = grad.cpu().clone()
        reference.step()
        p.step(kernels, step, **{"weight_decay": 0.0, **options})
    moments = [[reference.state[q][name] for q in parameters] for name in ("exp_avg", "exp_avg_sq")]
    return [q.detach() for q in parameters], *moments


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "host"])
def test_fp32_has_the_bits_of_torch_over_25_steps(backend, options):
    p = Problem()
    want, m, v = follow(dispatch.adamw(backend), p, options)
    assert all(map(torch.equal, p.weights, want))
    assert all(map(torch.equal, p.own(p.m), m)) and all(map(torch.equal, p.own(p.v), v))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "host"])
def test_a_master_has_the_bits_of_torch_and_the_weight_is_its_nearest(backend, dtype):
    p = Problem(dtype=dtype, spec=AdamWSpec(master=True))
    want, m, v = follow(dispatch.adamw(backend), p, OPTIONS[1])
    assert all(map(torch.equal, p.own(p.master), want)) and all(map(torch.equal, p.own(p.m), m))
    assert all(map(torch.equal, p.own(p.v), v))
    assert all(torch.equal(w, q.to(dtype)) for w, q in zip(p.weights, want, strict=True))


def test_a_large_tensor_on_two_threads_has_the_bits_of_torch():
    """torch cuts it elsewhere than we do: nothing depends on an element's place."""
    p = Problem((300_001,))
    want, m, _ = follow(adamw_host, p, OPTIONS[1], steps=3)
    assert torch.equal(p.weights[0], want[0]) and torch.equal(p.own(p.m)[0], m[0])


def fma(x, y, z):
    """x y + z rounded once, of fp32: in fp64 the product is exact, and a sum rounded to odd may be rounded again."""
    x, y, z = (np.asarray(a, dtype=np.float32).astype(np.float64) for a in (x, y, z))
    product = x * y
    total = np.asarray(product + z)
    back = total - product
    error = (product - (total - back)) + (z - back)
    word = total.view(np.int64)
    odd = np.where((error != 0) & (word % 2 == 0), np.where((error > 0) == (total > 0), 1, -1), 0)
    return (word + odd).view(np.float64).astype(np.float32)


@pytest.fixture
def fused(monkeypatch, device):
    """Fused multiply-adds in the interpreter, which rounds twice; hardware has them."""
    if device.type == "cpu":
        from triton.runtime import interpreter

        def create_fma(self, x, y, z):
            return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


def test_triton_has_the_bits_of_the_formula(fused, device):
    """Rounded as it says, with square roots that are exact."""
    for options in OPTIONS:
        p, q = Problem(device=device), Problem()
        for step in range(1, 6):
            p.set_grad(step)
            p.step(adamw_triton, step, **options)
            s = Update(**{"weight_decay": 0.1, **options, "step_m": step, "step_v": step}).scalars()
            for i, (w, m, v) in enumerate(zip(q.weights, q.own(q.m), q.own(q.v), strict=True)):
                g, f = gradients(w.numel(), 1000 * step + i).numpy(), np.float32
                old = m.numpy()
                new = fma(f(s.weight), g - old, old if s.small else g)
                square = fma(f(s.rest) * g, g, v.numpy() * f(s.beta2))
                denominator = np.sqrt(square) / f(s.root) + f(s.eps)
                w.copy_(torch.from_numpy(w.numpy() * f(s.decay) + f(s.step) * new / denominator))
                m.copy_(torch.from_numpy(new))
                v.copy_(torch.from_numpy(square))
        assert same({k: x.cpu() for k, x in p.state().items()}, q.state()), options


def test_triton_stays_within_ulps_of_torch(device):
    """torch's square root is 1 ulp off for some numbers, and the interpreter rounds products before it adds them."""
    p = Problem(device=device)
    want, m, v = follow(adamw_triton, p, OPTIONS[1])
    largest = {
        name: max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)) * 2**24
        for name, got, expected in (("weights", p.weights, want), ("m", p.own(p.m), m), ("v", p.own(p.v), v))
    }
    print(f"in units of the largest element's rounding: {largest}")
    assert max(largest.values()) <= 8
    p, q = Problem(device=device), Problem()
    start = q.area.clone()
    for x, kernels in ((p, adamw_triton), (q, adamw_torch)):
        x.set_grad(1)
        x.step(kernels, 1)
    off = (p.area.cpu() - q.area).abs() / (start.abs() + (q.area - start).abs())  # of the two that are added
    print(f"weights after one step: {off.max() * 2**24:.2f}")
    assert off.max() <= 6 * 2**-24


def test_host_and_twin_agree_to_the_bit():
    for name in SPECS:
        a, b = (train(kernels, name, steps=6, scale=torch.tensor([0.7])) for kernels in (adamw_torch, adamw_host))
        assert same(a.state(), b.state()), name


@pytest.mark.parametrize("name", SPECS)
def test_triton_agrees_with_the_twin(name, fused, device):
    """Moments, codes and scales to the bit; weights up to torch's square root, which may round another way, rarely."""
    a, b = train(adamw_torch, name), train(adamw_triton, name, device=device)
    want, got = a.state(), {key: x.cpu() for key, x in b.state().items()}
    start = Problem(dtype=a.dtype, spec=a.spec).state()
    for key in ("weights", "master"):
        if key not in want:
            continue
        x, y, z = (part.pop(key).float() for part in (want, got, start))
        off = (x - y).abs().nan_to_num()
        if key == "weights" and a.dtype != FP32:
            assert (off > 0).float().mean() < 0.005 and (off <= x.abs() * torch.finfo(a.dtype).eps).all()
        else:
            assert (off <= 24 * 2**-24 * (x.abs() + (x - z).abs() + 1e-2).nan_to_num()).all()
    assert same(want, got)


# What is written, and what is not


@pytest.mark.parametrize("name", SPECS)
def test_padding_and_what_lies_between_weights_stay(kernels, name, device):
    """NaN in the padding of every buffer: nothing of it arrives, and it stays bit for bit."""
    p = Problem(dtype=SPECS[name][0], spec=SPECS[name][1], device=device)
    before = p.state()
    p.set_grad(1)
    p.step(kernels, 1)
    between = torch.ones(p.area.numel(), dtype=torch.bool)
    for w in p.weights:
        assert w.isfinite().all() and not torch.equal(w, torch.zeros_like(w))
        offset = (w.data_ptr() - p.area.data_ptr()) // w.element_size()
        between[offset : offset + w.numel()] = False
    assert (p.area[between.to(device)] == 7).all()
    for key in ("m", "v", "master"):
        if key in before:
            after = p.state()[key]
            assert torch.equal(bits(after[p.padding]), bits(before[key][p.padding])), key
            moved = bits(after[~p.padding]) != bits(before[key][~p.padding])
            assert moved.float().mean() > (0.9 if key != "v" or not p.spec.quantized else 0.5), key
    for key in ("m_scale", "v_scale"):
        if key in before:
            kept = before[key].isnan()
            assert p.state()[key][kept].isnan().all() and (p.state()[key][~kept] > 0).all()
    # and numbers that are larger than any other: no block takes its scale from them
    q = Problem(dtype=p.dtype, spec=p.spec, device=device)
    for x in (q.grad, q.m, q.v):
        x[q.padding] = 126 if x.dtype == torch.uint8 else 1e18
    q.set_grad(1)
    q.step(kernels, 1)
    for x, y in zip((p.area, p.m_scale, p.v_scale), (q.area, q.m_scale, q.v_scale), strict=True):
        assert x is None or torch.equal(bits(x), bits(y))
    assert all(torch.equal(bits(x[~p.padding]), bits(y[~p.padding])) for x, y in ((p.m, q.m), (p.v, q.v)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter works on padding's infinities
@pytest.mark.parametrize("name", SPECS)
def test_an_overflow_leaves_everything(kernels, name, device):
    p = train(kernels, name, steps=2, device=device)
    before = p.state()
    p.set_grad(3)
    p.grad[::5] = float("inf")
    for found in (1.0, float("nan"), -1.0):
        p.step(kernels, 3, found_inf=torch.tensor([found], device=device))
        assert same(p.state(), before), found
    p.set_grad(3)
    q = train(kernels, name, steps=3, device=device)
    p.step(kernels, 3, found_inf=torch.zeros(1, device=device))
    assert same(p.state(), q.state())


def test_scale_multiplies_the_gradient(kernels, device):
    a, b = Problem(device=device), Problem(device=device)
    a.set_grad(1)
    b.set_grad(1)
    factor = torch.tensor([0.37], device=device)
    b.grad *= factor
    a.step(kernels, 1, scale=factor)
    b.step(kernels, 1)
    assert same(a.state(), b.state())


@pytest.mark.parametrize("name", SPECS)
def test_buckets_of_tiles_give_the_bits_of_one_launch(kernels, name, device):
    """A bucket may begin and end within a segment: random bits and blocks know their place."""
    a, b = (Problem(dtype=SPECS[name][0], spec=SPECS[name][1], device=device) for _ in range(2))
    cuts = [0, 2, 3, 6, len(a.table)]
    for step in (1, 2):
        a.set_grad(step)
        b.set_grad(step)
        a.step(kernels, step)
        for part in itertools.pairwise(cuts):
            b.step(kernels, step, part=part)
    assert same(a.state(), b.state())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gap", [0, 1, 8])
def test_alignment_costs_nothing_but_time(kernels, dtype, gap, device):
    """Segments of whole rows of 1032, at multiples of 16 bytes and not: each has the bits that it has alone."""
    sizes = (1032, 2064)
    p = Problem(sizes, dtype, AdamWSpec(rounding="stochastic"), device=device, gap=gap)
    assert p.table.aligned == (p.area.data_ptr() % 16 == 0 and gap * p.area.element_size() % 16 == 0)
    alone = [w.clone() for w in p.weights]
    p.set_grad(1)
    p.step(kernels, 1)
    for i, weight in enumerate(alone):
        q = Problem((sizes[i],), dtype, p.spec, device=device, index=2**32 - 1500 + sum(sizes[:i]))
        q.weights[0].copy_(weight)
        q.grad.copy_(p.grad[p.table.first_tile[i] * TILE :][: q.grad.numel()])
        q.step(kernels, 1)
        assert torch.equal(q.weights[0], p.weights[i])


@pytest.mark.parametrize("name", SPECS)
def test_two_runs_and_any_number_of_threads_are_bit_equal(kernels, name, device):
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(train(kernels, name, steps=2, device=device).state())
    finally:
        torch.set_num_threads(before)
    assert all(same(runs[0], other) for other in runs[1:])


def test_nothing_to_do(kernels, device):
    """No segment, and segments without elements."""
    for sizes in ((), (0, 0), (0, 5, 0)):
        weights = [torch.ones(n, device=device) for n in sizes]
        table = TileTable.build([(w, 0) for w in weights])
        n = len(table) * TILE
        flat = [torch.ones(n, device=device if sizes else "cpu") for _ in range(3)]
        kernels.adamw(table, flat[0], None, flat[1], flat[2], None, None, FP32, AdamWSpec(), Update(lr=0.1))
        assert n == (TILE if 5 in sizes else 0) and all((w != 1).all() for w in weights)


# Random bits


def test_random_bits_are_what_they_were():
    """A change of the hash would change what a seed means."""
    index = torch.tensor([0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345])
    assert {name: random_bits(7, 3, index, name).tolist() for name in STREAMS} == GOLDEN
    assert contract.keys(2**40 + 1, 2**33) != contract.keys(1, 0)


GOLDEN = {
    "m": [2199243020, 68922033, 738895230, 450387984, 587134548, 3003385427, 1709440649],
    "v": [101847885, 141837682, 2862213883, 2986481678, 1569310016, 1867733372, 904544380],
    "weight": [1507631485, 899476695, 2569717888, 2156130211, 158461130, 1188516529, 626737941],
}


@triton.jit
def _bits_kernel(OUT, first, key, stream, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    hashed = adamw_triton._hash(first.to(tl.int64) + at, key)
    tl.store(OUT + at, adamw_triton._bits(hashed, stream).to(tl.int64), mask=at < n)


@pytest.mark.parametrize("first", [0, 5, 2**31 - 3, 2**32 - 500, 2**32, 3 * 2**32 - 1, 2**45 + 77])
def test_random_bits_are_the_same_in_every_backend(first, device):
    n = 1000
    for seed, step in ((0, 0), (1, 2), (2**63 - 1, 2**31), (123456789, 2**33 + 5)):
        key = contract.keys(seed, step)
        for stream in STREAMS:
            want = random_bits(seed, step, first + torch.arange(n), stream)
            assert want.min() >= 0 and want.max() < 2**32
            got = torch.zeros(n, dtype=torch.int32)
            host_build.library().burnish_random_bits(first, n, key["index"], key[stream], got.data_ptr())
            assert torch.equal(got.long() & 0xFFFFFFFF, want)
            out = torch.zeros(n, dtype=torch.int64, device=device)
            words = (adamw_triton._signed(key["index"]), adamw_triton._signed(key[stream]))
            _bits_kernel[(1,)](out, first, *words, n, BLOCK=1024)
            assert torch.equal(out.cpu() & 0xFFFFFFFF, want)


def test_random_bits_are_uniform_and_independent():
    """Every bit; and between indices, seeds, steps and streams: all within 5 sigma."""
    n = 200_000
    index = torch.arange(n)
    base = random_bits(1, 1, index, "v")
    others = {
        "next index": random_bits(1, 1, index + 1, "v"), "seed": random_bits(2, 1, index, "v"),
        "step": random_bits(1, 2, index, "v"), "m": random_bits(1, 1, index, "m"),
        "weight": random_bits(1, 1, index, "weight"), "high word": random_bits(1, 1, index + 2**32, "v"),
        "far": random_bits(1, 1, index + 4096, "v"),
    }  # fmt: skip
    for bit in range(32):
        ones = (base >> bit & 1).double()
        assert abs(ones.mean() - 0.5) <= 5 * 0.5 / n**0.5, bit
        for name, other in others.items():
            both = (ones - 0.5) * ((other >> bit & 1).double() - 0.5)
            assert abs(both.mean()) <= 5 * 0.25 / n**0.5, (name, bit)
    unit = base.double() / 2**32
    for name, other in others.items():
        product = (unit - 0.5) * (other.double() / 2**32 - 0.5)
        assert abs(product.mean()) <= 5 / 12 / n**0.5, name
    counts = torch.bincount(base >> 24, minlength=256).double()
    assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5


# Stochastic rounding


def test_stochastic_rounding_keeps_what_is_representable():
    every = torch.arange(1 << 16).to(torch.int32)
    for dtype in (BF16, FP16):
        x = every.to(torch.int16).view(dtype)
        for random in (0, 0xFFFFFFFF, 0x12345678):
            got = contract.round_stochastic(x.float(), dtype, torch.full((1 << 16,), random))
            assert torch.equal(got.nan_to_num(nan=7.0, posinf=1e30, neginf=-1e30).view(torch.int16),
                               x.nan_to_num(nan=7.0, posinf=1e30, neginf=-1e30).view(torch.int16)), dtype  # fmt: skip


VALUES = {
    BF16: [1 + 2**-10, -1 - 2**-9, 3.14159, 1e-30, -2e-39, 1e38, 2.0**-133 * 1.3],
    FP16: [1 + 2**-12, -1 - 2**-13, 3.14159, 6.1e-5, -3.3e-6, 2.0**-24 * 0.3, 65000.7, -1e-9],
}


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_stochastic_rounding_has_the_right_mean_and_only_neighbours(dtype):
    n = 100_000
    random = random_bits(3, 4, torch.arange(n), "weight")
    for value in VALUES[dtype]:
        x = torch.full((n,), value)
        got = contract.round_stochastic(x, dtype, random).double()
        low, high = got.min(), got.max()
        assert set(got.tolist()) == {float(low), float(high)} and low < x[0] < high
        spacing = float(high - low)
        assert spacing == _spacing(float(x[0]), dtype), value
        share = (float(x[0]) - float(low)) / spacing
        sigma = spacing * (share * (1 - share)) ** 0.5
        assert abs(float(got.mean()) - float(x[0])) <= 5 * sigma / n**0.5, value
        assert torch.equal(got, contract.round_stochastic(x, dtype, random).double())


def _spacing(x, dtype):
    """Between the neighbours of x in dtype."""
    exponent = np.floor(np.log2(abs(x)))
    return 2.0 ** max(exponent - {BF16: 7, FP16: 10}[dtype], {BF16: -133, FP16: -24}[dtype])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_weights_move_in_the_mean_by_less_than_their_spacing(kernels, dtype, device):
    """lr 1e-4 on a weight of 1: rounded to nearest it would never move."""
    n, lr = 8 * TILE - 3, 1e-4
    results = {}
    for rounding in ("stochastic", "nearest"):
        p = Problem((n,), dtype, AdamWSpec(rounding=rounding), device=device)
        p.weights[0].fill_(1.0)
        p.grad.fill_(1.0)
        p.step(kernels, 1, lr=lr, weight_decay=0.0)
        results[rounding] = p.weights[0].double()
    assert (results["nearest"] == 1).all()
    spacing = {BF16: 2.0**-8, FP16: 2.0**-11}[dtype]  # below 1
    share = lr / spacing
    assert set(results["stochastic"].tolist()) == {1.0, 1.0 - spacing}
    sigma = spacing * (share * (1 - share)) ** 0.5
    assert abs(float(results["stochastic"].mean()) - (1 - lr)) <= 5 * sigma / n**0.5


def test_seed_step_and_place_change_the_roundings(kernels, device):
    def run(**options):
        p = Problem((4 * TILE,), BF16, AdamWSpec(rounding="stochastic"), device=device, index=options.pop("index", 0))
        p.set_grad(1)
        step = options.pop("step", 1)
        p.step(kernels, step, **{"step_m": 1, "step_v": 1, "seed": 1, **options})
        return p.weights[0].clone()

    assert torch.equal(run(), run())
    for options in ({"seed": 2}, {"step": 2}, {"index": 1 << 33}):
        assert not torch.equal(run(), run(**options)), options


# Moments of 8 bits


@pytest.mark.parametrize("moment", ["m", "v"])
def test_a_code_means_one_number_and_its_number_that_code(moment):
    n, value = contract.LEVELS[moment], contract.code_table(moment)
    assert value[0] == 0 and value[n] == 1 and (value[1 : n + 1] > value[:n]).all() and len(value) == 256
    codes = torch.arange(256, dtype=torch.uint8)
    for scale in (1.0, 3.7e-12, 1.3e20):
        x = contract.dequantize(codes[None], torch.tensor([scale]), moment)
        for random in (torch.zeros(1, 256).long(), torch.full((1, 256), 0xFFFFFFFF), None):
            again, top = quantize(x, moment, random)
            assert top == torch.tensor(scale)
            # a product with the scale is rounded: x / scale may lie a rounding off its code
            assert ((again.int() - codes.int()).abs() <= (0 if scale == 1.0 else 1))[0, codes != 128].all()
    assert contract.code_table("m")[128] == 0  # -0, which is never made


@pytest.mark.parametrize("moment", ["m", "v"])
def test_quantisation_takes_a_neighbour_by_chance(moment):
    """Against a search in fp64: below or above, never further, above as often as it should be."""
    x = gradients(10 * QUANT_BLOCK, 5).view(-1, QUANT_BLOCK)
    x = x if moment == "m" else x.square()
    n, table = contract.LEVELS[moment], contract.code_table(moment).double()
    a = x.abs().double() / x.abs().amax(1, keepdim=True).double()
    low = torch.searchsorted(table[: n + 1], a.float().double(), right=True) - 1
    high = (low + 1).clamp(max=n)
    share = ((a - table[low]) / (table[high] - table[low])).nan_to_num(posinf=0.0).clamp(0, 1)
    if moment == "v":  # which never becomes 0
        share[low == 0] = 1.0
    index, ups, repeats = torch.arange(x.numel()).view(x.shape), torch.zeros(x.shape), 200
    for step in range(repeats):
        codes, scale = quantize(x, moment, random_bits(0, step, index, moment))
        code = codes.long() % 128 if moment == "m" else codes.long()
        assert ((code == low) | (code == high)).all() and torch.equal(scale, x.abs().amax(1))
        if moment == "m":
            assert torch.equal(codes >= 128, (x < 0) & (code > 0))
        ups += code > low
    sigma = (share * (1 - share) / repeats).sqrt()
    off = (ups / repeats - share).abs()
    assert (off <= 6 * sigma + 2.5 / repeats).all()  # and a chance or two of one in 10^5
    assert abs((ups / repeats - share).mean()) <= 5 * sigma.mean() / x.numel() ** 0.5
    nearest = quantize(x, moment, None)[0].long() % (128 if moment == "m" else 256)
    assert ((table[nearest] - a).abs() <= (table[high] - table[low]) / 2 + 1e-6).all()


def test_a_block_of_zeros_has_scale_and_codes_of_zero(kernels, device):
    p = Problem((2 * TILE,), FP32, AdamWSpec("8bit"), device=device)
    p.grad.zero_()
    p.grad[:QUANT_BLOCK] = 1.0  # its neighbours stay 0
    for step in (1, 2):
        p.step(kernels, step)
    for codes, scale in ((p.m, p.m_scale), (p.v, p.v_scale)):
        assert not codes[QUANT_BLOCK:].any() and not scale[1:].any() and scale[0] > 0 and codes[:QUANT_BLOCK].all()
    assert p.weights[0].isfinite().all()


def test_v_decays_in_the_mean_and_to_nearest_it_stagnates():
    """5000 steps of zero gradient, but for one element a block that keeps the block's scale where it is."""
    blocks, steps, beta2 = 64, 5000, 0.999
    n = blocks * QUANT_BLOCK
    start = torch.rand(n, generator=torch.Generator().manual_seed(0)).view(blocks, QUANT_BLOCK) * 0.9 + 0.05
    start[:, 0] = 1.0
    p = Problem((n,), FP32, AdamWSpec("8bit"))
    codes, scale = quantize(start, "v", None)
    p.v.copy_(codes.view(-1))
    p.v_scale.copy_(scale)
    p.grad.zero_()
    p.grad[::QUANT_BLOCK] = 1.0
    begin = contract.dequantize(codes, scale, "v")[:, 1:].double()
    for step in range(1, steps + 1):
        p.step(adamw_host, step, beta2=beta2, lr=0.0)
    end = contract.dequantize(p.v.view(blocks, -1), p.v_scale, "v")[:, 1:].double()
    want = beta2**steps
    share = end.sum() / begin.sum()
    error = end.std() / end.numel() ** 0.5 / begin.mean()  # of a mean of independent elements
    print(f"v keeps {share:.5f} of itself, beta2^5000 = {want:.5f}, standard error {error:.5f}")
    assert abs(share - want) <= 5 * error and error < want / 20
    v = contract.dequantize(codes, scale, "v")
    for _ in range(steps // 10):
        v = v * beta2
        v[:, 0] = 1.0
        v = contract.dequantize(*quantize(v, "v", None), "v")
    assert torch.equal(v[:, 1:].double(), begin)  # not one step of the code in 500


def test_training_with_8_bits_follows_fp32():
    """Least squares from noisy gradients: the loss ends where fp32's does."""
    n, ends = 4 * TILE, {}
    goal = torch.randn(n, generator=torch.Generator().manual_seed(3))
    curvature = torch.logspace(-2, 2, n)[torch.randperm(n, generator=torch.Generator().manual_seed(4))]
    for name in ("fp32", "fp32, 8bit"):
        p = Problem((n,), *SPECS[name])
        p.weights[0].zero_()
        g = torch.Generator().manual_seed(5)
        for step in range(1, 401):
            p.grad.copy_(curvature * (p.weights[0] - goal + 0.1 * torch.randn(n, generator=g)))
            p.step(adamw_host, step, lr=0.02, weight_decay=0.0)
        ends[name] = float((p.weights[0] - goal).square().mean())
    print(f"mean squared distance {ends}, at the start {float(goal.square().mean()):.3f}")
    assert ends["fp32, 8bit"] <= 1.5 * ends["fp32"] and ends["fp32"] < 0.01 * float(goal.square().mean())


# Memory, operands


GUARD = """
import ctypes, mmap, sys, torch
sys.path.insert(0, {folder!r})
from test_adamw import SPECS, Problem, same
from burnish.kernels import adamw_host
from burnish.kernels.adamw import TileTable
libc, PAGE, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
def fenced(x):
    "x at the very end of readable memory, and a page that may not be touched after it"
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, PAGE * (pages + 1))
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(base + PAGE * pages), PAGE, 0) == 0
    kept.append(area)
    return torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=PAGE * pages - size).copy_(x)
for dtype, spec in SPECS.values():
    for n in (1, 7, 37, 64, 1023, 1025):
        p, q = Problem((n,), dtype, spec, gap=0), Problem((n,), dtype, spec, gap=0)
        p.weights = [fenced(p.weights[0])]
        p.area, p.table = p.weights[0], TileTable.build([(p.weights[0], 2**32 - 1500)])
        for name in ("m", "v", "master", "m_scale", "v_scale", "grad"):
            if getattr(p, name) is not None:
                setattr(p, name, fenced(getattr(p, name)))
        for x in (p, q):
            x.set_grad(1)
            x.step(adamw_host, 1, scale=torch.ones(1))
        assert same(p.state(), q.state()), (dtype, spec, n)
print("done")
if {broken}:
    x = fenced(torch.zeros(8))
    adamw_host.library().burnish_random_bits(0, 9, 1, 2, x.data_ptr())  # one word too many
    print("not caught")
"""


@pytest.mark.parametrize("broken", [False, True])
def test_host_stays_within_the_operands(broken):
    """Weights and buffers that end where memory ends; and the fence at work."""
    if sys.platform != "linux":
        pytest.skip("needs mprotect")
    code = GUARD.format(folder=str(Path(__file__).parent), broken=broken)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "done" in done.stdout, done.stderr[-2000:]
    assert (done.returncode == 0) != broken and "not caught" not in done.stdout


def test_a_library_that_computes_wrongly_is_refused(monkeypatch):
    adamw_host.check_against_twin()
    monkeypatch.setattr(adamw_torch, "random_bits", lambda *a: random_bits(*a) ^ 0xFFFFFFFF)
    with pytest.raises(RuntimeError, match="adamw as this compiler built it disagrees"):
        adamw_host.check_against_twin()


def test_wrong_operands_are_refused(kernels, device):
    p = Problem((5, 1025), device=device)
    q = Problem((5, 1025), BF16, AdamWSpec("8bit", "stochastic"), device=device)

    def call(x, **wrong):
        named = {"table": x.table, "grad": x.grad, "master": x.master, "m": x.m, "v": x.v, "m_scale": x.m_scale,
                 "v_scale": x.v_scale, "weights_dtype": x.dtype, "spec": x.spec, "update": Update(lr=0.1)}  # fmt: skip
        kernels.adamw(**{**named, **wrong})

    for error, match, x, wrong in (
        (ValueError, r"grad must be contiguous \(3072,\)", p, {"grad": p.grad[:-1]}),
        (ValueError, "m must be contiguous", p, {"m": p.m.repeat(2)[::2]}),
        (TypeError, "v must be torch.float32", p, {"v": p.v.double()}),
        (TypeError, "m must be torch.uint8", q, {"m": p.m}),
        (ValueError, "m_scale must be given", q, {"m_scale": None}),
        (ValueError, "v_scale must be contiguous", q, {"v_scale": q.v_scale[:3]}),
        (ValueError, "v_scale must be None", p, {"v_scale": q.v_scale}),
        (ValueError, "master must be None", p, {"master": p.m}),
        (ValueError, "have no master", p, {"master": p.m, "spec": AdamWSpec(master=True)}),
        (ValueError, "master must be given", q, {"spec": AdamWSpec("8bit", master=True)}),
        (TypeError, "not that of the table", p, {"weights_dtype": BF16}),
        (ValueError, r"scale must be contiguous \(1,\)", p, {"scale": p.grad[:2]}),
        (TypeError, "found_inf must be torch.float32", p, {"found_inf": torch.zeros(1, dtype=torch.bool)}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call(x, **wrong)


def test_wrong_segments_and_specs_are_refused():
    with pytest.raises(ValueError, match="must be contiguous"):
        TileTable.build([(torch.zeros(4, 6)[:, :3], 0)])
    with pytest.raises(TypeError, match="must be fp32, bf16 or fp16"):
        TileTable.build([(torch.zeros(4, dtype=torch.float64), 0)])
    with pytest.raises(TypeError, match="segments must agree"):
        TileTable.build([(torch.zeros(4), 0), (torch.zeros(4, dtype=BF16), 4)])
    for wrong in ({"moments": "bf16"}, {"rounding": "up"}, {"master": True, "rounding": "stochastic"}):
        with pytest.raises(ValueError, match="must be"):
            AdamWSpec(**wrong)


def test_the_table_says_where_tiles_lie():
    a, b = torch.zeros(3, 700), torch.zeros(5)
    table = TileTable.build([(a[1:], 900), (a[:0], 1), (b, 2**40)])
    rows = table.table.tolist()
    assert rows == [[a[1:].data_ptr(), 1024, 900], [a[1:].data_ptr() + 4096, 376, 1924], [b.data_ptr(), 5, 2**40]]
    assert table.first_tile == [0, 2, 2] and [w.numel() for w in table.weights] == [1400, 0, 5]
    part = table.slice(1, 3)
    assert part.table.tolist() == rows[1:] and part.first_tile == [0, 1]
    assert [w.data_ptr() for w in part.weights] == [rows[1][0], rows[2][0]] and len(part) == 2


def test_backends_have_one_signature():
    for other in (adamw_triton, adamw_host):
        assert inspect.signature(adamw_torch.adamw) == inspect.signature(other.adamw)
    assert dispatch.module("adamw", "host") is dispatch.adamw("host") is adamw_host
