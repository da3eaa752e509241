"""What a plan must keep to besides the memory of the devices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fxpipe.errors import OptionError, unknown
from fxpipe.planner.profile import NodeId, Profile

OBJECTIVES = ("time", "communication", "balance")


@dataclass(frozen=True)
class Constraints:
    """``n_stages``: exactly so many. ``max_load_ratio``: the busiest stage's compute over the mean of all stages at most so
    much (for single-device stages). ``max_replicas``: of each stage. ``stage_hints``: node id or name -> label; nodes with one
    label are kept in one stage, nodes with different labels in different stages. ``not_replicated``: ids or names of nodes
    whose stage stays on one device. Raises OptionError for a value out of range."""

    n_stages: int | None = None
    max_load_ratio: float | None = None
    max_replicas: int | None = None
    stage_hints: Mapping[NodeId, int | str] = field(default_factory=dict)
    not_replicated: tuple[NodeId, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n_stages", "max_replicas"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{name} is {value!r}; expected a whole number, at least 1")
        ratio = self.max_load_ratio
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio >= 1):
            raise OptionError(f"max_load_ratio is {ratio!r}; expected a number, at least 1 (all stages equal)")

    def labels(self, profile: Profile) -> dict[int, int | str]:
        """The label of each node that has one, by position in the profile."""
        return {node: label for key, label in self.stage_hints.items() for node in _nodes(profile, key)}

    def single(self, profile: Profile) -> set[int]:
        """Positions of the nodes whose stage is not replicated."""
        return {node for key in self.not_replicated for node in _nodes(profile, key)}


def _nodes(profile: Profile, key: NodeId) -> Iterable[int]:
    """Positions of the nodes with this id, or else with this name; several may share a name."""
    if key in profile.ids:
        return [profile.ids.index(key)]
    found = [node for node, name in enumerate(profile.names) if name == key]
    if not found:
        some = [*map(str, profile.ids[:8]), *(["..."] if profile.n_nodes > 8 else [])]
        raise OptionError(unknown("node", key, some))
    return found


def check_objective(objective: str) -> None:
    """Raises OptionError for an objective that the planner does not know."""
    if objective not in OBJECTIVES:
        raise OptionError(unknown("objective", objective, OBJECTIVES))
