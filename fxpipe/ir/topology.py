"""Devices and the links between them, as a tree of equal groups."""

from dataclasses import dataclass

from fxpipe.errors import OptionError


@dataclass(frozen=True)
class Level:
    """One level of a hierarchy of links: ``size`` children, each with an uplink of this bandwidth."""

    size: int
    bandwidth_bytes_per_second: float


@dataclass(frozen=True)
class Topology:
    """Levels of links, innermost first, and the memory of each device (``None``: not limited)."""

    levels: tuple[Level, ...]
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for k, level in enumerate(self.levels):
            if level.size < 1:
                raise OptionError(f"topology level {k} has size {level.size}; expected at least 1")
            if not level.bandwidth_bytes_per_second > 0:
                raise OptionError(
                    f"topology level {k} has bandwidth {level.bandwidth_bytes_per_second}; expected more than 0"
                )

    @property
    def n_devices(self) -> int:
        """The product of the sizes of all levels."""
        total = 1
        for level in self.levels:
            total *= level.size
        return total

    def bandwidth_bytes_per_second(self, a: int, b: int) -> float:
        """The slowest uplink on the way between devices ``a`` and ``b``; infinite within one device."""
        slowest = float("inf")
        for level in self.levels:
            if a == b:
                break
            slowest = min(slowest, level.bandwidth_bytes_per_second)
            a, b = a // level.size, b // level.size
        return slowest
