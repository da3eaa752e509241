import json
import operator

import pytest
import torch
from models import build
from torch import fx, nn

import fxpipe.triton_kernels.ops  # noqa: F401  (registers the operators)
from fxpipe import printing
from fxpipe.errors import PlanError
from fxpipe.plans.graph_file import graph_from_json, graph_to_json
from fxpipe.trace import trace


class Several(nn.Module):
    """Arguments of every kind, parts of tuples read twice, out of order and not at all, a constant, an output None."""

    def forward(self, x):
        first, _, third = x.split([1, 2, 3], dim=-1)
        values, indices = torch.topk(x, 2)
        zeros = torch.zeros(2, 6, dtype=torch.float64, device="cpu").to(torch.float32)
        filled = x.masked_fill(x > 0.5, float("-inf")).nan_to_num(neginf=-1e30)
        constant = torch.tensor([3, 4])
        flipped = x.to(memory_format=torch.contiguous_format).flip([0]).clamp(max=1)
        return third + first, indices * constant, values.sum() + zeros.sum(), filled, flipped


def graph_of(module, *args, **kwargs):
    return trace(module, args, kwargs).graph_module


def tensors_of(module):
    nodes = module.graph.find_nodes(op="get_attr")
    found = {node.target: operator.attrgetter(node.target)(module) for node in nodes}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def come_back(module):
    return graph_from_json(graph_to_json(module), tensors_of(module))


def several():
    module = graph_of(Several(), torch.randn(2, 6))
    max_1 = next(node for node in module.graph.nodes if node.name == "topk")
    last = next(node for node in reversed(module.graph.nodes) if node.op != "output")
    with module.graph.inserting_after(last):
        again = module.graph.call_function(operator.getitem, (max_1, 0))
    again.meta = {"val": max_1.meta["val"][0]}
    output = module.graph.output_node()
    output.args = ((*output.args[0], None, again),)
    module.recompile()
    return module


def test_arguments_and_results_of_every_kind_come_back():
    module = several()
    found = come_back(module)
    x = torch.randn(2, 6)
    before, after = module(x), found(x)
    assert len(before) == len(after)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lines = printing.listing(module.graph).splitlines()
    removed = [line for line in lines if line not in printing.listing(found.graph).splitlines()]
    assert [line.partition(":")[0] for line in removed] == [
        "getitem_5",
        "return (add, mul, add_1, nan_to_num, clamp, None, getitem_5)",
    ]


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "t5"])
def test_a_traced_model_comes_back_node_by_node(name):
    model, args, kwargs = build(name)
    module = graph_of(model, *args, **kwargs)
    found = come_back(module)
    assert printing.listing(found.graph) == printing.listing(module.graph)
    assert found.code == module.code
    for old, new in zip(module.graph.nodes, found.graph.nodes, strict=True):
        if old.op == "call_function":
            assert new.meta.get("stack_trace") == old.meta.get("stack_trace")
        if isinstance(old.meta.get("val"), torch.Tensor):
            assert all(
                getattr(new.meta["val"], a) == getattr(old.meta["val"], a) for a in ("dtype", "device", "requires_grad")
            )
            assert new.meta["val"].stride() == old.meta["val"].stride()


def test_graphs_within_graphs_come_back():
    model, args, kwargs = build("llama")
    module = graph_of(model, *args, **kwargs)
    found = come_back(module)
    assert any(isinstance(child, fx.GraphModule) for child in found.children())
    inputs = list(kwargs.values())
    for old, new in zip(module(*inputs), found(*inputs), strict=True):
        assert torch.equal(old, new)


def test_the_text_is_torchs_own_format():
    from torch._export.serde.serialize import ExportedProgram, _bytes_to_dataclass

    program = _bytes_to_dataclass(ExportedProgram, graph_to_json(several()))
    assert program.torch_version == torch.__version__
    assert [node.target for node in program.graph_module.graph.nodes][:1] == ["torch.ops.aten.split_with_sizes.default"]


def test_a_size_that_is_no_number_cannot_be_stored():
    model, args, _ = build("mlp")
    program = trace(model, args, dynamic={"0": {0: "batch"}, "1": {0: "batch"}})
    with pytest.raises(PlanError, match="cannot be stored: it holds a size that is no number"):
        graph_to_json(program.graph_module)


def test_what_torch_has_no_place_for_is_named():
    module = graph_of(Several(), torch.randn(2, 6))
    next(node for node in module.graph.nodes if node.name == "topk").target = slice
    with pytest.raises(PlanError, match="a graph of this plan cannot be stored"):
        graph_to_json(module)


def first_node(data):
    return data["graph_module"]["graph"]["nodes"][0]


def test_a_size_is_never_evaluated(tmp_path):
    data = json.loads(graph_to_json(several()))
    code = f"__import__('pathlib').Path({str(tmp_path / 'was_here')!r}).touch()"
    sizes = next(iter(data["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": code, "hint": None}}
    with pytest.raises(PlanError, match=r"it holds a size that is no number, which no plan does: .*__import__"):
        graph_from_json(json.dumps(data).encode(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "torch.os.system",
        "torch.ops.load_library",
        "torch.ops.load_library.__func__.__globals__",
        "torch.ops.aten.add",
        "torch.ops.aten.add.Tensor.__call__",
        "torch.ops.__class__.mro.default",
        "torch.ops.nobody.wrote.this",
        "torch.ops.higher_order.cond",
        "math.gcd",
        "_operator.call",
        "#executorch:add",
        "",
    ],
)
def test_only_registered_operators_are_called(target):
    data = json.loads(graph_to_json(several()))
    first_node(data)["target"] = target
    with pytest.raises(
        PlanError, match=r"node 'split.*' calls .*, no registered operator; import the package that defines it"
    ):
        graph_from_json(json.dumps(data).encode(), {})


def test_operators_that_open_files_are_refused():
    data = json.loads(graph_to_json(several()))
    first_node(data)["target"] = "torch.ops.aten.from_file.default"
    with pytest.raises(PlanError, match="which opens a file; no plan does that"):
        graph_from_json(json.dumps(data).encode(), {})


@pytest.mark.parametrize("key", ["as_custom_obj", "as_operator"])
def test_other_arguments_that_would_be_looked_up_are_refused(key):
    data = json.loads(graph_to_json(several()))
    first_node(data)["inputs"][0]["arg"] = {key: "torch.hub.load"}
    with pytest.raises(PlanError, match=r"it holds an .*, which no plan does: torch.hub.load"):
        graph_from_json(json.dumps(data).encode(), {})


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"null", b'{"graph_module": {"metadata": {"custom": "{}"}}}', b"[" * 100_000]
)
def test_text_that_is_no_graph_is_refused(text):
    with pytest.raises(PlanError, match="not a graph that fxpipe wrote"):
        graph_from_json(text, {})


def test_a_tensor_that_is_not_given_is_named():
    model, args, _ = build("mlp")
    with pytest.raises(PlanError, match=r"not a graph that fxpipe wrote: KeyError: 'layers.0.0.weight'"):
        graph_from_json(graph_to_json(graph_of(model, *args)), {})
