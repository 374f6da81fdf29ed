"""Where rollouts come from: environments, a rollout function, vLLM's log-probabilities, a vision-language model."""

import re

import axpo_tiny as toy
import pytest
import torch
from datasets import Dataset
from test_axpo_trainer import K, N, Recording, scored
from trl.data_utils import prepare_multimodal_messages

from burnish.methods.axpo import batch as rows
from burnish.methods.axpo.trainer import _Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("axpo-model"))


class Adder:
    """An environment whose answers go wrong once it has been used before its reset."""

    drawn = False

    def __init__(self):
        self.log, self.uses = [], 0

    def reset(self, answer, **_):
        self.log, self.uses, self.answer = ["reset"], 0, answer
        return f" #{torch.rand(1).item()}" if self.drawn else f" of {answer}"

    def add(self, x: int, y: int) -> int:
        """Adds two numbers.

        Args:
            x: the first.
            y: the second.
        """
        self.log.append((x, y))
        self.uses += 1
        return x + y + 1000 * (self.uses - 1)


class Drawn(Adder):
    drawn = True


def test_environments_are_reset_and_not_shared(tmp_path, folder):
    more = {"tools": (), "environment_factory": Adder, "resample_budget": 1.0, "per_device_train_batch_size": 16}
    t, batch = scored(tmp_path, folder, **more)
    assert t.selected
    count = len(t.selected) * K
    live, said = t.environments, t._rollouts.completions
    assert len(live) == len({id(e) for e in live}) == count
    for row, (environment, messages) in enumerate(zip(live, said, strict=True)):
        asked = [tuple(c["function"]["arguments"].values()) for m in messages for c in m.get("tool_calls") or []]
        assert environment.log == ["reset", *asked] and len(asked) == 1
        assert [m["content"] for m in messages if m["role"] == "tool"] == [str(sum(asked[0]))]
        assert environment.answer == t.sources[row // K].question["answer"]
        assert f" of {environment.answer}" in t._text(batch["prompt_ids"][16 + row].tolist())


def test_a_reset_that_is_not_a_function_of_the_row(tmp_path, folder):
    with pytest.raises(ValueError, match=r"a resample's prompt is not its source's: the environment's reset\(\)"):
        scored(tmp_path, folder, tools=(), environment_factory=Drawn, resample_budget=1.0)


class Rollouts:
    """A rollout function of its own: call, what the tool says and answer in one go, log-probabilities made up."""

    def __init__(self, break_prefix=False):
        self.script, self.break_prefix, self.asked = None, break_prefix, []

    def write(self, trainer, prompts, prefixes):
        tok, script = trainer._tokenizer, trainer.script
        out = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
        for messages, prefix in zip(prompts, prefixes, strict=True):
            prompt = tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            encode = lambda text: tok(text, add_special_tokens=False)["input_ids"]  # noqa: E731
            text = tok.decode(prompt) + tok.decode(prefix)
            ids = list(prefix) + encode(script.answer(text))
            mask = [1] * len(ids)
            found = re.search(r'"x": (\d+), "y": (\d+)', tok.decode(ids))
            if found:
                result = str(sum(map(int, found.groups())))
                seen = encode(f"\n<tool_response>\n{result}\n</tool_response>")
                ids, mask = ids + seen + encode(result + toy.END), mask + [0] * len(seen) + [1] * (len(result) + 1)
            if self.break_prefix and prefix:
                ids[0] += 1
            out["prompt_ids"].append(prompt)
            out["completion_ids"].append(ids)
            out["env_mask"].append(mask)
            out["logprobs"].append((-torch.rand(len(ids))).tolist())
        return out

    def roll(self, prompts, trainer):
        return self.write(trainer, prompts, [[]] * len(prompts))

    def resample(self, prompts, prefixes, trainer):
        self.asked.append(prefixes)
        return self.write(trainer, prompts, prefixes)


def text_reward(completions, answer, **_):
    return [float(c[-1]["content"].endswith(str(a))) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_rollout_func(tmp_path, folder):
    own = Rollouts()
    more = {"tools": (), "rollout_func": own.roll, "resample_func": own.resample, "funcs": text_reward}
    t, batch = scored(tmp_path, folder, per_device_train_batch_size=16, resample_budget=0.5, **more)
    assert t.selected and own.asked == [[s.prefix for s in t.sources for _ in range(K)]]
    known = t.ordinary.logprobs
    values = []
    for i, ids in enumerate(t.ordinary.completion_ids):
        if "<tool_call>" in t._text(ids):
            start = next(n for n in range(len(ids)) if t._text(ids[:n]).endswith("<tool_call>"))
            end = next(n for n in range(len(ids)) if t._text(ids[:n]).endswith("</tool_call>"))
            values.append((torch.tensor(known[i][start:end]).exp().mean().item(), i // N, i % N))
    wrong = {(b, i) for _, b, i in values if not any(t.rewards[c, j] for _, c, j in values if c == b)}
    ranked = [(b, i) for _, b, i in sorted(values) if (b, i) in wrong]
    assert t.selected[0] == ranked[0]
    for row in range(16, rows.row_count(batch)):
        mask = (batch["tool_mask"][row] * batch["completion_mask"][row]).bool()
        trained = t._text(batch["completion_ids"][row][mask].tolist())
        assert trained.startswith("\n{") and "tool_response" not in trained
        assert batch["sampling_per_token_logps"][row, : mask.sum()].any()
    # a run goes through
    whole = toy.trainer(tmp_path, folder, resample_budget=1.0, **more)
    whole.train()
    assert sum(e.get("axpo/resampled_rows", 0) for e in whole.state.log_history) > 0


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_a_resample_without_its_prefix(tmp_path, folder):
    own = Rollouts(break_prefix=True)
    more = {"tools": (), "rollout_func": own.roll, "resample_func": own.resample, "funcs": text_reward}
    with pytest.raises(ValueError, match="resample_func returned completion_ids that do not begin with their prefix"):
        scored(tmp_path, folder, per_device_train_batch_size=16, resample_budget=1.0, **more)


def test_an_engine_with_log_probabilities(tmp_path, folder):
    """As vLLM answers: kept prefixes have the source's log-probabilities, and the correction of every row is TRL's."""

    class Engine:
        def __init__(self, trainer):
            self.trainer = trainer

        def generate(self, prompts, images, num_generations, profiler):
            ids, logprobs = [], []
            for prompt in prompts:
                text = self.trainer.script.answer(self.trainer._tokenizer.decode(prompt))
                ids.append(self.trainer._tokenizer(text, add_special_tokens=False)["input_ids"])
                logprobs.append([[-4.0 - torch.rand(1).item()] for _ in ids[-1]])
            return None, ids, logprobs, None

    class Simulated(Recording):
        def _generate_and_score_completions(self, inputs):
            self.use_vllm, self.vllm_mode, self._last_loaded_step = True, "server", self.state.global_step
            self.vllm_importance_sampling_mode = "token_truncate"
            self.vllm_generation = Engine(self)
            return super()._generate_and_score_completions(inputs)

    t, batch = scored(tmp_path, folder, kind=Simulated, resample_budget=0.5, per_device_train_batch_size=16)
    assert t.selected and "importance_sampling_ratio" in batch
    mask = batch["completion_mask"].bool()
    for row in range(rows.row_count(batch)):
        own = (batch["sampling_per_token_logps"][row] != 0) & mask[row]
        want = (batch["old_per_token_logps"][row] - batch["sampling_per_token_logps"][row]).exp().clamp(max=3)
        torch.testing.assert_close(batch["importance_sampling_ratio"][row][own], want[own])
    for row in range(16, rows.row_count(batch)):
        place = (row - 16) // K
        b, i = t.selected[place]
        length = len(t.sources[place].prefix)
        source = batch["sampling_per_token_logps"][b * N + i]
        assert torch.equal(batch["sampling_per_token_logps"][row, :length], source[:length])
        assert source[:length].any()
    assert torch.isfinite(t._compute_loss(t.model, batch))


def vision_model(path):
    """A Llava of two layers, its processor with Qwen3-VL's template, a tool-capable one that TRL knows."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from trl.chat_template_utils import qwen3_vl_chat_template

    class Tensors(CLIPImageProcessor):
        """What processors over torchvision return without being asked, and TRL's tool loop reads."""

        def __call__(self, images, **kwargs):
            return super().__call__(images, **{**kwargs, "return_tensors": "pt"})

    tok = toy.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]})
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        Tensors(size={"shortest_edge": 16}, crop_size=size), tok, patch_size=8,
        vision_feature_select_strategy="default", chat_template=qwen3_vl_chat_template, image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096),
        image_token_index=tok.convert_tokens_to_ids("<|image_pad|>"), vision_feature_layer=-1,
    ))  # fmt: skip
    model.save_pretrained(path)
    return str(path), processor


