"""The patched forward: same numbers as materialised logits, nothing left behind, clear refusals."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)  # fmt: skip

import burnish
from burnish.methods.fused_head import FusedLossOutput, fuse_lm_head

SMALL = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
nll = burnish.objectives.nll


def family(name):
    torch.manual_seed(0)
    return {
        "llama": lambda: tiny.llama(),
        "tied": lambda: tiny.llama(tied=True),
        "gpt2": lambda: tiny.gpt2(),
        "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(
            **SMALL, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager")),
        "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
        "scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        "moe": lambda: MixtralForCausalLM(MixtralConfig(
            **SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1)),
    }[name]()  # fmt: skip


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(model, expected, tol=2e-6):
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "softcap", "divided", "scaled", "moe"])
@pytest.mark.parametrize("num_items", [None, 37])
def test_nll_is_the_models_own_loss(name, num_items):
    model, batch = family(name), tiny.batch()
    own = model(**batch, **({} if num_items is None else {"num_items_in_batch": num_items})).loss
    own.backward()
    expected = gradients(model)
    model.zero_grad()
    with fuse_lm_head(model, nll()):
        out = model(**batch, num_items_in_batch=num_items)
        assert out.logits is None
        torch.testing.assert_close(out.loss, own, rtol=1e-5, atol=1e-6)
        out.loss.backward()
    check_gradients(model, expected)


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_trl_form(name):
    model, batch = family(name), tiny.batch()
    plain = model(**batch)
    valid = batch["labels"][:, 1:] != -100
    logp = plain.logits[:, :-1].log_softmax(-1)
    rows = logp.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    with fuse_lm_head(model, nll()):
        out = model(**batch, fused_lm_head=True)
    assert isinstance(out, FusedLossOutput) and out.log_probs.ndim == 0
    torch.testing.assert_close(out.log_probs, rows[valid].sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1) * valid, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.is_top1.bool(), (logp.argmax(-1) == batch["labels"][:, 1:]) & valid)
    assert torch.equal(out.label_mask, valid)
    if name == "moe":
        torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)


def materialised_target_sft(model, teacher, batch, eta):
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    with torch.no_grad():
        t = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    y = batch["labels"][:, 1:]
    valid = y != -100
    z, t, y = z[valid], t[valid], y[valid]
    logp = z.log_softmax(-1)
    p, r = logp.detach().exp(), ((1 - eta) * z.detach() + eta * t).softmax(-1)
    gamma = p.gather(1, y[:, None])
    q = (1 - gamma) * r
    q.scatter_add_(1, y[:, None], gamma)
    return -(q * logp).sum(-1)


def test_target_sft_with_a_teacher_equals_its_formula():
    model, teacher, batch = tiny.llama(0), tiny.llama(1), tiny.batch()
    loss = materialised_target_sft(model, teacher, batch, 0.3).mean()
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    handle = fuse_lm_head(model, burnish.objectives.target_sft(0.3), teacher_model=teacher)
    out = model(**batch)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    check_gradients(model, expected)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in k for k in model.state_dict())
    handle.restore()


def test_a_larger_teacher_vocabulary_is_cut():
    model, batch = tiny.llama(0), tiny.batch()
    teacher, wide = tiny.llama(1), tiny.llama(1)
    wide.resize_token_embeddings(160)
    losses = []
    for one in (teacher, wide):
        with fuse_lm_head(model, burnish.objectives.kd(), teacher_model=one):
            losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses)


def test_shifted_labels():
    model, batch = tiny.llama(), tiny.batch()
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with fuse_lm_head(model, nll()):
        one = model(**batch).loss
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        two = model(**inputs, labels=batch["labels"], shift_labels=shifted).loss
        mask = model(**inputs, shift_labels=shifted, fused_lm_head=True).label_mask
    torch.testing.assert_close(one, two)
    assert mask.shape == batch["labels"].shape


@pytest.mark.parametrize("name", ["iw_sft", "talr"])
def test_packed_sequences_are_told_apart(name):
    """Two rows and the same two packed into one row give one loss; without positions they would not."""
    model, teacher = tiny.llama(0), tiny.llama(1)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    ids = ids[:, :7].clone() if name == "talr" else ids
    length = ids.shape[1]
    position = torch.arange(length).repeat(2)[None]
    packed = {"input_ids": ids.reshape(1, -1), "labels": ids.reshape(1, -1).clone(), "position_ids": position}
    packed["labels"][position == 0] = -100
    objective = burnish.objectives.get(name)
    with fuse_lm_head(model, objective, teacher_model=teacher if "teacher" in objective.needs else None):
        rows = model(input_ids=ids, labels=ids).loss
        together = model(**packed).loss
    torch.testing.assert_close(rows, together, rtol=1e-5, atol=1e-6)


def test_token_weights_travel_with_the_labels():
    model, batch = tiny.llama(), tiny.batch()
    weight = torch.rand(batch["labels"].shape)
    y = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none") * weight[:, 1:]
    with fuse_lm_head(model, burnish.objectives.cft()):
        loss = model(**batch, token_weight=weight).loss
        with pytest.raises(ValueError, match="token_weight"):
            model(**batch)
    torch.testing.assert_close(loss, rows.sum() / (y != -100).sum(), rtol=1e-5, atol=1e-6)


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM", "lora_dropout": 0.5, **options}
    wrapped = get_peft_model(model, LoraConfig(**options))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    return wrapped


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft_student_and_its_base_as_teacher(options):
    base, batch = tiny.llama(), tiny.batch()
    separate = copy.deepcopy(base)
    student = lora(base, **options)
    if options:  # the trained copy of the head moves away from the original
        torch.nn.init.normal_(student.base_model.model.lm_head.modules_to_save["default"].weight, std=0.3)
    student.train()
    objective = burnish.objectives.asft(0.5)
    results = []
    for teacher in ("base", separate):
        with fuse_lm_head(student, objective, teacher_model=teacher):
            torch.manual_seed(3)  # the student's dropout is on, the teacher's must not draw from it
            student.zero_grad()
            out = student(**batch)
            out.loss.backward()
            results.append((out.loss.detach(), gradients(student)))
    assert student.training and all("lora" in n or "modules_to_save" in n for n in results[0][1])
    torch.testing.assert_close(results[0][0], results[1][0])
    check_gradients(student, results[0][1])


@pytest.mark.parametrize("form", ["lora", "dora", "dropout"])
def test_adapter_on_the_head_is_trained_as_peft_trains_it(form):
    """Loss and gradients of the eager model, logits and all; the base gets none."""
    batch = tiny.batch()
    student = lora(tiny.llama(), target_modules=["lm_head", "q_proj"], use_dora=form == "dora",
                   lora_dropout=0.3 if form == "dropout" else 0.0)  # fmt: skip
    student.train(form == "dropout")
    student.zero_grad()
    labels = batch["labels"][:, 1:]
    torch.manual_seed(0)
    logits = student(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    exact.backward()
    want = gradients(student)
    student.zero_grad()
    with fuse_lm_head(student, nll()):
        loss = student(**batch).loss
        loss.backward()
    got = gradients(student)
    assert any("lm_head.lora_A" in n for n in got) and any("lm_head.lora_B" in n for n in got)
    assert (form == "dora") == any("lm_head.lora_magnitude" in n for n in got)
    assert not any(n.endswith("base_layer.weight") for n in got)
    if form == "dropout":  # other draws: the same in expectation only
        assert loss != exact and got.keys() == want.keys()
        return
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with student.disable_adapter(), fuse_lm_head(student, nll()):
        plain = student(**batch).loss
    assert not torch.isclose(plain, loss)


def test_restore_leaves_the_model_as_it_was():
    model, batch = tiny.llama(), tiny.batch()
    ids = batch["input_ids"]
    before, state = model(input_ids=ids).logits, set(model.__dict__)
    handle = fuse_lm_head(model, nll())
    assert torch.equal(model(input_ids=ids).logits, before)
    generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    handle.restore()
    handle.restore()
    assert "forward" not in model.__dict__ and set(model.__dict__) == state
    assert model.forward.__func__ is type(model).forward
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), generated)
    assert model(**batch).logits is not None


def test_restore_under_a_later_wrapper():
    """accelerate wraps forward for autocast: its wrapper must survive, and see the original below."""
    model, batch = tiny.llama(), tiny.batch()
    handle = fuse_lm_head(model, nll())
    inner = model.forward
    model.forward = lambda *a, **k: inner(*a, **k)
    handle.restore()
    assert model(**batch).logits is not None
    fuse_lm_head(model, nll()).restore()


def test_a_copy_of_a_fused_model_is_its_own():
    model, batch = tiny.llama(), tiny.batch()
    fuse_lm_head(model, nll())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin(**batch).loss.item() == pytest.approx(torch.log(torch.tensor(128.0)).item(), rel=1e-5)
    assert not twin(input_ids=batch["input_ids"]).logits.any()


def test_all_labels_masked_is_a_differentiable_zero():
    model, batch = tiny.llama(), tiny.batch()
    batch["labels"].fill_(-100)
    with fuse_lm_head(model, nll()):
        loss = model(**batch).loss
        loss.backward()
    assert loss.item() == 0 and not any(g.any() for g in gradients(model).values())


class Largest(TorchDispatchMode):
    """The most elements of any tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and self.vocabulary in x.shape:
                self.most = max(self.most, x.numel())
        return out


