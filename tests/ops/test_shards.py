"""A head sharded over gloo ranks equals the whole head in one process: every objective, uneven and empty shards."""

from pathlib import Path

import pytest
import ranks


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_head_equals_the_whole_one(world, tmp_path):
    ranks.run(Path(__file__).with_name("shard_ranks.py"), world, tmp_path)
