"""TRL's policy trainers with our head: the unfused trainers' losses and gradients, nothing left behind, refusals."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import tiny_models as tiny
import torch
import trl_losses
from datasets import Dataset
from test_fused_head import Largest, family, lora
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from burnish import objectives
from burnish.methods import fuse_lm_head, fuse_policy_head
from burnish.methods.policy_head import _ScoringHead

warnings.filterwarnings("ignore", category=FutureWarning)


def reward(completions, **_):
    """Digits are worth something, so that groups differ."""
    return [sum(c.isdigit() + 0.1 * c.isalpha() for c in text) for text in completions]


def make(folder, model, cls=GRPOTrainer, **options):
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=7, max_steps=2,
        learning_rate=0.3, optim="sgd", logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=3, temperature=0.8, use_cpu=True,
    )  # fmt: skip
    config = RLOOConfig if issubclass(cls, RLOOTrainer) else GRPOConfig
    data = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)])
    peft = options.pop("peft_config", None)
    return cls(
        model, reward_funcs=reward, args=config(**{**defaults, **options}), train_dataset=data,
        processing_class=tiny.tokenizer(), peft_config=peft,
    )  # fmt: skip


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def check(ours, theirs, tol=1e-5):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


RUNS = {
    "grpo": (GRPOTrainer, {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.02, "gradient_accumulation_steps": 2}),
    "dapo, two updates a batch": (
        GRPOTrainer, {"num_iterations": 2, "epsilon_high": 0.28, "top_entropy_quantile": 0.5}),
    "rloo": (RLOOTrainer, {"beta": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_unfused_trainers(tmp_path, model_folder, name):
    """Generation, rewards, losses, logged metrics and weights of two steps."""
    cls, options = RUNS[name]
    results = []
    for fused in (False, True):
        trainer = make(tmp_path, model_folder, cls, **options)
        before = parameters(trainer)
        handle = fuse_policy_head(trainer) if fused else None
        trainer.train()
        history = trainer.state.log_history[:2]
        logs = [{k: v for k, v in e.items() if "time" not in k and "second" not in k} for e in history]
        results.append((logs, parameters(trainer)))
        assert any(not torch.equal(p, before[n]) for n, p in results[-1][1].items())
        if fused:
            assert len(handle.heads) == (2 if options.get("beta") else 1)
            handle.restore()
    (theirs, weights), (ours, got) = results
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    check(got, weights)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, model_folder):
    return make(tmp_path_factory.mktemp("trainer"), model_folder, temperature=0.7)


OPTIONS = [
    {"loss_type": loss, "epsilon_low": 0.2, "epsilon_high": 1.2 if loss == "cispo" else 0.3, **more}
    for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
    for more in ({}, {"beta": 0.2, "entropy_coef": 0.05})
] + [
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "dapo", "top_entropy_quantile": 0.5, "delta": 1.4},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[str(i) for i in range(len(OPTIONS))])
def test_every_loss_type(trainer, options):
    """TRL's loss on the fused head's vectors and on whole logits: value and gradient of every parameter to 1e-5."""
    model = trainer.model
    inputs = trl_losses.off_policy(model, trl_losses.batch(), 0.7)
    theirs = trl_losses.trainer(temperature=0.7, **options)
    want = theirs.loss(model, inputs)
    model.zero_grad()
    want.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    own = trl_losses.trainer(temperature=0.7, **options)
    own.accelerator.autocast = trainer.accelerator.autocast
    with fuse_policy_head(trainer):
        # TRL's method, which asks the model by its seam
        own._get_per_token_logps_and_entropies = trainer._get_per_token_logps_and_entropies
        got = own.loss(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    got.backward()
    for name, g in expected.items():
        p = dict(model.named_parameters())[name]
        assert (p.grad - g).norm() <= 1e-5 * g.norm() + 1e-7, name
    for key, values in theirs._metrics["train"].items():
        assert own._metrics["train"][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
    model.zero_grad()


def completions(model):
    """A batch as TRL's trainers ask for it: labels on the completions alone."""
    batch = tiny.batch()
    return {**batch, "fused_lm_head": True}


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "softcap", "divided", "scaled", "moe"])
def test_the_answer_is_that_of_trls_head(name):
    results = []
    for ours in (False, True):
        model = family(name)
        add_fused_lm_head(model, temperature=0.6, outputs=("log_probs", "entropy"))
        if ours:
            _ScoringHead(model, temperature=0.6, entropy=True, fp32=False, budget=None, backend="auto")
        out = model(**completions(model), num_items_in_batch=37)
        up = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(0))
        (out.loss + (out.log_probs * up).sum() + (out.entropy * up.flip(0)).sum()).backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (theirs, want), (out, got) = results
    for key in ("loss", "log_probs", "entropy", "label_mask", "aux_loss"):
        mine, other = getattr(out, key), getattr(theirs, key)
        assert (mine is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert got.keys() == want.keys()
    for key, g in want.items():
        assert (got[key] - g).norm() <= 2e-5 * g.norm() + 1e-6, key


def test_peft_reference_and_policy(tmp_path):
    """The adapters' gradients, and log-probabilities with the adapters off, which are the reference's."""
    student = lora(tiny.llama(), lora_dropout=0.0)
    trainer = make(tmp_path, student, beta=0.1)
    assert trainer.ref_model is None
    batch = completions(student)
    results = []
    for fused in (False, True):
        handle = fuse_policy_head(trainer) if fused else None
        student.zero_grad()
        out = trainer.model(**batch)
        (out.log_probs.sum() + out.entropy.square().sum()).backward()
        with torch.no_grad(), student.disable_adapter():
            base = trainer.model(**batch).log_probs
        results.append((out.log_probs.detach(), base, {n: p.grad.clone() for n, p in student.named_parameters()
                                                       if p.grad is not None}))  # fmt: skip
        if fused:
            handle.restore()
    for a, b in zip(results[1][:2], results[0][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0][0], results[0][1])
    assert results[0][2] and all("lora" in n for n in results[0][2])
    check(results[1][2], results[0][2], 1e-4)


def test_a_head_in_fp32_under_a_bf16_model(tmp_path, model_folder):
    """cast_lm_head_to_fp32: fp32 products of bf16 hidden states."""
    trainer = make(tmp_path, model_folder, cast_lm_head_to_fp32=True, model_init_kwargs={"dtype": "bfloat16"}, beta=0.1)
    model = trainer.model
    assert model.lm_head.weight.dtype == torch.float32 and model.model.norm.weight.dtype == torch.bfloat16
    theirs = model(**completions(model))
    with fuse_policy_head(trainer) as handle:
        ours = model(**completions(model))
        reference = trainer.ref_model(**completions(model))
    assert ours.log_probs.dtype == ours.entropy.dtype == torch.float32
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    assert reference.entropy is None and len(handle.heads) == 2


def test_restore(trainer):
    model, batch = trainer.model, completions(trainer.model)
    before = model.__dict__["forward"]
    ids = batch["input_ids"]
    logits, loss = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
    with fuse_policy_head(trainer) as handle:
        assert model.forward is not before
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert torch.equal(model(input_ids=ids, labels=ids).loss, loss)
        with pytest.raises(ValueError, match="fused already"):
            fuse_policy_head(trainer)
        with pytest.raises(ValueError, match="fused already"):
            fuse_lm_head(model, objectives.nll())
        inner = model.forward  # a wrapper of accelerate's stays, and what it wraps becomes TRL's again
        model.forward = lambda *a, **k: inner(*a, **k)
    handle.restore()
    out = model(**batch)
    assert out.log_probs is not None and "_ScoringHead" not in str(out.log_probs.grad_fn)
    model.forward = before
    torch.testing.assert_close(model(**batch).log_probs, out.log_probs)
    fuse_policy_head(trainer).restore()
    assert model.__dict__["forward"] is before


def test_no_label_and_no_whole_logits(trainer):
    batch = completions(trainer.model)
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with fuse_policy_head(trainer):
        out = trainer.model(**masked)
        assert not out.log_probs.any() and not out.entropy.any() and out.loss == 0
        (out.log_probs.sum() + out.entropy.sum()).backward()
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    vocabulary, size, length = 8209, 8, 160
    model = tiny.llama(vocabulary=vocabulary)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    _ScoringHead(model, temperature=1.0, entropy=True, fp32=False, budget=None, backend="auto")
    with Largest(vocabulary) as seen:
        out = model(**tiny.batch(size=size, length=length, vocabulary=vocabulary), fused_lm_head=True)
        (out.log_probs.sum() + out.entropy.sum()).backward()
    assert seen.most <= 32 * vocabulary  # the head itself and its gradient, (V, 32): no logits of all columns


def test_two_ranks_under_ddp_and_fsdp(tmp_path):
    ranks.run(Path(__file__).with_name("policy_head_ranks.py"), 2, tmp_path)


class Overridden(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class OnTop(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


def test_refusals(tmp_path, model_folder, trainer, monkeypatch):
    sft = SFTTrainer(
        tiny.llama(), SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list(tiny.rows()),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"trainer must be a trl\.GRPOTrainer or RLOOTrainer; got SFTTrainer"):
        fuse_policy_head(sft)
    with pytest.raises(ValueError, match=r"Overridden\._get_per_token_logps_and_entropies, overridden"):
        fuse_policy_head(make(tmp_path, model_folder, Overridden))
    fuse_policy_head(make(tmp_path, model_folder, OnTop)).restore()  # it reads what the model answers
    states = {
        "DeepSpeed ZeRO-3": {"deepspeed_plugin": SimpleNamespace(zero_stage=3)},
        "tensor parallelism": {"parallelism_config": SimpleNamespace(tp_enabled=True)},
        r"FSDP 1 \(fsdp_version=1\)": {"fsdp_plugin": SimpleNamespace(fsdp_version=1)},
    }
    for text, state in states.items():
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"does not support {text}"):
            patch.setattr(trainer, "accelerator", SimpleNamespace(state=SimpleNamespace(**state)))
            patch.setattr(trainer, "is_fsdp_enabled", "fsdp_plugin" in state)
            fuse_policy_head(trainer)
    for option in ("torch_compile", "use_liger_kernel"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"does not support {option}=True"):
            patch.setattr(trainer.args, option, True)
            fuse_policy_head(trainer)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no fused head of TRL's"):
        patch.delitem(trainer.model.__dict__, "forward")
        fuse_policy_head(trainer)
    fuse_policy_head(trainer).restore()
