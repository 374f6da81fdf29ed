"""No kernel accesses memory outside its tensors: of row kernels proved by triton-viz's symbolic sanitizer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

TRITON = tuple(map(int, metadata.version("triton").split(".")[:2]))
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton_viz") is None, reason="triton-viz is not installed: pip install triton-viz"
    ),
    pytest.mark.skipif(TRITON >= (3, 8), reason="triton-viz 3.0 asks triton 3.8's interpreter for what it has no more"),
]


def _sanitize(*names: str) -> str:
    script = Path(__file__).with_name("sanitize.py")
    done = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_no_access_out_of_bounds():
    """All flags and none; ragged, single-column and offset tiles; labels in, beyond and ignored."""
    out = _sanitize("fold", "jsd", "grad")
    for kernel in ("fold", "jsd", "grad"):
        assert f"{kernel}: clean, 8 launches" in out, out[-4000:]


def test_the_sanitizer_catches_broken_kernels():
    """A load and a store without a right mask, and fold told of one column too many."""
    out = _sanitize("broken-load", "broken-store", "broken-fold")
    for kernel in ("broken-load", "broken-store", "broken-fold"):
        assert f"{kernel}: caught" in out, out[-4000:]


def test_kernels_whose_addresses_come_from_memory_stay_within_their_tensors():
    """AdamW's tiles and a segment's rows: every address of some launches, and the check at work on a broken table."""
    out = _sanitize(
        "adamw", "segment_sum", "attention", "probe", "farthest", "maxsim", "rotation",
        "broken-adamw", "broken-segment_sum", "broken-attention", "broken-maxsim", "broken-rotation",
    )  # fmt: skip
    assert "\nadamw: clean, 4 launches\nsegment_sum: clean, 4 launches\n" in "\n" + out, out[-4000:]
    for kernel, cases in (("attention", 7), ("probe", 3), ("farthest", 3), ("maxsim", 9), ("rotation", 16)):
        assert f"\n{kernel}: clean, {cases} launches\n" in out, out[-4000:]
    for kernel in ("broken-adamw", "broken-segment_sum", "broken-attention", "broken-maxsim", "broken-rotation"):
        assert f"{kernel}: caught" in out, out[-4000:]
