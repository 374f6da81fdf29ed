"""Two gloo ranks whose triggers differ."""

from pathlib import Path

import pytest
import ranks
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def test_two_ranks(tmp_path):
    ranks.run(Path(__file__).with_name("axpo_ranks.py"), 2, tmp_path)
