"""Paths through adapter space: the scale of a LoRA, the generator of an OFT rotation (HF PEFT's formats).

PEFT-Arena (arXiv 2605.28819) rewinds a finished run along such a path; HF PEFT can scale LoRA and cannot scale OFT.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.rotation import block_size, skew
from .blend import BLOCK, blend_, working
from .path import WeightPath
from .selectors import Selection, Selector
from .tensors import Checkpoint, StateDict, Tensors, as_tensors, read_json

_PREFIX = "base_model.model."
#: Initialisations of LoRA that change the base weights too: W0 + s B A is then of another W0.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "milora", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """One HF PEFT adapter: ``config`` as in ``adapter_config.json``, ``tensors`` named as in
    ``adapter_model.safetensors``."""

    config: Mapping[str, Any]
    tensors: Tensors

    @property
    def kind(self) -> str:
        """ "LORA", "OFT", ..."""
        return str(self.config.get("peft_type", "")).rsplit(".", 1)[-1].upper()


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """An adapter's directory.  ValueError where it is none."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no adapter_config.json")
    return Adapter(read_json(path), Checkpoint(folder, "adapter_model"))


def split_model(model, adapter_name: str = "default") -> tuple[StateDict, Adapter]:
    """(base tensors, adapter) of a ``peft.PeftModel`` in memory, sharing its storage.

    ValueError where the base weights are no longer in the model: the adapter is merged, or its run trained biases.
    """
    from peft import get_peft_model_state_dict

    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter {adapter_name!r}: the model has {', '.join(model.peft_config)}")
    if any(getattr(m, "merged_adapters", None) for m in model.modules()):
        raise ValueError("the adapter is merged into the model: unmerge it first")
    if getattr(model.peft_config[adapter_name], "bias", "none") != "none":
        raise ValueError("the run trained the model's own biases: give the base model's tensors and the adapter")
    base = {}
    for name, x in model.get_base_model().state_dict().items():
        parts = name.split(".")
        if any(p.startswith(("lora_", "oft_")) or p == "modules_to_save" for p in parts):
            continue
        base[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = x
    config = model.peft_config[adapter_name].to_dict()
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    return StateDict(base), Adapter(config, StateDict(get_peft_model_state_dict(model, adapter_name=adapter_name)))


class _AdapterPath(WeightPath):
    """The base model's tensors, moved by an adapter.  What the adapter's run trained whole (``modules_to_save``,
    biases) is interpolated as ``Additive`` does."""

    kind = ""

    def __init__(self, base, adapter: Adapter | str | os.PathLike, selector: Selector | None = None, layers=None):
        self.adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        if self.adapter.kind != self.kind:
            raise ValueError(
                f"{type(self).__name__} needs a {self.kind} adapter; got {self.adapter.kind or 'no peft_type'}: other "
                "methods are paths between the base model and the merged one (Additive)"
            )
        super().__init__(as_tensors(base), selector, layers)
        self.modules: dict[str, dict[str, str]] = {}
        self.full: dict[str, str] = {}
        for name in self.adapter.tensors:
            inner = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            module, part = self._parse(inner)
            if part is not None:
                if f"{module}.weight" not in self.template:
                    raise ValueError(f"{name}: the base model has no tensor {module}.weight")
                self.modules.setdefault(f"{module}.weight", {})[part] = name
            elif inner in self.template and self.template.shape(inner) == self.adapter.tensors.shape(name):
                self.full[inner] = name
            else:
                raise ValueError(f"{name}: not part of a {self.kind} adapter, and the base model has no such tensor")

    @classmethod
    def of(cls, model, adapter_name: str = "default", selector: Selector | None = None):
        """The path of a ``peft.PeftModel`` in memory; see ``split_model``."""
        base, adapter = split_model(model, adapter_name)
        return cls(base, adapter, selector)

    def _parse(self, inner: str) -> tuple[str, str | None]:
        """(module, part of the adapter) of an adapter's tensor; part None where it is another tensor."""
        raise NotImplementedError

    def _apply(self, name: str, weight: torch.Tensor, t: float) -> torch.Tensor:
        """``weight`` with the module's adapter at t, in place."""
        raise NotImplementedError

    def _point(self, name: str, t: float) -> torch.Tensor:
        weight = self.template.tensor(name)
        if t == 0:
            return weight
        if name in self.full:
            weight = blend_(self.adapter.tensors.tensor(self.full[name]).to(weight.dtype), weight, t, Selection())
        return self._apply(name, weight, t) if name in self.modules else weight

    def _kept(self, name: str, t: float) -> bool:
        return t == 0 or not (name in self.modules or name in self.full)


class LoRAScale(_AdapterPath):
    """theta(t) = W0 + t s B A, s the adapter's own scale: the WiSE-FT line, without a merged model.

    Args:
        base: the base model (a directory, module or state dict).
        adapter: its LoRA adapter (a directory, or ``Adapter``).
        selector: what moves; elsewhere the adapter counts in full.

    Computed in fp32, a block of rows at a time, and rounded once.  ValueError for DoRA and for initialisations that
    change W0 (PiSSA, OLoRA, ...): their path is ``Additive`` between the base model and the merged one.
    """

    kind = "LORA"

    def __init__(self, base, adapter, selector: Selector | None = None, layers: int | None = None):
        super().__init__(base, adapter, selector, layers)
        config = self.adapter.config
        start = config.get("init_lora_weights")
        if config.get("use_dora") or config.get("lora_bias"):
            raise ValueError("LoRAScale: DoRA and LoRA biases are no scale of B A: use Additive on merged weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ValueError(f"LoRAScale: init_lora_weights={start!r} changed the base: use Additive on merged weights")
        for name, parts in self.modules.items():
            if parts.keys() not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
                raise ValueError(f"{name}: the adapter has only {', '.join(sorted(parts))}")
            out, into = (self.adapter.tensors.shape(parts[p]) for p in sorted(parts, reverse=True))
            if len(out) != 2 or sorted((out[0], into[1])) != sorted(self.template.shape(name)):
                raise ValueError(f"{name}: shape {self.template.shape(name)}; LoRA of {into} and {out}")

    def _parse(self, inner: str) -> tuple[str, str | None]:
        match = re.match(r"^(.*)\.(lora_(?:embedding_)?[AB])(?:\.weight)?$", inner)
        if match:
            return match[1], match[2]
        if ".lora_" in inner:
            raise ValueError(f"LoRAScale: {inner} is not a factor of B A")
        return inner, None

    def scale(self, name: str) -> float:
        """s of a weight: lora_alpha / r, or / sqrt(r) where the adapter says so."""
        config, module = self.adapter.config, name.removesuffix(".weight")
        alpha = config.get("lora_alpha", 1)
        for key, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                alpha = value
                break
        parts = self.modules[name]
        rank = self.adapter.tensors.shape(parts.get("lora_A") or parts["lora_embedding_A"])[0]
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def _apply(self, name: str, weight: torch.Tensor, t: float) -> torch.Tensor:
        parts = self.modules[name]
        dtype = working(weight.dtype)
        a, b = (self.adapter.tensors.tensor(parts[p]).to(dtype) for p in sorted(parts))
        if "lora_embedding_A" in parts or self.adapter.config.get("fan_in_fan_out"):
            a, b = b.t(), a.t()
        step = max(1, BLOCK // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            rows.copy_(rows.to(dtype, copy=True).addmm_(b[start : start + step], a, alpha=t * self.scale(name)))
        return weight


class OFTGenerator(_AdapterPath):
    """theta(t) = W0 R(t^power Q)^T: the skew generator is scaled, so that every point is a rotation of W0.

    W0 + t (W_ft - W0) is not one.  Distances differ between the two (and between powers): at t = 0.3 the generator path
    with power 1/2 has gone 0.55 to 0.72 of the way, the line 0.3.  Compare points by distance or by outcome, not by t.

    Args:
        base: the base model (a directory, module or state dict).
        adapter: its OFT adapter (a directory, or ``Adapter``), Cayley-Neumann or exact Cayley as its config says.
        selector: what moves; elsewhere the adapter counts in full.
        power: 1/2 in PEFT-Arena (arXiv 2605.28819).

    ValueError for constrained OFT and for convolutions.
    """

    kind = "OFT"

    def __init__(self, base, adapter, selector: Selector | None = None, layers: int | None = None, power: float = 0.5):
        super().__init__(base, adapter, selector, layers)
        if not power > 0:
            raise ValueError(f"power must be > 0; got {power}")
        if self.adapter.config.get("coft"):
            raise ValueError("OFTGenerator: constrained OFT projects its generator: use Additive on merged weights")
        self.power = power
        for name, parts in self.modules.items():
            shape, (blocks, elements) = self.template.shape(name), self.adapter.tensors.shape(parts["oft_R"])
            size = (1 + math.isqrt(1 + 8 * elements)) // 2
            fits = shape[-1] % size == 0 if self.adapter.config.get("block_share") else shape[-1] == blocks * size
            if len(shape) != 2 or not fits or self.adapter.config.get("fan_in_fan_out"):
                raise ValueError(f"{name}: shape {shape}; {blocks} rotations of {size}")

    def _parse(self, inner: str) -> tuple[str, str | None]:
        match = re.match(r"^(.*)\.oft_R\.weight$", inner)
        return (match[1], "oft_R") if match else (inner, None)

    def generator(self, name: str) -> torch.Tensor:
        """The skew matrices Q of a weight's blocks, (blocks, b, b) in fp32 (fp64 where the adapter is)."""
        flat = self.adapter.tensors.tensor(self.modules[name]["oft_R"])
        return skew(flat, block_size(flat.shape[1]), working(flat.dtype))

    def rotation(self, name: str, t: float = 1.0) -> torch.Tensor:
        """R at t, (blocks, b, b)."""
        config = self.adapter.config
        q = self.generator(name) * t**self.power
        one = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)
        if not config.get("use_cayley_neumann", True):
            return torch.linalg.solve(one + q, one - q, left=False)
        return cayley_neumann(q, config.get("num_cayley_neumann_terms", 5))

    def strength(self) -> dict[str, float]:
        """Mean over blocks of ||Q||_F / sqrt(b), weight by weight: how far each is rotated."""
        out = {}
        for name in self.modules:
            q = self.generator(name)
            out[name] = float(q.flatten(1).norm(dim=1).mean() / math.sqrt(q.shape[-1]))
        return out

    def _apply(self, name: str, weight: torch.Tensor, t: float) -> torch.Tensor:
        dtype = working(weight.dtype)
        r = self.rotation(name, t).to(dtype).transpose(1, 2).contiguous()
        size = r.shape[-1]
        step = max(1, BLOCK // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            cut = rows.to(dtype).reshape(len(rows), -1, size).transpose(0, 1)
            rows.copy_(torch.matmul(cut, r).transpose(0, 1).reshape(rows.shape))
        return weight


def cayley_neumann(q: torch.Tensor, terms: int = 5) -> torch.Tensor:
    """I + 2Q + ... + 2Q^(n-2) + Q^(n-1), HF PEFT's truncation of (I + Q)(I - Q)^-1; its 3 and 4 terms are one
    polynomial.

    With 5 terms it is (I + Q)^2 (I + Q^2), with singular values |1 - theta^4| for eigenvalues +-i theta of Q.
    """
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q).clone()
    if terms < 2:
        return one
    if terms == 2:
        return one + 2 * q
    out, power = one + 2 * q, q
    for _ in range(max(terms, 4) - 3):
        power = power @ q
        out += 2 * power
    return out + power @ q


def equalised(
    strength: Mapping[int | None, float], t: float, reference: float, power: float = 0.5
) -> dict[int | None, float]:
    """A t for each layer so that generators stronger than ``reference`` are held at it: layer-wise rewinding.

    The generator of layer l is scaled by min(1, reference / strength_l) and by t^power.  PEFT-Arena's MinScale has the
    least strength of all layers as its reference, SafeScale the mean of the first five's; its own definition of a
    layer's strength is not published, this is the project's.
    """
    return {layer: t * min(1.0, reference / s) ** (1 / power) if s > 0 else t for layer, s in strength.items()}
