r"""Triton AdamW over tiles of a flat space: one program a tile.

The maths, the operands and their layout are those of ``adamw``.  For T tiles of TILE elements:

    TABLE             (T, 3)       int64: address of the first weight element, number of valid elements, its index
    GRAD, MASTER      (T TILE,)    fp32
    M, V              (T TILE,)    fp32, or uint8 codes with M_SCALE, V_SCALE (T TILE / BLOCK,) fp32
    SCALE, FOUND      (1,)         fp32

A tile is seen as [BLOCKS, BLOCK], a row being a quantisation block.  Each element is read and written once, in 16-byte
accesses (8 of codes).  Only the last tile of a segment has fewer than TILE elements: weights are then moved under a
mask that follows the count, element by element.  The flat buffers go on behind it, so their mask is rounded up to
WIDE elements, which keeps accesses whole, and up to WIDE - 1 elements of padding are read and written back as they
were.  Where FOUND is not 0 the count is taken as 0, and nothing but the table is touched.

Roundings are written out, so that a GPU gives the bits of the CPU: launches ask for no contraction, division and
square root are the rounded ones, and the two fused multiply-adds of the contract are ``tl.fma``.  (torch's square root
on the CPU may itself be 1 ulp off, see host/adamw.cpp.)
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adamw import LEVELS, MIX, QUANT_BLOCK, TILE, AdamWSpec, TileTable, Update, check, keys
from .launch import current

THREADS = 128  # 8 elements each: 16 bytes of bf16, twice 16 of fp32
WARPS = THREADS // (64 if torch.version.hip else 32)
FP_FUSION = False  # a product and a sum are two roundings, unless tl.fma

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_A, _FIRST, _B, _SECOND, _C = (tl.constexpr(x) for x in MIX)
_GOLDEN = tl.constexpr(0x9E3779B9)
_WIDE = tl.constexpr(16)


@triton.jit
def _mix(x):
    x = (x ^ (x >> _A)) * _FIRST
    x = (x ^ (x >> _B)) * _SECOND
    return x ^ (x >> _C)


@triton.jit
def _hash(index, key):
    """What the streams of elements ``index`` (int64) share; the bits of one are _mix(_hash ^ its key)."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return _mix(low ^ key.to(tl.uint32, bitcast=True)) ^ (high * _GOLDEN)


@triton.jit
def _bits(hashed, stream):
    return _mix(hashed ^ stream.to(tl.uint32, bitcast=True))


@triton.jit
def _uniform(bits):
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _value(code, LEVELS: tl.constexpr):
    """What a code is worth, as the table of the contract has it."""
    root = code.to(tl.float32) * (1.0 / LEVELS)
    square = root * root
    return square * square


@triton.jit
def _unpack(codes, scale, SIGNED: tl.constexpr, LEVELS: tl.constexpr):
    """codes [BLOCKS, BLOCK] uint8, scale [BLOCKS] -> fp32."""
    code = codes.to(tl.int32)
    value = _value(code & LEVELS, LEVELS)
    if SIGNED:
        value = tl.where(code > LEVELS, -value, value)
    return value * scale[:, None]


@triton.jit
def _pack(x, valid, bits, SIGNED: tl.constexpr, LEVELS: tl.constexpr):
    """x [BLOCKS, BLOCK] -> codes, scale [BLOCKS]; chance takes one of a value's two neighbours."""
    size = tl.where(valid, tl.abs(x), 0.0)
    scale = tl.max(size, 1)
    top = scale[:, None]
    a = tl.div_rn(size, tl.where(top > 0, top, 1.0))
    # a rounded root may give a code one off where a neighbour is all but certain: chance then takes that one
    code = tl.minimum(tl.sqrt(tl.sqrt(a)) * LEVELS, LEVELS * 1.0).to(tl.int32)
    low = _value(code, LEVELS)
    high = _value(tl.minimum(code + 1, LEVELS), LEVELS)
    code = tl.where(_uniform(bits) * (high - low) < a - low, code + 1, code)
    if SIGNED:
        code = tl.where((x < 0) & (code > 0), code + 128, code)
    else:
        code = tl.where(x > 0, tl.maximum(code, 1), code)
    return code.to(tl.uint8), scale


