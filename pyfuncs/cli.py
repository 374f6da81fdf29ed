"""The command line: ``burnish sft``, ``drift``, ``axpo``, ``ra-rft``, ``q0``, ``chunkft``, ``tokens``, ``qk-restore``,
``peft-arena``, ``demo``, ``objectives``, ``doctor``.

Bad input ends with one line on stderr, ``burnish: error: ...``, and exit code 2.  Subcommands import what
they need when they run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields

from .methods import sft_options
from .methods.axpo import options as axpo_options
from .methods.axpo.demo_options import AXPODemoOptions
from .methods.demo_options import DemoOptions, RecallDemoOptions
from .methods.drift import options as drift_options
from .methods.drift.demo_options import DriftDemoOptions
from .methods.options import add_flags, assignments, given_flags
from .methods.peft_arena.demo_options import PeftArenaDemoOptions
from .methods.processes import leave_it_to_the_first, speaks
from .methods.q0 import options as q0_options
from .methods.q0.demo_options import Q0DemoOptions
from .methods.ra_rft import options as ra_rft_options
from .methods.ra_rft.demo_options import RARFTDemoOptions

#: Commands of a package of methods/ each, with ``options``, ``run`` and ``demo``: help; whose fields --set takes; the
#: extras that it needs; its options, its demo's help and options.
_METHODS = {
    "drift": (
        "multi-turn fine-tuning, episodes weighed by their returns (DRIFT)", "burnish.methods.DriftConfig", "train",
        drift_options, "a toy: DRIFT beside its baselines", DriftDemoOptions,
    ),
    "axpo": (
        "GRPO that tries failed tool calls again (AXPO)", "trl.GRPOConfig", "train",
        axpo_options, "a toy with a tool: GRPO and AXPO", AXPODemoOptions,
    ),
    "ra-rft": (
        "GRPO on prompts with retrieved solved problems (RA-RFT)", "trl.GRPOConfig", "retrieval",
        ra_rft_options, "a toy with a hidden rule: GRPO with and without retrieval", RARFTDemoOptions,
    ),
    "q0": (
        "many epochs over a fixed text as a population of snapshots, mixed (q0)", "burnish.methods.HyperEpochConfig",
        "train", q0_options, "a toy: q0 beside single runs and ensembles, at equal epochs", Q0DemoOptions,
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str):
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for bad input, 130 for an interrupt."""
    try:
        arguments = _parser().parse_args(argv)
        work = arguments.run(arguments)
    except BrokenPipeError:  # `burnish objectives | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        leave_it_to_the_first()
        print(f"burnish: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    # past the checks an exception is a defect, or the machine's: its traceback is worth more than one line
    try:
        if work is not None:
            work()
    except KeyboardInterrupt:
        if speaks():
            print("burnish: interrupted; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="burnish", description="Fused fine-tuning objectives, and the methods on top.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    sft = commands.add_parser("sft", help="fine-tune a model with an objective", description=_sft.__doc__)
    add_flags(sft, sft_options.OPTIONS, "trl.SFTConfig")
    sft.add_argument("--objective-arg", action="append", metavar="KEY=VALUE", help="one argument; repeatable")
    sft.set_defaults(run=_sft)
    for name, (about, configuration, _, options, _, _) in _METHODS.items():
        method = commands.add_parser(name, help=about, description=options.__doc__)
        add_flags(method, options.OPTIONS, configuration)
        if name == "q0":
            method.add_argument("file", nargs="?", metavar="CONFIG.yaml", help="as --config")
        method.set_defaults(run=_method)
    chunkft = commands.add_parser("chunkft", help="full fine-tuning, one chunk of the parameters at a time")
    actions = chunkft.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    cut = actions.add_parser(
        "plan", help="how a model is cut; reads its config only", description=_chunkft_plan.__doc__
    )
    cut.add_argument(
        "--model", required=True, metavar="MODEL", help="directory with a config.json, hub name, or smollm2"
    )
    cut.add_argument("--chunks", required=True, type=int, metavar="N", help="number of chunks")
    about = "0-D and 1-D parameters: trained in every chunk, or cut like the others (always)"
    cut.add_argument("--small", choices=("always", "chunk"), default="always", help=about)
    cut.add_argument("--no-align", action="store_true", help="cut matrices at any row, not at whole tiles")
    dtypes = ("bfloat16", "float32", "float16")
    cut.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the parameters (bfloat16)")
    cut.add_argument("--batch", type=int, default=1, metavar="ROWS", help="of a micro-batch (1)")
    cut.add_argument("--seq", type=int, default=1024, metavar="TOKENS", help="of a row (1024)")
    cut.set_defaults(run=_chunkft_plan)
    tokens = commands.add_parser("tokens", help="token selection for visual geometry transformers")
    _add_tokens(tokens.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser))
    _add_qk_restore(commands)
    _add_peft_arena(commands)
    demo = commands.add_parser("demo", help="a method at work on this machine, nothing fetched")
    names = demo.add_subparsers(dest="name", required=True, metavar="NAME", parser_class=_Parser)
    one = names.add_parser("sft", help="SmolLM2-135M learns a task by SFT and by Target-SFT", description=_demo.__doc__)
    _add_fields(one, DemoOptions)
    one.set_defaults(run=_demo)
    for name, (_, _, _, _, about, fields_of_demo) in _METHODS.items():
        toy = names.add_parser(name, help=about, description=fields_of_demo.__doc__)
        _add_fields(toy, fields_of_demo)
        toy.set_defaults(run=_toy)
    about = "a tiny hybrid loses its recall to fine-tuning, and has it restored"
    recall = names.add_parser("qk-restore", help=about, description=_demo_qk_restore.__doc__)
    _add_fields(recall, RecallDemoOptions)
    recall.set_defaults(run=_demo_qk_restore)
    arena = names.add_parser(
        "peft-arena", help="fine-tuning methods by what they learn and forget", description=_demo_peft_arena.__doc__
    )
    _add_fields(arena, PeftArenaDemoOptions)
    arena.set_defaults(run=_demo_peft_arena)
    commands.add_parser("objectives", help="list the objectives").set_defaults(run=_objectives)
    commands.add_parser("doctor", help="what is installed, and which backend serves each op").set_defaults(run=_doctor)
    return parser


def _add_fields(parser: argparse.ArgumentParser, options: type) -> None:
    """A flag for each field of a demo's options."""
    for field in fields(options):
        kind = type(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=f"({field.default})"
        )


def _add_tokens(actions) -> None:
    pick = actions.add_parser("select", help="the frames that cover a scene best", description=_tokens_select.__doc__)
    pick.add_argument("source", metavar="FRAMES", help="folder of images, or a video (needs PyAV)")
    pick.add_argument("--count", required=True, type=int, metavar="K", help="frames to choose")
    pick.add_argument("--output", metavar="DIR", help="new or empty; by default FRAMES-selected")
    pick.add_argument("--start", type=int, default=0, metavar="FRAME", help="chosen first, from 0 (0)")
    pick.add_argument("--every", type=int, default=1, metavar="N", help="of the source only every N-th frame (1)")
    pick.add_argument("--size", type=int, default=16, metavar="PIXELS", help="side of the thumbnails compared (16)")
    about = "(frames, D) floats to compare instead, one row a frame"
    pick.add_argument("--descriptors", metavar="FILE.npy", help=about)
    pick.set_defaults(run=_tokens_select)
    cost = actions.add_parser("cost", help="FLOPs against frames", description=_tokens_cost.__doc__)
    cost.add_argument("--model", choices=("vggt", "pi3"), default="vggt", help="whose shape (vggt)")
    about = "numbers of frames (100,200,300,400,500)"
    cost.add_argument("--frames", default="100,200,300,400,500", metavar="N,N,...", help=about)
    numbers = {
        "height": (392, "of an image, in pixels"), "width": (518, "of an image, in pixels"),
        "keep": (25, "frames selected, K"), "stride": (3, "of the token grid"),
        "local": (2, "first layer that is not local"), "sample": (9, "first layer without the grid"),
    }  # fmt: skip
    for name, (default, about) in numbers.items():
        cost.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} ({default})")
    cost.add_argument("--edge", choices=("ceil", "floor"), default="ceil", help="of the grid (ceil)")
    for name in ("channels", "global-layers", "frame-layers", "encoder-layers", "special", "patch"):
        cost.add_argument(f"--{name}", type=int, metavar="N", help="instead of the model's")
    cost.set_defaults(run=_tokens_cost)


