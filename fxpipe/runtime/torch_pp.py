"""A rank's part of a plan on ``torch.distributed.pipelining``'s schedule runtime.

The only file that touches that package's private names (torch 2.13): ``_PipelineScheduleRuntime`` runs our lowered program,
with our forward and backward as its custom functions. torch owns the order, the messages and their posting. What it cannot
say is added in ``_Stage``: receive buffers are made when a receive is posted and not for all microbatches up front, and a sent
tensor is let go when its message has left and not at the end of the step.
"""

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    FORWARD,
    FULL_BACKWARD,
    REDUCE_GRAD,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from fxpipe.errors import RuntimeFailure
from fxpipe.ir.schedule import Schedule
from fxpipe.runtime.stage_runner import StageRunner

GRACE_SECONDS = 3.0
"""How long a rank that lost its neighbour waits to hear which rank failed first."""


class _Stage(PipelineStage):
    """Our stage as torch sees it: what it receives and sends, all known before the first step."""

    def __init__(
        self, runner: StageRunner, example_inputs: Sequence[Tensor], n_stages: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        graphs = runner.graphs
        self._inputs = [_like(x, device) for x in example_inputs]
        self._outputs = [_like(x, device) for x in graphs.example_outputs]
        super().__init__(
            nn.Module(),
            graphs.index,
            n_stages,
            device,
            input_args=tuple(torch.empty_like(x, device="meta") for x in self._inputs),
            output_args=tuple(torch.empty_like(x, device="meta") for x in self._outputs),
            group=group,
        )
        self.runner = runner
        self.received: dict[int, list[Tensor]] = {}
        self.received_grads: dict[int, list[Tensor | None]] = {}
        self.outgoing: dict[int, Sequence[Tensor]] = {}
        self.outgoing_grads: dict[int, Sequence[Tensor | None]] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        infos = () if self.is_first else tuple(
            _RecvInfo(f"recv_for_{self.stage_index}", self.stage_index - 1, None, None) for _ in self._inputs
        )
        for microbatch in range(num_microbatches):
            self.args_recv_info[microbatch] = infos

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.received[fwd_chunk_id] = [torch.empty_like(x) for x in self._inputs]
        return self._ops(dist.irecv, self.received[fwd_chunk_id], self.stage_index - 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        needed = self.runner.graphs.output_needs_grad
        buffers = [torch.empty_like(x) if n else None for x, n in zip(self._outputs, needed, strict=True)]
        self.received_grads[bwd_chunk_id] = buffers
        return self._ops(dist.irecv, [b for b in buffers if b is not None], self.stage_index + 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(self.outgoing.pop(fwd_chunk_id), self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grads = self.outgoing_grads.pop(bwd_chunk_id)
        needed = self.runner.graphs.received_needs_grad
        values = [
            torch.zeros_like(x) if g is None else g
            for g, x, n in zip(grads, self._inputs, needed, strict=True)
            if n
        ]
        return self._send(values, self.stage_index - 1)

    def _ops(self, op: Any, tensors: Sequence[Tensor], peer_stage: int) -> list[dist.P2POp]:
        peer = self._resolve_peer_global_rank(peer_stage)
        return [dist.P2POp(op, t, peer, self.group) for t in tensors]

    def _send(self, tensors: Sequence[Tensor], peer_stage: int) -> list[dist.P2POp]:
        """Posts the sends itself and keeps them, so that a finished one releases its tensor before the step ends."""
        self._sending = [(w, t) for w, t in self._sending if not w.is_completed()]
        peer = self._resolve_peer_global_rank(peer_stage)
        for tensor in tensors:
            work = dist.isend(tensor, peer, self.group)
            assert work is not None  # this rank is in the group
            self._sending.append((work, tensor))
        return []

    def finish_sends(self, timeout: datetime.timedelta) -> None:
        """Waits until everything that was sent has left."""
        for work, _ in self._sending:
            work.wait(timeout)
        self._sending.clear()


def _like(x: Tensor, device: torch.device) -> Tensor:
    """A contiguous tensor without contents that says the shape, dtype and device."""
    return torch.empty([int(d) for d in x.shape], dtype=x.dtype, device="meta").new_empty(
        [int(d) for d in x.shape], device=device
    )


class TorchEngine:
    """One rank's stages on torch's runtime.

    ``example_inputs`` gives, for each runner, tensors like those it receives. ``timeout_seconds`` bounds every wait for another rank.
    """

    def __init__(
        self,
        runner: StageRunner,
        example_inputs: Sequence[Tensor],
        schedule: Schedule,
        device: torch.device,
        group: dist.ProcessGroup,
        timeout_seconds: float,
    ) -> None:
        self._stage = _Stage(runner, example_inputs, schedule.n_stages, device, group)
        self._runtime = _PipelineScheduleRuntime([self._stage], schedule.n_microbatches, scale_grads=False)
        actions = {r: [_Action.from_str(str(a)) for a in p] for r, p in enumerate(schedule.programs)}
        self._runtime._prepare_schedule_with_comms(actions, format="compute_comms")
        for kind, function in ((FORWARD, self._forward), (FULL_BACKWARD, self._backward), (REDUCE_GRAD, _nothing)):
            self._runtime.register_custom_function(kind, function)
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._group = group
        self._losses: list[Tensor] = []
        self._loss_grad: Tensor | None = None

    def step(self, microbatches: Sequence[Mapping[str, Tensor]], loss_grad: Tensor) -> list[Tensor]:
        """One step of this rank; returns the losses of all microbatches on the last stage's rank, else nothing."""
        self._losses, self._loss_grad = [], loss_grad
        try:
            self._runtime._step_microbatches(kwarg_mbs=[dict(m) for m in microbatches])
            self._stage.finish_sends(self._timeout)
        except RuntimeFailure:
            raise
        except RuntimeError as e:
            if not _is_lost_peer(e):
                raise
            raise self.failure("finish this step's messages", self._neighbours(), e) from e
        return self._losses

    def _neighbours(self) -> list[int]:
        stages = (self._stage.stage_index - 1, self._stage.stage_index + 1)
        return [self._stage._resolve_peer_global_rank(s) for s in stages if 0 <= s < self._stage.num_stages]

    def _forward(self, action: _Action, context: _PipelineContext) -> None:
        stage, microbatch = self._stage, _microbatch(action)
        self._wait(self._runtime.fwd_recv_ops.pop((stage.stage_index, microbatch), ()), action, stage.stage_index - 1)
        received = stage.received.pop(microbatch, [])
        assert context.kwarg_mbs is not None
        outputs = stage.runner.forward(microbatch, received, context.kwarg_mbs[microbatch])
        if stage.is_last:
            self._losses.append(outputs[0])
        else:
            stage.outgoing[microbatch] = outputs

    def _backward(self, action: _Action, context: _PipelineContext) -> None:
        stage, microbatch = self._stage, _microbatch(action)
        self._wait(self._runtime.bwd_recv_ops.pop((stage.stage_index, microbatch), ()), action, stage.stage_index + 1)
        grads = [self._loss_grad] if stage.is_last else stage.received_grads.pop(microbatch)
        result = stage.runner.backward(microbatch, grads)
        if not stage.is_first:
            stage.outgoing_grads[microbatch] = result

    def _wait(self, works: Sequence[dist.Work], action: _Action, peer_stage: int) -> None:
        try:
            for work in works:
                work.wait(self._timeout)
        except RuntimeError as e:
            peer = self._stage._resolve_peer_global_rank(peer_stage)
            raise self.failure(f"receive what {action} needs from stage {peer_stage}", [peer], e) from e

    def failure(self, what: str, peers: Sequence[int], cause: Exception) -> RuntimeFailure:
        """The error of a rank that lost a neighbour, naming the rank that failed first as far as the others report."""
        rank = dist.get_rank(self._group)
        lost = _first_lost(rank, peers)
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        return RuntimeFailure(
            f"rank {rank} could not {what}: rank {lost} died or did not answer within {self._timeout.total_seconds():g} s ({reason}); "
            f"look at the output of rank {lost}"
        )


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(w in text for w in ("onnection", "gloo", "Gloo", "imed out", "NCCL"))


def _first_lost(rank: int, peers: Sequence[int]) -> int:
    """Follows the ranks' reports of whom they lost to the one that reports nothing: it is the one that failed."""
    store = dist.distributed_c10d._get_default_store()
    lost = peers[0]
    try:
        store.set(f"fxpipe/lost/{rank}", str(lost))
        seen = {rank}
        deadline = time.monotonic() + GRACE_SECONDS
        while lost not in seen and time.monotonic() < deadline:
            if store.check([f"fxpipe/lost/{lost}"]):
                seen.add(lost)
                lost = int(store.get(f"fxpipe/lost/{lost}"))
            else:
                time.sleep(0.05)
    except RuntimeError:  # the store itself died with its rank
        pass
    return lost


def _microbatch(action: _Action) -> int:
    assert action.microbatch_index is not None
    return int(action.microbatch_index)


def _nothing(action: _Action, context: _PipelineContext) -> None:
    """REDUCE_GRAD: gradients are already scaled, and those of tied parameters are summed once the step is over."""


