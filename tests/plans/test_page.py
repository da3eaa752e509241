from dataclasses import replace
from functools import cache

import pytest
from models import build

import fxpipe
from fxpipe.costs.prediction import predicted_step, stage_times
from fxpipe.ir.program import PassRecord
from fxpipe.plans.page import _span


@cache
def plan_of(name, n_ranks=2, n_microbatches=4, format=None, **sizes):
    model, args, kwargs = build(name, **sizes)
    options = fxpipe.Options(n_ranks=n_ranks, n_microbatches=n_microbatches, format=format, min_bytes=256)
    return fxpipe.compile(model, (args, kwargs), options)


def page_without_times_of_passes(plan):
    """Everything else on the page is computed, so it is the same on every run."""
    log = tuple(PassRecord(record.text, 0.001 * (i + 1), record.n_nodes) for i, record in enumerate(plan.program.log))
    return str(replace(plan, program=replace(plan.program, log=log)))


def test_page_of_a_small_model(golden):
    golden("page.txt", page_without_times_of_passes(plan_of("mlp", format="bfp4b32", batch=64, width=64)))


def test_page_of_one_rank_that_keeps_everything():
    lines = page_without_times_of_passes(plan_of("mlp", 1, 1)).splitlines()
    assert lines[0] == "Mlp: 1 rank, batch of 16 in 1 microbatch of 16, schedule 1f1b, activations stored as they are"
    assert "rank 0 | 0F0 0B0" in lines
    assert any(line.startswith("Save points, for one microbatch: ") and line.endswith("(100.0%)") for line in lines)


def test_modules_of_a_stage_are_named_as_large_as_they_lie_in_it():
    lines = str(plan_of("gpt", n_layers=3, width=32, length=16)).splitlines()
    stages = lines[lines.index("Stages, for one microbatch") + 3 :][:2]
    first, second = (line.split("  ") for line in stages)
    assert any(cell.startswith("transformer.wte - ..h.1") for cell in first)
    assert any(cell.startswith("transformer.h.1") and cell.endswith(" - lm_head") for cell in second)


def test_tied_parameters_are_told():
    assert "Tied: lm_head.weight is kept by stage 0 and read by stages 0, 1." in str(
        plan_of("gpt", n_layers=3, width=32, length=16)
    )


@pytest.mark.parametrize(
    ("first", "last", "shown"),
    [
        ("head", "head", "head"),
        ("wte", "head", "wte - head"),
        ("model.wte", "model.h.1", "model.wte - ..h.1"),
        ("model.h.0", "model.h.11", "model.h.0 - ..h.11"),
        ("stem", "blocks.1", "stem - blocks.1"),
        ("model.embed", "model.layers.0.mlp.gate_projection", "model.embed - ..layers.0.mlp"),
        ("model.layers.0.attention.out", "model.layers.0.feed_forward.up", "model.layers.0"),
        ("a" * 30, "b" * 30, "a" * 30 + " - " + "b" * 30),
    ],
)
def test_spans_of_modules_are_short(first, last, shown):
    assert _span(first, last) == shown


@pytest.mark.parametrize(("name", "n_ranks", "n_microbatches"), [("mlp", 1, 1), ("mlp", 2, 16), ("cnn", 2, 2)])
def test_a_page_fits_a_wide_terminal(name, n_ranks, n_microbatches):
    assert max(map(len, str(plan_of(name, n_ranks, n_microbatches)).splitlines())) <= 120


def test_stage_times_are_those_of_the_plan():
    plan = plan_of("mlp", format="bfp4b32", batch=64, width=64)
    times = stage_times(plan)
    stages = plan.partition.stages
    assert [s.forward_seconds for s in times.stages] == [s.forward_seconds for s in stages]
    assert [s.backward_seconds for s in times.stages] == [s.backward_seconds for s in stages]
    assert sum(s.in_flight_bytes for s in times.stages) == plan.compression.stored_bytes
    assert [s.static_bytes for s in times.stages] == [2 * s.parameter_bytes for s in stages]
    assert [cut.bytes_per_second for cut in times.cuts] == [10e9]
    sent = 16 * 64 * 4  # rows of a microbatch x width x float32, and its gradient back
    assert [(cut.activation_bytes, cut.gradient_bytes) for cut in times.cuts] == [(sent, sent)]


def test_buffers_count_once_and_parameters_with_their_gradients():
    plan = plan_of("cnn", 1, 1)
    model_bytes = sum(p.nbytes for p in plan.model.parameters())
    buffer_bytes = sum(b.nbytes for b in plan.model.buffers())
    assert stage_times(plan).stages[0].static_bytes == 2 * model_bytes + buffer_bytes


def test_the_predicted_step_runs_the_whole_schedule():
    plan = plan_of("mlp", 2, 16)
    step = predicted_step(plan)
    assert [len(step.computes(rank)) for rank in range(2)] == [32, 32]
    assert step.makespan_seconds > 16 * max(s.forward_seconds + s.backward_seconds for s in plan.partition.stages)
