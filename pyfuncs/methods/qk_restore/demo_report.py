"""What ``burnish demo qk-restore`` found, as tables and a plot; runs no model."""

from __future__ import annotations

import math
from pathlib import Path

from ...paths import Scored, retention_at
from ..intervals import interval

LENGTHS = (32, 128, 512, 1024)
LOWER, OTHER, MIXED = "chain, 0.3 of the rate", "chain over other tokens", "chain and 5 % recall"
REGIMES = ("chain", LOWER, OTHER, MIXED)
PRO, FROZEN, BACK = "QK-Pro", "Q, K frozen in fine-tuning", "% of the way back"
#: Drawn, with its colour.
_DRAWN = {
    "before": "#999999", "after": "#c44e52", "QK-Restore": "#4c72b0", "V and O": "#dd8452", "V, O and MLP": "#937860",
    "Q, K of linear layers": "#8172b3", f"all weights, 10{BACK}": "#55a868",
}  # fmt: skip


def _mean_recall(row: dict[str, float]) -> float:
    found = [v for name, v in row.items() if name.startswith("recall")]
    return sum(found) / len(found)


def _cell(values: list[float], signed: bool = False) -> str:
    mean, half = interval([100 * v for v in values])
    return f"{mean:{'+' if signed else ''}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def _regime(seeds: list[dict], regime: str) -> list[str]:
    found = [s["regimes"][regime]["rows"] for s in seeds]
    columns = list(found[0]["before"])
    lines = ["| | " + " | ".join(columns) + " | recall, gained | chain, lost |", "|---" * (len(columns) + 3) + "|"]
    for name in found[0]:
        cells = [_cell([f[name][c] for f in found]) for c in columns]
        if name in ("before", "after"):
            cells += ["", ""]
        else:
            # the same problems and the same fine-tuning: differences within a seed
            cells.append(_cell([_mean_recall(f[name]) - _mean_recall(f["after"]) for f in found], True))
            cells.append(_cell([f["after"]["chain"] - f[name]["chain"] for f in found], True))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _matched(rows: dict[str, dict[str, float]]) -> float | None:
    """Recall of QK-Restore less that of all weights part of the way back, where both know the chain as well."""
    line = [row for name, row in rows.items() if name in ("before", "after") or name.startswith("all weights")]
    point = rows["QK-Restore"]
    other = retention_at([Scored(row["chain"], _mean_recall(row)) for row in line], point["chain"])
    return None if other is None else _mean_recall(point) - other


def table(results: dict) -> str:
    """Accuracy of every model in %, mean and 95% interval over seeds, a table of Markdown a regime."""
    o, seeds, c = results["options"], results["seeds"], results["constants"]
    lines = [
        f"{results['parameters']:,} parameters, {o['pretrain_steps']} updates of {o['batch_size']} before and "
        f"{o['sft_steps']} of fine-tuning at {o['sft_learning_rate']:g}; {len(seeds)} seeds, mean ± half of the 95 % "
        "interval (Student's t), accuracy in %. Gained and lost are against `after`, paired within a seed, recall over "
        f"all lengths. QK-Pro's lambda is {c['lambda']:g}.",
    ]
    for regime in REGIMES:
        lines += ["", f"Fine-tuned on: {regime}.", "", *_regime(seeds, regime)]
        if regime == REGIMES[0]:
            found = [_matched(s["regimes"][regime]["rows"]) for s in seeds]
            known = [m for m in found if m is not None]
            if known:
                lines += ["", f"At QK-Restore's own accuracy on the chain, its recall less that of the line of all "
                          f"weights: {_cell(known, True)} points ({len(known)} seeds)."]  # fmt: skip
    rows = [s["regimes"][REGIMES[0]]["drift"] for s in seeds]
    lines += ["", f"Relative drift, fine-tuned on the {REGIMES[0]}, in %:", "", "| layer | part | drift | angle |"]
    lines.append("|---|---|---|---|")
    for i, first in enumerate(rows[0]):
        angles = [r[i]["angle"] for r in rows]
        angle = f"{interval(angles)[0]:.0f}°" if None not in angles else ""
        lines.append(f"| {first['layer']} | {first['part']} | {_cell([r[i]['relative'] for r in rows])} | {angle} |")
    lines += ["", "Mean attention distance, tokens, on recall of 128:", "", "| layer | before | after |"]
    lines.append("|---|---|---|")
    distances: list[dict] = [s["distance"] for s in seeds]
    for layer in distances[0]["recall, before"]["mean_distance"]:
        pair = []
        for when in ("before", "after"):
            mean, half = interval([d[f"recall, {when}"]["mean_distance"][layer] for d in distances])
            pair.append(f"{mean:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}"))
        lines.append(f"| {layer} | {pair[0]} | {pair[1]} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Recall gained by length, recall against the chain, and g(tau) on the chain before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds = results["seeds"]
    found = [s["regimes"][REGIMES[0]]["rows"] for s in seeds]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    gained = [name for name in _DRAWN if name not in ("before", "after")]
    for k, name in enumerate(gained):
        both = [interval([100 * (f[name][c] - f["after"][c]) for f in found]) for c in (f"recall {n}" for n in LENGTHS)]
        halves = [0 if math.isnan(h) else h for _, h in both]
        # side by side, so that intervals can be told apart
        places = [n * 1.07 ** (k - len(gained) / 2) for n in LENGTHS]
        left.errorbar(places, [m for m, _ in both], halves, marker="o", capsize=2, color=_DRAWN[name], label=name)
    left.axhline(0, color="#999999", linewidth=0.8)
    left.set(title="recall gained on `after`, points", xscale="log", xlabel="tokens")
    left.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    left.minorticks_off()
    left.legend(fontsize=7)

    def at(name: str) -> tuple[float, float]:
        chain = interval([100 * f[name]["chain"] for f in found])[0]
        return chain, interval([100 * _mean_recall(f[name]) for f in found])[0]

    for kind, color, end in (("all weights", "#55a868", "before"), ("Q, K", "#4c72b0", "QK-Restore")):
        way = ["after", *(n for n in found[0] if n.startswith(f"{kind}, ") and n.endswith(BACK)), end]
        middle.plot(*zip(*map(at, way), strict=True), ":", color=color, label=f"{kind}, part of the way back")
    for name in found[0]:
        middle.plot(*at(name), "o", color=_DRAWN.get(name, "#cccccc"))
    middle.set(title="after fine-tuning on the chain", xlabel="chain, %", ylabel="recall over lengths, %")
    middle.legend(fontsize=7)
    for when in ("before", "after"):
        runs = [s["distance"][f"chain, {when}"]["g"] for s in seeds]
        mean = [sum(column) / len(column) for column in zip(*runs, strict=True)]
        # the last token has no target, so that its score with the first has no gradient
        right.plot(range(len(mean) - 1), mean[:-1], color=_DRAWN[when], label=when)
    right.set(title="g(tau) on the chain", xlabel="distance, tokens", yscale="log")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
