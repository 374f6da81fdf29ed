"""The eight defects of the published program (specs/policy.md 3.3), each a test that ours passes."""

from pathlib import Path

import pytest
import ranks
import tiny_models as tiny
from datasets import Dataset
from drift_cases import config, distance, episodes, rows, step_gradient, trainer

from burnish.methods import DriftTrainer
from burnish.methods.drift import collect, solved_at, weighted_rows
from burnish.methods.drift.engines import turn_seed
from burnish.methods.drift.verify import Prompt, task_verifier
from burnish.ops.live_bytes import LiveBytes

WEIGHTS = [2.5, 0.0, 0.3, 1.0, 0.7, 4.0, 0.1, 0.9]


@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_1_the_order_that_is_asked_for_is_used(tmp_path, strategy):
    one = trainer(tmp_path, rows(WEIGHTS), train_sampling_strategy=strategy, per_device_train_batch_size=2, max_steps=4)
    seen = []
    inner = one.data_collator

    def watch(examples):
        seen.extend(e["weight"] for e in examples)
        return inner(examples)

    one.data_collator = watch
    one.train()
    assert sorted(seen) == sorted(WEIGHTS) and (seen == WEIGHTS) == (strategy == "sequential")


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_2_accumulation_leaves_the_gradient_and_its_clipping(tmp_path, clip):
    one = trainer(tmp_path, rows(WEIGHTS), per_device_train_batch_size=8, max_grad_norm=clip)
    cut = trainer(
        tmp_path, rows(WEIGHTS), per_device_train_batch_size=1, gradient_accumulation_steps=8, max_grad_norm=clip
    )
    assert distance(step_gradient(cut), step_gradient(one)) < 2e-6
    norms = [t.state.log_history[0]["grad_norm"] for t in (one, cut)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 5  # the clip acts


def test_2_also_where_the_model_takes_no_loss_arguments(tmp_path):
    """The trainer of transformers then divides by the number of micro-batches, unless it is told."""
    grads = []
    for size in (8, 2):
        model = tiny.llama()
        model.accepts_loss_kwargs = False
        one = trainer(
            tmp_path, rows(WEIGHTS), model, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        grads.append(step_gradient(one))
    assert distance(*grads) < 2e-6


@pytest.mark.parametrize("longest", [25, 40, 60, None])
def test_3_labels_are_aligned_at_every_length(tmp_path, longest):
    """A row that is too long is left out; the others are whole, with labels that are their last turn."""
    data = weighted_rows(episodes())
    one = trainer(tmp_path, data, max_length=longest)
    tok = one.processing_class
    turns = {(m["prompt"][0]["content"], m["completion"][0]["content"]) for m in data}
    for row in one.train_dataset:
        supervised = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert supervised == list(range(supervised[0], len(row["input_ids"])))
        assert [row["labels"][i] for i in supervised] == row["input_ids"][supervised[0] :]
        text = tok.decode(row["input_ids"])
        assert text[: text.index("[user]")] == ""
        assert any(
            text.startswith(f"[user]{p}") and tok.decode(row["input_ids"][supervised[0] :]) == f"{c}<eos>"
            for p, c in turns
        )


def test_4_the_end_of_the_turn_is_supervised_where_it_also_pads(tmp_path):
    tok = tiny.tokenizer(chat=True)
    tok.pad_token = tok.eos_token
    one = DriftTrainer(tiny.llama(), config(tmp_path), train_dataset=weighted_rows(episodes()), processing_class=tok)
    batch = one.data_collator(list(one.train_dataset))
    assert tok.pad_token_id == tok.eos_token_id == 1
    ends = [int((labels == 1).sum()) for labels in batch["labels"]]
    assert ends == [1] * len(one.train_dataset)  # the turn's, and no padding


def test_5_no_two_turns_of_a_collection_have_a_seed_in_common(tmp_path):
    every = {
        turn_seed(base, p, k, t, trajectories=4, turns=3)
        for base in ("a", "b") for p in range(5) for k in range(4) for t in range(3)
    }  # fmt: skip
    assert len(every) == 2 * 5 * 4 * 3 and all(0 <= s < 2**63 for s in every)
    seen: list[int] = []

    def engine(conversations, seeds):
        seen.extend(seeds)
        return ["0"] * len(seeds)

    prompts = [Prompt(i, [{"role": "user", "content": "the same"}]) for i in range(3)]
    collect(
        tmp_path / "e.jsonl", prompts, engine, lambda *_: (0.0, None), trajectories=5, max_turns=4, batch_size=4,
        progress=False,
    )  # fmt: skip
    assert len(seen) == len(set(seen)) == 3 * 5 * 4


def test_6_evaluation_asks_as_collection_does(tmp_path):
    asked: list[list] = [[], []]

    def engine(which):
        def answer(conversations, seeds):
            asked[which] += [[dict(m) for m in c] for c in conversations]
            return ["wrong"] * len(seeds)

        return answer

    prompts = [Prompt(i, [{"role": "user", "content": f"q{i}"}]) for i in range(3)]
    options = {"max_turns": 3, "batch_size": 2, "progress": False}
    collect(tmp_path / "e.jsonl", prompts, engine(0), lambda *_: (0.0, None), trajectories=1, **options)
    assert solved_at(prompts, engine(1), lambda *_: (0.0, None), **options) == [None] * 3
    assert asked[0] == asked[1] and len(asked[0]) == 9
    count = lambda talks, _: [str(len(talk)) for talk in talks]  # noqa: E731
    right = solved_at(prompts, count, lambda text, _: (float(text == "3"), text), **options)
    assert right == [2] * 3


def test_7_two_ranks_are_one_process(tmp_path):
    """Also with weights normalised over the global batch."""
    ranks.run(Path(__file__).with_name("drift_ranks.py"), 2, tmp_path)


def test_8_logits_are_never_whole(tmp_path):
    vocabulary, tokens = 8192, 8 * 61
    data = Dataset.from_list([
        {"input_ids": list(range(3, 65)), "labels": [-100, *range(4, 65)], "weight": 1.0 + i} for i in range(8)
    ])  # fmt: skip
    one = trainer(tmp_path, data, tiny.llama(vocabulary=vocabulary), {"budget": 1 << 21}, per_device_train_batch_size=8)
    batch = one.data_collator(list(one.train_dataset))
    with LiveBytes() as counter:
        one.compute_loss(one.model, batch).backward()
    gradients = sum(p.grad.numel() * 4 for p in one.model.parameters())
    assert counter.peak - gradients < tokens * vocabulary * 4 / 2


def test_8_an_empty_answer_can_be_right():
    class Task:
        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    verify = task_verifier(Task(), lambda text: text.strip())
    assert verify(" ", {"answer": ""}) == (1.0, "")
