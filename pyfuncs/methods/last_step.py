"""No step beyond the last one, whichever checkpoint a run is resumed from."""

from __future__ import annotations

from typing import Any


class NoStepBeyondTheLast:
    """Mixin, before a ``transformers.Trainer``: a run resumed from the checkpoint of its last step trains no more.

    transformers 5.24 looks at ``max_steps`` behind a step only, so from a checkpoint in the middle of an epoch it
    would take one more.
    """

    state: Any
    control: Any

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
