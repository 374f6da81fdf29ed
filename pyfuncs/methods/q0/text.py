"""Texts and tokenizers to begin with: files read as documents, a byte tokenizer, a small BPE of the text itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import jsonl_rows

EOS = "<eos>"
_OWN = re.compile(r"bytes|bpe:\d+")


def read_texts(source: str, pattern: str = "*.py", option: str = "data") -> list[Any]:
    """The documents of a file or a folder: strings, or token ids where a JSONL file has them.

    Args:
        source: FILE.jsonl, each row with ``text`` or each with ``input_ids``; any other file, which is one document; or
            a folder, each file below it that matches ``pattern`` a document, sorted by path.
        option: what errors call it.

    ValueError, in one line, for what is not there, not UTF-8, or empty.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob(pattern) if p.is_file())
        if not files:
            raise ValueError(f"{option} {source}: no file below it matches {pattern}")
        texts = [_read(p, option) for p in files]
        texts = [t for t in texts if t]
        if not texts:
            raise ValueError(f"{option} {source}: every file that matches {pattern} is empty")
        return texts
    if path.suffix == ".jsonl":
        out: list = []
        for where, row in jsonl_rows(source, option):
            kind = "text" if "text" in row else "input_ids"
            value = row.get(kind)
            if kind == "text" and (not isinstance(value, str) or not value):
                raise ValueError(f"{where}: text must be a string that is not empty")
            if kind == "input_ids" and (
                not isinstance(value, list) or not value or not all(type(x) is int and x >= 0 for x in value)
            ):
                raise ValueError(f"{where}: a row needs text, or input_ids, a list of whole numbers")
            if out and isinstance(out[0], str) != (kind == "text"):
                raise ValueError(f"{where}: this row has {kind}, the rows before it do not")
            out.append(value)
        return out
    if not path.is_file():
        raise ValueError(f"{option} {source}: no such file or folder")
    text = _read(path, option)
    if not text:
        raise ValueError(f"{option} {source}: is empty")
    return [text]


def is_own(name: str) -> bool:
    """Whether ``make_tokenizer`` makes it: "bytes" or "bpe:SIZE"."""
    return bool(_OWN.fullmatch(name))


def make_tokenizer(name: str, texts: Iterable[str]):
    """ "bytes", one token a byte; or "bpe:SIZE", a byte-level BPE of that many tokens, trained on ``texts``.

    Both can write any text, and end a document with <eos>, which is the last token of the alphabet and pads too.
    ValueError for a size that does not hold the 256 bytes and <eos>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = 257 if name == "bytes" else int(name.removeprefix("bpe:"))
    if size < 257:
        raise ValueError(f"tokenizer {name}: at least 257 tokens are needed, the bytes and {EOS}")
    if name == "bytes":
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.add_special_tokens([EOS])
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(texts, trainer)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)


def tokenized(documents: Sequence[Any], tokenizer, option: str = "data") -> list[np.ndarray]:
    """Token ids of each document with the tokenizer's end of sequence behind it; ids as they are.

    ValueError for ids outside the vocabulary.
    """
    if isinstance(documents[0], str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(x + end, dtype=np.int32) for x in ids]
    for i, x in enumerate(documents):
        if max(x) >= len(tokenizer):
            raise ValueError(f"{option}, row {i}: token {max(x)} is outside the vocabulary of {len(tokenizer)}")
    return [np.asarray(x, dtype=np.int32) for x in documents]


def _read(path: Path, option: str) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path}: not UTF-8") from None
