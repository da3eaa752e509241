"""What each command of ``fxpipe`` does, given the parsed command line. Results go to standard output."""

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxpipe import format_page, printing, units
from fxpipe.api import compile, trace_microbatch
from fxpipe.costs.layer_profile import layer_hints, layer_profile
from fxpipe.costs.profile import load_profile, measured_costs, save_profile
from fxpipe.costs.stage_costs import costs_as_trained
from fxpipe.cuts.cut_rules import cut_rules
from fxpipe.cuts.stage_hints import hints_text, marked, parse_hints
from fxpipe.demo import run_demo
from fxpipe.errors import FormatError, OptionError, unknown
from fxpipe.ir.cost import COST_FIELDS, CostTable, NodeCost
from fxpipe.ir.program import Program
from fxpipe.launch import Job, Result, run as launch
from fxpipe.model_source import Source, load_model
from fxpipe.other_sizes import AskedSize, trace_at
from fxpipe.pass_base import Pass
from fxpipe.pass_manager import Dump, Observer, Pipeline
from fxpipe.pipeline import PASSES, Options, default_pipeline
from fxpipe.plans.plan import Plan
from fxpipe.trace import trace
from fxpipe.triton_kernels.format import BFPFormat

LEARNS_TEXT = ("demo:gpt", "demo:llama")
"""Models that take characters: they learn real text, the others their example inputs over and over."""


def show(arguments: Namespace) -> None:
    """The node table: value, operator, costs, place in the model."""
    source, options = load_model(arguments.model), _options(arguments)
    pipeline = default_pipeline(options, _costs(arguments, options, source), _observers(arguments))
    traced = _traced_at(arguments, source) if arguments.at else trace(*source, dynamic=dict(arguments.dynamic))
    program = _until(pipeline, CostTable).run(traced)
    costs = program.fact(CostTable)
    costs = costs.at(program.signature.sizes) if arguments.at else costs
    _print(arguments, json.loads(costs.to_json()), lambda: node_table(program.graph, costs))


def _traced_at(arguments: Namespace, source: Source) -> Program:
    """The model with inputs of the sizes that ``--at`` asks for."""
    if arguments.measured or arguments.profile is not None:
        raise OptionError(
            "measured times hold for the example's sizes alone; leave --at out, or --measured and --profile"
        )
    if getattr(arguments, "dynamic", None):
        raise OptionError("--dynamic leaves sizes open and --at gives them; leave one out")
    return trace_at(*source, [AskedSize(*one) for one in arguments.at])


def plan(arguments: Namespace) -> None:
    """Stages, schedule and save points; ``--save`` writes the plan as well. With a topology: stages on its devices."""
    if arguments.topology is not None or arguments.sweep or arguments.explain is not None:
        _show_placed(arguments)
        return
    if arguments.at:
        raise OptionError(
            "a plan that runs is made for its example inputs; give --at with --topology, --sweep or --explain"
        )
    made = _compiled(arguments)
    if arguments.save is not None:
        made.save(arguments.save)
    _print(arguments, made.to_dict(), lambda: str(made))


def _show_placed(arguments: Namespace) -> None:
    """The planner's answer for one microbatch of the model, replicas allowed: what a cluster would do, not run here."""
    from fxpipe.planner import command, partition, topology as topologies

    if arguments.save is not None:
        raise OptionError("a plan with --topology, --sweep or --explain is not one to run; leave --save out")
    asked = {**vars(arguments), "objective": "time"}
    source, options = load_model(arguments.model), _options(Namespace(**asked))
    topology = command.topology_of(arguments.topology or f"{options.n_ranks}@{options.bandwidth}", options.memory)
    if "n_ranks" in arguments:
        topologies.check_n_devices(topology, options.n_ranks)
    pipeline = default_pipeline(options, _costs(arguments, options, source), _observers(arguments))
    traced = _traced_at(arguments, source) if arguments.at else trace_microbatch(*source, options.n_microbatches)[0]
    program = _until(pipeline, CostTable).run(traced)
    rate = min(level.bandwidth_bytes_per_second for level in topology.levels)
    rules = cut_rules(
        program, program.fact(CostTable), rate, {**marked(source.model), **parse_hints(hints_text(options.stage_hints))}
    )
    profile = layer_profile(rules)
    objective = getattr(arguments, "objective", options.objective)
    placed = partition.partition(profile, topology, objective, stage_hints=layer_hints(rules, profile))
    costs = program.fact(CostTable)
    command.show(arguments, placed, f"{arguments.model}, one microbatch, {costs.source} on {costs.device}")


def diff(arguments: Namespace) -> None:
    """The listing before and after each pass, as a unified diff."""
    if arguments.pass_name is not None and arguments.pass_name not in PASSES:
        raise OptionError(unknown("pass", arguments.pass_name, PASSES))
    found: list[dict[str, str]] = []

    def observe(step: Pass, before: Program, after: Program) -> None:
        if arguments.pass_name in (None, step.name):
            old, new = printing.program_listing(before), printing.program_listing(after)
            found.append({"pass": str(step), "diff": printing.diff(old, new, ("before", f"after {step}"))})

    _compiled(arguments, observe)
    _print(arguments, found, lambda: "\n".join(f["diff"] or f"{f['pass']}: changes no node" for f in found))