def _add_qk_restore(commands) -> None:
    about = "queries and keys of a hybrid's softmax layers as before fine-tuning"
    one = commands.add_parser("qk-restore", help=about, description=_qk_restore.__doc__)
    one.add_argument("pre", metavar="PRE", help="directory of the model before fine-tuning")
    one.add_argument("post", metavar="POST", help="directory of the model after it, or of its LoRA or OFT adapter")
    one.add_argument("out", metavar="OUT", nargs="?", help="new directory; may be left out with --dry-run")
    one.add_argument("--dry-run", action="store_true", help="report what would change, write nothing")
    about = "softmax (by the config's layer types), all, or indices (softmax)"
    one.add_argument("--layers", default="softmax", metavar="LAYERS", help=about)
    one.add_argument("--parts", default="q,k", metavar="P,P,...", help="of q, k, v, o, latent (q,k)")
    one.add_argument("--alpha", type=float, default=1.0, metavar="SHARE", help="of the way back (1)")
    one.add_argument("--pro", type=float, metavar="LAMBDA", help="QK-Pro with this ridge instead")
    one.add_argument("--convention", choices=("A", "B"), default="A", help="of QK-Pro's matrices (A)")
    one.add_argument("--no-bias", action="store_true", help="keep the biases of what is restored")
    one.add_argument("--qk-norm", action="store_true", help="restore q and k norms too")
    one.add_argument("--swa", action="store_true", help="restore sliding-window layers too")
    one.add_argument("--angles", action="store_true", help="report principal angles too")
    about = "what a layer type that is not known is: softmax, sliding, linear, none; repeatable"
    one.add_argument("--kind", action="append", metavar="TYPE=KIND", help=about)
    about = "rows of a fused projection, where the model_type is not known"
    one.add_argument("--fused", choices=("stacked", "per_head", "grouped"), help=about)
    about = "gates of a query projection of twice the rows, where the model_type is not known"
    one.add_argument("--query-gate", choices=("per_head", "stacked"), help=about)
    one.add_argument("--stack", metavar="PREFIX", help="decoder layers, where several stacks have as many")
    one.set_defaults(run=_qk_restore)


