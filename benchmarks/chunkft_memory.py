"""What ChunkFT takes on models that nobody can try here: predictions on the meta device.

Writes benchmarks/results/chunkft_memory.json.

    python benchmarks/chunkft_memory.py [--models llama-2-7b ...]

Shapes of the real models, one row of 1024 tokens, bf16, non-reentrant checkpointing, the model's own loss on whole
logits.  Predictions (burnish.chunkft.memory; held to measured peaks in tests/chunkft/test_memory.py), not measurements.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from burnish.chunkft import plan

RESULT = Path(__file__).parent / "results" / "chunkft_memory.json"
#: hidden, intermediate, layers, heads, key-value heads, vocabulary.
MODELS = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
}
CHUNKS = (32, 128)
STATES: dict[str, dict] = {
    "fp32 moments, fp32 masters": {},
    "8-bit moments, stochastic rounding": {"moments": "8bit", "low_precision": "stochastic"},
}
BATCH, SEQ = 1, 1024


def model(name: str) -> LlamaForCausalLM:
    hidden, inner, layers, heads, shared, vocabulary = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def rows(name: str) -> list[dict]:
    net, out = model(name), []
    for chunks in CHUNKS:
        cut = plan(net, chunks)
        for state, options in STATES.items():
            guess = cut.predict_memory(net, batch=BATCH, seq=SEQ, checkpointing=True, **options)
            out.append({
                "model": name, "parameters": sum(p.numel() for p in net.parameters()), "chunks": chunks,
                "states": state, "spread": cut.spread, **guess.rows(),
            })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.set_verbosity_error()
    begin, found = time.monotonic(), []
    for name in options.models:
        found += rows(name)
        for r in found[-len(CHUNKS) * len(STATES) :]:
            print(f"{name} N={r['chunks']} {r['states']}: device {r['device, peak'] / 1e9:.2f} GB, "
                  f"host {r['host, states at rest'] / 1e9:.1f} GB", flush=True)  # fmt: skip
    result = {"batch": BATCH, "seq": SEQ, "dtype": "bfloat16", "torch": torch.__version__, "rows": found}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written in {time.monotonic() - begin:.0f} s: {options.output}")


if __name__ == "__main__":
    main()
