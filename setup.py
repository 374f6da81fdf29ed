"""Everything is declared in pyproject.toml; this file builds the CPU kernels ahead of time where that is asked for.

    python setup.py build_ext --inplace         # kernels/_host*.so, for an editable install
    python setup.py build_ext bdist_wheel       # a wheel with the library inside

A plain ``pip install`` compiles nothing: the library is then built at first use, or the torch twin runs.
"""

import runpy
import sys

from setuptools import setup

options: dict = {}
if "build_ext" in sys.argv:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    build = runpy.run_path("kernels/host/flags.py")
    flags = build["compiler_flags"](build["ahead_of_time_capability"]())
    extension = CppExtension(
        "burnish.kernels._host", [f"kernels/host/{name}" for name in build["SOURCES"]], extra_compile_args=flags,
        extra_link_args=[f for f in flags if f == "-fopenmp"],
    )  # fmt: skip
    options = {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}

setup(**options)
