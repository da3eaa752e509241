"""This process's stage of a plan, the others in their own processes (torchrun)."""

import ctypes
import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxpipe.errors import InputError, OptionError, RuntimeFailure
from fxpipe.runtime.pipe import Pipe, PipeSpec, add_gradient
from fxpipe.runtime.stage_runner import named_tensors
from fxpipe.runtime.torch_pp import Groups, TorchEngine
from fxpipe.runtime.watch import Watch, first_line


def launched_ranks() -> int | None:
    """How many ranks torchrun (or an initialised process group) says there are; ``None`` outside of both."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


class DistributedPipe(Pipe):
    """One rank. Joins the process group if the script has not; every wait for another rank ends at the plan's timeout.

    Raises:
        OptionError: another number of ranks was started than the plan has.
        RuntimeFailure: the ranks did not all come.
    """

    def __init__(self, spec: PipeSpec, model: nn.Module) -> None:
        super().__init__(spec, model)
        self._join(launched_ranks())
        self._stage = next(s for s in range(spec.lowered.n_stages) if self.rank in spec.lowered.ranks_of(s))
        self._others = [r for r in range(dist.get_world_size()) if r != self.rank]
        shared = spec.shared_ranks()
        runner = spec.runner(self._stage, model, frozenset(n for n, ranks in shared.items() if self.rank in ranks))
        self.runners = (runner,)
        self._meet(shared)
        groups = Groups(self._group, self._alone)
        self._engine = TorchEngine(runner, spec.stages.stages, spec.lowered, self.device, groups, self._watch)
        self._checked_inputs = False
        self._share(dict.fromkeys([*spec.tied_users(), *self._replicated_tensors()]))

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def replica(self) -> int:
        return self.rank - self.spec.lowered.ranks_of(self._stage)[0]

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        try:
            return super().step(*args, target=target, **kwargs)
        except RuntimeFailure:
            raise  # the others know
        except BaseException:
            self._watch.report(self.rank)
            raise

    def synchronize_model(self) -> None:
        self._share([n for n, _ in self.model.named_parameters()] + [n for n, _ in self.model.named_buffers()])

    def _join(self, found: int | None) -> None:
        planned = self.spec.lowered.n_ranks
        if found != planned:
            raise OptionError(
                f"the plan is for {planned} ranks, but {found} were started; use torchrun --nproc-per-node {planned}, "
                f"or compile with n_ranks={found}"
            )
        if not dist.is_initialized():
            self._set_up(
                lambda: dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=self._timeout)
            )

    def _meet(self, shared: Mapping[str, tuple[int, ...]]) -> None:
        """Groups with the plan's timeout: for all ranks, for this one alone, for each set of ranks that share a parameter."""

        def meet() -> None:
            self._watch = Watch(self.spec.timeout_seconds)
            self._group = dist.new_group(timeout=self._timeout)
            self._alone = dist.new_group([self.rank], timeout=self._timeout, use_local_synchronization=True)
            groups = {ranks: dist.new_group(ranks, timeout=self._timeout) for ranks in dict.fromkeys(shared.values())}
            self._shared = {name: (ranks, groups[ranks]) for name, ranks in shared.items() if self.rank in ranks}

        self._set_up(meet)

    @property
    def _timeout(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.spec.timeout_seconds)

    def _set_up(self, connect: Callable[[], None]) -> None:
        try:
            connect()
        except RuntimeError as e:
            raise RuntimeFailure(
                f"rank {os.environ.get('RANK', '?')} of {self.spec.lowered.n_ranks} could not connect to all others within "
                f"{self.spec.timeout_seconds:g} s (timeout_seconds); look for a rank that did not start or stopped "
                f"({first_line(e)})"
            ) from e

    def _run(self, microbatches: list[dict[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        if not self._checked_inputs:
            self._check_same_inputs(microbatches)
            self._checked_inputs = True
        losses = self._engine.step(microbatches, loss_grad)
        self._sum_shared_grads()
        return self._everybodys(losses, len(microbatches), loss_grad)

    def _everybodys(self, losses: Mapping[int, Tensor], n: int, like: Tensor) -> list[Tensor]:
        """The losses of all ``n`` microbatches, each of which one rank has: exact, for the others add zeros in float64."""
        found = like.new_zeros(n, dtype=torch.float64)
        for microbatch, loss in losses.items():
            found[microbatch] = loss
        with self._watch.exchange("learn the loss", self._others):
            dist.all_reduce(found, group=self._group)
        return list(found.to(like.dtype).unbind())

    def _sum_shared_grads(self) -> None:
        """Every rank that has a tied or replicated parameter gets the sum of all gradients, so that all take the same step."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, (ranks, group) in self._shared.items():
            total = self.runners[0].separate_grads.pop(name, None)
            total = torch.zeros_like(parameters[name]) if total is None else total
            with self._watch.exchange(f"sum the gradients of {name}", [r for r in ranks if r != self.rank]):
                dist.all_reduce(total, group=group)
            add_gradient(parameters[name], total)

    def _replicated_tensors(self) -> list[str]:
        """Whatever of the model replicated stages read."""
        stages = (s for s in self.spec.stages.stages if self.spec.lowered.replicas[s.index] > 1)
        return [b.name for s in stages for b in s.forward.inputs if b.kind in ("parameter", "buffer")]

    @torch.no_grad()
    def _share(self, names: Iterable[str]) -> None:
        """Every rank takes over the owner's copy of these tensors of the model; a tensor that no stage reads stays."""
        tensors = named_tensors(self.model)
        owners = self._owners(tensors)
        with self._watch.exchange("share the model", self._others):
            for name in names:
                if name in tensors and id(tensors[name]) in owners:
                    dist.broadcast(tensors[name].data, owners[id(tensors[name])], self._group)

    def _owners(self, tensors: dict[str, Tensor]) -> dict[int, int]:
        """The rank that keeps the true copy of each of the model's tensors, by its id: that of the first stage to read it."""
        return {
            id(tensors[b.name]): self.spec.lowered.stage_to_rank[stage.index]
            for stage in reversed(self.spec.stages.stages)
            for b in stage.forward.inputs
            if b.kind in ("parameter", "buffer") and b.name in tensors
        }

    def _check_same_inputs(self, microbatches: list[dict[str, Tensor]]) -> None:
        """In the first step, that every rank was given the same data: different data would train on nonsense without a sign."""
        mine = _digest(microbatches).to(self.device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        with self._watch.exchange("compare its inputs", self._others):
            dist.all_gather(found, mine, self._group)
        different = [r for r, digest in enumerate(found) if not torch.equal(digest, found[0])]
        if different:
            raise InputError(
                f"ranks {different} were given other inputs than rank 0 in the first step; every rank takes the same batch: "
                "seed the data loader alike on all ranks, without a distributed sampler"
            )


def _digest(microbatches: list[dict[str, Tensor]]) -> Tensor:
    digest = hashlib.sha256()
    for part in microbatches:
        for x in part.values():
            held = x.detach().cpu().contiguous()
            digest.update(ctypes.string_at(held.data_ptr(), held.nbytes) if held.nbytes else b"")
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