def test_vision_language(tmp_path):
    """Each question has its own picture; resampled rows carry their source's, through shuffle and mini-batches."""
    Image = pytest.importorskip("PIL.Image")
    from burnish.methods.axpo.config import AXPOConfig

    path, processor = vision_model(tmp_path / "model")
    pictures = [Image.new("RGB", (16, 16), (25 * i, 0, 255 - 25 * i)) for i in range(8)]
    data = Dataset.from_list([{**row, "image": p} for row, p in zip(toy.data(), pictures, strict=True)])
    config = AXPOConfig(**toy.options(tmp_path, resample_budget=1.0, gradient_accumulation_steps=2, learning_rate=0.3))
    t = Recording(path, toy.reward, config, train_dataset=data, processing_class=processor, tools=[toy.add])
    t.script = toy.Script(processor.tokenizer)
    t.model.generate = t.script
    t.model.train()
    torch.manual_seed(5)
    batch = t._generate_and_score_completions(toy.generation_batch(t))
    assert t.selected and rows.row_count(batch) > 16
    assert batch["pixel_values"].shape[0] == len(batch["num_images"]) == rows.row_count(batch)
    # the same question, the same picture; another question, another one
    asked = [re.search(r"Q\d+", t._text(ids.tolist())).group() for ids in batch["prompt_ids"]]
    for i, a in enumerate(asked):
        for j, b in enumerate(asked):
            assert torch.equal(batch["pixel_values"][i], batch["pixel_values"][j]) == (a == b)
    # and the model's own generate goes on from prompt, picture and prefix
    script = t.model.__dict__.pop("generate")
    messages = prepare_multimodal_messages(data[0]["prompt"], images=[pictures[0]])
    ids, images, fields = t._tokenize_prompts([messages] * 2)
    t._prefixes = [_Source(i, {}, ids[0], prefix, None) for i, prefix in enumerate(([5, 6, 7], [8]))]
    out, _ = t._generate_single_turn(ids, images, fields, 1)
    assert out[0][:3] == [5, 6, 7] and out[1][:1] == [8] and all(4 <= len(y) <= 200 for y in out)
    t.model.generate = script
    before = toy.parameters(t)
    t.train()
    after = toy.parameters(t)
    assert sum(e.get("axpo/resampled_rows", 0) for e in t.state.log_history) > 0
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any("vision" in n for n in moved) and any("language" in n or "lm_head" in n for n in moved)


