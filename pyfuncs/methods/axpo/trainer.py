"""``AXPOTrainer``: TRL's GRPOTrainer, whose generation batch gets the resampled rows and AXPO's credit.

TRL's ``_generate_and_score_completions`` runs twice: for the batch, and where something is selected for the resamples.
So engine, tool loop, environments, images, rewards, old and reference log-probabilities are TRL's own code both times;
the second time its first turn is given the prefix.  Loss, buffers and mini-batches see ordinary rows.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import is_async_callable

from ..last_step import NoStepBeyondTheLast
from . import batch as rows
from .config import AXPOConfig
from .plan import check_rewards, credit, mean_probability, select, triggered
from .spans import Call, first_call


@dataclass
class _Rollouts:
    """What this rank generated, as ``GRPOTrainer._generate`` returns it."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    completions: list[Any]
    logprobs: list[list[float]] | None

    def own(self, i: int) -> list[int]:
        return [1] * len(self.completion_ids[i]) if self.tool_mask is None else list(self.tool_mask[i])


@dataclass
class _Source:
    """A selected rollout, as other ranks need it to go on from its prefix."""

    place: int  # among the selected
    question: dict[str, Any]
    prompt_ids: list[int]
    prefix: list[int]
    logprobs: list[float] | None


class AXPOTrainer(NoStepBeyondTheLast, GRPOTrainer):
    """GRPO that tries again where every tool-using rollout of a question failed (AXPO, arXiv 2605.28774).

        trainer = AXPOTrainer(model, reward_funcs, AXPOConfig(...), train_dataset=data, tools=[calculator])

    Args:
        model, reward_funcs, train_dataset, tools, environment_factory, ...: as for trl.GRPOTrainer.  The weighted sum
            of the rewards is 0 or 1.
        args: an AXPOConfig.
        rollout_func: as TRL has it, and then ``resample_func(prompts, prefixes, trainer)`` beside it: the same contract
            for completions that begin with ``prefixes``, token ids, [] where a whole rollout is asked for.

    The budget and the ranking are those of the whole generation batch over all ranks; resamples are dealt evenly to
    the ranks.  A resample's environment is another instance, reset with the source's row: before its first call a
    rollout has not touched its own.  ``reset`` must be a function of the row; a prompt that differs is an error.

    Logged beside TRL's metrics, which count the ordinary rollouts alone, under ``axpo/``: ``tool_rate`` (rollouts with
    a call), ``trigger_rate`` (questions whose tool-using rollouts all failed), ``all_wrong_rate`` (the same, of the
    questions with a tool-using rollout), ``resampled_rows``, and where there are some ``recovered_rate`` (of the
    selected prefixes) and ``resampled_reward``.

    Raises TypeError or ValueError, naming the argument, for options that AXPO does not support (see AXPOConfig), FSDP
    and ZeRO-3, a model with an auxiliary loss under axpo_norm="row", tags that the tokenizer or the chat template does
    not write, no source of tool calls; while training for a reward that is not 0 or 1.
    """

    _tag_names = ["trl", "axpo"]  # noqa: RUF012 (TRL's name and type)
    _name = "AXPO"
    _paper = {  # noqa: RUF012
        "title": "Agent eXplorative Policy Optimization for Multimodal Agentic Reasoning",
        "id": "2605.28774",
        "citation": "",
    }
    args: Any  # AXPOConfig, whose GRPO fields have more types than values
    model: Any
    processing_class: Any
    chat_template_kwargs: Any
    reward_funcs: list[Any]
    num_generations: int
    max_completion_length: int

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: AXPOConfig | None = None,
        *,
        resample_func: Callable[..., dict] | None = None,
        **kwargs,
    ):
        args = AXPOConfig("AXPO") if args is None else args
        if not isinstance(args, AXPOConfig):
            raise TypeError(f"args must be an AXPOConfig; got {type(args).__name__}")
        rollout_func = kwargs.get("rollout_func")
        if not (kwargs.get("tools") or kwargs.get("environment_factory") or rollout_func):
            raise ValueError("AXPO needs tool calls: give tools=, environment_factory= or rollout_func=")
        if (rollout_func is None) != (resample_func is None):
            missing = "resample_func" if resample_func is None else "rollout_func"
            raise ValueError(f"rollout_func and resample_func go together: {missing} is missing")
        super().__init__(model, reward_funcs, args, **kwargs)
        self.resample_func: Any = resample_func
        self.rules = args.rules()
        self.reward_funcs = [
            f if isinstance(f, nn.Module) else _numbers_only(f, name)
            for f, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self._rollouts: Any = None
        self._rewards: Any = None
        self._prefixes: list[_Source] | None = None
        self._check_model()
        self._check_tags()

    def _check_model(self) -> None:
        stage = getattr(getattr(self.accelerator.state, "deepspeed_plugin", None), "zero_stage", 0)
        refused = {
            "FSDP: TRL's tool loop does not keep sharded ranks in step": self.is_fsdp_enabled,
            "DeepSpeed ZeRO-3: TRL's tool loop does not keep sharded ranks in step": stage == 3,
            "router_aux_loss_coef with axpo_norm='row': use 'token_mean'":
                self.aux_loss_enabled and self.args.axpo_norm == "row",
        }  # fmt: skip
        for option, given in refused.items():
            if given:
                raise ValueError(f"AXPO does not support {option}")

    def _check_tags(self) -> None:
        """ValueError for a tag that would never be seen."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
        messages: list[dict] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        written = None
        if self.tools:
            written = self.processing_class.apply_chat_template(
                prepare_multimodal_messages(messages) if self._is_vlm else messages,
                chat_template=self.chat_template, tokenize=False, **self.chat_template_kwargs,
            )  # fmt: skip
        for name in ("tool_call_open", "tool_call_close"):
            tag = getattr(self.args, name)
            ids = self._tokenizer(tag, add_special_tokens=False)["input_ids"]
            text = self._text(ids)
            if tag not in text:
                raise ValueError(f"{name}={tag!r} never appears as tokens: this tokenizer makes {text!r} of it")
            if written is not None and tag not in written:
                raise ValueError(f"{name}={tag!r} is not how the chat template writes a call: {written[-160:]!r}")

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # What TRL makes on the way to a scored batch, kept; and its first turn, begun with a prefix

    def _generate(self, prompts: list):
        out = super()._generate(prompts)
        self._rollouts = _Rollouts(*out[:5])
        return out

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        sources, self._prefixes = self._prefixes, None
        if sources is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
        begun = [[*prompt, *s.prefix] for prompt, s in zip(prompt_ids, sources, strict=True)]
        fields = dict(multimodal_fields)
        for name in rows.WHOLE:  # a number a token; the prefix is text
            if name in fields:
                given = [list(map(int, row)) for row in fields[name]]
                fields[name] = [[*row, *[0] * len(s.prefix)] for row, s in zip(given, sources, strict=True)]
        ids, logprobs = super()._generate_single_turn(begun, images, fields, 1, *args, **kwargs)
        limit = self.max_completion_length
        ids = [[*s.prefix, *y][:limit] for s, y in zip(sources, ids, strict=True)]
        if logprobs is not None:
            logprobs = [[*(s.logprobs or []), *y][:limit] for s, y in zip(sources, logprobs, strict=True)]
        return ids, logprobs

    # The step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        questions = [dict(row) for row in inputs]  # a rollout_func's fields are written into the rows
        batch = super()._generate_and_score_completions(inputs)
        rollouts, group = self._rollouts, self.num_generations
        rewards = check_rewards(self._total_rewards().view(-1, group))
        calls = self._calls(rollouts)
        flags = torch.tensor([[int(c is not None), int(self._may_go_on(c))] for c in calls])
        flags = flags.to(self.accelerator.device)
        called, able = self.accelerator.gather(flags).bool().T.reshape(2, -1, group)
        member = called if self.rules.subgroup == "tool" else ~called
        trigger = triggered(member, rewards == 1)
        self._log_rates(called, member, trigger)
        candidates = member & able & trigger[:, None]
        count = self.rules.prefixes(rewards.numel())
        if not count or not candidates.any():
            self._metrics["train"]["axpo/resampled_rows"].append(0.0)
            return batch
        first = self.accelerator.process_index * len(inputs)
        mine = candidates.flatten()[first : first + len(inputs)].nonzero()[:, 0].tolist()
        confidence = self.accelerator.gather(self._confidence(batch, rollouts, calls, mine)).view(-1, group)
        selected = select(confidence, candidates, count)
        sources = self._share(selected, first, questions, rollouts, calls)
        extra, resampled = self._resample(sources)
        return self._credited(batch, extra, rewards, selected, resampled, sources, first)

    def _total_rewards(self) -> Tensor:
        """(rows over all ranks,) as TRL sums them; NaN where no function gave a number."""
        given = self._rewards
        total = (given * self.reward_weights.to(given.device)).nansum(1)
        return total.masked_fill(given.isnan().all(1), math.nan)

    def _calls(self, rollouts: _Rollouts) -> list[Call | None]:
        tags = self.args.tool_call_open, self.args.tool_call_close
        out = []
        for i, ids in enumerate(rollouts.completion_ids):
            call = first_call(ids, rollouts.own(i), self._text, *tags)
            said = rollouts.completions[i]
            if call is None and self.tools and any(m["role"] == "tool" for m in said if isinstance(m, dict)):
                text = self._text(ids)[:160]
                raise ValueError(f"a rollout called a tool without tool_call_open={tags[0]!r}: {text!r}")
            out.append(call)
        return out

    def _may_go_on(self, call: Call | None) -> bool:
        """Whether there is room for a token behind what is kept."""
        return not (self.rules.keeps_prefix and call is not None and call.prefix >= self.max_completion_length)

    def _log_rates(self, called: Tensor, member: Tensor, trigger: Tensor) -> None:
        log, some = self._metrics["train"], member.any(1)
        log["axpo/tool_rate"].append(called.float().mean().item())
        log["axpo/trigger_rate"].append(trigger.float().mean().item())
        if some.any():
            log["axpo/all_wrong_rate"].append(trigger[some].float().mean().item())

    def _confidence(self, batch: dict, rollouts: _Rollouts, calls: list[Call | None], mine: list[int]) -> Tensor:
        """(rows,): of the candidates ``mine`` the mean probability of the call's tokens, or a random number."""
        size, device = len(calls), self.accelerator.device
        if self.args.confidence == "random":
            return torch.rand(size).to(device)
        out = torch.ones(size)
        if not mine:
            return out.to(device)
        known = batch.get("sampling_per_token_logps", batch.get("old_per_token_logps"))
        logps = (self._logps(rows.take(batch, mine)) if known is None else known[mine]).cpu()
        for i, logp in zip(mine, logps, strict=True):
            call, length = calls[i], len(rollouts.completion_ids[i])
            own = torch.tensor(rollouts.own(i), dtype=torch.bool)
            span = slice(0, length) if call is None else slice(call.prefix, call.end)
            of_call = logp[:length][span][own[span]]
            out[i] = mean_probability(of_call[~of_call.isnan()])  # vLLM leaves NaN where it could not score
        return out.to(device)

    @torch.no_grad()
    def _logps(self, some: dict) -> Tensor:
        ids = torch.cat([some["prompt_ids"], some["completion_ids"]], 1)
        mask = torch.cat([some["prompt_mask"], some["completion_mask"]], 1)
        given = {k: some[k] for k in rows.MODEL_INPUTS if some.get(k) is not None}
        size = self.args.per_device_train_batch_size
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            keep = some["completion_ids"].shape[1]
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, keep, batch_size=size, **given)[0]

    def _share(self, selected, first: int, questions: list[dict], rollouts: _Rollouts, calls) -> list[_Source]:
        """Every rank's selected sources, in the order of selection."""
        own = []
        for place, (b, i) in enumerate(selected):
            row = b * self.num_generations + i - first
            if not 0 <= row < len(questions):
                continue
            kept = calls[row].prefix if self.rules.keeps_prefix else 0
            logprobs = None if rollouts.logprobs is None else rollouts.logprobs[row][:kept]
            prefix = rollouts.completion_ids[row][:kept]
            own.append(_Source(place, questions[row], rollouts.prompt_ids[row], prefix, logprobs))
        return sorted(gather_object(own), key=lambda source: source.place)

    def _resample(self, sources: list[_Source]) -> tuple[dict, Tensor]:
        """This rank's share of the resamples as a scored batch, and the rewards (n, K) of all of them.

        The batch's ``axpo_source`` is (rows,), the place of a row's source; -1 for a row that only makes shares equal.
        """
        world, copies = self.accelerator.num_processes, self.rules.resamples
        jobs = [source for source in sources for _ in range(copies)]
        share = math.ceil(len(jobs) / world)
        first = self.accelerator.process_index * share
        mine = [*jobs, *jobs[: share * world - len(jobs)]][first : first + share]
        kept = self._metrics["train"], self._logs, self.num_generations, self.rollout_func
        # TRL's own metrics and tables are of the ordinary rollouts
        self._metrics["train"] = defaultdict(list)
        self._logs = {k: defaultdict(deque) if isinstance(v, defaultdict) else deque() for k, v in self._logs.items()}
        self.num_generations = 1  # no groups of TRL's: the advantages are made below
        if self.rollout_func is None:
            self._prefixes = mine
        else:
            self.rollout_func = functools.partial(self._resample_with, mine)
        try:
            extra = super()._generate_and_score_completions([dict(source.question) for source in mine])
        finally:
            self._metrics["train"], self._logs, self.num_generations, self.rollout_func = kept
            self._prefixes = None
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._check_resamples(mine)
        place = [s.place if first + i < len(jobs) else -1 for i, s in enumerate(mine)]
        extra["axpo_source"] = torch.tensor(place, device=self.accelerator.device)
        rewards = self._total_rewards()[: len(jobs)].view(len(sources), copies)
        return extra, check_rewards(rewards)

    def _resample_with(self, sources: list[_Source], prompts: list, trainer) -> dict:
        return self.resample_func(prompts, [list(s.prefix) for s in sources], trainer)

    def _check_resamples(self, sources: list[_Source]) -> None:
        rollouts = self._rollouts
        for source, prompt, ids in zip(sources, rollouts.prompt_ids, rollouts.completion_ids, strict=True):
            if list(prompt) != list(source.prompt_ids):
                before, now = (self._text(ids)[-160:] for ids in (source.prompt_ids, prompt))
                raise ValueError(
                    "a resample's prompt is not its source's: the environment's reset() (or rollout_func) must be a "
                    f"function of the row; {before!r} became {now!r}"
                )
            if list(ids[: len(source.prefix)]) != list(source.prefix):
                raise ValueError("resample_func returned completion_ids that do not begin with their prefix")

    def _credited(
        self, batch: dict, extra: dict, rewards: Tensor, selected, resampled: Tensor, sources: list[_Source], first: int
    ) -> dict:
        """Ordinary and resampled rows with AXPO's advantages and masks, as many as mini-batches divide."""
        given = credit(rewards, selected, resampled, self.rules)
        log = self._metrics["train"]
        log["axpo/resampled_rows"].append(float(resampled.numel()))
        log["axpo/recovered_rate"].append((resampled == 1).any(1).float().mean().item())
        log["axpo/resampled_reward"].append(resampled.float().mean().item())
        for some in (batch, extra):
            if "tool_mask" not in some:
                some["tool_mask"] = torch.ones_like(some["completion_mask"])
        count, group = rows.row_count(batch), self.num_generations
        for b, advantages in given.group.items():
            for i, advantage in enumerate(advantages):
                if 0 <= b * group + i - first < count:
                    batch["advantages"][b * group + i - first] = advantage
        lengths = [len(source.prefix) for source in sources]
        for place, (b, i) in enumerate(selected):
            row = b * group + i - first
            if given.prefix is not None and 0 <= row < count:
                batch["advantages"][row] = given.prefix[place]
                batch["tool_mask"][row, lengths[place] :] = 0
        places = extra.pop("axpo_source").tolist()
        share = len(places)
        dealt = given.resampled.flatten().tolist()
        start = self.accelerator.process_index * share
        for row, place in enumerate(places):
            extra["advantages"][row] = dealt[start + row] if place >= 0 else 0.0
            extra["tool_mask"][row, : lengths[place] if place >= 0 else None] = 0
        whole = rows.join(batch, extra, self._tokenizer.pad_token_id)
        whole = self._divisible(whole)
        active = (whole["completion_mask"] * whole["tool_mask"]).sum()
        whole["num_items_in_batch"] = self.accelerator.gather(active).sum()
        return whole

    def _divisible(self, batch: dict) -> dict:
        """With copies of its shortest row that no loss counts: TRL cuts a batch into equal parts and drops the rest."""
        count = rows.row_count(batch)
        missing = -count % self.args.steps_per_generation
        if not missing:
            return batch
        shortest = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).argmin().item()
        batch = rows.take(batch, [*range(count), *[shortest] * missing])
        batch["tool_mask"][count:] = 0
        batch["advantages"][count:] = 0
        return batch

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training and self.args.axpo_norm == "row":
            # TRL's mean is over the rows there are, Eq. 5's over the B N ordinary ones
            loss = loss * (rows.row_count(inputs) / self.args.per_device_train_batch_size)
        return loss


def _numbers_only(function: Callable, name: str) -> Callable:
    """A reward function whose values are finite numbers or TRL's None; ValueError where one is not."""

    def check(values):
        for i, value in enumerate(values):
            if value is not None and not (hasattr(value, "__float__") and math.isfinite(value)):
                raise ValueError(f"reward function {name}: value {i} is not a number: {value!r}")
        return values

    async def later(*args, **kwargs):
        return check(await function(*args, **kwargs))

    def now(*args, **kwargs):
        return check(function(*args, **kwargs))

    return later if is_async_callable(function) else now
