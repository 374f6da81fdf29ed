"""Engines and collection: independent seeds, the right distribution, and files that survive a kill."""

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny_models as tiny
import torch

from burnish.methods.data import load_task
from burnish.methods.drift import TransformersEngine, VLLMEngine, collect, read_episodes, task_prompts, task_verifier
from burnish.methods.drift.engines import turn_seed
from burnish.methods.drift.episodes import settings_file
from burnish.methods.drift.verify import Prompt, find_answer

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": f"{i}?"}], entry=str(i % 4)) for i in range(5)]
OPTIONS = {"trajectories": 3, "max_turns": 3, "batch_size": 4, "seed": 5, "progress": False}


def stub(conversations, seeds):
    """A digit of the whole conversation and the seed."""
    return [
        str(hashlib.sha256(json.dumps([c, s]).encode()).digest()[0] % 4)
        for c, s in zip(conversations, seeds, strict=True)
    ]


def verifier(text, entry):
    return float(text == entry), text


def test_an_episode_is_a_conversation(tmp_path):
    found = collect(tmp_path / "e.jsonl", PROMPTS, stub, verifier, **OPTIONS)
    assert sorted((e.prompt_id, e.trajectory) for e in found) == [(f"p{i}", k) for i in range(5) for k in range(3)]
    for e in found:
        turns = len(e.rewards)
        assert 1 <= turns <= 3 and (e.solved or turns == 3) and not any(e.rewards[:-1])
        assert [m["role"] for m in e.messages] == ["user", "assistant"] * turns
        assert [m["content"] for m in e.messages[1::2]] == e.answers
        assert {m["content"] for m in e.messages[2::2]} <= {"Incorrect. Please think again."}
    assert {e.solved for e in found} == {True, False}
    assert read_episodes(tmp_path / "e.jsonl") == found


def test_a_kill_at_any_byte(tmp_path):
    whole = tmp_path / "whole.jsonl"
    collect(whole, PROMPTS, stub, verifier, **OPTIONS)
    content = whole.read_bytes()
    ends = [i for i, b in enumerate(content) if b == ord("\n")]
    cuts = sorted({0, *range(3, len(content), 41), *ends, *(i + 1 for i in ends), *(i - 1 for i in ends)})
    cut = tmp_path / "cut.jsonl"
    settings_file(cut).write_bytes(settings_file(whole).read_bytes())
    for size in cuts:
        cut.write_bytes(content[:size])
        collect(cut, PROMPTS, stub, verifier, **OPTIONS)
        assert cut.read_bytes() == content, size
    cut.unlink()  # killed before the first line
    collect(cut, PROMPTS, stub, verifier, **OPTIONS)
    assert cut.read_bytes() == content


def test_a_finished_file_asks_nothing(tmp_path):
    first = collect(tmp_path / "e.jsonl", PROMPTS, stub, verifier, **OPTIONS)
    assert collect(tmp_path / "e.jsonl", PROMPTS, None, None, **OPTIONS) == first


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "e.jsonl"
    collect(file, PROMPTS, stub, verifier, settings={"model": "a"}, **OPTIONS)
    for changed in ({"seed": 6}, {"trajectories": 4}, {"settings": {"model": "b"}}, {"settings": {}}):
        (name,) = changed
        name = "model" if name == "settings" else name
        with pytest.raises(ValueError, match=f"e.jsonl: {name} is .* began with"):
            collect(file, PROMPTS, stub, verifier, **{**OPTIONS, "settings": {"model": "a"}, **changed})
    with pytest.raises(ValueError, match="prompts is"):
        collect(file, PROMPTS[1:], stub, verifier, settings={"model": "a"}, **OPTIONS)
    lines = file.read_bytes().splitlines(keepends=True)
    same = {**OPTIONS, "settings": {"model": "a"}}
    file.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(ValueError, match=r"e\.jsonl:2: not a line of JSON"):
        collect(file, PROMPTS, stub, verifier, **same)
    file.write_bytes(lines[0] + lines[0])
    with pytest.raises(ValueError, match=r"e\.jsonl:2: trajectory 0 of prompt 'p0' does not belong"):
        collect(file, PROMPTS, stub, verifier, **same)
    settings_file(file).unlink()
    with pytest.raises(ValueError, match="choose another file"):
        collect(file, PROMPTS, stub, verifier, **same)


