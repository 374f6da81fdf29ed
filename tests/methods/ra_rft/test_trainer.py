"""Facts R1 to R3 and R9 to R11 on RARFTTrainer itself, its metrics, the fused head, evaluation, refusals."""

import warnings

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset, IterableDataset
from test_context import Shelf
from trl import GRPOConfig, GRPOTrainer

from burnish.methods import fuse_policy_head
from burnish.methods.ra_rft import RARFTTrainer, Template, with_context

warnings.filterwarnings("ignore", category=FutureWarning)
SHORT = Template("{documents}Q{question}", "P{problem}T{trace} ")


def shelf():
    return Shelf({"problem": "1+1", "trace": "2", "id": "a"}, {"problem": "2+3", "trace": "5", "id": "b"})


def digits(completions, **_):
    return [sum(c.isdigit() + 0.1 * c.isalpha() for c in text) for text in completions]


def make(folder, model, cls=RARFTTrainer, reward=digits, rows=None, **options):
    own = {k: options.pop(k) for k in ("retriever", "k", "template", "eval_dataset") if k in options}
    fields = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=7, max_steps=2,
        learning_rate=0.3, optim="sgd", logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=3, use_cpu=True, loss_type="grpo",
    )  # fmt: skip
    data = Dataset.from_list(rows or [{"prompt": f"{i}+{i}=", "n": i} for i in range(8)])
    return cls(model, reward, GRPOConfig(**{**fields, **options}), data, processing_class=tiny.tokenizer(), **own)


def history(trainer):
    entries = [e for e in trainer.state.log_history if "reward" in e]
    return [
        {k: v for k, v in e.items() if "time" not in k and "second" not in k and "retrieval" not in k} for e in entries
    ]


