"""``burnish demo ra-rft``: a toy of which everything is known, with the baselines that could explain it away.

A problem is a topic (twice), three structure tokens and two digits; a hidden operation, +, -, * or max modulo 7, hangs
on the structure alone, by a table drawn at random.  A trace names the operation and the result.  The base model can
apply an operation that is named, and names the one of a trace that it is shown 35 times in 100; of the table it knows
nothing.
Contexts, GRPO and rewards are ``RARFTTrainer``'s, which is TRL's; the retriever is two small MLPs trained by Eq. 2.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..demo_results import publish
from .context import Template, with_context
from .corpus import Document, Hit, Searcher
from .demo_options import RARFTDemoOptions
from .demo_report import ARMS, plot, table
from .infonce import infonce
from .leaks import LeakGuard
from .retriever import recall_at

TOPICS, STRUCTURES, BASE, COPIES = 8, 5, 7, 0.35
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: (a + b) % BASE, "sub": lambda a, b: (a - b) % BASE, "mul": lambda a, b: a * b % BASE,
    "max": max,
}  # fmt: skip
TEMPLATE = Template("<ctx> {documents}<sep> {question}", "{problem} {trace} ")
_WORDS = [
    "<pad>", "<eos>", "<ctx>", "<sep>", *OPERATIONS, *(f"d{i}" for i in range(BASE)), *(f"t{i}" for i in range(TOPICS)),
    *(f"s{i}" for i in range(STRUCTURES)),
]  # fmt: skip
_ID = {w: i for i, w in enumerate(_WORDS)}
_PROBLEM, _TRACE = 7, 2  # words


class Toy:
    """One table of operations, and problems drawn from it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        names = list(OPERATIONS)
        self.operation = {s: self.random.choice(names) for s in itertools.product(range(STRUCTURES), repeat=3)}

    def draw(self) -> dict:
        """A problem with its topic, operation and answer."""
        structure = tuple(self.random.randrange(STRUCTURES) for _ in range(3))
        topic, a, b = self.random.randrange(TOPICS), self.random.randrange(BASE), self.random.randrange(BASE)
        name = self.operation[structure]
        text = " ".join([f"t{topic}"] * 2 + [f"s{i}" for i in structure] + [f"d{a}", f"d{b}"])
        return {"prompt": text, "type": f"t{topic}", "operation": name, "answer": f"d{OPERATIONS[name](a, b)}"}

    def corpus(self, size: int) -> list[Document]:
        rows = [self.draw() for _ in range(size)]
        return [Document(str(i), r["prompt"], f"{r['operation']} {r['answer']}", r["type"]) for i, r in enumerate(rows)]


class Towers(nn.Module):
    """Two MLPs: a problem, and a problem with its trace, to unit vectors."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.question, self.document = (
            nn.Sequential(nn.Linear(n * len(_WORDS), width), nn.ReLU(), nn.Linear(width, 32))
            for n in (_PROBLEM, _PROBLEM + _TRACE)
        )

    def forward(self, kind: str, texts: list[str]) -> Tensor:
        x = F.one_hot(ids(texts), len(_WORDS)).flatten(1).float()
        return F.normalize(getattr(self, kind)(x), dim=-1)


class TowerRetriever:
    """What ``with_context`` asks of a retriever: the corpus, and the documents nearest to a question."""

    def __init__(self, towers: Towers, corpus: list[Document]):
        self.towers, self.corpus, self.guard = towers, corpus, LeakGuard().over(corpus)

    @torch.no_grad()
    def search(self, questions: list[str], k: int = 1, *, progress: bool = False) -> list[list[Hit]]:
        documents = self.towers("document", [f"{d.problem} {d.trace}" for d in self.corpus])
        scores = self.towers("question", questions) @ documents.T
        for row, question in enumerate(questions):
            scores[row, list(self.guard.blocked(question))] = -torch.inf
        values, places = scores.topk(k)
        return [
            [Hit(i, self.corpus[i].id, s) for i, s in zip(*row, strict=True)]
            for row in zip(places.tolist(), values.tolist(), strict=True)
        ]


class RandomOfTopic:
    """A document of the question's topic, drawn at random: what retrieval is worth without a retriever."""

    def __init__(self, corpus: list[Document], seed: int):
        self.corpus, self.guard, self.random = corpus, LeakGuard().over(corpus), random.Random(seed)

    def search(self, questions: list[str], k: int = 1, *, progress: bool = False) -> list[list[Hit]]:
        out = []
        for question in questions:
            blocked, topic = self.guard.blocked(question), question.split()[0]
            fitting = [i for i, d in enumerate(self.corpus) if d.type == topic and i not in blocked]
            chosen = self.random.sample(fitting, min(k, len(fitting)))
            out.append([Hit(i, self.corpus[i].id, 0.0) for i in chosen])
        return out


