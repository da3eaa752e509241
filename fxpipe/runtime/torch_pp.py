"""A rank's part of a plan on ``torch.distributed.pipelining``'s schedule runtime.

The only file that touches that package's private names (torch 2.13): ``_PipelineScheduleRuntime`` runs our lowered program,
with our forward and backward as its custom functions. torch owns the order in which messages are posted and awaited. What it
cannot say is added in ``_Stage``, which posts them itself: a message goes to the rank whose turn the microbatch is, where torch
knows one rank for each stage (so torch's group is of this rank alone, and ``verify_schedule`` checks the schedule); a receive
buffer is made when its receive is posted and not for all microbatches up front, a sent tensor is let go when its message has
left and not at the end of the step, and a message that cannot be sent or received becomes an error that names the lost rank.
"""

import contextlib
import datetime
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    FORWARD,
    FULL_BACKWARD,
    REDUCE_GRAD,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import StageGraphs
from fxpipe.runtime.stage_runner import StageRunner
from fxpipe.runtime.watch import Watch

GRADS_ON_THE_WAY = 2
"""How many microbatches' gradients may be on their way to the stage before; the tensors of earlier ones are let go."""

Messages = list[tuple[dist.Work, Tensor]]


class _Stage(PipelineStage):
    """Our stage as torch sees it. All shapes are known before the first step; messages are posted here, in torch's order."""

    def __init__(
        self,
        graphs: StageGraphs,
        stages: Sequence[StageGraphs],
        schedule: Schedule,
        device: torch.device,
        groups: "Groups",
        watch: Watch,
    ) -> None:
        index = graphs.index
        self._inputs = [_blank(x) for x in stages[index - 1].example_outputs] if index else []
        self._outputs = [_blank(x) for x in graphs.example_outputs]
        self._sends_grad = graphs.returned_grads
        self._receives_grad = stages[index + 1].returned_grads if index + 1 < len(stages) else ()
        super().__init__(
            nn.Module(),
            index,
            len(stages),
            device,
            input_args=tuple(self._inputs),
            output_args=tuple(self._outputs),
            group=groups.alone,
        )
        self._schedule, self._everybody = schedule, groups.everybody
        self._watch = watch
        self._timeout = datetime.timedelta(seconds=watch.timeout_seconds) if device.type == "cpu" else None
        self.outgoing: dict[int, Sequence[Tensor]] = {}
        self.outgoing_grads: dict[int, Sequence[Tensor | None]] = {}
        self._receiving: dict[int, Messages] = {}
        self._receiving_grads: dict[int, Messages] = {}
        self._sending: dict[int, Messages] = {}
        self._sending_grads: deque[tuple[Messages, str, int, int]] = deque()

    def take_received(self, microbatch: int) -> list[Tensor]:
        """What the stage before sent for this microbatch, once it is there."""
        return self._finish(self._receiving.pop(microbatch, []), "receive from", self.stage_index - 1, microbatch)

    def take_received_grads(self, microbatch: int) -> list[Tensor | None]:
        """The gradients of this stage's outputs, ``None`` where there is none. Lets go of those outputs: they have arrived."""
        grads = iter(
            self._finish(self._receiving_grads.pop(microbatch, []), "receive from", self.stage_index + 1, microbatch)
        )
        self._finish(self._sending.pop(microbatch, []), "send to", self.stage_index + 1, microbatch)
        return [next(grads) if computed else None for computed in self._receives_grad]

    def finish_sends(self, keep: int = 0) -> None:
        """Waits until all but the last ``keep`` gradients that were sent have left."""
        while len(self._sending_grads) > keep:
            self._finish(*self._sending_grads.popleft())

    # Called by torch where the program says SEND or RECV. Each returns no operations, for it has posted them.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        buffers = [torch.empty_like(x, device=self.device) for x in self._inputs]
        self._receiving[fwd_chunk_id] = self._receive(buffers, self.stage_index - 1, fwd_chunk_id)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        computed = zip(self._outputs, self._receives_grad, strict=True)
        buffers = [torch.empty_like(x, device=self.device) for x, there in computed if there]
        self._receiving_grads[bwd_chunk_id] = self._receive(buffers, self.stage_index + 1, bwd_chunk_id)
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._sending[fwd_chunk_id] = self._send(self.outgoing.pop(fwd_chunk_id), self.stage_index + 1, fwd_chunk_id)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grads = [g for g in self.outgoing_grads.pop(bwd_chunk_id) if g is not None]
        sent = self._send(grads, self.stage_index - 1, bwd_chunk_id)
        self._sending_grads.append((sent, "send to", self.stage_index - 1, bwd_chunk_id))
        self.finish_sends(keep=GRADS_ON_THE_WAY)
        return []

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """For known shapes (torch's ``InferenceMode.STATIC``), which every rank votes: nobody need be asked."""
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        assert received_result is not None
        return received_result

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        """Says where inputs come from, without torch's buffers."""
        infos = tuple(_RecvInfo(f"input {i}", self.stage_index - 1, None, None) for i in range(len(self._inputs)))
        self.args_recv_info = dict.fromkeys(range(num_microbatches), infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        """Nothing: buffers for gradients are made when they are received."""

    def _receive(self, buffers: Sequence[Tensor], stage: int, microbatch: int) -> Messages:
        rank = self._schedule.rank_of(stage, microbatch)
        with self._watch.exchange(f"receive from stage {stage}", [rank]):
            return [(_posted(dist.irecv(x, rank, self._everybody)), x) for x in buffers]

    def _send(self, tensors: Sequence[Tensor], stage: int, microbatch: int) -> Messages:
        rank = self._schedule.rank_of(stage, microbatch)
        with self._watch.exchange(f"send to stage {stage}", [rank]):
            return [(_posted(dist.isend(x, rank, self._everybody)), x) for x in tensors]

    def _finish(self, messages: Messages, doing: str, stage: int, microbatch: int) -> list[Tensor]:
        if messages:
            with self._watch.exchange(f"{doing} stage {stage}", [self._schedule.rank_of(stage, microbatch)]):
                for work, _ in messages:
                    work.wait(*(() if self._timeout is None else (self._timeout,)))
        return [x for _, x in messages]


@dataclass(frozen=True)
class Groups:
    """``everybody``: of all ranks, which messages go through; ``alone``: of this rank, all that torch's runtime sees."""

    everybody: dist.ProcessGroup
    alone: dist.ProcessGroup


class TorchEngine:
    """One rank's stage on torch's runtime, which runs its program; with whom it talks is ``_Stage``'s alone."""

    def __init__(
        self,
        runner: StageRunner,
        stages: Sequence[StageGraphs],
        schedule: Schedule,
        device: torch.device,
        groups: Groups,
        watch: Watch,
    ) -> None:
        self._runner = runner
        self._stage = _Stage(runner.graphs, stages, schedule, device, groups, watch)
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            [self._stage], schedule.n_microbatches, scale_grads=False
        )
        program = schedule.programs[dist.get_rank()]
        self._runtime.pipeline_order_with_comms = {0: [_Action.from_str(str(a)) for a in program]}
        for kind, function in ((FORWARD, self._forward), (FULL_BACKWARD, self._backward), (REDUCE_GRAD, _nothing)):
            self._runtime.register_custom_function(kind, function)
        self._losses: dict[int, Tensor] = {}
        self._loss_grad: Tensor | None = None

    def step(self, microbatches: Sequence[Mapping[str, Tensor]], loss_grad: Tensor) -> Mapping[int, Tensor]:
        """One step of this rank; returns the losses of the microbatches that it ran on the last stage, by index."""
        self._losses, self._loss_grad = {}, loss_grad
        with _without_torchs_drawing():
            self._runtime._step_microbatches(kwarg_mbs=list(microbatches))
        self._stage.finish_sends()
        return self._losses

    def _forward(self, action: _Action, ctx: _PipelineContext) -> None:
        microbatch = _microbatch(action)
        self._runtime.fwd_recv_ops.pop((action.stage_index, microbatch), None)
        received = self._stage.take_received(microbatch)
        assert ctx.kwarg_mbs is not None
        outputs = self._runner.forward(microbatch, received, ctx.kwarg_mbs[microbatch])
        if self._stage.is_last:
            self._losses[microbatch] = outputs[0]
        else:
            self._stage.outgoing[microbatch] = outputs

    def _backward(self, action: _Action, ctx: _PipelineContext) -> None:
        microbatch = _microbatch(action)
        self._runtime.bwd_recv_ops.pop((action.stage_index, microbatch), None)
        last = self._stage.is_last
        grads = [self._loss_grad] if last else self._stage.take_received_grads(microbatch)
        result = self._runner.backward(microbatch, grads)
        if not self._stage.is_first:
            self._stage.outgoing_grads[microbatch] = result


@contextlib.contextmanager
def _without_torchs_drawing() -> Iterator[None]:
    """Where an action fails, torch logs the whole schedule of all ranks; our error has the place, without the pages."""
    logger: logging.Logger = schedules.logger
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _blank(x: Tensor) -> Tensor:
    """The shape and dtype of ``x`` without memory, contiguous."""
    return torch.empty([int(d) for d in x.shape], dtype=x.dtype, device="meta")


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None  # this rank is in the group
    return work


def _microbatch(action: _Action) -> int:
    assert action.microbatch_index is not None
    return int(action.microbatch_index)


def _nothing(action: _Action, ctx: _PipelineContext) -> None:
    """REDUCE_GRAD: gradients are already scaled, and those of tied parameters are summed once the step is over."""
