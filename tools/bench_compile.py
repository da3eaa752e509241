"""How long fxpipe's passes take beside ``torch.export`` itself, on Hugging Face's GPT-2 of 12 layers with random weights.

    python tools/bench_compile.py [--rounds 5] [--n-ranks 2] [--width 64] [--json] [--check]

Prints the median CPU seconds of each figure, its ratio to ``torch.export``, and the bound it is held to, if any.
Each round exports and then runs the passes once with each partitioner, so that a machine's slow moments fall on all alike;
a ratio is the median of the rounds' own ratios. ``--check`` exits with 1 where a figure misses its bound.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from transformers import GPT2Config, GPT2LMHeadModel

from fxpipe.api import trace_microbatch
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass
from fxpipe.pipeline import Options, default_pipeline

N_LAYERS = 12
PARTITIONERS = ("min-cut", "default")
MOST_RATIO = 1.0  # the passes together, over torch.export
MOST_IMPORT_SECONDS = 0.1  # of the front door, where torch is loaded already
MOST_HELP_SECONDS = 0.5
IMPORT = """
import time, torch
start = time.process_time(); import fxpipe; print(time.process_time() - start)
start = time.process_time(); fxpipe.compile; print(time.process_time() - start)
"""

Round = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One line of the report; ``bound`` limits the ratio where there is one, else the seconds."""

    name: str
    seconds: float
    ratio: float | None = None
    bound: float | None = None

    @property
    def passed(self) -> bool:
        measured = self.seconds if self.ratio is None else self.ratio
        return self.bound is None or measured <= self.bound


def gpt2(width: int) -> tuple[GPT2LMHeadModel, dict[str, torch.Tensor]]:
    """The model and a batch of 8 sequences."""
    config = GPT2Config(n_layer=N_LAYERS, n_embd=width, n_head=max(1, width // 32), use_cache=False)
    ids = torch.randint(0, config.vocab_size, (8, 32))
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # else transformers warns that it guesses so
    return model, {"input_ids": ids, "labels": ids}


def one_round(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], n_ranks: int) -> Round:
    """CPU seconds of an export and of every pass with either partitioner."""
    seconds = {}
    start = time.process_time()
    torch.export.export(model, (), dict(batch))
    seconds["torch.export"] = time.process_time() - start
    for partitioner in PARTITIONERS:
        options = Options(n_ranks=n_ranks, n_microbatches=4, format="bfp4b32", partitioner=partitioner)
        program, _ = trace_microbatch(model, (), batch, options.n_microbatches)
        seconds |= {f"{name} ({partitioner})": s for name, s in pass_seconds(program, options).items()}
    return seconds


def pass_seconds(program: Program, options: Options) -> dict[str, float]:
    """Of each pass with the copy and the verification around it, and of all together."""
    seconds: dict[str, float] = {}
    start = before = time.process_time()

    def observe(step: Pass, _before: Program, _after: Program) -> None:
        nonlocal before
        now = time.process_time()
        seconds[step.name] = now - before
        before = now

    default_pipeline(options, observers=(observe,)).run(program)
    return {**seconds, "passes": time.process_time() - start}


def figures(rounds: list[Round]) -> list[Figure]:
    """The medians."""
    seconds: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    for measured in rounds:
        for name, s in measured.items():
            seconds[name].append(s)
            ratios[name].append(s / measured["torch.export"])
    bounds = {f"passes ({partitioner})": MOST_RATIO for partitioner in PARTITIONERS}
    return [
        Figure(name, statistics.median(seconds[name]), statistics.median(ratios[name]), bounds.get(name))
        for name in seconds
    ]


def process_figures(n: int) -> list[Figure]:
    """What a user waits for at the start, in new processes: the quickest of ``n``; of the command by the clock.

    The second is mostly what torch itself loads for an export: torch._dynamo and sympy.
    """
    doors, rooms = zip(*(map(float, _python("-c", IMPORT).split()) for _ in range(n)), strict=True)
    helps = []
    for _ in range(n):
        start = time.perf_counter()
        _python("-m", "fxpipe", "--help")
        helps.append(time.perf_counter() - start)
    return [
        Figure("import fxpipe, over torch", min(doors), bound=MOST_IMPORT_SECONDS),
        Figure("fxpipe.compile, first looked up", min(rooms)),
        Figure("fxpipe --help", min(helps), bound=MOST_HELP_SECONDS),
    ]


def _python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def _row(figure: Figure) -> list[Any]:
    verdict = "" if figure.bound is None else "ok" if figure.passed else "MISSED"
    return [figure.name, figure.seconds, figure.ratio, figure.bound, verdict]


def main() -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n-ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of the model; that of GPT-2 is 768")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    model, batch = gpt2(chosen.width)
    one_round(model, batch, chosen.n_ranks)  # warms torch's own caches
    rounds = [one_round(model, batch, chosen.n_ranks) for _ in range(chosen.rounds)]
    found = figures(rounds) + process_figures(min(3, chosen.rounds))
    if chosen.json:
        print(json.dumps([{**asdict(f), "passed": f.passed} for f in found], indent=2))
    else:
        headers = ["figure", "seconds", "of torch.export", "bound", ""]
        print(tabulate(map(_row, found), headers, floatfmt=".3f", missingval=""))
    return int(chosen.check and not all(f.passed for f in found))


if __name__ == "__main__":
    sys.exit(main())
