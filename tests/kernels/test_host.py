"""The host backend beyond what every backend is held to: its exponential, threads, bounds, and how it is built."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rowcheck import FOLDED, fold, grad, problem, spec_of

from burnish.kernels import dispatch, host_build, rows_host, rows_torch
from burnish.kernels.contract import COEF, COEF_INDEX, STATE_INDEX, finalize, new_state

ALL = (*FOLDED, "ids")
CPU = torch.device("cpu")


def python(code: str, timeout=300, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd="/",
                          env=environment)  # fmt: skip


def _exp(x: torch.Tensor) -> torch.Tensor:
    """The kernels' own exponential: grad with a = 1 and nothing else."""
    out, coef = torch.empty_like(x)[None], torch.zeros(len(COEF), 1, dtype=x.dtype)
    coef[COEF_INDEX["a"]] = 1
    rows_host.grad(x[None], None, out, coef, torch.tensor([-1]), spec_of())
    return out[0]


def test_the_exponential_is_within_two_units():
    x = torch.cat([-torch.logspace(-9, 1.9, 400_001), torch.linspace(-87.33, 0.5, 400_001), torch.zeros(1)])
    want = x.double().exp()
    error = (_exp(x).double() - want).abs() / want
    print(f"largest relative error {error.max():.2e}")
    assert error.max() < 1.5e-7  # 1.25 units
    wide = torch.linspace(-700, 0.5, 10_001, dtype=torch.float64)
    assert ((_exp(wide) - wide.exp()).abs() / wide.exp()).max() < 3e-16
    ends = torch.tensor([-87.4, -200.0, -1e30, -float("inf"), float("nan"), 0.0])
    assert torch.equal(_exp(ends).nan_to_num(7.0), torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    p, spec = problem(67, 3001, dtype=dtype), spec_of(*ALL, softcap=9.0, temperature=True)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stats = fold(rows_host, p, spec)
            runs.append((stats, grad(rows_host, p, spec, stats)))
    finally:
        torch.set_num_threads(before)
    for stats, g in runs[1:]:
        assert all(torch.equal(stats[n].nan_to_num(), runs[0][0][n].nan_to_num()) for n in spec.stats)
        assert torch.equal(g, runs[0][1])


def test_a_wide_launch_uses_the_threads_it_may():
    """The library shares torch's thread pool: torch.set_num_threads is obeyed."""
    code = """
import os, torch
from burnish.kernels import rows_host
from burnish.kernels.contract import RowSpec, new_state
torch.set_num_threads(1)
tile, y = torch.zeros(64, 4096), torch.zeros(64, dtype=torch.int64)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
rows_host.fold(tile, None, new_state(64, torch.float32, tile.device), y, RowSpec(frozenset({"lse"})))
after = len(os.listdir("/proc/self/task"))
torch.zeros(1 << 22).exp()
print(before, after, len(os.listdir("/proc/self/task")))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    before, after, torch_too = map(int, python(code).stdout.split())
    assert after == before + 2 and torch_too == after


GUARD = """
import ctypes, mmap, sys, torch
sys.path.insert(0, {folder!r})
from rowcheck import problem, spec_of, FOLDED, grad, fold
from burnish.kernels import rows_host
libc = ctypes.CDLL(None, use_errno=True)
PAGE, pages = mmap.PAGESIZE, 12
def fenced(x):
    "x at the very end of readable memory, and a page that may not be touched after it"
    area = mmap.mmap(-1, PAGE * (pages + 1))
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(base + PAGE * pages), PAGE, 0) == 0
    size = x.numel() * x.element_size()
    kept.append(area)
    return torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=PAGE * pages - size).view(x.shape).copy_(x)
kept, spec = [], spec_of(*FOLDED, "ids")
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for v in (1, 7, 37, 64, 1023, 1025):
        p = problem(2, v, dtype=dtype)
        want = grad(rows_host, p, spec, fold(rows_host, p, spec))
        p.tile, p.teacher = fenced(p.tile), fenced(p.teacher)
        out = fenced(torch.zeros_like(want))
        assert torch.equal(grad(rows_host, p, spec, fold(rows_host, p, spec), wide=out), want), (dtype, v)
