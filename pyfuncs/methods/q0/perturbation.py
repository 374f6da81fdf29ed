"""Weights pushed off their place at a cycle's end, so that the next cycle finds another one."""

from __future__ import annotations

import math

import torch
from torch import nn


def perturbation_scale(cycle: int, cycles: int, first: float = 0.25, last: float = 0.05) -> float:
    """Half a cosine over the cycles' ends: ``first`` after cycle 0, ``last`` after cycle ``cycles`` - 1."""
    if not 0 <= cycle < cycles:
        raise ValueError(f"cycle must be one of {cycles}, from 0; got {cycle}")
    share = cycle / (cycles - 1) if cycles > 1 else 0.0
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def perturb(model: nn.Module, scale: float, seed: int) -> None:
    """Add N(0, 1) * std(p) * ``scale`` to every trained parameter p of more than one element, in place.

    In q0's published program (not known to be in the paper, arXiv 2606.03938).  The noise is drawn on the CPU in fp32
    from ``seed``, in the order of ``named_parameters``: every rank and every device adds the same.  Parameters that
    are tied are one; one whose elements are all equal (a norm's gain before training) stays.
    """
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0; got {scale}")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            amount = parameter.float().std() * scale
            parameter.add_((noise.to(parameter.device) * amount).to(parameter.dtype))
