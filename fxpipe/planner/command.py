"""The command ``fxpipe partition``. Results go to standard output."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxpipe import units
from fxpipe.errors import OptionError
from fxpipe.ir.topology import Topology
from fxpipe.planner import explain, report
from fxpipe.planner.partition import Result, partition as partition_profile
from fxpipe.planner.profile import NodeId, Profile, read_profile
from fxpipe.planner.topology import read_topology


def partition(arguments: Namespace) -> None:
    """Reads a profile and a topology, prints the plan."""
    profile = read_profile(_json(arguments.profile))
    result = partition_profile(
        profile,
        topology_of(arguments.topology, arguments.memory),
        arguments.objective,
        arguments.stages,
        arguments.max_load_ratio,
        max_replicas=arguments.max_replicas,
        stage_hints={_node(profile, node): hint for node, hint in arguments.stage_hint},
        not_replicated=[_node(profile, node) for node in arguments.not_replicated],
    )
    show(arguments, result)


def show(arguments: Namespace, result: Result, title: str = "") -> None:
    """Prints a plan, with what ``--sweep`` and ``--explain`` ask for, as a page, under its title if any, or as JSON."""
    swept = explain.sweep(result) if arguments.sweep else []
    if arguments.json:
        data = result.to_dict()
        data |= {"sweep": [answer.to_dict() for answer in swept]} if arguments.sweep else {}
        data |= {} if arguments.explain is None else {"explanation": explain.answers_dict(result, arguments.explain)}
        print(json.dumps(data, indent=1))
        return
    parts = [f"{title}\n{report.report(result)}" if title else report.report(result)]
    parts += [f"Fewer workers\n\n{explain.sweep_table(swept)}"] if arguments.sweep else []
    parts += [] if arguments.explain is None else [explain.explanation(result, arguments.explain)]
    print("\n\n".join(parts))


def topology_of(text: str, memory: str | None) -> Topology:
    """The topology of this text, or in the file of this name, with so much memory on each device where that is given."""
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
