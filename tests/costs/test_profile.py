"""Costs measured on this machine: what is left untouched, what is counted, and the file that keeps them."""

import json

import pytest
import torch
from models import build
from torch import nn

from fxpipe.costs.cost_model import modelled_costs
from fxpipe.costs.devices import device, processor_name
from fxpipe.costs.profile import graph_digest, load_profile, measured_costs, save_profile
from fxpipe.errors import InputError, PlanError
from fxpipe.trace import trace

QUICK = 0.001


def traced(name, **options):
    model, args, kwargs = build(name, **options)
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return model, trace(model, args, kwargs).graph_module, inputs


def test_counts_are_those_of_the_model_and_seconds_are_measured():
    _, graph_module, inputs = traced("gpt", n_layers=2, dropout=0.1)
    table = measured_costs(graph_module, inputs, seconds_per_call=QUICK)
    modelled = modelled_costs(graph_module, device("cpu"))
    assert (table.device, table.source) == (processor_name(), "measured")
    assert list(table) == list(modelled)
    seconds = ("forward_seconds", "backward_seconds")
    for name in table:
        counts = {k: v for k, v in vars(table[name]).items() if k not in seconds}
        assert counts == {k: v for k, v in vars(modelled[name]).items() if k not in seconds}
    assert all(0 < n.forward_seconds < 10 for n in table.nodes)
    assert all(n.backward_seconds == 0 for n in table.nodes if modelled[n.name].operator == "aten.arange.default")
    assert all(n.backward_seconds > 0 for n in table.nodes if n.operator == "aten.addmm.default")


def test_a_large_product_takes_longer_than_a_view():
    class Both(nn.Module):
        def forward(self, x):
            return (x @ x).view(-1)

    x = torch.randn(512, 512, requires_grad=True)
    table = measured_costs(trace(Both(), (x,)).graph_module, [x], seconds_per_call=QUICK)
    product, view = table.nodes
    assert product.forward_seconds > 5 * view.forward_seconds
    assert product.backward_seconds > 5 * view.backward_seconds


