"""Fixtures of RA-RFT's tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tiny_models`

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A two-layer BERT of 16 dimensions as a sentence-transformers model, in a directory."""
    import tiny_encoder

    return tiny_encoder.save(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def encoder(encoder_folder):
    from burnish.methods.ra_rft import load_encoder

    return load_encoder(encoder_folder)