def test_what_cannot_be_is_refused(tmp_path):
    file = tmp_path / "e.jsonl"
    for name in ("trajectories", "max_turns", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            collect(file, PROMPTS, stub, verifier, **{**OPTIONS, name: 0})
    with pytest.raises(ValueError, match="there are none"):
        collect(file, [], stub, verifier, **OPTIONS)
    with pytest.raises(ValueError, match="'p1' is given twice"):
        collect(file, [*PROMPTS, PROMPTS[1]], stub, verifier, **OPTIONS)
    assert not file.exists() and not settings_file(file).exists()
    with pytest.raises(ValueError, match="nan for a turn of prompt 'p0'"):
        collect(file, PROMPTS, stub, lambda text, entry: (math.nan, text), **OPTIONS)
    with pytest.raises(ValueError, match="gave 1 texts for 4"):
        collect(file, PROMPTS, lambda c, s: ["x"], verifier, **OPTIONS)
    with pytest.raises(ValueError, match=r"2\^32 turns"):
        turn_seed(0, 2**28, 0, 0, trajectories=16, turns=5)


# ---- the engine over transformers' generate


def engine(model=None, **options):
    return TransformersEngine(
        model or tiny.llama().double(), tiny.tokenizer(chat=True), **{"max_new_tokens": 4, **options}
    )


def ask(text):
    return [{"role": "user", "content": text}]


def test_a_turn_depends_on_its_own_seed_and_conversation_alone():
    one = engine()
    talks = [ask("ab"), ask("a much longer question"), ask("ab"), ask("x")]
    texts = one(talks, [1, 2, 3, 4])
    assert texts == one(talks, [1, 2, 3, 4])
    assert [one([t], [s])[0] for t, s in zip(talks, [1, 2, 3, 4], strict=True)] == texts
    assert one(talks[::-1], [4, 3, 2, 1]) == texts[::-1]
    torch.manual_seed(99)
    assert one([ask("ab")] * 2, [1, 1])[0] == texts[0]


def test_draws_have_the_models_distribution():
    model = tiny.llama(vocabulary=40).double()
    tok = tiny.tokenizer(chat=True)
    talk = ask("ab")
    ids = torch.tensor(tok(tok.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))["input_ids"])
    with torch.no_grad():
        logits = model(ids.clamp(max=39)[None]).logits[0, -1]
    for options in ({"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.6}):
        from burnish.methods.drift.engines import _SeededDraw

        count = 20_000
        draw = _SeededDraw(range(count), 1, options["temperature"], options.get("top_p", 1.0), 1)
        drawn = draw(torch.zeros(count, 1, dtype=torch.int64), logits.expand(count, -1)).argmax(-1)
        p = (logits / options["temperature"]).softmax(-1)
        if "top_p" in options:
            order = p.argsort(descending=True)
            keep = order[: int((p[order].cumsum(0) < options["top_p"]).sum()) + 1]
            p = torch.zeros_like(p).index_copy(0, keep, p[keep])
            p = p / p.sum()
        seen = torch.bincount(drawn, minlength=40)
        assert not seen[p == 0].any()
        live = p > 0
        chi = ((seen[live] - count * p[live]) ** 2 / (count * p[live])).sum()
        freedom = int(live.sum()) - 1
        assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_temperature_0_is_greedy_and_eos_ends_a_turn():
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0
    assert engine(model, temperature=0.0)([ask("ab")], [1]) == engine(model, temperature=0.0)([ask("ab")], [2])
    with torch.no_grad():
        model.lm_head.weight[:] = 0.0
    drawn = engine(model, max_new_tokens=60)([ask("ab")] * 50, list(range(50)))
    lengths = {len(text) for text in drawn}
    assert min(lengths) < 20 and len(lengths) > 10  # one in 128 tokens is eos


def test_the_model_is_given_back_as_it_was():
    model = tiny.llama().train()
    engine(model)([ask("ab")], [1])
    assert model.training
    with pytest.raises(ValueError, match="chat template"):
        TransformersEngine(model, tiny.tokenizer())
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="temperature must be"):
            engine(model, **options)


def test_collected_by_a_model(tmp_path):
    """A real model, a real task, cut in the middle of a block: the same bytes."""
    data = load_task("chain_sum", size=3, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    given = [task_prompts(data, "Only the number."), engine(), task_verifier(data.task)]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = {**OPTIONS, "max_turns": 2}
    found = collect(whole, *given, **options)
    assert found[0].prompt_id == "chain_sum/0" and found[0].messages[0]["content"].endswith("\nOnly the number.")
    assert len({e.messages[1]["content"] for e in found if e.prompt_id == "chain_sum/0"}) == 3
    collect(cut, *given, **options)
    cut.write_bytes(whole.read_bytes()[:-300])
    collect(cut, *given, **options)
    assert cut.read_bytes() == whole.read_bytes()


def test_answers_are_found_by_a_pattern():
    find = find_answer(r"<answer>(.*?)</answer>")
    assert find("<answer>1</answer> no, <answer> 2\n</answer>") == "2" and find("3") is None
    assert find_answer(None)(" 4 ") == "4" and find_answer(None)("  ") is None
    for bad in ("(", "no group"):
        with pytest.raises(ValueError, match="answer pattern"):
            find_answer(bad)

    class Task:
        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 0.01

    verify = task_verifier(Task(), find)
    assert verify("<answer>7</answer>", {"answer": "7"}) == (1.0, "7")
    assert verify("7", {"answer": "7"}) == (0.0, None)
    assert find_answer("a(b)?")("a") is None


# ---- TRL's client against a server that speaks vLLM's protocol


class _Server(BaseHTTPRequestHandler):
    """Answers a chat with the ids of the seed's digits, as a vLLM server would with sampled ones."""

    asked: list = []  # noqa: RUF012

    def do_GET(self):
        self.reply({"data": [{"id": "served"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, request))
        ids = tiny.tokenizer()(str(request["seed"]))["input_ids"] + [1]
        self.reply({"prompt_token_ids": [0], "choices": [{"token_ids": ids, "logprobs": None}]})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_trls_vllm_client(monkeypatch):
    """TRL's own VLLMClient over HTTP; behind it a stand-in for the server, since vLLM is not installed here."""
    pytest.importorskip("requests")
    from trl.generation import vllm_client

    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = vllm_client.VLLMClient(base_url=f"http://127.0.0.1:{server.server_port}")
        one = VLLMEngine(client, tiny.tokenizer(), temperature=0.7, top_p=0.9, max_new_tokens=5)
        seeds = [turn_seed(0, 0, k, 0, trajectories=4, turns=1) for k in range(4)]
        assert one([ask("same")] * 4, seeds) == [str(s) for s in seeds]
    finally:
        server.shutdown()
    assert len(_Server.asked) == 4
    path, request = _Server.asked[0]
    assert path == "/v1/chat/completions" and request["messages"] == ask("same") and request["model"] == "served"
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.7, 0.9, 5)
    assert max(seeds) < 2**63


def test_numpys_philox_keeps_the_whole_key():
    first = np.random.Generator(np.random.Philox(key=1)).random(4)
    assert not np.array_equal(first, np.random.Generator(np.random.Philox(key=1 + 2**32)).random(4))
