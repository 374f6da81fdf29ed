"""Buffers on huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from burnish.kernels import pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (0, 7), (1500, 4096)], ids=str)
def test_is_torch_empty(shape, dtype):
    x = pages.empty(*shape, dtype=dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
    x.fill_(2)  # all of it may be written
    assert (x == 2).all()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no huge pages to ask for"
)
def test_huge_pages_are_asked_for_within_the_buffer_alone():
    x = pages.empty(1 << 24, dtype=torch.float32)  # a mapping of its own
    start, end = x.data_ptr(), x.data_ptr() + 4 * x.numel()
    advised = 0
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        low, high = (int(v, 16) for v in area.split(" ")[0].split("-"))
        flags = re.search(r"VmFlags:(.*)", area)
        if flags and "hg" in flags[1].split() and high > start and low < end:
            assert start <= low and high <= end
            advised += high - low
    assert 4 * x.numel() - 2 * (2 << 20) < advised <= 4 * x.numel()