def run(arguments: Namespace) -> None:
    """Plans here, trains in one process for each rank under torchrun, prints the losses."""
    made = _compiled(arguments)
    with tempfile.TemporaryDirectory(prefix="fxpipe-") as folder:
        made.save(Path(folder) / "plan")
        job = Job(
            model=arguments.model,
            options={},
            steps=arguments.steps,
            arguments={},
            plan=str(Path(folder) / "plan"),
            text=arguments.model in LEARNS_TEXT,
            label=f"{arguments.model}, {made.options.n_ranks} ranks",
        )
        result = launch(job, made.options.n_ranks)
    _print(
        arguments,
        {"model": arguments.model, "n_ranks": made.options.n_ranks, **asdict(result)},
        lambda: _losses(result),
    )


def _losses(result: Result) -> str:
    rows = [[step, f"{loss:.6f}"] for step, loss in enumerate(result.losses, 1)]
    bubble = "" if result.bubble is None else f", bubble {100 * result.bubble:.1f} %"
    return f"{printing.table(rows, ['step', 'loss'])}\nstep {units.format_seconds(result.step_seconds)}{bubble}"


def demo(arguments: Namespace) -> None:
    """Trains a small GPT on two ranks and in one plain process, and sets the two side by side."""
    folder = Path.cwd() / "fxpipe-demo" if arguments.dump is None else arguments.dump
    folder.mkdir(parents=True, exist_ok=True)
    report, text = run_demo(arguments.steps, folder)
    _print(arguments, asdict(report), lambda: text)


def passes(arguments: Namespace) -> None:
    """Every pass: its options with their defaults, what it requires and provides, whether numbers stay the same."""
    rows = [
        {
            "pass": kind.name,
            "options": {option.name: _default(option) for option in fields(kind) if option.repr},
            "requires": [fact.__name__ for fact in kind.requires],
            "provides": [fact.__name__ for fact in kind.provides],
            "numbers": "exact" if kind.exact else "bounded",
        }
        for kind in PASSES.values()
    ]
    _print(arguments, rows, lambda: printing.table([_pass_cells(row) for row in rows], list(rows[0])))


def formats(arguments: Namespace) -> None:
    """The family of formats, or those asked for, each drawn bit by bit."""
    try:
        rows = format_page.rows(arguments.formats or list(format_page.FAMILY))
    except ValueError as error:
        raise FormatError(str(error)) from error
    drawings = [format_page.drawing(BFPFormat.parse(text)) for text in arguments.formats]
    _print(arguments, rows, lambda: "\n\n".join([format_page.table(rows), *drawings]))


def _default(option: Field[Any]) -> object:
    return None if option.default is MISSING else option.default


def _pass_cells(row: dict[str, Any]) -> list[str]:
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return [row["pass"], options, ", ".join(row["requires"]), ", ".join(row["provides"]), row["numbers"]]


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


def _compiled(arguments: Namespace, *observers: Observer) -> Plan:
    source, options = load_model(arguments.model), _options(arguments)
    costs = _costs(arguments, options, source)
    observers = (*_observers(arguments), *observers)
    return compile(source.model, (source.args, source.kwargs), options, costs=costs, observers=observers)


def _options(arguments: Namespace) -> Options:
    """What the command line asks for; the rest keeps its default."""
    return Options.from_mapping({f.name: getattr(arguments, f.name) for f in fields(Options) if f.name in arguments})


def _observers(arguments: Namespace) -> tuple[Observer, ...]:
    if arguments.dump is None:
        return ()
    return (Dump(arguments.dump, printing.program_listing),)


def _costs(arguments: Namespace, options: Options, source: Source) -> CostTable | None:
    """The costs of one microbatch, measured, where that is asked for; else None."""
    if not arguments.measured and arguments.profile is None:
        return None
    program, microbatches = trace_microbatch(*source, options.n_microbatches)
    graph_module = _before(default_pipeline(options), CostTable).run(program).graph_module
    if arguments.profile is not None and arguments.profile.exists():
        return load_profile(arguments.profile, graph_module)
    if program.signature.loss_index is None:
        tensors = [leaf for leaf in tree_leaves((source.args, source.kwargs)) if isinstance(leaf, Tensor)]
        costs = measured_costs(graph_module, microbatches.split(tensors)[0])
    else:
        costs = costs_as_trained(*source, options.n_microbatches)
    if arguments.profile is not None:
        save_profile(costs, graph_module, arguments.profile)
    return costs


def _before(pipeline: Pipeline, fact: type) -> Pipeline:
    """The passes that run before the one that provides ``fact``."""
    return replace(pipeline, passes=pipeline.passes[: _provider(pipeline, fact)])


def _until(pipeline: Pipeline, fact: type) -> Pipeline:
    """The passes up to the one that provides ``fact``."""
    return replace(pipeline, passes=pipeline.passes[: _provider(pipeline, fact) + 1])


def _provider(pipeline: Pipeline, fact: type) -> int:
    return next(index for index, step in enumerate(pipeline.passes) if fact in step.provides)


def _print(arguments: Namespace, data: object, text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=1) if arguments.json else text())
