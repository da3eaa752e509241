"""What each command of ``fxpipe`` does, given the parsed command line. Results go to standard output."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from fxpipe import printing, units
from fxpipe.ir.cost import COST_FIELDS, CostTable, NodeCost
from fxpipe.ir.program import Program
from fxpipe.model_source import load_model
from fxpipe.pass_base import Pass
from fxpipe.pass_manager import Dump, Pipeline
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.trace import trace


def show(arguments: Namespace) -> None:
    """The node table: type, operator, costs, place in the model."""
    program = _until(_pipeline(arguments), CostTable).run(_traced(arguments))
    costs = program.fact(CostTable)
    _print(arguments, json.loads(costs.to_json()), lambda: node_table(program.graph, costs))


def diff(arguments: Namespace) -> None:
    """The listing before and after each pass, as a unified diff."""
    found: list[dict[str, str]] = []

    def observe(step: Pass, before: Program, after: Program) -> None:
        if arguments.pass_name in (None, step.name):
            old, new = printing.listing(before.graph), printing.listing(after.graph)
            found.append({"pass": str(step), "diff": printing.diff(old, new, ("before", f"after {step}"))})

    pipeline = _pipeline(arguments)
    replace(pipeline, observers=(*pipeline.observers, observe)).run(_traced(arguments))
    _print(arguments, found, lambda: "\n".join(f["diff"] or f"{f['pass']}: changes no node" for f in found))


def passes(arguments: Namespace) -> None:
    """Every pass of the default pipeline, in order."""
    rows = [
        {
            "pass": step.name,
            "options": str(step),
            "requires": [fact.__name__ for fact in step.requires],
            "provides": [fact.__name__ for fact in step.provides],
            "numbers": "exact" if step.exact else "bounded",
        }
        for step in default_pipeline(Options()).passes
    ]
    cells = [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    _print(arguments, rows, lambda: printing.table(cells, list(rows[0])))


def node_table(graph: fx.Graph, costs: CostTable) -> str:
    """A line for each node that costs anything, and their sum."""
    rows = [
        [node.name, printing.type_of(node.meta["val"]), *_cost_cells(costs[node.name]), printing.module_path(node)]
        for node in graph.nodes
        if node.name in costs
    ]
    headers = ["node", "value", "operator", *(field.replace("_", " ") for field in COST_FIELDS), "module"]
    return printing.table(rows, headers)


def _cost_cells(cost: NodeCost) -> list[str]:
    return [cost.operator, *(_quantity(field, getattr(cost, field)) for field in COST_FIELDS)]


def _quantity(field: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)  # an expression over dynamic dimensions
    write = units.format_flops if "flops" in field else units.format_bytes if "bytes" in field else units.format_seconds
    return write(value) if value else ""


def _traced(arguments: Namespace) -> Program:
    source = load_model(arguments.model)
    return trace(source.model, source.args, source.kwargs, dynamic=dict(arguments.dynamic))


def _pipeline(arguments: Namespace) -> Pipeline:
    pipeline = default_pipeline(Options())
    if arguments.dump is None:
        return pipeline
    dump = Dump(arguments.dump, lambda program: printing.listing(program.graph))
    return replace(pipeline, observers=(*pipeline.observers, dump))


def _until(pipeline: Pipeline, fact: type) -> Pipeline:
    """The passes up to the one that provides ``fact``."""
    last = next(index for index, step in enumerate(pipeline.passes) if fact in step.provides)
    return replace(pipeline, passes=pipeline.passes[: last + 1])


def _print(arguments: Namespace, data: object, text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=1) if arguments.json else text())
