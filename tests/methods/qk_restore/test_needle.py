"""The needle's prompts and its scores, with SmolLM2's own tokenizer."""

import re

import pytest
import torch

from burnish.methods.qk_restore import needle_accuracy, needles
from burnish.methods.qk_restore.needle import prose


@pytest.fixture(scope="module")
def tokenizer():
    import tiny_models

    return tiny_models.tokenizer()


@pytest.mark.parametrize("task", ["single_1", "single_2", "single_3"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompts_fill_the_length_and_hide_one_needle(tokenizer, task, depth):
    for entry in needles(tokenizer, 3000, depth, 4, task=task, reserve=100):
        text = entry["question"]
        size = len(tokenizer(text)["input_ids"])
        assert size == entry["length"] <= 2900
        assert size > (2800 if task == "single_1" else 1000)  # a sentence more would not fit
        assert text.count(entry["answer"]) == 1 and text.count(entry["key"]) == 3
        body = text.split("afterwards.\n")[1].split("\nWhat is the special")[0]
        where = body.index("One of the special magic") / len(body)
        assert abs(where - depth) < (0.1 if task == "single_1" else 0.4)
        if depth in (0.0, 1.0):
            assert body.startswith("One of the") if depth == 0 else body.endswith(f"{entry['answer']}.")
        pattern = r"\d{7}" if task != "single_3" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        assert re.fullmatch(pattern, entry["answer"])


def test_same_seed_same_prompts(tokenizer):
    one, two, other = (needles(tokenizer, 900, 0.3, 3, seed=s) for s in (0, 0, 1))
    assert one == two != other
    assert len({e["answer"] for e in one}) == 3
    assert (
        needles(tokenizer, 900, 0.3, 1, text="A word. Another word.", task="single_2")[0]["question"].count("Another")
        > 5
    )
    assert len(prose()) > 100_000


def test_errors(tokenizer):
    with pytest.raises(ValueError, match="the question alone is"):
        needles(tokenizer, 100, 0.5)
    with pytest.raises(ValueError, match="depth must lie"):
        needles(tokenizer, 900, 1.5)
    with pytest.raises(ValueError, match="task must be one of"):
        needles(tokenizer, 900, 0.5, task="multi")
    with pytest.raises(ValueError, match="count"):
        needles(tokenizer, 900, 0.5, 0)
    with pytest.raises(ValueError, match="no sentence"):
        needles(tokenizer, 900, 0.5, text=" ", task="single_2")


class Copier(torch.nn.Module):
    """Answers with the value in the prompt where it stands in its last ``window`` tokens."""

    def __init__(self, tokenizer, window):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.window = tokenizer, window

    def generate(self, input_ids, max_new_tokens, **_):
        found = re.search(r"is: (\d{7})", self.tokenizer.decode(input_ids[0, -self.window :]))
        text = (" " + found[1] + ".") if found else " 0"
        ids = self.tokenizer(text)["input_ids"][:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([ids])], 1)


def test_grid(tokenizer):
    """A model that sees the last thousand characters finds the needle there and nowhere else."""
    grid = needle_accuracy(
        Copier(tokenizer, 1000), tokenizer, [800, 3000], [0.0, 1.0], 3, max_new_tokens=16, progress=False
    )
    assert grid.scores == [[1.0, 1.0], [0.0, 1.0]] and grid.by_length == [1.0, 0.5]
    assert "3000" in str(grid) and "50.0%" in str(grid)


def test_a_real_model_is_asked(tokenizer):
    """Through generate, batches and padding; a random model finds nothing."""
    import tiny_models

    grid = needle_accuracy(
        tiny_models.llama(vocabulary=len(tokenizer)), tokenizer, [600], [0.5], 3, batch_size=2, max_new_tokens=4,
        progress=False,
    )  # fmt: skip
    assert grid.scores == [[0.0]] and grid.count == 3
