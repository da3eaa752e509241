"""Topologies as people write them: ``8@450GB/s x 4@50GB/s``, innermost level first, or as JSON.

The first level are the devices of a machine, each with its own link of 450 GB/s; the second the machines, each with an
uplink of 50 GB/s. ``8@450GB/s x 4@50GB/s, 80GB`` says the memory of each device as well.
"""

import re
from collections.abc import Mapping
from typing import Any

from fxpipe import units
from fxpipe.errors import OptionError
from fxpipe.ir.topology import Level, Topology

_LEVEL = re.compile(r"\s*(\d+)\s*@\s*(\S+)\s*")


def parse_topology(text: str, memory: str | int | None = None) -> Topology:
    """``"2@12GB/s x 4@1GB/s"`` -> 8 devices in 4 groups; ``memory`` of each device in bytes or as ``"80GB"``.

    Raises:
        OptionError: the text is no topology; says which part.
    """
    levels, comma, written = text.partition(",")
    if comma and memory is None:
        memory = written.strip()
    if isinstance(memory, str):
        memory = units.parse_bytes(memory)
    return Topology(tuple(_level(part, text) for part in re.split(r"\s+x\s+", levels.strip())), _memory(memory))


def read_topology(data: Mapping[str, Any] | str | Topology) -> Topology:
    """A topology as it is, from text, or from ``{"levels": [{"size", "bandwidth_bytes_per_second"}], "memory_bytes"}``.

    Raises:
        OptionError: something is missing, unknown or out of range; says at which level.
    """
    if isinstance(data, Topology):
        return data
    if isinstance(data, str):
        return parse_topology(data)
    if not isinstance(data, Mapping) or not isinstance(data.get("levels"), list | tuple) or not data["levels"]:
        raise OptionError('a topology is an object {"levels": [...], "memory_bytes": ...}; found no list of levels')
    levels = tuple(_level_from(k, level) for k, level in enumerate(data["levels"]))
    return Topology(levels, _memory(data.get("memory_bytes")))


def topology_dict(topology: Topology) -> dict[str, Any]:
    """The JSON object that ``read_topology`` reads."""
    levels = [{"size": v.size, "bandwidth_bytes_per_second": v.bandwidth_bytes_per_second} for v in topology.levels]
    return {"levels": levels, "memory_bytes": topology.memory_bytes}


def topology_text(topology: Topology) -> str:
    """``8@450 GB/s x 4@50.0 GB/s``, and the memory where it is limited."""
    levels = (f"{v.size}@{units.format_bytes_per_second(v.bandwidth_bytes_per_second)}" for v in topology.levels)
    memory = "" if topology.memory_bytes is None else f", {units.format_bytes(topology.memory_bytes)}"
    return " x ".join(levels) + memory


def check_n_devices(topology: Topology, n_ranks: int) -> None:
    """Raises OptionError where the sizes of the levels do not multiply to the number of ranks."""
    if topology.n_devices != n_ranks:
        sizes = " x ".join(str(level.size) for level in topology.levels)
        raise OptionError(f"the topology has {sizes} = {topology.n_devices} devices, but there are {n_ranks} ranks")


def _level(part: str, text: str) -> Level:
    match = _LEVEL.fullmatch(part)
    if match is None:
        raise OptionError(
            f"{part.strip()!r} in topology {text!r} is no level; write SIZE@BANDWIDTH, innermost first, "
            f"such as 8@450GB/s x 4@50GB/s"
        )
    return Level(int(match[1]), units.parse_bytes_per_second(match[2]))


def _level_from(k: int, data: Any) -> Level:
    if not isinstance(data, Mapping):
        raise OptionError(
            f"topology level {k} is {data!r}; expected an object with size and bandwidth_bytes_per_second"
        )
    values = []
    for field, kinds in (("size", int), ("bandwidth_bytes_per_second", int | float)):
        value = data.get(field)
        if not isinstance(value, kinds) or isinstance(value, bool):
            found = repr(value) if field in data else "missing"
            raise OptionError(f"topology level {k}: {field} is {found}; expected a number more than 0")
        values.append(value)
    return Level(values[0], float(values[1]))


def _memory(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise OptionError(f"the memory of a device is {value!r}; expected a number of bytes, more than 0, or nothing")
    return int(value)
