"""What ``burnish demo ra-rft`` found, as a table and a plot; imports neither torch nor a trainer."""

from __future__ import annotations

import math
from pathlib import Path

from ..intervals import interval

ARMS = {
    "base": "base model", "base_context": "base model + retrieval", "grpo": "GRPO",
    "grpo_inference": "GRPO, retrieval at inference only", "ra_rft": "RA-RFT",
    "random": "RA-RFT, random trace of the topic",
}  # fmt: skip


def table(results: dict) -> str:
    """Accuracy of every arm in %, mean and 95% interval over seeds, as a table of Markdown."""
    lines = ["| arm | sampled, % | greedy, % |", "| --- | --- | --- |"]
    for arm, name in ARMS.items():
        cells = []
        for kind in ("sampled", "greedy"):
            mean, half = interval([100 * s["arms"][arm][kind] for s in results["seeds"]])
            cells.append(f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    parts = []
    for arm in ("ra_rft", "random"):
        mean, half = interval([100 * s["recall@1"][arm] for s in results["seeds"]])
        parts.append(f"{ARMS[arm]} {mean:.1f} ± {half:.1f}")
    lines += [
        "",
        f"recall@1, %: {'; '.join(parts)}. Seeds: {len(results['seeds'])}; ± is a 95% interval (Student's t).",
    ]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Reward by step, mean and range over seeds, and accuracy on new problems."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"grpo": "#4c72b0", "ra_rft": "#dd8452", "random": "#55a868"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained", width_ratios=(1.1, 1))
    for arm, color in colors.items():
        runs = np.array([s["reward"][arm] for s in results["seeds"]])
        window = min(5, runs.shape[1])
        smooth = np.lib.stride_tricks.sliding_window_view(runs, window, axis=1).mean(-1)
        steps = range(window, runs.shape[1] + 1)
        left.plot(steps, smooth.mean(0), color=color, label=ARMS[arm])
        left.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
    left.set(title="reward in training (mean of 5 steps; band: all seeds)", xlabel="step", ylim=(0, 1.02))
    left.legend()
    found = [interval([s["arms"][a]["sampled"] for s in results["seeds"]]) for a in ARMS]
    names = list(ARMS.values())[::-1]
    heights, halves = ([x[i] for x in found][::-1] for i in range(2))
    right.barh(names, heights, xerr=[0 if math.isnan(h) else h for h in halves], capsize=3,
               color=[colors.get(a, "#999999") for a in ARMS][::-1])  # fmt: skip
    right.set(title=f"{results['options']['problems']} new problems, sampled", xlim=(0, 1.02))
    figure.savefig(path, dpi=110)
    plt.close(figure)
