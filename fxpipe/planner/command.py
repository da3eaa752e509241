"""The command ``fxpipe partition``. Results go to standard output."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxpipe import units
from fxpipe.errors import OptionError
from fxpipe.ir.topology import Topology
from fxpipe.planner import report
from fxpipe.planner.partition import partition as partition_profile
from fxpipe.planner.profile import NodeId, Profile, read_profile
from fxpipe.planner.topology import read_topology


def partition(arguments: Namespace) -> None:
    """Reads a profile and a topology, prints the plan."""
    profile = read_profile(_json(arguments.profile))
    result = partition_profile(
        profile,
        _topology(arguments.topology, arguments.memory),
        arguments.objective,
        arguments.stages,
        arguments.max_load_ratio,
        max_replicas=arguments.max_replicas,
        stage_hints={_node(profile, node): hint for node, hint in arguments.stage_hint},
        not_replicated=[_node(profile, node) for node in arguments.not_replicated],
    )
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else report.report(result))


def _topology(text: str, memory: str | None) -> Topology:
    is_file = text.endswith(".json") or Path(text).is_file()
    topology = read_topology(_json(Path(text)) if is_file else text)
    return topology if memory is None else replace(topology, memory_bytes=units.parse_bytes(memory))


def _node(profile: Profile, text: str) -> NodeId:
    """A node as it is written on a command line: its id, where that is a number, or a text."""
    return int(text) if text.isdecimal() and int(text) in profile.ids else text


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON: {error}") from error
