"""One process of a training run: ``python -m fxpipe.worker job.json result.json``, started by ``fxpipe.launch``."""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxpipe.api import compile, load
from fxpipe.launch import Job, Result
from fxpipe.model_source import Source, load_model
from fxpipe.runtime.pipe import Pipe

UNTIMED_STEPS = 5
N_VALIDATION = 8


def main(job_file: str, result_file: str) -> None:
    """Trains as the job says; the rank that knows the loss writes the result."""
    job = Job(**json.loads(Path(job_file).read_text()))
    torch.set_num_threads(job.n_threads)
    torch.manual_seed(job.seed)
    source = load_model(job.model, job.arguments)
    result = train_eager(job, source) if job.engine == "eager" else train_pipe(job, source)
    if int(os.environ.get("RANK", "0")) == 0:
        part = Path(result_file + ".part")
        part.write_text(json.dumps(asdict(result)))
        part.rename(result_file)
    if dist.is_initialized():
        dist.destroy_process_group()


def train_pipe(job: Job, source: Source) -> Result:
    """The plan, on as many ranks as there are."""
    example = (source.args, source.kwargs)
    plan = compile(source.model, example, job.options) if job.plan is None else load(job.plan, source.model)
    pipe = plan.pipe()
    if pipe.replica:  # else it would drop what the first one drops, of other microbatches
        torch.manual_seed(job.seed + pipe.replica)
    update = _updater(pipe.parameters(), job)
    meter = _Meter(pipe)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        loss = pipe.step(*args, **kwargs)
        update()
        meter.read()
        return loss.item()

    losses, total = _loop(job, source, step, shows=pipe.rank == 0)
    pipe.synchronize_model()
    return Result(
        losses=tuple(losses),
        validation_loss=_validation_loss(job, source),
        step_seconds=meter.step_seconds(),
        bubble=meter.bubble(),
        saved_bytes=meter.saved_bytes(),
        peak_saved_bytes=meter.peak_saved_bytes(),
        seconds=total,
    )


def train_eager(job: Job, source: Source) -> Result:
    """The model as it is: PyTorch's own forward and backward on the whole batch, in this process."""
    model = source.model
    update = _updater(model.parameters(), job)
    n_microbatches = int(job.options.get("n_microbatches", 1))

    seconds: list[float] = []

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        start = time.perf_counter()
        loss: Tensor = _loss(model(*args, **kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
        update()
        return loss.item()

    saved = saved_by_autograd(model, lambda: _loss(model(*source.args, **source.kwargs)))
    losses, total = _loop(job, source, step, shows=True)
    return Result(
        losses=tuple(losses),
        validation_loss=_validation_loss(job, source),
        step_seconds=statistics.median(seconds[min(UNTIMED_STEPS, len(seconds) - 1) :]),
        bubble=None,
        saved_bytes=saved // n_microbatches,
        peak_saved_bytes=(saved,),
        seconds=total,
    )


def _updater(parameters: Iterable[nn.Parameter], job: Job) -> Callable[[], None]:
    """One step of AdamW with the job's learning rate, and the gradients cleared after it."""
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate)
    n = max(1, job.warm_up_steps)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / n, total_iters=n - 1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()

    return update


def saved_by_autograd(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward in ``forward``, each storage once, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = forward()
    del kept
    return sum(found.values())


def _loop(
    job: Job, source: Source, step: Callable[[tuple[Any, ...], dict[str, Any]], float], shows: bool
) -> tuple[list[float], float]:
    from tqdm import tqdm

    losses: list[float] = []
    begin = time.perf_counter()
    with tqdm(total=job.steps, desc=job.label, disable=not shows, file=sys.stderr, mininterval=0.5) as bar:
        for args, kwargs in itertools.islice(_batches(job, source), job.steps):
            losses.append(step(args, kwargs))
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
    return losses, time.perf_counter() - begin


def _batches(job: Job, source: Source) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if not job.text:
        return itertools.repeat((source.args, source.kwargs))
    from fxpipe.demos.text import text_batches

    batch, length = source.kwargs["input_ids"].shape
    return (((), b) for b in text_batches(batch, length, seed=job.seed))


@torch.no_grad()
def _validation_loss(job: Job, source: Source) -> float | None:
    """Of the model as it is now, on text that it was not trained on."""
    if not job.text:
        return None
    from fxpipe.demos.text import text_batches

    batch, length = source.kwargs["input_ids"].shape
    source.model.eval()
    batches = itertools.islice(text_batches(batch, length, seed=1, part="validation"), N_VALIDATION)
    loss = statistics.fmean(_loss(source.model(**b)).item() for b in batches)
    source.model.train()
    return loss


def _loss(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    loss: Tensor = output["loss"] if isinstance(output, dict) else output.loss
    return loss


class _Meter:
    """Reads a pipe's own clocks and counters after every step, and brings those of all ranks together at the end."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._busy: list[float] = []
        self._spans: list[tuple[float, float]] = []

    def read(self) -> None:
        events = self._pipe.events
        self._busy.append(sum(e.end_seconds - e.start_seconds for e in events))
        self._spans.append((min(e.start_seconds for e in events), max(e.end_seconds for e in events)))

    def step_seconds(self) -> float:
        """The median over steps of the time from the first start to the last end on any rank."""
        return statistics.median(span for span, _ in self._steps())

    def bubble(self) -> float | None:
        """The median over steps of the idle share: 1 - busy / (ranks x span)."""
        shares = [1 - busy / span for span, busy in self._steps()]
        return statistics.median(shares) if dist.is_initialized() else None

    def _steps(self) -> list[tuple[float, float]]:
        """For each step after warm-up: its span, and the mean busy time of a rank, in seconds."""
        rows = _gather([self._busy, [s for s, _ in self._spans], [e for _, e in self._spans]])
        first = min(UNTIMED_STEPS, len(self._busy) - 1)
        return [
            (max(r[2][i] for r in rows) - min(r[1][i] for r in rows), statistics.fmean(r[0][i] for r in rows))
            for i in range(first, len(self._busy))
        ]

    def saved_bytes(self) -> int:
        return int(sum(_gather(sum(r.saved_bytes for r in self._pipe.runners))))

    def peak_saved_bytes(self) -> tuple[int, ...]:
        return tuple(_gather(sum(r.peak_saved_bytes for r in self._pipe.runners)))


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
