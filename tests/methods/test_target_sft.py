"""TargetSFTTrainer: only the loss differs from TRL's trainer."""

import copy
import warnings

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import burnish
from burnish.methods import TargetSFTTrainer, fuse_lm_head
from burnish.methods.rules import check_labels, check_tokenizers

warnings.filterwarnings("ignore", category=FutureWarning)


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=4, learning_rate=0.2, logging_steps=1,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        max_length=64, dataloader_pin_memory=False, seed=7, optim="sgd",  # Adam turns rounding into steps
    )  # fmt: skip
    return SFTConfig(**{**defaults, **options})


def make(folder, cls=TargetSFTTrainer, model=None, rows=None, arguments=None, **options):
    return cls(
        model or tiny.llama(), config(folder, **(arguments or {})), processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list(rows or tiny.rows()), **options,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def check_equal(a, b, tol=1e-5):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("arguments", [
    {}, {"gradient_accumulation_steps": 3}, {"completion_only_loss": False}, {"gradient_checkpointing": True},
    {"packing": True, "max_length": 24},
])  # fmt: skip
def test_nll_steps_as_trl_does(tmp_path, arguments):
    theirs, ours = make(tmp_path, SFTTrainer, arguments=arguments), make(tmp_path, objective="nll", arguments=arguments)
    expected, got = losses(theirs), losses(ours)
    assert len(got) == 4 and got == pytest.approx(expected, abs=1e-5)
    check_equal(parameters(ours), parameters(theirs))
    for name in ("mean_token_accuracy", "entropy", "num_tokens"):
        a, b = ([e[name] for e in t.state.log_history if name in e] for t in (ours, theirs))
        assert len(a) == 4 and a == pytest.approx(b, abs=1e-5), name


def test_moe_steps_as_trl_does(tmp_path):
    from test_fused_head import family

    arguments = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 0.5}
    theirs = make(tmp_path, SFTTrainer, model=family("moe"), arguments=arguments)
    ours = make(tmp_path, objective="nll", model=family("moe"), arguments=arguments)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    check_equal(parameters(ours), parameters(theirs), 2e-5)


def test_dft_steps_as_trls_does(tmp_path):
    expected = losses(make(tmp_path, SFTTrainer, arguments={"loss_type": "dft"}))
    assert losses(make(tmp_path, objective="dft")) == pytest.approx(expected, abs=1e-5)


def test_loss_of_a_batch_equals_the_materialised_formula(tmp_path):
    from test_fused_head import materialised_target_sft

    trainer = make(tmp_path, objective_args={"eta": 0.4}, teacher_model=tiny.llama(1))
    batch = next(iter(trainer.get_train_dataloader()))
    plain = materialised_target_sft(tiny.llama(), tiny.llama(1), batch, 0.4)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(11))
    torch.testing.assert_close(loss.double(), plain.sum() / 11, rtol=1e-5, atol=1e-6)


def test_four_micro_batches_are_one_batch(tmp_path):
    options = dict(objective_args={"eta": 0.4}, teacher_model="self")
    one, four = (
        make(tmp_path, arguments={
            "per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 3,
        }, **options) for steps in (1, 4)
    )  # fmt: skip
    assert losses(one) == pytest.approx(losses(four), abs=1e-5)
    check_equal(parameters(one), parameters(four), 2e-5)


def test_a_self_teacher_is_the_start_and_stays_out_of_the_way(tmp_path):
    start = tiny.llama()
    trainer = make(tmp_path, model=copy.deepcopy(start), objective="asft", teacher_model="self")
    trainer.train()
    (teacher,) = trainer._teacher
    check_equal(dict(teacher.named_parameters()), dict(start.named_parameters()), 0)
    assert not any(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start.parameters(), strict=True))
    own = {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.data_ptr() in own for g in trainer.optimizer.param_groups for p in g["params"])
    trainer.save_model(str(tmp_path / "saved"))
    assert type(start).from_pretrained(tmp_path / "saved").state_dict().keys() == start.state_dict().keys()


@pytest.mark.parametrize("teacher", ["self", "base"])
def test_lora(tmp_path, teacher):
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(tmp_path, objective="sft_kl", teacher_model=teacher, peft_config=peft)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name), name
    assert trainer._teacher[0] == "base"  # a fresh adapter needs no copy
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_a_trained_adapter_as_self_teacher(tmp_path):
    from test_fused_head import lora

    student = lora(tiny.llama(), lora_dropout=0.0)
    start = copy.deepcopy(student)
    trainer = make(tmp_path, model=student, objective="kd", teacher_model="self")
    first = losses(trainer)
    assert abs(first[0]) < 1e-5 and abs(first[-1]) < 1e-4  # KL to itself: nothing to learn
    check_equal(dict(trainer._teacher[0].named_parameters()), dict(start.named_parameters()), 0)


def test_evaluation(tmp_path):
    trainer = make(tmp_path, objective="nll", eval_dataset=Dataset.from_list(tiny.rows(5)))
    theirs = make(tmp_path, SFTTrainer, eval_dataset=Dataset.from_list(tiny.rows(5)))
    got, expected = trainer.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert got[name] == pytest.approx(expected[name], abs=1e-5)
    with_teacher = make(tmp_path, objective="asft", teacher_model="self", eval_dataset=trainer.eval_dataset)
    assert with_teacher.evaluate()["eval_loss"] > 0


