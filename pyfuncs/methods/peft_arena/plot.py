"""The frontier: target against retention, for every method, and the rewinding paths."""

from __future__ import annotations

import io
import re
from pathlib import Path

from .summary import Summary

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")


def draw(summary: Summary):
    """A figure of two panels: methods on the tests with intervals over seeds, and paths on the held-out suites."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    labels = list(summary["methods"])
    color = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    base = summary["base"]
    for label in labels:
        rows = [r for r in summary["rows"] if r["label"] == label]
        for control, marker in ((False, "o"), (True, "x")):
            shown = [r for r in rows if bool(r["control"]) == control]
            if not shown:
                continue
            shown.sort(key=lambda r: r["rate"])
            x, y = ([r[a]["mean"] for r in shown] for a in ("target", "retention"))
            ex, ey = ([r[a]["half"] or 0 for r in shown] for a in ("target", "retention"))
            name = f"{label} ({shown[0]['parameters'] / 1e6:.3g}M)" if not control else None
            left.errorbar(
                x, y, ey, ex, marker=marker, color=color[label], label=name, linewidth=0 if control else 1,
                elinewidth=0.5, markersize=5, alpha=0.6 if control else 1.0,
            )  # fmt: skip
    left.plot(base["target"]["mean"], base["retention"]["mean"], "k*", markersize=11, label="before")
    left.set(title="methods over learning rates (x: controls), tests", xlabel="target", ylabel="retention (General)")
    left.legend(fontsize=8)
    styles = {"line": "--", "scale": "-", "generator": "-", "safe": "-.", "min": ":"}
    for one in summary["rewinding"]:
        x, y = ([p[a] for p in one["curve"]] for a in ("target", "retention"))
        name = f"{one['label']} {one['rate']:g}, {one['path']}"
        right.plot(x, y, styles.get(one["path"], "-"), marker=".", color=color[one["label"]], label=name)
    right.set(title="rewinding, held-out suites", xlabel="target", ylabel="retention (General)")
    right.legend(fontsize=8)
    return figure


def plot(summary: Summary, path: Path) -> None:
    """The figure as a file."""
    from matplotlib import pyplot as plt

    figure = draw(summary)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def svg(summary: Summary) -> str:
    """The figure as an <svg> element that asks for nothing outside itself."""
    import matplotlib
    from matplotlib import pyplot as plt

    figure, file = draw(summary), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "burnish"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