@triton.jit
def _round_stochastic(x, bits, TYPE: tl.constexpr):
    """x rounded by chance to a neighbour in bf16 or fp16, still as fp32; infinities and NaN stay."""
    pattern = x.to(tl.uint32, bitcast=True)
    power = pattern & 0x7F800000
    if TYPE.is_bf16():  # random bits below the last one that is kept carry into it
        rounded = ((pattern + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:  # in units of the spacing at |x|: 2^-10 of its power of two, and 2^-24 below 2^-14
        unit = tl.maximum(power.to(tl.float32, bitcast=True) * 0.0009765625, 5.9604644775390625e-08)
        size = tl.div_rn(tl.abs(x), unit)
        low = tl.floor(size)
        rounded = (low + tl.where(_uniform(bits) < size - low, 1.0, 0.0)) * unit
        rounded = tl.where(x < 0, -rounded, rounded)
    return tl.where(power == 0x7F800000, x, rounded)


@triton.jit(do_not_specialize=["key", "m_key", "v_key", "weight_key"])
def adamw_kernel(
    TABLE, GRAD, MASTER, M, V, M_SCALE, V_SCALE, SCALE, FOUND,
    decay, weight, beta2, rest, root, eps, step, key, m_key, v_key, weight_key,
    TYPE: tl.constexpr, SMALL: tl.constexpr, QUANTIZED: tl.constexpr, HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, M_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr,
):  # fmt: skip
    """One step on one tile."""
    BLOCKS: tl.constexpr = TILE // BLOCK
    tile = tl.program_id(0).to(tl.int64)
    count = tl.load(TABLE + 3 * tile + 1).to(tl.int32)
    if HAS_FOUND:
        count = tl.where(tl.load(FOUND) == 0.0, count, 0)
    W = tl.load(TABLE + 3 * tile).to(tl.pointer_type(TYPE))
    if ALIGNED:
        W = tl.multiple_of(W, 16)
    rows = tl.arange(0, BLOCKS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    valid = at < count
    wide = at < tl.cdiv(count, _WIDE) * _WIDE
    flat = tile * TILE + at
    block = tile * BLOCKS + rows
    in_use = rows * BLOCK < count

    g = tl.load(GRAD + flat, mask=wide, other=0.0)
    if HAS_SCALE:
        g = g * tl.load(SCALE)
    if HAS_MASTER:
        old_p = tl.load(MASTER + flat, mask=wide, other=0.0)
    elif count == TILE:
        old_p = tl.load(W + at).to(tl.float32)
    else:
        old_p = tl.load(W + at, mask=valid, other=0.0).to(tl.float32)
    raw_m = tl.load(M + flat, mask=wide, other=0)
    raw_v = tl.load(V + flat, mask=wide, other=0)
    if QUANTIZED:
        m = _unpack(raw_m, tl.load(M_SCALE + block, mask=in_use, other=0.0), True, M_LEVELS)
        v = _unpack(raw_v, tl.load(V_SCALE + block, mask=in_use, other=0.0), False, V_LEVELS)
    else:
        m = raw_m
        v = raw_v

    p = old_p * decay
    m = tl.fma(g - m, weight, m if SMALL else g)
    v = tl.fma(rest * g, g, v * beta2)
    p = p + tl.div_rn(step * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)

    if STOCHASTIC or QUANTIZED:
        hashed = _hash(tl.load(TABLE + 3 * tile + 2) + at, key)
    if HAS_MASTER:
        tl.store(MASTER + flat, tl.where(valid, p, old_p), mask=wide)
    if STOCHASTIC:
        p = _round_stochastic(p, _bits(hashed, weight_key), TYPE)
    if count == TILE:
        tl.store(W + at, p.to(TYPE))
    else:
        tl.store(W + at, p.to(TYPE), mask=valid)
    if QUANTIZED:
        m, m_scale = _pack(m, valid, _bits(hashed, m_key), True, M_LEVELS)
        v, v_scale = _pack(v, valid, _bits(hashed, v_key), False, V_LEVELS)
        tl.store(M_SCALE + block, m_scale, mask=in_use)
        tl.store(V_SCALE + block, v_scale, mask=in_use)
    tl.store(M + flat, tl.where(valid, m, raw_m), mask=wide)
    tl.store(V + flat, tl.where(valid, v, raw_v), mask=wide)


def flags(spec: AdamWSpec, dtype: torch.dtype, *, small=True, scale=False, found_inf=False, aligned=True) -> dict:
    """Compile-time arguments of ``adamw_kernel``."""
    return {
        "TYPE": _TYPES[dtype], "SMALL": small, "QUANTIZED": spec.quantized, "HAS_MASTER": spec.master,
        "STOCHASTIC": spec.stochastic(dtype), "HAS_SCALE": scale, "HAS_FOUND": found_inf, "ALIGNED": aligned,
        "TILE": TILE, "BLOCK": QUANT_BLOCK, "M_LEVELS": LEVELS["m"], "V_LEVELS": LEVELS["v"],
    }  # fmt: skip


def _signed(word: int) -> int:
    """A 32-bit word as an int32: the type of an argument follows its value, and this one is always the same."""
    return word - (1 << 32) if word >> 31 else word


def adamw(
    table: TileTable, grad, master, m, v, m_scale, v_scale, weights_dtype, spec: AdamWSpec, update: Update,
    scale=None, found_inf=None,
):  # fmt: skip
    """One step of AdamW on the table's tiles: weights, master, moments and their scales are written in place."""
    check(table, grad, master, m, v, m_scale, v_scale, weights_dtype, spec, scale, found_inf)
    if len(table) == 0:
        return
    key, scalars = keys(update.seed, update.step), update.scalars()._asdict()
    small = scalars.pop("small")
    with current(table.table.device):
        adamw_kernel[(len(table),)](
            table.table.contiguous(), grad, *(grad if x is None else x for x in (master, m, v, m_scale, v_scale)),
            grad if scale is None else scale, grad if found_inf is None else found_inf, **scalars,
            key=_signed(key["index"]), m_key=_signed(key["m"]), v_key=_signed(key["v"]),
            weight_key=_signed(key["weight"]),
            **flags(
                spec, weights_dtype, small=small, scale=scale is not None, found_inf=found_inf is not None,
                aligned=table.aligned,
            ),
            num_warps=WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
