"""Offline compilation of every row kernel: registers, spills, shared memory, access width.  No GPU needed.

    python benchmarks/static.py                      # all targets, dtypes and objectives: a table and static.json
    python benchmarks/static.py --reduced --json -   # what tests/kernels/test_static.py runs

For each kernel, flag set, dtype and target the Triton source is compiled as a launch would compile it
(pointers and row strides divisible by 16; vocabularies such as 32,000, 128,256 and 151,936 are), then ptxas
of the Triton wheel, or the metadata in the amdgcn text, says what it uses.  TRITON_INTERPRET must be unset:
this file removes it before Triton is imported.  These are counts, not times: nothing here predicts speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from burnish.kernels import rows_triton
from burnish.kernels.contract import DIFFERENTIABLE, STATISTICS, RowSpec

RESULTS = Path(__file__).parent / "results" / "static.json"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Dtypes of (student tile, teacher and output); "mixed" is what linear_loss launches on bf16 weights.
DTYPES = {
    "fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16), "mixed": (torch.float32, torch.bfloat16),
}  # fmt: skip
_BASE = frozenset({"lse", "label", "logp"})
_TRANSFORMS = {
    "scale": 0.5, "softcap": 30.0, "temperature": True,
    "teacher_scale": 0.5, "teacher_softcap": 50.0, "teacher_temperature": True,
}  # fmt: skip
#: Flag sets of representative objectives, and the largest one.
SPECS = {
    "nll": RowSpec(_BASE),
    "target_sft": RowSpec(_BASE | {"mix"}, alpha=0.7, eta=0.3),
    "gem": RowSpec(_BASE | {"mix"}, alpha=1 / 0.7),
    "kd": RowSpec(_BASE | {"cross", "teacher_entropy"}, temperature=True, teacher_temperature=True),
    "reverse_kl": RowSpec(_BASE | {"mean", "other", "teacher_lse"}),
    "jsd": RowSpec(_BASE | {"jsd"}),
    "everything": RowSpec(frozenset(STATISTICS), alpha=0.7, eta=0.3, top_k=20, **_TRANSFORMS),
}
assert set(DIFFERENTIABLE) <= SPECS["everything"].stats


def launches(spec: RowSpec, dtype: torch.dtype):
    """(kernel, constexprs) of the launches an objective makes on student tiles of one dtype."""
    # the launchers' own choice of tile
    shape = {"ACC": rows_triton._acc(dtype), "BLOCK": rows_triton.BLOCK}
    lanes = {**shape, "WIDTH": rows_triton._width(torch.empty(0, dtype=dtype))}
    yield rows_triton.fold_kernel, {**rows_triton.fold_flags(spec), **lanes}
    if spec.has("jsd"):
        yield rows_triton.jsd_kernel, {"BETA": spec.beta, **rows_triton._transforms(spec), **lanes}
    yield rows_triton.grad_kernel, {**rows_triton.grad_flags(spec, 4 if spec.has("ids") else 0), **shape}


_INTS = ("z_stride", "t_stride", "out_stride", "state_stride", "coef_stride", "start", "columns")
_NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}


def build(kernel, constants: dict, dtypes: tuple[torch.dtype, torch.dtype], target: GPUTarget):
    """Compile one launch; returns Triton's CompiledKernel."""
    tile, other = (_NAMES[d] for d in dtypes)
    types = dict.fromkeys(_INTS, "i32") | {"Z": tile, "T": other, "OUT": other, "Y": "*i64", "IDS": "*i64"}
    unspecialised = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
        if name not in constants and name not in unspecialised:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options={"num_warps": rows_triton.THREADS // target.warp_size})


def measure(compiled, target: GPUTarget) -> dict:
    """Counts of one compiled kernel.

    registers a thread (VGPRs on AMD, where ``spills`` are VGPRs and SGPRs in bytes, and elsewhere bytes
    stored and loaded); ``stack`` and ``shared`` bytes; ``loads``, ``stores``: accesses of the tiles, in bits;
    ``barriers``: barriers and shuffles inside a loop (None where not counted).
    """
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(name):
            return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

        spills, registers = [4 * field("vgpr_spill_count"), 4 * field("sgpr_spill_count")], field("vgpr_count")
        stack = field("private_segment_fixed_size")
        accesses = {op: _amd_bits(text, op) for op in ("load", "store")}
        barriers = None  # blocks are laid out of line here: a loop's text is not a span
    else:
        text = compiled.asm["ptx"]
        log = _ptxas(text, target.arch)
        spills = [int(n) for n in re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()]
        registers = int(re.search(r"Used (\d+) registers", log).group(1))
        stack = int(re.search(r"(\d+) bytes stack frame", log).group(1))
        accesses = {"load": _ptx_bits(text, "ld"), "store": _ptx_bits(text, "st")}
        barriers = _in_loops(text, r"^(\$L__BB\w+):", r"bra\S*\s+(\$L__BB\w+)", r"bar\.sync|barrier|shfl")
    return {
        "registers": registers, "spills": spills, "stack": stack, "shared": shared,
        "loads": accesses["load"], "stores": accesses["store"], "barriers": barriers,
    }  # fmt: skip


def _ptxas(ptx: str, arch: int) -> str:
    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [tool.path, "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def _tile_accesses(widths: list[int]) -> str:
    # scalars of a row (labels, statistics, coefficients) are 16 to 64 bits and appear as such; a tile's
    # accesses are the vectors, or, where nothing is vectorised, indistinguishable: then it says so
    wide = [w for w in widths if w > 64]
    return " ".join(f"{n}x{w}" for w, n in sorted(Counter(wide).items())) or "narrow"


def _ptx_bits(ptx: str, op: str) -> str:
    found = re.findall(rf"\b{op}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return _tile_accesses([int(bits) * int(vector or 1) for vector, bits in found])


def _amd_bits(text: str, op: str) -> str:
    width = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b128": 128}
    return _tile_accesses([width.get(w, 0) for w in re.findall(rf"\b(?:global|buffer)_{op}_(\w+)\b", text)])


def _in_loops(text: str, label: str, branch: str, wanted: str) -> int:
    """How many ``wanted`` stand between a label and a later branch back to it."""
    lines, at, spans = text.splitlines(), {}, []
    for i, line in enumerate(lines):
        if found := re.search(label, line):
            at[found.group(1)] = i
        elif (found := re.search(branch, line)) and found.group(1) in at:
            spans.append((at[found.group(1)], i))
    inside = {i for first, last in spans for i in range(first, last)}
    return sum(bool(re.search(wanted, lines[i])) for i in inside)


def run(targets=TARGETS, dtypes=DTYPES, specs=SPECS):
    """{"kernel/objective/dtype/target": counts} for every launch; launches that coincide are compiled once."""
    table, seen = {}, {}
    for label, target in targets.items():
        for dtype_name in dtypes:
            for objective in specs:
                for kernel, constants in launches(SPECS[objective], DTYPES[dtype_name][0]):
                    same = (kernel.__name__, repr(constants), dtype_name, label)
                    if same not in seen:
                        seen[same] = measure(build(kernel, constants, DTYPES[dtype_name], target), target)
                    name = kernel.__name__.removesuffix("_kernel")
                    table[f"{name}/{objective}/{dtype_name}/{label}"] = seen[same]
    return table


def show(table: dict) -> None:
    print(f"{'kernel/objective/dtype/target':<36} regs  spills  stack shared  loads        stores       loop barriers")
    for name, m in table.items():
        spills = "/".join(map(str, m["spills"]))
        print(
            f"{name:<36} {m['registers']:>4} {spills:>7} {m['stack']:>6} {m['shared']:>6}  {m['loads']:<12} "
            f"{m['stores']:<12} {'-' if m['barriers'] is None else m['barriers']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reduced", action="store_true", help="bf16 and fp32, nll and everything")
    parser.add_argument("--json", default=str(RESULTS), help="where the counts go; - is the last line of stdout")
    arguments = parser.parse_args()
    chosen = {"dtypes": ("bf16", "fp32"), "specs": ("nll", "everything")} if arguments.reduced else {}
    table = run(**chosen)
    show(table)
    result = {
        "triton": triton.__version__, "block": rows_triton.BLOCK, "threads": rows_triton.THREADS, "kernels": table,
    }  # fmt: skip
    if arguments.json == "-":
        print(json.dumps(result))
    else:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in table.items())
        head = json.dumps({**result, "kernels": {}}, indent=1).replace('"kernels": {}', f'"kernels": {{\n{lines}\n }}')
        Path(arguments.json).write_text(head + "\n")


if __name__ == "__main__":
    sys.exit(main())
