import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `chunk_models`
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))  # for `tiny_models`
