"""AXPO's options on top of TRL's GRPOConfig, and what of GRPOConfig does not go with them."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from .plan import NORMS, Rules

#: TRL's losses whose mean is the norm's.
LOSSES = {"token_mean": ("dapo", "cispo"), "row": ("grpo", "sapo")}
CONFIDENCES = ("mean_prob", "random")
#: TRL adds this to every std; A_pre and A_res are on the scale of the ordinary rows' advantages.
TRL_EPS = 1e-4


@dataclass
class AXPOConfig(GRPOConfig):
    """trl.GRPOConfig with AXPO's options; epsilon 0.2 / 0.4, beta 1e-3, three tool turns are the paper's.

    Args:
        resample_budget: r, extra rollouts as a share of a generation batch's (over all ranks); 0 is plain GRPO.
        num_resamples: K, continuations a prefix.
        tool_call_open, tool_call_close: the tags around a call, as the model writes them.
        confidence: "mean_prob" ranks by the mean probability of a call's tokens, "random" is the paper's random rank.
        axpo_norm: "token_mean" (TRL's loss_type dapo or cispo) over all active tokens of all rows, or "row" (grpo or
            sapo), row means over B N, the literal Eq. 5.
        loss_type: by default the first of axpo_norm's.
        fix_prefix, prefix_credit, merge_groups, resample_subgroup: the paper's ablations, see ``plan.Rules``.

    ValueError, naming the option, for a value that cannot be or one of GRPOConfig's that AXPO does not support.
    """

    epsilon_high: float | None = field(default=0.4, metadata={"help": "Upper clip, as in the paper."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL divergence to the start, as in the paper."})
    max_tool_calling_iterations: int | None = field(default=3, metadata={"help": "Turns, as in the paper."})
    loss_type: str | None = field(default=None, metadata={"help": "TRL's loss; by default axpo_norm's."})  # type: ignore[assignment]
    resample_budget: float = field(default=0.25, metadata={"help": "Extra rollouts as a share of B N; 0 is GRPO."})
    num_resamples: int = field(default=4, metadata={"help": "Continuations a prefix."})
    tool_call_open: str = field(default="<tool_call>", metadata={"help": "Tag before a call."})
    tool_call_close: str = field(default="</tool_call>", metadata={"help": "Tag behind a call."})
    confidence: str = field(default="mean_prob", metadata={"help": "Ranking of prefixes: mean_prob or random."})
    axpo_norm: str = field(default="token_mean", metadata={"help": "Mean over tokens or rows: token_mean or row."})
    fix_prefix: bool = field(default=True, metadata={"help": "Ablation: False samples whole rollouts."})
    prefix_credit: bool = field(default=True, metadata={"help": "Ablation: False gives prefixes no credit."})
    merge_groups: bool = field(default=False, metadata={"help": "Ablation: one advantage group a question."})
    resample_subgroup: str = field(default="tool", metadata={"help": "Ablation: no_tool resamples those."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rules()
        if self.axpo_norm not in NORMS:
            raise ValueError(f"axpo_norm must be one of {', '.join(NORMS)}; got {self.axpo_norm!r}")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}; got {self.confidence!r}")
        for name in ("tool_call_open", "tool_call_close"):
            tag = getattr(self, name)
            if not isinstance(tag, str) or not tag.strip():
                raise ValueError(f"{name} must be a tag, a string that is not blank; got {tag!r}")
        if self.loss_type is None:
            self.loss_type = LOSSES[self.axpo_norm][0]
        for option, given in self._unsupported().items():
            if given:
                raise ValueError(f"AXPO does not support {option}")

    def rules(self) -> Rules:
        """The options as ``plan`` takes them."""
        return Rules(
            budget=self.resample_budget, resamples=self.num_resamples, fix_prefix=self.fix_prefix,
            prefix_credit=self.prefix_credit, merge_groups=self.merge_groups, subgroup=self.resample_subgroup,
            eps=TRL_EPS,
        )  # fmt: skip

    def _unsupported(self) -> dict[str, bool]:
        mode = self.vllm_importance_sampling_mode
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        allowed = LOSSES[self.axpo_norm]
        bonus = self.entropy_coef != 0.0 or self.use_adaptive_entropy
        return {
            f"loss_type={self.loss_type!r} with axpo_norm={self.axpo_norm!r}: use {' or '.join(allowed)}":
                self.loss_type not in allowed,
            f"scale_rewards={self.scale_rewards!r}: use 'group'": self.scale_rewards != "group",
            f"multi_objective_aggregation={self.multi_objective_aggregation!r}: use 'sum_then_normalize'":
                self.multi_objective_aggregation != "sum_then_normalize",
            "importance_sampling_level='sequence': a row's tokens belong to several streams":
                self.importance_sampling_level != "token",
            "mask_truncated_completions=True: a truncated source still has a prefix to train":
                self.mask_truncated_completions,
            "entropy_coef or use_adaptive_entropy with axpo_norm='row': use 'token_mean'":
                bonus and self.axpo_norm == "row",
            f"vllm_importance_sampling_mode={mode!r}, a ratio of whole rows: use token_truncate or token_mask":
                corrected and mode.startswith("sequence"),
            "vllm_mode='server' with several processes: their turns with tools differ in number":
                self.use_vllm and self.vllm_mode == "server" and self.world_size > 1,
            "vllm_tensor_parallel_size > 1: the ranks' turns with tools differ in number":
                self.use_vllm and self.vllm_tensor_parallel_size > 1,
            "use_liger_kernel=True": bool(self.use_liger_kernel),
        }  # fmt: skip
