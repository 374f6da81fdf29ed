"""A tiny model with a tool-capable chat template, and a scripted policy behind its ``generate``.

Everything but the sampling is real: TRL's trainer, tool loop and loss, a Llama of two layers, its gradients.
"""

from __future__ import annotations

import json
import re

import tiny_models as tiny
import torch
from datasets import Dataset
from transformers import AddedToken
from transformers.utils import get_json_schema
from trl.chat_template_utils import qwen2_5_chat_template

from burnish.methods.axpo.config import AXPOConfig
from burnish.methods.axpo.trainer import AXPOTrainer

START, END = "<|im_start|>", "<|im_end|>"


#: Long constant parts of the template, a token each: characters would make prompts of a thousand tokens.
CONSTANT = (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n",
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)


def tokenizer():
    """A token a character, but for ChatML's two and the template's constant parts; so a tag is many tokens."""
    out = tiny.tokenizer()
    out.add_special_tokens({"additional_special_tokens": [AddedToken(START, special=True)],
                            "eos_token": AddedToken(END, special=True)})  # fmt: skip
    schema = json.dumps(get_json_schema(add))
    out.add_tokens([AddedToken(part, normalized=False) for part in (*CONSTANT, schema)])
    out.chat_template = qwen2_5_chat_template
    return out


def model(seed: int = 0):
    out = tiny.llama(seed, vocabulary=128)
    out.config.max_position_embeddings = 4096
    return out


def save(folder) -> str:
    return tiny.save(folder, model(), tokenizer())


def add(x: int, y: int) -> int:
    """Adds two numbers.

    Args:
        x: the first.
        y: the second.
    """
    return x + y


def reward(completions, answer, **_) -> list[float]:
    return [float(str(a) in c[-1]["content"]) for c, a in zip(completions, answer, strict=True)]


def call(x, y, name="add") -> str:
    return "\n" + json.dumps({"name": name, "arguments": {"x": x, "y": y}}) + "\n</tool_call>"


class Script:
    """What ``generate`` answers: P(tool) ``tool``, P(right arguments) ``right``, behind a kept tag ``right_again``,
    P(right | no tool) ``guess``.

    Draws come from torch's generator, as sampling would take them.  ``seen`` keeps the prompts' texts.
    """

    def __init__(self, tok, tool=0.6, right=0.1, guess=0.5, right_again=0.5, think="hm"):
        self.tok, self.tool, self.right, self.guess, self.think = tok, tool, right, guess, think
        self.right_again = right_again
        self.seen: list[str] = []

    def __call__(self, input_ids, attention_mask, generation_config=None, **_):
        texts = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            texts.append(self.answer(self.tok.decode(ids[mask.bool()])))
        new = [torch.tensor(self.tok(t, add_special_tokens=False)["input_ids"]) for t in texts]
        new = [n[: generation_config.max_new_tokens] for n in new]
        width = max(len(n) for n in new)
        out = torch.full((len(new), width), self.tok.pad_token_id)
        for row, ids in zip(out, new, strict=True):
            row[: len(ids)] = ids
        return torch.cat([input_ids, out], 1)

    def answer(self, prompt: str) -> str:
        self.seen.append(prompt)
        x, y = map(int, re.findall(r"Q(\d+)\+(\d+)", prompt)[-1])
        draw = torch.rand(3).tolist()
        if prompt.endswith("<tool_call>"):
            return call(x if draw[1] < self.right_again else x + 1, y) + END
        result = re.search(r"<tool_response>\n(.*?)\n</tool_response><\|im_end\|>\n<\|im_start\|>assistant\n$", prompt)
        if result:
            return f"{result.group(1)}{END}"
        if draw[0] < self.tool:
            return f"{self.think}\n<tool_call>" + call(x if draw[1] < self.right else x + 1, y) + END
        return f"={x + y if draw[2] < self.guess else 0}{END}"


def data(count: int = 8) -> Dataset:
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"Q{i + 10}+{i + 20}"}], "answer": 2 * i + 30} for i in range(count)
    ])  # fmt: skip


def options(folder, **more) -> dict:
    return dict(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, num_resamples=2, max_steps=2,
        max_completion_length=200, learning_rate=0.1, optim="sgd", logging_steps=1, report_to="none", bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=3,
        use_cpu=True, max_grad_norm=1e6,
    ) | more  # fmt: skip


def trainer(folder, model_folder, *, kind=AXPOTrainer, config=AXPOConfig, script=None, rows=None, funcs=reward,
            tools=(add,), **more):  # fmt: skip
    """A trainer on the scripted policy; ``more`` are config fields, or the trainer's own arguments."""
    own = {k: more.pop(k) for k in ("rollout_func", "resample_func", "environment_factory", "peft_config", "model")
           if k in more}  # fmt: skip
    tok, fields = tokenizer(), options(folder, **more)
    if config is not AXPOConfig:
        del fields["num_resamples"]
    out = kind(
        own.pop("model", model_folder), funcs, config(**fields), train_dataset=rows or data(),
        processing_class=tok, tools=list(tools) or None, **own,
    )  # fmt: skip
    out.script = script or Script(tok)
    out.script.tok = tok
    out.accelerator.unwrap_model(out.model).generate = out.script
    return out


def generation_batch(trainer, index: int = 0):
    """The rows of the trainer's ``index``-th generation batch on this rank."""
    loader = iter(trainer.get_train_dataloader())
    for _ in range(index):
        next(loader)
    return next(loader)


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