def sampled(trainer, rows=None):
    """A batch as the loss gets it."""
    trainer.model.train()
    rows = rows if rows is not None else [trainer.train_dataset[i // 2] for i in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows)


def eager(trainer, monkeypatch):
    """TRL's loss over logits that exist and keep their gradient; they are appended to the list that is returned."""
    kept = []

    def logps(model, input_ids, attention_mask, logits_to_keep, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        if logits.requires_grad:
            logits.retain_grad()
            kept.append(logits)
        shown = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0][:, -logits_to_keep:]
        p = logits[:, :-1].softmax(-1)
        return shown, -(p * p.log()).sum(-1)[:, -logits_to_keep:].detach(), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", logps)
    return kept


def test_r1_without_a_context_it_is_grpo_bit_for_bit(tmp_path, model_folder):
    class Empty(Shelf):
        def search(self, questions, k=1, *, progress=False):
            return [[] for _ in questions]

    runs = []
    for cls, options in (
        (GRPOTrainer, {}),
        (RARFTTrainer, {"retriever": Empty()}),
        (RARFTTrainer, {"retriever": shelf()}),
    ):
        trainer = make(tmp_path, model_folder, cls, **options)
        trainer.train()
        runs.append((history(trainer), list(trainer.model.parameters())))
    (want, theirs), (got, ours), (other, moved) = runs
    assert got == want and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert other != want and any(not torch.equal(a, b) for a, b in zip(moved, theirs, strict=True))


def test_r2_a_context_takes_no_loss_and_is_read(tmp_path, model_folder, monkeypatch):
    trainer = make(tmp_path, model_folder, retriever=shelf(), template=SHORT, mask_truncated_completions=False)
    batch = sampled(trainer)
    kept = eager(trainer, monkeypatch)
    trainer._compute_loss(trainer.model, batch).backward()
    (logits,) = kept
    prompt = batch["prompt_ids"].shape[1]
    reached = logits.grad.abs().amax(-1) > 0
    assert not reached[:, : prompt - 1].any() and reached[:, prompt - 1 : -1].any() and not reached[:, -1].any()
    assert reached[:, prompt - 1 : -1].sum() <= batch["completion_mask"].sum()
    assert all("P1+1T2" in text for text in trainer.train_dataset["prompt"])
    before = trainer._get_per_token_logps_and_entropies(trainer.model, *_ids(batch))[0]
    other = {**batch, "prompt_ids": batch["prompt_ids"].clone()}
    place = int(batch["prompt_mask"][0].argmax())
    other["prompt_ids"][:, place + 1] += 1  # a letter of the context
    after = trainer._get_per_token_logps_and_entropies(trainer.model, *_ids(other))[0]
    assert (before - after)[batch["completion_mask"].bool()].abs().min() > 0


def _ids(batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), batch["completion_ids"].shape[1]


def test_r3_the_first_ratio_is_one_and_is_not_without_the_context(tmp_path, model_folder):
    trainer = make(tmp_path, model_folder, retriever=shelf(), template=SHORT, num_iterations=2, temperature=1.0)
    batch = sampled(trainer)
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        now = trainer._get_per_token_logps_and_entropies(trainer.model, *_ids(batch))[0]
        assert torch.equal((now - batch["old_per_token_logps"]).exp()[mask], torch.ones(int(mask.sum())))
        # the same completions after the bare questions
        bare = trainer.processing_class(
            [trainer.train_dataset[i // 2]["prompt"].split("Q")[1] for i in range(4)], return_tensors="pt"
        )  # fmt: skip
        dropped = {**batch, "prompt_ids": bare["input_ids"], "prompt_mask": bare["attention_mask"]}
        without = trainer._get_per_token_logps_and_entropies(trainer.model, *_ids(dropped))[0]
        assert ((without - batch["old_per_token_logps"]).exp()[mask] - 1).abs().min() > 1e-6


@pytest.mark.parametrize(("group", "right", "want"), [(8, 1, (2.474174, -0.353453)), (8, 4, (0.935239, -0.935239)),
                                                       (16, 1, (3.7485, -0.2499))])  # fmt: skip
def test_r9_group_advantages(tmp_path, model_folder, group, right, want):
    """TRL's sample standard deviation + 1e-4."""

    def first(completions, **_):
        return [float(i % group < right) for i in range(len(completions))]

    trainer = make(tmp_path, model_folder, reward=first, retriever=shelf(), num_generations=group,
                   per_device_train_batch_size=group)  # fmt: skip
    got = sampled(trainer, [trainer.train_dataset[0]] * group)["advantages"].unique()
    assert sorted(got.tolist(), reverse=True) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1e-3])
def test_r10_equal_rewards_give_no_gradient_but_that_of_the_kl(tmp_path, model_folder, beta):
    trainer = make(tmp_path, model_folder, reward=lambda completions, **_: [1.0] * len(completions),
                   retriever=shelf(), beta=beta)  # fmt: skip
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.01)  # away from the reference
    batch = sampled(trainer)
    assert not batch["advantages"].any()
    grads = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), list(trainer.model.parameters()),
                                allow_unused=True)  # fmt: skip
    size = sum(float(g.abs().sum()) for g in grads if g is not None)
    assert (size == 0) if beta == 0 else (size > 1e-6)


