"""Where a rollout first calls a tool, in tokens: by text, because a tag need not be one token, nor end with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """The first tool call of a completion of T tokens.

    prefix: tokens up to and including the opening tag, 1 to T.
    end: tokens up to and including the closing tag; where there is none, up to the end of the turn.
    """

    prefix: int
    end: int


def first_call(
    ids: Sequence[int], own: Sequence[int], decode: Callable[[Sequence[int]], str], opening: str, closing: str
) -> Call | None:
    """The first call that the policy itself opens; None where there is none.

    Args:
        ids: (T,) a completion's tokens, observations among them.
        own: (T,) 1 where the policy made the token.  A tag in an observation is no call.
        decode: tokens -> text, special tokens kept.
        opening, closing: the tags.

    A token that holds the tag's end and more belongs to the prefix: the cut is between tokens.
    """
    if len(ids) != len(own):
        raise ValueError(f"{len(ids)} tokens, {len(own)} of a mask")
    start = 0
    while start < len(ids):
        stop = start
        while stop < len(ids) and bool(own[stop]) == bool(own[start]):
            stop += 1
        if own[start]:
            turn = ids[start:stop]
            opened = _reach(turn, decode, opening)
            if opened is not None:
                closed = _reach(turn[opened:], decode, closing)
                return Call(start + opened, stop if closed is None else start + opened + closed)
        start = stop
    return None


def _reach(ids: Sequence[int], decode: Callable[[Sequence[int]], str], tag: str) -> int | None:
    """The fewest first tokens whose text has the tag."""
    if tag not in decode(ids):
        return None
    low, high = 0, len(ids)  # the text of ids[:low] is without it, of ids[:high] with it
    while high - low > 1:
        middle = (low + high) // 2
        if tag in decode(ids[:middle]):
            high = middle
        else:
            low = middle
    return high
