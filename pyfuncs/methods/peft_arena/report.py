"""An arena's report: Markdown for the terminal, and one HTML file that asks for nothing outside itself."""

from __future__ import annotations

import html as escaping
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..run_directory import write_json, write_whole
from .config import Config
from .plan import Run
from .summary import Estimate, Summary, read_planned, summarise

#: A table: (title, note under it, header, rows of cells).
Table = tuple[str, str, list[str], list[list[str]]]


def write_report(output: Path, config: Config, plan: Iterable[Run]) -> str:
    """Write report.md, report.html, report.json and frontier.png of the runs of ``plan`` that are there; returns the
    Markdown and where they are."""
    from . import plot

    runs, others = read_planned(output, plan)
    summary = summarise(runs, config["forgetting"], others)
    text = markdown(summary)
    write_json(output / "report.json", summary)
    write_whole(output / "report.md", text + "\n")
    write_whole(output / "report.html", html(summary, plot.svg(summary)))
    plot.plot(summary, output / "frontier.png")
    return f"{text}\n\nwritten: {output / 'report.html'}, report.md, report.json, frontier.png"


def markdown(summary: Summary) -> str:
    """The tables as Markdown, columns aligned."""
    parts = [_opening(summary)]
    for title, note, header, rows in tables(summary):
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in [header, *rows]]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        parts.append(f"### {title}\n\n" + (f"{note}\n\n" if note else "") + "\n".join(lines))
    return "\n\n".join(parts)


def html(summary: Summary, picture: str = "") -> str:
    """The report as one HTML document; ``picture`` is an <svg> element."""
    e = escaping.escape
    body = [f"<p>{e(_opening(summary))}</p>", picture]
    for title, note, header, rows in tables(summary):
        head = "".join(f"<th>{e(c)}</th>" for c in header)
        lines = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in r) + "</tr>" for r in rows)
        body.append(f"<h2>{e(title)}</h2><p>{e(note)}</p><table><tr>{head}</tr>{lines}</table>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PEFT-Arena</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-size:14px}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;"
        "text-align:left;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}</style></head><body>"
        f"<h1>PEFT-Arena</h1>{''.join(body)}</body></html>\n"
    )


def tables(summary: Summary) -> Iterator[Table]:
    """The report's tables."""
    base, seeds = summary["base"], len(summary["seeds"])
    rows = [["before", "", "", "", _cell(base["target"]), _cell(base["retention"]), "", "", ""]]
    for r in summary["rows"]:
        name = f"{r['label']} {r['rate']:g}"
        star = "*" if name in summary["front"] and not r["control"] else ""
        rows.append([
            r["label"], f"{r['rate']:g}", r["control"], f"{r['parameters']:,}", _cell(r["target"]),
            _cell(r["retention"]), _cell(r["forgetting"]), f"{r['distance']['mean']:.3g}", star,
        ])  # fmt: skip
    yield (
        "Methods", "Tests; mean and half width of the 95% interval over seeds. * nothing dominates the mean; a control "
        "trains less at the highest rate.",
        ["method", "lr", "control", "trainable", "target", "retention", "forgetting", "distance", "front"], rows,
    )  # fmt: skip
    fewest = summary.get("fewest")  # which older results do not have
    equal = f"hypervolume of {fewest} point{'s' if fewest != 1 else ''}"
    fair = f"; {equal}: the mean over all choices of as many of a method's points" if fewest else ""
    limits = list(next(iter(summary["methods"].values()))["best_target"])
    yield (
        "Over learning rates",
        "Hypervolume above (target before, 0), which grows with the number of points, and so with a longer list of "
        f"rates{fair}; retention where target is {summary['matched']:.3f}, which every method's mean reaches (of the "
        "seeds that do); target at the rate chosen on held-out suites to forget at most so much.",
        ["method", "points", "hypervolume", *([equal] if fewest else []), "retention at matched target",
         *(f"target, forgetting <= {x}" for x in limits)],
        [
            [
                label,
                str(sum(r["label"] == label and not r["control"] for r in summary["rows"])),
                _cell(m["hypervolume"]),
                *([_cell(m["hypervolume_of_fewest"])] if fewest else []),
                _cell(m["retention_at"], seeds=m.get("seeds", seeds)),
                *(_cell(m["best_target"][x]) for x in limits),
            ]
            for label, m in summary["methods"].items()
        ],
    )
    controls = sorted({c for r in summary["rewinding"] for c in r["against"]})
    rows = []
    for r in summary["rewinding"]:
        rows.append([
            f"{r['label']} {r['rate']:g}", r["path"], _cell(r["final"]["target"]), _cell(r["final"]["retention"]),
            f"{r['chosen']['alpha']['mean']:.2f}", f"{r['chosen']['distance']['mean']:.2f}",
            _cell(r["chosen"]["target"]), _cell(r["chosen"]["retention"]),
            *(_cell(r["against"].get(c), True, seeds if c in r["against"] else 0) for c in controls),
        ])  # fmt: skip
    if rows:
        yield (
            "Rewinding",
            "At each method's highest rate. The point is chosen on held-out suites and scored on the tests; distance "
            "is of the way that the trained model has gone. Last columns: the path's retention less a control's, at "
            "the control's own target, on held-out suites.",
            ["run", "path", "target", "retention", "alpha", "distance", "target there", "retention there",
             *(f"against {c}" for c in controls)],
            rows,
        )  # fmt: skip
    rows = [
        [r["metric"], *(_number(r[f"{k}_{a}"]) for a in ("forgetting", "target") for k in ("pearson", "spearman")),
         str(r["runs"])]
        for r in summary["correlations"]
    ]  # fmt: skip
    yield (
        "Metrics and forgetting", "Correlation over all runs, controls among them; no cause is shown.",
        ["metric", "Pearson, forgetting", "Spearman, forgetting", "Pearson, target", "Spearman, target", "runs"], rows,
    )  # fmt: skip


def _opening(summary: Summary) -> str:
    seeds = len(summary["seeds"])
    lost = f" Diverged, and left out: {'; '.join(summary['diverged'])}." if summary["diverged"] else ""
    others = summary.get("others", 0)  # which older results do not have
    if others:
        lie = "other run lies" if others == 1 else "other runs lie"
        lost += f" {others} {lie} in the directory, not asked for by the file: left out."
    return (
        f"{summary['runs']} runs, {seeds} seed{'s' if seeds != 1 else ''}. "
        f"Suites: {', '.join(summary['suites'])}. Before: target {_cell(summary['base']['target'])}, "
        f"retention {_cell(summary['base']['retention'])}.{lost}"
    )


def _cell(x: Estimate | None, signed: bool = False, seeds: int = 0) -> str:
    """A mean with its interval, and of how many seeds where they are fewer than ``seeds``."""
    if x is None:
        return f"- (0 of {seeds})" if seeds else "-"
    half = "" if x["half"] is None else f" ± {x['half']:.3f}"
    few = f" ({x['n']} of {seeds})" if x["n"] < seeds else ""
    return (f"{x['mean']:+.3f}" if signed else f"{x['mean']:.3f}") + half + few


def _number(x: Any) -> str:
    return "-" if x is None else f"{x:+.2f}"
