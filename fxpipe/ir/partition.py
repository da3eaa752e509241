"""How the graph is cut into stages, and how good the cut is."""

from dataclasses import dataclass

from fxpipe.errors import VerifyError


@dataclass(frozen=True)
class StagePlan:
    """One stage of a partition: which nodes it computes, which values enter and leave it.

    ``nodes``: names of the nodes it owns, in program order. ``recomputed``: names of cheap nodes that depend only on inputs
    and constants and are computed again here. ``received``: names of values that arrive from the stage before (in order);
    ``sent``: names of values that go to the stage after, those among them that this stage does not compute being relayed.
    ``inputs``: names of the program's placeholders that it reads. ``parameters`` and ``buffers``: qualified names it reads.
    Seconds and bytes are for one microbatch.
    """

    index: int
    nodes: tuple[str, ...]
    recomputed: tuple[str, ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int
    saved_bytes: int
    sent_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class TiedParameter:
    """A parameter that several stages read: ``owner`` is the stage that keeps the true copy, ``users`` are all its readers."""

    name: str
    owner: int
    users: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """An ordered cut of the program into stages, with the time of its slowest stage and a bound no cut can beat.

    ``lower_bound_seconds`` holds for every cut into this many stages under the same costs; ``proved_optimal`` says
    within which family ``bottleneck_seconds`` is the least (``"contiguous cuts of the program order"``), or is empty.
    """

    stages: tuple[StagePlan, ...]
    tied: tuple[TiedParameter, ...]
    objective: str
    bottleneck_seconds: float
    bottleneck: str  # which stage and which term: "stage 1 compute", "link 0-1"
    lower_bound_seconds: float
    proved_optimal: str

    def __post_init__(self) -> None:
        for i, stage in enumerate(self.stages):
            if stage.index != i:
                raise VerifyError(f"stage {i} of the partition carries index {stage.index}")

    @property
    def n_stages(self) -> int:
        return len(self.stages)
