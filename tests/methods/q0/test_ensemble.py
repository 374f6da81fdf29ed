"""Ensembles of real tiny models against brute-force probabilities: NLL, logits, generation, files."""

from __future__ import annotations

import json
import math

import pytest
import tiny_models
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
)

from burnish.methods.q0 import ensemble as module
from burnish.methods.q0.ensemble import Ensemble
from burnish.methods.q0.prior import learn_prior, mixture_nll

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def models(dtype=torch.float64, kinds=(tiny_models.llama, tiny_models.gpt2, tiny_models.llama)):
    return [kind(seed=i).to(dtype) for i, kind in enumerate(kinds)]


def padded(side="left", seed=0, lengths=(7, 4, 6)):
    """ids and mask (3, 7); padding is token 0."""
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), torch.zeros(len(lengths), max(lengths))
    for row, n in enumerate(lengths):
        at = slice(-n, None) if side == "left" else slice(0, n)
        ids[row, at] = torch.randint(3, 128, (n,), generator=g)
        mask[row, at] = 1
    return ids, mask.long()


def texts(ids, mask):
    return [row[m == 1][None] for row, m in zip(ids, mask, strict=True)]


@torch.no_grad()
def brute(members, weights, text):
    """Mixture probabilities (T, V) of one text without padding: every member's whole logits."""
    return sum(w * m.eval()(text).logits[0].double().softmax(-1) for m, w in zip(members, weights, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_nll_is_that_of_averaged_probabilities(side):
    members = models()
    ids, mask = padded(side)
    want = []
    for text in texts(ids, mask):
        p = brute(members, WEIGHTS, text)
        want.append(-p[:-1].gather(1, text[0, 1:, None]).log()[:, 0])
    want = float(torch.cat(want).mean())
    mixture = Ensemble(members, WEIGHTS)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first real token has no text before it
        for row in labels:
            row[int((row != -100).nonzero()[0])] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert mixture.nll([batch]) == pytest.approx(want, abs=1e-12)
    assert mixture.nll([{"input_ids": ids, "attention_mask": mask}]) == pytest.approx(want, abs=1e-12)
    assert float(mixture(**batch).loss) == pytest.approx(want, abs=1e-6)
    assert mixture(**batch).logits is None
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    assert mixture.nll(rows) == pytest.approx(want, abs=1e-12)


def gemma(seed):
    """A softcap on the logits, and attention in windows of 4 in every other layer."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, initializer_range=0.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, attn_implementation="eager",
    ))  # fmt: skip


def test_a_softcap_and_windows():
    members = models(torch.float32, (gemma, tiny_models.llama))  # in fp64 its eager attention is NaN on padding
    mixture, (ids, mask) = Ensemble(members, [1, 2]), padded()
    want = []
    for text in texts(ids, mask):
        p = brute(members, mixture.weights, text)
        want.append(-p[:-1].gather(1, text[0, 1:, None]).log()[:, 0])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert mixture.nll([batch]) == pytest.approx(float(torch.cat(want).mean()), rel=1e-5)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    members[0].generation_config.pad_token_id = 0
    want = members[0].eval().generate(**batch, eos_token_id=None, **greedy)
    assert torch.equal(Ensemble(members[:1]).generate(ids, mask, eos_token_id=[], **greedy), want)


def test_log_probs_are_each_members_and_feed_the_prior():
    members = models()
    ids, _ = padded(lengths=(7, 7))
    log_probs = Ensemble(members).log_probs([{"input_ids": ids}])
    want = torch.stack([
        torch.cat([m(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0] for row in ids])
        for m in members
    ])  # fmt: skip
    assert torch.allclose(log_probs, want, atol=1e-12)
    w = learn_prior(log_probs).weights
    assert Ensemble(members, w).nll([{"input_ids": ids}]) == pytest.approx(mixture_nll(log_probs, w), abs=1e-12)
    uniform = Ensemble(members)
    assert torch.allclose(uniform.weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert uniform.nll([{"input_ids": ids}]) <= float(-log_probs.mean())


def test_logits_are_normalised_log_probabilities(monkeypatch):
    members = models()
    mixture = Ensemble(members, WEIGHTS)
    ids, mask = padded()
    for chunk in (16 << 20, 2048):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
        whole = mixture(ids, mask).logits
        for row, text in enumerate(texts(ids, mask)):
            want = brute(members, WEIGHTS, text).log()
            assert torch.allclose(whole[row, -len(want) :], want, atol=1e-11)
        assert torch.allclose(whole.exp().sum(-1), torch.ones(3, 7, dtype=torch.float64))
        last = mixture(ids, mask, logits_to_keep=2).logits
        assert last.shape == (3, 2, 128) and torch.allclose(last, whole[:, -2:], atol=1e-12)
        some = mixture(ids, mask, logits_to_keep=torch.tensor([6, 3])).logits
        assert torch.allclose(some, whole[:, [6, 3]], atol=1e-12)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_likeliest_token_of_the_mixture(use_cache):
    members = models()
    ids, mask = padded()
    out = Ensemble(members, WEIGHTS).generate(ids, mask, max_new_tokens=9, eos_token_id=[], use_cache=use_cache)
    assert out.shape == (3, 16)
    for row, text in enumerate(texts(ids, mask)):
        for _ in range(9):
            text = torch.cat([text, brute(members, WEIGHTS, text)[-1].argmax()[None, None]], 1)
        assert torch.equal(out[row, -text.shape[1] :], text[0]), row


@pytest.mark.parametrize("kind", [tiny_models.llama, tiny_models.gpt2])
def test_one_member_generates_as_transformers_does(kind):
    """Greedy, left padding, stops and padding after them."""
    (member,) = models(torch.float32, (kind,))
    ids, mask = padded()
    member.generation_config.pad_token_id = 0
    greedy = {"max_new_tokens": 12, "do_sample": False}
    free = member.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **greedy)
    stop = int(free[1, 7 + 3])  # the fourth token that row 1 gets
    for eos in (stop, [stop, 5]):
        want = member.generate(input_ids=ids, attention_mask=mask, eos_token_id=eos, **greedy)
        got = Ensemble([member]).generate(ids, mask, eos_token_id=eos, **greedy)
        assert torch.equal(got, want)
    assert bool((got[1] == 0).any())
    greedy["logits_processor"] = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    want = member.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **greedy)
    assert not torch.equal(want, free)
    assert torch.equal(Ensemble([member]).generate(ids, mask, eos_token_id=[], **greedy), want)


def test_drawn_tokens_follow_the_mixture():
    """Chi-square of 20,000 draws against the averaged probabilities; each member alone would be refused."""
    members = models(torch.float32, (tiny_models.llama, tiny_models.llama))
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    draws = 20000
    text = torch.tensor([[5, 9, 20]])
    p = brute(members, weights, text)[-1]
    mixture = Ensemble(members, weights)
    g = torch.Generator().manual_seed(0)
    out = mixture.generate(
        text.expand(draws, -1), max_new_tokens=1, do_sample=True, eos_token_id=[], generator=g
    )  # fmt: skip
    counts = torch.bincount(out[:, -1], minlength=128).double()

    def chi_square(q):
        return float(((counts - draws * q).square() / (draws * q)).sum())

    limit = 127 + 5 * math.sqrt(2 * 127)
    assert chi_square(p) < limit
    for member in members:
        assert chi_square(member(text).logits[0, -1].detach().double().softmax(-1)) > 2 * limit


def test_warpers_act_on_the_average():
    """Temperature, top-k, top-p and min-p of log p of the mixture."""
    members = models(torch.float32, (tiny_models.llama, tiny_models.llama))
    mixture, text = Ensemble(members), torch.tensor([[5, 9, 20]])
    logp = brute(members, mixture.weights, text)[-1].log()
    order = logp.argsort(descending=True)
    rows = text.expand(4000, -1)

    def drawn(**options):
        g = torch.Generator().manual_seed(1)
        out = mixture.generate(rows, max_new_tokens=1, do_sample=True, eos_token_id=[], generator=g, **options)
        return torch.bincount(out[:, -1], minlength=128).double() / len(rows)

    assert set(drawn(top_k=3).nonzero()[:, 0].tolist()) == set(order[:3].tolist())
    p = logp.softmax(-1)[order]
    nucleus = order[: int((p.cumsum(0) < 0.5).sum()) + 1]
    assert set(drawn(top_p=0.5).nonzero()[:, 0].tolist()) == set(nucleus.tolist())
    assert set(drawn(min_p=0.5).nonzero()[:, 0].tolist()) <= set(order[p >= 0.5 * p[0]].tolist())
    sharp = (logp / 0.5).softmax(-1)
    assert float((drawn(temperature=0.5) - sharp).abs().max()) < 5 * math.sqrt(0.25 / len(rows))


def test_draws_repeat_and_criteria_stop():
    members = models(torch.float32)
    mixture = Ensemble(members, WEIGHTS)
    ids, mask = padded()
    two = [
        mixture.generate(ids, mask, do_sample=True, max_new_tokens=5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*two)

    class After(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= 9)

    assert mixture.generate(ids, mask, eos_token_id=[], stopping_criteria=[After()]).shape == (3, 9)
    mixture.members[0].train()
    mixture.members[1].eval()
    mixture.generate(ids, mask, max_new_tokens=1)
    assert mixture.members[0].training and not mixture.members[1].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_members_are_mixed_in_fp32(dtype):
    members = models(dtype)
    mixture = Ensemble(members, WEIGHTS)
    ids, _ = padded(lengths=(7, 7))
    logits = mixture(ids).logits
    assert logits.dtype == torch.float32
    want = torch.stack([brute(members, WEIGHTS, row[None]).log() for row in ids])
    assert torch.allclose(logits.double(), want, atol=1e-5)
    # the labels' come from fp32 logits of bf16 operands: exact of the member's own numbers, not of its rounded logits
    nll = float(-want[:, :-1].gather(2, ids[:, 1:, None]).mean())
    assert mixture.nll([{"input_ids": ids}]) == pytest.approx(nll, rel=1e-5 if dtype == torch.float32 else 2e-2)
    assert mixture.generate(ids, max_new_tokens=2).shape[1] in (8, 9)


def test_a_compiled_member():
    members = models(torch.float32, (tiny_models.llama, tiny_models.llama))
    compiled = [torch.compile(members[0], backend="eager"), members[1]]
    ids, mask = padded()
    a, b = Ensemble(members), Ensemble(compiled)
    batch = {"input_ids": ids, "attention_mask": mask}
    assert a.nll([batch]) == pytest.approx(b.nll([batch]), abs=1e-6)
    assert torch.allclose(a(ids, mask).logits, b(ids, mask).logits, atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    out = []
    for i, member in enumerate(models(torch.float32, (tiny_models.llama, tiny_models.gpt2, tiny_models.llama))):
        folder = tmp_path / f"cycle-{i:03d}"
        tiny_models.save(folder, member.to(torch.bfloat16))
        (folder / "snapshot.json").write_text("{}")
        (folder / "fitness.safetensors").write_bytes(b"x" * 1000)
        out.append(folder)
    return out


def test_members_one_at_a_time_are_the_same(folders, monkeypatch):
    ids, mask = padded()
    every, one = Ensemble(folders, WEIGHTS), Ensemble(folders, WEIGHTS, load="one")
    assert not list(one.parameters()) and len(list(every.parameters())) > 10
    batches = [{"input_ids": ids, "attention_mask": mask}] * 2
    loaded = []
    real = module.load_member
    monkeypatch.setattr(module, "load_member", lambda *a: loaded.append(a[0]) or real(*a))
    assert torch.equal(every.log_probs(batches), one.log_probs(batches))
    assert loaded == folders  # each once, however many batches
    assert torch.equal(every(ids, mask).logits, one(ids, mask).logits)
    assert next(every.parameters()).dtype == torch.float32
    assert one.config.vocab_size == every.config.vocab_size == one.vocabulary == 128
    kept = Ensemble(folders, WEIGHTS, dtype="auto")
    assert next(kept.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="generate wants load='all'"):
        one.generate(ids)


def test_one_member_is_alive_at_a_time(folders, monkeypatch):
    import weakref

    alive, most = [], 0
    real = module.load_member

    def load(*arguments):
        nonlocal most
        member = real(*arguments)
        alive.append(weakref.ref(member))
        most = max(most, sum(r() is not None for r in alive))
        return member

    monkeypatch.setattr(module, "load_member", load)
    mixture, (ids, mask) = Ensemble(folders, load="one"), padded()
    mixture.log_probs([{"input_ids": ids, "attention_mask": mask}])
    mixture(ids, mask)
    assert len(alive) == 6 and most == 1


def test_export_and_reload(folders, tmp_path):
    ids, mask = padded()
    batch = [{"input_ids": ids, "attention_mask": mask}]
    mixture = Ensemble(folders, WEIGHTS)
    mixture.save_pretrained(tmp_path / "out")
    again = Ensemble.from_pretrained(tmp_path / "out")
    assert torch.allclose(again.weights, mixture.weights, rtol=1e-15)
    assert torch.equal(again.log_probs(batch), mixture.log_probs(batch))
    names = {p.name for p in (tmp_path / "out" / "member-000").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"snapshot.json", "fitness.safetensors"} & names
    mixture.save_pretrained(tmp_path / "two", top_k=2)
    two = Ensemble.from_pretrained(tmp_path / "two", load="one", dtype="auto")
    assert torch.allclose(two.weights, torch.tensor([0.5, 0.3], dtype=torch.float64) / 0.8)
    assert two.nll(batch) == pytest.approx(Ensemble([folders[0], folders[2]], [5, 3], dtype="auto").nll(batch))
    given = Ensemble(models(torch.float32), WEIGHTS)  # models, stored by themselves
    given.save_pretrained(tmp_path / "given")
    assert Ensemble.from_pretrained(tmp_path / "given").nll(batch) == pytest.approx(given.nll(batch), abs=1e-6)
    with pytest.raises(ValueError, match="exists already"):
        mixture.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="top_k must be a whole number from 1 to 3; got 4"):
        mixture.save_pretrained(tmp_path / "four", top_k=4)
    assert not (tmp_path / "four").exists()


def test_a_member_of_weight_zero_is_left_out(folders):
    mixture = Ensemble(folders, [0.0, 1.0, 3.0])
    assert len(mixture) == 2 and mixture.folders == folders[1:] and mixture.weights.tolist() == [0.25, 0.75]


def test_it_stands_in_for_a_model_in_an_evaluation():
    """``burnish.methods.accuracy`` asks it as it asks a model."""
    from burnish.methods import accuracy

    class Task:
        def __init__(self):
            self.entries = [{"question": f"{i}+{i}="} for i in range(5)]

        def __iter__(self):
            return iter(self.entries)

        def score_answer(self, answer, entry):
            return float(len(answer) > 0)

    found = accuracy(
        Ensemble(models(torch.float32)), tiny_models.tokenizer(), Task(), batch_size=3, max_new_tokens=4, progress=False
    )  # fmt: skip
    assert len(found.answers) == 5


def test_errors(folders, tmp_path):
    small = tiny_models.llama(vocabulary=64)
    members = models(torch.float32)
    ids, mask = padded()
    mixture = Ensemble(members)
    (tmp_path / "weights.json").write_text(json.dumps({"members": 3}))
    other = tiny_models.save(tmp_path / "small", small)
    for call, message in (
        (lambda: Ensemble([]), "members must be a list"),
        (lambda: Ensemble(members[0]), "members must be a list"),
        (lambda: Ensemble(members, [1, 1]), r"weights must be \(3,\)"),
        (lambda: Ensemble(members, [1, -1, 1]), "non-negative"),
        (lambda: Ensemble(members, [0, 0, 0]), "not all 0"),
        (lambda: Ensemble([members[0], small]), "member 0 has 128 tokens, member 1 64"),
        (lambda: Ensemble([folders[0], other], load="one"), "member 0 has 128 tokens, member 1 64"),
        (lambda: Ensemble(members, load="one"), "load='one' reads members from directories"),
        (lambda: Ensemble(folders, load="some"), "load must be one of all, one; got 'some'"),
        (lambda: Ensemble([tmp_path / "nowhere"]), "nowhere"),
        (lambda: Ensemble([tmp_path / "nowhere"], load="one"), "config.json is missing"),
        (lambda: Ensemble.from_pretrained(tmp_path), "weights.json is missing, cut short or has no members"),
        (lambda: mixture.log_probs([]), "batches: none"),
        (lambda: mixture.nll([{"input_ids": ids, "labels": torch.full_like(ids, -100)}]), "no token"),
        (lambda: mixture.nll([{"input_ids": ids, "attention_mask": mask[:2]}]), "attention_mask must have the shape"),
        (lambda: mixture.generate(ids, padded("right")[1]), "pad prompts on the left"),
        (lambda: mixture.generate(ids, num_beams=2), "beams and synced_gpus are not supported"),
        (lambda: mixture.generate(ids, max_new_tokens=0), "max_new_tokens must be a whole number"),
        (lambda: mixture.generate(ids[:, :0]), "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
