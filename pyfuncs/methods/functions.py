"""Functions that the user of a command names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function of MODULE:FUNCTION, from the working directory or what is installed.

    ValueError, naming the ``option``, where there is none.
    """
    module, sign, attribute = name.partition(":")
    if not sign or not module or not attribute:
        raise ValueError(f"{option} must be one of its names or MODULE:FUNCTION; got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name}: cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{option} {name}: is not callable")
    return function
