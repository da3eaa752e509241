"""Pipe: a plan ready to train. ``loss = pipe.step(*inputs)`` leaves gradients on the model's own parameters."""

import ctypes
import datetime
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxpipe.errors import InputError, OptionError
from fxpipe.ir.partition import TiedParameter
from fxpipe.ir.program import Signature
from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.microbatch import Microbatches, check_shapes, tensor_leaves
from fxpipe.runtime.local import LocalEngine
from fxpipe.runtime.stage_runner import StageRunner, named_tensors
from fxpipe.simulate import Event


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


def launched_ranks() -> int | None:
    """How many ranks torchrun (or an initialised process group) says there are; ``None`` outside of both."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


class Pipe:
    """Common to both ways of running: takes a step's inputs apart and puts the losses together."""

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        self.spec = spec
        self.model = model
        self.runners: tuple[StageRunner, ...] = ()

    @property
    def rank(self) -> int:
        """This process's rank; 0 in one process."""
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

    def synchronize_model(self) -> None:
        """Brings every parameter and buffer of the model up to date in this process (nothing to do in one process)."""

    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _combine(self, losses: list[Tensor]) -> Tensor:
        total = torch.stack(losses).sum()
        return total / len(losses) if self.spec.mean_loss else total

    def _loss_grad(self) -> Tensor:
        last = self.spec.stages.stages[-1].example_outputs[0]
        scale = 1.0 / self.spec.microbatches.n if self.spec.mean_loss else 1.0
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return torch.full((), scale, dtype=last.dtype, device=device)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> list[dict[str, Tensor]]:
        signature, cut = self.spec.signature, self.spec.microbatches
        leaves = tensor_leaves(signature, args, kwargs, target)
        for path, x, batched in zip(signature.paths, leaves, cut.batched, strict=True):
            if batched and x.shape[:1] != (cut.batch_size,):
                raise InputError(
                    f"input {path!r} has {x.shape[0] if x.dim() else 'no'} rows; the plan was made for a batch of {cut.batch_size} "
                    f"in {cut.n} microbatches; give batches of that size or compile again"
                )
        parts = cut.split(leaves)
        check_shapes(signature, self.spec.examples, parts[0])
        return [dict(zip(signature.inputs, part, strict=True)) for part in parts]


class LocalPipe(Pipe):
    """All stages in this process."""

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        super().__init__(spec, model)
        self.runners = tuple(StageRunner(s, model, spec.constants, spec.compiler) for s in spec.stages.stages)
        self._engine = LocalEngine(self.runners, spec.schedule)

    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        return self._engine.step(microbatches, loss_grad)