def test_packed_documents_couple_by_document(tmp_path):
    trainer = make(tmp_path, objective="talr", arguments={"packing": True, "max_length": 24})
    assert all(0 < x < 20 for x in losses(trainer))


def test_a_teacher_from_a_directory(tmp_path):
    path = tiny.save(tmp_path / "teacher", tiny.llama(1).bfloat16())
    trainer = make(tmp_path, objective="kd", teacher_model=path)
    (teacher,) = trainer._teacher
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16} and not teacher.training
    assert losses(trainer)[0] > 0
    with pytest.raises(ValueError, match=r"mismatched tokenizers: token 'a' has id 3"):
        make(tmp_path, objective="kd", teacher_model=_shuffled(tmp_path / "other"))


def _shuffled(folder):
    tok = tiny.tokenizer()
    other = tiny.tokenizer(extra="~")
    other._tokenizer = type(other._tokenizer).from_str(
        tok._tokenizer.to_str().replace('"a": 3', '"a": -1').replace('"a":3', '"a":4').replace('"b":4', '"b":3')
    )
    return tiny.save(folder, tiny.llama(1), other)


def carried():
    """The objectives that need nothing with the data that TRL's collator does not carry."""
    elsewhere = {"token_weight", "ids", "advantages"}
    return [r["name"] for r in burnish.objectives.describe() if not elsewhere & set(r["needs"].split(", "))]


@pytest.mark.parametrize("name", carried())
def test_every_objective_trains(tmp_path, name):
    # profit's own threshold leaves nothing of an untrained model
    objective = burnish.objectives.get(name, **{"target_sft": {"eta": 0.5}, "profit": {"tau": 0.0}}.get(name, {}))
    teacher = tiny.llama(1) if "teacher" in objective.needs else None
    trainer = make(tmp_path, objective=objective, teacher_model=teacher, arguments={"max_steps": 2})
    before = parameters(trainer)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    after = parameters(trainer)
    assert all(torch.isfinite(p).all() for p in after.values())
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"target_sft.*eta"):
        make(tmp_path / "x")
    with pytest.raises(ValueError, match="unknown objective 'nil'"):
        make(tmp_path / "x", objective="nil")
    with pytest.raises(ValueError, match="'asft' needs a teacher"):
        make(tmp_path / "x", objective="asft")
    with pytest.raises(ValueError, match="token_weight"):
        make(tmp_path / "x", objective="cft")
    with pytest.raises(ValueError, match="'grpo' needs advantages with each batch"):
        make(tmp_path / "x", objective="grpo")
    with pytest.raises(ValueError, match="loss_type"):
        make(tmp_path / "x", objective="nll", arguments={"loss_type": "dft"})
    with pytest.raises(ValueError, match="label_smoothing"):
        make(tmp_path / "x", objective="nll", arguments={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="compute_loss_func"):
        make(tmp_path / "x", objective="nll", compute_loss_func=lambda *a, **k: None)
    with pytest.raises(ValueError, match="mismatched tokenizers"):
        make(tmp_path / "x", objective="kd", teacher_model=tiny.llama(vocabulary=100))
    with pytest.raises(ValueError, match="outside the vocabulary of 20"):
        make(tmp_path / "x", objective="nll", model=tiny.llama(vocabulary=20))
    with pytest.raises(ValueError, match="not with an Objective"):
        make(tmp_path / "x", objective=burnish.objectives.nll(), objective_args={"a": 1})
    with pytest.warns(UserWarning, match="reads no teacher"):
        make(tmp_path, objective="nll", teacher_model=tiny.llama(1))
    assert not (tmp_path / "x").exists()


def test_label_checks():
    check_labels(Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}]), 3)
    with pytest.raises(ValueError, match="row 2: label 3 is outside"):
        check_labels(Dataset.from_list([{"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": [3]}]), 3)
    with pytest.raises(ValueError, match="row 1: token -1"):
        check_labels(Dataset.from_list([{"input_ids": [-1]}]), 3)
    with pytest.raises(ValueError, match="no label is left"):
        check_labels(Dataset.from_list([{"input_ids": [1, 2], "labels": [1, -100]}]), 3)
    check_tokenizers(tiny.tokenizer(), tiny.tokenizer(extra="~"))
    with pytest.raises(ValueError, match="is missing for the teacher"):
        check_tokenizers(tiny.tokenizer(extra="~"), tiny.tokenizer())


@pytest.mark.parametrize("steps", [1, 2])
def test_plain_trainer(tmp_path, steps):
    """transformers' own Trainer: patch the model, nothing else; same losses as its own loss, and evaluation."""
    data = Dataset.from_list([
        {k: v[i].tolist() for k, v in tiny.batch(seed).items()} for seed in range(4) for i in range(3)
    ])  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=steps, max_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, prediction_loss_only=True,
        dataloader_pin_memory=False, max_grad_norm=0.5,
    )  # fmt: skip
    results = []
    for fused in (False, True):
        model = tiny.llama()
        if fused:
            fuse_lm_head(model, burnish.objectives.nll())
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        history = losses(trainer)
        results.append(([*history, trainer.evaluate()["eval_loss"]], parameters(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    # Adam divides a gradient near its epsilon by its own size: a hundredth of the learning rate
    check_equal(results[1][1], results[0][1], 1e-4)
