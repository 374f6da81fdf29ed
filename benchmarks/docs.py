"""Fill the generated parts of README and docs from the registry and from benchmarks/results/*.json.

python benchmarks/docs.py            # rewrite
python benchmarks/docs.py --check    # exit 1 if a page is stale
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from statistics import median

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


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _width(accesses: str, *, stores: bool = False) -> str:
    """Bytes of a tile's accesses: "2x16 5x4" -> "16".  Stores of 4 bytes and less are a row's scalars: a dash."""
    width = max((int(part.split("x")[1]) for part in accesses.split()), default=0)
    return "-" if stores and width <= 4 else str(width)


def _each(values) -> str:
    """One cell for the targets: what most of them have, then the exceptions by name."""
    found = dict(zip(TARGETS, map(str, values), strict=False))
    common = max(found.values(), key=list(found.values()).count)
    others = [f"{target} {value}" for target, value in found.items() if value != common]
    return common + (f" ({', '.join(others)})" if others else "")


def static() -> str:
    r = json.loads((RESULTS / "static.json").read_text())
    kernels = r["kernels"]
    spilled = sum(any(k["spills"]) for k in kernels.values())
    lines = [
        f"{len(kernels)} compilations with triton {r['triton']}, {r['threads']} threads, {r['block']} columns a block: "
        f"{spilled} with a spill. Registers a thread, fp32 / bf16 tiles; shared bytes and the widths of a tile's loads "
        f"and stores, bytes, on all of {', '.join(TARGETS)} (bf16):",
        "",
    ]
    rows = []
    for name in dict.fromkeys("/".join(name.split("/")[:2]) for name in kernels):
        registers = []
        for target in TARGETS:
            both = [kernels.get(f"{name}/{dtype}/{target}") for dtype in ("fp32", "bf16")]
            registers.append(" / ".join(str(k["registers"]) for k in both if k))
        all_targets = [kernels[f"{name}/bf16/{target}"] for target in TARGETS]
        loads, stores = (
            _each(_width(k[way], stores=way == "stores") for k in all_targets) for way in ("loads", "stores")
        )
        rows.append([
            name.replace("/", ", "), *registers, _each(k["shared"] for k in all_targets), loads, stores,
        ])  # fmt: skip
    lines += _table(["kernel, objective", *TARGETS, "shared", "load", "store"], rows)
    ragged = {
        name.split("/nll/")[0] + " " + name.split("/")[2]: k
        for name, k in r["ragged_kernels"].items()
        if "sm_90" in name
    }
    lines += [
        "",
        "`linear_loss` makes its tiles whole 16s (not under a softcap, nor beside a teacher's logits that are given). "
        "In `row_loss` and in the vocabulary-outer order, where V is no multiple of 16, as after a resize by one, "
        "neither a row's start nor its end is known to be "
        "aligned and a tile moves entry by entry. All accesses of a thread for NLL on sm_90, count x bytes: "
        + "; ".join(
            f"{n} loads {k['loads']}, stores {k['stores']}, {k['registers']} registers" for n, k in ragged.items()
        )
        + ". Pad the vocabulary.",
    ]
    return "\n".join(lines)


def static_peers() -> str:
    r = json.loads((RESULTS / "static.json").read_text())
    if not r["peers"]:
        return "Neither Liger nor TRL was installed when static.json was written."
    versions = ", ".join(f"{library} {version}" for library, version in r["peers"].items())
    rows: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(re.sub(r"/(bf16|fp32)/[^/]+", "", n) for n in r["peer_kernels"]):
        library, path, kernel, objective, *columns = name.split("/")
        tail = "".join(f"/{c}" for c in columns)
        found = [r["peer_kernels"].get(f"{library}/{path}/{kernel}/{objective}/bf16/{t}{tail}") for t in TARGETS]
        if None in found:
            continue
        fp32 = [r["peer_kernels"][f"{library}/{path}/{kernel}/{objective}/fp32/{t}{tail}"]["spills"] for t in TARGETS]
        cells = (
            _each(f"{k['block']} x {k['warps']}" for k in found), *(str(k["registers"]) for k in found),
            *(_each("/".join(map(str, spills)) for spills in both) for both in (fp32, [k["spills"] for k in found])),
            _each(k["shared"] for k in found), _each(_width(k["loads"]) for k in found),
            _each(_width(k["stores"], stores=True) for k in found),
            _each(k["barriers"] for k in found if k["barriers"] is not None),
        )  # fmt: skip
        label = f"{path}{', ' + ', '.join(columns) if columns else ''}: {objective}"
        rows.setdefault((library, kernel, cells), []).append(label)
    header = ["kernel", "path: objective", "block x warps", *TARGETS]
    header += ["spills fp32", "spills bf16", "shared", "load", "store", "barriers"]
    body = [[f"{library} {kernel}", "; ".join(labels), *cells] for (library, kernel, cells), labels in rows.items()]
    blocks = sorted({r["block"], *(k["block"] for k in r["peer_kernels"].values())})
    lanes = "; ".join(
        f"{b}: " + ", ".join(f"{-(-v // b) * b / v:.2f} at {v:,}" for v in r["vocabularies"]) for b in blocks
    )
    intro = [
        f"{versions}, bf16 weights, blocks and warps as their host code chooses for vocabularies of "
        + " and ".join(f"{v:,}" for v in r["vocabularies"])
        + " (one row where both agree). Registers a thread; spills are bytes stored / loaded (VGPR / SGPR on gfx942); "
        "barriers and shuffles inside loops are counted on CUDA only, ours have none. Lanes run for each column, "
        f"masked ones included, by block: {lanes}.",
        "",
    ]
    return "\n".join(intro + _table(header, body))


def ledger() -> str:
    r = json.loads((RESULTS / "ledger.json").read_text())
    even, ragged = r["columns"]
    versions = ", ".join(f"{library} {version}" for library, version in r["peers"].items())
    lines = [
        f"{r['rows']} rows of {even} logits, a logit of the student's; triton {r['triton']}"
        + (f"; {versions}" if versions else "")
        + f". The last column is the arithmetic of {ragged} columns, masked lanes included:",
        "",
    ]
    rows = []
    for name in dict.fromkeys(n.rsplit("/", 2)[0] for n in r["paths"]):
        objective, library, path = name.split("/")
        wide, narrow = (r["paths"][f"{name}/{dtype}/{even}"] for dtype in ("float32", "bfloat16"))
        rows.append([
            objective, f"{library} {path}", f"{narrow['reads']:.2f}", f"{narrow['writes']:.2f}",
            *(f"{x['kernel_bytes']:.0f} + {x['host_bytes']:.0f}" for x in (wide, narrow)),
            f"{narrow['operations']['exp']:.2f}", f"{narrow['operations']['log']:.0f}", f"{narrow['flops']:.1f}",
            f"{r['paths'][f'{name}/bfloat16/{ragged}']['flops']:.1f}",
        ])  # fmt: skip
    header = ["objective", "path", "reads", "writes", "bytes, fp32", "bytes, bf16", "exp", "log", "flops", "ragged"]
    return "\n".join(lines + _table(header, rows))


NOT_YET = "Not measured yet."
#: Columns of the side-by-side table: name, and the ways of benchmarks/peers.py whose fastest is shown.
COLUMNS = {
    "burnish": ("burnish_host", "burnish_triton"),
    "burnish, other order": ("burnish_host_vocab", "burnish_host_tokens", "burnish_triton_vocab"),
    "torch": ("torch", "torch_upcast", "torch_lce"),
    "torch.compile": ("torch_compile", "torch_compile_upcast"),
    "torch core, chunked": ("torch_lce_chunked",),
    "CCE": ("cce_torch_compile", "cce_cce"),
    "TRL": ("trl",),
    "Liger": ("liger_chunked", "liger_chunked_eager", "liger_scaled", "liger_triton"),
}


def _libraries(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("burnish", "python"))


def _way_cell(cell: dict, names: tuple[str, ...]) -> str:
    rows = [r for r in cell["rows"] if r["way"] in names and "dx_error" in r]
    if not rows:
        return ""
    r = min(rows, key=lambda r: (-r["rows"], r["of_floor"]))
    extra = f", {r['extra_bytes'] / 2**20:.0f} MiB" if r.get("extra_bytes") is not None else ""
    fewer = f" [{r['rows']}]" if r["rows"] < cell["n"] else ""
    memory = f" [{r['memory_rows']}]" if extra and r["memory_rows"] < cell["n"] else ""
    return f"{r['of_floor']:.2f}{fewer}{extra}{memory}, {max(r['dx_error'], r['dw_error']):.0e}"


def linear_loss_cpu() -> str:
    return _side_by_side("linear_loss_cpu")


def linear_loss_cpu_amx() -> str:
    return _side_by_side("linear_loss_cpu_amx")


def policy_cpu() -> str:
    return _side_by_side("policy_cpu")


def post_chain_cpu_amx() -> str:
    return _side_by_side("post_chain_cpu_amx")


def _side_by_side(name: str) -> str:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    lines = [
        f"CPU ({r['capability']}{' and AMX' if 'amx' in name else ''}), {r['threads']} threads, "
        f"{_libraries(r['versions'])} (`benchmarks/results/{name}.json`; `benchmarks/linear_loss.py` says how). A "
        "cell: median time over the bare GEMMs of the same order, extra peak memory of the process, larger relative "
        "error of dX and dW against fp64. [n]: at n rows, where all would take too long. Of several forms of a column, "
        "the fastest. Other order: the one that `plan=\"auto\"` does not take there.",
    ]
    used = [name for name, ways in COLUMNS.items() if any(_way_cell(cell, ways) for cell in r["cells"])]
    for shape in dict.fromkeys((c["n"], c["h"], c["v"]) for c in r["cells"]):
        lines += ["", f"N, H, V = {', '.join(map(str, shape))}:", ""]
        lines += ["| | GEMMs | " + " | ".join(used) + " |", "|---|---|" + "---|" * len(used)]
        for cell in r["cells"]:
            if (cell["n"], cell["h"], cell["v"]) != shape:
                continue
            bare = next(x for x in cell["rows"] if x["way"] == "floor")
            fewer = f" [{bare['rows']}]" if bare["rows"] < cell["n"] else ""
            cells = [_way_cell(cell, COLUMNS[name]) for name in used]
            head = f"{cell['objective']}, {cell['dtype']} | {bare['median']:.2f} s{fewer}"
            lines.append(f"| {head} | " + " | ".join(cells) + " |")
    every = [(cell, t) for cell in r["cells"] for t in cell["targets"]]
    lines += ["", f"Targets: {sum(t['met'] for _, t in every)} of {len(every)} met."]
    missed = [(cell, t) for cell, t in every if not t["met"]]
    if missed:
        lines += ["", "| missed | N, H, V | figure | limit | against |", "|---|---|---|---|---|"]
        for cell, t in missed:
            where = f"{cell['n']}, {cell['h']}, {cell['v']}"
            what = f"{cell['objective']}, {cell['dtype']}: {t['target']}"
            lines.append(f"| {what} | {where} | {t['figure']:.2f} | {t['limit']:g} | {t['against']} |")
    return "\n".join(lines)


def correctness() -> str:
    file = RESULTS / "correctness.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    shapes = r["shapes"]
    rows = [x for x in r["errors"] if "arguments" not in x]  # all ways on one problem
    ways = list(dict.fromkeys(x["way"] for x in rows if not x["interpreter"]))
    lines = [
        f"{_libraries(r['versions'])}; CPU (`benchmarks/results/correctness.json`). Relative error against fp64 of the "
        f"same operands, dX / dW; N, H, V = {', '.join(map(str, shapes['plain']))}:",
        "",
        "| | " + " | ".join(ways) + " |",
        "|---|" + "---|" * len(ways),
    ]
    for objective, dtype in dict.fromkeys((x["objective"], x["dtype"]) for x in rows):
        cells = []
        for way in ways:
            found = [
                x
                for x in rows
                if (x["objective"], x["dtype"], x["way"], x["interpreter"]) == (objective, dtype, way, False)
            ]
            cells.append("" if not found else found[0].get("failed") or f"{found[0]['dx']:.0e} / {found[0]['dw']:.0e}")
        lines.append(f"| {objective}, {dtype} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The largest ratio of burnish's error to that of plain torch in the same dtype, over all registered "
        f"objectives (Triton in the interpreter, at {', '.join(map(str, shapes['interpreter']))}):",
        "",
        "| backend, dtype | loss | dX | dW |",
        "|---|---|---|---|",
    ]
    for w in r["worst_ratio_to_torch"]:
        cells = [f"{w[k]:.2f} ({w[k + '_objective']})" for k in ("loss", "dx", "dw")]
        lines.append(f"| {w['way'].removeprefix('burnish_')}, {w['dtype']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Defects that were reported of libraries of this kind, run live; Liger's Triton kernels in the interpreter. "
        "What is not named passes.",
        "",
        "| check | burnish | does not pass |",
        "|---|---|---|",
    ]
    for check in r["checks"]:
        ours = [x for x in check["results"] if x["who"].startswith("burnish")]
        others = [x for x in check["results"] if not x["who"].startswith("burnish") and not x["passes"]]
        text = "; ".join(f"{x['who']}: {x['result']}" for x in others).replace("|", "\\|")
        lines.append(
            f"| {check['title']} ({check['source']}) | {sum(x['passes'] for x in ours)} of {len(ours)} pass | {text} |"
        )
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


def chunkft() -> str:
    file = RESULTS / "chunkft.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    s, pair, base = r["settings"], r["pair"] or {}, r["methods"].get("adamw", {})
    done = {name: m for name, m in r["methods"].items() if "failed" not in m}
    first = next((m["curve"][0]["loss"] for m in done.values() if m["curve"]), None)
    speeds = [x for m in r["methods"].values() for x in m.get("gemm_ms", [])]

    def size(m: dict, key: str) -> str:
        return "" if m.get(key) is None else f"{m[key] / 2**20:.0f}"

    def ratio(m: dict, key: str) -> str:
        return f" ({m['of_adamw'][key]:.2f})" if key in m["of_adamw"] and m is not base else ""

    start = f", on which the model begins at {first:.4f}" if first is not None else ""
    drift = f"A product of 1024 x 1024 matrices between methods: {min(speeds):.1f} to {max(speeds):.1f} ms."
    lines = [
        f"Model `{s['model']}`, fp32, CPU ({r['capability']}), {r['threads']} threads, {_libraries(r['versions'])} "
        f"(`benchmarks/results/chunkft.json`). {s['updates']} updates of {s['batch']} x {s['length']} = "
        f"{s['batch'] * s['length']} tokens of the reasoning-gym tasks {', '.join(r['tasks'])}, the same for all in "
        f"the same order; {s['held_out']} held-out problems{start}. ChunkFT's K: "
        f"{', '.join(f'{k} at N = {n}' for n, k in r['turns'].items())}. "
        + ("The loss is burnish's, fused." if s["fused"] else "The loss is the model's own."),
        "",
        "MiB beside the weights, the store of ChunkFT's chunks at rest apart (host memory on a GPU); seconds of an "
        f"update, median; in brackets the ratio to fused AdamW's. {drift if speeds else ''}",
        "",
    ]
    header = ["", "rate", "peak, tensors", "peak, process", "gradients", "state", "store", "seconds", "first",
              "tokens/s", "held-out loss"]  # fmt: skip
    rows = []
    for m in done.values():
        end = m["curve"][-1] if m["curve"] else None
        early = f" at {m['updates']} updates" if m["updates"] < s["updates"] else ""
        loss = f"{end['loss']:.4f}{early}" if end else ""
        peaks = [size(m, key) + ratio(m, key) for key in ("peak_tensors", "peak_process")]
        rows.append([
            m["label"], f"{m['rate']:g}", *peaks, size(m, "gradients"), size(m, "state"),
            size(m, "store") if m["store"] else "", f"{m['step']:.2f}{ratio(m, 'step')}", f"{m['first_update']:.2f}",
            f"{m['tokens_per_second']:.0f}", loss,
        ])  # fmt: skip
    lines += [*_table(header, rows), ""]
    for m in r["methods"].values():
        if "failed" in m:
            who = f"{m['label']} ({' '.join(filter(None, (m['package'], m.get('version'))))})"
            lines += [f"{who} does not run here: `{m['failed']}`", ""]
    lines += [
        "![held-out loss against tokens and against seconds](chunkft.png)",
        "",
        "| | package | what it is |",
        "|---|---|---|",
        *(f"| {m['label']} | {m['package']} {m.get('version', '')} | {m['about']} |" for m in r["methods"].values()),
        "",
    ]
    if "ratio" in pair:
        lines += [
            f"In turn in one process, {pair['rounds']} updates each, every chunk equally often: ChunkFT (N = 8) takes "
            f"{pair['ratio']:.3f} of fused AdamW's time (ratio of medians; of means {pair['ratio_of_means']:.3f}).",
            "",
        ]
    verdicts = [
        [t["target"], f"{t['figure']:.3f}", f"{t['limit']:g}", "met" if t["met"] else "missed"] for t in r["targets"]
    ]
    return "\n".join(lines + _table(["target", "figure", "limit", ""], verdicts))


def _launches(kernels: dict):
    """("kernel/variant/dtype", counts for each of TARGETS) of compilations, fp16 left out."""
    for name in dict.fromkeys("/".join(name.split("/")[:3]) for name in kernels if "/fp16/" not in name):
        yield name, [kernels[f"{name}/{target}"] for target in TARGETS]


def optimizer_kernels() -> str:
    static, moved = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("static", "ledger"))
    kernels = static["other_kernels"]
    spilled = sum(any(k["spills"]) for k in kernels.values())
    lines = [
        f"{len(kernels)} compilations with triton {static['triton']}, {static['other_threads']} threads, {spilled} "
        "with a spill. Registers a thread; moments fp32 (32) or 8-bit (8); unaligned: rows not beginning at 16 bytes.",
        "",
    ]
    rows = []
    for name, found in _launches(kernels):
        rows.append([
            name.replace("/", ", "), *(str(k["registers"]) for k in found), _each(k["shared"] for k in found),
            _each(k["loads"] for k in found[:3]),
        ])  # fmt: skip
    lines += _table(["kernel, variant, weights", *TARGETS, "shared", "loads, count x bytes (CUDA)"], rows)
    lines += ["", f"Bytes an element, counted in the interpreter over segments of {moved['segments']} elements:", ""]
    table = [[name, f"{k['read']:.2f}", f"{k['written']:.2f}"] for name, k in moved["optimizer"].items()]
    return "\n".join([*lines, *_table(["weights, state", "read", "written"], table)])


def adamw_cpu() -> str:
    file = RESULTS / "adamw_cpu.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    names = {
        "host": "burnish", "host, rounded root": "burnish, exact=False", "fused": "torch, fused=True",
        "single": "torch, foreach=False",
    }  # fmt: skip
    rows = [
        [f"{m['elements']:,}", f"{m['tensors']:,}", names[m["way"]], "yes" if m["bit_equal"] else f"{m['max_ulp']} ulp",
         f"{m['ms']:.3f}", f"{m['of_fused']:.2f}"]
        for m in r["table"]
    ]  # fmt: skip
    about = (
        f"fp32, CPU ({r['capability']}), {r['threads']} threads, torch {r['torch']}, medians of {r['repeats']} rounds "
        "in turn (`python benchmarks/adamw.py`):"
    )
    header = ["elements", "tensors", "", "bits of torch.optim.AdamW(foreach=False)", "ms", "of fused"]
    return "\n".join([about, "", *_table(header, rows)])


def chunkft_memory() -> str:
    r = json.loads((RESULTS / "chunkft_memory.json").read_text())
    header = ["", "parameters", "N", "state", "weights", "gradients", "ring", "activations", "device, peak", "host"]
    gb = ("weights", "gradients", "ring", "activations", "device, peak", "host, states at rest")
    rows = [
        [m["model"], f"{m['parameters'] / 1e9:.3f} B", str(m["chunks"]), m["states"]]
        + [f"{m[k] / 1e9:.2f}" for k in gb]
        for m in r["rows"]
    ]
    about = (
        f"GB, predicted for {r['batch']} x {r['seq']} tokens, {r['dtype']}, non-reentrant checkpointing, the model's "
        "own loss on whole logits (`python benchmarks/chunkft_memory.py`, benchmarks/results/chunkft_memory.json):"
    )
    return "\n".join([about, "", *_table(header, rows)])


def attention_kernels() -> str:
    r = json.loads((RESULTS / "static.json").read_text())
    kernels = r["attention_kernels"]
    spilled = sum(any(k["spills"]) for k in kernels.values())
    lines = [
        f"{len(kernels)} compilations with triton {r['triton']}, {spilled} with a spill (`benchmarks/static.py`): "
        "registers a thread, bytes of shared memory a block. out: out alone; biased: with entropy, lse and a bias.",
        "",
    ]
    rows = []
    for name, found in _launches(kernels):
        rows.append([name.replace("/", ", "), *(str(k["registers"]) for k in found), _each(k["shared"] for k in found)])
    return "\n".join([*lines, *_table(["kernel, variant and head dimension, dtype", *TARGETS, "shared"], rows)])


def rotation_kernels() -> str:
    r = json.loads((RESULTS / "static.json").read_text())
    kernels = r.get("rotation_kernels", {})
    if not kernels:
        return NOT_YET
    spilled = sum(any(k["spills"]) for k in kernels.values())
    about = (
        f"{len(kernels)} compilations with triton {r['triton']}, {spilled} with a spill (`benchmarks/static.py`): "
        "registers a thread, bytes of shared memory a program."
    )
    rows = [
        [name.replace("/", ", "), *(str(k["registers"]) for k in found), _each(k["shared"] for k in found)]
        for name, found in _launches(kernels)
    ]
    return "\n".join([about, "", *_table(["kernel, b, dtype", *TARGETS, "shared"], rows)])


def _tokens() -> dict:
    file = RESULTS / "tokens_cpu.json"
    return json.loads(file.read_text()) if file.exists() else {}


def tokens_layer() -> str:
    r = _tokens()
    if "layer" not in r:
        return NOT_YET
    layer, s = r["layer"], r["layer"]["shape"]
    cases = {"shared": "one list for all", "frame": "a list a frame", "head": "a list a head"}

    def milliseconds(times):
        return f"{median(times) * 1e3:,.0f}"

    rows = []
    for m in layer["rows"]:
        start = [cases[m["case"]], f"{m['keys']:,}" if m["way"] != "dense" else "all", m["way"]]
        if "failed" in m:
            rows.append([*start, "-", f"failed: {m['failed'][:60]}", "-", "-", "-", "-", "-"])
            continue
        both = "both_seconds" in m
        rows.append([
            *start, f"{m['error']:.1e}" if "error" in m else "-", milliseconds(m["seconds"]),
            f"{m['of_dense_by_flops']:.2f}" if "of_dense_by_flops" in m else "1",
            f"{m['useful_flops'] / 1e9:.0f}", f"{m['extra_bytes'] / 2**20:,.0f}",
            milliseconds(m["both_seconds"]) if both else f"failed: {m['both_failed'][:40]}",
            f"{m['both_extra_bytes'] / 2**20:,.0f}" if both else "-",
        ])  # fmt: skip
    h, w = s["grid"]
    about = (
        f"{s['frames']} frames of {5 + h * w} tokens, {s['heads']} heads of 64, {layer['dtype']}, CPU "
        f"({r['capability']}), {r['threads']} threads, torch {r['torch']}; K = {s['count']} frames, stride "
        f"{s['stride']} but for lists a frame, which hold whole frames (`python benchmarks/tokens.py --part layer`). "
        "Error against fp64 over the same keys; x dense: time over (dense time x share of keys); MiB beside the "
        "operands, gradients included."
    )
    header = [
        "lists",
        "keys a query",
        "",
        "error",
        "forward, ms",
        "x dense",
        "GFLOP/s",
        "MiB",
        "and backward, ms",
        "MiB",
    ]
    p = layer["probe"]
    lines = [about, "", *_table(header, rows), "", (
        f"The probe (`attention_entropy`, {p['heads']} heads, {p['queries']} queries, all keys, mass a frame): "
        f"{median(p['seconds']) * 1e3:.1f} ms, {p['of_dense']:.2%} of the dense layer; error {p['error']:.0e} nats."
    ), ""]  # fmt: skip
    verdicts = [
        [t["target"], f"{t['figure']:.3f}", f"{t['limit']:.3g}", "met" if t["met"] else "missed"] for t in r["targets"]
    ]
    return "\n".join(lines + _table(["target", "figure", "limit", ""], verdicts))


def tokens_model() -> str:
    r = _tokens()
    if "model" not in r:
        return NOT_YET
    model = r["model"]
    frames = sorted({m["frames"] for m in model["rows"]})
    rows = []
    for n in frames:
        found = {m["rule"]: m for m in model["rows"] if m["frames"] == n}
        cells = [str(n), f"{median(found['dense']['seconds']):.2f}"]
        for rule in ("published", "adaptive"):
            seconds, modes = median(found[rule]["seconds"]), found[rule]["layers"]
            kinds = "".join(mode[0] for mode in modes)
            ratio = seconds / median(found["dense"]["seconds"])
            cells += [f"{seconds:.2f}", f"{ratio:.2f}", f"{found[rule]['deviation']:.1e}", f"`{kinds}`"]
        rows.append(cells)
    about = (
        f"A mini VGGT with random weights, {model['depth']} frame and {model['depth']} global blocks of width "
        f"{model['dim']}, {model['tokens']} tokens a frame, K = {model['count']}, stride {model['stride']}, fp32, CPU "
        f"({r['capability']}), {r['threads']} threads (`python benchmarks/tokens.py --part model`): seconds a forward "
        "pass, over dense, relative deviation of the last layer's tokens from dense, and what each global layer did "
        "(local, stride, frames)."
    )
    header = ["frames", "dense, s", "published, s", "of dense", "deviation", "layers",
              "adaptive, s", "of dense", "deviation", "layers"]  # fmt: skip
    return "\n".join([about, "", "![seconds over frames](tokens.png)", "", *_table(header, rows)])


def checkpoint() -> str:
    r = json.loads((RESULTS / "post.json").read_text())["checkpoint"]
    rows = []
    copies = [run["seconds"] for m in r["rows"] if m["kind"] == "copy" for run in m["runs"]]
    for m in r["rows"]:
        best = min(run["seconds"] for run in m["runs"])
        rows.append([
            m["kind"], f"{m['seconds']:.2f} s", f"{m['mb_per_second']:.0f}", f"{m['of_copy']:.2f}",
            f"{min(copies) / best:.2f}", f"{m['peak_rss'] / 1e6:.0f} MB",
        ])  # fmt: skip
    about = (
        f"`python benchmarks/post.py`: two bf16 checkpoints of {r['bytes'] / 1e9:.2f} GB in shards, {r['layers']} "
        f"layers, largest tensor {r['largest_tensor'] / 1e6:.0f} MB, threads: {r['threads']}, this machine's disk, "
        f"caches dropped on request, everything flushed; medians of {r['repeats']} (`benchmarks/results/post.json`). "
        f"The machine was shared with other work: a copy took from {min(copies):.2f} to {max(copies):.2f} s."
    )
    header = ["", "time", "MB/s written", "of a copy", f"by the best of {r['repeats']}", "peak RSS, added"]
    return "\n".join([about, "", *_table(header, rows)])


def _from_results(name: str, module: str, function: str):
    """A part that a method's or a script's own function writes from benchmarks/results/<name>.json."""

    def make() -> str:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            return NOT_YET
        return getattr(importlib.import_module(module), function)(json.loads(file.read_text()))

    return make


PARTS = {
    "demo peft-arena": (
        "docs/peft_arena.md", _from_results("demo_peft_arena", "burnish.methods.peft_arena.demo", "markdown"),
    ),
    "demo peft-arena smollm2": (
        "docs/peft_arena.md", _from_results("demo_peft_arena_smollm2", "burnish.methods.peft_arena.demo", "markdown"),
    ),
    "demo axpo": ("docs/axpo.md", _from_results("demo_axpo", "burnish.methods.axpo.demo", "markdown")),
    "axpo run": ("docs/axpo.md", _from_results("axpo_run", "axpo_run", "markdown")),
    "demo q0": ("docs/q0.md", _from_results("demo_q0", "burnish.methods.q0.demo", "table")),
    "demo q0 text": ("docs/q0.md", _from_results("demo_q0", "burnish.methods.q0.demo", "about")),
    "demo ra-rft": ("docs/ra_rft.md", _from_results("demo_ra_rft", "burnish.methods.ra_rft.demo_report", "table")),
    "geometry": ("docs/geometry.md", _from_results("geometry_cpu", "geometry", "table")),
    "demo qk-restore": (
        "docs/qk_restore.md", _from_results("demo_qk_restore", "burnish.methods.qk_restore.demo_report", "table"),
    ),
    "needle": ("docs/qk_restore.md", _from_results("needle", "needle", "markdown")),
    "checkpoint": ("docs/weight_paths.md", checkpoint),
    "maxsim": ("docs/maxsim.md", _from_results("maxsim_cpu", "maxsim", "table")),
    "rotation kernels": ("docs/block_rotation.md", rotation_kernels),
    "oft_cpu": ("docs/block_rotation.md", _from_results("oft_cpu", "oft", "table")),
    "attention kernels": ("docs/selected_attention.md", attention_kernels),
    "tokens layer": ("docs/selected_attention.md", tokens_layer),
    "tokens model": ("docs/tokens.md", tokens_model),
    "optimizer kernels": ("docs/chunkft.md", optimizer_kernels),
    "adamw_cpu": ("docs/chunkft.md", adamw_cpu),
    "chunkft memory": ("docs/chunkft.md", chunkft_memory),
    "chunkft": ("docs/chunkft.md", chunkft),
    "linear_loss_cpu": ("docs/linear_loss.md", linear_loss_cpu),
    "linear_loss_cpu_amx": ("docs/linear_loss.md", linear_loss_cpu_amx),
    "policy_cpu": ("docs/policy.md", policy_cpu),
    "post_prior_cpu": ("docs/ensemble.md", _from_results("post_prior_cpu", "post", "prior_table")),
    "post_chain_cpu_amx": ("docs/ensemble.md", post_chain_cpu_amx),
    "correctness": ("docs/linear_loss.md", correctness),
    "target_sft": ("docs/target_sft.md", target_sft),
    "static": ("docs/kernels.md", static),
    "static peers": ("docs/kernels.md", static_peers),
    "ledger": ("docs/kernels.md", ledger),
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
