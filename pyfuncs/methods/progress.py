"""The Trainer's progress bar with the loss on it."""

from __future__ import annotations

from transformers.trainer_callback import ProgressCallback

from .chunked import find


class LossBar(ProgressCallback):
    """tqdm over optimizer steps; the latest loss, token accuracy and learning rate follow it, and where chunks are
    trained in turn the one that is next, and the cycle, counted from one."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or not logs:
            return
        names = {"loss": "loss", "eval_loss": "eval", "mean_token_accuracy": "acc", "learning_rate": "lr"}
        names |= {"fitness_nll": "fitness", "cycle": "cycle"}
        shown = {short: f"{float(logs[name]):.4g}" for name, short in names.items() if name in logs}
        chunked = find(kwargs.get("optimizer"))
        if chunked is not None:
            shown["chunk"] = f"{chunked.chunk + 1}/{chunked.plan.num_chunks}"
            shown["cycle"] = str(chunked.cycle + 1)
        if shown:
            self.training_bar.set_postfix(shown)


def show_loss(trainer) -> None:
    """Replace a Trainer's progress bar by ``LossBar``, if it has one."""
    if any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks):
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(LossBar)
