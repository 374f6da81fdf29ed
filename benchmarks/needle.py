"""QK-Restore's diagnostics on a real model: a needle by length and depth, g(tau) with its window, attention's distance.

    python benchmarks/needle.py              # SmolLM2-135M, writes results/needle.json; about 4 minutes on one core

SmolLM2-135M is a pure softmax model, so there is nothing to restore in it: this shows that the diagnostics work on a
model that was not made for them, and what they read there.  The text is Python's own language reference.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

RESULT = Path(__file__).parent / "results" / "needle.json"


def distances(model, tokenizer, length: int, texts: int) -> dict:
    """g(tau), its window and the mean attention distances, over next-token loss on pieces of prose."""
    from burnish.methods.qk_restore import DistanceProbe
    from burnish.methods.qk_restore.needle import prose

    ids = tokenizer(prose()[: 200 * length * texts], return_tensors="pt")["input_ids"][0]
    if len(ids) < length * texts:
        raise ValueError(f"the prose has {len(ids)} tokens, {texts} pieces of {length} were asked for")
    # pieces far apart
    starts = [i * (len(ids) - length) // max(1, texts - 1) for i in range(texts)]
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # a gradient must reach the first layer's scores
    with DistanceProbe(model) as probe:
        for start in starts:
            piece = ids[None, start : start + length]
            model(input_ids=piece, labels=piece).loss.backward()
            model.zero_grad(set_to_none=True)
    profile = probe.profile()
    stops = [stop for stop in (16, 64, 256) if stop < length] + [length]
    windows = {str(stop): profile.window(stop=stop) for stop in stops}
    return {
        "length": length, "texts": texts, "windows": windows, "mean_distance": profile.mean_distance,
        "g": profile.absolute.tolist(), "expected": profile.expected.tolist(),
    }  # fmt: skip


def markdown(result: dict) -> str:
    """The results as benchmarks/docs.py writes them into docs/qk_restore.md."""
    lines = [
        f"{result['model']}, fp32, {result['threads']} thread, torch {result['torch']}, {result['seconds'] / 60:.1f} "
        f"minutes (`python benchmarks/needle.py`). {result['count']} needles a cell, share found in %:",
        "",
        "| task | tokens | " + " | ".join(f"depth {d:.0%}" for d in result["depths"]) + " | mean |",
        "|---" * (len(result["depths"]) + 3) + "|",
    ]
    for task, scores in result["needle"].items():
        for length, row in zip(result["lengths"], scores, strict=True):
            cells = [f"{100 * s:.0f}" for s in (*row, sum(row) / len(row))]
            lines.append(f"| `{task}` | {length} | " + " | ".join(cells) + " |")
    d = result["distances"]
    fits = "; ".join(f"{w:.0f} (r² {r2:.2f}) over distances below {stop}" for stop, (w, r2) in d["windows"].items())
    far = list(d["mean_distance"].values())
    pairs = ", ".join(f"layer {i}: {x:.0f}" for i, x in sorted(d["mean_distance"].items(), key=lambda p: -p[1])[:3])
    g = d["g"]
    at = ", ".join(f"{g[tau] / g[1]:.1e} at {tau}" for tau in (4, 16, 64, 256) if tau < len(g))
    straight = min(r2 for _, r2 in d["windows"].values()) > 0.9
    lines += [
        "",
        f"On {d['texts']} pieces of {d['length']} tokens of prose, next-token loss: g(tau) / g(1) is {at}. W of "
        f"exp(-tau / W), in tokens: {fits}. "
        + ("" if straight else "One exponential does not describe it: W depends on the distances fitted, so compare it "
           "before and after on the same ones. ")
        + f"Mean attention distance by layer from {min(far):.0f} "
        f"to {max(far):.0f} tokens ({pairs}).",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--tasks", nargs="+", default=["single_2", "single_3"])
    parser.add_argument("--count", type=int, default=3, help="needles a cell (3)")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer: a UUID is long (48)")
    parser.add_argument("--text-length", type=int, default=512, help="tokens of a piece of prose for g(tau) (512)")
    parser.add_argument("--texts", type=int, default=4, help="such pieces (4)")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()

    from burnish.methods.models import load_model
    from burnish.methods.qk_restore import needle_accuracy

    torch.manual_seed(0)
    model, tokenizer = load_model(options.model)
    started = time.perf_counter()
    found = {}
    for task in options.tasks:
        grid = needle_accuracy(
            model, tokenizer, options.lengths, options.depths, options.count, task=task, batch_size=options.count,
            max_new_tokens=options.new_tokens, progress=False,
        )  # fmt: skip
        print(f"{task}\n{grid}", flush=True)
        found[task] = grid.scores
    result = {
        "model": "SmolLM2-135M-Instruct" if options.model == "smollm2" else options.model,
        "lengths": options.lengths, "depths": options.depths, "count": options.count, "needle": found,
        "distances": distances(model, tokenizer, options.text_length, options.texts),
        "seconds": time.perf_counter() - started, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    # keys as a reader of the file has them
    result = json.loads(json.dumps(result))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result) + f"\n\nwritten: {options.output}")


if __name__ == "__main__":
    main()