def _add_peft_arena(commands) -> None:
    about = "fine-tuning methods compared by what they learn and what they forget"
    arena = commands.add_parser("peft-arena", help=about, description=_peft_arena.__doc__)
    actions = arena.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    for action, about in (
        ("run", "train and score every run that is missing, and report"),
        ("report", "report the runs that are there"),
        ("budgets", "what each method trains; no weights are read"),
    ):
        one = actions.add_parser(action, help=about, description=_peft_arena.__doc__)
        one.add_argument("config", metavar="CONFIG.yaml", help="the arena's file")
        one.set_defaults(run=_peft_arena)


def _sft(arguments: argparse.Namespace):
    """Fine-tune a causal LM with any token objective; only the loss differs from TRL's SFTTrainer."""
    options = sft_options.merge(given_flags(arguments, sft_options.OPTIONS), arguments.config)
    options["objective_args"].update(assignments(arguments.objective_arg or [], "--objective-arg"))
    # what TRL and transformers deprecate among themselves is nothing the user of this command can change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers)\b")
    try:
        from .methods import run_sft

        trainer, data, directory = run_sft.prepare(options)
    except ImportError as error:
        raise ValueError(f"burnish sft needs its training packages: pip install 'burnish[train]' ({error})") from error
    return lambda: run_sft.train(trainer, data, directory)


def _method(arguments: argparse.Namespace):
    name = arguments.command
    _, _, extras, options, _, _ = _METHODS[name]
    file = getattr(arguments, "file", None)
    if file and arguments.config:
        raise ValueError(f"CONFIG.yaml and --config exclude each other; got {file} and {arguments.config}")
    merged = options.merge(given_flags(arguments, options.OPTIONS), file or arguments.config)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers)\b")
    try:
        run = importlib.import_module(f".methods.{name.replace('-', '_')}.run", __package__)
        prepared = run.prepare(merged)
    except ImportError as error:
        raise ValueError(f"burnish {name} needs its packages: pip install 'burnish[{extras}]' ({error})") from error
    return lambda: run.train(prepared)


def _toy(arguments: argparse.Namespace):
    name = arguments.name
    _, _, extras, _, _, kind = _METHODS[name]
    options = kind(**{f.name: getattr(arguments, f.name) for f in fields(kind)}).check()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers)\b")
    try:
        demo = importlib.import_module(f".methods.{name.replace('-', '_')}.demo", __package__)
    except ImportError as error:
        extras = "demo" if extras == "train" else f"demo,{extras}"
        raise ValueError(f"this demo needs its packages: pip install 'burnish[{extras}]' ({error})") from error
    return lambda: demo.run(options)


