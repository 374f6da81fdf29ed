"""HyperEpochTrainer against plain torch: the loss and its gradient, a whole run, what is stored and measured."""

import copy
import json

import pytest
import q0_tiny as q0
import tiny_models as tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from burnish.methods import HyperEpochConfig, HyperEpochTrainer
from burnish.methods.q0 import log_probs_of, lr_mult, perturb, token_log_probs, wd_mult
from burnish.methods.q0.snapshots import load_frozen


def capped(model, ids, cap):
    logits = model(ids).logits[:, :-1]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_loss(model, teacher, ids, share, temperature, cap):
    """The paper's loss in plain torch: CE, and torch's own kl_div with T^2."""
    z, y = capped(model, ids, cap).flatten(0, 1), ids[:, 1:].flatten()
    loss = F.cross_entropy(z, y)
    if teacher is None:
        return loss
    with torch.no_grad():
        u = capped(teacher, ids, cap).flatten(0, 1)
    divergence = F.kl_div(
        (z / temperature).log_softmax(-1), (u / temperature).log_softmax(-1), reduction="batchmean", log_target=True
    )
    return (1 - share) * loss + share * temperature**2 * divergence


def gradient_of(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("share, temperature", [(0.45, 1.2), (1.0, 2.0)])
def test_loss_and_gradient_are_plain_torchs(cap, share, temperature, tmp_path):
    model = tiny.llama(3, vocabulary=64, tied=True).double()
    t = q0.trainer(tmp_path, model=model, distill_share=share, distill_temperature=temperature, softcap=cap)
    teacher = copy.deepcopy(tiny.llama(4, vocabulary=64, tied=True).double())
    teacher.config.final_logit_softcapping = cap
    plain = tiny.llama(3, vocabulary=64, tied=True).double()
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    model.train()
    for with_teacher in (None, teacher):
        if with_teacher is not None:
            t._teach(teacher, 1)
        loss = t.compute_loss(model, dict(batch))
        want = plain_loss(plain.train(), with_teacher, ids, share, temperature, cap)
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        ours, theirs = gradient_of(loss, model), gradient_of(want, plain)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-12
    # a teacher that is the student adds nothing
    same = copy.deepcopy(plain)
    same.config.final_logit_softcapping = cap
    t._teach(same, 1)
    loss = t.compute_loss(model, dict(batch))
    ce = plain_loss(plain, None, ids, 0, 1, cap)
    assert loss.item() == pytest.approx((1 - share) * ce.item(), rel=1e-12, abs=1e-12)
    scaled = gradient_of((1 - share) * ce, plain)
    assert float((gradient_of(loss, model) - scaled).norm()) < 1e-12 * float(scaled.norm() + 1)
    # and evaluation is the likelihood, whatever the training
    model.eval()
    assert t.compute_loss(model, dict(batch)).item() == pytest.approx(ce.item(), rel=1e-12)
    assert t.fused_head.objective is t.distillation


def test_a_run_is_the_loop_in_plain_torch(tmp_path):
    """Three cycles, accumulation, teacher from the second on, noise, decay and rate: weights of every snapshot."""
    start = tiny.llama(3, vocabulary=64)
    t = q0.trainer(
        tmp_path, model=copy.deepcopy(start), distill_after_cycles=2, snapshot_dtype="float32", softcap=5.0,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, weight_decay=0.5, max_grad_norm=0.5,
    )  # fmt: skip
    t.train()
    model, teacher = start.train(), None
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.999)
    )
    rows = iter(range(len(t.rows)))
    for cycle, steps in enumerate(t.plan.lengths):
        assert steps == t.rows.rows // 4
        for s in range(steps):
            for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
                group["lr"], group["weight_decay"] = 1e-2 * lr_mult(s, steps), decay * wd_mult(s, steps)
            ids = torch.stack([t.rows[next(rows)]["input_ids"] for _ in range(4)])
            optimizer.zero_grad()
            plain_loss(model, teacher, ids, 0.45, 1.2, 5.0).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        for _ in range(t.rows.rows % 4):
            next(rows)
        ours = q0.stored(tmp_path / f"cycle-00{cycle}")
        for name, p in model.named_parameters():
            error = float((ours[name] - p).norm() / p.norm())
            assert error < 2e-5, f"cycle {cycle}, {name}: {error}"
        if cycle + 1 >= 2:
            teacher = copy.deepcopy(model).eval()
        perturb(model, t.args.perturbation(cycle), 7 * 1_000_003 + cycle)
    assert t.state.global_step == t.plan.ends[-1]
    # no noise behind the last cycle
    assert all(torch.equal(p, ours[n]) for n, p in t.model.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fitness_is_that_of_the_stored_weights(dtype, tmp_path):
    held_out = q0.documents(6, seed=5)
    t = q0.trainer(tmp_path, eval_data=held_out, snapshot_dtype=dtype, softcap=4.0, cycles=2, perturb_first=0.0)
    t.train()
    assert t.snapshot_folders() == [tmp_path / "cycle-000", tmp_path / "cycle-001"]
    assert log_probs_of(t.snapshot_folders()).shape == (2, len(t.fitness.stream) - 1)
    for folder in t.snapshot_folders():
        # reloaded as any model is, in fp32: the same bits
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, rows in (("fitness", t.fitness), ("eval", t.eval_dataset)):
            again = token_log_probs(saved, rows, batch_size=t.args.per_device_eval_batch_size)
            assert torch.equal(again, log_probs_of([folder], name)[0])
        items = [t.fitness[i] for i in range(len(t.fitness))]
        ids, labels = (torch.stack([x[k] for x in items]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            z = capped(saved.double().eval(), ids, 4.0).log_softmax(-1)
        want = z.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][labels[:, 1:] != -100]
        assert float((log_probs_of([folder])[0] - want).abs().max()) < 2e-5
        record = json.loads((folder / "snapshot.json").read_text())
        assert record["fitness_nll"] == pytest.approx(-float(want.mean()), abs=1e-5)
        kept = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert kept.dtype == getattr(torch, dtype) and kept.config.final_logit_softcapping == 4.0
        assert kept.lm_head.weight is kept.model.embed_tokens.weight  # tied, as it was
    last = load_frozen(type(t.model), folder, torch.device("cpu"))
    rounded = {n: p.to(getattr(torch, dtype)).float() for n, p in t.model.named_parameters()}
    assert all(torch.equal(p, rounded[n]) for n, p in last.named_parameters())
    assert not last.training and not any(p.requires_grad for p in last.parameters())
    metrics = t.evaluate()
    assert metrics["eval_loss"] == pytest.approx(record["eval_nll"], abs=0.05)


def test_fitness_documents_are_the_front_and_never_trained_on(tmp_path):
    data = [[3 + i] * 9 for i in range(30)]
    t = q0.trainer(tmp_path, data=data, fitness_share=0.25)
    assert sorted(set(t.fitness.stream.tolist())) == list(range(3, 11))
    trained = {x for i in range(len(t.rows)) for x in t.rows[i]["input_ids"].tolist()}
    assert trained == set(range(11, 33))
    given = q0.documents(3, seed=9)
    args = q0.config(tmp_path)
    other = HyperEpochTrainer(tiny.llama(vocabulary=64), args, train_dataset=data, fitness_dataset=given)
    assert other.rows.tokens == 270 and len(other.fitness.stream) == sum(len(d["input_ids"]) for d in given)
    assert args.max_steps == -1  # the caller's arguments are as they were


def test_the_teacher_is_the_snapshot_before_and_comes_when_it_is_due(tmp_path):
    seen = []
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            head = t.fused_head
            seen.append((state.global_step, head.objective.name, head.teacher))

    t = q0.trainer(tmp_path, cycles=4, distill_after_cycles=2, callbacks=[Watch()])
    t.train()
    length = t.plan.lengths[0]
    names = [n for _, n, _ in seen]
    assert names == ["nll"] * (2 * length) + ["chain_distillation"] * (2 * length)
    for cycle in (2, 3):
        teacher = seen[cycle * length][2].__wrapped__.__closure__
        model = next(c.cell_contents for c in teacher if isinstance(c.cell_contents, torch.nn.Module))
        before = q0.stored(tmp_path / f"cycle-00{cycle - 1}")
        assert all(torch.equal(p, before[n].float()) for n, p in model.named_parameters())
    plain = q0.trainer(tmp_path / "b", cycles=4, distill_after_cycles=1, distill_share=0.0)
    plain.train()
    assert plain.fused_head.teacher is None and plain.fused_head.objective.name == "nll"


def test_muon_and_a_batch_that_changes_with_the_cycles(tmp_path):
    t = q0.trainer(tmp_path, cycles=4, optimizer="muon", batch_floor=0.75, logging_steps=1, weight_decay=0.3)
    t.train()
    rows = t.rows.rows
    assert t.plan.lengths == [rows // 3, rows // 4, rows // 4, rows // 3]
    inner = t.optimizer.optimizer
    assert type(inner).__name__ == "MuonAdamW"
    assert {g["initial_weight_decay"] for g in inner.param_groups} == {0.3, 0.0}
    logged = [e for e in t.state.log_history if "loss" in e]
    want = [1e-2 * lr_mult(s, n) for n in t.plan.lengths for s in range(n)]
    assert [e["learning_rate"] for e in logged] == pytest.approx(want)
    assert [e["cycle"] for e in logged] == [c + 1 for c, n in enumerate(t.plan.lengths) for _ in range(n)]
    assert logged[-1]["epoch"] == pytest.approx(t.plan.epoch_at(t.plan.ends[-1])) == 4.0
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3


def test_the_control_has_one_schedule_and_all_snapshots(tmp_path):
    t = q0.trainer(tmp_path, lr_schedule="once", wd_floor=1.0, logging_steps=1, perturb_first=0.0, perturb_last=0.0)
    t.train()
    n = t.plan.ends[-1]
    rates = [e["learning_rate"] for e in t.state.log_history if "loss" in e]
    assert rates == pytest.approx([1e-2 * lr_mult(s, n) for s in range(n)]) and len(t.snapshot_folders()) == 3


def test_epochs_are_passes_over_the_documents(tmp_path):
    t = q0.trainer(
        tmp_path, cycles=2, epochs_per_cycle=2, save_strategy="epoch", eval_strategy="epoch",
        eval_data=q0.documents(3, seed=5), per_device_train_batch_size=2,
    )  # fmt: skip
    t.train()
    steps = sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-*"))
    assert len(steps) == 4 and steps[1] == t.plan.ends[0] and steps[3] == t.plan.ends[1]
    assert len({e["step"] for e in t.state.log_history if "eval_loss" in e}) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": 5}, "max_steps=5: cycles decide it; use cycles and epochs_per_cycle"),
        ({"num_train_epochs": 2}, "num_train_epochs=2: cycles decide it"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine': cycles decide it; use lr_schedule"),
        ({"warmup_steps": 3}, "warmup_steps=3: cycles decide it; use cycle_warmup"),
        ({"cycles": 0}, "cycles must be a whole number, at least 1; got 0"),
        ({"epochs_per_cycle": 1.5}, "epochs_per_cycle must be a whole number, at least 1; got 1.5"),
        ({"lr_floor": 1.0}, "lr_floor must lie in [0, 1); got 1.0"),
        ({"wd_floor": -0.1}, "wd_floor must lie in [0, 1]; got -0.1"),
        ({"cycle_warmup": 2.0}, "cycle_warmup must be a share of the cycle, in [0, 1]; got 2.0"),
        ({"batch_floor": 0.0}, "batch_floor must lie in (0, 1]; got 0.0"),
        ({"distill_share": 1.5}, "distill_share must lie in [0, 1]; got 1.5"),
        ({"distill_temperature": 0.0}, "distill_temperature must be above 0; got 0.0"),
        ({"perturb_first": -1.0}, "perturb_first must be a number, at least 0; got -1.0"),
        ({"fitness_share": 1.0}, "fitness_share must lie in (0, 1); got 1.0"),
        ({"softcap": 0.0}, "softcap must be above 0, or None; got 0.0"),
        ({"snapshot_dtype": "int8"}, "snapshot_dtype must be one of bfloat16, float16, float32; got 'int8'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon; got 'sgd'"),
        ({"lr_schedule": "zigzag"}, "lr_schedule must be one of cycles, once; got 'zigzag'"),
    ],
)
def test_config_errors(changes, message, tmp_path):
    with pytest.raises(ValueError) as error:
        q0.config(tmp_path, **changes)
    assert message in str(error.value)


def test_trainer_errors(tmp_path):
    model, data = tiny.llama(vocabulary=64), q0.documents()
    with pytest.raises(TypeError, match="args must be a HyperEpochConfig; got TrainingArguments"):
        from transformers import TrainingArguments

        HyperEpochTrainer(model, TrainingArguments(str(tmp_path)), train_dataset=data)
    with pytest.raises(ValueError, match="does not support data_collator"):
        HyperEpochTrainer(model, q0.config(tmp_path), train_dataset=data, data_collator=list)
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="without PEFT"):
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        HyperEpochTrainer(wrapped, q0.config(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="a cycle of 1 epochs has"):
        q0.trainer(tmp_path, per_device_train_batch_size=500)
    assert HyperEpochConfig is type(q0.config(tmp_path))


def test_log_probs_of_errors(tmp_path):
    with pytest.raises(ValueError, match="folders: no snapshot"):
        log_probs_of([])
    with pytest.raises(ValueError, match=r"has no fitness.safetensors"):
        log_probs_of([tmp_path])
