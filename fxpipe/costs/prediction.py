"""What a plan will take before it has run: the stages' costs, and a simulated step with them."""

from fxpipe.costs.simulate import CutCost, StageCost, StageTimes, Timeline, simulate
from fxpipe.ir.stage_graphs import StageGraphs
from fxpipe.passes.schedule_orders import add_communication
from fxpipe.plans.planned import Planned
from fxpipe.units import parse_bytes_per_second


def stage_times(plan: Planned) -> StageTimes:
    """The partition's seconds, the compression plan's bytes and the bandwidth of the options, for one microbatch.

    A stage holds its parameters, their gradients and its buffers throughout, and for each microbatch in flight what it stores
    for backward. Optimizer state and the temporaries of operators are not counted.
    """
    bandwidth = parse_bytes_per_second(plan.options.bandwidth)
    costs = tuple(
        StageCost(
            forward_seconds=stage.forward_seconds,
            backward_seconds=stage.backward_seconds,
            in_flight_bytes=sum(point.stored_bytes for point in plan.compression.of_stage(stage.index)),
            static_bytes=2 * stage.parameter_bytes + _buffer_bytes(plan, stage.buffers),
            reduce_seconds=all_reduce_seconds(stage.parameter_bytes, plan.schedule.replicas[stage.index], bandwidth),
        )
        for stage in plan.partition.stages
    )
    cuts = tuple(
        CutCost(stage.sent_bytes, _gradient_bytes(graphs), bandwidth)
        for stage, graphs in zip(plan.partition.stages[:-1], plan.stages.stages[:-1], strict=True)
    )
    return StageTimes(costs, cuts)


def predicted_step(plan: Planned) -> Timeline:
    """One step on paper: the program of every rank with its messages, in the modelled or measured times."""
    return simulate(add_communication(plan.schedule), stage_times(plan))


def all_reduce_seconds(n_bytes: int, n_replicas: int, bytes_per_second: float) -> float:
    """How long a ring of replicas takes to add up that many bytes of gradients (Patarasuk, Yuan 2009)."""
    return 2 * (n_replicas - 1) / n_replicas * n_bytes / bytes_per_second


def _buffer_bytes(plan: Planned, names: tuple[str, ...]) -> int:
    tensors = {**dict(plan.model.named_buffers(remove_duplicate=False)), **plan.constants}
    return sum(tensors[name].nbytes for name in names if name in tensors)


def _gradient_bytes(graphs: StageGraphs) -> int:
    """Of the gradients that come back for what the stage sends."""
    pairs = zip(graphs.example_outputs, graphs.output_needs_grad, strict=True)
    return sum(output.numel() * output.element_size() for output, needs_grad in pairs if needs_grad)
