"""The objectives against TRL's own loss on a small model: values and gradients of every parameter, fp32, 1e-5."""

import pytest
import tiny_models as tiny
import torch
import trl_losses

from burnish import linear_loss, objectives
from burnish.objectives import count_items

TEMPERATURE = 0.7
CLIP = {"low": 0.2, "high": 0.3}
THEIRS = {"epsilon_low": 0.2, "epsilon_high": 0.3}
KL = {"beta": 0.2}
#: ours with arguments -> TRL's options.
LOSSES = {
    "grpo": (objectives.grpo, {**CLIP}, {"loss_type": "grpo", **THEIRS}),
    "grpo delta": (objectives.grpo, {**CLIP, "delta": 1.4}, {"loss_type": "grpo", "delta": 1.4, **THEIRS}),
    "grpo uncorrected": (objectives.grpo, {**CLIP, "correct_kl": False},
                         {"loss_type": "grpo", "use_bias_correction_kl": False, **THEIRS}),
    "dr_grpo": (objectives.dr_grpo, {"length": trl_losses.LONGEST, **CLIP}, {"loss_type": "dr_grpo", **THEIRS}),
    "dapo": (objectives.dapo, {**CLIP}, {"loss_type": "dapo", **THEIRS}),
    "bnpo": (objectives.bnpo, {**CLIP}, {"loss_type": "bnpo", **THEIRS}),
    "cispo": (objectives.cispo, {"cap": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": (objectives.sapo, {}, {"loss_type": "sapo"}),
    "gspo": (objectives.gspo, {**CLIP}, {"loss_type": "grpo", "importance_sampling_level": "sequence", **THEIRS}),
    "luspo": (objectives.gspo, {**CLIP, "aggregate": "sequence_mean_token_sum"},
              {"loss_type": "luspo", "importance_sampling_level": "sequence", **THEIRS}),
    "dapo by sequence": (objectives.dapo, {**CLIP, "level": "sequence"},
                         {"loss_type": "dapo", "importance_sampling_level": "sequence", **THEIRS}),
    "dr_grpo by sequence": (
        objectives.dr_grpo, {"length": trl_losses.LONGEST, **CLIP, "level": "sequence"},
        {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", **THEIRS}),
    "cispo by sequence": (objectives.cispo, {"cap": 1.1, "level": "sequence"},
                          {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.1}),
    "sapo by sequence": (objectives.sapo, {"tau_pos": 2.0, "level": "sequence"}, {
        "loss_type": "sapo", "sapo_temperature_pos": 2.0, "importance_sampling_level": "sequence"}),
}  # fmt: skip


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def check(model, ours, theirs):
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    want, got = gradients(theirs, model), gradients(ours, model)
    assert any(g.abs().max() > 1e-4 for g in want.values())
    for name, g in want.items():
        assert (got[name] - g).norm() <= 1e-5 * g.norm() + 1e-7, (name, (got[name] - g).norm() / g.norm())


def fused(model, inputs, objective, rows, num_items=None):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    start = inputs["prompt_ids"].shape[1] - 1
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start:-1]
    labels = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return linear_loss(
        hidden, model.lm_head.weight, labels, objective, inputs=rows, temperature=TEMPERATURE, num_items=num_items
    )


def entropy_weight(objective, labels, num_items):
    """TRL's bonus is a mean over tokens whatever the loss type: the quotient of its row weights and the aggregate's."""
    valid = labels != -100
    length = valid.sum(1, keepdim=True).expand(labels.shape)
    share = 1 / length.clamp(min=1) if objective.aggregate == "sequence_mean_token_mean" else torch.ones(labels.shape)
    items = count_items(labels, objective) if num_items is None else num_items
    return items * objective.params.get("length", 1.0) / (share * valid.sum())


@pytest.mark.parametrize("form", ["on policy", "off policy", "everything"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_trls_own_loss(name, form):
    make, arguments, options = LOSSES[name]
    model = tiny.llama()
    inputs = trl_losses.off_policy(model, trl_losses.batch(), TEMPERATURE)
    num_items = inputs["num_items_in_batch"] if options["loss_type"] in ("dapo", "cispo") else None
    labels = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    rows = {"advantages": inputs["advantages"]}
    if form == "on policy":
        del inputs["old_per_token_logps"]
        objective = make(**arguments)
    elif form == "off policy":
        rows["old_logp"] = inputs["old_per_token_logps"]
        objective = make(**arguments)
    else:  # advantages by token, divergence, a sampler's correction, entropy
        rows["old_logp"], rows["ref_logp"] = inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
        inputs["advantages"] = rows["advantages"] = rows["advantages"][:, None] + inputs["noise"][0]
        gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
        by_sequence = name in ("grpo", "gspo")
        ratio = (gap.sum(1, keepdim=True) if by_sequence else gap).exp().clamp(max=3.0)
        inputs["importance_sampling_ratio"] = rows["correction"] = ratio
        objective = make(**arguments, **KL, entropy=0.05)
        rows["entropy_weight"] = entropy_weight(objective, labels, num_items)
        options = {**options, **KL, "entropy_coef": 0.05, "use_vllm": True, "vllm_importance_sampling_correction": True}
    theirs = trl_losses.grpo(model, inputs, temperature=TEMPERATURE, **options)
    check(model, fused(model, inputs, objective, rows, num_items), theirs)


@pytest.mark.parametrize("form", ["on policy", "off policy"])
def test_rloo_equals_trls_own_loss(form):
    model = tiny.llama(tied=True)
    inputs = trl_losses.batch()
    inputs["completion_mask"][3, 0] = 1  # TRL gives a completion without tokens a loss of -A, without gradient
    inputs = trl_losses.off_policy(model, inputs, TEMPERATURE)
    rows = {"advantages": inputs["advantages"]}
    if form == "off policy":
        rows["old_logp"] = inputs["old_per_token_logps"]
    else:
        with torch.no_grad():
            logp, _ = trl_losses.whole(model, inputs, TEMPERATURE)
        inputs["old_logps"] = (logp * inputs["completion_mask"]).sum(1)
    theirs = trl_losses.rloo(model, inputs, temperature=TEMPERATURE, **THEIRS)
    check(model, fused(model, inputs, objectives.rloo(**CLIP), rows), theirs)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_accumulation_as_trl_does_it(name):
    """Two micro-batches of TRL's, each divided as it divides, are ours with ``count_items``."""
    make, arguments, options = LOSSES[name]
    model = tiny.llama()
    inputs = trl_losses.off_policy(model, trl_losses.batch(), TEMPERATURE)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    labels = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    # the completion that is masked counts as a sequence
    halves = [{k: v if v.ndim == 0 else v[part] for k, v in inputs.items() if k != "noise"}
              for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
    objective = make(**arguments)
    items = count_items([labels[:2], labels[2:]], objective)
    own = {"temperature": TEMPERATURE, "accumulation": 2, "steps_per_generation": 2, **options}
    theirs = sum(trl_losses.grpo(model, half, **own) for half in halves)
    rows = [{"advantages": half["advantages"], "old_logp": half["old_per_token_logps"]} for half in halves]
    ours = sum(fused(model, *each, items) for each in zip(halves, [objective] * 2, rows, strict=True))
    check(model, ours, theirs)
