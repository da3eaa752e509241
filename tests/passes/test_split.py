"""split-stages: bitwise equal to the program before, on every model; then what a stage may return, and its names."""

import copy

import pytest
import torch
from models import build
from torch import nn
from torch.utils._pytree import tree_leaves

from fxpipe.costs.storages import attribute_of
from fxpipe.cuts.cut_rules import cut_rules
from fxpipe.errors import VerifyError
from fxpipe.ir.cost import CostTable
from fxpipe.ir.partition import Partition, StagePlan
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.partition import PartitionStages
from fxpipe.passes.split import SplitStages
from fxpipe.trace import trace
from fxpipe.verify import verify_program

SMALL = {
    "mlp": {},
    "cnn": {"n_blocks": 2},
    "unet": {"depth": 2},
    "tied": {},
    "multi": {},
    "gpt": {"n_layers": 2, "dropout": 0.1, "batch": 2, "length": 16},
    "t5": {"n_layers": 1, "batch": 2, "length": 8},
    "bert": {"n_layers": 1, "batch": 2, "length": 8},
    "llama": {"n_layers": 2, "batch": 2, "length": 8},
    "vit": {"n_layers": 2, "batch": 2},
}


def annotated(model, args=(), kwargs=None, **options):
    return AnnotateCosts().run(Canonicalize().run(trace(model, args, kwargs, **options)))


def split(program, n_stages=2, bandwidth=1e9):
    done = SplitStages().run(PartitionStages(n_stages=n_stages, bandwidth_bytes_per_second=bandwidth).run(program))
    verify_program(done, "split-stages")
    return done


def stages(program):
    return [program.graph_module.get_submodule(f"stage_{i}") for i in range(program.fact(Partition).n_stages)]


def train(run, model, inputs, loss_index, state):
    """Outputs, gradients and buffers of one step from ``state``, with the same random numbers."""
    model.load_state_dict(state)
    model.zero_grad()
    torch.manual_seed(7)
    outputs = run(*inputs)
    outputs[loss_index].backward()
    gradients = [p.grad for p in model.parameters()]
    return [*(o.detach() for o in outputs), *gradients, *(b.clone() for b in model.buffers())]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


def eager_of(model, args, kwargs):
    return lambda *_: tree_leaves(model(*args, **kwargs))


@pytest.mark.parametrize("name", SMALL)
def test_outputs_gradients_and_buffers_are_bitwise_those_of_eager(name):
    model, args, kwargs = build(name, **SMALL[name])
    inputs = tree_leaves((args, kwargs))
    program = annotated(model, args, kwargs)
    state = copy.deepcopy(model.state_dict())
    loss = program.signature.loss_index
    expected = train(eager_of(model, args, kwargs), model, inputs, loss, state)
    assert_same(train(program.graph_module, model, inputs, loss, state), expected)
    for n_stages in (2, 4):
        done = split(program, n_stages)
        assert_same(train(done.graph_module, model, inputs, loss, state), expected)
        assert_well_formed(done)
        assert_returns_are_apart(done, inputs)


def assert_well_formed(program):
    """Each stage is a graph of its own that computes what the partition says, on the model's own tensors."""
    for plan, module in zip(program.fact(Partition).stages, stages(program), strict=True):
        module.graph.lint()
        names = [n.name for n in module.graph.nodes]
        assert names[: len(plan.received) + len(plan.inputs)] == [*plan.received, *plan.inputs]
        called = [n for n in names if n in (*plan.recomputed, *plan.nodes)]
        assert called == [*plan.recomputed, *plan.nodes]
        read = {n.target: attribute_of(module, n) for n in module.graph.find_nodes(op="get_attr")}
        assert {k for k, t in read.items() if isinstance(t, torch.Tensor)} == {*plan.parameters, *plan.buffers}
        assert {n for n, _ in module.named_parameters()} == set(plan.parameters)


