"""compress-save-points on the test models: forward is untouched, gradients are near, memory is what the plan says."""

import operator

import pytest
import torch
from models import MODELS
from stages import assert_same, compressed, eager, lowered, relative_error, run

from fxpipe.errors import VerifyError
from fxpipe.ir.compression import CompressionPlan, SavePoint
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.passes.compress import CompressSavePoints, compress_halves
from fxpipe.saves.value_facts import view_source
from fxpipe.triton_kernels import ops  # noqa: F401  (registers the operators)
from fxpipe.triton_kernels.format import WIDTHS

COMPRESS = torch.ops.fxpipe.bfp_compress.default
DECOMPRESS = torch.ops.fxpipe.bfp_decompress.default
aten, prims, fxpipe = torch.ops.aten, torch.ops.prims, torch.ops.fxpipe
STORE = {fxpipe.pack_bools.default, aten.permute.default, aten.eq.Scalar, aten.le.Scalar}
RESTORE = {
    fxpipe.unpack_bools.default, aten.permute.default, aten.full.default, aten.where.self, aten.logical_not.default,
    prims.convert_element_type.default,
}  # fmt: skip
"""Of exact forms."""

BOUNDS = {
    "bfp4b32": 0.25,
    "bfp8b32": 0.02,
}  # of all gradients together, for the demos; a step of 8 bits is a 16th of that of 4
SEVERAL_USES = {"t5": ["shared.weight"]}


def halves(program):
    return [(s.forward.graph_module.graph, s.backward.graph_module.graph) for s in program.fact(LoweredStages).stages]


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_untouched_and_gradients_are_near(name):
    expected, errors = eager(name), []
    for format, bound in BOUNDS.items():
        found, _ = run(name, compressed(name, format))
        assert torch.equal(found.loss, expected.loss)
        assert found.buffers.keys() == expected.buffers.keys()
        assert all(torch.equal(b, found.buffers[n]) for n, b in expected.buffers.items())
        errors.append(relative_error(found, expected))
        assert 0 < errors[-1] < bound
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("name", ["cnn", "tied"])
@pytest.mark.parametrize("block", [8, 128])
def test_no_format_changes_a_forward_output(name, block):
    expected, errors = eager(name), []
    for width in WIDTHS:
        found, _ = run(name, compressed(name, f"bfp{width}b{block}"))
        assert torch.equal(found.loss, expected.loss)
        assert all(torch.equal(b, found.buffers[n]) for n, b in expected.buffers.items())
        errors.append(relative_error(found, expected))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_says_what_is_held(name):
    for program in (lowered(name), compressed(name)):
        plan = program.fact(CompressionPlan)
        _, runners = run(name, program)
        for index, runner in enumerate(runners):
            assert runner.saved_bytes == sum(p.stored_bytes for p in plan.of_stage(index)) > 0
    assert plan.stored_bytes < 0.5 * plan.raw_bytes
    assert plan.raw_bytes == sum(p.raw_bytes for p in lowered(name).fact(CompressionPlan).save_points)


@pytest.mark.parametrize("name", MODELS)
def test_compress_comes_right_after_the_last_use(name):
    for forward, _ in halves(compressed(name)):
        nodes = list(forward.nodes)
        for at, node in enumerate(nodes):
            if node.target is not COMPRESS:
                continue
            value = node.args[0]
            shown = {value}
            for other in nodes:
                if view_source(other) in shown:
                    shown.add(other)
            users = {u for v in shown for u in v.users if u.op != "output" and u.target is not COMPRESS}
            last = max([nodes.index(u) for u in users] or [nodes.index(value)])
            assert last < at
            between = {n.target for n in nodes[last + 1 : at]}
            assert between <= {
                COMPRESS,
                operator.getitem,
                *STORE,
            }  # of other values that are done with at the same place
            assert value not in forward.output_node().args[0] or value.op == "placeholder" or is_sent(forward, value)


def is_sent(forward, value):
    """Returned to the next stage, which is another matter than saved."""
    return forward.output_node().args[0].count(value) == 1


@pytest.mark.parametrize("name", MODELS)
def test_decompress_comes_right_before_the_first_use(name):
    for _, backward in halves(compressed(name)):
        nodes = list(backward.nodes)
        for at, node in enumerate(nodes):
            if node.target is DECOMPRESS:
                first = min(nodes.index(u) for u in node.users)
                assert {n.target for n in nodes[at + 1 : first]} <= {DECOMPRESS, *RESTORE}


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_the_nodes_are_named_after_the_value_and_know_its_place(name):
    for (forward, backward), (old, _) in zip(halves(compressed(name)), halves(lowered(name)), strict=True):
        before = {n.name: n for n in old.nodes}
        for node in forward.nodes:
            if node.target is COMPRESS:
                value = before[node.name.removeprefix("compress_")]
                assert node.meta.get("nn_module_stack") == value.meta.get("nn_module_stack")
                assert node.meta.get("stack_trace") == value.meta.get("stack_trace")
                (decompress,) = [n for n in backward.nodes if n.name == f"decompress_{value.name}"]
                found, expected = decompress.meta["val"], value.meta["val"]
                assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_the_given_program_is_not_changed():
    program = lowered("mlp")
    before = [g.__str__() for pair in halves(program) for g in pair]
    compressed("mlp", "bfp3b64")
    assert [g.__str__() for pair in halves(program) for g in pair] == before
    found, _ = run("mlp", program)
    assert_same(found, eager("mlp"))


def test_without_a_format_nothing_changes():
    program = CompressSavePoints().run(lowered("gpt"))
    assert all(n.target is not COMPRESS for forward, _ in halves(program) for n in forward.nodes)
    found, _ = run("gpt", program)
    assert_same(found, eager("gpt"))


def test_a_plan_that_names_a_value_that_is_not_saved():
    stage = lowered("mlp").fact(LoweredStages).stages[0]
    point = SavePoint(0, "relu_9", "aten.relu.default", "float32", (4,), 16, 8, "compress", "bfp4b32", "")
    forward, backward = stage.forward.graph_module, stage.backward.graph_module
    n_outputs = sum(b.kind != "saved" for b in stage.forward.outputs)
    with pytest.raises(
        VerifyError, match="the compression plan names 'relu_9', which forward does not save; it saves primals"
    ):
        compress_halves(forward, backward, n_outputs, [point])
