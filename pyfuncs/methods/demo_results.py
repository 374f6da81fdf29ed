"""What a demonstration leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def publish(results: dict, output: Path, table: Callable[[dict], str], plot: Callable[[dict, Path], None]) -> None:
    """Write ``results``, with their "seconds", and the plot into ``output``; print the table and where both are."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output / "curves.png")
    print("\n" + table(results))
    minutes = results["seconds"] / 60
    print(f"\nwritten: {output / 'results.json'}, {output / 'curves.png'} ({minutes:.1f} minutes in all)")
