"""One step of a rank's program, and its spelling: ``2F0`` is the forward of microbatch 0 on stage 2.

Words and spelling are those of ``torch.distributed.pipelining`` (``_Action``, torch 2.13), so that a program can be
handed to torch as text. Unlike torch's, ``parse`` is the exact inverse of ``str``: it accepts nothing else.
"""

import re
from dataclasses import dataclass
from enum import StrEnum, unique

from fxpipe.errors import ScheduleError


@unique
class ComputationType(StrEnum):
    """What an action does."""

    F = "F"  # forward
    I = "I"  # noqa: E741  backward to the inputs of the stage (torch's name)
    W = "W"  # backward to the weights of the stage
    B = "B"  # full backward: I and W in one
    UNSHARD = "UNSHARD"  # gather the stage's sharded parameters
    RESHARD = "RESHARD"  # and let them go
    REDUCE_GRAD = "REDUCE_GRAD"  # finish the stage's gradients, once all microbatches have added to them
    SEND_F = "SEND_F"  # the stage's output to the next stage
    RECV_F = "RECV_F"  # the stage's input from the previous stage
    SEND_B = "SEND_B"  # the gradient of the stage's input to the previous stage
    RECV_B = "RECV_B"  # the gradient of the stage's output from the next stage

    @property
    def is_compute(self) -> bool:
        """Whether it runs the model: F, I, W or B."""
        return self in _COMPUTE

    @property
    def is_send(self) -> bool:
        """SEND_F or SEND_B."""
        return self in _SENDS

    @property
    def is_receive(self) -> bool:
        """RECV_F or RECV_B."""
        return self in _RECEIVES

    @property
    def has_microbatch(self) -> bool:
        """Whether it belongs to one microbatch; UNSHARD, RESHARD and REDUCE_GRAD serve the whole stage."""
        return self.is_compute or self.is_send or self.is_receive


_COMPUTE = frozenset({ComputationType.F, ComputationType.I, ComputationType.W, ComputationType.B})
_SENDS = frozenset({ComputationType.SEND_F, ComputationType.SEND_B})
_RECEIVES = frozenset({ComputationType.RECV_F, ComputationType.RECV_B})
_PARTNER = {
    ComputationType.SEND_F: (1, ComputationType.RECV_F),
    ComputationType.RECV_F: (-1, ComputationType.SEND_F),
    ComputationType.SEND_B: (-1, ComputationType.RECV_B),
    ComputationType.RECV_B: (1, ComputationType.SEND_B),
}

_INDEX_LIMIT = 10**9
_NUMBER = "0|[1-9][0-9]{0,8}"  # below the limit, and without leading zeros, so that parse inverts str
_ACTION = re.compile(rf"({_NUMBER})({'|'.join(ComputationType)})({_NUMBER})?")
GRAMMAR = f"[stage][type][microbatch], e.g. 2F0 or 1UNSHARD, with type one of {', '.join(ComputationType)}"


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """``computation_type`` of stage ``stage_index`` for microbatch ``microbatch_index`` (None: for the whole stage).

    Raises ScheduleError for an index that is negative, huge or no integer, and for a microbatch where the type takes
    none or the other way round. Ordered by stage, then type, then microbatch.
    """

    stage_index: int
    computation_type: ComputationType
    microbatch_index: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.computation_type, ComputationType):
            raise ScheduleError(f"action has type {self.computation_type!r}; expected a ComputationType")
        _check_index("stage_index", self.stage_index, self.computation_type)
        if self.computation_type.has_microbatch:
            _check_index("microbatch_index", self.microbatch_index, self.computation_type)
        elif self.microbatch_index is not None:
            raise ScheduleError(
                f"action {self.computation_type} has microbatch_index {self.microbatch_index!r}; "
                "it serves the whole stage and takes none"
            )

    @property
    def partner(self) -> "Action":
        """The other end of a message: of ``1SEND_F0`` ``2RECV_F0``, of ``2RECV_B0`` ``3SEND_B0``, and back."""
        if self.computation_type not in _PARTNER:
            raise ScheduleError(f"{self} is neither a send nor a receive, so it has no partner")
        step, kind = _PARTNER[self.computation_type]
        return Action(self.stage_index + step, kind, self.microbatch_index)

    def __str__(self) -> str:
        microbatch = "" if self.microbatch_index is None else self.microbatch_index
        return f"{self.stage_index}{self.computation_type}{microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Reads exactly what ``str`` writes; raises ScheduleError with what was found and the grammar."""
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ScheduleError(f"not an action: {text!r}; expected {GRAMMAR}")
        stage, kind, microbatch = match.groups()
        return cls(int(stage), ComputationType(kind), None if microbatch is None else int(microbatch))


def _check_index(name: str, value: object, kind: ComputationType) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INDEX_LIMIT:
        raise ScheduleError(f"action {kind} has {name} {value!r}; expected an integer from 0 to {_INDEX_LIMIT - 1}")
