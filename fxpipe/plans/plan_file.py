"""Plans as data and on disk: graphs in ``torch.export``'s JSON, everything else plain JSON, no weights, no code."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypedDict

import torch.fx as fx
from torch import Tensor, nn

import fxpipe.triton_kernels.ops  # noqa: F401  (registers the operators that the graphs call)
from fxpipe.costs.prediction import predicted_step
from fxpipe.errors import PlanError
from fxpipe.ir.compression import CompressionPlan
from fxpipe.ir.cost import CostTable
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import PassRecord, Program
from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.microbatch import Microbatches
from fxpipe.pipeline import Options
from fxpipe.plans.graph_file import graph_from_json, graph_to_json
from fxpipe.plans.model_digest import model_digest
from fxpipe.plans.plan_folder import AGAIN, read_folder, write_folder
from fxpipe.plans.planned import Planned
from fxpipe.plans.records import record_from
from fxpipe.plans.signature_json import signature_from_data, signature_to_data
from fxpipe.plans.stage_chain import put_together, taken_apart
from fxpipe.plans.tensor_json import tensors_from_data, tensors_to_data

ASPECTS = {
    "structure": "structure (modules, their settings, train or eval mode)",
    "parameters": "parameters (names, shapes, types, sharing, requires_grad)",
    "buffers": "buffers (names, shapes, types)",
    "code": "code (source of its classes)",
}
STAGE_TUPLES = ("received", "inputs", "outputs", "output_needs_grad", "received_needs_grad")


class PlanFields(TypedDict):
    """What a ``fxpipe.plans.plan.Plan`` is made of."""

    program: Program
    options: Options
    microbatches: Microbatches
    model: nn.Module
    digest: dict[str, str]
    constants: dict[str, Tensor]


def plan_dict(plan: Planned) -> dict[str, Any]:
    """What was decided, in JSON's types: for ``--json`` and for other programs."""
    step = predicted_step(plan)
    compression = asdict(plan.compression)
    return {
        "model": type(plan.model).__name__,
        "n_ranks": plan.schedule.n_ranks,
        "n_microbatches": plan.schedule.n_microbatches,
        "options": asdict(plan.options),
        **asdict(plan.partition),
        "schedule_name": plan.schedule.name,
        "stage_to_rank": list(plan.schedule.stage_to_rank),
        "schedule": plan.schedule.to_dict()["programs"],
        "predicted": {
            "step_seconds": step.makespan_seconds,
            "bubble": step.barrier_bubble,
            "peak_bytes": list(step.peak_bytes),
        },
        "raw_bytes": plan.compression.raw_bytes,
        "stored_bytes": plan.compression.stored_bytes,
        **compression,
        "passes": [asdict(record) for record in plan.program.log],
    }


def save_plan(plan: Planned, path: Path) -> None:
    """Writes the plan to the folder ``path``, whole or not at all; a plan that is there already is replaced.

    Raises:
        PlanError: something in the plan has no place in the format, ``path`` holds something else, or the disk refuses.
    """
    frame, chain = taken_apart(plan.program.graph_module)
    graphs = [("inputs", frame), *(pair for stage in plan.stages.stages for pair in _graphs_of(plan, stage))]
    data = {
        "model": type(plan.model).__name__,
        "digest": dict(plan.digest),
        "options": asdict(plan.options),
        "microbatches": asdict(plan.microbatches),
        "signature": signature_to_data(plan.program.signature),
        "partition": asdict(plan.partition),
        "schedule": plan.schedule.to_dict(),
        "compression": asdict(plan.compression),
        "stages": [_stage_to_data(stage) for stage in plan.stages.stages],
        "chain": chain,
        "log": [asdict(record) for record in plan.program.log],
    }
    files = {
        "plan.json": json.dumps(data, indent=1).encode(),
        "costs.json": plan.program.fact(CostTable).to_json().encode(),
        "constants.json": json.dumps(tensors_to_data(plan.constants)).encode(),
        **{_file_of(name): graph_to_json(graph) for name, graph in graphs},
    }
    write_folder(path, files)