def test_logits_never_exist_whole():
    vocabulary, size, length = 1031, 5, 130
    model, teacher = tiny.llama(vocabulary=vocabulary), tiny.llama(1, vocabulary=vocabulary)
    batch = tiny.batch(size=size, length=length, vocabulary=vocabulary)
    objective = burnish.objectives.target_sft(0.5)
    with fuse_lm_head(model, objective, teacher_model=teacher), Largest(vocabulary) as seen:
        model(**batch, fused_lm_head=True).loss.backward()
    rows = size * (length - 1)
    # a chunk on the CPU is 256 rows unless a budget says otherwise
    assert seen.most <= 256 * vocabulary < rows * vocabulary / 2
    with Largest(vocabulary) as seen:
        model(**batch).loss.backward()
    assert seen.most >= rows * vocabulary  # the counter would have seen them


def test_refusals():
    model = tiny.llama()
    with pytest.raises(ValueError, match="'asft' needs a teacher"):
        fuse_lm_head(model, burnish.objectives.asft())
    with pytest.raises(ValueError, match="PEFT student"):
        fuse_lm_head(model, burnish.objectives.asft(), teacher_model="base")
    with pytest.raises(TypeError, match="objective must be"):
        fuse_lm_head(model, "nll")
    with pytest.raises(ValueError, match="metrics must be among"):
        fuse_lm_head(model, nll(), metrics=("speed",))
    with pytest.raises(ValueError, match="no backbone"):
        fuse_lm_head(torch.nn.Linear(2, 2), nll())
    with pytest.raises(ValueError, match="'dapo' needs advantages"):
        fuse_lm_head(model, burnish.objectives.dapo())
    with pytest.raises(ValueError, match="aggregate='sequence_mean_token_sum'"):
        fuse_lm_head(model, burnish.objectives.weighted_nll("sequence_mean_token_sum"))
    handle = fuse_lm_head(model, nll())
    with pytest.raises(ValueError, match="fused already"):
        fuse_lm_head(model, nll())
    handle.restore()
    assert "forward" not in model.__dict__
    from peft import IA3Config, get_peft_model

    ia3 = get_peft_model(tiny.llama(), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="adapter on lm_head must be LoRA or DoRA"):
        fuse_lm_head(ia3, nll())


def test_a_teacher_needs_ids():
    model = tiny.llama()
    with fuse_lm_head(model, burnish.objectives.kd(), teacher_model=tiny.llama(1)):
        embeds = model.get_input_embeddings()(tiny.batch()["input_ids"])
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=embeds, labels=tiny.batch()["labels"])


def test_metrics_not_asked_for_are_zeros():
    model, batch = tiny.llama(), tiny.batch()
    with fuse_lm_head(model, nll(), metrics=()):
        out = model(**batch, fused_lm_head=True)
    assert out.entropy.shape == out.label_mask.shape and not out.entropy.any() and not out.is_top1.any()


def test_bf16_autocast_keeps_fp32_weights_gradients():
    model, batch = tiny.llama(), tiny.batch()
    with fuse_lm_head(model, nll()), torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    own = tiny.llama()(**batch).loss
    torch.testing.assert_close(loss, own, rtol=2e-2, atol=2e-2)
    assert model.lm_head.weight.grad.dtype == torch.float32
