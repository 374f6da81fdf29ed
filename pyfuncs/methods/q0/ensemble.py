r"""``Ensemble``: a mixture of causal LMs that acts as one, with probabilities averaged (q0, arXiv 2606.03938).

    p(y | x) = sum_i w_i p_i(y | x)

The NLL of labels needs log p_i(y) alone, which ``linear_stats`` gives without logits: -logsumexp_i(log w_i + log p_i).
The whole vocabulary is mixed only at the positions that are asked for, as the next token's of generation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...paths.output import atomic_directory
from ..run_directory import write_json
from .members import (
    IGNORED,
    Decoder,
    copy_checkpoint,
    device_of,
    label_logp,
    load_member,
    plain,
    save_member,
    vocabulary_of,
)
from .prior import mixture_nll
from .sampling import Choice, grow

FILE = "weights.json"
LOADS = ("all", "one")
#: Bytes of log-probabilities that are made at once when whole vocabularies are mixed.
CHUNK_BYTES = 16 << 20


class Ensemble(nn.Module):
    """M causal LMs over one vocabulary and their weights.

    Args:
        members: checkpoint directories (``save_pretrained``'s, or snapshots of ``HyperEpochTrainer``), or models, which
            may be compiled, in any dtype, or PEFT's; they are put in eval mode for each call and back.
        weights: (M,) non-negative, normalised here; uniform by default.  A member of weight 0 is left out.
        load: "all" holds every member; "one" loads a directory when it is its turn and drops it after: for NLL and
            for logits.  Generation wants all.
        dtype: of members read from directories: fp32 by default, "auto" keeps what was saved.
        device: for members read from directories; the CPU by default.

    ValueError for no member, weights of another number, another sign or all 0, vocabularies that differ, a directory
    that is no checkpoint, or models with load="one".
    """

    def __init__(
        self, members: Sequence[str | os.PathLike | nn.Module], weights: Tensor | Sequence[float] | None = None, *,
        load: str = "all", dtype: torch.dtype | str = torch.float32, device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        if load not in LOADS:
            raise ValueError(f"load must be one of {', '.join(LOADS)}; got {load!r}")
        if isinstance(members, (str, os.PathLike, nn.Module)) or not len(members):
            raise ValueError("members must be a list of directories or models, at least one")
        given = torch.ones(len(members)) if weights is None else torch.as_tensor(weights)
        given = given.detach().double().cpu()
        if given.shape != (len(members),):
            raise ValueError(f"weights must be ({len(members)},), one a member; got {tuple(given.shape)}")
        if not bool((given >= 0).all()) or not bool(given.isfinite().all()) or not bool(given.sum() > 0):
            raise ValueError("weights must be finite and non-negative, and not all 0")
        self.load, self.dtype = load, dtype
        self.target = None if device is None else torch.device(device)
        #: (M,) fp64 on the CPU, positive, sum 1.
        self.weights = (given / given.sum())[given > 0]
        kept: list[Any] = [
            m if isinstance(m, nn.Module) else Path(m) for m, w in zip(members, given, strict=True) if w > 0
        ]
        if load == "one" and any(isinstance(m, nn.Module) for m in kept):
            raise ValueError("load='one' reads members from directories; got a model")
        #: Where each member came from: its directory, or None for a model that was given.
        self.folders: list[Path | None] = [None if isinstance(m, nn.Module) else m for m in kept]
        if load == "all":
            kept = [m if isinstance(m, nn.Module) else load_member(m, dtype, self.target) for m in kept]
        self.members = nn.ModuleList(kept if load == "all" else [])
        sizes = [vocabulary_of(m) for m in kept]
        for i, size in enumerate(sizes):
            if size != sizes[0]:
                raise ValueError(f"members must have one vocabulary; member 0 has {sizes[0]} tokens, member {i} {size}")
        self.vocabulary = sizes[0]

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        return f"Ensemble({len(self)} members, vocabulary {self.vocabulary}, load={self.load!r})"

    @property
    def config(self) -> Any:
        """The first member's config."""
        if self.load == "all":
            return plain(self.members[0]).config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(self.folders[0]))

    @contextmanager
    def member(self, i: int) -> Iterator[nn.Module]:
        """Member i, loaded for the block where members are read one at a time."""
        if self.load == "all":
            yield self.members[i]
            return
        folder = self.folders[i]
        assert folder is not None
        yield load_member(folder, self.dtype, self.target)

    # Labels

    @torch.no_grad()
    def log_probs(self, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """log p_i of every label that counts, (M, N) on the CPU in fp32 (fp64 for fp64 members): what a prior reads.

        batches: mappings with "input_ids" (B, T), and "labels" (B, T, -100 where ignored; by default the ids, less
        padding and what follows it on the left) and "attention_mask" (B, T) where there is padding.  Tokens come in
        their order; each member is loaded once.
        """
        rows = [_batch(batch) for batch in batches]
        if not rows:
            raise ValueError("batches: none")
        out = []
        for i in range(len(self)):
            with self.member(i) as member:
                parts = [
                    label_logp(member, ids, labels, mask).cpu()[labels[:, 1:].cpu() != IGNORED]
                    for ids, labels, mask in rows
                ]
                out.append(torch.cat(parts))
                del member  # before the next one is loaded
        return torch.stack([x.to(torch.promote_types(out[0].dtype, x.dtype)) for x in out])

    def nll(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The mixture's mean NLL over the labels that count, nats a token; ValueError where none does."""
        return mixture_nll(self.log_probs(batches), self.weights)

    # Logits

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ):  # fmt: skip
        """A ``CausalLMOutputWithPast`` as a causal LM's, without gradients.

        With ``labels`` (B, T), -100 where ignored: ``loss``, the mixture's mean NLL, and no logits.  Without:
        ``logits`` (B, K, V) = log p of the mixture, at the last ``logits_to_keep`` positions (0: all; or an index
        tensor (K,)), in fp32, normalised; K V numbers a row of memory, and one member's logits beside them.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is not None:
            batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
            loss = self.nll([{k: v for k, v in batch.items() if v is not None}])
            return CausalLMOutputWithPast(loss=torch.tensor(loss, device=input_ids.device))
        parts = self._each(lambda member: Decoder(member, use_cache=False), input_ids, attention_mask, logits_to_keep)
        return CausalLMOutputWithPast(logits=self._mixed(parts).to(input_ids.device))

    def _each(self, decoder, ids: Tensor, mask: Tensor | None, keep: int | Tensor) -> Iterator[Tensor]:
        for i in range(len(self)):
            with self.member(i) as member:
                logits = decoder(member).logits(ids, mask, keep)
                del member  # before the next one is loaded
            yield logits

    def _mixed(self, parts: Iterable[Tensor]) -> Tensor:
        """log sum_i w_i softmax(z_i) of logits (B, K, V), one member's alive at a time."""
        total: Tensor | None = None
        for log_w, z in zip(self.weights.log().tolist(), parts, strict=True):
            wide = torch.promote_types(z.dtype, torch.float32)
            if total is None:
                total = torch.full(z.shape, -torch.inf, dtype=wide, device=z.device)
            into, rows = total.view(-1, total.shape[-1]), z.reshape(-1, z.shape[-1])
            step = max(1, CHUNK_BYTES // (into.element_size() * max(1, into.shape[1])))
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                logp = rows[part].to(total.device, wide).log_softmax(-1) + log_w
                into[part] = torch.logaddexp(into[part], logp.to(into.dtype))
        assert total is not None
        return total

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 20,
        do_sample: bool = False, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
        generator: torch.Generator | None = None, use_cache: bool = True, num_beams: int = 1,
        synced_gpus: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts with tokens of the mixture: (B, T + new) int64, as transformers' ``generate`` returns them.

        Args:
            input_ids, attention_mask: (B, T), padded on the left.
            do_sample: draw from the mixture, else its likeliest token.
            temperature, top_k, top_p, min_p, logits_processor, stopping_criteria: transformers' own, on log p of the
                mixture: a temperature sharpens the average, not each member.
            eos_token_id, pad_token_id: by default those of the first member's generation config; a row that ended is
                filled with padding (end of sequence where there is none).
            generator: of the draws; by default torch's global one.
            use_cache: each member keeps keys and values of its own.
            num_beams, synced_gpus: 1 and false or None: what they would do is not done.

        ValueError for load="one", padding that is not on the left, beams, or a stop that cannot be padded.
        """
        if self.load != "all":
            raise ValueError("generate wants load='all': each token asks every member")
        if num_beams != 1 or synced_gpus:
            raise ValueError("generate: beams and synced_gpus are not supported")
        defaults = getattr(plain(self.members[0]), "generation_config", None)
        eos = eos_token_id if eos_token_id is not None else getattr(defaults, "eos_token_id", None)
        pad = pad_token_id if pad_token_id is not None else getattr(defaults, "pad_token_id", None)
        stops = [] if eos is None else [int(e) for e in (eos if isinstance(eos, Sequence) else [eos])]
        choice = Choice(do_sample, temperature, top_k, top_p, min_p, tuple(logits_processor), generator)
        decoders = [Decoder(member, use_cache=use_cache) for member in self.members]

        def next_token(ids: Tensor, mask: Tensor) -> Tensor:
            return self._mixed(decoder.logits(ids, mask, 1) for decoder in decoders)[:, -1]

        device = device_of(self.members[0])
        mask = None if attention_mask is None else attention_mask.to(device)
        return grow(
            next_token, input_ids.to(device), mask, choice, max_new_tokens, stops, pad, tuple(stopping_criteria)
        )

    # Files

    def save_pretrained(self, folder: str | os.PathLike, *, top_k: int | None = None) -> None:
        """Export to a directory that ``from_pretrained`` reads: member-000, ... and weights.json, whole or not at all.

        A member that came from a directory is copied from there, weights, config and tokenizer alone; a model that was
        given is stored by its own ``save_pretrained``.

        Args:
            folder: must not exist, or be empty.
            top_k: export the members with the k largest weights only, renormalised.
        """
        k = len(self) if top_k is None else top_k
        if type(k) is not int or not 1 <= k <= len(self):
            raise ValueError(f"top_k must be a whole number from 1 to {len(self)}; got {top_k!r}")
        kept = torch.sort(self.weights, descending=True, stable=True).indices[:k].sort().values.tolist()
        total = float(self.weights[kept].sum())
        with atomic_directory(folder) as inside:
            entries = []
            for number, i in enumerate(kept):
                name = f"member-{number:03d}"
                source = self.folders[i]
                if source is not None:
                    copy_checkpoint(source, inside / name)
                else:
                    save_member(self.members[i], inside / name)
                entries.append({"folder": name, "weight": float(self.weights[i]) / total})
            write_json(inside / FILE, {"members": entries, "vocabulary": self.vocabulary})

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, load: str = "all", dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> Ensemble:  # fmt: skip
        """What ``save_pretrained`` wrote.  ValueError where weights.json is missing, cut short or names no members."""
        folder = Path(folder)
        try:
            entries = json.loads((folder / FILE).read_text())["members"]
            places = [folder / str(entry["folder"]) for entry in entries]
            weights = [float(entry["weight"]) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: {FILE} is missing, cut short or has no members") from error
        return cls(places, weights, load=load, dtype=dtype, device=device)


def _batch(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels")
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be (B, T); got {tuple(ids.shape)}")
    for name, x in (("labels", labels), ("attention_mask", mask)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids {tuple(ids.shape)}; got {tuple(x.shape)}")
    if labels is None:
        labels = ids
        if mask is not None:  # a token after padding has no text before it that it could be scored from
            before = torch.cat([mask[:, :1], mask[:, :-1]], 1)
            labels = ids.masked_fill((mask == 0) | (before == 0), IGNORED)
    return ids, labels, mask