class Restless(nn.Module):
    """Writes buffers, its input, and a view of a parameter; draws random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        x.mul_(2)
        return nn.functional.dropout(self.norm(x) * self.weight, 0.5).relu_()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_nothing_is_changed(grad_enabled):
    model = Restless()
    x = torch.randn(8, 4)
    graph_module = trace(model, (x.clone(),)).graph_module
    listing = str(graph_module.graph)
    state = {k: v.clone() for k, v in graph_module.state_dict().items()}
    before, random_state = x.clone(), torch.get_rng_state()
    with torch.set_grad_enabled(grad_enabled):
        measured_costs(graph_module, [x], seconds_per_call=QUICK)
        assert torch.is_grad_enabled() == grad_enabled
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, before)
    assert {"calls", "norm.running_mean", "norm.num_batches_tracked", "weight"} <= set(state)
    for name, value in graph_module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in graph_module.parameters())
    assert str(graph_module.graph) == listing


@pytest.mark.parametrize("name", ["cnn", "unet", "llama", "t5"])
def test_every_node_runs(name):
    _, graph_module, inputs = traced(name)
    table = measured_costs(graph_module, inputs, seconds_per_call=0.0)
    assert len(table) == sum(n.op == "call_function" for n in graph_module.graph.nodes)


def test_progress_is_told():
    _, graph_module, inputs = traced("mlp")
    told = []
    table = measured_costs(graph_module, inputs, seconds_per_call=0.0, progress=lambda *now: told.append(now))
    assert told == [(i + 1, len(table), name) for i, name in enumerate(table)]


def test_dynamic_dimensions_take_the_sizes_of_the_inputs():
    x = torch.randn(6, 16)
    graph_module = trace(nn.Linear(16, 32), (x,), dynamic={"0": [0]}).graph_module
    table = measured_costs(graph_module, [torch.randn(10, 16)], seconds_per_call=0.0)
    assert table["linear"].flops == 2 * 10 * 16 * 32
    assert table["linear"].forward_seconds > 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "0 inputs were given; the graph takes 2"),
        (
            [torch.zeros(6, 16), torch.zeros(6, 15)],
            r"input y is torch.float32 \[6, 15\]; the graph takes torch.float32",
        ),
        ([torch.zeros(6, 16), torch.zeros(5, 16)], r"input y is torch.float32 \[5, 16\]"),
        ([torch.zeros(6, 16), torch.zeros(6, 16).int()], r"input y is torch.int32 \[6, 16\]"),
        ([torch.zeros(6, 16), torch.zeros(6)], r"input y is torch.float32 \[6\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    both = {"x": torch.zeros(4, 16), "y": torch.zeros(4, 16)}
    graph_module = trace(Add(), (), both, dynamic={"x": [0], "y": [0]}).graph_module
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), "xy", strict=True):
        node.name = name
    with pytest.raises(InputError, match=message):
        measured_costs(graph_module, inputs)


@pytest.fixture
def profile(tmp_path):
    _, graph_module, inputs = traced("mlp")
    table = measured_costs(graph_module, inputs, seconds_per_call=0.0)
    save_profile(table, graph_module, tmp_path / "profile.json")
    return table, graph_module, tmp_path / "profile.json"


def test_a_profile_is_saved_and_loaded(profile):
    table, graph_module, path = profile
    assert load_profile(path, graph_module) == table


def test_a_symbolic_table_is_saved_and_loaded(tmp_path):
    model, args, kwargs = build("mlp")
    graph_module = trace(
        model, args, kwargs, dynamic={"x": [0], "y": [0]} if kwargs else {"0": [0], "1": [0]}
    ).graph_module
    table = modelled_costs(graph_module, device("H100"))
    save_profile(table, graph_module, tmp_path / "costs.json")
    assert load_profile(tmp_path / "costs.json", graph_module) == table


def test_a_retraced_model_takes_the_profile_of_the_first(profile):
    table, graph_module, path = profile
    assert load_profile(path, traced("mlp")[1]) == table
    assert graph_digest(traced("mlp")[1]) == graph_digest(graph_module)


def test_the_digest_tells_graphs_apart():
    def digest(model, *shape):
        return graph_digest(trace(model, (torch.zeros(shape),)).graph_module)

    dropout = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    found = [
        digest(nn.Linear(4, 4), 2, 4),
        digest(nn.Linear(4, 5), 2, 4),
        digest(nn.Linear(4, 4), 3, 4),
        digest(dropout, 2, 4),
        digest(dropout.eval(), 2, 4),
    ]
    assert len(set(found)) == len(found)


def test_the_profile_of_another_graph_is_refused(profile):
    with pytest.raises(PlanError, match=r"is of another graph .* measure it again"):
        load_profile(profile[2], traced("cnn")[1])


def spoil(content, **changes):
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: spoil(c)[:100], "cannot read profile"),
        (lambda c: "", "cannot read profile"),
        (lambda c: "[1]", "cannot read profile"),
        (lambda c: "{}", "cannot read profile .*: KeyError: 'fxpipe_profile'"),
        (lambda c: spoil(c, fxpipe_profile=2), "is of version 2; this fxpipe reads version 1"),
        (lambda c: spoil(c, costs=[]), "not a cost table"),
        (
            lambda c: spoil(c, costs={**c["costs"], "nodes": c["costs"]["nodes"][1:]}),
            "does not fit its own graph: node",
        ),
        (lambda c: spoil(c).replace('"flops": ', '"flops": -', 1), "not a cost table: .*flops is -"),
    ],
)
def test_a_damaged_profile_is_refused(profile, damage, message):
    _, graph_module, path = profile
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(PlanError, match=message):
        load_profile(path, graph_module)


def test_a_missing_profile_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read profile .*missing.json: FileNotFoundError"):
        load_profile(tmp_path / "missing.json", traced("mlp")[1])
