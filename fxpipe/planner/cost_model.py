"""What a stage on a set of devices takes: the whole cost model of the planner.

After PipeDream (Harlap et al., arXiv:1806.03377; US 12056604 B2), made consistent: every stage, link and level is
charged by the same rule. For a stage with compute C seconds and P bytes of parameters on r replicas:

- all-reduce AR = sum over levels of 4 (g-1)/g P / bandwidth, g the most groups of the level below that the stage uses
  inside one group of the level;
- work = (C + AR) / r;
- a cut that X bytes cross moves 2 X per microbatch, activations forward and gradients back. A unit (a device, a machine,
  ...) moves 2 X |f - f'| over its uplink: its share f of the replicas before the cut, less its share f' of those after;
- the time of a stage is the largest of work, link in and link out; the time of a plan is that of its slowest stage;
- memory of a replica = versions (P + A), A the bytes of the outputs of the stage's nodes, versions = in flight =
  ceil(replicas from this stage on / r).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fxpipe.ir.topology import Topology


@dataclass(frozen=True)
class CostModel:
    """The variants: ``ring_all_reduce`` moves 2 (g-1)/g; ``overlap_all_reduce`` takes max(C, AR) instead of the sum (as in
    the text of SOSP'19); ``serial_links`` adds the link times to the work instead of overlapping them."""

    ring_all_reduce: bool = False
    overlap_all_reduce: bool = False
    serial_links: bool = False

    def all_reduce_share(self, groups: int) -> float:
        """Bytes over one uplink for each byte of parameters."""
        return (2 if self.ring_all_reduce else 4) * (groups - 1) / groups

    def all_reduce_seconds_per_byte(self, topology: Topology, devices: Sequence[int]) -> float:
        """AR / P for a stage on these devices."""
        groups = zip(groups_used(topology, devices), topology.levels, strict=True)
        return sum(self.all_reduce_share(g) / level.bandwidth_bytes_per_second for g, level in groups)

    def work_seconds(self, compute_seconds: float, all_reduce_seconds: float, n_replicas: int) -> float:
        """The part of a stage's time that is not a link."""
        if self.overlap_all_reduce:
            return max(compute_seconds, all_reduce_seconds) / n_replicas
        return (compute_seconds + all_reduce_seconds) / n_replicas

    def stage_seconds(self, work: float, link_in: float, link_out: float) -> float:
        """The time of a stage from its three parts, in seconds."""
        return work + link_in + link_out if self.serial_links else max(work, link_in, link_out)


def groups_used(topology: Topology, devices: Sequence[int]) -> list[int]:
    """g for every level: the most groups of the level below that these devices use inside one group of the level."""
    used, units = [], set(devices)
    for level in topology.levels:
        counts = Counter(unit // level.size for unit in units)
        used.append(max(counts.values()))
        units = set(counts)
    return used


def link_seconds_per_byte(topology: Topology, before: Sequence[int], after: Sequence[int]) -> tuple[float, float]:
    """The slowest uplink for each byte that crosses the cut between two stages, both ways together.

    Returns one number for the units that hold replicas of the stage before, one for those of the stage after.
    """
    slowest, size = [0.0, 0.0], 1
    for level in topology.levels:
        shares = [unit_shares(devices, size) for devices in (before, after)]
        for side, share in enumerate(shares):
            apart = max(abs(shares[0].get(unit, 0.0) - shares[1].get(unit, 0.0)) for unit in share)
            slowest[side] = max(slowest[side], 2 * apart / level.bandwidth_bytes_per_second)
        size *= level.size
    return slowest[0], slowest[1]


def unit_shares(devices: Sequence[int], size: int) -> dict[int, float]:
    """The share of the devices in each unit of so many devices."""
    return {unit: n / len(devices) for unit, n in Counter(device // size for device in devices).items()}


def versions(replicas_from_here: int, n_replicas: int) -> int:
    """Versions of the weights, and microbatches in flight, that a replica holds."""
    return -(-replicas_from_here // n_replicas)
