"""Which decoder layer a tensor belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBERED = re.compile(r"^(.*?\b(?:layers|h|blocks|block|layer))\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Stack:
    """The decoder layers of a checkpoint: ``prefix.INDEX.rest``."""

    prefix: str

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer, the name within it), or None for a tensor outside the stack."""
        if not name.startswith(self.prefix + "."):
            return None
        index, _, rest = name[len(self.prefix) + 1 :].partition(".")
        return (int(index), rest) if index.isdigit() and rest else None

    def layer(self, name: str) -> int | None:
        """The layer's index, from 0; None outside the stack (embeddings, final norm, head)."""
        found = self.split(name)
        return None if found is None else found[0]


def find_stack(names: Iterable[str], count: int | None = None, prefix: str | None = None) -> Stack | None:
    """The stack of decoder layers among tensors' names.

    Args:
        names: of all tensors.
        count: layers that the model's config says it has.  A stack with another number of layers is not the decoder's.
        prefix: which one, where several fit.

    None where nothing is numbered.  ValueError where no stack has ``count`` layers, or several have.
    """
    stacks: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            stacks.setdefault(match[1], set()).add(int(match[2]))
    if prefix is not None:
        if prefix not in stacks:
            raise ValueError(f"stack {prefix!r}: there are {', '.join(sorted(stacks)) or 'none'}")
        return Stack(prefix)
    if not stacks:
        return None
    if count is None:
        # without a config the longest; the text decoder of every model here is longer than its other parts
        longest = max(len(s) for s in stacks.values())
        fit = [p for p, s in stacks.items() if len(s) == longest]
    else:
        fit = [p for p, s in stacks.items() if max(s) == count - 1]
        # layers that predict further tokens are often numbered on after the decoder's
        fit = fit or [p for p, s in stacks.items() if count <= max(s) <= count + 3]
        if not fit:
            found = ", ".join(f"{p} ({max(s) + 1})" for p, s in sorted(stacks.items()))
            raise ValueError(f"the config has {count} layers; the checkpoint has {found}")
    if len(fit) > 1:
        raise ValueError(f"several stacks of as many layers: {', '.join(sorted(fit))}; give stack=")
    return Stack(fit[0])
