r"""The contract of AdamW over tiles of a flat space, and the arithmetic that all its backends share.

A *segment* is an active slice of a weight: a contiguous range of its rows, anywhere in memory.  The gradients, master
copies and moments of all segments lie in flat buffers, each segment padded to whole tiles of TILE elements, so that a
tile belongs to one segment and one launch serves many.  For T tiles:

    table             (T, 3)       int64: address of the tile's first weight element, number of valid elements
                                   (1..TILE), index of the first among all elements of the model
    grad              (T TILE,)    fp32
    master            (T TILE,)    fp32, of bf16 and fp16 weights only; or None
    m, v              (T TILE,)    fp32, or uint8 codes with m_scale, v_scale (T TILE / QUANT_BLOCK,) fp32
    scale             (1,)         fp32 factor of the gradient: clip coefficient over loss scale; or None
    found_inf         (1,)         fp32: unless 0, everything stays as it is, bit for bit; or None

With s and t the steps that m and v have seen, this one included, and p the weight in fp32, or its master:

    p <- p (1 - lr wd)
    m <- m + (1 - beta1) (g - m)                  (AdamW as torch.optim has it, decay before the step)
    v <- beta2 v + (1 - beta2) g g
    p <- p - lr / (1 - beta1^s) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

in fp32 and in torch's order and roundings: the lerp and the addcmul are fused multiply-adds of g - m and of
((1 - beta2) g) g, nothing else is.  The weight is the master rounded to nearest; without a master p rounded to
nearest, or stochastically: up or down to a neighbour with probabilities that keep the expectation.

Padding may hold anything and stays as it is.  What a gradient that is not finite leaves in the state is not defined.

Moments of 8 bits.  A block of QUANT_BLOCK elements keeps its largest magnitude, its scale, in fp32, and for an element

    x = scale * sign * (c / n)^4,      v: c of 8 bits, n = 255;  m: a sign and c of 7 bits, n = 127

The steps of a fourth power grow with the value, as those of a code with an exponent do: 1.6% of v at the scale, 5% at
1/100 of it, and 2e-10 of the scale is the smallest v that is not 0 (3% and 10%, 4e-9 for m).  A new value is rounded
to one of its two neighbours by chance: v shrinks by beta2 a step, less than half of any step of the code, and to
nearest it would never move.  A block of zeros has scale 0 and codes 0.

Random bits are a hash of (seed, step, index of the element, stream), the same in all backends: no state is kept, and
no result depends on the cut into tiles, buckets or launches.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

TILE = 1024
QUANT_BLOCK = 256
#: Streams of random bits.
STREAMS = {"m": 1, "v": 2, "weight": 3}
#: Magnitudes of a code above 0: a signed code spends one of its bits on the sign.
LEVELS = {"m": 127, "v": 255}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: far from 0 in every bit
# shifts and factors of a finaliser with little bias, found by search (C. Wellons, hash-prospector, public domain)
MIX = (16, 0x7FEB352D, 15, 0x846CA68B, 16)


@dataclass(frozen=True)
class AdamWSpec:
    """What is compiled into a launch.

    moments: "fp32" or "8bit".  master: p is kept in fp32 beside a bf16 or fp16 weight.  rounding: how such a weight
    without a master is rounded, "nearest" or "stochastic"; of no meaning for fp32 weights.  exact: on the CPU, torch's
    own square root, MKL's, which is up to 1 ulp off and takes half of the time; else, and on a GPU, the rounded one.
    """

    moments: str = "fp32"
    rounding: str = "nearest"
    master: bool = False
    exact: bool = True

    def __post_init__(self):
        if self.moments not in ("fp32", "8bit"):
            raise ValueError(f"moments must be 'fp32' or '8bit'; got {self.moments!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic'; got {self.rounding!r}")
        if self.master and self.rounding == "stochastic":
            raise ValueError("a weight with a master is the master rounded to nearest: rounding must be 'nearest'")

    @property
    def quantized(self) -> bool:
        return self.moments == "8bit"

    def stochastic(self, dtype: torch.dtype) -> bool:
        return self.rounding == "stochastic" and dtype != torch.float32


class Scalars(NamedTuple):
    """Factors of the formula, rounded to fp32 as torch rounds a Python number.

    ``small``: the lerp is m + weight (g - m); else, as in torch, g + weight (g - m) with weight - 1 for weight.
    """

    decay: float
    small: bool
    weight: float
    beta2: float
    rest: float
    root: float
    eps: float
    step: float


@dataclass(frozen=True)
class Update:
    """Numbers of one step.  ``step_m`` and ``step_v`` count from 1; ``seed`` and ``step`` choose the random bits."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step_m: int = 1
    step_v: int = 1
    seed: int = 0
    step: int = 0

    @property
    def root(self) -> float:
        return (1 - self.beta2**self.step_v) ** 0.5

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step_m)

    def scalars(self) -> Scalars:
        weight = _fp32(1 - self.beta1)
        small = weight < 0.5
        return Scalars(
            decay=_fp32(1 - self.lr * self.weight_decay), small=small, weight=weight if small else _fp32(weight - 1),
            beta2=_fp32(self.beta2), rest=_fp32(1 - self.beta2), root=_fp32(self.root), eps=_fp32(self.eps),
            step=_fp32(-self.step_size),
        )  # fmt: skip


