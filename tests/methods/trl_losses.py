"""TRL's own ``_compute_loss`` on materialised logits: what every fused form is held to."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import GRPOTrainer, RLOOTrainer

#: Longest completion, TRL's max_completion_length.
LONGEST = 9


def batch(seed=0, size=4, prompt=3, length=6, vocabulary=128):
    """What TRL's trainers hold of a batch: prompts padded on the left, completions on the right, one of them masked."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, prompt + length), generator=g)
    prompt_mask, mask = torch.ones(size, prompt, dtype=torch.int64), torch.ones(size, length, dtype=torch.int64)
    prompt_mask[1, :1], mask[0, 4:], mask[2, 1:], mask[3] = 0, 0, 0, 0
    return {
        "prompt_ids": ids[:, :prompt], "prompt_mask": prompt_mask, "completion_ids": ids[:, prompt:],
        "completion_mask": mask, "advantages": torch.randn(size, generator=g),
        "num_items_in_batch": mask.sum() + 5,  # as if another process had five tokens
        "noise": torch.randn(3, size, length, generator=g),
    }  # fmt: skip


def whole(model, inputs, temperature):
    """(log-probabilities, entropies) (B, T) of the completions, from whole logits in the model's dtype."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    start = inputs["prompt_ids"].shape[1] - 1
    z = model(input_ids=ids, attention_mask=mask).logits[:, start:-1] / temperature
    logp = z.log_softmax(-1)
    return logp.gather(-1, inputs["completion_ids"][..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def off_policy(model, inputs, temperature=1.0):
    """The batch with log-probabilities of an old policy, of a reference and of a sampler, all near the model's own."""
    with torch.no_grad():
        logp, _ = whole(model, inputs, temperature)
    old, reference, sampler = logp + 0.4 * inputs["noise"]
    return {
        **inputs, "old_per_token_logps": old, "ref_per_token_logps": reference, "sampling_per_token_logps": sampler,
        "old_logps": (old * inputs["completion_mask"]).sum(1),
    }  # fmt: skip


def trainer(cls=GRPOTrainer, temperature=1.0, accumulation=1, **options):
    """A stand-in with the attributes that TRL's loss reads; its log-probabilities are of whole logits."""
    defaults = dict(
        loss_type="dapo", beta=0.0, epsilon_low=0.2, epsilon_high=0.2, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, entropy_coef=0.0,
        vllm_importance_sampling_correction=False, use_adaptive_entropy=False, aux_loss_enabled=False,
    )  # fmt: skip
    arguments = dict(
        delta=None, use_bias_correction_kl=True, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    own = SimpleNamespace(
        **{k: options.get(k, v) for k, v in defaults.items()}, max_completion_length=LONGEST,
        args=SimpleNamespace(**{k: options.get(k, v) for k, v in arguments.items()}),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=accumulation,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True,
            pad_across_processes=lambda x, **_: x, gather_for_metrics=lambda x: x,
        ),
    )  # fmt: skip
    assert options.keys() <= {*defaults, *arguments}, options
    own._entropy_bonus_enabled = own.entropy_coef != 0
    own.get_off_policy_mask, own.get_gamma_weights = GRPOTrainer.get_off_policy_mask, GRPOTrainer.get_gamma_weights
    own.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(own, *a)

    def from_whole(model, ids, mask, keep, **_):
        logp, entropy = whole(model, own.inputs, temperature)
        return logp, entropy, None

    own._get_per_token_logps_and_entropies = from_whole

    def loss(model, inputs):
        own.inputs = inputs
        return cls._compute_loss(own, model, inputs)

    own.loss = loss
    return own


def grpo(model, inputs, **options):
    return trainer(**options).loss(model, inputs)


def rloo(model, inputs, **options):
    return trainer(RLOOTrainer, **options).loss(model, inputs)
