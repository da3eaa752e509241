"""trace: what the captured program looks like, and that it is the model: its tensors, its numbers, its calling convention."""

import pytest
import sympy
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from models import MODELS
from stages import SEED, attribute, eager, inputs_of, left_behind, small, traced
from torch import nn

from fxpipe.ir.cost import CostTable
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.printing import module_path
from fxpipe.runtime.stage_runner import named_tensors
from fxpipe.trace import trace


class Function(nn.Module):
    """A model of one function over its inputs, with one layer beside it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return self.function(self.layer, *args, **kwargs)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_equals_eager_bitwise(name):
    model, args, kwargs = small(name)
    program = trace(model, args, kwargs)
    torch.manual_seed(SEED)
    outputs = program.graph_module(*inputs_of(name))
    loss = outputs[program.signature.loss_index]
    loss.backward()
    found, expected = left_behind(model, loss), eager(name)
    assert torch.equal(found.loss, expected.loss)
    assert found.grads.keys() == expected.grads.keys()
    assert [n for n, g in found.grads.items() if not torch.equal(g, expected.grads[n])] == []
    assert [n for n, b in found.buffers.items() if not torch.equal(b, expected.buffers[n])] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_shape_and_the_graph_is_plain(name):
    program = traced(name)
    for node in program.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert node.op in ("get_attr", "output") or "val" in node.meta
    assert tuple(n.name for n in program.graph.find_nodes(op="placeholder")) == program.signature.inputs
    assert len(program.graph.output_node().args[0]) == program.signature.n_outputs


@pytest.mark.parametrize("name", ["cnn", "tied", "gpt"])
def test_parameters_and_buffers_are_the_models_own(name):
    model, args, kwargs = small(name)
    program = trace(model, args, kwargs)
    own = named_tensors(model)
    read = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
    assert {n for n in own if "num_batches" not in n} - read - {"lm_head.weight", "head.weight"} == set()
    for target in read & own.keys():
        assert attribute(program.graph_module, target) is own[target]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(not p.any() for p in program.graph_module.parameters())


def test_batch_norm_buffers_are_written_in_place():
    model, args, _ = small("cnn")
    program = trace(model, args)
    before = {n: b.clone() for n, b in model.named_buffers()}
    program.graph_module(*args)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert changed == set(before)
    assert {n.rsplit(".", 1)[1] for n in changed} == {"running_mean", "running_var", "num_batches_tracked"}


def test_non_persistent_buffers_and_plain_tensors():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale * self.weight + torch.tensor([1.0])

    model = Holder()
    program = trace(model, (X,))
    assert program.graph_module.scale is model.scale
    model.scale.fill_(5.0)
    assert torch.equal(program.graph_module(X)[0], X * 5.0 + 1.0)
    targets = {n.target for n in program.graph.find_nodes(op="get_attr")}
    assert {"scale", "weight"} < targets  # the third is the constant, which the model does not own
    assert len(targets) == 3


def test_tied_weights_are_one_tensor():
    model, args, _ = small("tied")
    program = trace(model, args)
    model(*args).backward()
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    program.graph_module(*args)[0].backward()
    assert torch.equal(model.embed.weight.grad, expected)
    assert len({id(p) for p in program.graph_module.parameters()}) == len(list(model.parameters()))


def test_the_mode_of_the_model_is_captured():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    for training in (True, False):
        program = trace(model.train(training), (X,))
        assert program.graph_module.training is training
        assert (
            program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)[0].args[2] is training
        )
    assert torch.equal(program.graph_module(X)[0], model(X))


def test_the_signature_of_nested_inputs():
    def function(layer, x, pair, *, batch, scale, name):
        assert name == "n"
        return {"out": [layer(x) + pair[0] * scale, pair[1]], "mask": batch["mask"]}

    pair, batch = (X, X + 1), {"mask": X > 0}
    program = trace(Function(function), (X, pair), {"batch": batch, "scale": 3, "name": "n"})
    found = program.signature
    assert found.paths == ("0", "1[0]", "1[1]", "batch['mask']")
    assert found.constants == ((4, 3), (5, "n"), (6, None))
    assert found.n_outputs == 3
    assert found.loss_index is None
    assert found.sizes == {}
    given = pytree.tree_flatten(((X, pair), {"batch": batch, "scale": 3, "name": "n"}, None))[1]
    assert given == found.in_spec
    outputs = pytree.tree_unflatten(list(program.graph_module(X, *pair, batch["mask"])), found.out_spec)
    assert torch.equal(outputs["out"][1], pair[1])
    assert torch.equal(outputs["mask"], batch["mask"])


def test_keyword_inputs_keep_their_names():
    assert traced("gpt").signature.inputs == traced("gpt").signature.paths == ("input_ids", "labels")
    assert traced("mlp").signature.paths == ("0", "1")


def test_a_constant_takes_its_branch():
    model = Function(lambda layer, x, flag: layer(x) if flag else x)
    assert torch.equal(trace(model, (X, False)).graph_module(X)[0], X)
    assert torch.equal(trace(model, (X, True)).graph_module(X)[0], model.layer(X))


def test_nodes_know_their_module():
    program = traced("cnn")
    paths = {module_path(n) for n in program.graph.nodes}
    assert {"stem.0", "blocks.0.conv1", "blocks.1.norm2", "head"} < paths
    assert not any(path.startswith("model") for path in paths)
    assert all(n.target == n.name for n in program.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (lambda layer, x: layer(x), None),
        (lambda layer, x: layer(x).sum(), 0),
        (lambda layer, x: (layer(x).sum(), x), 0),
        (lambda layer, x: (x, layer(x).sum()), None),
        (lambda layer, x: (x > 0).sum(), None),  # an integer
        (lambda layer, x: {"codes": x, "loss": layer(x).sum()}, 1),
        (lambda layer, x: {"loss": {"a": layer(x).sum()}, "codes": x}, 0),  # by the third rule
    ],
)
def test_which_output_is_the_loss(function, index):
    assert trace(Function(function), (X,)).signature.loss_index == index


@pytest.mark.parametrize(("name", "index"), [("mlp", 0), ("cnn", 0), ("multi", 0), ("gpt", 0), ("t5", 0)])
def test_the_loss_of_a_test_model(name, index):
    program = traced(name)
    assert program.signature.loss_index == index
    assert program.graph.output_node().args[0][index].meta["val"].shape == ()


def test_a_loss_function_with_a_target():
    model, target = nn.Linear(4, 4), {"y": X + 1}
    program = trace(model, (X,), loss_fn=lambda output, t: F.mse_loss(output, t["y"]), target=target)
    assert program.signature.paths == ("0", "target['y']")
    assert (program.signature.loss_index, program.signature.n_outputs) == (0, 2)
    loss, output = program.graph_module(X, target["y"])
    assert torch.equal(output, model(X))
    assert torch.equal(loss, F.mse_loss(model(X), target["y"]))
    assert program.graph_module.weight is model.weight


def test_dynamic_dimensions_stay_symbolic():
    model, args, kwargs = small("gpt")
    program = trace(model, args, kwargs, dynamic={"input_ids": [0, 1], "labels": [0, 1]})
    sizes = program.signature.sizes
    assert sorted(sizes.values()) == [4, 4, 64, 64]  # a symbol for each dimension of each input
    shape = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    batch, length = (sympy.Symbol(str(d), integer=True, positive=True) for d in shape)
    costs = AnnotateCosts().run(program).fact(CostTable)
    embedding = next(n for n in costs.nodes if n.operator == "aten.embedding.default")
    assert embedding.output_bytes == 4 * batch * length * 64
    assert embedding.at(sizes).output_bytes == 4 * 4 * 64 * 64
    fewer = {n: x[:3, :40].contiguous() for n, x in kwargs.items()}
    found = program.graph_module(fewer["input_ids"], fewer["labels"])[0]
    torch.testing.assert_close(found, model(**fewer)["loss"])