def load_plan(path: Path, model: nn.Module) -> PlanFields:
    """Reads what ``save_plan`` wrote, for the same model.

    Raises:
        PlanError: a file is missing, cut short, altered or of another version, or the model has changed since; says which.
    """
    files = read_folder(path)
    with _naming(path / "plan.json"):
        data = json.loads(files["plan.json"])
    _check_model(path, data["digest"], model)
    with _naming(path / "constants.json"):
        constants = tensors_from_data(json.loads(files["constants.json"]))
    with _naming(path / "costs.json"):
        costs = CostTable.from_json(files["costs.json"].decode())
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    graphs = _read_graphs(path, files, {**constants, **dict(named)})
    with _naming(path / "plan.json"):
        facts = (
            costs,
            record_from(Partition, data["partition"], "partition"),
            Schedule.from_dict(data["schedule"]),
            LoweredStages(tuple(_stage_from_data(stage, graphs) for stage in data["stages"])),
            record_from(CompressionPlan, data["compression"], "compression"),
        )
        program = Program(
            put_together(graphs["inputs"], data["chain"], graphs).train(model.training),
            signature_from_data(data["signature"]),
            MappingProxyType({type(fact): fact for fact in facts}),
            tuple(record_from(PassRecord, record, "log") for record in data["log"]),
        )
        return PlanFields(
            program=program,
            options=record_from(Options, data["options"], "options"),
            microbatches=record_from(Microbatches, data["microbatches"], "microbatches"),
            model=model,
            digest=data["digest"],
            constants=constants,
        )


def _file_of(graph: str) -> str:
    return f"graphs/{graph}.json"


def _read_graphs(path: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> dict[str, fx.GraphModule]:
    graphs: dict[str, fx.GraphModule] = {}
    for name, text in files.items():
        if name.startswith("graphs/"):
            with _naming(path / name):
                graphs[PurePosixPath(name).stem] = graph_from_json(text, tensors)
    return graphs


def _graphs_of(plan: Planned, stage: StageGraphs) -> Iterator[tuple[str, fx.GraphModule]]:
    name = f"stage_{stage.index}"
    module = plan.program.graph_module.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    yield name, module
    yield f"{name}.forward", stage.forward.graph_module
    yield f"{name}.backward", stage.backward.graph_module


def _stage_to_data(stage: StageGraphs) -> dict[str, Any]:
    """All but the graphs, and the example outputs, which are those of the stage module."""
    return {
        "index": stage.index,
        "forward": _half_to_data(stage.forward),
        "backward": _half_to_data(stage.backward),
        **{name: list(getattr(stage, name)) for name in STAGE_TUPLES},
    }


def _half_to_data(half: HalfGraph) -> dict[str, list[str]]:
    return {"inputs": [str(b) for b in half.inputs], "outputs": [str(b) for b in half.outputs]}


def _stage_from_data(data: Mapping[str, Any], graphs: Mapping[str, fx.GraphModule]) -> StageGraphs:
    name = f"stage_{data['index']}"
    returned: Any = graphs[name].graph.output_node().args[0]
    return StageGraphs(
        index=data["index"],
        forward=_half_from_data(graphs[f"{name}.forward"], data["forward"]),
        backward=_half_from_data(graphs[f"{name}.backward"], data["backward"]),
        **{field: tuple(data[field]) for field in STAGE_TUPLES},
        example_outputs=tuple(value.meta["val"] for value in returned),
    )


def _half_from_data(graph: fx.GraphModule, data: Mapping[str, Any]) -> HalfGraph:
    inputs, outputs = (tuple(Binding.parse(text) for text in data[which]) for which in ("inputs", "outputs"))
    return HalfGraph(graph, inputs, outputs)


def _check_model(path: Path, made_for: Mapping[str, str], model: nn.Module) -> None:
    found = model_digest(model)
    changed = [ASPECTS.get(aspect, aspect) for aspect in found if found[aspect] != made_for.get(aspect)]
    if changed:
        raise PlanError(
            f"{path}: the model is not the one that the plan was made for: {type(model).__name__} differs in its "
            f"{', '.join(changed)}; give the model as it was, or {AGAIN}"
        )


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Turns whatever goes wrong while reading a whole file into a PlanError that names it."""
    try:
        yield
    except PlanError as e:
        raise PlanError(f"{place}: {e}; {AGAIN}") from e
    except Exception as e:  # whatever a reader may raise on data that fxpipe did not write
        raise PlanError(f"{place}: not what fxpipe writes ({type(e).__name__}: {e}); {AGAIN}") from e
