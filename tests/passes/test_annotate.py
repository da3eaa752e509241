"""annotate-costs: exact numbers with the arithmetic in view, and autograd's own hooks as the oracle for saved bytes."""

from unittest.mock import Mock

import pytest
import sympy
import torch
import torch.nn.functional as F
from models import build
from torch import nn

from fxpipe.costs.cost_model import modelled_costs
from fxpipe.costs.devices import device
from fxpipe.costs.probe import probe
from fxpipe.errors import OptionError, VerifyError
from fxpipe.ir.cost import CostTable
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.trace import trace

H100 = device("H100")


class Function(nn.Module):
    """A model of one function over its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def costs(model, *inputs, dynamic=None, on=H100):
    return modelled_costs(trace(model, inputs, dynamic=dynamic).graph_module, on)


def leaf(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def only(table, operator):
    (found,) = [n for n in table.nodes if n.operator == operator]
    return found


def test_linear():
    table = costs(nn.Linear(16, 32), leaf(8, 16))
    row = only(table, "aten.linear.default")
    assert row.flops == 2 * 8 * 16 * 32
    assert row.backward_flops == 2 * (2 * 8 * 16 * 32)  # one product for the input's gradient, one for the weight's
    assert row.bytes_read == 4 * (8 * 16 + 32 * 16 + 32)
    assert row.bytes_written == row.output_bytes == 4 * 8 * 32
    assert row.parameter_bytes == 4 * (32 * 16 + 32)
    assert row.saved_bytes == 0  # it keeps its input and its weight, which came with the program
    moved = 4 * (8 * 16 + 32 * 16 + 32) + 4 * 8 * 32
    assert row.forward_seconds == max(8192 / 67e12, moved / 3.35e12) + 4e-6
    # backward reads the output's gradient, the input and the weight, and writes three gradients
    backward = 4 * (8 * 32 + 8 * 16 + 32 * 16) + 4 * (8 * 16 + 32 * 16 + 32)
    assert row.backward_seconds == max(16384 / 67e12, backward / 3.35e12) + 3 * 4e-6


def test_arithmetic_bounds_the_seconds_of_a_large_product():
    x, w = leaf(4096, 4096, dtype=torch.bfloat16), leaf(4096, 4096, dtype=torch.bfloat16)
    row = only(costs(Function(lambda x, w: x @ w), x, w), "aten.matmul.default")
    assert row.flops == 2 * 4096**3
    assert row.forward_seconds == 2 * 4096**3 / 989e12 + 4e-6  # the rate of bfloat16
    assert row.backward_seconds == 2 * (2 * 4096**3) / 989e12 + 2 * 4e-6


def test_an_input_without_gradient_has_no_backward_product():
    row = only(costs(nn.Linear(16, 32), torch.zeros(8, 16)), "aten.linear.default")
    assert row.backward_flops == 2 * 8 * 16 * 32  # the weight's only


def test_convolution():
    table = costs(nn.Conv2d(3, 8, 3, padding=1), leaf(4, 3, 10, 10))
    row = only(table, "aten.conv2d.default")
    assert row.flops == 2 * (4 * 10 * 10) * 8 * (3 * 3 * 3)
    assert row.backward_flops == 2 * row.flops
    assert row.parameter_bytes == 4 * (8 * 3 * 3 * 3 + 8)
    assert row.output_bytes == 4 * (4 * 8 * 10 * 10)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_fused_attention_on_cpu_counts_like_any_other():
    q, k, v = (leaf(2, 4, 16, 8) for _ in range(3))
    row = only(costs(Function(attention), q, k, v), "aten.scaled_dot_product_attention.default")
    product = 2 * (2 * 4) * 16 * 16 * 8
    assert row.flops == 2 * product
    assert row.backward_flops == 5 * product  # the scores once more, and four products for three gradients
    assert row.saved_bytes == 4 * (2 * 4 * 16 * 8) + 4 * (2 * 4 * 16)  # its output, and log-sum-exp inside


def test_layer_norm_keeps_mean_and_rstd_inside():
    row = only(costs(nn.LayerNorm(32), leaf(4, 8, 32)), "aten.layer_norm.default")
    assert row.flops == row.backward_flops == 0
    assert row.saved_bytes == 2 * 4 * (4 * 8)
    assert row.bytes_read == 4 * (4 * 8 * 32 + 2 * 32)
    assert row.bytes_written == 4 * (4 * 8 * 32) + 2 * 4 * (4 * 8)
    assert row.parameter_bytes == 4 * 2 * 32


def test_dropout_keeps_its_mask_inside():
    row = only(costs(nn.Dropout(0.5), leaf(8, 16)), "aten.dropout.default")
    assert row.saved_bytes == 4 * 8 * 16  # a float mask: the CPU's dropout multiplies by it
    assert row.bytes_written == 4 * 8 * 16 + row.saved_bytes


def test_dropout_in_eval_mode_is_nothing():
    row = only(costs(nn.Dropout(0.5).eval(), leaf(8, 16)), "aten.dropout.default")
    assert (row.bytes_read, row.bytes_written, row.saved_bytes, row.forward_seconds) == (0, 0, 0, 0.0)


def test_embedding_reads_the_rows_it_looks_up():
    row = only(costs(nn.Embedding(1000, 16), torch.zeros(2, 5, dtype=torch.int64)), "aten.embedding.default")
    assert row.bytes_read == 4 * (2 * 5 * 16) + 8 * (2 * 5)
    assert row.bytes_written == 4 * (2 * 5 * 16)
    assert row.parameter_bytes == 4 * 1000 * 16
    written = 4 * 1000 * 16  # backward writes a dense gradient
    assert row.backward_seconds == (4 * (2 * 5 * 16) + 8 * (2 * 5) + written) / 3.35e12 + 4e-6


def test_views_cost_nothing_and_pass_their_gradient_on():
    table = costs(Function(lambda x: x.view(16, 8).transpose(0, 1).unsqueeze(0)), leaf(8, 16))
    for row in table.nodes:
        assert (row.bytes_read, row.bytes_written, row.saved_bytes) == (0, 0, 0)
        assert (row.forward_seconds, row.backward_seconds) == (0.0, 0.0)
        assert row.output_bytes == 4 * 8 * 16


def test_split_is_free_forward_and_joins_gradients_backward():
    table = costs(Function(lambda x: sum(x.split(4, dim=1))), leaf(8, 12))
    split = only(table, "aten.split.Tensor")
    assert split.forward_seconds == 0.0
    assert split.output_bytes == 4 * 8 * 12
    assert split.backward_seconds == 2 * (4 * 8 * 12) / 3.35e12 + 4e-6  # reads three gradients, writes one
    parts = [n for n in table.nodes if n.operator == "getitem"]
    assert [n.output_bytes for n in parts] == [4 * 8 * 4] * 3
    assert [n.backward_seconds for n in parts] == [0.0] * 3


def test_an_expanded_dimension_is_read_once():
    row = only(costs(Function(lambda x, y: x.expand(8, 16) + y), leaf(1, 16), leaf(8, 16)), "aten.add.Tensor")
    assert row.bytes_read == 4 * (16 + 8 * 16)


def test_a_tensor_passed_twice_is_read_and_kept_once():
    table = costs(Function(lambda x: (x + 1) * (x + 1)), leaf(8, 16))
    twice = costs(Function(lambda x: (y := x + 1) * y), leaf(8, 16))
    assert sum(n.saved_bytes for n in table.nodes) == 2 * 4 * 8 * 16
    assert sum(n.saved_bytes for n in twice.nodes) == 4 * 8 * 16
    assert only(twice, "aten.mul.Tensor").bytes_read == 4 * 8 * 16


def test_two_views_of_one_storage_are_kept_once_by_its_maker():
    def two_views(x):
        y = x.exp()  # keeps its output, which both products keep too
        return y.view(16, 8).sin().sum() + y.t().cos().sum()

    table = costs(Function(two_views), leaf(8, 16))
    assert {n.operator: n.saved_bytes for n in table.nodes if n.saved_bytes} == {"aten.exp.default": 4 * 8 * 16}


def test_in_place_operators_write_their_argument():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True))
    table = costs(model, leaf(8, 16))
    relu = only(table, "aten.relu_.default")
    assert relu.bytes_read == relu.bytes_written == 4 * 8 * 16
    assert relu.saved_bytes == 0
    assert only(table, "aten.linear.default").saved_bytes == 4 * 8 * 16  # relu_ keeps it, linear made it
    assert relu.backward_seconds > 0


def test_a_value_written_into_a_plain_tensor_makes_it_differentiable():
    def write(x):
        y = torch.zeros(8, 16)
        y[:, 1:] = x
        return y.sin()

    sin = only(costs(Function(write), leaf(8, 15)), "aten.sin.default")
    assert sin.backward_seconds == 3 * (4 * 8 * 16) / 3.35e12 + 4e-6


def test_buffers_are_not_kept_and_not_parameters():
    table = costs(nn.BatchNorm2d(3), leaf(4, 3, 5, 5))
    row = only(table, "aten.batch_norm.default")
    assert row.parameter_bytes == 4 * 2 * 3
    assert row.saved_bytes == 4 * 2 * 3  # the batch's mean and rstd
    assert only(table, "aten.add_.Tensor").parameter_bytes == 0


def test_nothing_is_kept_without_grad():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.linear(x).tanh()
            return y * self.linear(x)

    x = torch.zeros(2, 4)
    program = trace(Frozen(), (x,))
    table = modelled_costs(program.graph_module, H100)
    kept = 2 * 4 * 4  # the product keeps what was made without grad, as the factor of what was not; tanh keeps nothing
    assert sum(n.saved_bytes for n in table.nodes) == kept == kept_bytes(lambda: program.graph_module(x), program, x)
    assert torch.is_grad_enabled()


def test_an_operator_without_derivative_has_no_backward():
    table = costs(Function(lambda x: torch.igamma(x, torch.ones(4))), leaf(4))
    assert only(table, "aten.igamma.default").backward_seconds == 0.0


def kept_bytes(run, program, *inputs):
    """Bytes of the different storages that autograd keeps while ``run`` runs, what came with the program excluded."""
    module = program.graph_module
    came = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers(), *inputs]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in came)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {}), ("cnn", {}), ("unet", {}), ("tied", {}), ("multi", {}), ("bert", {}), ("gpt", {"dropout": 0.1})],
)
def test_saved_bytes_are_those_of_eager(name, options):
    model, args, kwargs = build(name, **options)
    program = trace(model, args, kwargs)
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    table = modelled_costs(program.graph_module, H100)
    assert sum(n.saved_bytes for n in table.nodes) == kept_bytes(lambda: model(*args, **kwargs), program, *inputs)


@pytest.mark.parametrize(
    "name", ["gpt", "llama", "vit", "t5"]
)  # export passes attention a mask where eager passes none
def test_saved_bytes_are_those_of_the_graph(name):
    model, args, kwargs = build(name)
    program = trace(model, args, kwargs)
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    table = modelled_costs(program.graph_module, H100)
    assert sum(n.saved_bytes for n in table.nodes) == kept_bytes(
        lambda: program.graph_module(*inputs), program, *inputs
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "gpt", "llama", "t5"])
def test_parameter_bytes_sum_to_the_model(name):
    model, args, kwargs = build(name)
    table = modelled_costs(trace(model, args, kwargs).graph_module, H100)
    assert sum(n.parameter_bytes for n in table.nodes) == sum(p.nbytes for p in model.parameters())


def test_flops_of_gpt_are_those_that_torch_counts_in_eager():
    model, args, kwargs = build(
        "gpt", dropout=0.1
    )  # with dropout, eager attention on CPU is products that torch counts
    table = modelled_costs(trace(model, args, kwargs).graph_module, H100)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as forward:
        loss = model(*args, **kwargs)["loss"]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(n.flops for n in table.nodes) == forward.get_total_flops() > 0
    assert sum(n.backward_flops for n in table.nodes) == backward.get_total_flops() > 0


def test_symbolic_costs_equal_the_concrete_ones_after_substitution():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.1), nn.Flatten(0))
    symbolic = costs(model, leaf(6, 16), dynamic={"0": [0]})
    linear = only(symbolic, "aten.linear.default")
    (batch,) = linear.flops.free_symbols
    assert linear.flops == 2 * batch * 16 * 32
    assert linear.output_bytes == 4 * batch * 32
    assert linear.bytes_read == 4 * batch * 16 + 4 * (32 * 16 + 32)
    assert isinstance(linear.forward_seconds, sympy.Expr)
    for size in (6, 50):
        bound = [n for n in symbolic.at({batch.name: size}).nodes if "sym_size" not in n.operator]
        for row, other in zip(bound, costs(model, leaf(size, 16)).nodes, strict=True):
            assert {**vars(row), "forward_seconds": 0, "backward_seconds": 0} == {
                **vars(other),
                "forward_seconds": 0,
                "backward_seconds": 0,
            }
            assert row.forward_seconds == pytest.approx(other.forward_seconds, rel=1e-12)
            assert row.backward_seconds == pytest.approx(other.backward_seconds, rel=1e-12)


def test_symbolic_costs_survive_json_and_tell_the_symbols_nothing():
    model, args, kwargs = build("gpt")
    program = trace(model, args, kwargs, dynamic={"input_ids": [0, 1], "labels": [0, 1]})
    inputs = program.graph.find_nodes(op="placeholder")
    before = [str(n.meta["val"].shape) for n in inputs]
    guards = len(inputs[0].meta["val"].fake_mode.shape_env.guards)
    table = modelled_costs(program.graph_module, H100)
    assert [str(n.meta["val"].shape) for n in inputs] == before
    assert len(inputs[0].meta["val"].fake_mode.shape_env.guards) == guards
    sizes = program.signature.sizes
    assert CostTable.from_json(table.to_json()).at(sizes) == table.at(sizes)
    static = modelled_costs(trace(model, args, kwargs).graph_module, H100)
    for field in ("flops", "backward_flops", "saved_bytes", "parameter_bytes"):
        assert sum(getattr(n, field) for n in table.at(sizes).nodes) == sum(getattr(n, field) for n in static.nodes)


def test_the_pass_adds_the_fact_and_changes_nothing():
    model, args, kwargs = build("mlp")
    program = trace(model, args, kwargs)
    listing = str(program.graph)
    annotated = AnnotateCosts("A100").run(program)
    assert annotated.fact(CostTable).device == "A100"
    assert annotated.fact(CostTable).source == "modelled"
    assert annotated.graph_module is program.graph_module
    assert str(program.graph) == listing
    assert list(annotated.fact(CostTable)) == [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert str(AnnotateCosts()) == "annotate-costs"
    assert str(AnnotateCosts("A100")) == "annotate-costs{device=A100}"


def test_an_unknown_device_is_refused():
    model, args, kwargs = build("mlp")
    with pytest.raises(OptionError, match="unknown device 'abacus'; known: A100, H100, MI300X, cpu"):
        AnnotateCosts("abacus").run(trace(model, args, kwargs))


def test_a_graph_without_shapes_is_refused():
    program = trace(nn.Linear(2, 2), (torch.zeros(1, 2),))
    for node in program.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(VerifyError, match=r"has no meta\['val'\]; trace the model first"):
        modelled_costs(program.graph_module, H100)


def test_a_node_of_another_kind_is_refused():
    program = trace(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with program.graph.inserting_before(program.graph.output_node()):
        program.graph.create_node("call_module", "linear")
    with pytest.raises(
        VerifyError, match="node linear_1 is a call_module of linear; expected call_function nodes only"
    ):
        modelled_costs(program.graph_module, H100)


def test_an_operator_that_fails_on_fakes_is_named():
    def broken(x):
        raise ValueError("no such kernel")

    program = trace(nn.ReLU(), (torch.zeros(2),))
    (relu,) = [n for n in program.graph.nodes if n.op == "call_function"]
    relu.target = broken
    with pytest.raises(VerifyError, match=r"node relu: .*broken.* fails on fake tensors: ValueError: no such kernel"):
        modelled_costs(program.graph_module, H100)


def test_equal_layers_are_probed_once(monkeypatch):
    def probes(n_layers):
        model, args, kwargs = build("gpt", n_layers=n_layers)
        graph_module = trace(model, args, kwargs).graph_module
        count = Mock(wraps=probe)
        monkeypatch.setattr("fxpipe.costs.storages.probe", count)
        modelled_costs(graph_module, H100)
        return count.call_count

    assert probes(3) == probes(6)
