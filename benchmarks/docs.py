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


PARTS = {
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
