"""DriftTrainer: the loss of Eq. 15, what it is a mean over, and that weights reach it."""

import math
import warnings

import numpy as np
import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from drift_cases import (
    OPTIONS,
    config,
    distance,
    episodes,
    records,
    reference_gradient,
    rows,
    step_gradient,
    trainer,
)
from trl import SFTConfig, SFTTrainer

from burnish import linear_loss, objectives
from burnish.methods import DriftTrainer
from burnish.methods.drift import WeightOptions, softmax_weights, weigh, weighted_rows

warnings.filterwarnings("ignore", category=FutureWarning)
WEIGHTS = [2.5, 0.0, 0.3, 1.0, 0.7, 4.0, 0.1, 0.9]


SHAPES: dict[str, dict] = {
    "one batch": {"per_device_train_batch_size": 8},
    "activation checkpointing": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "uneven": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "padding-free": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True},
    "padded to 16": {"per_device_train_batch_size": 8, "pad_to_multiple_of": 16},
    "padding-free, padded to 16": {"per_device_train_batch_size": 8, "padding_free": True, "pad_to_multiple_of": 16},
}  # fmt: skip


@pytest.mark.parametrize("length_norm", ["sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_eq_15(tmp_path, shape, length_norm):
    """D12: however the batch is cut."""
    want_loss, want = reference_gradient(rows(WEIGHTS), mean=length_norm == "mean")
    one = trainer(tmp_path, rows(WEIGHTS), length_norm=length_norm, **SHAPES[shape])
    assert distance(step_gradient(one), want) < 2e-6
    assert one.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


def test_a_lora_is_trained_by_the_same_loss(tmp_path):
    """It begins as the identity, so its first loss is the full model's; only it is trained."""
    from peft import LoraConfig

    want, _ = reference_gradient(rows(WEIGHTS))
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    one = trainer(tmp_path, rows(WEIGHTS), more={"peft_config": lora}, per_device_train_batch_size=8, max_steps=2)
    moved = step_gradient(one)
    losses = [e["loss"] for e in one.state.log_history if "loss" in e]
    assert losses[0] == pytest.approx(want, rel=1e-5) and losses[1] < losses[0]
    assert {("lora" in n) for n, g in moved.items() if g.any()} == {True}


def test_a_bf16_model(tmp_path):
    """Its hidden states and head are bf16, what is summed of them fp32."""
    want, gradient = reference_gradient(rows(WEIGHTS), tiny.llama().bfloat16())
    one = trainer(tmp_path, rows(WEIGHTS), tiny.llama().bfloat16(), per_device_train_batch_size=8, learning_rate=1e-4)
    batch = one.data_collator(list(one.train_dataset))
    loss = one.compute_loss(one.model, batch)
    loss.backward()
    found = {n: p.grad.float() for n, p in one.model.named_parameters()}
    assert loss.item() == pytest.approx(want, rel=0.01) and distance(found, gradient) < 0.05


@pytest.mark.parametrize("shape", ["one batch", "accumulated", "padding-free"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_batch_weight_norm(tmp_path, shape, scale):
    """Also where the weights' sum is below 1, at which TRL holds its denominator."""
    data = rows([scale * w for w in WEIGHTS])
    want_loss, want = reference_gradient(data, by_weight=True)
    one = trainer(tmp_path, data, batch_weight_norm=True, **SHAPES[shape])
    assert distance(step_gradient(one), want) < 2e-6
    assert one.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


def test_d1_equal_returns_are_plain_sft_on_the_terminal_turn(tmp_path):
    """TRL's own trainer, on rows that all have as many tokens: its token mean times their number is our sum."""
    found = [e for e in episodes() if not e.solved and len(set(e.answers)) == 1]  # equal returns, weight 1
    found += [type(e)(e.prompt_id, 9, e.messages, e.rewards, e.answers) for e in found]
    data = weighted_rows(found)
    assert data["weight"] == [1.0] * len(found)
    ours = step_gradient(trainer(tmp_path, data, per_device_train_batch_size=len(found)))
    options = SFTConfig(**{**OPTIONS, "output_dir": str(tmp_path), "per_device_train_batch_size": len(found)})
    theirs = SFTTrainer(
        tiny.llama(), options, train_dataset=data.select_columns(["prompt", "completion"]),
        processing_class=tiny.tokenizer(chat=True),
    )  # fmt: skip
    tokens = sum(x != -100 for x in theirs.train_dataset["labels"][0])
    want = {n: tokens * g for n, g in step_gradient(theirs).items()}
    assert tokens == 2 and distance(ours, want) < 2e-6


def test_d10_masks(tmp_path):
    """The loss has a gradient at the last turn's logits and its eos, nowhere else; what came before conditions it."""
    one = trainer(tmp_path, weighted_rows(episodes()[1:2]))
    batch = one.data_collator([one.train_dataset[0]])
    ids, labels = batch["input_ids"], batch["labels"]
    text = one.processing_class.decode(ids[0])
    assert text == "[user]2+2=<eos>[assistant]5<eos>[user]no, again<eos>[assistant]5<eos>"
    assert one.processing_class.decode(labels[0][labels[0] != -100]) == "5<eos>"
    seen = []
    handle = one.model.model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))

    def loss_of(ids):
        out = one.model(input_ids=ids, labels=labels, token_weight=batch["token_weight"], fused_lm_head=True)
        return -out.log_probs

    loss = loss_of(ids)
    (grad,) = torch.autograd.grad(loss, seen[0])
    handle.remove()
    live = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert live == [ids.shape[1] - 3, ids.shape[1] - 2]  # the positions that predict "5" and <eos>
    feedback = text.split("[user]no")[0]
    where = len(one.processing_class(feedback, add_special_tokens=False)["input_ids"]) + 1
    changed = ids.clone()
    changed[0, where] += 1
    assert abs(float(loss_of(changed) - loss)) > 1e-4


def test_d11_sum_and_mean(tmp_path):
    def pair(data):
        return [
            step_gradient(trainer(tmp_path, data, length_norm=k, per_device_train_batch_size=8))
            for k in ("sum", "mean")
        ]

    total, mean = pair(rows(WEIGHTS, length=3))
    assert distance(total, {n: 4 * g for n, g in mean.items()}) < 2e-6  # three characters and eos
    total, mean = pair(rows([1.0] * 8))

    def flat(g):
        return torch.cat([x.flatten() for x in g.values()])

    cosine = torch.cosine_similarity(flat(total), flat(mean), 0)
    assert 0.8 < cosine < 0.9999


def test_d12_rows_of_weight_0(tmp_path):
    """They have no gradient, nothing of theirs reaches the loss, and they count as rows."""
    some = step_gradient(trainer(tmp_path, rows([2.0, 3.0]), per_device_train_batch_size=4))
    more = step_gradient(trainer(tmp_path, rows([2.0, 3.0, 0.0, 0.0]), per_device_train_batch_size=4))
    assert distance(more, {n: g / 2 for n, g in some.items()}) < 2e-6
    none = trainer(tmp_path, rows([0.0, 0.0]), batch_weight_norm=True)
    assert all(not g.any() for g in step_gradient(none).values())
    assert none.state.log_history[0]["loss"] == 0.0


def test_d12_a_row_without_labels_is_no_nan(tmp_path):
    data = Dataset.from_list([
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weight": 2.0},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "weight": 1.0},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100], "weight": 1.0},
    ])  # fmt: skip
    for length_norm in ("sum", "mean"):
        one = trainer(tmp_path, data, length_norm=length_norm)
        assert all(g.isfinite().all() for g in step_gradient(one).values())
        assert math.isfinite(one.state.log_history[0]["loss"])


def test_d13_is_grpo_on_policy(tmp_path):
    """Row means, no clip, no KL: the same gradient with the weights as advantages."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=g, dtype=torch.float64)
    head = torch.randn(31, 8, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 31, (4, 6), generator=g)
    labels[0, :3] = labels[2, 1:4] = -100
    w = torch.from_numpy(softmax_weights([1.0, 0.9, -0.1, -0.4], ["x"] * 4))
    grads = []
    for kind in ("drift", "grpo"):
        h, v = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if kind == "drift":
            objective = objectives.weighted_nll("sequence_mean_token_mean")
            loss = linear_loss(h, v, labels, objective, token_weight=w[:, None].expand(4, 6))
        else:
            loss = linear_loss(h, v, labels, objectives.grpo(low=1.0, high=1e9), inputs={"advantages": w})
        loss.backward()
        grads.append((h.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-14 * b.norm()
    # and the trainer's token weights are that aggregation
    one = trainer(tmp_path, rows(w.tolist()), length_norm="mean")
    batch = one.data_collator(list(one.train_dataset))
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    assert torch.allclose(batch["token_weight"][:, 0] * tokens, batch["weight"], rtol=1e-6)


def test_episodes_are_weighed_by_the_config(tmp_path):
    options = {"drift_beta": 0.5, "gamma": 0.8, "repetition_penalty": 0.2, "supervise": "all"}
    one = trainer(tmp_path, Dataset.from_list(records()), shuffle_dataset=False, **options)
    found = weigh(episodes(), WeightOptions(**options))
    want = [w for e, w in zip(episodes(), found.weights, strict=True) for _ in e.rewards]
    assert one.train_dataset["weight"] == want and len(want) == 16
    assert len(trainer(tmp_path, Dataset.from_list(records()), weighting="rejection").train_dataset) == 5
    assert len(trainer(tmp_path, Dataset.from_list(records()), drop_all_failed=True).train_dataset) == 6


def test_what_is_logged(tmp_path):
    one = trainer(
        tmp_path, weighted_rows(episodes()), per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=2
    )
    one.train()
    first, second = (e for e in one.state.log_history if "loss" in e)
    w = weigh(episodes()).weights
    p = w[w > 0] / w.sum()
    assert first["weight_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["weight_max"] == pytest.approx(w.max(), abs=1e-6)
    assert first["weight_entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
    assert first["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (9 * (w**2).sum()), abs=1e-6)
    assert first["success_share"] == second["success_share"] == pytest.approx(5 / 9)
    assert "success_share" not in rows([1.0]).column_names


def test_evaluation_is_a_mean_over_rows(tmp_path):
    data = rows(WEIGHTS)
    want, _ = reference_gradient(data)
    one = trainer(tmp_path, data, more={"eval_dataset": data}, per_device_eval_batch_size=9)
    assert one.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    episodes_too = Dataset.from_list(records())
    want, _ = reference_gradient(weighted_rows(episodes()))
    assert one.evaluate(episodes_too)["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_long_rows_are_left_out_whole(tmp_path):
    data = weighted_rows(episodes())
    with pytest.warns(UserWarning, match="6 of 9 rows are longer than max_length=24: left out"):
        one = trainer(tmp_path, data, max_length=24)
    assert {tuple(x) for x in one.train_dataset["input_ids"]} <= {
        tuple(x) for x in trainer(tmp_path, data).train_dataset["input_ids"]
    }
    with pytest.raises(ValueError, match="9 of 9 rows"):
        trainer(tmp_path, data, max_length=5)


REFUSED = {
    "packing": {"packing": True, "max_length": 64}, "eval_packing": {"eval_packing": True},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "completion_only_loss": {"completion_only_loss": False},
    "skip_prepare_dataset": {"dataset_kwargs": {"skip_prepare_dataset": True}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_weights_do_not_go_with(tmp_path, name):
    with pytest.raises(ValueError, match=f"DriftTrainer does not support .*{name}"):
        trainer(tmp_path, rows([1.0]), **REFUSED[name])


@pytest.mark.parametrize("more", [
    {"data_collator": lambda x: x}, {"compute_metrics": lambda x: {}}, {"objective": "nll"},
    {"teacher_model": "self"}, {"formatting_func": str},
])  # fmt: skip
def test_arguments_that_weights_do_not_go_with(tmp_path, more):
    (name,) = more
    with pytest.raises(ValueError, match=f"DriftTrainer does not support {name}"):
        trainer(tmp_path, rows([1.0]), more=more)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: missing column 'weight'"):
        trainer(tmp_path, Dataset.from_list(tiny.rows()))
    with pytest.raises(ValueError, match="missing column 'completion' beside 'weight'"):
        trainer(tmp_path, Dataset.from_list([{"prompt": "a", "weight": 1.0}]))
    with pytest.raises(ValueError, match="missing column 'rewards'"):
        trainer(tmp_path, Dataset.from_list(records()).remove_columns("rewards"))
    for bad in (math.nan, math.inf, -1.0, None):
        with pytest.raises(ValueError, match="row 1: weight must be a finite number"):
            trainer(tmp_path, rows([1.0, bad]))
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset"):
        trainer(tmp_path, records())
    with pytest.raises(TypeError, match="args must be a DriftConfig; got SFTConfig"):
        DriftTrainer(tiny.llama(), SFTConfig(str(tmp_path), bf16=False), train_dataset=rows([1.0]))
    with pytest.raises(ValueError, match="length_norm"):
        config(tmp_path, length_norm="tokens")
    with pytest.raises(ValueError, match="drift_beta"):
        config(tmp_path, drift_beta=-1.0)
    with pytest.raises(ValueError, match="DriftTrainer makes no logits"):
        one = trainer(tmp_path, rows([1.0]))
        one.predict(one.train_dataset)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 16}])
def test_each_token_has_its_rows_weight(tmp_path, options):
    """Also where a short row's labels begin at once, and on padding none."""
    data = Dataset.from_list([
        {"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)], "weight": float(n)} for n in (3, 9, 4)
    ])  # fmt: skip
    one = trainer(tmp_path, data, shuffle_dataset=False, **options)
    batch = one.data_collator(list(one.train_dataset))
    found = batch["token_weight"][batch["labels"] != -100].tolist()
    assert found == [3.0] * 2 + [9.0] * 8 + [4.0] * 3
    assert batch["token_weight"].sum() == 9 + 81 + 16 and batch["token_weight"].shape == batch["labels"].shape
