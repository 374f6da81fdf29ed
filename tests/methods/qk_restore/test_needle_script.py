"""benchmarks/needle.py with a model that takes seconds: its file, its table, and the table that docs.py makes of it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_needle_script(monkeypatch, tmp_path, capsys):
    import tiny_models

    from burnish.methods import models

    tokenizer = tiny_models.tokenizer()
    net = tiny_models.llama(vocabulary=len(tokenizer))
    monkeypatch.setattr(models, "load_model", lambda name: (net, tokenizer))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("needle")
    out = tmp_path / "needle.json"
    sizes = {"lengths": 600, "depths": 0.5, "count": 2, "new-tokens": 2, "text-length": 80, "texts": 2, "output": out}
    command = [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["needle.py", *command, "--tasks", "single_1"])
    script.main()
    result = json.loads(out.read_text())
    assert result["needle"] == {"single_1": [[0.0]]} and len(result["distances"]["g"]) == 80
    assert set(result["distances"]["windows"]) == {"16", "64", "80"}
    assert set(result["distances"]["mean_distance"]) == {str(i) for i in range(net.config.num_hidden_layers)}
    docs = importlib.import_module("docs")
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    made = docs.PARTS["needle"][1]()
    assert made == script.markdown(result) and made in capsys.readouterr().out
    assert "| `single_1` | 600 | 0 | 0 |" in made
    for name in ("needle", "docs"):
        sys.modules.pop(name)


def test_prose_that_is_too_short_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("needle")
    sys.modules.pop("needle")

    class Tokens:
        def __call__(self, text, return_tensors):
            import torch

            return {"input_ids": torch.zeros(1, 10, dtype=torch.long)}

    with pytest.raises(ValueError, match="has 10 tokens, 2 pieces of 8"):
        script.distances(None, Tokens(), 8, 2)