print("done")
if {broken}:
    x = fenced(torch.zeros(8))
    ctypes.string_at(x.data_ptr(), 33)  # one byte too many
    print("not caught")
"""


@pytest.mark.parametrize("broken", [False, True])
def test_no_access_beyond_the_operands(broken):
    """Tiles, teachers and outputs that end where memory ends; and the fence at work."""
    if sys.platform != "linux":
        pytest.skip("needs mprotect")
    done = python(GUARD.format(folder=str(Path(__file__).parent), broken=broken))
    assert "done" in done.stdout, done.stderr[-2000:]
    assert (done.returncode == 0) != broken and "not caught" not in done.stdout


def test_wrong_operands_are_refused():
    p, state = problem(4, 8, dtype=torch.float32), new_state(4, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"teacher must be \(4, 8\)"):
        rows_host.fold(p.tile, p.teacher[:, :5], state, p.target, spec_of("cross"))
    with pytest.raises(TypeError, match="tile must be torch"):
        rows_host.fold(p.tile.to(torch.int32), None, state, p.target, spec_of())
    with pytest.raises(TypeError, match="state must be torch"):
        rows_host.fold(p.tile, None, state.bfloat16(), p.target, spec_of())
    with pytest.raises(ValueError, match=r"state must be \(19, 4\)"):
        rows_host.fold(p.tile, None, state[:, :3], p.target, spec_of())
    with pytest.raises(ValueError, match=r"target must be \(4,\)"):
        rows_host.fold(p.tile, None, state, p.target[:3], spec_of())
    with pytest.raises(ValueError, match="teacher must be given"):
        rows_host.fold(p.tile, None, state, p.target, spec_of("cross"))
    with pytest.raises(RuntimeError, match="needs tensors on the CPU"):
        dispatch.resolve("host", torch.device("cuda"))


def test_teacher_of_another_dtype():
    p, spec = problem(3, 37, dtype=torch.float32), spec_of(*ALL)
    p.teacher = p.teacher.to(torch.bfloat16)
    stats = fold(rows_host, p, spec)
    g = grad(rows_host, p, spec, stats)
    p.teacher = p.teacher.float()
    again = fold(rows_host, p, spec)
    assert all(torch.equal(stats[n].nan_to_num(), again[n].nan_to_num()) for n in spec.stats)
    assert torch.equal(g, grad(rows_host, p, spec, again))


# How it is built

PREAMBLE = """
import logging, warnings, torch
from burnish.kernels import dispatch, host_build, rows_host
host_build._prebuilt = lambda: None
cpu = torch.device("cpu")
"""
FALLBACK = (
    PREAMBLE
    + """
import burnish
x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
assert dispatch.resolve("auto", cpu, build=False) == {expected!r}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    a, b = (burnish.linear_loss(x, w, y, burnish.objectives.nll()) for _ in range(2))
    assert dispatch.resolve("auto", cpu) == "torch"
assert torch.equal(a, burnish.linear_loss(x, w, y, burnish.objectives.nll(), backend="torch")) and torch.equal(a, b)
try:
    burnish.linear_loss(x, w, y, burnish.objectives.nll(), backend="host")
except RuntimeError as error:
    print(error)
print([str(w.message) for w in seen if "burnish" in str(w.message)])
"""
)


@pytest.mark.parametrize(("environment", "expected", "reason"), [
    ({"PATH": "", "CXX": "c++"}, "torch", "no C++ compiler was found"),
    ({"CXX": "/bin/false"}, "host", "the compiler failed: "),
    ({"TORCH_EXTENSIONS_DIR": "/dev/null/nowhere"}, "host", "Not a directory"),
])  # fmt: skip
def test_without_a_library_the_twin_runs_with_one_warning(environment, expected, reason, tmp_path):
    """And backend="host" says why it cannot run."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    done = python(FALLBACK.format(expected=expected), **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    error, warned = done.stdout.splitlines()
    assert reason in error and "backend 'host'" in error
    (message,) = eval(warned)
    assert reason in message and "torch twin" in message


