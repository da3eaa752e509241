"""Whether a plan computes what eager PyTorch computes: loss, gradients and buffers of one step, for every demo model.

    python tools/bench_exactness.py [--model gpt ...] [--check]

Each model is cut into 2 and into 4 stages, without compression. "exact" is one microbatch with the model's own dropout, against
eager from the same seed; "1f1b" is 8 microbatches without dropout, whose random numbers would come in another order, against
eager on the whole batch (with BatchNorm: on the microbatches). A difference is a tensor's, by its norm, relative to the norm of
the expected tensor, or to a hundredth of the norm of all gradients (or buffers) where that is more; the largest is shown.
Prints a table, and JSON as the last line. ``--check`` exits with 1 where a difference is over its bound and not bitwise zero.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxpipe
from fxpipe import printing
from fxpipe.demos import DEMOS, demo

N_STAGES = (2, 4)
BOUNDS = {"exact": 1e-6, "1f1b": 1e-5}
N_MICROBATCHES = {"exact": 1, "1f1b": 8}


@dataclass(frozen=True)
class Row:
    """One model cut in one way; ``bitwise`` where not a bit of loss, gradients and buffers differs."""

    model: str
    n_stages: int
    case: str
    bitwise: bool
    loss: float
    gradients: float
    buffers: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.bitwise or max(self.loss, self.gradients, self.buffers) <= self.bound


def measure(name: str, n_stages: int, case: str) -> Row:
    """One step of the plan against one of eager."""
    model, inputs = demo(name)()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    n_microbatches = N_MICROBATCHES[case]
    if n_microbatches > 1:
        without_dropout(model)
    plan = fxpipe.compile(model, (args, kwargs), {"n_ranks": n_stages, "n_microbatches": n_microbatches})
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    found = plan.pipe().step(*args, **kwargs)
    torch.manual_seed(0)
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    expected = eager(twin, args, kwargs, n_microbatches if has_batch_norm else 1)
    pairs = [({"loss": found}, {"loss": expected}), (grads(model), grads(twin)), (buffers(model), buffers(twin))]
    return Row(
        name, n_stages, case, all(map(same, *zip(*pairs, strict=True))), *(relative(*p) for p in pairs), BOUNDS[case]
    )


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout to nothing, also that within Hugging Face's attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def eager(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_parts: int) -> Tensor:
    """The loss, as the mean over ``n_parts`` of the batch; leaves the gradients on the model."""
    total = torch.zeros(())
    for i in range(n_parts):
        output = model(*(x.chunk(n_parts)[i] for x in args), **{k: x.chunk(n_parts)[i] for k, x in kwargs.items()})
        loss = output[0] if isinstance(output, tuple) else output if isinstance(output, Tensor) else output["loss"]
        (loss / n_parts).backward()
        total += loss.detach() / n_parts
    return total


def grads(model: nn.Module) -> dict[str, Tensor]:
    """By parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """By name."""
    return dict(model.named_buffers())


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are there and bitwise equal."""
    return found.keys() == expected.keys() and all(torch.equal(found[n], e) for n, e in expected.items())


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor; infinite where one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    whole = sum(float(e.double().norm()) ** 2 for e in expected.values()) ** 0.5
    differences = (
        (float((found[n].double() - e.double()).norm()), float(e.double().norm())) for n, e in expected.items()
    )
    return max((d / max(norm, whole / 100) for d, norm in differences if d), default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="loss, gradients and buffers of a plan against eager PyTorch")
    parser.add_argument("--model", action="append", choices=DEMOS, help="may be repeated; all without it")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    asked = parser.parse_args()
    rows = [measure(name, n, case) for name in asked.model or DEMOS for n in N_STAGES for case in BOUNDS]
    headers = ("model", "stages", "case", "bitwise", "loss", "gradients", "buffers", "at most", "met")
    cells = [
        (
            r.model,
            r.n_stages,
            r.case,
            r.bitwise,
            f"{r.loss:.1e}",
            f"{r.gradients:.1e}",
            f"{r.buffers:.1e}",
            r.bound,
            r.passed,
        )
        for r in rows
    ]
    print(printing.table(cells, headers))
    print(json.dumps([{**asdict(r), "passed": r.passed} for r in rows]))
    return int(asked.check and not all(r.passed for r in rows))


if __name__ == "__main__":
    sys.exit(main())
