"""Started by ``accelerate launch``: the command lines of a JSON file, one after another in the same processes."""

import json
import sys
from pathlib import Path

from burnish.cli import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = main(arguments)
        if code:
            sys.exit(code)
