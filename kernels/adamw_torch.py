"""The torch twin of the AdamW kernels: any device, torch.optim's own operations.

A segment is updated in pieces of BLOCK elements, so that scratch stays a few tens of MiB whatever the weight.  See
``adamw`` for the mathematics and the operands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .adamw import QUANT_BLOCK, TILE, AdamWSpec, TileTable, Update, check, dequantize, quantize, random_bits
from .adamw import round_stochastic as _round

#: Elements updated at once, whole tiles.
BLOCK = 1 << 20


def adamw(
    table: TileTable, grad, master, m, v, m_scale, v_scale, weights_dtype, spec: AdamWSpec, update: Update,
    scale=None, found_inf=None,
):  # fmt: skip
    """One step of AdamW on the table's tiles: weights, master, moments and their scales are written in place."""
    check(table, grad, master, m, v, m_scale, v_scale, weights_dtype, spec, scale, found_inf)
    u = update
    skip = None if found_inf is None else found_inf != 0  # on the device: looking at it would be a sync

    def write(to, new):
        to.copy_(new if skip is None else torch.where(skip, to, new.to(to.dtype)))

    def blocks(x):
        """(n,) -> (B, QUANT_BLOCK), the last filled with zeros, which change no largest magnitude."""
        return F.pad(x, (0, -x.numel() % QUANT_BLOCK)).view(-1, QUANT_BLOCK)

    for whole, first_tile in zip(table.weights, table.first_tile, strict=True):
        for start in range(0, whole.numel(), BLOCK):
            weight = whole[start : start + BLOCK]
            n, begin = weight.numel(), first_tile * TILE + start
            own, scales = slice(begin, begin + n), slice(begin // QUANT_BLOCK, -(-(begin + n) // QUANT_BLOCK))

            def bits(stream, n=n, begin=begin):
                index = table.table[begin // TILE, 2] + torch.arange(n, device=grad.device)
                return random_bits(u.seed, u.step, index, stream)

            def moment(name, x, x_scale, own=own, scales=scales, n=n):
                if not spec.quantized:
                    return x[own]
                return dequantize(blocks(x[own]), x_scale[scales], name).view(-1)[:n]

            g = grad[own] if scale is None else grad[own] * scale
            p = (master[own] if spec.master else weight.float()) * (1 - u.lr * u.weight_decay)
            new_m = moment("m", m, m_scale).lerp(g, 1 - u.beta1)
            new_v = (moment("v", v, v_scale) * u.beta2).addcmul_(g, g, value=1 - u.beta2)
            # a root in fp64 and rounded is the rounded root
            root = new_v.sqrt() if spec.exact else new_v.double().sqrt().to(new_v.dtype)
            p.addcdiv_(new_m, (root / u.root).add_(u.eps), value=-u.step_size)
            if spec.master:
                write(master[own], p)
            write(weight, _round(p, weight.dtype, bits("weight")) if spec.stochastic(weight.dtype) else p)
            for name, x, x_scale, new in (("m", m, m_scale, new_m), ("v", v, v_scale, new_v)):
                if spec.quantized:
                    codes, new_scale = quantize(blocks(new), name, blocks(bits(name)))
                    write(x_scale[scales], new_scale)
                    new = codes.view(-1)[:n]
                write(x[own], new)
