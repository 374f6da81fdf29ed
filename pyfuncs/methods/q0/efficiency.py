"""Data efficiency: how many more tokens one pass of a strong baseline would need for the same loss.

The rule of the slowrun leaderboard (q0, arXiv 2606.03938): the baseline's best validation loss for each number of
tokens, joined by straight lines; a run that reaches loss l on T tokens is worth x = tokens(l) / T.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

#: (tokens, best validation loss in nats a token) of nanochat on FineWeb.
SLOWRUN = ((200e6, 3.703), (400e6, 3.370), (600e6, 3.200), (800e6, 3.123), (1e9, 3.046), (2e9, 2.892))


def equivalent_tokens(loss: float, table: Sequence[tuple[float, float]] = SLOWRUN) -> float:
    """Tokens at which the baseline's line reaches ``loss`` (nats a token).

    ValueError outside the table's losses: a line beyond its ends would be a guess; or for a table that is not of at
    least two points with rising tokens and falling losses.
    """
    if len(table) < 2 or any(a[0] >= b[0] or a[1] <= b[1] for a, b in itertools.pairwise(table)):
        raise ValueError(f"table must be two points or more, tokens rising and losses falling; got {list(table)}")
    if not table[-1][1] <= loss <= table[0][1]:
        raise ValueError(f"loss must lie in the table's [{table[-1][1]:g}, {table[0][1]:g}]; got {loss:g}")
    for (tokens, high), (more, low) in itertools.pairwise(table):
        if loss >= low:
            return tokens + (more - tokens) * (high - loss) / (high - low)
    raise AssertionError


def data_efficiency(loss: float, tokens: float = 100e6, table: Sequence[tuple[float, float]] = SLOWRUN) -> float:
    """How many times the run's own ``tokens`` the baseline needs for ``loss``: 3.003 on 100M tokens is 12.8.

    The loss must be of the table's text and tokenizer: the numbers of another corpus mean nothing here.
    """
    if not tokens > 0:
        raise ValueError(f"tokens must be > 0; got {tokens}")
    return equivalent_tokens(loss, table) / tokens