def assert_returns_are_apart(program, inputs):
    """Every result is as its meta says, contiguous, and shares memory with nothing else that a stage takes or returns."""
    known = dict(zip(program.signature.inputs, inputs, strict=True))
    for plan, module in zip(program.fact(Partition).stages, stages(program), strict=True):
        arguments = [known[name] for name in (*plan.received, *plan.inputs)]
        results = module(*arguments)
        held = [*arguments, *module.parameters(), *module.buffers(), *results]
        storages = [t.untyped_storage().data_ptr() for t in held]
        for result, node in zip(results, module.graph.output_node().args[0], strict=True):
            assert storages.count(result.untyped_storage().data_ptr()) == 1
            assert result.is_contiguous()
            assert (result.shape, result.dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
            assert result.stride() == node.meta["val"].stride()
        known.update(zip(plan.sent, results, strict=False))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(0)))
        self.function = function

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def cut_before(program, name):
    """Split into two before the node of this name."""
    found = PartitionStages(n_stages=2).run(prefer_cut_before(program, name))
    assert found.fact(Partition).stages[1].nodes[0] == name
    return SplitStages().run(found)


def prefer_cut_before(program, name):
    """Costs that only the nodes on both sides of the cut have."""
    costs = program.fact(CostTable)
    at = [row.name for row in costs.nodes].index(name)
    rows = tuple(
        type(row)(**{**vars(row), "forward_seconds": float(i in (at - 1, at)), "backward_seconds": 0.0})
        for i, row in enumerate(costs.nodes)
    )
    return program.with_facts(CostTable(rows, costs.device, costs.source))


def listing(graph):
    """``name = operator(arguments)`` for each call, then what is returned."""
    lines = []
    for node in graph.nodes:
        arguments = ", ".join(map(str, node.args))
        if node.op in ("call_function", "call_module"):
            lines.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({arguments})")
    return [*lines, f"return {graph.output_node().args[0]}"]


@pytest.mark.parametrize("name", ["tied", "multi"])
def test_every_legal_cut_is_bitwise_the_same(name):
    model, args, kwargs = build(name)
    inputs, state = tree_leaves((args, kwargs)), copy.deepcopy(model.state_dict())
    program = annotated(model, args, kwargs)
    expected = train(program.graph_module, model, inputs, program.signature.loss_index, state)
    rules = cut_rules(program, program.fact(CostTable), 1e9)
    for b in rules.chain().legal:
        done = cut_before(program, rules.nodes[b].name)
        assert_same(train(done.graph_module, model, inputs, program.signature.loss_index, state), expected)


def test_the_example_of_the_docstring():
    def model(w, x):
        t = (x * w).t()
        return ((t * 2).exp() + t).sum()

    done = cut_before(annotated(Function(model), (X,)), "mul_1")
    assert listing(done.graph) == [
        "stage_0 = stage_0(args_0)",
        "t = getitem(stage_0, 0)",
        "stage_1 = stage_1(t)",
        "sum_1 = getitem(stage_1, 0)",
        "return (sum_1,)",
    ]
    first, second = stages(done)
    assert listing(first.graph) == [
        "mul = mul.Tensor(args_0, weight)",
        "t = t.default(mul)",
        "turn_t = permute.default(t, [1, 0])",
        "copy_t = clone.default(turn_t)",
        "return (copy_t,)",
    ]
    assert listing(second.graph) == [
        "back_t = permute.default(t, [1, 0])",
        "mul_1 = mul.Tensor(back_t, 2)",
        "exp = exp.default(mul_1)",
        "add = add.Tensor(exp, back_t)",
        "sum_1 = sum.default(add)",
        "return (sum_1,)",
    ]
    named = {n.name: n for n in (*second.graph.nodes, *first.graph.nodes)}
    for added in ("turn_t", "copy_t", "back_t"):
        assert named[added].meta["stack_trace"] == named["t"].meta["stack_trace"]
        assert named[added].meta["nn_module_stack"] == named["t"].meta["nn_module_stack"]
    assert named["back_t"].meta["val"].stride() == named["t"].meta["val"].stride() == (1, 8)
    assert second.graph.find_nodes(op="placeholder")[0].meta["val"].shape == (4, 8)


def copies(module):
    return [n.name for n in module.graph.nodes if n.target is torch.ops.aten.clone.default]


