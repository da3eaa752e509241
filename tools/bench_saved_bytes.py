"""Bytes that ``torch.compile`` keeps for backward with fxpipe and with plain Inductor, and what compression does to gradients.

    python tools/bench_saved_bytes.py [--model gpt --model llama ...] [--small] [--steps 300] [--check]

Bytes are those that ``torch.autograd.graph.saved_tensors_hooks`` sees in one step: each storage once, without parameters
and inputs. "default" is Inductor with the set that ``default_partition`` saves, "min-cut" is Inductor as it comes. The
gradient's error is relative to min-cut's, all parameters together, at random weights, with the same dropout masks.
Then the demo's GPT learns text for ``--steps`` steps, plain and compressed: the loss at the end is the mean of the last 20.
The learning rate grows as the demo's does: at full height from the first step on, training is chaotic, and ``bfp8b32``,
whose gradients are right to one percent, ended 8 % away from plain.
Prints tables, and JSON as the last line. ``--check`` exits with 1 where a figure of ``LIMITS`` is missed.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._functorch.partitioners import default_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn

sys.path.insert(0, str(Path(__file__).parent))

from one_step import one_step

from fxpipe import printing, units
from fxpipe.demo import LEARNING_RATE, MODEL_ARGUMENTS, WARM_UP_STEPS
from fxpipe.demos import demo, text

LIMITS = {"gpt bfp4b32 / default": 0.25, "loss bfp4b32 / plain": 1.02}
COLUMNS = ("of_default", "of_min_cut", "same_loss", "gradient_error")
FORMATS = ("bfp4b32", "bfp8b32")
FULL: dict[str, dict[str, Any]] = {
    "gpt": {"batch": 2, "length": 512, "vocabulary": 16752, "width": 768, "n_layers": 4, "n_heads": 12, "dropout": 0.1},
    "llama": {"batch": 2, "length": 512, "vocabulary": 8192, "width": 512, "n_layers": 4, "n_heads": 8},
    "bert": {"batch": 2, "length": 384, "vocabulary": 10174, "width": 768, "n_layers": 4, "n_heads": 12},
    "vit": {"batch": 4, "size": 224, "patch": 16, "width": 768, "n_layers": 4, "n_heads": 12, "n_classes": 1000},
    "cnn": {"batch": 8, "size": 64, "channels": 64, "n_blocks": 8},
}
SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"batch": 2, "length": 128, "vocabulary": 1024, "width": 128, "n_layers": 2, "n_heads": 4, "dropout": 0.1},
    "llama": {"batch": 2, "length": 128, "vocabulary": 1024, "width": 128, "n_layers": 2, "n_heads": 4},
    "bert": {"batch": 2, "length": 128, "vocabulary": 1024, "width": 128, "n_layers": 2, "n_heads": 4},
    "vit": {"batch": 4, "size": 64, "patch": 8, "width": 128, "n_layers": 2, "n_heads": 4, "n_classes": 100},
    "cnn": {"batch": 4, "size": 32, "channels": 16, "n_blocks": 2},
}


class DefaultPartitioner(CustomPartitionerFn):
    """The set of values that eager autograd would save."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        del kwargs["compiler"]
        return default_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        return "default_partition"


SETTINGS: dict[str, dict[str, Any]] = {
    "min-cut": {"backend": "inductor"},
    "default": {"backend": "inductor", "options": {"custom_partitioner_fn": DefaultPartitioner()}},
    **{format: {"backend": "fxpipe", "options": {"format": format}} for format in FORMATS},
}


def measure_step(name: str, sizes: dict[str, Any], setting: dict[str, Any]) -> tuple[float, int, Tensor]:
    """The loss, the bytes saved and the gradient of one step of a fresh model."""
    torch._dynamo.reset()
    model, inputs = demo(name)(**sizes)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return one_step(model, torch.compile(model, **setting), args, kwargs)


def measure_model(name: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each setting."""
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for label, setting in SETTINGS.items():
        loss, saved_bytes, gradient = measure_step(name, sizes, setting)
        exact = gradient if exact is None else exact
        error = ((gradient - exact).norm() / exact.norm()).item()
        rows.append(
            {"model": name, "setting": label, "saved_bytes": saved_bytes, "loss": loss, "gradient_error": error}
        )
        del gradient
        gc.collect()
    of = {row["setting"]: row for row in rows}
    for row in rows:
        row["of_default"] = row["saved_bytes"] / of["default"]["saved_bytes"]
        row["of_min_cut"] = row["saved_bytes"] / of["min-cut"]["saved_bytes"]
        row["same_loss"] = row["loss"] == of["min-cut"]["loss"]
    return rows


def final_loss(setting: dict[str, Any], steps: int) -> float:
    """Of the demo's GPT after so many steps on its text."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, _ = demo("gpt")(**MODEL_ARGUMENTS)
    step = _trainer(model, torch.compile(model, **setting))
    batches = text.text_batches(MODEL_ARGUMENTS["batch"], MODEL_ARGUMENTS["length"])
    losses = [step(next(batches)) for _ in range(steps)]
    return sum(losses[-20:]) / len(losses[-20:])


def _trainer(model: nn.Module, compiled: Callable[..., Any]) -> Callable[[dict[str, Tensor]], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / WARM_UP_STEPS, total_iters=WARM_UP_STEPS)

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        warm_up.step()
        return float(loss.detach())

    return step


def tables(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [
        (r["model"], r["setting"], units.format_bytes(r["saved_bytes"]), *(r[column] for column in COLUMNS))
        for r in report["models"]
    ]
    headers = ("model", "saves", "bytes", *(column.replace("_", " ") for column in COLUMNS))
    parts = [printing.table(rows, headers)]
    if report["training"]:
        parts.append(printing.table(list(report["training"].items()), ("training", "final loss")))
    figures = [(name, value, LIMITS[name], value <= LIMITS[name]) for name, value in report["figures"].items()]
    return "\n\n".join([*parts, printing.table(figures, ("figure", "reached", "at most", "met"))])


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Those of LIMITS that were measured."""
    of_default = {f"{r['model']} {r['setting']} / default": r["of_default"] for r in report["models"]}
    found = {} if report["small"] else of_default
    losses = report["training"]
    if losses:
        found["loss bfp4b32 / plain"] = losses["bfp4b32"] / losses["min-cut"]
    return {name: value for name, value in found.items() if name in LIMITS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="bytes saved for backward, gradients and training, with and without fxpipe"
    )
    parser.add_argument("--model", action="append", choices=FULL, help="may be repeated; all without it")
    parser.add_argument(
        "--small", action="store_true", help="small models: a look in a minute, whose ratios are no figures"
    )
    parser.add_argument("--steps", type=int, default=300, help="of training; 0 for none")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    asked = parser.parse_args()
    sizes = SMALL if asked.small else FULL
    report: dict[str, Any] = {"small": asked.small, "steps": asked.steps, "models": [], "training": {}}
    for name in asked.model or FULL:
        report["models"] += measure_model(name, sizes[name])
    for label in ("min-cut", "bfp4b32") if asked.steps else ():
        report["training"][label] = final_loss(SETTINGS[label], asked.steps)
    report["figures"] = figures(report)
    print(tables(report))
    print(json.dumps(report))
    missed = any(value > LIMITS[name] for name, value in report["figures"].items())
    return int(asked.check and missed)


if __name__ == "__main__":
    sys.exit(main())
