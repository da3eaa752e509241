"""What no plan can beat, and why a problem has no plan."""

from itertools import product
from math import prod

import numpy as np

from fxpipe import units
from fxpipe.errors import PartitionError
from fxpipe.ir.topology import Topology
from fxpipe.planner.constraints import Constraints
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.graph import Graph
from fxpipe.planner.profile import Floats, Profile

MOST_ENTRIES = 1 << 20


def time_bound(graph: Graph, topology: Topology, model: CostModel, constraints: Constraints) -> float:
    """Seconds: the larger of all compute spread evenly over the devices and the dearest atom after its own best replication,
    with the least all-reduce that so many replicas force."""
    most = min(topology.n_devices, constraints.max_replicas or topology.n_devices)
    usable = min(topology.n_devices, most * (constraints.n_stages or topology.n_devices))
    bound = float(graph.compute.sum()) / usable
    least = least_all_reduce(topology, model)[:most]
    heavy = np.flatnonzero(graph.compute > bound)  # the others are fast enough on one device
    for at in range(0, len(heavy), max(1, MOST_ENTRIES // most)):
        some = heavy[at : at + max(1, MOST_ENTRIES // most)]
        compute, all_reduce = graph.compute[some, None], graph.parameters[some, None] * least
        total = np.maximum(compute, all_reduce) if model.overlap_all_reduce else compute + all_reduce
        work = total / np.arange(1, most + 1)
        bound = max(bound, float(np.where(graph.single[some] > 0, work[:, 0], work.min(axis=1)).max()))
    return bound


def least_all_reduce(topology: Topology, model: CostModel) -> Floats:
    """Seconds for each byte of parameters on 1, 2, ... replicas wherever they are; shape (n_devices,).

    Replicas that use at most g groups at each level are at most the product of these g.
    """
    found = np.full(topology.n_devices + 1, np.inf)
    rates = [level.bandwidth_bytes_per_second for level in topology.levels]
    for groups in product(*(range(1, level.size + 1) for level in topology.levels)):
        seconds = sum(model.all_reduce_share(g) / rate for g, rate in zip(groups, rates, strict=True))
        most = prod(groups)
        found[most] = min(found[most], seconds)
    return np.minimum.accumulate(found[::-1])[::-1][1:]


def single_device_bound(graph: Graph, n_stages: int) -> float:
    """Seconds that the busiest of so many single-device stages computes at least."""
    return max(float(graph.compute.sum()) / n_stages, float(graph.compute.max()))


def check_possible(profile: Profile, graph: Graph, topology: Topology, constraints: Constraints) -> None:
    """Raises PartitionError where a constraint alone forbids every plan; says by how much."""
    n_stages, n_labels = constraints.n_stages, int(graph.labelled.sum())
    if n_stages is not None and n_stages > topology.n_devices:
        raise PartitionError(
            f"{n_stages} stages need {n_stages} devices; the topology has {topology.n_devices}, "
            f"{n_stages - topology.n_devices} too few"
        )
    if n_stages is not None and n_stages > graph.n:
        what = "nodes" if graph.n == profile.n_nodes else "nodes or groups of nodes that stay together"
        raise PartitionError(
            f"{n_stages} stages need {n_stages} nodes; the profile has {graph.n} {what}, {n_stages - graph.n} too few"
        )
    for what, most in (("stages", n_stages), ("devices", topology.n_devices)):
        if most is not None and n_labels > most:
            raise PartitionError(
                f"{n_labels} different stage hints need {n_labels} stages, but there are {most} {what}, "
                f"{n_labels - most} too few"
            )
    if topology.memory_bytes is not None:
        _check_memory(profile, graph, topology.memory_bytes)


def _check_memory(profile: Profile, graph: Graph, memory_bytes: int) -> None:
    stored = graph.parameters + graph.activations
    atom = int(np.argmax(stored))
    if stored[atom] > memory_bytes:
        members = [repr(profile.ids[node]) for node in graph.members[atom]]
        what = f"node {members[0]}" if len(members) == 1 else f"the group of nodes {', '.join(members[:4])}"
        raise PartitionError(
            f"{what} needs {units.format_bytes(stored[atom])} (parameters {units.format_bytes(graph.parameters[atom])}), "
            f"{units.format_bytes(stored[atom] - memory_bytes)} more than the memory of a device, "
            f"{units.format_bytes(memory_bytes)}"
        )