def ids(texts: list[str]) -> Tensor:
    """(N, words) of texts of one length."""
    return torch.tensor([[_ID[w] for w in t.split()] for t in texts])


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel(_ID, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def base_model(steps: int, seed: int, batch: int = 128) -> LlamaForCausalLM:
    """Two layers of 64, taught to apply a named operation, and to copy one it is shown 35 times in 100."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(_WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    g = torch.Generator().manual_seed(seed)
    table = torch.tensor([[[f(a, b) for b in range(BASE)] for a in range(BASE)] for f in OPERATIONS.values()])
    first_op, first_digit = _ID["add"], _ID["d0"]

    def problems() -> tuple[Tensor, Tensor, Tensor]:
        topic = torch.randint(TOPICS, (batch, 1), generator=g) + _ID["t0"]
        structure = torch.randint(STRUCTURES, (batch, 3), generator=g) + _ID["s0"]
        a, b = torch.randint(BASE, (2, batch), generator=g)
        return torch.cat([topic, topic, structure, torch.stack([a, b], 1) + first_digit], 1), a, b

    def answer(op: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([op + first_op, table[op, a, b] + first_digit], 1)

    for step in range(steps):
        x, a, b = problems()
        wanted = torch.full((batch, len(OPERATIONS)), 1 / len(OPERATIONS))  # of the operation
        if step % 2:  # with a solved problem before it
            other, c, d = problems()
            shown = torch.randint(len(OPERATIONS), (batch,), generator=g)
            wanted.fill_((1 - COPIES) / (len(OPERATIONS) - 1)).scatter_(1, shown[:, None], COPIES)
            mark = torch.tensor([_ID["<ctx>"], _ID["<sep>"]]).expand(batch, 2)
            x = torch.cat([mark[:, :1], other, answer(shown, c, d), mark[:, 1:], x], 1)
        op = torch.multinomial(wanted, 1, generator=g)[:, 0]
        said = answer(op, a, b)
        logits = model(torch.cat([x, said], 1)).logits[:, -3:-1]
        # the operation by its whole distribution: what the model is to copy is a weak signal in samples
        whole = F.pad(wanted, (first_op, len(_WORDS) - first_op - len(OPERATIONS)))
        loss = F.cross_entropy(logits[:, 0], whole) + F.cross_entropy(logits[:, 1], said[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def habits(model: LlamaForCausalLM, toy: Toy, count: int = 512) -> dict[str, float]:
    """Of the base model: how often it applies a named operation rightly, and copies one that it is shown."""
    rows, corpus = [toy.draw() for _ in range(count)], toy.corpus(count)
    draw = random.Random(0)
    named = [draw.choice(list(OPERATIONS)) for _ in rows]
    digits = [[int(w[1]) for w in r["prompt"].split()[-2:]] for r in rows]
    right = ids([f"d{OPERATIONS[n](*d)}" for n, d in zip(named, digits, strict=True)])
    applied = model(ids([f"{r['prompt']} {n}" for r, n in zip(rows, named, strict=True)])).logits[:, -1].softmax(-1)
    shown = [TEMPLATE(r["prompt"], [d]) for r, d in zip(rows, corpus, strict=True)]
    copied = model(ids(shown)).logits[:, -1].softmax(-1)
    return {
        "applies": float(applied.gather(1, right).mean()),
        "copies": float(copied.gather(1, ids([d.trace.split()[0] for d in corpus])).mean()),
    }


def train_towers(rows: list[dict], corpus: list[Document], seed: int, steps: int = 1500, batch: int = 64) -> Towers:
    """Eq. 2 at tau 0.05 with labels "the same hidden operation", over batches of 64 questions and 64 documents."""
    torch.manual_seed(seed)
    towers = Towers()
    operation = [d.trace.split()[0] for d in corpus]
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)
    draw = random.Random(seed)
    for _ in range(steps):
        asked, shown = (
            draw.sample(rows, min(batch, len(rows))),
            draw.sample(range(len(corpus)), min(batch, len(corpus))),
        )
        positives = torch.tensor([[r["operation"] == operation[c] for c in shown] for r in asked])
        e_q = towers("question", [r["prompt"] for r in asked])
        e_c = towers("document", [f"{corpus[c].problem} {corpus[c].trace}" for c in shown])
        loss = infonce(e_q @ e_c.T, positives, temperature=0.05, reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return towers


def solved(completions, answer, **_) -> list[float | None]:
    """1 where a completion's last word is the answer."""
    return [float(c.split()[-1:] == [a]) for c, a in zip(completions, answer, strict=True)]


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, prompts: list[str], answers: list[str]) -> dict[str, float]:
    """Sampled at temperature 1: in expectation over both tokens, exactly; and greedy."""
    model.eval()
    x = ids(prompts)
    wanted = ids(answers)[:, 0]
    first = model(x).logits[:, -1].softmax(-1)
    sampled, greedy = torch.zeros(len(x)), torch.zeros(len(x))
    best = first.argmax(-1)
    for token in range(len(_WORDS)):
        if float(first[:, token].max()) < 1e-4:
            continue
        second = model(torch.cat([x, torch.full((len(x), 1), token)], 1)).logits[:, -1].softmax(-1)
        sampled += first[:, token] * second.gather(1, wanted[:, None])[:, 0]
        greedy += (best == token) & (second.argmax(-1) == wanted)
    return {"sampled": float(sampled.mean()), "greedy": float(greedy.mean())}


