"""Facts R4 to R8 of the specification: Eq. 2 alone, beside sentence-transformers' loss, and over processes."""

import math
from pathlib import Path

import pytest
import ranks
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish.methods.ra_rft.infonce import infonce
from burnish.methods.ra_rft.retriever import Embedded, InfoNCELoss


def problem(queries=4, documents=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(queries, documents, generator=g, dtype=torch.float64) * 2 - 1
    return scores, torch.rand(queries, documents, generator=g) < 0.4


@pytest.mark.parametrize(("count", "value"), [(1, 2.079442), (3, 6.238325)])
def test_r4_uniform_scores(count, value):
    positives = torch.arange(8)[None] < count
    assert infonce(torch.full((1, 8), 0.3), positives).item() == pytest.approx(value, abs=1e-5)
    assert infonce(torch.full((1, 8), 0.3), positives, over_positives="mean").item() == pytest.approx(math.log(8))


@pytest.mark.parametrize(("count", "least"), [(3, 3.295837), (1, 0.0)])
def test_r5_the_least_loss_is_p_log_p(count, least):
    """Reached by gradient descent, from below nowhere; 0 where the other positives are masked."""
    positives = torch.arange(8)[None] < count
    best = torch.where(positives, 40.0, -40.0).double()
    assert infonce(best, positives, temperature=1.0).item() == pytest.approx(least, abs=1e-6)
    assert infonce(best, positives, temperature=1.0, mask_other_positives=True).item() == pytest.approx(0, abs=1e-6)
    for seed in range(20):
        scores, _ = problem(1, 8, seed)
        assert infonce(scores, positives).item() > least


def test_r6_the_gradient_in_closed_form():
    scores, positives = problem()
    scores.requires_grad_()
    (g,) = torch.autograd.grad(infonce(scores, positives), scores)
    want = (positives.sum(-1, keepdim=True) * (scores / 0.05).softmax(-1) - positives.double()) / 0.05
    torch.testing.assert_close(g, want.detach(), rtol=0, atol=1e-12)
    assert g.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"over_positives": "mean"}, {"mask_other_positives": True}])
def test_gradcheck_and_the_definition(options):
    scores, positives = problem(3, 6)
    positives[2] = False  # a query without a positive
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: infonce(s, positives, temperature=0.7, **options), scores)
    want = torch.zeros(3, dtype=torch.float64)
    for q in range(3):
        for c in positives[q].nonzero()[:, 0].tolist():
            kept = [j for j in range(6) if not (options.get("mask_other_positives") and positives[q, j] and j != c)]
            want[q] -= (scores[q, kept] / 0.7).log_softmax(-1)[kept.index(c)].detach()
        if "over_positives" in options:
            want[q] /= max(1, int(positives[q].sum()))
    arguments = {"temperature": 0.7, **options}
    torch.testing.assert_close(infonce(scores, positives, reduction="none", **arguments).detach(), want)
    torch.testing.assert_close(infonce(scores, positives, **arguments).detach(), want.sum())
    torch.testing.assert_close(infonce(scores, positives, reduction="mean", **arguments).detach(), want.sum() / 2)


def in_batch(seed=0, batch=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 12, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]


def cosine(a, b):
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def theirs(queries, documents):
    """sentence-transformers' loss: scale 20 is temperature 0.05."""
    loss = MultipleNegativesRankingLoss(None, scale=20.0)
    return loss.compute_loss_from_embeddings([queries, documents], None)


def test_r7_one_positive_in_batch_is_sentence_transformers_loss():
    queries, documents = in_batch()
    ours = infonce(cosine(queries, documents), torch.eye(6, dtype=torch.bool), reduction="mean")
    want = theirs(queries, documents)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(x, (queries, documents)) for x in (ours, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_r8_a_positive_that_another_query_brought_is_not_a_negative():
    """There it is one: the gradient of its score has the other sign, and the losses differ."""
    queries, documents = in_batch()
    with torch.no_grad():
        documents[0] = documents[1] + 2 * documents[0]
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 1] = True
    scores = cosine(queries, documents).detach().requires_grad_()
    ours = infonce(scores, positives, over_positives="mean", reduction="mean")
    assert abs(ours.item() - theirs(queries, documents).item()) > 1e-2
    lower = scores.detach().clone()
    lower[0, 1] = -1.0  # where softmax gives it next to nothing, the gradient is that of the label
    lower.requires_grad_()
    (g,) = torch.autograd.grad(infonce(lower, positives, over_positives="mean", reduction="mean"), lower)
    (single,) = torch.autograd.grad(infonce(lower, torch.eye(6, dtype=torch.bool), reduction="mean"), lower)
    assert g[0, 1] < -1 and single[0, 1] >= 0


def test_r8_a_query_in_two_rows_with_a_positive_each():
    """The denominators of Eq. 2 hold the other positives, as theirs do: the query once, over both, is their two rows.

    They part where the other positives are masked, which theirs cannot do.
    """
    queries, documents = in_batch()
    with torch.no_grad():
        queries[1] = queries[0]
        documents[:2] = queries[:2] + documents[:2]
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 1] = True
    scores = cosine(queries, documents)
    once = torch.tensor([0, 2, 3, 4, 5])
    want = 6 * theirs(queries, documents)
    torch.testing.assert_close(infonce(scores[once], positives[once]), want, rtol=1e-9, atol=1e-9)
    assert abs(infonce(scores[once], positives[once], mask_other_positives=True) - want) > 1e-2


def test_a_document_that_two_rows_brought_counts_once():
    queries, documents = (x.detach() for x in in_batch())
    documents[2] = documents[0]
    queries, documents = (torch.nn.functional.normalize(x, dim=-1) for x in (queries, documents))
    labels = torch.tensor([[0, 0], [1, 1], [2, 0], [3, 2], [4, 3], [5, 4]])
    loss = InfoNCELoss(None, labels.tolist(), 5)
    got = loss.of_embeddings(Embedded(queries), Embedded(documents), labels)
    once = torch.tensor([0, 1, 3, 4, 5])
    positives = labels[:, 1:] == labels[once, 1]
    torch.testing.assert_close(got, infonce(queries @ documents[once].T, positives, reduction="mean"))


def test_a_document_that_is_left_out():
    scores, positives = problem()
    scores[:, 0], positives[:, 0] = -torch.inf, False
    scores.requires_grad_()
    for options in ({}, {"mask_other_positives": True}):
        (g,) = torch.autograd.grad(infonce(scores, positives, **options), scores)
        assert g.isfinite().all() and not g[:, 0].any()
    without = infonce(scores[:, 1:], positives[:, 1:])
    torch.testing.assert_close(infonce(scores, positives), without)


def test_low_precision_is_summed_in_fp32():
    scores, positives = problem()
    got = infonce(scores.bfloat16(), positives)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, infonce(scores.bfloat16().float(), positives))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "scores and positives", {"positives": torch.zeros(4, 7, dtype=torch.bool)}),
        (TypeError, "bool", {"positives": torch.zeros(4, 8)}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "over_positives", {"over_positives": "max"}),
        (ValueError, "reduction", {"reduction": "max"}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    scores, positives = problem()
    with pytest.raises(error, match=match):
        infonce(**{"scores": scores, "positives": positives, **change})


def test_gathered_over_two_processes(tmp_path):
    ranks.run(Path(__file__).with_name("infonce_ranks.py"), 2, tmp_path)
