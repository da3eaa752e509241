"""A chain of work with its cuts: the numbers that ``cut_search`` works on. Imports no torch."""

from dataclasses import dataclass
from itertools import pairwise
from math import inf

from fxpipe.errors import VerifyError

TICKS_PER_SECOND = 10**15  # times are whole femtoseconds: sums are exact, so "optimal" and ties are well defined


@dataclass(frozen=True)
class Shared:
    """What each stage that touches one of ``positions`` pays once: a parameter it holds, a value it recomputes."""

    positions: tuple[int, ...]
    ticks: int = 0
    saved_bytes: int = 0  # kept for each microbatch in flight
    state_bytes: int = 0  # kept once


@dataclass(frozen=True)
class Chain:
    """Work at positions 0..n-1, and what crosses the boundaries 0..n (boundary b stands before position b).

    ``legal`` are the boundaries that may be cut, increasing, without 0 and n. ``link_ticks`` is how long one
    microbatch's traffic, both ways, takes over the link at a boundary; the two byte counts are that traffic, activations
    and gradients. ``apart`` holds pairs of positions that no stage may both have, increasing in both;
    ``alone`` those that no stage of several replicas may have, increasing.
    """

    ticks: tuple[int, ...]
    saved_bytes: tuple[int, ...]
    shared: tuple[Shared, ...]
    legal: tuple[int, ...]
    link_ticks: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    gradient_bytes: tuple[int, ...]
    apart: tuple[tuple[int, int], ...] = ()
    alone: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.ticks)
        if any(len(x) != n + 1 for x in (self.link_ticks, self.activation_bytes, self.gradient_bytes)):
            raise VerifyError(f"a chain of {n} nodes has {n + 1} boundaries; its links give another number")
        if any(a >= b for a, b in pairwise((0, *self.legal, n))):
            raise VerifyError(f"legal cuts must increase strictly between 0 and {n}; found {self.legal}")
        for i, (time, saved) in enumerate(zip(self.ticks, self.saved_bytes, strict=True)):
            if time < 0 or saved < 0:
                raise VerifyError(f"node {i} of the chain has a negative cost: {time} ticks, {saved} bytes saved")


@dataclass(frozen=True)
class Limits:
    """``n_stages`` exactly, and ``memory_bytes`` for each (``None``: any).

    Stage s keeps min(``n_microbatches``, n_stages - s) microbatches in flight (``None``: n_stages - s). With ``replicas`` of
    each stage, a rank of stage s keeps 1 + ceil(ranks of later stages / replicas[s]), or as many as it gets.
    """

    n_stages: int
    memory_bytes: int | None = None
    n_microbatches: int | None = None
    replicas: tuple[int, ...] = ()

    @property
    def memory(self) -> float:
        """The memory limit as a number that can be compared: infinite where there is none."""
        return inf if self.memory_bytes is None else self.memory_bytes

    def in_flight(self, stage: int) -> int:
        """How many microbatches' activations stage ``stage`` holds at most, under 1F1B."""
        wide = self.replicas or (1,) * self.n_stages
        depth = 1 - (-sum(wide[stage + 1 :]) // wide[stage])
        return depth if self.n_microbatches is None else min(depth, -(-self.n_microbatches // wide[stage]))


@dataclass(frozen=True)
class Cut:
    """Boundaries ``(0, ..., n)``; for each stage its compute and the memory it needs; the slowest stage or link."""

    boundaries: tuple[int, ...]
    ticks: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    bottleneck_ticks: int
