"""RA-RFT (arXiv 2606.13680): a retriever of transferable reasoning, and policy optimisation on what it finds.

    labels     which solved problem helps with which question: a judge, or measured
    infonce    Eq. 2, multi-positive InfoNCE
    retriever  training on sentence-transformers, recall@k, an index of a corpus
    leaks      guards: the problem itself, and text of benchmarks
    context    the prompt column with the retrieved problem before the question, for training and inference
    trainer    TRL's GRPOTrainer on such prompts

Names are looked up on first use, so that importing this imports neither transformers nor sentence-transformers.
"""

from __future__ import annotations

from ..lazy import lazy

_HOMES = {
    "build_labels": "labels", "rollout_benefit": "labels", "infonce": "infonce", "InfoNCELoss": "retriever",
    "Retriever": "retriever", "RetrieverTrainer": "retriever", "load_encoder": "retriever", "recall_at": "retriever",
    "LeakGuard": "leaks", "same_problem": "leaks", "with_context": "context", "Template": "context",
    "RARFTTrainer": "trainer",
}  # fmt: skip

__all__ = [
    "InfoNCELoss", "LeakGuard", "RARFTTrainer", "Retriever", "RetrieverTrainer", "Template", "build_labels", "infonce",
    "load_encoder", "recall_at", "rollout_benefit", "same_problem", "with_context",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
