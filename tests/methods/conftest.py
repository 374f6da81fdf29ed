"""Fixtures of the methods' tests; ``tiny_models`` is importable from here on."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# a name that is not a directory must fail at once, not after asking a server
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest.importorskip("trl")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import tiny_models

    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    import tiny_models

    return tiny_models.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(autouse=True, scope="module")
def tiny_models_use_one_thread(one_thread):
    """Every test of this folder runs models small enough for it."""
