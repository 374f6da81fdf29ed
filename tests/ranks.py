"""Several processes of a script over gloo, each of which ends with "equal"."""

import subprocess
import sys
from pathlib import Path


def run(script: Path, world: int, folder: Path) -> None:
    """``python script RANK WORLD STORE`` for every rank; AssertionError with what a rank printed where one fails."""
    common = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    arguments = [str(world), str(folder / "store")]
    ranks = [subprocess.Popen([sys.executable, str(script), str(r), *arguments], **common) for r in range(world)]
    out = []
    try:
        out = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, out, strict=True):
        assert rank.returncode == 0, text
        assert text.endswith("equal\n")