def one_seed(options: RARFTDemoOptions, base: LlamaForCausalLM, seed: int) -> dict:
    """Every arm of one seed, from the same base model: accuracies on new problems, reward by step, recall@1."""
    from datasets import Dataset

    toy = Toy(seed)
    corpus = toy.corpus(options.corpus)
    rows = [toy.draw() for _ in range(options.steps * options.prompts)]
    train = Dataset.from_list(rows)
    test = Dataset.from_list([toy.draw() for _ in range(options.problems)])
    nearest = TowerRetriever(train_towers(rows, corpus, seed), corpus)
    chance = RandomOfTopic(corpus, seed)
    named = [d.trace.split()[0] for d in corpus]
    same = [{i for i, n in enumerate(named) if n == row["operation"]} for row in test]

    def recall(retriever: Searcher) -> float:
        found = [[h.place for h in row] for row in retriever.search(list(test["prompt"]))]
        return recall_at(found, same, (1,))["recall@1"]

    searchers: tuple[Searcher, ...] = (nearest, chance)
    shown, drawn = (list(with_context(test, r, template=TEMPLATE)["prompt"]) for r in searchers)
    plain = list(test["prompt"])
    answers = list(test["answer"])
    arms = {"base": accuracy(base, plain, answers), "base_context": accuracy(base, shown, answers)}
    rewards = {}
    policy, rewards["grpo"] = _train(options, base, train, None, seed)
    arms["grpo"], arms["grpo_inference"] = accuracy(policy, plain, answers), accuracy(policy, shown, answers)
    policy, rewards["ra_rft"] = _train(options, base, train, nearest, seed)
    arms["ra_rft"] = accuracy(policy, shown, answers)
    policy, rewards["random"] = _train(options, base, train, chance, seed)
    arms["random"] = accuracy(policy, drawn, answers)
    return {"seed": seed, "recall@1": {"ra_rft": recall(nearest), "random": recall(chance)}, "arms": arms,
            "reward": rewards}  # fmt: skip


def _one_seed_alone(options: RARFTDemoOptions, seed: int) -> dict:
    """``one_seed`` in a process of its own, on one thread: models this small gain nothing from a second."""
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    return one_seed(options, LlamaForCausalLM.from_pretrained(Path(options.output) / "base"), seed)


def _train(options: RARFTDemoOptions, base: LlamaForCausalLM, data, retriever, seed: int):
    """(policy, mean reward of each step): TRL's GRPO, on contexts where there is a retriever."""
    from trl import GRPOConfig, GRPOTrainer

    from .trainer import RARFTTrainer

    model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict())
    folder = Path(options.output) / f"seed-{seed}"
    arguments = GRPOConfig(
        output_dir=str(folder), max_steps=options.steps, num_generations=options.generations,
        per_device_train_batch_size=options.prompts * options.generations, learning_rate=options.learning_rate,
        lr_scheduler_type="constant", max_completion_length=_TRACE, temperature=1.0, beta=0.0, loss_type="grpo",
        logging_steps=1, save_strategy="no", report_to="none", seed=seed, bf16=False, gradient_checkpointing=False,
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, shuffle_dataset=False, log_completions=False,
    )  # fmt: skip
    common = {"args": arguments, "train_dataset": data, "processing_class": tokenizer()}
    if retriever is None:
        trainer = GRPOTrainer(model, solved, **common)
    else:
        trainer = RARFTTrainer(model, solved, **common, retriever=retriever, template=TEMPLATE)
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer.model, [e["reward"] for e in trainer.state.log_history if "reward" in e]


def run(options: RARFTDemoOptions) -> dict:
    """All seeds, a table, a plot and ``results.json`` in ``options.output``; returns the results."""
    import datasets
    from tqdm.auto import tqdm

    datasets.disable_progress_bars()
    started = time.perf_counter()
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    print("teaching the base model ...", flush=True)
    base = base_model(options.base_steps, options.seed)
    results: dict = {"options": asdict(options), "arms": ARMS, "base": habits(base, Toy(options.seed)), "seeds": []}
    print("the base model applies a named operation in {applies:.1%}, copies a shown one in {copies:.1%}".format(
        **results["base"]), flush=True)  # fmt: skip
    seeds = range(options.seed, options.seed + options.seeds)
    workers = min(options.workers, len(seeds))
    if workers == 1:
        results["seeds"] = [one_seed(options, base, seed) for seed in tqdm(seeds, desc="seeds")]
    else:
        base.save_pretrained(out / "base")
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            made = pool.map(_one_seed_alone, [options] * len(seeds), seeds)
            results["seeds"] = list(tqdm(made, total=len(seeds), desc="seeds"))
        shutil.rmtree(out / "base")
    results["seconds"] = time.perf_counter() - started
    publish(results, out, table, plot)
    return results
