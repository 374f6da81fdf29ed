"""What AXPO refuses, and how it says so."""

import math

import axpo_tiny as toy
import pytest
import torch
from test_axpo_trainer import scored
from trl import GRPOConfig

from burnish.methods import AXPOConfig, AXPOTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("axpo-model"))


def test_defaults_are_the_papers(tmp_path):
    c = AXPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert (c.epsilon, c.epsilon_high, c.beta, c.num_generations) == (0.2, 0.4, 1e-3, 8)
    assert (c.max_tool_calling_iterations, c.temperature, c.resample_budget, c.num_resamples) == (3, 1.0, 0.25, 4)
    assert (c.loss_type, c.tool_call_open, c.tool_call_close) == ("dapo", "<tool_call>", "</tool_call>")
    assert AXPOConfig(str(tmp_path), axpo_norm="row", bf16=False, use_cpu=True).loss_type == "grpo"


@pytest.mark.parametrize(("more", "text"), [
    ({"loss_type": "bnpo"}, "does not support loss_type='bnpo' with axpo_norm='token_mean': use dapo or cispo"),
    ({"loss_type": "dapo", "axpo_norm": "row"}, "loss_type='dapo' with axpo_norm='row': use grpo or sapo"),
    ({"axpo_norm": "rows"}, "axpo_norm must be one of token_mean, row; got 'rows'"),
    ({"scale_rewards": "none"}, "scale_rewards='none'"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation='normalize_then_sum'"),
    ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
    ({"mask_truncated_completions": True}, "mask_truncated_completions=True"),
    ({"entropy_coef": 0.1, "axpo_norm": "row"}, "entropy_coef or use_adaptive_entropy with axpo_norm='row'"),
    ({"use_vllm": True}, "vllm_importance_sampling_mode='sequence_mask'"),
    ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "vllm_tensor_parallel_size": 2},
     "vllm_tensor_parallel_size > 1"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True"),
    ({"confidence": "entropy"}, "confidence must be one of mean_prob, random; got 'entropy'"),
    ({"resample_budget": -0.1}, "resample_budget must be a number >= 0; got -0.1"),
    ({"num_resamples": 1}, "num_resamples must be a whole number >= 2; got 1"),
    ({"resample_subgroup": "none"}, "resample_subgroup must be one of"),
    ({"tool_call_open": " "}, "tool_call_open must be a tag, a string that is not blank; got ' '"),
], ids=lambda v: str(v)[:50])  # fmt: skip
def test_config(tmp_path, more, text):
    with pytest.raises(ValueError, match=text):
        AXPOConfig(**toy.options(tmp_path, **more))


def test_trainer_arguments(tmp_path, folder):
    make = lambda **k: toy.trainer(tmp_path, folder, **k)  # noqa: E731
    with pytest.raises(TypeError, match="args must be an AXPOConfig; got GRPOConfig"):
        make(config=GRPOConfig)
    with pytest.raises(ValueError, match="AXPO needs tool calls: give tools=, environment_factory= or rollout_func="):
        make(tools=())
    with pytest.raises(ValueError, match="go together: resample_func is missing"):
        make(rollout_func=lambda *_: None)
    with pytest.raises(ValueError, match="go together: rollout_func is missing"):
        make(resample_func=lambda *_: None)
    with pytest.raises(ValueError, match="tool_call_open='<call>' is not how the chat template writes a call"):
        make(tool_call_open="<call>")
    with pytest.raises(ValueError, match="tool_call_close='</tool_çall>' never appears as tokens"):
        make(tool_call_close="</tool_çall>")


@pytest.mark.parametrize(("values", "text"), [
    (lambda n: ["yes"] * n, "reward function bad: value 0 is not a number: 'yes'"),
    (lambda n: [1.0] * (n - 1) + [math.nan], "value 7 is not a number: nan"),
    (lambda n: [math.inf] * n, "value 0 is not a number: inf"),
    (lambda n: [None] * n, "the reward of question 0, rollout 0 is not a number: nan"),
    (lambda n: [0.5] * n, "AXPO's rewards are 0 or 1, right or wrong; question 0, rollout 0 has 0.5"),
    (lambda n: [[1]] * n, r"value 0 is not a number: \[1\]"),
])  # fmt: skip
def test_rewards(tmp_path, folder, values, text):
    def bad(completions, **_):
        return values(len(completions))

    with pytest.raises(ValueError, match=text):
        scored(tmp_path, folder, funcs=bad)


def test_rewards_may_be_tensors_bools_and_weighted_sums(tmp_path, folder):
    def right(completions, answer, **_):
        return [torch.tensor(v) for v in toy.reward(completions, answer)]

    async def later(completions, **_):
        return [False] * len(completions)

    t, _ = scored(tmp_path, folder, funcs=[right, later], reward_weights=[1.0, 5.0])
    assert t.reward_func_names == ["right", "later"]


def test_a_model_without_a_path_and_beta(tmp_path):
    """Nothing of AXPO's: no GPU, no reference where beta is 0."""
    t = toy.trainer(tmp_path, None, model=toy.model(), beta=0.0, resample_budget=1.0)
    t.train()
    assert t.ref_model is None and isinstance(t, AXPOTrainer)


def test_a_call_that_the_tag_does_not_show(tmp_path, folder):
    """TRL parsed a call, and the tag is not there: the tag is wrong for this model."""
    t = toy.trainer(tmp_path, folder, script=toy.Script(None, tool=1.0))
    t.args.tool_call_open = "<other>"
    t.model.train()
    with pytest.raises(ValueError, match="a rollout called a tool without tool_call_open='<other>'"):
        t._generate_and_score_completions(toy.generation_batch(t))


def test_a_prefix_that_fills_the_completion_is_no_candidate(tmp_path, folder):
    """Cut off at the tag: nothing could follow it."""
    think = "h" * 8
    t, batch = scored(tmp_path, folder, script=toy.Script(None, tool=1.0, think=think), resample_budget=1.0,
                      max_completion_length=len(think) + 1 + len("<tool_call>"))  # fmt: skip
    assert batch["prompt_ids"].shape[0] == 8 and t._metrics["train"]["axpo/trigger_rate"] == [1.0]
    t, batch = scored(tmp_path, folder, script=toy.Script(None, tool=1.0, think=think), resample_budget=1.0,
                      max_completion_length=len(think) + 2 + len("<tool_call>"))  # fmt: skip
    assert batch["prompt_ids"].shape[0] > 8
