"""Pipe: a plan ready to train. ``loss = pipe.step(*inputs)`` leaves gradients on the model's own parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpipe.costs.simulate import Event
from fxpipe.errors import InputError
from fxpipe.ir.partition import TiedParameter
from fxpipe.ir.program import Signature
from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.microbatch import Microbatches, check_shapes, tensor_leaves
from fxpipe.runtime.stage_runner import StageRunner


@dataclass(frozen=True)
class PipeSpec:
    """What a pipe needs of a plan. ``schedule`` is compute-only, ``lowered`` the same with its messages."""

    signature: Signature
    examples: tuple[Tensor, ...]
    microbatches: Microbatches
    stages: LoweredStages
    schedule: Schedule
    lowered: Schedule
    tied: tuple[TiedParameter, ...]
    constants: Mapping[str, Tensor]
    compiler: str
    mean_loss: bool
    timeout_seconds: float

    def tied_users(self) -> dict[str, tuple[int, ...]]:
        """The trained parameters that several stages read, with those stages."""
        trained = {b.name for s in self.stages.stages for b in s.backward.outputs if b.kind == "gradient"}
        return {t.name: t.users for t in self.tied if len(t.users) > 1 and t.name in trained}

    def shared_ranks(self) -> dict[str, tuple[int, ...]]:
        """The trained parameters of which several ranks compute gradients, tied or of a replicated stage, with those ranks."""
        users = {name: set(stages) for name, stages in self.tied_users().items()}
        for stage in self.stages.stages:
            parameters = {b.name for b in stage.forward.inputs if b.kind == "parameter"}
            trained = parameters & {b.name for b in stage.backward.outputs if b.kind == "gradient"}
            for name in trained if self.schedule.replicas[stage.index] > 1 else ():
                users.setdefault(name, set()).add(stage.index)
        ranks_of = self.schedule.ranks_of
        return {name: tuple(sorted(r for u in stages for r in ranks_of(u))) for name, stages in sorted(users.items())}

    def runner(self, stage: int, model: nn.Module, separate: frozenset[str]) -> StageRunner:
        """The stage ready to run on the model's tensors; gradients of ``separate`` parameters are kept apart."""
        return StageRunner(self.stages.stages[stage], model, self.constants, self.compiler, separate)


class Pipe(ABC):
    """Common to both ways of running: takes a step's inputs apart and puts the losses together."""

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        self.spec = spec
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.runners: tuple[StageRunner, ...] = ()

    @property
    def rank(self) -> int:
        """This process's rank; 0 in one process."""
        return 0

    @property
    def replica(self) -> int:
        """Which replica of its stage this process is: 0 where there is one."""
        return 0

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """One training step over a whole batch: adds to the parameters' ``.grad`` and returns the batch's loss, detached.

        Every rank is given the same inputs, structured as in ``fxpipe.compile``. The loss is the same on every rank.

        Raises:
            InputError: the inputs do not fit the plan.
            RuntimeFailure: another rank failed.
        """
        for runner in self.runners:
            runner.events.clear()
        losses = self._run(self._split(args, kwargs, target), self._loss_grad())
        return self._combine(losses)

    @property
    def events(self) -> tuple[Event, ...]:
        """When this process ran each forward and backward of the last step, in the machine's monotonic clock."""
        return tuple(e for r in self.runners for e in r.events)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this process trains: those of its stages."""
        yield from (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their qualified names in the model."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        mine = {id(every[b.name]) for r in self.runners for b in r.graphs.forward.inputs if b.kind == "parameter"}
        yield from ((name, p) for name, p in self.model.named_parameters() if id(p) in mine)

    @abstractmethod
    def synchronize_model(self) -> None:
        """Brings every parameter and buffer of the model up to date in this process (nothing to do in one process)."""

    @abstractmethod
    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        """One step over all microbatches: the loss of each, in order, on every rank."""

    def _combine(self, losses: list[Tensor]) -> Tensor:
        total = torch.stack(losses).sum()
        return total / len(losses) if self.spec.mean_loss else total

    def _loss_grad(self) -> Tensor:
        last = self.spec.stages.stages[-1].example_outputs[0]
        scale = 1.0 / self.spec.microbatches.n if self.spec.mean_loss else 1.0
        return torch.full((), scale, dtype=last.dtype, device=self.device)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> list[dict[str, Tensor]]:
        """Every microbatch's inputs by name, laid out as the traced ones were."""
        signature, cut = self.spec.signature, self.spec.microbatches
        leaves = tensor_leaves(signature, args, kwargs, target)
        for path, x, batched in zip(signature.paths, leaves, cut.batched, strict=True):
            if batched and x.shape[:1] != (cut.batch_size,):
                raise InputError(
                    f"input {path!r} has {x.shape[0] if x.dim() else 'no'} rows; the plan was made for a batch of "
                    f"{cut.batch_size} in {cut.n} microbatches; give batches of that size or compile again"
                )
        parts = cut.split(leaves)
        check_shapes(signature, self.spec.examples, parts[0])
        laid_out = ([_like(x, e) for x, e in zip(part, self.spec.examples, strict=True)] for part in parts)
        return [dict(zip(signature.inputs, part, strict=True)) for part in laid_out]


def add_gradient(parameter: nn.Parameter, total: Tensor) -> None:
    """``parameter.grad += total``, as a backward would."""
    parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)


def _like(x: Tensor, example: Tensor) -> Tensor:
    return (
        x if x.stride() == example.stride() else torch.empty_strided(x.shape, example.stride(), dtype=x.dtype).copy_(x)
    )
