"""How the graph is cut into stages, and how good the cut is."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from fxpipe.errors import VerifyError


@dataclass(frozen=True)
class StagePlan:
    """One stage of a partition: which nodes it computes, which values enter and leave it.

    ``nodes``: names of the nodes it owns, in program order. ``recomputed``: names of cheap nodes that an earlier stage owns,
    depend only on inputs and constants, and are computed again here. ``received``: names of values that arrive from the
    stage before (in order); ``sent``: names of values that go to the stage after, those among them that this stage does
    not compute being relayed. ``inputs``: names of the program's placeholders that it reads. ``parameters`` and
    ``buffers``: qualified names it reads, in order of first use; a tensor with two names has that of its first reader.

    Seconds and bytes are for one microbatch and count what is recomputed. ``parameter_bytes`` counts a tied parameter in
    each stage that reads it. ``sent_bytes`` is what goes forward. ``memory_bytes`` is what ``partition-stages`` holds against
    its limit: see there.
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
    ``replicas``: on how many ranks each stage runs, which take its microbatches in turn; one each if left out.

    Raises VerifyError where the stages do not fit together: a node in two of them, a value received that is not sent, a
    parameter in several that is not listed as tied.
    """

    stages: tuple[StagePlan, ...]
    tied: tuple[TiedParameter, ...]
    objective: str
    bottleneck_seconds: float
    bottleneck: str  # which stage and which term: "stage 1 compute", "link 0-1"
    lower_bound_seconds: float
    proved_optimal: str
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.replicas:
            object.__setattr__(self, "replicas", (1,) * self.n_stages)
        if len(self.replicas) != self.n_stages or min(self.replicas, default=1) < 1:
            raise VerifyError(
                f"replicas {self.replicas} are not one number of at least 1 for each of {self.n_stages} stages"
            )
        for i, stage in enumerate(self.stages):
            if stage.index != i:
                raise VerifyError(f"stage {i} of the partition carries index {stage.index}")
        self._check_links()
        owned = Counter(name for stage in self.stages for name in stage.nodes)
        for name, n_owners in owned.items():
            if n_owners > 1:
                raise VerifyError(f"node {name} belongs to {n_owners} stages of the partition")
        self._check_tied()

    def _check_links(self) -> None:
        for before, after in pairwise(self.stages):
            if before.sent != after.received:
                raise VerifyError(
                    f"stage {before.index} sends {before.sent}, but stage {after.index} receives {after.received}"
                )
        if self.stages and (self.stages[0].received or self.stages[-1].sent):
            raise VerifyError("the first stage receives nothing and the last sends nothing; this partition differs")

    def _check_tied(self) -> None:
        users: dict[str, tuple[int, ...]] = {}
        for stage in self.stages:
            for name in stage.parameters:
                users[name] = (*users.get(name, ()), stage.index)
        shared = {name: at for name, at in users.items() if len(at) > 1}
        listed = {t.name: t.users for t in self.tied}
        if shared != listed:
            raise VerifyError(f"parameters {shared} are read by several stages, but {listed} are listed as tied")
        for tied in self.tied:
            if tied.owner not in tied.users:
                raise VerifyError(f"tied parameter {tied.name} is owned by stage {tied.owner}, which does not read it")

    @property
    def n_stages(self) -> int:
        return len(self.stages)
