"""Small matrices and models; ``plain`` (the formulas by torch.linalg.svd) is importable from here on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
