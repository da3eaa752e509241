"""What the search is asked, and what it answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from fxpipe.ir.topology import Topology
from fxpipe.planner.bounds import time_bound
from fxpipe.planner.constraints import Constraints
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.cuts import CutSets, CutsOfOrder
from fxpipe.planner.graph import Graph
from fxpipe.planner.minimax import Limits
from fxpipe.planner.plan import Stage, Stages
from fxpipe.planner.profile import Ints, Profile


@dataclass(frozen=True, eq=False)
class Problem:
    """A profile to be cut for a topology; ``graph`` is the profile's under the constraints."""

    profile: Profile
    topology: Topology
    model: CostModel
    constraints: Constraints
    graph: Graph

    @property
    def limits(self) -> Limits:
        """The constraints that the graph does not hold already."""
        c = self.constraints
        return Limits(self.topology.memory_bytes, c.max_replicas, c.n_stages)

    @cached_property
    def time_bound(self) -> float:
        """Seconds that no plan beats."""
        return time_bound(self.graph, self.topology, self.model, self.constraints)

    def with_memory(self, memory_bytes: int) -> "Problem":
        """The same problem on larger or smaller devices."""
        return replace(self, topology=replace(self.topology, memory_bytes=memory_bytes))


@dataclass(frozen=True)
class Answer:
    """Stages as atoms with devices, what the search takes their cost to be, and the cost that it has proved to be the least
    possible (0: nothing proved)."""

    cost: float
    atoms: tuple[tuple[int, ...], ...]
    devices: tuple[tuple[int, ...], ...]
    proved_bound: float = 0.0

    def stage_of(self, n_atoms: int) -> Ints:
        """The stage of each atom, shape (n_atoms,)."""
        found = np.empty(n_atoms, dtype=np.int64)
        for stage, atoms in enumerate(self.atoms):
            found[list(atoms)] = stage
        return found

    def stages(self, problem: Problem) -> Stages:
        """The plan in nodes of the profile, each stage in an order in which it can run."""
        place = np.empty(problem.profile.n_nodes, dtype=np.int64)
        place[problem.profile.order] = np.arange(problem.profile.n_nodes)
        members = problem.graph.members
        return tuple(
            Stage(tuple(sorted((n for a in atoms for n in members[a]), key=place.__getitem__)), devices)
            for atoms, devices in zip(self.atoms, self.devices, strict=True)
        )


def answer_of(
    cuts: CutSets | CutsOfOrder, cost: float, at: Sequence[int], devices: Iterable[tuple[int, ...]], bound: float = 0.0
) -> Answer:
    """The answer with stages between consecutive cuts."""
    atoms = tuple(tuple(cuts.atoms(a, b)) for a, b in pairwise(at))
    return Answer(cost, atoms, tuple(devices), bound)


def better(a: Answer | None, b: Answer | None) -> Answer | None:
    """The cheaper one; of equals the first."""
    if a is None or b is None:
        return b if a is None else a
    return b if b.cost < a.cost else a