@pytest.mark.parametrize(
    ("model", "before", "expected"),
    [
        (lambda w, x: (x * w).exp().sin().sum(), "sin", []),
        (lambda w, x: (x * w).relu_().sin().sum(), "sin", []),
        (lambda w, x: (x * w).view(8, 4).sin().sum(), "sin", ["copy_view"]),
        (lambda w, x: (x * w).view(8, 4).exp_().sin().sum(), "sin", ["copy_exp_"]),
        (lambda w, x: (x * w).max(0)[0].sin().sum(), "sin", []),
        (lambda w, x: (x * w).chunk(2)[0].sin().sum(), "sin", ["copy_getitem"]),
        (lambda w, x: (x * w).t().exp().sin().sum(), "sin", ["copy_exp"]),
        (lambda w, x: w.view(2, 4).sin().sum() * x.sum(), "sin", ["copy_view"]),
    ],
)  # fmt: skip
def test_only_what_is_not_surely_fresh_and_contiguous_is_copied(model, before, expected):
    program = annotated(Function(model), (X,))
    done = cut_before(program, before)
    assert copies(stages(done)[0]) == expected
    assert_returns_are_apart(done, [X])
    assert torch.equal(done.graph_module(X)[0], program.graph_module(X)[0])


def test_two_values_of_one_storage_are_sent_as_two():
    def model(w, x):
        a = x * w
        b = a.view(8, 4)
        return a.exp().sum() + b.sin().sum()

    done = cut_before(annotated(Function(model), (X,)), "exp")
    assert done.fact(Partition).stages[0].sent == ("mul", "view")
    assert copies(stages(done)[0]) == ["copy_view"]


def test_a_relayed_value_is_copied():
    def model(w, x):
        first = x * w
        return (first.exp().sin() + first).sum()

    done = split(equal_costs(annotated(Function(model), (X,))), 5)
    assert [copies(module) for module in stages(done)] == [[], ["copy_mul"], ["copy_mul"], [], []]
    assert_returns_are_apart(done, [X])


def equal_costs(program):
    costs = program.fact(CostTable)
    rows = tuple(type(row)(**{**vars(row), "forward_seconds": 1.0, "backward_seconds": 0.0}) for row in costs.nodes)
    return program.with_facts(CostTable(rows, costs.device, costs.source))


@pytest.mark.parametrize("n_stages", [2, 3, 4])
def test_channels_last_stays_so(n_stages):
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 3), Loss())
    model = layers.to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    program = annotated(model, (image,))
    done = split(program, n_stages)
    assert sum("turn" in n.name for module in stages(done) for n in module.graph.nodes) >= n_stages - 1
    state = copy.deepcopy(model.state_dict())
    assert_same(
        train(done.graph_module, model, [image], 0, state), train(program.graph_module, model, [image], 0, state)
    )


class Loss(nn.Module):
    """The mean square, with a skip around two operators: what skips is relayed in the order in which it lies."""

    def forward(self, x):
        return (x.exp().sin() + x).square().mean()


def test_outputs_of_every_kind_leave_the_last_stage():
    def model(w, x):
        early = x * w
        loss = early.exp().sin().sum()
        return loss, early, early, x, w, early.view(-1), None, 3

    program = annotated(Function(model), (X,))
    done = split(program, 2)
    expected, found = program.graph_module(X), done.graph_module(X)
    assert found[6:] == (None, 3)
    assert all(torch.equal(a, b) for a, b in zip(found[:6], expected[:6], strict=True))
    returned = [t.untyped_storage().data_ptr() for t in found[:6]]
    assert len({*returned, X.untyped_storage().data_ptr()}) == 7
    assert done.fact(Partition).stages[1].inputs == ("args_0",)


def test_recomputed_nodes_stand_in_each_stage_under_the_same_name():
    def model(w, tokens):
        mask = (tokens > 2) & (tokens < 6)
        return ((w * mask).exp().sin() * mask).sum()

    program = annotated(Function(model), (torch.arange(8),))
    costs = prefer_cut_before(program, "sin")
    done = SplitStages().run(PartitionStages(n_stages=2, bandwidth_bytes_per_second=1.0).run(costs))
    for module in stages(done):
        assert [n.name for n in module.graph.nodes if n.op == "call_function"][:3] == ["gt", "lt", "and_1"]
    assert_well_formed(done)
    assert torch.equal(done.graph_module(torch.arange(8))[0], program.graph_module(torch.arange(8))[0])


