"""The command ``fxpipe``: show | plan | partition | run | diff | passes | formats | demo.

This file only reads the command line; ``fxpipe.commands`` does the work and is imported when there is some, so that
``--help`` answers without loading torch.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from fxpipe import __version__, units
from fxpipe.errors import FxpipeError, OptionError

WORKS_IN = {"partition": "fxpipe.planner.command"}  # the others need torch
MODEL_HELP = "package.module:function, file.py:function (returning model, example_inputs) or demo:NAME"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failure that fxpipe reports, 2 for a wrong command line."""
    arguments = parser().parse_args(argv)
    try:
        command = getattr(import_module(WORKS_IN.get(arguments.command, "fxpipe.commands")), arguments.command)
        command(arguments)
    except FxpipeError as error:
        print(f"fxpipe {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line, one line for each command."""
    top = argparse.ArgumentParser(
        prog="fxpipe",
        description="Pipeline-parallel training with compressed activations, as passes over torch.fx graphs.",
    )
    top.add_argument("--version", action="version", version=f"fxpipe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model, cost, plan = _model_options(), _cost_options(), _plan_options()

    def add(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[*parents, _output_options()])

    show = add("show", "the graph of a model, a line for each node, with its costs", model, cost)
    show.add_argument(
        "--dynamic",
        type=_dynamic,
        action="append",
        default=[],
        metavar="INPUT:DIMS",
        help="dimensions of an input that stay symbolic, such as input_ids:0,1; can be repeated",
    )
    _add_at(show)
    planning = add("plan", "stages, schedule and save points of a model", model, cost, plan, _answer_options())
    planning.add_argument("--save", type=Path, metavar="PATH", help="also write the plan there")
    _add_at(planning)
    planning.add_argument(
        "--topology",
        metavar="FILE|TEXT",
        help="place the stages, replicated where that is faster, on these devices: JSON file, or levels from the innermost "
        'out, such as "4@12GB/s x 4@1.25GB/s"',
    )
    text = "stages and devices for a profile, a JSON file of nodes and edges; needs no model"
    _add_partition(commands.add_parser("partition", help=text, description=text, parents=[_answer_options()]))
    _add_steps(add("run", "train a model as planned, one process for each rank", model, cost, plan), 20)
    add("diff", "what each pass changes in the graph", model, cost, plan).add_argument(
        "--pass", dest="pass_name", metavar="NAME", help="only this pass"
    )
    add("passes", "every pass: options, requires, provides, exact or bounded")
    add("formats", "how activations can be stored: bits, signal to noise, a drawing").add_argument(
        "formats", nargs="*", metavar="FORMAT", help="such as bfp4b32:gauss+e5m3; none of them lists the family"
    )
    _add_steps(add("demo", "train a small GPT on two ranks, compressed, and set it against one process"), 300)
    return top


def _add_at(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--at",
        type=_at,
        action="append",
        default=[],
        metavar="INPUT:DIM=SIZE",
        help="costs with inputs of another size, traced once: batch=16, or a dimension of an input such as input_ids:1=256; "
        "can be repeated; for plan with --topology, --sweep or --explain, the sizes of one microbatch",
    )


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return options


def _cost_options() -> argparse.ArgumentParser:
    """Options of ``fxpipe.Options`` go by its names and have no default here: the one there holds."""
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--device", metavar="NAME", help="the device whose times are modelled")
    options.add_argument(
        "--measured", action="store_true", default=False, help="measure the times on this machine instead"
    )
    options.add_argument(
        "--profile",
        type=Path,
        default=None,
        metavar="FILE",
        help="measured times: read from FILE if it is there, else measured and written to it",
    )
    return options


def _plan_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--ranks", dest="n_ranks", type=_count, metavar="N", help="workers, one stage each")
    options.add_argument(
        "--replicas", metavar="N,N,...", help="on how many workers each stage runs, such as 2,1,1 of 4, or auto"
    )
    options.add_argument("--microbatches", dest="n_microbatches", type=_count, metavar="N", help="parts of a batch")
    options.add_argument("--schedule", metavar="NAME", help="1f1b or gpipe")
    options.add_argument(
        "--format",
        action=_Joined,
        metavar="FORMAT",
        help="how saved activations are stored, such as bfp4b32, or PATTERN=FORMAT,... by node, operator or module path, "
        "such as '*.mlp.*=bfp4b32,default=bfp8b32'; can be repeated",
    )
    options.add_argument(
        "--no-exact-forms", dest="exact_forms", action="store_false", help="do not pack bools, integers and masks"
    )
    options.add_argument("--memory", type=_text(units.parse_bytes), metavar="BYTES", help="of each rank, such as 16GiB")
    options.add_argument(
        "--objective", metavar="NAME", help="time (default); with --topology communication or balance too"
    )
    options.add_argument(
        "--bandwidth",
        type=_text(units.parse_bytes_per_second),
        metavar="RATE",
        help="of the link between ranks, such as 12GB/s",
    )
    return options


def _add_partition(command: argparse.ArgumentParser) -> None:
    command.add_argument("profile", type=Path, metavar="PROFILE", help="JSON file with nodes and edges")
    command.add_argument(
        "--topology",
        required=True,
        metavar="FILE|TEXT",
        help='JSON file, or levels from the innermost out, such as "8@450GB/s x 4@50GB/s"',
    )
    command.add_argument("--objective", default="time", metavar="NAME", help="time (default), communication or balance")
    command.add_argument("--stages", type=_count, metavar="N", help="exactly so many stages")
    command.add_argument("--max-load-ratio", type=float, metavar="R", help="the busiest stage over the mean at most")
    command.add_argument("--max-replicas", type=_count, metavar="N", help="of each stage")
    command.add_argument(
        "--memory", type=_text(units.parse_bytes), metavar="BYTES", help="of each device, such as 80GB"
    )
    command.add_argument(
        "--stage-hint",
        type=_hint,
        action="append",
        default=[],
        metavar="NODE=HINT",
        help="nodes with the same hint share a stage, with different hints they do not; can be repeated",
    )
    command.add_argument(
        "--not-replicated",
        action="append",
        default=[],
        metavar="NODE",
        help="this node's stage stays on one device; can be repeated",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _hint(text: str) -> tuple[str, str]:
    node, equals, hint = text.rpartition("=")
    if not node or not equals or not hint:
        raise argparse.ArgumentTypeError(f"{text!r} is not a node with its hint, such as layer_3=0")
    return node, hint


def _answer_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--sweep", action="store_true", help="also the best plans for fewer workers")
    options.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="NODE",
        help="also what limits the plan, what would help, and why the cuts, or this node, are where they are",
    )
    return options


class _Joined(argparse.Action):
    """Texts that are given one after the other, as one text with commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def _output_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--dump", type=Path, metavar="DIR", help="also write what each pass saw and made, as files")
    return options


def _add_steps(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument("--steps", type=_count, default=default, metavar="N", help=f"training steps ({default})")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _text(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Passes a text on as it is once ``parse`` has accepted it."""

    def read(text: str) -> str:
        try:
            parse(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return read


def _at(text: str) -> tuple[str, int, int]:
    """Input, dimension, size; dimension 0 of the batch."""
    place, _, size = text.rpartition("=")
    name, _, dim = ("batch", "", "0") if place == "batch" else place.rpartition(":")
    if not name or not dim.isdecimal() or not size.isdecimal() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of the inputs, such as batch=16 or input_ids:1=256")
    return name, int(dim), int(size)


def _dynamic(text: str) -> tuple[str, list[int]]:
    name, _, dims = text.rpartition(":")
    if not name or not all(dim.isdecimal() for dim in dims.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not an input with its dimensions, such as input_ids:0,1")
    return name, [int(dim) for dim in dims.split(",")]
