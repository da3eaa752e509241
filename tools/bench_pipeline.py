"""Step time of fxpipe's pipeline against PyTorch's own ``Schedule1F1B`` on the same stages, two ranks over gloo.

    python tools/bench_pipeline.py [--rounds 25] [--layers 10] [--batch 16] [--microbatches 8] [--check]

GPT-2 (width 128, 64 tokens, vocabulary 512). The stages of torch's schedule are the stage modules of our split program, run by
eager autograd; fxpipe runs the same stages lowered, as they are ("none") and compiled ("inductor"). Every round takes one step
of each, so that a machine's slow moments fall on all alike; a ratio is the median over rounds of the round's own ratio.
Wall is the time until the last rank is done, CPU the sum over ranks.
Prints a table, and JSON as the last line. ``--check`` exits with 1 where the compiled pipeline is slower than torch's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import fxpipe
from fxpipe import printing
from fxpipe.demos import demo
from fxpipe.runtime.distributed import DistributedPipe

N_RANKS = 2
WARM_UP_ROUNDS = 3
MOST_RATIO = 1.0
TORCH = "torch Schedule1F1B, eager"

Step = Callable[[], None]


class EagerStage(nn.Module):
    """A stage module as torch's schedule calls it: what it receives by position, its own inputs by keyword."""

    def __init__(self, stage: nn.Module, names: tuple[str, ...], n_outputs: int) -> None:
        super().__init__()
        self.stage = stage
        self.names = names
        self.n_outputs = n_outputs

    def forward(self, *received: Tensor, **inputs: Tensor) -> Any:
        outputs = self.stage(*received, *(inputs[name] for name in self.names))
        return outputs[0] if self.n_outputs == 1 else outputs[: self.n_outputs]


def torch_step(plan: fxpipe.Plan, inputs: dict[str, Tensor]) -> Step:
    """A step of torch's own schedule on this rank's stage."""
    index, last = dist.get_rank(), dist.get_world_size() - 1
    graphs = plan.stages.stages[index]
    n_microbatches = plan.options.n_microbatches
    module = EagerStage(
        plan.program.graph_module.get_submodule(f"stage_{index}"),
        graphs.inputs,
        1 if index == last else len(graphs.outputs),
    )
    received = plan.stages.stages[index - 1].example_outputs if index else ()
    given = graphs.example_outputs[:1] if index == last else graphs.example_outputs
    needs = graphs.output_needs_grad
    stage = PipelineStage(
        module,
        index,
        last + 1,
        torch.device("cpu"),
        input_args=tuple(_meta(x, n) for x, n in zip(received, graphs.received_needs_grad, strict=True)),
        output_args=tuple(_meta(x, n) for x, n in zip(given, needs, strict=False)),
    )
    schedule = Schedule1F1B(stage, n_microbatches, loss_fn=lambda loss, _: loss / n_microbatches, scale_grads=False)
    kept = {name: inputs[name] for name in graphs.inputs}
    target = inputs["labels"] if index == last else None
    return lambda: schedule.step(target=target, return_outputs=False, **kept)


def _meta(x: Tensor, needs_grad: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta", requires_grad=needs_grad)


def pipe_step(pipe: DistributedPipe, inputs: dict[str, Tensor]) -> Step:
    """A step of fxpipe's pipeline on this rank."""

    def step() -> None:
        pipe.step(**inputs)

    return step


def worker(asked: argparse.Namespace, answer: Path) -> None:
    """One rank: times every step of every engine, and rank 0 writes what all found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, inputs = demo("gpt")(batch=asked.batch, length=64, vocabulary=512, width=128, n_layers=asked.layers)
    assert isinstance(inputs, dict)
    plan = fxpipe.compile(model, inputs, fxpipe.Options(n_ranks=N_RANKS, n_microbatches=asked.microbatches))
    engines: dict[str, Step] = {TORCH: torch_step(plan, inputs)}
    for compiler in ("none", "inductor"):
        engines[f"fxpipe, {compiler}"] = pipe_step(
            DistributedPipe(replace(plan.spec(), compiler=compiler), model), inputs
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    gradients = {}
    for n in range(WARM_UP_ROUNDS + asked.rounds):
        names = list(engines)
        for name in names[n % len(names) :] + names[: n % len(names)]:
            model.zero_grad()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            engines[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            gradients[name] = _gradient(model, plan)
    far = {name: float((g - gradients[TORCH]).norm() / gradients[TORCH].norm()) for name, g in gradients.items()}
    found: list[Any] = [None] * N_RANKS
    dist.all_gather_object(found, (times, far))
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(found))
    dist.destroy_process_group()


def _gradient(model: nn.Module, plan: fxpipe.Plan) -> Tensor:
    """Of the parameters that one stage alone uses: torch's schedule does not sum the others."""
    tied = {t.name for t in plan.partition.tied}
    grads = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    shared = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in tied}
    own = dict(model.named_parameters())
    return torch.cat([g.flatten() for n, g in grads.items() if n in own and id(own[n]) not in shared])


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine, with its ratios to torch's."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={N_RANKS}"]
        command = [*torchrun, __file__, *sys.argv[1:], "--answer", str(answer)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        ranks = json.loads(answer.read_text())
    rows = []
    for name in ranks[0][0]:
        steps = list(zip(*(times[name][WARM_UP_ROUNDS:] for times, _ in ranks), strict=True))
        wall = [max(w for w, _ in step) for step in steps]
        cpu = [sum(c for _, c in step) for step in steps]
        rows.append(
            {"engine": name, "wall": wall, "cpu": cpu, "gradient_difference": max(far[name] for _, far in ranks)}
        )
    base = rows[0]
    return [
        {
            "engine": row["engine"],
            "wall_seconds": statistics.median(row["wall"]),
            "cpu_seconds": statistics.median(row["cpu"]),
            "wall_ratio": statistics.median(a / b for a, b in zip(row["wall"], base["wall"], strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(row["cpu"], base["cpu"], strict=True)),
            "gradient_difference": row["gradient_difference"],
        }
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="step time of fxpipe's pipeline against torch's Schedule1F1B")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the figure is missed")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer is not None:
        worker(asked, asked.answer)
        return 0
    rows = measure(asked)
    passed = rows[-1]["wall_ratio"] <= MOST_RATIO
    headers = ("engine", "wall s", "CPU s", "wall ratio", "CPU ratio", "gradients differ by")
    print(printing.table([tuple(row.values()) for row in rows], headers))
    print(f"figure: {rows[-1]['engine']}, wall ratio {rows[-1]['wall_ratio']:.3f}, at most {MOST_RATIO}, met: {passed}")
    print(json.dumps({"rows": rows, "figures": {"inductor / Schedule1F1B": rows[-1]["wall_ratio"]}, "passed": passed}))
    return int(asked.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
