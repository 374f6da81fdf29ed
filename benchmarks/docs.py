"""Fill the generated parts of README and docs from the registry and from benchmarks/results/*.json.

python benchmarks/docs.py            # rewrite
python benchmarks/docs.py --check    # exit 1 if a page is stale
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def objectives() -> str:
    from burnish import objectives as o

    rows = ["| name and arguments | weight | trust | residual | needs | source |", "|---|---|---|---|---|---|"]
    for r in o.describe():
        columns = ("weight", "trust", "residual", "needs", "paper")
        cells = [f"`{r['name']}{r['arguments']}`", *(r[k].replace("|", "\\|") for k in columns)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def demo() -> str:
    file = RESULTS / "demo_sft.json"
    if not file.exists():
        return ""
    r = json.loads(file.read_text())
    names = {"nll": "SFT", "target_sft": f"Target-SFT, eta {r['options']['eta']}, starting model as teacher"}
    o = r["options"]
    lines = [
        f"`make demo`: SmolLM2-135M (all parameters, fp32), {o['steps']} steps of {o['batch_size']} examples of the "
        f"reasoning-gym task `{r['task']}`, greedy answers to {o['problems']} held-out problems scored by the task's "
        f"verifier, two CPU cores, {r['seconds'] / 60:.1f} minutes in all (`benchmarks/results/demo_sft.json`).",
        "",
        "![loss, token accuracy, task accuracy](docs/demo_sft.png)",
        "",
        "| | accuracy before | after | tokens/s |",
        "|---|---|---|---|",
    ]
    for name, m in r["methods"].items():
        lines.append(f"| {names[name]} | {m['before']:.1%} | {m['after']:.1%} | {m['tokens_per_second']:.0f} |")
    m0 = r["memory"][0]
    lines += [
        "",
        f"Peak live memory of the loss, forward and backward, with the model's head ({m0['tokens']} tokens, vocabulary "
        f"{m0['vocabulary']}), beside the gradients of hidden and head:",
        "",
        "| objective | materialised | fused | ratio | relative difference of the gradients |",
        "|---|---|---|---|---|",
    ]
    for m in r["memory"]:
        lines.append(
            f"| {m['objective']} | {m['materialised'] / 2**20:.0f} MiB | {m['fused'] / 2**20:.0f} MiB | "
            f"{m['fused'] / m['materialised']:.2f} | {m['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def static() -> str:
    r = json.loads((RESULTS / "static.json").read_text())
    targets = ["sm_80", "sm_90", "sm_100", "gfx942"]
    kernels = r["kernels"]
    spilled = sum(any(k["spills"]) for k in kernels.values())
    lines = [
        f"{len(kernels)} compilations with triton {r['triton']}, {r['threads']} threads, {r['block']} columns a block: "
        f"{spilled} with a spill. Registers a thread, fp32 / bf16 tiles:",
        "",
        "| kernel, objective | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    seen = dict.fromkeys("/".join(name.split("/")[:2]) for name in kernels)
    for name in seen:
        cells = []
        for target in targets:
            both = [kernels.get(f"{name}/{dtype}/{target}") for dtype in ("fp32", "bf16")]
            cells.append(" / ".join(str(k["registers"]) for k in both if k))
        lines.append(f"| {name.replace('/', ', ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def target_sft() -> str:
    file = RESULTS / "target_sft.json"
    if not file.exists():
        return ""
    r = json.loads(file.read_text())
    settings, methods, summary, chosen = r["settings"], r["methods"], r["summary"], r["chosen"]
    noises, sweep = [str(x) for x in settings["noises"]], str(settings["sweep_noise"])
    tasks = ("spell_backward", "number_sorting", "palindrome_generation")

    def cell(row: dict, key: str, sign: str = "") -> str:
        return f"{100 * row[key]['mean']:{sign}.1f} ± {100 * row[key]['half']:.1f}" if key in row else ""

    def label(name: str) -> str:
        return methods[name]["label"] + (" (chosen)" if name == chosen else "")

    pretrained = {w: f"{m['accuracy']['mean']:.1%}" for w, m in r["pretrained"].items()}
    lines = [
        f"Accuracy in % on {len(tasks) * settings['problems']} test problems, mean of {len(settings['seeds'])} seeds "
        f"± 95 % interval, after {settings['steps']} steps of {settings['batch_size']} rows "
        f"({r['runs'][0]['non_unique']:.0%} of them with more than one right answer). The base model has "
        f"{pretrained['base']}, the strong one {pretrained['strong']}. "
        f"All of it: {r['cpu_seconds'] / 60:.0f} CPU minutes.",
        "",
        "![accuracy over eta, and over the share of wrong demonstrations](target_sft.png)",
        "",
        "| method | teacher | lr | " + " | ".join(f"{float(x):.0%} wrong" for x in noises)
        + f" | minus SFT, {float(sweep):.0%} wrong | NLL, {float(sweep):.0%} wrong |",
        "|---|---|---|" + "---|" * (len(noises) + 2),
    ]  # fmt: skip
    for name, m in methods.items():
        cells = [cell(summary[x].get(name, {}), "mean") for x in noises]
        row = summary[sweep][name]
        nll = f"{row['nll']['mean']:.3f} ± {row['nll']['half']:.3f}"
        head = f"| {label(name)} | {m['teacher'] or 'none'} | {r['sweep'][name]['rate']:g} | "
        lines.append(head + " | ".join([*cells, cell(row, "minus_sft", "+"), nll]) + " |")
    lines += [
        "",
        f"By task, {float(sweep):.0%} wrong (palindromes and sorting have several right answers):",
        "",
        "| method | " + " | ".join(f"`{t}`" for t in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for name in methods:
        lines.append(f"| {label(name)} | " + " | ".join(cell(summary[sweep][name], t) for t in tasks) + " |")

    # sentences: what validation chose, then every comparison of the chosen eta, won or lost
    lines += ["", f"Validation chose {methods[chosen]['label']}. Its accuracy minus that of the others, in points:", ""]
    for x in noises:
        parts: dict[str, list[str]] = {"above": [], "below": [], "not to be told from": []}
        for name, d in summary[x][chosen]["minus"].items():
            if name.startswith("target_") and name != "target_base":
                continue
            text = f"{methods[name]['label']} ({100 * d['mean']:+.1f} ± {100 * d['half']:.1f})"
            verdict = "not to be told from" if abs(d["mean"]) <= d["half"] else "above" if d["mean"] > 0 else "below"
            parts[verdict].append(text)
        said = "; ".join(f"{k} {', '.join(v)}" for k, v in parts.items() if v)
        lines.append(f"* {float(x):.0%} wrong: {said}.")
    means = {n: summary[sweep][n]["mean"]["mean"] for n in methods}
    etas = [n for n in methods if methods[n]["objective"] == "target_sft" and methods[n]["teacher"] == "strong"]
    top, best, low = (
        max(means, key=means.__getitem__),
        max(etas, key=means.__getitem__),
        min(etas, key=means.__getitem__),
    )
    base = 100 * r["pretrained"]["base"]["accuracy"]["mean"]
    under = [methods[n]["label"] for n in methods if 100 * means[n] < base]
    lines += [
        "",
        f"At {float(sweep):.0%} wrong the highest mean of all has {methods[top]['label']} ({means[top]:.1%}), of the "
        f"etas {best.removeprefix('target_')} ({means[best]:.1%}), and the lowest of the etas "
        f"{low.removeprefix('target_')} ({means[low]:.1%}); picked on the test problems, so a little flattered. "
        + (f"Below the base model end {', '.join(under)}." if under else "None ends below the base model."),
    ]  # fmt: skip
    gains = {(n, x): 100 * summary[x][n]["mean"]["mean"] - base for x in noises for n in summary[x]}
    most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    lines += [
        "",
        f"Against the base model the largest gain is {gains[most]:+.1f} points ({methods[most[0]]['label']}, "
        f"{float(most[1]):.0%} wrong), the largest loss {gains[least]:+.1f} ({methods[least[0]]['label']}, "
        f"{float(least[1]):.0%} wrong).",
    ]
    edge = [r["settings"]["rates"][0], r["settings"]["rates"][-1]]
    at_edge = [f"{methods[n]['label']} ({r['sweep'][n]['rate']:g})" for n in methods if r["sweep"][n]["rate"] in edge]
    if at_edge:
        lines += ["", "The chosen rate is the lowest or highest tried, so a better one may lie beyond, for: "
                  + ", ".join(at_edge) + "."]  # fmt: skip
    return "\n".join(lines)


PARTS = {
    "target_sft": ("docs/target_sft.md", target_sft),
    "static": ("docs/kernels.md", static),
    "objectives": ("docs/objectives.md", objectives),
    "results": ("README.md", demo),
}


def main() -> int:
    stale = []
    for mark, (page, make) in PARTS.items():
        path = ROOT / page
        text = path.read_text()
        block = f"<!-- {mark} -->\n{make()}\n<!-- /{mark} -->"
        pattern = rf"<!-- {mark} -->(?:.*?<!-- /{mark} -->)?"
        new = re.sub(pattern, lambda _, b=block: b, text, count=1, flags=re.S)
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(new)
    print("stale: " + ", ".join(stale) if stale else "up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
