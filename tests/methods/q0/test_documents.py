"""Which tokens a row, a step, a rank and an epoch have."""

import pickle

import numpy as np
import pytest
import torch

from burnish.methods.q0.documents import EpochRows, HeldOutRows, Plan, StepBatches, as_documents, split_front


def texts(sizes):
    """Documents whose tokens are all different."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]


def test_an_epoch_has_every_document_once_in_an_order_of_its_own():
    data = texts([5, 3, 9, 4, 1, 8])
    rows = EpochRows(data, 4, seed=3, epochs=5)
    assert rows.rows == 7 and len(rows) == 35
    orders = [rows.order(e).tolist() for e in range(5)]
    assert all(sorted(o) == list(range(6)) for o in orders) and len({tuple(o) for o in orders}) == 5
    same, other = (EpochRows(data, 4, seed, 5).order(0).tolist() for seed in (3, 4))
    assert orders[0] == same != other
    for epoch in range(5):
        stream = np.concatenate([data[i] for i in orders[epoch]])
        for j in range(7):
            item = rows[epoch * 7 + j]
            assert item["input_ids"].tolist() == stream[4 * j : 4 * j + 5].tolist() == item["labels"].tolist()
    assert torch.equal(pickle.loads(pickle.dumps(rows))[9]["input_ids"], rows[9]["input_ids"])


def test_a_step_has_the_same_rows_however_it_is_cut():
    def steps(world, accumulation, batches):
        plan = Plan(10, 3, 2, batches, accumulation, world)
        ranks = [list(StepBatches(plan, r)) for r in range(world)]
        assert all(len(r) == len(StepBatches(plan, 0)) == plan.ends[-1] * accumulation for r in ranks)
        return plan, [
            sorted(i for r in ranks for micro in r[s * accumulation : (s + 1) * accumulation] for i in micro)
            for s in range(plan.ends[-1])
        ]

    plan, one = steps(1, 1, [4, 8, 4])
    assert plan.lengths == [5, 2, 5] and [len(x) for x in one] == [4] * 5 + [8] * 2 + [4] * 5
    assert steps(2, 1, [2, 4, 2])[1] == steps(1, 2, [2, 4, 2])[1] == steps(2, 2, [1, 2, 1])[1] == one
    assert one[0] == [0, 1, 2, 3] and one[5] == list(range(20, 28)) and one[7][0] == 40
    assert [plan.epoch_at(s) for s in (1, 5, 6, 7, 12)] == [0.4, 2.0, 2.8, 4.0, 6.0]


def test_held_out_tokens_are_labels_once():
    rows = HeldOutRows(texts([5, 3, 3]), 4, "x")
    items = [rows[i] for i in range(len(rows))]
    labels = torch.cat([x["labels"][1:] for x in items])
    assert labels[labels != -100].tolist() == list(range(1, 11)) and len(rows) == 3
    assert items[-1]["labels"].tolist() == [8, 9, 10, -100, -100]
    with pytest.raises(ValueError, match="x: at least two tokens"):
        HeldOutRows([np.arange(1)], 4, "x")


def test_the_front_is_whole_documents():
    data = texts([5, 3, 9, 4])
    front, rest = split_front(data, 0.25, "fitness_share")
    assert [len(x) for x in front] == [5, 3] and [len(x) for x in rest] == [9, 4]
    for share, message in ((0.9, "takes all 4 documents"), (1.0, "must lie in")):
        with pytest.raises(ValueError, match=f"fitness_share.*{message}"):
            split_front(data, share, "fitness_share")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: as_documents([[]], "train_dataset"), "train_dataset: no document with a token"),
        (lambda: as_documents([{"input_ids": "ab"}], "d"), "d, document 0: a list of token ids is needed; got str"),
        (lambda: EpochRows(texts([3]), 4, 0, 1), "seq_length=4: the training documents have 3 tokens"),
        (lambda: Plan(3, 1, 1, [4], 1, 1), "an optimizer step takes 4 rows, a cycle of 1 epochs has 3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