class DistributedPipe(Pipe):
    """This rank's stage, the others in their own processes (torchrun)."""

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        from fxpipe.runtime.torch_pp import TorchEngine

        super().__init__(spec, model)
        self._join()
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._stage = spec.lowered.stage_to_rank.index(self.rank)
        graphs = spec.stages.stages[self._stage]
        tied = tuple(t for t in spec.tied if len(t.users) > 1)
        separate = frozenset(t.name for t in tied if self._stage in t.users)
        runner = StageRunner(graphs, model, spec.constants, spec.compiler, separate)
        self.runners = (runner,)
        received = spec.stages.stages[self._stage - 1].example_outputs if self._stage else ()
        self._group = dist.new_group(timeout=datetime.timedelta(seconds=spec.timeout_seconds))
        self._engine = TorchEngine(runner, received, spec.lowered, self._device, self._group, spec.timeout_seconds)
        self._tied_groups = {t.name: dist.new_group(sorted({spec.lowered.stage_to_rank[u] for u in t.users})) for t in tied}
        self._checked_inputs = False
        self._share(t.name for t in tied)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def _join(self) -> None:
        if not dist.is_initialized():
            backend = "nccl" if next(self.model.parameters()).is_cuda else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=self.spec.timeout_seconds))
        if dist.get_world_size() != self.spec.lowered.n_ranks:
            raise OptionError(rank_mismatch(self.spec.lowered.n_ranks, dist.get_world_size()))

    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        if not self._checked_inputs:
            self._check_same_inputs(microbatches)
            self._checked_inputs = True
        losses = self._engine.step(microbatches, loss_grad)
        self._collect("sum the gradients of tied parameters", self._sum_tied_grads)
        return losses

    def _combine(self, losses: list[Tensor]) -> Tensor:
        last_stage = self._stage == self.spec.lowered.n_stages - 1
        loss = super()._combine(losses) if last_stage else torch.empty_like(self._loss_grad())
        source = self.spec.lowered.stage_to_rank[-1]
        self._collect("learn the loss", lambda: dist.broadcast(loss, source, self._group))
        return loss

    def _collect(self, what: str, action: Any) -> None:
        """Runs a collective operation; a lost rank becomes an error that names it."""
        try:
            action()
        except RuntimeError as e:
            others = [r for r in range(dist.get_world_size()) if r != self.rank]
            raise self._engine.failure(what, others, e) from e

    def _sum_tied_grads(self) -> None:
        """Every user of a tied parameter gets the sum of all users' gradients, so that all copies take the same step."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        grads = self.runners[0].separate_grads
        for name in sorted(self._tied_groups):
            if name not in self.runners[0].separate:
                continue
            total = grads.pop(name, None)
            total = torch.zeros_like(parameters[name]) if total is None else total
            dist.all_reduce(total, group=self._tied_groups[name])
            held = parameters[name].grad
            parameters[name].grad = total if held is None else held.add_(total)

    @torch.no_grad()
    def _share(self, names: Iterable[str]) -> None:
        """Every rank takes over the owner's copy of these tensors of the model; a tensor that no stage reads stays."""
        tensors = named_tensors(self.model)
        owners = self._owners()
        for name in names:
            if id(tensors[name]) in owners:
                dist.broadcast(tensors[name].data, self.spec.lowered.stage_to_rank[owners[id(tensors[name])]], self._group)

    def _owners(self) -> dict[int, int]:
        """The stage that keeps the true copy of each of the model's tensors, by its id: the first that reads it."""
        tensors = named_tensors(self.model)
        bound = [
            (tensors[b.name], stage.index)
            for stage in self.spec.stages.stages
            for b in stage.forward.inputs
            if b.kind in ("parameter", "buffer") and b.name in tensors
        ]
        return {id(t): index for t, index in reversed(bound)}

    def synchronize_model(self) -> None:
        self._share([n for n, _ in self.model.named_parameters()] + [n for n, _ in self.model.named_buffers()])

    def _check_same_inputs(self, microbatches: list[dict[str, Tensor]]) -> None:
        """In the first step, that every rank was given the same data: different data would train on nonsense without a sign."""
        digest = hashlib.sha256()
        for part in microbatches:
            for x in part.values():
                held = x.detach().cpu().contiguous()
                digest.update(ctypes.string_at(held.data_ptr(), held.nbytes) if held.nbytes else b"")
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(self._device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        self._collect("compare inputs", lambda: dist.all_gather(found, mine, self._group))
        different = [r for r, d in enumerate(found) if not torch.equal(d, found[0])]
        if different:
            raise InputError(
                f"ranks {different} were given other inputs than rank 0 in the first step; every rank takes the same batch: "
                "seed the data loader alike on all ranks, without a distributed sampler"
            )


def rank_mismatch(planned: int, found: int) -> str:
    """The message for a wrong number of processes."""
    return f"the plan is for {planned} ranks, but {found} were started; use torchrun --nproc-per-node {planned}, or compile with n_ranks={found}"


def open_pipe(spec: PipeSpec, model: nn.Module) -> Pipe:
    """A DistributedPipe under torchrun, else a LocalPipe.

    Raises:
        OptionError: torchrun started another number of ranks than the plan has.
    """
    ranks = launched_ranks()
    if ranks is None:
        return LocalPipe(spec, model)
    if ranks != spec.lowered.n_ranks:
        raise OptionError(rank_mismatch(spec.lowered.n_ranks, ranks))
    return DistributedPipe(spec, model)