def test_r11_on_policy_the_gradient_is_that_of_weighted_nll_and_the_loss_is_not(tmp_path, model_folder, monkeypatch):
    trainer = make(tmp_path, model_folder, retriever=shelf(), template=SHORT)
    batch = sampled(trainer)
    eager(trainer, monkeypatch)
    assert batch["advantages"].any()
    loss = trainer._compute_loss(trainer.model, batch)
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, *_ids(batch))[0]
    mask = batch["completion_mask"]
    nll = -((batch["advantages"][:, None] * logps * mask).sum(1) / mask.sum(1)).mean()
    leaves = [p for p in trainer.model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (loss, nll)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert abs(loss.item() - nll.item()) > 1e-2


def test_columns_metrics_and_evaluation(tmp_path, model_folder):
    seen = []

    def reward(completions, context_ids, n, **_):
        seen.append(context_ids)
        return digits(completions)

    rows = [{"prompt": "nothing" if i == 7 else f"{i}+{i}=", "n": i, "positive_ids": ["b"] if i % 2 else ["a", "c"]}
            for i in range(8)]  # fmt: skip
    trainer = make(tmp_path, model_folder, reward=reward, rows=rows, retriever=shelf(), k=2, max_steps=4,
                   eval_dataset=Dataset.from_list(rows[:4]), per_device_eval_batch_size=4)  # fmt: skip
    trainer.train()
    logs = [e for e in trainer.state.log_history if "retrieval/score" in e]
    assert len(logs) == 4
    mean = {k: sum(e[f"retrieval/{k}"] for e in logs) / 4 for k in ("recall@1", "recall@2", "with_context", "score")}
    # all eight prompts once: of four even ones the first document is a positive, of three odd ones the second
    assert mean["recall@1"] == pytest.approx(4 / 8) and mean["recall@2"] == pytest.approx(7 / 8)
    assert mean["with_context"] == pytest.approx(7 / 8) and mean["score"] == pytest.approx(1.0)
    assert all(0 < e["retrieval/distinct"] <= 1 for e in logs)
    assert ["a", "b"] in [ids for batch in seen for ids in batch]
    got = trainer.evaluate()
    assert got["eval_retrieval/recall@1"] == pytest.approx(0.5) and got["eval_retrieval/with_context"] == 1.0
    assert all(text.startswith("Here is a solved problem") for text in trainer.eval_dataset["prompt"])


def test_with_the_fused_head_it_is_the_same_run(tmp_path, model_folder):
    results = []
    for fused in (False, True):
        trainer = make(tmp_path, model_folder, retriever=shelf(), gradient_accumulation_steps=2)
        handle = fuse_policy_head(trainer) if fused else None
        trainer.train()
        results.append((history(trainer), list(trainer.model.parameters())))
        if handle:
            handle.restore()
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert results[0][0][0]["reward"] == results[1][0][0]["reward"]


def test_data_that_has_its_contexts_already(tmp_path, model_folder):
    data = with_context(Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)]), shelf(), template=SHORT)
    trainer = make(tmp_path, model_folder, rows=data.to_list())
    assert trainer.train_dataset["prompt"][0] == "P1+1T2 Q0+0="
    with pytest.raises(ValueError, match="train_dataset has no column 'context_ids'"):
        make(tmp_path, model_folder)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "rollout_func", {"rollout_func": lambda p, t: {}}),
        (ValueError, "environment_factory", {"environment_factory": object}),
        (ValueError, "k must", {"k": 0}),
        (ValueError, "remove_unused_columns", {"remove_unused_columns": True}),
        (ValueError, "train_dataset is required", {"train_dataset": None}),
        (
            TypeError,
            "IterableDataset",
            {"train_dataset": IterableDataset.from_generator(lambda: iter([{"prompt": "x"}]))},
        ),
        (ValueError, "no column 'prompt'", {"train_dataset": Dataset.from_dict({"question": ["x"]})}),
        (
            ValueError,
            r"'hard'.*no column|no column 'prompt'",
            {"eval_dataset": {"hard": Dataset.from_dict({"q": ["x"]})}},
        ),
    ],
)
def test_what_is_not_supported_is_an_error(tmp_path, model_folder, error, match, options):
    given = {"train_dataset": Dataset.from_dict({"prompt": ["x"]}), "retriever": shelf(), **options}
    with pytest.raises(error, match=match):
        config = {k: given.pop(k) for k in ("remove_unused_columns",) if k in given}
        arguments = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **config)
        RARFTTrainer(model_folder, digits, arguments, **given)


@pytest.mark.parametrize("value", ["yes", float("nan")])
def test_a_reward_that_is_no_number_is_named(tmp_path, model_folder, value):
    def odd(completions, **_):
        return [value] * len(completions)

    trainer = make(tmp_path, model_folder, reward=odd, retriever=shelf())
    with pytest.raises(ValueError, match="reward odd must return finite numbers"):
        trainer.train()
