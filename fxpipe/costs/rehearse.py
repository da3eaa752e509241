"""A plan tried out in this process: each stage's graphs are timed, and the schedule is simulated with the times found."""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpipe.costs.prediction import all_reduce_seconds
from fxpipe.costs.simulate import CutCost, StageCost, StageTimes, simulate
from fxpipe.ir.action import ComputationType as Type
from fxpipe.plans.plan import Plan
from fxpipe.runtime.local import LocalPipe
from fxpipe.units import parse_bytes_per_second

MESSAGE_SECONDS = 2e-4
"""The fixed cost of a message between two processes of one machine over gloo."""


@dataclass(frozen=True)
class Prediction:
    """What a step will take on the plan's ranks, and the idle share of all ranks in it."""

    step_seconds: float
    bubble: float
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]


def rehearse(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_steps: int = 4) -> Prediction:
    """Runs ``n_steps`` steps of the whole batch in this process and predicts a step on as many ranks as the plan has.

    The first step warms up. Parameters, gradients, buffers and random state are left as they were.
    """
    pipe = LocalPipe(plan.spec(), plan.model)
    durations: dict[tuple[int, Type], list[float]] = {}
    with restored(plan.model):
        for step in range(n_steps):
            pipe.step(*args, **kwargs)
            for event in pipe.events if step else ():
                key = (event.action.stage_index, event.action.computation_type)
                durations.setdefault(key, []).append(event.end_seconds - event.start_seconds)
    forward = tuple(statistics.median(durations[s, Type.F]) for s in range(plan.partition.n_stages))
    backward = tuple(statistics.median(durations[s, Type.B]) for s in range(plan.partition.n_stages))
    rate = parse_bytes_per_second(plan.options.bandwidth)
    stages = tuple(
        StageCost(f, b, reduce_seconds=all_reduce_seconds(s.parameter_bytes, n, rate))
        for f, b, s, n in zip(forward, backward, plan.partition.stages, plan.schedule.replicas, strict=True)
    )
    timeline = simulate(plan.schedule, StageTimes(stages, _cuts(plan)))
    return Prediction(timeline.makespan_seconds, timeline.barrier_bubble, forward, backward)


def _cuts(plan: Plan) -> tuple[CutCost, ...]:
    rate = parse_bytes_per_second(plan.options.bandwidth)
    cuts = []
    for stage in plan.stages.stages[:-1]:
        sizes = [x.numel() * x.element_size() for x in stage.example_outputs]
        back = sum(s for s, needed in zip(sizes, stage.output_needs_grad, strict=True) if needed)
        cuts.append(CutCost(sum(sizes), back, rate, MESSAGE_SECONDS))
    return tuple(cuts)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no gradients; after it, gradients, buffers and random state are those of before."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for p, _ in grads:
        p.grad = None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            for b, before in buffers:
                b.copy_(before)
