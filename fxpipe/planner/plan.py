"""A plan: ordered stages, each a set of nodes on a set of devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxpipe.errors import OptionError, VerifyError
from fxpipe.ir.topology import Topology
from fxpipe.planner.profile import Ints, NodeId, Profile


@dataclass(frozen=True)
class Stage:
    """Nodes by position in the profile, in an order in which they can run; devices by number, one replica on each."""

    nodes: tuple[int, ...]
    devices: tuple[int, ...]


Stages = tuple[Stage, ...]


def read_stages(profile: Profile, data: Sequence[Stage | Mapping[str, Any]]) -> Stages:
    """Stages from ``[{"nodes": [ids], "devices": [ints]}]``; what is a stage already stays as it is.

    Raises:
        OptionError: an unknown id; names the stage.
    """
    index = {id: position for position, id in enumerate(profile.ids)}
    stages: list[Stage] = []
    for s, stage in enumerate(data):
        if isinstance(stage, Stage):
            stages.append(stage)
            continue
        for field in ("nodes", "devices"):
            if field not in stage:
                raise OptionError(f"stage {s} of the plan has no {field}; found {sorted(stage)}")
        for id in stage["nodes"]:
            if id not in index:
                raise OptionError(f"stage {s} of the plan has node {id!r}, which the profile does not have")
        stages.append(Stage(tuple(index[id] for id in stage["nodes"]), tuple(stage["devices"])))
    return tuple(stages)


def stages_dict(profile: Profile, stages: Stages) -> list[dict[str, list[NodeId] | list[int]]]:
    """The list that ``read_stages`` reads."""
    return [{"nodes": [profile.ids[n] for n in s.nodes], "devices": list(s.devices)} for s in stages]


def stage_of_nodes(profile: Profile, stages: Stages) -> Ints:
    """The stage of every node, shape (n_nodes,). Raises VerifyError where a node is in no stage or in two."""
    stage_of = np.full(profile.n_nodes, -1)
    for s, stage in enumerate(stages):
        for node in stage.nodes:
            if stage_of[node] >= 0:
                raise VerifyError(f"node {profile.ids[node]!r} is in stages {stage_of[node]} and {s} of the plan")
            stage_of[node] = s
    if (stage_of < 0).any():
        raise VerifyError(f"node {profile.ids[int(np.argmin(stage_of))]!r} is in no stage of the plan")
    return stage_of


def check_plan(profile: Profile, topology: Topology, stages: Stages) -> None:
    """Raises VerifyError: a stage is empty, a device is unknown or used twice, or an edge goes back to an earlier stage."""
    used: dict[int, int] = {}
    for s, stage in enumerate(stages):
        if not stage.nodes or not stage.devices:
            raise VerifyError(f"stage {s} of the plan has no {'devices' if stage.nodes else 'nodes'}")
        for device in stage.devices:
            if not 0 <= device < topology.n_devices:
                raise VerifyError(f"stage {s} is on device {device}; the topology has {topology.n_devices}")
            if device in used:
                raise VerifyError(f"device {device} is in stages {used[device]} and {s} of the plan")
            used[device] = s
    stage_of = stage_of_nodes(profile, stages)
    back = np.flatnonzero(stage_of[profile.edges[:, 0]] > stage_of[profile.edges[:, 1]])
    if len(back):
        a, b = profile.edges[back[0]].tolist()
        raise VerifyError(
            f"edge {profile.ids[a]!r} -> {profile.ids[b]!r} goes back from stage {stage_of[a]} to stage {stage_of[b]}"
        )


def cut_bytes(profile: Profile, stage_of: Ints, n_stages: int) -> list[float]:
    """X of every cut s|s+1: each output that has a consumer after the cut, once; shape (n_stages - 1,)."""
    last = stage_of.copy()
    np.maximum.at(last, profile.edges[:, 0], stage_of[profile.edges[:, 1]])
    change = np.zeros(n_stages + 1)
    np.add.at(change, stage_of, profile.output_bytes)
    np.add.at(change, last, -profile.output_bytes)
    # The sums pass over zero only up to rounding where nothing crosses.
    alive = np.bincount(stage_of, minlength=n_stages) - np.bincount(last, minlength=n_stages)
    return [float(x) if n else 0.0 for x, n in zip(np.cumsum(change), np.cumsum(alive), strict=False)][: n_stages - 1]