def test_a_tied_parameter_is_one_object_in_every_stage():
    model, args, _ = build("tied")
    done = split(annotated(model, args), 4)
    first, last = stages(done)[0], stages(done)[3]
    assert first.get_parameter("head.weight") is last.get_parameter("head.weight") is model.embed.weight


def test_a_tensor_with_two_names_has_one():
    program = annotated(Function(lambda w, x: ((x * w).exp().sin() * w).sum()), (X,))
    program.graph_module.other = program.graph_module.weight
    node = next(n for n in program.graph.nodes if n.name == "mul_1")
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        other = program.graph.get_attr("other")
    other.meta = dict(program.graph.find_nodes(op="get_attr")[1].meta)
    node.args = (node.args[0], other)
    done = cut_before(program, "sin")
    assert [dict(module.named_parameters()).keys() for module in stages(done)] == [{"weight"}, {"weight"}]
    assert torch.equal(done.graph_module(X)[0], program.graph_module(X)[0])


def test_regions_without_gradients_move_whole():
    def model(w, x):
        y = (x * w).exp()
        with torch.no_grad():
            scale = (y * w).abs().amax()
        return (y / scale).sin().sum()

    module = Function(model)
    program = annotated(module, (X,))
    done = split(program, 3)
    state = copy.deepcopy(module.state_dict())
    assert_same(train(done.graph_module, module, [X], 0, state), train(program.graph_module, module, [X], 0, state))


def test_sizes_stay_symbolic():
    def model(w, x):
        return (x * w).reshape(x.shape[0] * 2, 4).exp().sin().reshape(x.shape[0], 8).sum()

    program = annotated(Function(model), (X,), dynamic={"0": [0]})
    done = split(program, 3)
    larger = torch.randn(6, 8)
    assert torch.equal(done.graph_module(larger)[0], program.graph_module(larger)[0])


def test_facts_mode_and_signature_stay():
    model, args, _ = build("mlp")
    program = annotated(model, args)
    program.graph_module.eval()
    done = split(program, 2)
    assert set(done.facts) == {CostTable, Partition}
    assert done.signature == program.signature
    assert not any(m.training for m in (done.graph_module, *stages(done)))
    assert [n.op for n in done.graph.nodes if n.op == "call_module"] == ["call_module"] * 2


def test_the_program_before_is_not_changed():
    program = PartitionStages(n_stages=2).run(annotated(Function(lambda w, x: (x * w).exp().sum()), (X,)))
    before = str(program.graph)
    SplitStages().run(program)
    assert str(program.graph) == before


def test_a_partition_of_another_program():
    program = annotated(Function(lambda w, x: (x * w).exp().sum()), (X,))
    other = annotated(Function(lambda w, x: (x * w).sin().sum()), (X,))
    found = PartitionStages(n_stages=2).run(program).fact(Partition)
    with pytest.raises(VerifyError, match="the partition is of another program: node 'exp' is in one only"):
        SplitStages().run(other.with_facts(found))


def test_without_a_partition():
    with pytest.raises(VerifyError, match="the program has no Partition; known facts: CostTable"):
        SplitStages().run(annotated(Function(lambda w, x: (x * w).sum()), (X,)))


def stage(index, **fields):
    names = ("nodes", "recomputed", "received", "sent", "inputs", "parameters", "buffers")
    return StagePlan(index, *(fields.get(name, ()) for name in names), 0.0, 0.0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ((stage(1),), "stage 0 of the partition carries index 1"),
        ((stage(0, sent=("a",)), stage(1)), r"stage 0 sends \('a',\), but stage 1 receives \(\)"),
        ((stage(0, received=("a",)),), "the first stage receives nothing and the last sends nothing"),
        ((stage(0, nodes=("a",)), stage(1, nodes=("a",))), "node a belongs to 2 stages of the partition"),
        (
            (stage(0, parameters=("w",)), stage(1, parameters=("w",))),
            r"parameters \{'w': \(0, 1\)\} are read by several stages, but \{\} are listed as tied",
        ),
    ],
)
def test_a_partition_checks_itself(plans, message):
    with pytest.raises(VerifyError, match=message):
        Partition(plans, (), "time", 0.0, "", 0.0, "")