def _fp32(x: float) -> float:
    return ctypes.c_float(x).value


@dataclass(frozen=True)
class TileTable:
    """Where the tiles of a launch lie: the table, and for each segment a flat view of its weight and its first tile.

    The views keep the weights alive; a weight that moves to other memory needs a new table.
    """

    table: torch.Tensor
    weights: list[torch.Tensor]
    first_tile: list[int]

    @classmethod
    def build(cls, segments: list[tuple[torch.Tensor, int]]) -> TileTable:
        """From (contiguous view of a weight's rows, index of its first element) a segment; one dtype, one device."""
        weights: list[torch.Tensor] = []
        first_tile, rows, tiles = [], [torch.empty(0, 3, dtype=torch.int64)], 0
        for weight, index in segments:
            if not weight.is_contiguous():
                raise ValueError(f"a segment must be contiguous; got {tuple(weight.shape)} with {weight.stride()}")
            flat = weight.detach().view(-1)
            if flat.dtype not in WEIGHT_DTYPES:
                raise TypeError(f"weights must be fp32, bf16 or fp16; got {flat.dtype}")
            if weights and (flat.dtype, flat.device) != (weights[0].dtype, weights[0].device):
                raise TypeError(f"segments must agree: {weights[0].dtype} on {weights[0].device} and {flat.dtype} on "
                                f"{flat.device}")  # fmt: skip
            start = torch.arange(0, flat.numel(), TILE)
            address, count = flat.data_ptr() + start * flat.element_size(), (flat.numel() - start).clamp(max=TILE)
            rows.append(torch.stack([address, count, index + start], 1))
            weights.append(flat)
            first_tile.append(tiles)
            tiles += len(start)
        return cls(torch.cat(rows).to(weights[0].device if weights else "cpu"), weights, first_tile)

    def slice(self, first_tile: int, last_tile: int) -> TileTable:
        """The table of a bucket, tiles [first_tile, last_tile)."""
        weights, starts = [], []
        for weight, begin in zip(self.weights, self.first_tile, strict=True):
            low, high = max(first_tile, begin), min(last_tile, begin + -(-weight.numel() // TILE))
            if low < high:
                weights.append(weight[(low - begin) * TILE : (high - begin) * TILE])
                starts.append(low - first_tile)
        return TileTable(self.table[first_tile:last_tile], weights, starts)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def aligned(self) -> bool:
        """Whether every tile of the weights starts at a multiple of 16 bytes."""
        return all(w.data_ptr() % 16 == 0 for w in self.weights)


def check(
    table: TileTable, grad, master, m, v, m_scale, v_scale, weights_dtype, spec: AdamWSpec, scale, found_inf
) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if weights_dtype not in WEIGHT_DTYPES or any(w.dtype != weights_dtype for w in table.weights):
        raise TypeError(f"weights_dtype {weights_dtype} is not that of the table: {[w.dtype for w in table.weights]}")
    if spec.master and weights_dtype == torch.float32:
        raise ValueError("fp32 weights have no master")
    flat, blocks = len(table) * TILE, len(table) * (TILE // QUANT_BLOCK)
    moment = torch.uint8 if spec.quantized else torch.float32
    for name, x, size, dtype, used in (
        ("grad", grad, flat, torch.float32, True), ("master", master, flat, torch.float32, spec.master),
        ("m", m, flat, moment, True), ("v", v, flat, moment, True),
        ("m_scale", m_scale, blocks, torch.float32, spec.quantized),
        ("v_scale", v_scale, blocks, torch.float32, spec.quantized),
        ("scale", scale, 1, torch.float32, scale is not None),
        ("found_inf", found_inf, 1, torch.float32, found_inf is not None),
    ):  # fmt: skip
        if (x is not None) != used:
            raise ValueError(f"{name} must be {'given' if used else 'None'} for {spec}")
        if x is None:
            continue
        if tuple(x.shape) != (size,) or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous ({size},); got {tuple(x.shape)} with strides {x.stride()}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {x.dtype}")
        if x.device != table.table.device:
            raise ValueError(f"{name} must be on {table.table.device}; got {x.device}")


# Random bits


def mix(x):
    """A bijection of 32-bit words, Python ints or int64 tensors: each bit of x moves each bit of the result."""
    a, first, b, second, c = MIX
    x = ((x ^ (x >> a)) * first) & _WORD
    x = ((x ^ (x >> b)) * second) & _WORD
    return x ^ (x >> c)


def keys(seed: int, step: int) -> dict[str, int]:
    """32-bit words that stand for (seed, step), as "index", and for (seed, step, stream) by the stream's name."""
    key = 0
    for word in (seed & _WORD, seed >> 32 & _WORD, step & _WORD, step >> 32 & _WORD):
        key = mix((key ^ word) + _GOLDEN & _WORD)
    return {"index": key} | {name: mix((key ^ stream) + _GOLDEN & _WORD) for name, stream in STREAMS.items()}


def random_bits(seed: int, step: int, index: torch.Tensor, stream: str) -> torch.Tensor:
    """32 random bits for each element ``index`` (int64), as int64 in [0, 2^32).

    mix(mix(low ^ key) ^ (high golden) ^ stream's key), with low and high the words of the index.
    """
    key = keys(seed, step)
    high = (index >> 32 & _WORD) * _GOLDEN & _WORD
    return mix(mix(index & _WORD ^ key["index"]) ^ high ^ key[stream])


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """fp32 in [0, 1) of 24 bits, exact."""
    return (bits >> 8).float() * 2.0**-24


# Stochastic rounding of weights


def round_stochastic(x: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """x (fp32) rounded by ``bits`` to one of its two neighbours in bf16 or fp16; infinities and NaN stay."""
    pattern = x.view(torch.int32)
    if dtype == torch.bfloat16:  # random bits below the last one that is kept carry into it
        rounded = ((pattern + (bits & 0xFFFF).to(torch.int32)) & -0x10000).view(torch.float32)
    else:  # in units of the spacing at |x|: 2^-10 of its power of two, and 2^-24 below 2^-14
        unit = torch.clamp((pattern & 0x7F800000).view(torch.float32) * 2.0**-10, min=2.0**-24)
        size = x.abs() / unit  # a power of two: exact
        low = size.floor()
        rounded = torch.copysign((low + (_uniform(bits) < size - low)) * unit, x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


# Moments of 8 bits


@lru_cache
def code_table(moment: str) -> torch.Tensor:
    """Values of the 256 codes of "m" or "v" as fractions of the scale; the highest bit of a code of m is its sign."""
    n = LEVELS[moment]
    root = torch.arange(n + 1, dtype=torch.float32) * (torch.ones(1) / n)
    value = (root * root) * (root * root)
    return torch.cat([value, -value]) if moment == "m" else value


def quantize(x: torch.Tensor, moment: str, bits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks x (B, QUANT_BLOCK) fp32 -> codes (B, QUANT_BLOCK) uint8 and scales (B,).

    Rounded to one of the two neighbours by random ``bits``; without them to the nearer.  A v above 0 stays above 0.
    """
    n, scale = LEVELS[moment], x.abs().amax(1)
    value = code_table(moment)[: n + 1].to(x.device)
    a = torch.where(scale[:, None] > 0, x.abs() / scale[:, None], 0.0)
    # a rounded root may give a code one off where a neighbour is all but certain: chance then takes that one
    code = (a.sqrt().sqrt() * n).nan_to_num().long().clamp(0, n)
    low, high = value[code], value[(code + 1).clamp(max=n)]
    u = 0.5 if bits is None else _uniform(bits)
    code = code + (u * (high - low) < a - low).long()
    if moment == "m":
        code = code + 128 * ((x < 0) & (code > 0)).long()
    else:
        code = torch.maximum(code, (x > 0).long())
    return code.to(torch.uint8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, moment: str) -> torch.Tensor:
    """Codes (B, QUANT_BLOCK) and scales (B,) -> fp32."""
    return code_table(moment).to(codes.device)[codes.long()] * scale[:, None]
