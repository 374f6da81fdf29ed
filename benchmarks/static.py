"""Offline compilation of every kernel: registers, spills, shared memory, access width.  No GPU needed.

    python benchmarks/static.py                      # all targets, dtypes and objectives, and peers: static.json
    python benchmarks/static.py --check              # compile and compare with budgets.json; exit 1 if exceeded
    python benchmarks/static.py --rotation           # the block rotation only, which it puts into static.json
    python benchmarks/static.py --set-budgets        # budgets.json from static.json, registers rounded up to 8s
    python benchmarks/static.py --reduced --json -   # what tests/kernels/test_static.py runs

For each kernel, flag set, dtype and target the Triton source is compiled as a launch would compile it
(pointers and row strides divisible by 16; vocabularies such as 49,152, 128,256 and 151,936 are), then ptxas
of the Triton wheel, or the metadata in the amdgcn text, says what it uses.  Liger's and TRL's row kernels,
where those packages are installed, are compiled beside ours with the blocks and warps that their own host
code chooses (peer_kernels.py).  TRITON_INTERPRET must be unset: this file removes it before Triton is imported.
These are counts, not times: nothing here predicts speed.
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

# as a script this file's folder is on the path already; as a module it may not be
sys.path.insert(0, str(Path(__file__).parent))
os.environ.pop("TRITON_INTERPRET", None)

import peer_kernels as peers
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from burnish.kernels import (
    adamw_triton,
    attention_triton,
    farthest_triton,
    maxsim_triton,
    probe_triton,
    rotation_triton,
    rows_triton,
    segment_sum_triton,
)
from burnish.kernels.adamw import TILE, AdamWSpec
from burnish.kernels.contract import DIFFERENTIABLE, STATISTICS, RowSpec

RESULTS = Path(__file__).parent / "results" / "static.json"
BUDGETS = Path(__file__).parent / "budgets.json"
#: Vocabularies of SmolLM2 and Qwen3, for which the peers' host code chooses blocks and warps.
VOCABULARIES = (49152, 151936)

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
    "chain_distillation": RowSpec(
        _BASE | {"mix_lse", "cross", "teacher_entropy"}, alpha=1 / 1.2, softcap=15.0, teacher_softcap=15.0,
        teacher_temperature=True,
    ),
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
_NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def build(
    kernel, constants: dict, dtypes: tuple[torch.dtype, torch.dtype], target: GPUTarget, *, ragged: bool = False
):  # fmt: skip
    """Compile one launch of ours; returns Triton's CompiledKernel.  ``ragged``: no multiple of 16 is known."""
    tile, other = (_NAMES[d] for d in dtypes)
    types = dict.fromkeys(_INTS, "i32") | {"Z": tile, "T": other, "OUT": other, "Y": "*i64", "IDS": "*i64"}
    unspecialised = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
        if name not in constants and name not in unspecialised and not (ragged and name in _INTS):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options={"num_warps": rows_triton.THREADS // target.warp_size})


#: Variants of AdamW: moments of 32 and 8 bits, with a master, without one, and rounded by chance.
ADAMW = {
    "nearest32": AdamWSpec(), "nearest8": AdamWSpec("8bit"),
    "master32": AdamWSpec(master=True), "master8": AdamWSpec("8bit", master=True),
    "stochastic32": AdamWSpec(rounding="stochastic"), "stochastic8": AdamWSpec("8bit", "stochastic"),
}  # fmt: skip


def build_adamw(spec: AdamWSpec, dtype: torch.dtype, target: GPUTarget, *, aligned: bool):
    """Compile the largest launch, with a scale and found_inf; ``aligned``: weights start at multiples of 16 bytes."""
    kernel = adamw_triton.adamw_kernel
    constants = adamw_triton.flags(spec, dtype, scale=True, found_inf=True, aligned=aligned)
    types = {"TABLE": "*i64"} | dict.fromkeys(("M", "V"), "*u8" if spec.quantized else "*fp32")
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        scalar = "i32" if name.endswith("key") else "fp32"
        signature[name] = types.get(name, "*fp32") if name.isupper() else scalar
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper():
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": adamw_triton.THREADS // target.warp_size, "enable_fp_fusion": adamw_triton.FP_FUSION}
    return triton.compile(source, target=target, options=options)


def build_segment_sum(dtype: torch.dtype, target: GPUTarget):
    kernel = segment_sum_triton.segment_sum_kernel
    constants = {"ACC": triton.language.float32, "BLOCK": segment_sum_triton.BLOCK}
    types = {"GRAD": _NAMES[dtype], "POSITIONS": "*i64", "OFFSETS": "*i64", "OUT": "*fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    wide = [i for i, n in enumerate(kernel.arg_names) if n not in constants and n != "padding"]
    source = ASTSource(kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in wide})
    return triton.compile(source, target=target, options={"num_warps": segment_sum_triton.THREADS // target.warp_size})


#: Variants of attention: out alone, with the entropy and its gradients, and with a bias as well; heads by key head.
ATTENTION = {
    "out": {}, "entropy": {"HAS_ENTROPY": True, "HAS_LSE": True},
    "biased": {"HAS_ENTROPY": True, "HAS_LSE": True, "HAS_BIAS": True},
}  # fmt: skip
HEAD_DIMS = (64, 128)


def build_pointers(kernel, constants: dict, types: dict, target: GPUTarget, options: dict, *, ragged: tuple = ()):
    """Compile a launch whose names in capitals are pointers and whose other arguments are whole numbers.

    All divisible by 16 but those of ``ragged``; ``types`` where they are not *fp32 and i32.
    """
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "*fp32" if name.isupper() else "i32")
        if name not in ragged and signature[name] != "fp32":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def attention_launches(variant: str, d: int, dtype: torch.dtype, target: GPUTarget):
    """(kernel, constexprs, options) of forward, dq and dkv."""
    shape = attention_triton.Shape(dtype, d, maker="amd" if target.backend == "hip" else "nvidia")
    asked = {"HAS_ENTROPY": False, "HAS_LSE": False, "HAS_BIAS": False, **ATTENTION[variant]}
    constants = {**shape.flags(d, dtype), **asked, "GROUP": 1, "LISTED": 1}
    for kernel, blocks, options in (
        (attention_triton.forward_kernel, shape.forward, shape.options),
        (attention_triton.dq_kernel, shape.dq, shape.options),
        (attention_triton.dkv_kernel, shape.dkv, shape.dkv_options),
    ):
        yield kernel, {n: x for n, x in (constants | blocks).items() if n in kernel.arg_names}, options


def run_attention(targets=TARGETS, dtypes=("fp32", "bf16"), variants=ATTENTION) -> dict:
    """{"kernel/variant-D/dtype/target": counts} of gathered-key attention, the probe and the choice of frames.

    Frames of 1041 tokens, as VGGT has: a count of queries is no multiple of 16.
    """
    table = {}
    floats = ("Q", "K", "V", "OUT", "D_OUT", "DQ", "DK", "DV")
    whole = ("LISTS", "COUNTS", "ROWS", "TILES", "GROUPS", "RUNS", "SLOTS")
    ragged = (
        "queries",
        "frames",
        "keys",
        "heads",
        "key_heads",
        "list_b",
        "list_h",
        "tiles_x",
        "splits",
        "split",
        "count",
    )
    for label, target in targets.items():
        for dtype_name in dtypes:
            dtype = DTYPES[dtype_name][0]
            types = dict.fromkeys(floats, _NAMES[dtype]) | dict.fromkeys(whole, "*i32") | {"scale": "fp32"}
            for d in HEAD_DIMS:
                for variant in variants:
                    for kernel, constants, options in attention_launches(variant, d, dtype, target):
                        compiled = build_pointers(kernel, constants, types, target, options, ragged=ragged)
                        name = kernel.__name__.removesuffix("_kernel")
                        table[f"attention_{name}/{variant}-{d}/{dtype_name}/{label}"] = measure(compiled, target)
                constants = probe_triton.flags(dtype, d, 50) | {"GROUP": 1}
                kernel, options = probe_triton.probe_kernel, {"num_warps": probe_triton.WARPS}
                compiled = build_pointers(kernel, constants, types, target, options, ragged=ragged)
                table[f"attention_probe/probe-{d}/{dtype_name}/{label}"] = measure(compiled, target)
        kernel, types = farthest_triton.farthest_kernel, {"DISTANCES": "*fp64", "CHOSEN": "*i64"}
        constants, options = {"BLOCK": farthest_triton.MOST}, {"num_warps": farthest_triton.WARPS}
        compiled = build_pointers(kernel, constants, types, target, options, ragged=(*ragged, "start"))
        table[f"farthest/farthest/fp64/{label}"] = measure(compiled, target)
    return table


#: Late interaction: d, and tokens of a query, of ColBERT and of MiniLM's token embeddings.
MAXSIM = {"colbert": (128, 32), "minilm": (384, 64)}


def run_maxsim(targets=TARGETS, dtypes=("fp32", "bf16"), variants=MAXSIM) -> dict:
    """{"kernel/variant/dtype/target": counts} of MaxSim; counts of queries, documents and tokens are not multiples."""
    table = {}
    whole = {"ARG": "*i32", "QUERY_ENDS": "*i32", "DOCUMENT_ENDS": "*i32", "QUERY_MASK": "*u8", "DOCUMENT_MASK": "*u8"}
    ragged = ("documents", "queries", "query_tokens", "document_tokens", "arg_step")
    for label, target in targets.items():
        maker = "amd" if target.backend == "hip" else "nvidia"
        for dtype_name in dtypes:
            dtype = DTYPES[dtype_name][0]
            types = dict.fromkeys(("QUERIES", "DOCUMENTS", "OUT"), _NAMES[dtype]) | whole
            for variant in variants:
                d, tokens = MAXSIM[variant]
                constants = {**maxsim_triton.blocks(dtype, d, tokens, maker=maker), **maxsim_triton.flags(dtype)}
                constants |= {"KEEP": True, "EVEN": True}
                for name in ("forward", "d_queries", "d_documents"):
                    kernel = getattr(maxsim_triton, f"{name}_kernel")
                    own = {n: x for n, x in constants.items() if n in kernel.arg_names}
                    options = maxsim_triton.options(maker)
                    compiled = build_pointers(kernel, own, types, target, options, ragged=ragged)
                    table[f"maxsim_{name}/{variant}/{dtype_name}/{label}"] = measure(compiled, target)
    return table


#: Block sizes of the rotation; 20 leaves a tile ragged.
ROTATION = (16, 20, 32, 64, 128)


def run_rotation(targets=TARGETS, dtypes=("fp32", "bf16"), sizes=ROTATION) -> dict:
    """{"kernel/b/dtype/target": counts} of the block rotation, forward, dx alone and both gradients."""
    table = {}
    for label, target in targets.items():
        maker = "amd" if target.backend == "hip" else "nvidia"
        for dtype_name in dtypes:
            dtype = DTYPES[dtype_name][0]
            types = dict.fromkeys(("X", "DY", "OUT", "DX"), _NAMES[dtype])
            for b in sizes:
                for name in ("rotate", "backward"):
                    shape = rotation_triton.Shape.of(dtype, b, backward=name == "backward", maker=maker)
                    constants = shape.constants(dtype, b, 64 * b if b != 20 else 1280)
                    constants |= {"BACK": False} if name == "rotate" else {"OF_X": shape.TILES == 1}
                    kernel, options = getattr(rotation_triton, f"{name}_kernel"), rotation_triton.options(shape, maker)
                    compiled = build_pointers(kernel, constants, types, target, options, ragged=("rows",))
                    table[f"rotation_{name}/{b}/{dtype_name}/{label}"] = measure(compiled, target)
    return table


def run_others(targets=TARGETS, dtypes=("fp32", "bf16", "fp16"), variants=ADAMW) -> dict:
    """{"kernel/variant/dtype/target": counts} of AdamW and of the segmented sum."""
    table = {}
    for label, target in targets.items():
        for dtype_name in dtypes:
            dtype = DTYPES[dtype_name][0]
            for name in variants:
                spec = ADAMW[name]
                if dtype == torch.float32 and (spec.master or spec.rounding == "stochastic"):
                    continue
                for tail, aligned in (("", True), ("-unaligned", False)):
                    compiled = build_adamw(spec, dtype, target, aligned=aligned)
                    table[f"adamw/{name}{tail}/{dtype_name}/{label}"] = measure(compiled, target)
            compiled = build_segment_sum(dtype, target)
            table[f"segment_sum/sum/{dtype_name}/{label}"] = measure(compiled, target)
    return table


def specialised(launch: peers.Launch) -> tuple[dict, dict, dict]:
    """(signature, constexprs, attributes) that Triton's JIT would give a recorded launch."""
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.args.get(name, parameter.default)
        fixed = value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        if parameter.is_constexpr or fixed:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = _NAMES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible and not parameter.do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


def measure(compiled, target: GPUTarget) -> dict:
    """Counts of one compiled kernel.

    registers a thread (VGPRs on AMD, where ``spills`` are VGPRs and SGPRs in bytes, and elsewhere bytes
    stored and loaded); ``stack`` and ``shared`` bytes; ``loads``, ``stores``: global accesses in the text, as
    "how many x bytes a thread", widest first: a row's scalars are 2 to 8 bytes, a vectorised tile 16 or 32;
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


def _by_width(widths: list[int]) -> str:
    return " ".join(f"{n}x{w}" for w, n in sorted(Counter(widths).items(), reverse=True))


def _ptx_bits(ptx: str, op: str) -> str:
    found = re.findall(rf"\b{op}\.(?:volatile\.)?global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return _by_width([int(bits) * int(vector or 1) // 8 for vector, bits in found])


_AMD_WIDTHS = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b128": 16,
    "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1,
}  # fmt: skip


def _amd_bits(text: str, op: str) -> str:
    found = re.findall(rf"\b(?:global|buffer|flat)_{op}_([a-z]+[0-9x]*)", text)
    return _by_width([_AMD_WIDTHS[w] for w in found])


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


def run_ragged(targets=TARGETS, dtypes=("fp32", "bf16")) -> dict:
    """NLL where the vocabulary is not a multiple of 16, as after a resize by one: what alignment is worth."""
    return {
        f"{kernel.__name__.removesuffix('_kernel')}/nll/{dtype}/{label}": measure(
            build(kernel, constants, DTYPES[dtype], target, ragged=True), target
        )
        for label, target in targets.items()
        for dtype in dtypes
        for kernel, constants in launches(SPECS["nll"], DTYPES[dtype][0])
    }


def run_peers(targets=TARGETS, dtypes=("fp32", "bf16")) -> dict:
    """{"library/path/kernel/objectives/dtype/target": counts, block and warps} of the packages installed."""
    table, seen = {}, {}
    for label, target in targets.items():
        for dtype in dtypes:
            for path in peers.paths():
                variants: dict = {}
                for columns in VOCABULARIES:
                    with peers.as_on(label), peers.recorded() as launches:
                        path.run(peers.problem(16, columns, DTYPES[dtype][0])).backward()
                    for launch in launches:
                        parts = specialised(launch)
                        options = {"num_warps": launch.options.get("num_warps", 4)}
                        # chunks after the first may start at a label that is not aligned: the first stands for all
                        same = (launch.kernel.module, launch.name, repr(parts[1]), repr(options), label)
                        found = variants.setdefault(same, (launch, parts, options, []))
                        if columns not in found[3]:
                            found[3].append(columns)
                for same, (launch, parts, options, columns) in variants.items():
                    same = (*same, repr(parts[0]))
                    if same not in seen:
                        signature, constants, attrs = parts
                        source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attrs)
                        counts = measure(triton.compile(source, target=target, options=options), target)
                        block = next(v for k, v in launch.args.items() if k.startswith("BLOCK"))
                        seen[same] = {"block": block, "warps": options["num_warps"], **counts}
                    name = f"{path.library}/{path.name}/{launch.name}/{path.objective}/{dtype}/{label}"
                    if len(columns) < len(VOCABULARIES):
                        name += f"/V={columns[0]}"
                    table[name] = seen[same]
    return table


def exceeded(table: dict) -> list[str]:
    """What of ours is over budgets.json: registers and shared bytes a thread and block; a spill is always over."""
    budgets, over = json.loads(BUDGETS.read_text()), []
    for name, counts in table.items():
        kernel, objective, _, target = name.split("/")
        allowed = budgets.get(f"{kernel}/{objective}", {}).get(target)
        if allowed is None:
            over.append(f"{name}: no budget")
            continue
        for what, most in zip(("registers", "shared"), allowed, strict=True):
            if counts[what] > most:
                over.append(f"{name}: {what} {counts[what]}, budget {most}")
        if any(counts["spills"]) or counts["stack"]:
            over.append(f"{name}: spills {counts['spills']}, stack {counts['stack']}")
    return over


def set_budgets() -> None:
    """The most of any dtype, registers rounded up to a multiple of 8: hardware allocates them so."""
    budgets: dict = {}
    result = json.loads(RESULTS.read_text())
    ours = ("kernels", "other_kernels", "attention_kernels", "maxsim_kernels", "rotation_kernels")
    for name, counts in {k: v for table in ours for k, v in result[table].items()}.items():
        kernel, objective, _, target = name.split("/")
        cell = budgets.setdefault(f"{kernel}/{objective}", {}).setdefault(target, [0, 0])
        cell[0], cell[1] = max(cell[0], -(-counts["registers"] // 8) * 8), max(cell[1], counts["shared"])
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cells)}" for name, cells in budgets.items())
    BUDGETS.write_text("{\n" + lines + "\n}\n")


def show(table: dict) -> None:
    long = max(map(len, table), default=0)
    print(f"{'':<{long}} regs  spills  stack shared  loads               stores              loop barriers")
    for name, m in table.items():
        spills = "/".join(map(str, m["spills"]))
        print(
            f"{name:<{long}} {m['registers']:>4} {spills:>7} {m['stack']:>6} {m['shared']:>6}  {m['loads']:<19} "
            f"{m['stores']:<19} {'-' if m['barriers'] is None else m['barriers']}"
        )


def save(result: dict, to: Path) -> None:
    """JSON with one kernel a line."""
    tables = {key: value for key, value in result.items() if key.endswith("kernels")}
    text = json.dumps({**result, **{key: {} for key in tables}}, indent=1)
    for key, table in tables.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in table.items())
        text = text.replace(f'"{key}": {{}}', f'"{key}": {{\n{lines}\n }}' if lines else f'"{key}": {{}}')
    to.write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reduced", action="store_true", help="ours only: bf16 and fp32, few variants")
    parser.add_argument("--check", action="store_true", help="ours only, against budgets.json; writes nothing")
    parser.add_argument("--set-budgets", action="store_true", help="write budgets.json from static.json")
    parser.add_argument("--rotation", action="store_true", help="the block rotation only, put into static.json")
    parser.add_argument("--json", default=str(RESULTS), help="where the counts go; - is the last line of stdout")
    arguments = parser.parse_args()
    if arguments.set_budgets:
        set_budgets()
        return 0
    if arguments.rotation:
        rotation = run_rotation()
        show(rotation)
        save({**json.loads(RESULTS.read_text()), "rotation_kernels": rotation}, RESULTS)
        return 0
    table = run(**({"dtypes": ("bf16", "fp32"), "specs": ("nll", "everything")} if arguments.reduced else {}))
    few = {"dtypes": ("bf16", "fp32"), "variants": ("nearest32", "stochastic8", "master8")}
    others = run_others(**(few if arguments.reduced else {}))
    few = {"dtypes": ("bf16",), "variants": ("biased",)}
    attention = run_attention(**(few if arguments.reduced else {}))
    scores = run_maxsim(**({"dtypes": ("bf16",)} if arguments.reduced else {}))
    rotation = run_rotation(**({"dtypes": ("bf16",), "sizes": (20, 32, 128)} if arguments.reduced else {}))
    found = table | others | attention | scores | rotation
    show(found)
    over = exceeded(found)
    print("\n".join(over) or "within budgets.json")
    if arguments.check:
        return bool(over)
    versions = {} if arguments.reduced else peers.versions()
    if not arguments.reduced:
        for library in sorted({"liger", "trl"} - set(versions)):
            print(f"{library}: not installed, skipped")
    ragged = {} if arguments.reduced else run_ragged()
    peer_table = run_peers() if versions else {}
    show(ragged | peer_table)
    result = {
        "triton": triton.__version__, "block": rows_triton.BLOCK, "threads": rows_triton.THREADS, "peers": versions,
        "vocabularies": VOCABULARIES,
        "tile": TILE, "other_threads": adamw_triton.THREADS,
        "kernels": table, "ragged_kernels": ragged, "peer_kernels": peer_table, "other_kernels": others,
        "attention_kernels": attention, "maxsim_kernels": scores, "rotation_kernels": rotation,
    }  # fmt: skip
    if arguments.json == "-":
        print(json.dumps(result))
    else:
        save(result, Path(arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
