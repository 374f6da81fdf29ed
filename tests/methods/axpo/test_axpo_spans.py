"""The first call of a completion, in tokens, whatever tokens the tag is made of."""

import axpo_tiny as toy
import pytest

from burnish.methods.axpo.spans import Call, first_call

PIECES = [
    "<tool", "_call", ">", "</tool", ">\n", "<", "tool_call>", "think ", "{x}", " more", "<tool_call>", "</", "<eos>",
]  # fmt: skip


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def find(ids, own=None):
    return first_call(ids, own or [1] * len(ids), decode, "<tool_call>", "</tool_call>")


@pytest.mark.parametrize(("ids", "want"), [
    ([7, 0, 1, 2, 8, 3, 1, 2, 9], Call(4, 8)),      # a tag of three tokens
    ([7, 0, 1, 4, 8, 3, 1, 4, 9], Call(4, 8)),      # whose last one goes on behind the tag
    ([7, 10, 8, 11, 6, 12], Call(2, 5)),            # a tag of one token
    ([5, 6, 8, 9], Call(2, 4)),                     # never closed: to the end of the turn
    ([7, 7, 10], Call(3, 3)),                       # cut off at the tag
    ([10, 8, 11, 6, 7, 10, 8, 11, 6], Call(1, 4)),  # the first of two
    ([7, 8, 9], None),
    ([11, 6, 8], None),                             # a closing tag alone
    ([], None),
])  # fmt: skip
def test_spans(ids, want):
    assert find(ids) == want


def test_observations_are_not_searched():
    ids = [7, 10, 8, 11, 6, 9]
    assert find(ids, [1, 0, 0, 0, 0, 1]) is None
    # the policy's own call behind an observation that has one
    both = [7, 10, 11, 6, 9, 10, 8, 11, 6]
    assert find(both, [1, 0, 0, 0, 1, 1, 1, 1, 1]) == Call(6, 9)
    # a tag that half an observation completes is nobody's
    assert find([0, 1, 2, 8], [1, 0, 0, 1]) is None
    # the span ends with the turn
    assert find([10, 8, 9, 11, 6], [1, 1, 0, 1, 1]) == Call(1, 2)
    with pytest.raises(ValueError, match="3 tokens, 2 of a mask"):
        find([1, 2, 3], [1, 1])


def test_characters():
    tok = toy.tokenizer()
    text = "hm\n<tool_call>" + toy.call(3, 4) + toy.END
    ids = tok(text, add_special_tokens=False)["input_ids"]
    read = lambda i: tok.decode(i, skip_special_tokens=False)  # noqa: E731
    got = first_call(ids, [1] * len(ids), read, "<tool_call>", "</tool_call>")
    assert tok.decode(ids[: got.prefix]) == "hm\n<tool_call>"
    assert tok.decode(ids[: got.end]) == text.removesuffix(toy.END)
