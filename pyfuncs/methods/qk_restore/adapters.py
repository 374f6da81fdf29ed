"""QK-Restore for adapters: a LoRA or OFT checkpoint without its share in the queries and keys of the softmax layers.

For a merged model QK-Restore is the same thing; on the adapter it is exact, small, and needs the base model's headers
only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ...paths import Adapter, Checkpoint, Selector, atomic_directory, read_adapter
from ...paths.adapters import LoRAScale, OFTGenerator, _AdapterPath
from ...paths.blend import parts
from ...paths.save import copy_side_files
from .options import QKRestoreOptions
from .restore import select


@dataclass(frozen=True)
class Dropped:
    """``tensors``: the adapter's tensors that were set to nothing, with the share of each that was."""

    tensors: dict[str, float]
    kept: int
    out: str | None = None

    def __str__(self) -> str:
        lines = [f"{share:>7.1%}  {name}" for name, share in self.tensors.items()]
        lines.append(f"{len(self.tensors)} tensors dropped, {self.kept} kept")
        lines.append(f"written: {self.out}" if self.out else "dry run: nothing written")
        return "\n".join(lines)


def dropped(base, adapter: Adapter, selector: Selector) -> dict[str, torch.Tensor]:
    """The adapter's tensors that change when it is taken out of what ``selector`` selects of the base model.

    LoRA: the selected rows of B are zero, so that fused and gated projections keep the rest.  OFT: the generator is
    zero; it acts on a projection's input, so that a part of its rows cannot be taken out.  Trained biases go back to
    the base model's.

    ValueError for other adapters, and where ``LoRAScale`` or ``OFTGenerator`` refuses one.
    """
    kinds: dict[str, type[_AdapterPath]] = {"LORA": LoRAScale, "OFT": OFTGenerator}
    if adapter.kind not in kinds:
        raise ValueError(f"a {adapter.kind} adapter cannot be dropped in part: merge, then restore the merged model")
    path = kinds[adapter.kind](base, adapter, selector)
    out = {}
    for name, selection in selector.items():
        if name in path.full:
            own, old = adapter.tensors.tensor(path.full[name]), path.template.tensor(name)
            for x, y in zip(parts(own, selection), parts(old, selection), strict=True):
                x.copy_(y)
            out[path.full[name]] = own
        elif name in path.modules and adapter.kind == "OFT":
            if selection.ranges is not None:
                raise ValueError(f"{name}: an OFT adapter of a fused projection cannot be dropped in part")
            key = path.modules[name]["oft_R"]
            out[key] = torch.zeros_like(adapter.tensors.tensor(key))
        elif name in path.modules:
            key = path.modules[name]["lora_B"]
            own = adapter.tensors.tensor(key)
            # B's rows are the projection's outputs however the weight itself is stored
            for start, end in selection.ranges or ((0, len(own)),):
                own[start:end] = 0
            out[key] = own
    return out


def drop_adapters(
    base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike | None = None,
    options: QKRestoreOptions | None = None,
) -> Dropped:  # fmt: skip
    """Write an adapter without its share in the queries and keys of the softmax layers.

    Args:
        base: the base model's directory: its config says which layers, its headers which projections.
        adapter: the adapter's directory.
        out: the new adapter's directory, which appears whole; None is a dry run.
        options: layers, parts and flags; ``alpha`` must be 1 and ``mode`` "restore".

    The tensors stay in the file, as zeros, so that every PEFT version loads it without complaint.
    ValueError where nothing of the adapter is in what is selected.
    """
    options = (options or QKRestoreOptions()).check()
    if options.alpha != 1 or options.mode != "restore":
        raise ValueError("adapters are dropped whole: alpha must be 1 and mode 'restore'")
    model = Checkpoint(base)
    loaded = read_adapter(adapter)
    changes = dropped(model, loaded, select(model, model.config(), options))
    if not changes:
        raise ValueError(f"{adapter}: the adapter trains nothing of {'+'.join(options.parts)} in the softmax layers")
    shares = {name: float((x == 0).double().mean()) for name, x in changes.items()}
    kept = sum(1 for _ in loaded.tensors) - len(changes)
    result = Dropped(shares, kept, None if out is None else str(out))
    if out is not None:
        _write(changes, adapter, out)
    return result


def _write(changes: dict[str, torch.Tensor], source: str | os.PathLike, out: str | os.PathLike) -> None:
    from safetensors.torch import save_file

    checkpoint = Checkpoint(source, "adapter_model")
    with atomic_directory(out, checkpoint.size) as folder:
        copy_side_files(checkpoint.folder, folder, set(checkpoint.files))
        # adapters are small: whole in memory
        whole = {name: changes[name] if name in changes else checkpoint.tensor(name) for name in checkpoint}
        save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
