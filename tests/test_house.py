"""The house rules: what importing costs, who may import whom, names, and the built wheel."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code, **kw):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False, **kw)


def test_import_is_light():
    code = """
import sys, os
before = dict(os.environ)
import burnish, burnish.kernels
heavy = {"transformers", "trl", "datasets", "triton", "burnish.kernels.rows_triton",
         "burnish.kernels.rows_host", "torch.utils.cpp_extension"} & set(sys.modules)
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
assert dict(os.environ) == before
print(burnish.__version__)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1.0"


def test_the_other_package_named_kernels_is_not_shadowed(tmp_path):
    """transformers imports a package called kernels: ours must never answer to that name."""
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("WHO = 'the hub loader'\n__version__ = '0.12.0'\n")
    code = f"""
import sys
sys.path.append({str(tmp_path)!r})
import burnish.kernels, kernels
assert kernels.WHO == 'the hub loader', kernels.__file__
assert burnish.kernels is not kernels
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    # and with nothing of that name installed there is none
    assert "ModuleNotFoundError" in run("import burnish, kernels").stderr


FLOORS = {
    "kernels": 0,
    "reference": 0,
    "objectives": 0,
    "ops": 1,
    "chunkft": 2,
    "tokens": 2,
    "paths": 2,
    "methods": 3,
    "cli": 4,
}


def floor_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    return relative.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("pyfuncs/**/*.py")]), ids=str)
def test_nothing_imports_upward(path):
    own = floor_of(path)
    if own == "__init__":
        return
    package = ["burnish", *path.relative_to(ROOT if own == "kernels" else ROOT / "pyfuncs").with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            names = [[*module, a.name] for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        for name in names:
            name = [n for n in name if n]
            if name[:1] != ["burnish"] or len(name) < 2 or name[1] not in FLOORS:
                continue
            other = name[1]
            assert FLOORS[other] <= FLOORS[own], f"{path} imports {'.'.join(name)}"
            if own in ("reference", "objectives"):
                assert other == own, f"{path}: {own} imports nothing of ours, but {'.'.join(name)}"
            if own == "kernels":
                assert other == "kernels", f"{path} imports {'.'.join(name)}"


def test_every_public_name_has_a_docstring():
    import burnish

    for name in burnish.__all__:
        assert getattr(burnish, name).__doc__, name
    for name in burnish.objectives.__all__:
        assert getattr(burnish.objectives, name).__doc__ or name == "STATISTICS", name


def test_the_objectives_names_match_the_contract():
    from burnish.kernels import contract
    from burnish.objectives import base

    assert base.STATISTICS == contract.STATISTICS
    assert set(contract.NEED_TEACHER) == base._TEACHER


def test_wheel_has_every_module(tmp_path):
    """The built wheel, unpacked elsewhere, imports: no file of the package mapping is missing."""
    source = tmp_path / "src"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path),
         str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("burnish-*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = set(z.namelist())
        z.extractall(tmp_path / "site")
    want = {f"burnish/{p.relative_to(ROOT / 'pyfuncs')}" for p in ROOT.glob("pyfuncs/**/*.py")}
    want |= {f"burnish/kernels/{p.relative_to(ROOT / 'kernels')}" for p in ROOT.glob("kernels/**/*.py")}
    assert want <= inside
    assert {"burnish/py.typed", "burnish/kernels/host/rows.cpp"} <= inside
    assert not [n for n in inside if n.endswith((".so", ".pyd"))]  # nothing is compiled by installing
    assert any(n.endswith("licenses/LICENSE") for n in inside)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import burnish, burnish.kernels.contract, burnish.ops.linear_loss
assert burnish.__file__.startswith({str(tmp_path)!r}), burnish.__file__
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_generated_parts_of_the_docs_are_current():
    """Tables in README and docs are those of the registry and of the committed results."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "docs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
