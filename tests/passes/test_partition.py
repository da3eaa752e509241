"""partition-stages: brute force on real graphs, one test for each rule of what may be cut, and every refusal."""

from itertools import combinations, pairwise

import pytest
import torch
import torch.fx as fx
from models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_structure

from fxpipe.cuts.cut_rules import cut_rules
from fxpipe.errors import OptionError, PartitionError, VerifyError
from fxpipe.ir.cost import CostTable, NodeCost
from fxpipe.ir.partition import Partition, TiedParameter
from fxpipe.ir.program import Program, Signature
from fxpipe.pass_base import parse_pass
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.partition import PartitionStages
from fxpipe.trace import trace

FAST, SLOW = 1e12, 1.0  # bytes per second, for costs of whole seconds


def traced(model, *args, kwargs=None, **options):
    return Canonicalize().run(trace(model, args, kwargs or {}, **options))


def calls(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


def priced(program, forward=1.0, backward=2.0, saved=0, **forward_of):
    """Costs of whole seconds: ``forward_of`` gives those of the nodes it names, which save nothing and have no backward."""
    rows = []
    for node in calls(program):
        costs = (0, forward_of[node.name], 0.0) if node.name in forward_of else (saved, forward, backward)
        rows.append(NodeCost(node.name, str(node.target), 0, 0, 0, 0, 0, 0, *costs))
    return program.with_facts(CostTable(tuple(rows), "test", "modelled"))


def values_of_nodes(program, inputs):
    """What eager PyTorch makes at each node."""
    values = {}

    class Keep(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    Keep(program.graph_module).run(*inputs)
    return values


def cut(program, n_stages=2, bandwidth=FAST, **options):
    done = PartitionStages(n_stages=n_stages, bandwidth_bytes_per_second=bandwidth, **options).run(program)
    return done.fact(Partition)


def legal(program, bandwidth=FAST):
    """The nodes before which the program may be cut."""
    if CostTable not in program.facts:
        program = priced(program)
    rules = cut_rules(program, program.fact(CostTable), bandwidth)
    return [rules.nodes[b].name for b in rules.chain().legal]


class Layers(nn.Module):
    """Four linear layers of 8 x 8 without bias, and a sum for the loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))

    def forward(self, x):
        return self.layers(x).sum()


class Scaled(nn.Module):
    """A weight, and a function of it and the inputs."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.function = function

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


X, Y = torch.ones(4, 8), torch.ones(4, 8)  # 128 bytes each
HEAVY = 1000.0


def test_equal_layers_are_halved_and_every_field_is_filled():
    program = priced(traced(Layers(), X), saved=10, sum_1=0.0)
    found = cut(program, n_microbatches=2)
    first, second = found.stages
    assert first.nodes == ("linear", "linear_1")
    assert second.nodes == ("linear_2", "linear_3", "sum_1")
    assert (first.received, first.sent, second.received, second.sent) == ((), ("linear_1",), ("linear_1",), ())
    assert (first.inputs, second.inputs) == (("args_0",), ())
    assert first.parameters == ("layers.0.weight", "layers.1.weight")
    assert (first.forward_seconds, first.backward_seconds) == (2.0, 4.0)
    assert (first.parameter_bytes, first.saved_bytes, first.sent_bytes) == (2 * 256, 20, 128)
    # Two weights with gradients, two microbatches of 20 bytes, 128 bytes sent and as many received as gradient.
    assert first.memory_bytes == 2 * 2 * 256 + 2 * 20 + 128 + 128
    # Two weights with gradients, one microbatch of 20 bytes and the 128 received, and their gradient.
    assert second.memory_bytes == 2 * 2 * 256 + (20 + 128) + 128
    assert found.bottleneck_seconds == found.lower_bound_seconds == 6.0
    assert (found.bottleneck, found.proved_optimal) == ("stage 0 compute", "contiguous cuts of the program order")


def test_the_lower_bound_is_the_largest_node_where_that_is_more():
    found = cut(priced(traced(Layers(), X), linear_1=100.0))
    assert found.lower_bound_seconds == 100.0
    assert (found.bottleneck, found.bottleneck_seconds) == ("stage 0 compute", 103.0)


def test_a_slow_link_is_the_bottleneck():
    # 128 bytes of values and as many of gradients over 2 bytes a second.
    found = cut(priced(traced(Layers(), X)), bandwidth=2.0)
    assert found.bottleneck_seconds == 128.0
    assert found.bottleneck == "link 0-1"


@pytest.mark.parametrize("bandwidth", [1e7, 1e9, 1e11])
@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_no_cut_of_a_model_is_better(name, bandwidth):
    model, args, kwargs = build(name)
    program = AnnotateCosts().run(traced(model, *args, kwargs=kwargs))
    costs, nodes = program.fact(CostTable), calls(program)

    def bottleneck(ends):
        links, seconds = [], []
        for a, b in pairwise(ends):
            seconds.append(sum(costs[n.name].forward_seconds + costs[n.name].backward_seconds for n in nodes[a:b]))
            crossing = [values[n] for n in nodes[:b] if any(u in later[b] for u in n.users)]
            if not all(isinstance(value, torch.Tensor) for value in crossing) or not seconds[-1]:
                return float("inf")
            links.append(sum(value.nbytes * (1 + value.requires_grad) for value in crossing) / bandwidth)
        return max(seconds + links)

    values = values_of_nodes(program, [*args, *kwargs.values()])

    later = [set(nodes[b:]) for b in range(len(nodes) + 1)]
    for n_stages in (2, 3):
        inner = combinations(range(1, len(nodes)), n_stages - 1)
        best = min(bottleneck((0, *middle, len(nodes))) for middle in inner)
        assert cut(program, n_stages, bandwidth).bottleneck_seconds == pytest.approx(best, rel=1e-9)


def test_a_value_that_skips_a_stage_is_relayed():
    def skip(w, x):
        first = x * w
        return (first.exp().sin() + first).sum()

    found = cut(priced(traced(Scaled(skip), X), sum_1=0.0), 4)
    assert [stage.nodes for stage in found.stages] == [("mul",), ("exp",), ("sin",), ("add", "sum_1")]
    assert [stage.sent for stage in found.stages] == [("mul",), ("mul", "exp"), ("mul", "sin"), ()]
    assert [stage.received for stage in found.stages] == [(), ("mul",), ("mul", "exp"), ("mul", "sin")]
    assert [stage.sent_bytes for stage in found.stages] == [128, 256, 256, 0]


def test_gradients_flow_back_only_for_what_is_differentiable():
    program = priced(traced(Scaled(lambda w, x, y: ((x.exp() * w) + y).sum()), X, Y), exp=9.0)
    rules = cut_rules(program, program.fact(CostTable), 1e15)  # too fast to recompute anything
    chain = rules.chain()
    assert [n.name for n in rules.nodes] == ["exp", "mul", "add", "sum_1"]
    assert chain.activation_bytes == (0, 128, 128, 128, 0)  # exp, mul, add
    assert chain.gradient_bytes == (0, 0, 128, 128, 0)


class TestRecompute:
    """Two heavy nodes, exp and sin, between which the cut falls."""

    def program(self, function, *inputs, **costs):
        return priced(traced(Scaled(function), *inputs), **{"exp": HEAVY, "sin": HEAVY, **costs})

    def masked(self):
        def model(w, tokens):
            mask = (tokens > 2) & (tokens < 6)
            return ((w * mask).exp().sin() * mask).sum()

        return self.program(model, torch.arange(8), gt=1.0, lt=1.0, and_1=1.0)

    def test_a_cheap_value_of_the_inputs_is_computed_again_not_sent(self):
        # The mask is 8 bytes: 8 seconds on the link against 3 to compute it.
        first, second = cut(self.masked(), bandwidth=SLOW).stages
        assert (first.nodes, second.nodes) == (("gt", "lt", "and_1", "mul", "exp"), ("sin", "mul_1", "sum_1"))
        assert second.recomputed == ("gt", "lt", "and_1")
        assert (first.inputs, second.inputs) == (("args_0",), ("args_0",))
        assert first.sent == ("exp",)
        assert second.forward_seconds == HEAVY + 2 + 3

    def test_it_is_sent_where_that_is_cheaper(self):
        first, second = cut(self.masked(), bandwidth=4.0).stages
        assert first.sent == ("and_1", "exp")
        assert (second.recomputed, second.inputs) == ((), ())

    def test_a_differentiable_value_is_never_computed_again(self):
        def model(w, x):
            scaled = x * w
            return (scaled.exp().sin() * scaled).sum()

        first, second = cut(self.program(model, X, mul=0.0), bandwidth=SLOW).stages
        assert (first.sent, second.recomputed) == (("mul", "exp"), ())

    def test_nor_a_random_one(self):
        def model(w, x):
            noise = torch.rand_like(x)
            return ((x * w + noise).exp().sin() + noise).sum()

        first, second = cut(self.program(model, X, rand_like=0.0), bandwidth=SLOW).stages
        assert (first.sent, second.recomputed) == (("rand_like", "exp"), ())

    def test_nor_one_that_is_written(self):
        def model(w, x):
            count = x.cumsum(0)
            count += 1
            return ((x * w + count).exp().sin() + count).sum()

        first, second = cut(self.program(model, X, cumsum=0.0, add_=0.0), bandwidth=SLOW).stages
        assert (first.sent, second.recomputed) == (("add_", "exp"), ())

    def test_a_buffer_that_nobody_writes_goes_along(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(8))
                self.register_buffer("frequency", torch.ones(8))

            def forward(self, x):
                angle = self.frequency.cos()
                return ((x * self.weight * angle).exp().sin() * angle).sum()

        found = cut(priced(traced(Rotary(), X), cos=1.0, exp=HEAVY, sin=HEAVY), bandwidth=SLOW)
        assert found.stages[1].recomputed == ("cos",)
        assert [stage.buffers for stage in found.stages] == [("frequency",), ("frequency",)]

    def test_inputs_are_never_sent(self):
        program = self.program(lambda w, x, y: ((x * w).exp().sin() * y).sum(), X, Y)
        first, second = cut(program).stages
        assert (first.inputs, second.inputs) == (("args_0",), ("args_1",))
        assert (first.sent, second.recomputed) == (("exp",), ())

    def test_sizes_are_computed_again(self):
        def model(w, x):
            return (x * w).reshape(x.shape[0] * 2, 4).exp().sin().reshape(x.shape[0], 8).sum()

        program = priced(
            traced(Scaled(model), torch.ones(6, 8), dynamic={"0": [0]}), exp=HEAVY, sin=HEAVY, sym_size_int_1=0.0
        )
        first, second = cut(program).stages
        assert first.sent == ("exp",)
        assert second.recomputed == ("sym_size_int_1",)
        assert second.inputs == ("args_0",)


class TestLegalCuts:
    def test_getitem_stays_with_its_tuple(self):
        def split(w, x):
            a, b = (x * w).split(4, 1)
            return (a + b).sum()

        assert legal(traced(Scaled(split), X)) == ["split", "add", "sum_1"]

    def test_a_write_stays_with_the_making(self):
        assert legal(traced(Scaled(lambda w, x: (x * w).sin().cos_().exp().sum()), X)) == ["sin", "exp", "sum_1"]

    def test_a_write_through_a_view_too(self):
        def through(w, x):
            y = (x * w).exp()
            y.view(-1).add_(1)
            return (y.sin() + y).sum()

        assert legal(traced(Scaled(through), X)) == ["exp", "sin", "add", "sum_1"]

    def test_reading_by_strides_too(self):
        def strided(w, x):
            return (x * w).exp().t().as_strided((2, 2), (1, 2)).sum()

        assert legal(traced(Scaled(strided), X)) == ["exp", "sum_1"]

    def test_all_that_touches_a_written_buffer_stays_together(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(8))
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x):
                y = (x * self.weight).exp() * self.count
                y = y.sin()
                self.count += 1
                return y.cos().sum()

        assert legal(traced(Counting(), X)) == ["exp", "mul_1", "cos", "sum_1"]

    def test_batch_norm_writes_its_buffers_unsaid(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(8)

            def forward(self, x):
                return self.norm(self.norm(x).exp()).sum()

        assert legal(traced(Twice().train(), X)) == ["sum_1"]
        assert legal(traced(Twice().eval(), X)) == ["exp", "batch_norm_1", "sum_1"]

    def test_also_inside_a_region_without_gradients(self):
        class Inside(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(8, affine=False)
                self.weight = nn.Parameter(torch.ones(8))

            def forward(self, x):
                with torch.no_grad():
                    y = self.norm(x)
                y = (y * self.weight).sin()
                return (y + self.norm.running_mean).sum()

        assert legal(traced(Inside().train(), X)) == ["sum_1"]

    def test_the_loss_is_made_in_the_last_stage(self):
        def metric(w, x):
            y = (x * w).exp()
            loss = y.sum()
            return loss, y.sin().cos()

        assert legal(traced(Scaled(metric), X)) == ["exp", "sum_1"]

    def test_switched_off_gradients_are_not_parted(self):
        program = traced(Scaled(lambda w, x: (x * w).exp().sin().cos().sum()), X)
        sin, cos = (next(n for n in program.graph.nodes if n.name == name) for name in ("sin", "cos"))
        for before, mode in ((sin, False), (cos, True)):
            with program.graph.inserting_before(before):
                program.graph.call_function(torch._C._set_grad_enabled, (mode,)).meta["val"] = None
        assert legal(priced(program)) == ["exp", "_set_grad_enabled", "cos", "sum_1"]


class TestTied:
    def test_the_first_reader_owns(self):
        model, args, _ = build("tied")
        found = cut(AnnotateCosts().run(traced(model, *args)), 3)
        assert found.tied == (TiedParameter("head.weight", 0, (0, 2)),)
        assert [s.index for s in found.stages if "head.weight" in s.parameters] == [0, 2]

    def test_two_names_of_one_tensor_are_one_parameter(self):
        program = traced(Scaled(lambda w, x: ((x * w).sin() * w).sum()), X)
        second = [n for n in calls(program) if n.target is torch.ops.aten.mul.Tensor][1]
        program.graph_module.other = program.graph_module.weight
        with program.graph.inserting_before(calls(program)[0]):
            other = program.graph.get_attr("other")
        other.meta = dict(program.graph.find_nodes(op="get_attr")[0].meta)
        second.args = (second.args[0], other)
        found = cut(priced(program))
        assert found.tied == (TiedParameter("weight", 0, (0, 1)),)
        assert [s.parameter_bytes for s in found.stages] == [32, 32]


def test_outputs_made_early_are_relayed_without_a_gradient():
    def early(w, x):
        code = x * w
        return code.exp().sin().sum(), code

    program = priced(traced(Scaled(early), X))
    rules = cut_rules(program, program.fact(CostTable), FAST)
    assert rules.chain().activation_bytes == (0, 128, 256, 256, 0)
    assert rules.chain().gradient_bytes == (0, 128, 128, 128, 0)
    assert cut(program).stages[0].sent == ("mul", "exp")


def test_without_a_number_of_stages_the_fewest_that_fit():
    program = priced(traced(Layers(), X), saved=1000)
    assert cut(program, None).n_stages == 1
    assert cut(program, None, memory_bytes=6400).n_stages == 2
    needs = [s.memory_bytes for s in cut(program, None, memory_bytes=6400).stages]
    assert max(needs) <= 6400


def test_memory_is_kept_where_the_fastest_cut_would_not():
    program = priced(traced(Layers(), X), saved=1000, sum_1=0.0)
    free = cut(program)
    limit = free.stages[0].memory_bytes - 1
    tight = cut(program, memory_bytes=limit)
    assert [len(s.nodes) for s in free.stages] == [2, 3]
    assert [len(s.nodes) for s in tight.stages] == [1, 4]
    assert max(s.memory_bytes for s in tight.stages) <= limit


def test_more_stages_than_cuts():
    with pytest.raises(PartitionError, match="9 stages were asked for, but the program can be cut into 5 at most"):
        cut(priced(traced(Layers(), X)), 9)


def test_nodes_without_cost_make_no_stage():
    program = priced(traced(Layers(), X), sum_1=0.0, linear=0.0)
    with pytest.raises(PartitionError, match="can be cut into 3 at most"):
        cut(program, 4)


def test_no_cut_fits_the_memory():
    program = priced(traced(Layers(), X), saved=1000)
    message = r"no cut into 2 stages keeps to 1000 B a stage: in the fastest one stage 0 needs .* \((\d+) bytes\), "
    with pytest.raises(
        PartitionError, match=message + r"and the least with which a cut exists is .* \(\d+ bytes\)"
    ) as error:
        cut(program, memory_bytes=1000)
    least = int(str(error.value).split("(")[-1].split(" bytes")[0])
    assert max(s.memory_bytes for s in cut(program, memory_bytes=least).stages) <= least
    with pytest.raises(PartitionError):
        cut(program, memory_bytes=int(least * 0.99))


def test_no_number_of_stages_fits_the_memory():
    with pytest.raises(PartitionError, match="no cut into 5 stages keeps to 10 B a stage"):
        cut(priced(traced(Layers(), X)), None, memory_bytes=10)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("n_stages", 0, "n_stages is 0; expected a whole number, at least 1, or none"),
        ("n_stages", 2.0, "n_stages is 2.0; expected a whole number, at least 1, or none"),
        ("n_stages", True, "n_stages is True; expected a whole number, at least 1, or none"),
        ("memory_bytes", -1, "memory_bytes is -1; expected"),
        ("n_microbatches", 0, "n_microbatches is 0; expected"),
        ("bandwidth_bytes_per_second", 0, "bandwidth_bytes_per_second is 0; expected more than 0"),
        ("bandwidth_bytes_per_second", float("nan"), "bandwidth_bytes_per_second is nan; expected more than 0"),
        ("objective", "speed", "unknown objective 'speed'; known: time"),
        ("replicas", "auto", "replicas are 'auto', for which n_stages must say how many ranks there are"),
    ],
)
def test_bad_options(option, value, expected):
    with pytest.raises(OptionError, match=f"partition-stages: {expected}"):
        PartitionStages(**{option: value})


def test_its_text_is_its_spelling():
    step = PartitionStages(n_stages=2, replicas="2,1", n_microbatches=4)
    assert parse_pass(str(step), {step.name: PartitionStages}) == step
    step = PartitionStages(n_stages=4, memory_bytes=2**30)
    assert str(step) == "partition-stages{n_stages=4,memory_bytes=1073741824}"
    assert parse_pass(str(step), {step.name: PartitionStages}) == step


def test_a_node_without_a_cost():
    program = priced(traced(Layers(), X))
    costs = program.fact(CostTable)
    short = program.with_facts(CostTable(costs.nodes[1:], costs.device, costs.source))
    with pytest.raises(VerifyError, match=r"no row for node linear \(aten.linear.default\); run annotate-costs again"):
        cut(short)


def test_a_cost_that_is_no_number():
    program = AnnotateCosts().run(traced(Layers(), X, dynamic={"0": [0]}))
    assert cut(program).n_stages == 2
    object.__setattr__(program.signature, "sizes", {})
    with pytest.raises(PartitionError, match=r"node linear costs .*, which is no number; the example gives \{\}"):
        cut(program)


def test_a_program_that_computes_nothing():
    with pytest.raises(PartitionError, match="the program computes nothing, so there is nothing to cut"):
        cut(priced(traced(Scaled(lambda w, x: x), X)))


def chain_program(n):
    """relu(relu(... x)) with n nodes, made without tracing."""
    mode, graph = FakeTensorMode(), fx.Graph()
    with mode:
        fake = torch.ones(8, requires_grad=True)
    value = graph.placeholder("x")
    value.meta["val"] = fake
    for _ in range(n):
        value = graph.call_function(torch.ops.aten.relu.default, (value,))
        value.meta["val"] = fake.detach().clone()
    graph.output((value,))
    spec = tree_structure(((X,), {}, None))
    signature = Signature(("x",), ("0",), (), spec, tree_structure((X,)), 1, None)
    return Program(fx.GraphModule({}, graph), signature)


def test_thousands_of_nodes():
    found = cut(priced(chain_program(4_000)), 64)
    assert found.bottleneck_seconds == 3 * 63  # ceil(4,000 / 64) nodes of 3 seconds
