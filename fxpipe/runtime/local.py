"""All ranks of a plan in this process: the rank programs interleaved in one order that all of them allow."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fxpipe.ir.action import ComputationType as Type
from fxpipe.ir.schedule import Schedule
from fxpipe.runtime.pipe import Pipe, PipeSpec, add_gradient
from fxpipe.runtime.stage_runner import StageRunner


class LocalPipe(Pipe):
    """All stages in this process."""

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        super().__init__(spec, model)
        self.runners = tuple(
            spec.runner(i, model, frozenset(spec.tied_users())) for i in range(len(spec.stages.stages))
        )
        self._engine = LocalEngine(self.runners, spec.schedule)

    def synchronize_model(self) -> None:
        """Nothing to do."""

    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        losses = self._engine.step(microbatches, loss_grad)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, users in self.spec.tied_users().items():
            grads = [
                self.runners[u].separate_grads.pop(name, None) for u in reversed(users)
            ]  # in the order of backward
            add_gradient(parameters[name], _sum([g for g in grads if g is not None]))
        return losses


class LocalEngine:
    """Runs a compute-only schedule; what would be sent is handed over."""

    def __init__(self, runners: Sequence[StageRunner], schedule: Schedule) -> None:
        self.runners = {r.graphs.index: r for r in runners}
        self._order = [action for _, action in schedule.execution_order(schedule.predecessors())]
        self._last = schedule.n_stages - 1

    def step(self, microbatches: Sequence[Mapping[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        """One step: every forward and backward of every stage; returns the losses, one for each microbatch."""
        activations: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        gradients: dict[tuple[int, int], Sequence[Tensor | None]] = {}
        losses: dict[int, Tensor] = {}
        for action in self._order:
            stage, microbatch = action.stage_index, action.microbatch_index
            assert microbatch is not None  # a compute-only schedule has no other actions
            if action.computation_type is Type.F:
                received = activations.pop((stage - 1, microbatch), ())
                outputs = self.runners[stage].forward(microbatch, received, microbatches[microbatch])
                if stage == self._last:
                    losses[microbatch] = outputs[0]
                    gradients[stage, microbatch] = (loss_grad,)
                else:
                    activations[stage, microbatch] = outputs
            else:
                grads = self.runners[stage].backward(microbatch, gradients.pop((stage, microbatch)))
                if stage:
                    gradients[stage - 1, microbatch] = grads
        return [losses[m] for m in sorted(losses)]


@torch.no_grad()
def _sum(grads: Sequence[Tensor]) -> Tensor:
    total, *others = grads
    for grad in others:
        total += grad
    return total
