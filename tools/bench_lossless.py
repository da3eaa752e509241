"""Bits a value of real saved activations, compressed and then coded without loss, by coding.

    python tools/bench_lossless.py [--format FORMAT ...] [--steps 60] [--signed] [--json]

The demo's GPT learns its text and the demo's CNN its batch for ``--steps`` steps; then what one eager step saves for backward
is taken: floating-point tensors of at least 1024 values, each storage once, without parameters and inputs. Tensors without
negative values are stored sign-free, as where the graph proves it, unless ``--signed``. ``sparse`` are those with at least a
tenth of zeros: ReLUs and what lies between them. All planes, tables and headers count, and everything is decoded again to be
sure. ``on device`` is what zero compression (``zero_coding``) keeps; the codings of ``lossless`` are by name, one for all
streams of all tensors, and ``auto`` takes the best for each stream. Prints a table, or JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpipe import printing
from fxpipe.demo import LEARNING_RATE, MODEL_ARGUMENTS
from fxpipe.demos import demo, text
from fxpipe.triton_kernels import BFPFormat, lossless, ops, zero_coding

FORMATS = ("bfp4b32", "bfp4b32+e5m3", "bfp2b32")
CODINGS = (*lossless.CODINGS, "auto")
SPARSE = 0.1


@dataclass(frozen=True)
class Row:
    """Bits a value of some tensors of a model in a format: as they are stored, and by coding."""

    model: str
    kind: str
    format: str
    n_tensors: int
    n_values: int
    zeros: float
    stored_bits: float
    coded_bits: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", metavar="FORMAT", help="instead of the usual ones")
    parser.add_argument("--steps", type=int, default=60, help="of training before tensors are taken")
    parser.add_argument("--signed", action="store_true", help="store tensors without negative values as the others")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = [
        measured(model, kind, format, chosen, options.signed)
        for model, tensors in (("gpt", gpt_tensors(options.steps)), ("cnn", cnn_tensors(options.steps)))
        for kind, chosen in (("all", tensors), ("sparse", [x for x in tensors if zeros([x]) >= SPARSE]))
        for format in options.format or FORMATS
        if chosen
    ]
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))
    return 0


def gpt_tensors(steps: int) -> list[Tensor]:
    model, _ = demo("gpt")(**MODEL_ARGUMENTS)
    batches = text.text_batches(MODEL_ARGUMENTS["batch"], MODEL_ARGUMENTS["length"])
    return trained_and_saved(model, (((), batch) for batch in batches), steps)


def cnn_tensors(steps: int) -> list[Tensor]:
    model, inputs = demo("cnn")()

    def batches() -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
        while True:
            yield inputs, {}

    return trained_and_saved(model, batches(), steps)


def trained_and_saved(
    model: nn.Module, batches: Iterator[tuple[tuple[Any, ...], dict[str, Any]]], steps: int
) -> list[Tensor]:
    """What the step after so many steps saves for backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, *next(batches)).backward()
        optimizer.step()
    args, kwargs = next(batches)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *args, *kwargs.values())}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own and x.is_floating_point() and x.numel() >= 1024:
            saved.setdefault(place, x.detach().clone())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept_alive = loss(model, args, kwargs)
    del kept_alive
    return list(saved.values())


def loss(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    made = model(*args, **kwargs)
    value: Tensor = made.loss if kwargs else made[0]
    return value


def zeros(tensors: Sequence[Tensor]) -> float:
    """The share of values that are zero."""
    n_values = sum(x.numel() for x in tensors)
    return sum(int((x == 0).sum()) for x in tensors) / n_values


def measured(model: str, kind: str, format: str, tensors: Sequence[Tensor], signed: bool) -> Row:
    n_values = sum(x.numel() for x in tensors)
    stored = 0
    coded = dict.fromkeys(("on device", *CODINGS), 0)
    for x in tensors:
        fmt = BFPFormat.parse(format)
        fmt = fmt.for_non_negative() if not signed and bool((x >= 0).all()) else fmt
        planes = ops.compress(x, fmt)
        stored += sum(plane.nbytes for plane in planes)
        kept = zero_coding.compress(planes, fmt)
        assert all(map(torch.equal, zero_coding.decompress(kept, fmt), planes)), (
            f"zero compression lost a bit of '{fmt}'"
        )
        coded["on device"] += kept.used_bytes()
        for coding in CODINGS:
            data = lossless.encode(planes, fmt, x.shape, coding)
            assert all(map(torch.equal, lossless.decode(data, fmt, x.shape), planes)), f"{coding} lost a bit of '{fmt}'"
            coded[coding] += data.numel()
    bits = {name: round(8 * size / n_values, 3) for name, size in coded.items()}
    return Row(
        model, kind, format, len(tensors), n_values, round(zeros(tensors), 3), round(8 * stored / n_values, 3), bits
    )


def table(rows: list[Row]) -> str:
    lines = [
        [row.model, row.kind, row.format, row.n_tensors, f"{row.zeros:.0%}", f"{row.stored_bits:.2f}",
         *(f"{bits:.2f}" for bits in row.coded_bits.values())]
        for row in rows
    ]  # fmt: skip
    codings = list(rows[0].coded_bits)
    return printing.table(lines, ["model", "tensors", "format", "of them", "zeros", "stored", *codings])


if __name__ == "__main__":
    sys.exit(main())
