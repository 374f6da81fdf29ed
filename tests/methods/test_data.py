"""Rows from files and tasks; each malformed one is named with its line."""

import json

import pytest

from burnish.methods.data import FileData, load_data, read_jsonl

GOOD = {
    "strings": {"prompt": "a", "completion": "b"},
    "messages both": {
        "prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}],
    },
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "text": {"text": "abc"},
    "ids": {"input_ids": [1, 2], "labels": [-100, 2]},
    "empty prompt": {"prompt": "", "completion": "b"},
}  # fmt: skip
BAD = {
    "{": "not JSON",
    "[1]": "must be a JSON object; got list",
    "{}": "needs prompt and completion, messages, text or input_ids; got nothing",
    '{"question": 1}': "got question",
    '{"prompt": "a"}': "'prompt' without 'completion'",
    '{"completion": "a"}': "'completion' without 'prompt'",
    '{"prompt": "a", "completion": ""}': "'completion' is empty",
    '{"prompt": 3, "completion": "a"}': "'prompt' must be a string or a list of messages; got int",
    '{"prompt": "a", "completion": [{"role": "x", "content": "y"}]}': "must both be",
    '{"messages": []}': "'messages' is empty",
    '{"messages": "hi"}': "'messages' must be a list of messages; got str",
    '{"messages": ["hi"]}': "messages[0] must be an object",
    '{"messages": [{"content": "x"}]}': "messages[0] must be an object with a role",
    '{"messages": [{"role": "user"}]}': "messages[0] has no content",
    '{"messages": [{"role": "user", "content": null}]}': "messages[0] has no content",
    '{"text": ""}': "'text' is empty",
    '{"text": ["a"]}': "'text' must be a string; got list",
    '{"input_ids": []}': "'input_ids' must be a list of integers",
    '{"input_ids": [1.5]}': "'input_ids' must be a list of integers",
    '{"input_ids": [true]}': "'input_ids' must be a list of integers",
    '{"input_ids": [1], "labels": [1, 2]}': "2 labels for 1 input_ids",
}


@pytest.mark.parametrize("name", GOOD)
def test_forms(name, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("\n" + json.dumps({**GOOD[name], "id": 7}) + "\r\n\n" + json.dumps(GOOD[name]))
    data = read_jsonl(str(path))
    assert data == FileData(str(path), [GOOD[name]] * 2, ["id"])


@pytest.mark.parametrize("line", BAD)
def test_malformed_rows(line, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD["text"]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        read_jsonl(str(path))
    assert str(error.value).startswith(f"{path}:3: ") and BAD[line] in str(error.value)


def test_files(tmp_path):
    path = tmp_path / "r.jsonl"
    for content, message in (
        (b"", "no rows"), (b'{"text": "a"}\n\xff\xfe\n', "r.jsonl:2: not UTF-8"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "the rows before it have text"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_jsonl(str(path))
    with pytest.raises(ValueError, match="no such file"):
        read_jsonl(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is a directory"):
        read_jsonl(str(tmp_path))


def test_tasks():
    pytest.importorskip("reasoning_gym")
    data = load_data("reasoning-gym:chain_sum", {"size": 5, "seed": 1, "max_terms": 3})
    again = load_data("reasoning-gym:chain_sum", {"size": 5, "seed": 1, "max_terms": 3})
    other = load_data("reasoning-gym:chain_sum", {"size": 5, "seed": 2, "max_terms": 3})
    assert len(data.entries) == 5 and data.rows(False) == again.rows(False) != other.rows(False)
    assert all(data.task.score_answer(e["answer"], e) == 1.0 for e in data.entries)
    chat, plain = data.rows(True)[0], data.rows(False)[0]
    assert chat["prompt"][0]["content"] + "\n" == plain["prompt"]
    assert chat["completion"] == [{"role": "assistant", "content": plain["completion"]}]
    for source, arguments, message in (
        ("chain_summ", {}, "did you mean chain_sum"), ("chain_sum", {"size": 2.5}, "size must be"),
        ("chain_sum", {"seed": True}, "seed must be"), ("chain_sum", {"depth": 1}, "no argument 'depth'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_data(f"reasoning-gym:{source}", arguments)