def test_a_library_that_computes_wrongly_is_not_used(tmp_path):
    """A new library is held to the twin once; a broken one is not kept, and the reason given."""
    code = (
        PREAMBLE
        + """
from burnish.kernels import rows_torch
transform = rows_torch.transform
rows_torch.transform = lambda raw, *a: transform(raw * 1.01, *a)  # as good as a wrong library
print(dispatch.resolve("auto", cpu), host_build._cached().exists(), host_build._reason)
"""
    )
    done = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.stdout.startswith("torch False fold as this compiler built it disagrees"), done.stderr[-2000:]


def test_two_processes_build_once(tmp_path):
    """Both wait for one compiler and both compute; a third finds the library without a compiler."""
    code = (
        PREAMBLE
        + """
logging.basicConfig(level=logging.INFO, format="%(message)s")
rows_host.library()
from burnish.kernels.contract import RowSpec, new_state
state = new_state(1, torch.float32, cpu)
rows_host.fold(torch.zeros(1, 4), None, state, torch.tensor([0]), RowSpec(frozenset({"lse"})))
assert state[1, 0] == 4
"""
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=environment, cwd="/") for _ in range(2)
    ]  # fmt: skip
    results = [(*p.communicate(timeout=300), p.returncode) for p in running]
    assert [r[2] for r in results] == [0, 0], results
    assert sum("built the CPU kernels" in r[1] for r in results) == 1, results
    assert all(not r[0] for r in results)  # nothing is printed
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {"burnish_host.so", "burnish_host.lock"}
    done = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path), PATH="", CXX="none")
    assert done.returncode == 0 and "built" not in done.stderr, done.stderr


def test_a_library_built_ahead_is_used(tmp_path):
    """python setup.py build_ext: only when asked, and then no compiler is needed."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp",
         str(tmp_path / "tmp")], cwd=root, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PATH": os.pathsep.join([os.environ["PATH"], host_build._ninja_folder() or ""])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (tmp_path / "lib").rglob("_host*.so")
    code = f"""
import burnish.kernels, torch
burnish.kernels.__path__.append({str(built.parent)!r})
from burnish.kernels import dispatch, host_build, rows_host
assert str(host_build._prebuilt()) == {str(built)!r}, host_build._prebuilt()
assert rows_host.obstacle() is None
print(rows_host.library()._name, dispatch.resolve("auto", torch.device("cpu")))
"""
    done = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path / "none"), PATH="", CXX="none")
    assert done.stdout.split() == [str(built), "host"], done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("source", host_build.SOURCES)
@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT"])
def test_compiles_for_each_instruction_set(capability, source, tmp_path):
    """Those that this machine lacks as well: compiled and not run."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        # the last warning that is switched off is of GCC 12's own header
        ["c++", "-std=c++20", "-fPIC", *host_build.compiler_flags(capability), "-O1", "-Wall", "-Werror",
         "-Wno-ignored-attributes", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-isystem", str(include),
         "-c", str(host_build.FOLDER / source), "-o", str(tmp_path / "object.o")], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    # at::vec is headers alone: what it leaves to the linker no library has
    symbols = subprocess.run(["nm", "-uC", str(tmp_path / "object.o")], capture_output=True, text=True, check=True)
    assert "at::vec" not in symbols.stdout


@pytest.mark.parametrize("columns", [16, 40, 48, 100, 1100])
def test_a_nan_is_the_maximum_wherever_it_stands(columns):
    """As in the twin, with every instruction set: no label is hit, and no maximum hides it."""
    spec = spec_of("hit")
    z = torch.randn(columns, columns)
    z.fill_diagonal_(torch.nan)  # row i has it at column i
    y, found = torch.arange(columns).roll(1), []
    for kernels in (rows_host, rows_torch):
        state = new_state(columns, torch.float32, z.device)
        kernels.fold(z, None, state, y, spec)
        found.append(state)
    for state in found:
        assert state[STATE_INDEX["z_max"]].isnan().all()
        assert (finalize(state, spec)["hit"] == 0).all() and finalize(state, spec)["lse"].isnan().all()