def _chunkft_plan(arguments: argparse.Namespace) -> None:
    """Print the rows, elements and bytes of each chunk, and the memory that training takes; no weights are read."""
    import torch

    from .chunkft import plan

    try:
        from .methods.chunkft_plan import empty_model, report

        dtype = getattr(torch, arguments.dtype)
        model = empty_model(arguments.model, dtype)
    except ImportError as error:
        raise ValueError(f"burnish chunkft plan needs transformers: pip install 'burnish[train]' ({error})") from error
    cut = plan(model, arguments.chunks, small=arguments.small, align=not arguments.no_align)
    print(report(model, cut, arguments.batch, arguments.seq))


def _tokens_select(arguments: argparse.Namespace) -> None:
    """Choose K frames by farthest point sampling over image thumbnails, copy them, and draw a contact sheet."""
    from pathlib import Path

    from .methods.tokens_select import SelectOptions, run

    output, descriptors = (None if x is None else Path(x) for x in (arguments.output, arguments.descriptors))
    numbers = {name: getattr(arguments, name) for name in ("count", "start", "every", "size")}
    print(run(SelectOptions(Path(arguments.source), output=output, descriptors=descriptors, **numbers).check()))


def _tokens_cost(arguments: argparse.Namespace) -> None:
    """Print attention and linear FLOPs, dense and with selected tokens, for numbers of frames; the published seconds
    stand beside them."""
    from .methods.tokens_cost import report

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "action", "run")}
    print(report(**given))


def _qk_restore(arguments: argparse.Namespace) -> None:
    """Put the queries and keys of the softmax layers back as they were before fine-tuning (QK-Restore, arXiv
    2606.11052) and write the result to a new directory; print how far they had drifted and what changes."""
    try:
        from .methods.qk_restore.command import run
    except ImportError as error:
        raise ValueError(f"burnish qk-restore needs its packages: pip install 'burnish[train]' ({error})") from error
    print(run(arguments))


def _peft_arena(arguments: argparse.Namespace):
    """Compare fine-tuning methods (PEFT-Arena, arXiv 2605.28819) on one file's model, data and suites: every method at
    every rate and seed, rewound along its path.  What is done is not run again."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers)\b")
    try:
        from .methods.peft_arena import command

        done = getattr(command, arguments.action)(arguments.config)
    except ImportError as error:
        raise ValueError(f"burnish peft-arena needs its packages: pip install 'burnish[demo]' ({error})") from error
    return done if callable(done) else print(done)


def _demo(arguments: argparse.Namespace):
    """Fine-tune from the same weights by both objectives; accuracy under the task's verifier, loss curves,
    peak memory against the materialised loss, tokens per second."""
    options = DemoOptions(**{f.name: getattr(arguments, f.name) for f in fields(DemoOptions)}).check()
    try:
        from .methods import demo
        from .methods.models import check_model_name
    except ImportError as error:
        raise ValueError(f"burnish demo needs its packages: pip install 'burnish[demo]' ({error})") from error
    check_model_name(options.model)
    return lambda: demo.run(options)


def _demo_qk_restore(arguments: argparse.Namespace):
    """Train a hybrid of 0.2M parameters to recall, fine-tune it on local reasoning, and compare restores: accuracy on
    both tasks by length, drift, gradient by distance."""
    options = RecallDemoOptions(**{f.name: getattr(arguments, f.name) for f in fields(RecallDemoOptions)}).check()
    try:
        from .methods.qk_restore import demo
    except ImportError as error:
        raise ValueError(f"burnish demo needs its packages: pip install 'burnish[demo]' ({error})") from error
    demo.check_output(options)
    return lambda: demo.run(options)


def _demo_peft_arena(arguments: argparse.Namespace):
    """Full fine-tuning, ChunkFT, LoRA and OFT at several rates on a model that then forgets: target against retention,
    rewinding beside its controls, metrics.  A run that is there is not made again."""
    kind = PeftArenaDemoOptions
    options = kind(**{f.name: getattr(arguments, f.name) for f in fields(kind)}).check()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers)\b")
    try:
        from .methods.peft_arena import demo
    except ImportError as error:
        raise ValueError(f"burnish demo needs its packages: pip install 'burnish[demo]' ({error})") from error
    return lambda: demo.run(options)


def _objectives(_) -> None:
    """Print a row for each objective."""
    from .objectives import describe

    columns = ("name", "arguments", "needs", "trust", "residual", "paper")
    rows = [{c: c for c in columns}, *describe()]
    widths = {c: max(len(r[c]) for r in rows) for c in columns}
    for row in rows:
        print("  ".join(row[c].ljust(widths[c]) for c in columns).rstrip())


def _doctor(_) -> None:
    """Print what is installed here."""
    from .methods.doctor import report

    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        print(f"{name.ljust(width)}  {finding}")


if __name__ == "__main__":
    sys.exit(main())
