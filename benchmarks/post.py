"""Methods that act on whole checkpoints: QK-Restore and a path sweep over a synthetic checkpoint of 1 GB, on this disk.

Writes its section of benchmarks/results/post.json.

    python benchmarks/post.py [--gigabytes 1] [--repeats 3] [--folder DIR]

Two sharded bf16 checkpoints of one hybrid's shape are written, then, each in a process of its own and in turn: a copy
of one (files and directory flushed), QK-Restore of the softmax layers' queries and keys, and the point t = 0.5 of the
additive path over every tensor, both flushed likewise.  Before each the checkpoints are put out of the page cache as
far as the system does so on request.  Seconds count from the first read to the last flush; MB/s are bytes of the
written checkpoint per second, so that the path, which reads two checkpoints, is held to the speed of a copy, which
reads one.  Peak RSS is VmHWM, reset after imports, less the RSS then; the two checkpoints are bigger by far.

    python benchmarks/post.py chain [... the options of linear_loss.py]

Chain distillation (q0) on an LM head, forward and backward, the teacher given as hidden states: fused beside whole
logits in plain torch, compiled and not, beside Liger's chunked loss, and over the bare products, with and without q0's
softcap; measured as benchmarks/linear_loss.py measures losses.  Writes benchmarks/results/post_chain_<device>.json.

    python benchmarks/post.py prior

Weights of 480 synthetic members (five families, members of different quality) on 131,072 tokens, the authors' sizes: EM
with Newton steps, plain EM for as many passes as the authors' AdamW takes, and that.  Writes
benchmarks/results/post_prior_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RESULT = Path(__file__).parent / "results" / "post.json"
HIDDEN, INNER, KV, VOCABULARY = 2048, 5632, 512, 32000
LAYER_MB = 2 * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * INNER * HIDDEN) / 1e6
SHARD_MB = 256
KINDS = ("copy", "qk-restore", "path t=0.5")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    out = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {at + f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qo"}
        out |= {at + f"self_attn.{n}_proj.weight": (KV, HIDDEN) for n in "kv"}
        out |= {at + f"mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        out |= {at + "mlp.down_proj.weight": (HIDDEN, INNER), at + "input_layernorm.weight": (HIDDEN,)}
    return out


def config(layers: int) -> dict:
    return {
        "model_type": "hypenet", "num_hidden_layers": layers, "hidden_size": HIDDEN, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128,
        "mixer_types": ["attn" if i % 4 == 1 else "lightning-attn" for i in range(layers)],
    }  # fmt: skip


def write(folder: Path, layers: int, seed: int) -> None:
    """One checkpoint, a shard in memory at a time."""
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    groups: list[list[str]] = [[]]
    table = shapes(layers)
    size = 0.0
    for name, shape in table.items():
        mb = 2 * torch.Size(shape).numel() / 1e6
        if groups[-1] and size + mb > SHARD_MB:
            groups.append([])
            size = 0.0
        groups[-1].append(name)
        size += mb
    place = {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = {n: torch.empty(table[n]).uniform_(-0.05, 0.05, generator=generator).bfloat16() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
        sync(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config(layers)))


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def forget(folder: Path) -> None:
    """Ask for a folder's files to leave the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def reset_peak() -> int:
    """Forget this process's peak; the bytes that it begins with.  Not VmRSS, which counts a little otherwise."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmHWM")


def child(kind: str, pre: Path, post: Path, out: Path) -> dict:
    from burnish.methods.qk_restore import restore
    from burnish.paths import Additive, save

    before, begin = reset_peak(), time.perf_counter()
    changed = 0
    if kind == "copy":
        out.mkdir()
        for source in post.iterdir():
            shutil.copyfile(source, out / source.name)
            sync(out / source.name)
        sync(out)
        sync(out.parent)
    elif kind == "qk-restore":
        changed = restore(pre, post, out).bytes_changed
    else:
        changed = save(Additive(pre, post), 0.5, out).computed_bytes
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_rss": status("VmHWM") - before, "bytes_changed": changed}


def measure(options: argparse.Namespace, root: Path) -> dict:
    layers = max(2, round((options.gigabytes * 1000 - 2 * VOCABULARY * HIDDEN / 1e6) / LAYER_MB))
    pre, post = root / "pre", root / "post"
    write(pre, layers, 0)
    write(post, layers, 1)
    size = sum(p.stat().st_size for p in post.glob("*.safetensors"))
    largest = max(2 * torch.Size(s).numel() for s in shapes(layers).values())
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for repeat in range(options.repeats):
        for kind in KINDS[repeat % 3 :] + KINDS[: repeat % 3]:
            forget(pre)
            forget(post)
            command = [sys.executable, __file__, "--child", kind, str(pre), str(post), str(root / "out")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found[kind].append({**row, "mb_per_second": size / 1e6 / row["seconds"]})
            shutil.rmtree(root / "out")
            print(f"{kind:<12} {row['seconds']:6.2f} s {size / 1e6 / row['seconds']:7.0f} MB/s, "
                  f"peak RSS + {row['peak_rss'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    copy = sorted(r["mb_per_second"] for r in found["copy"])[len(found["copy"]) // 2]
    rows = []
    for kind, runs in found.items():
        middle = sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
        rows.append({"kind": kind, **middle, "of_copy": middle["mb_per_second"] / copy,
                     "peak_rss": max(r["peak_rss"] for r in runs), "runs": runs})  # fmt: skip
    return {"bytes": size, "largest_tensor": largest, "layers": layers, "repeats": options.repeats,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}  # fmt: skip


def chain() -> None:
    from linear_loss import SHAPES, parse, run
    from peers import CHAIN

    run(parse("Chain distillation on an LM head, fused beside materialised.", CHAIN, CHAIN, SHAPES[:2]), "post_chain")


def prior(members: int = 480, tokens: int = 131072) -> None:
    from burnish.methods.q0.prior import ADAMW_STEPS, effective_size, learn_prior

    g = torch.Generator().manual_seed(0)
    text, family = 1.5 * torch.randn(tokens, generator=g) - 3, 0.5 * torch.randn(5, tokens, generator=g)
    quality = torch.linspace(-0.3, 0, members)[torch.randperm(members, generator=g)]
    log_probs = torch.empty(members, tokens)
    for i in range(members):
        own = 0.5 * torch.randn(tokens, generator=g)
        log_probs[i] = (text + family[i % 5] + own + quality[i]).clamp_(max=-1e-4)
    ways: dict[str, dict] = {"EM and Newton steps": {}, "EM": {"newton": False, "max_steps": ADAMW_STEPS},
                             "the authors' AdamW": {"method": "adamw"}}  # fmt: skip
    rows = []
    for name, options in ways.items():
        before, begin = reset_peak(), time.perf_counter()
        found = learn_prior(log_probs, **options)
        rows.append({
            "way": name, "seconds": time.perf_counter() - begin, "passes": found.steps, "nll": found.nll,
            "gap": found.gap, "members": int((found.weights > 0).sum()), "effective": effective_size(found.weights),
            "peak_rss": status("VmHWM") - before,
        })  # fmt: skip
        print(rows[-1], flush=True)
    result = {"members": members, "tokens": tokens, "bytes": log_probs.nbytes, "rows": rows,
              "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    (RESULT.parent / "post_prior_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


def prior_table(result: dict) -> str:
    """Markdown of results/post_prior_cpu.json."""
    size = f"{result['bytes'] / 2**20:.0f} MiB of fp32"
    head = (
        f"{result['members']} synthetic members, {result['tokens']:,} tokens, {size}, {result['threads']} threads, "
        f"torch {result['torch']} (`python benchmarks/post.py prior`):"
    )
    names = ("", "s", "passes", "NLL, nats", "bound on what is left", "weights > 0", "effective", "MiB beside")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for r in result["rows"]:
        lines.append(
            f"| {r['way']} | {r['seconds']:.1f} | {r['passes']} | {r['nll']:.6f} | {r['gap']:.0e} | {r['members']} | "
            f"{r['effective']:.1f} | {r['peak_rss'] / 2**20:.0f} |"
        )
    return "\n".join([head, "", *lines])


def main() -> None:
    parts = {"chain": chain, "prior": prior}
    if sys.argv[1:2] and sys.argv[1] in parts:
        parts[sys.argv.pop(1)]()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; by default beside the results")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *folders = options.child
        print(json.dumps(child(kind, *map(Path, folders))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder or RESULT.parent, prefix="post-") as root:
        section = measure(options, Path(root))
    for row in section["rows"]:
        print(f"{row['kind']:<12} {row['mb_per_second']:7.0f} MB/s, {row['of_copy']:.2f} of a copy, "
              f"peak RSS + {row['peak_rss'] / 1e6:.0f} MB (two of the largest tensor: "
              f"{2 * section['largest_tensor'] / 1e6:.0f} MB)")  # fmt: skip
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    result["checkpoint"] = section
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