def image_batch(counts, grid, prompt=3, completion=4):
    """A batch in Qwen-VL's layout: patches of all images flat, a grid an image."""
    n, total = len(counts), sum(counts)
    ids = torch.arange(n * prompt).view(n, prompt)
    return {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": torch.ones(n, completion).long(),
        "completion_mask": torch.ones(n, completion).long(), "advantages": torch.arange(float(n)),
        "num_items_in_batch": torch.tensor(7), "num_images": counts,
        "pixel_values": torch.arange(float(total * grid[0] * grid[1] * grid[2]))[:, None].repeat(1, 2),
        "image_grid_thw": torch.tensor([grid] * total).view(-1, 3),
        "mm_token_type_ids": torch.ones(n, prompt + completion).long(),
    }  # fmt: skip


def test_rows_with_images_in_a_grid():
    first, second = image_batch([1, 2, 0], (1, 2, 2)), image_batch([2, 1], (1, 2, 4), prompt=5, completion=2)
    both = rows.join(first, second, pad_token=99)
    assert rows.row_count(both) == 5 and both["num_images"] == [1, 2, 0, 2, 1] and both["num_items_in_batch"] == 7
    assert torch.equal(both["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
    assert both["prompt_ids"].shape == (5, 5) and both["prompt_ids"][0].tolist() == [99, 99, 0, 1, 2]
    assert both["completion_ids"][4].tolist() == [1, 1, 99, 99] and both["completion_mask"][4].tolist() == [1, 1, 0, 0]
    assert both["mm_token_type_ids"][0].tolist() == [0, 0, *[1] * 7]
    assert both["mm_token_type_ids"][4].tolist() == [*[1] * 7, 0, 0]
    some = rows.take(both, [4, 1, 1, 2])
    assert some["num_images"] == [1, 2, 2, 0] and some["image_grid_thw"].tolist() == [[1, 2, 4], *[[1, 2, 2]] * 4]
    want = [*range(16, 24), *[*range(4, 12)] * 2]
    assert some["pixel_values"][:, 0].tolist() == want
    assert some["advantages"].tolist() == [1, 1, 1, 2]


def test_rows_with_and_without():
    """Text rows beside rows with images, masks on one side only, padded images of different numbers."""
    first, second = image_batch([1, 1], (1, 2, 2)), image_batch([0], (1, 2, 2))
    for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids"):
        del second[key]
    second["tool_mask"] = torch.zeros(1, 4).long()
    both = rows.join(first, second, 0)
    assert both["num_images"] == [1, 1, 0] and both["pixel_values"].shape == (8, 2)
    assert both["mm_token_type_ids"][2].tolist() == [0] * 7
    assert both["tool_mask"].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    padded = [{**image_batch([0] * n, (1, 1, 1)), "pixel_values": torch.ones(n, m, 3)} for n, m in ((2, 1), (3, 4))]
    for part in padded:
        del part["num_images"], part["image_grid_thw"]
    both = rows.join(*padded, 0)
    assert both["pixel_values"].shape == (5, 4, 3) and both["pixel_values"].sum() == (2 * 1 + 3 * 4) * 3
    first["strange"] = torch.ones(2)
    with pytest.raises(ValueError, match="some rows of this batch have strange"):
        rows.join(first, second, 0)
