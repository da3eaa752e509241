"""The ``torch.compile`` backend, as its users meet it: through ``torch.compile(..., backend="fxpipe")`` on Inductor."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from models import build
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_leaves

from fxpipe.backend import BackendOptions, CompressingPartitioner
from fxpipe.errors import FormatError, OptionError

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

ONE_LAYER = {
    "gpt": {"n_layers": 1, "dropout": 0.1},
    "llama": {"n_layers": 1},
    "vit": {"n_layers": 1},
    "t5": {"n_layers": 1},
    "cnn": {"n_blocks": 2},
    "mlp": {"batch": 256},
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Step:
    """One training step of ``function``, a compiled or plain ``model``, in the given random state."""

    def __init__(self, model, function, args=(), kwargs=None, seed=1):
        own = {t.untyped_storage().data_ptr() for t in tree_leaves((list(model.parameters()), args, kwargs or {}))}
        stored = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = tree_leaves(function(*args, **(kwargs or {})))
        self.loss = next(t for t in outputs if t.ndim == 0)
        self.loss.backward()
        self.saved_bytes = sum(stored.values())
        self.gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    def error(self, other):
        """Of the gradient against another's, relative, all parameters together."""
        return ((self.gradient - other.gradient).norm() / other.gradient.norm()).item()


def step(model, args=(), kwargs=None, *, backend="fxpipe", **options):
    """One step of a model compiled anew; buffers are put back."""
    torch._dynamo.reset()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    done = Step(model, torch.compile(model, backend=backend, options=options or None), args, kwargs)
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return done


def network(width=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


class Summed(nn.Module):
    """A network and its loss."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x).square().sum()


def test_the_name_is_listed_and_works_where_nothing_of_fxpipe_was_imported(tmp_path):
    script = """
import sys, torch
assert "fxpipe" in torch.compiler.list_backends() and "fxpipe" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
torch.compile(model, backend="fxpipe", options={"format": "bfp4b32"})(torch.randn(64, 32)).sum().backward()
print(bool(model[0].weight.grad.abs().sum() > 0))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("name", ONE_LAYER)
def test_the_loss_is_inductors_to_the_bit_and_gradients_are_near(name):
    model, args, kwargs = build(name, **ONE_LAYER[name])
    plain = step(model, args, kwargs, backend="inductor")
    near = step(model, args, kwargs, format="bfp8b32")
    assert torch.equal(near.loss, plain.loss)
    assert near.saved_bytes < 0.55 * plain.saved_bytes
    assert 0 < near.error(plain) < 0.02  # and no NaN, from Llama's mask of -inf


def test_channels_last():
    model, (images, labels), _ = build("cnn", n_blocks=2)
    model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    plain = step(model, (images, labels), backend="inductor")
    near = step(model, (images, labels), format="bfp8b32")
    assert torch.equal(near.loss, plain.loss)
    assert near.error(plain) < 0.02


def test_without_a_format_it_is_inductor():
    model, args, kwargs = build("gpt", n_layers=1, dropout=0.1)
    plain, kept = step(model, args, kwargs, backend="inductor"), step(model, args, kwargs, format=None)
    assert torch.equal(kept.loss, plain.loss)
    assert kept.saved_bytes == plain.saved_bytes
    assert kept.error(plain) < 1e-6


def test_the_default_format_needs_no_options():
    model, x = Summed(), torch.randn(64, 32)
    default, same = step(model, (x,)), step(model, (x,), format="bfp8b32")
    assert torch.equal(default.gradient, same.gradient)
    assert default.saved_bytes == same.saved_bytes


def test_four_bits_with_the_default_partitioner():
    model, x = Summed(), torch.randn(256, 32)
    plans = []
    small = step(model, (x,), format="bfp4b32", partitioner="default", on_plan=plans.append)
    (plan,) = plans
    # GELU's input and output and ReLU's output, 64 values of 4.25 bits in each of 256 rows; square's input, 1 KiB, is small.
    assert small.saved_bytes == plan.stored_bytes == 3 * 256 * 64 * 17 // 32 + 1024
    assert plan.raw_bytes == 3 * 256 * 64 * 4 + 1024
    assert small.error(Step(model, model, (x,))) < 0.2


def test_a_softmax_is_saved_rather_than_the_scores_that_it_came_from():
    model, _, kwargs = build("gpt", n_layers=1, dropout=0.1)
    plans = []
    step(model, (), kwargs, format="bfp4b32", on_plan=plans.append)
    attention = [p for p in plans[0].save_points if p.shape == (8, 4, 64, 64)]
    assert [(p.dtype, p.format) for p in attention if p.decision == "pack"] == [("bool", "bits")]  # dropout's
    assert {p.format for p in attention if p.decision == "compress"} == {"bfp4b32+unsigned"}
    assert not [p for p in plans[0].save_points if p.reason == "exponentiated in backward"]


def test_what_a_checkpoint_computes_again_is_not_saved():
    model, x = network(), torch.randn(256, 32)
    plans = []
    options = {"format": "bfp8b32", "on_plan": plans.append}

    @torch.compile(backend="fxpipe", options=options)
    def loss(x):
        return torch.utils.checkpoint.checkpoint(lambda x: model(x).softmax(-1), x, use_reentrant=False).sum()

    loss(x).backward()
    assert [p.operator for p in plans[0].save_points if p.raw_bytes > 4096] == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"fromat": "bfp4b32"},
            OptionError,
            r"unknown option 'fromat'; known: exact_forms, format, min_bytes, on_plan, partitioner",
        ),
        ({"format": "bfp4b33"}, FormatError, r"bfp4b33"),
        (
            {"format": 4},
            OptionError,
            r"option format is a text .*, a mapping from patterns to such texts, or None; found 4",
        ),
        ({"format": {"*.mlp": 4}}, OptionError, r"option format is a text .*; found {'\*\.mlp': 4}"),
        ({"format": {"*.mlp": "bfp4"}}, FormatError, r"pattern '\*\.mlp': format 'bfp4' cannot be"),
        ({"exact_forms": 1}, OptionError, r"option exact_forms is True or False; found 1"),
        (
            {"partitioner": "max-cut"},
            OptionError,
            r"unknown partitioner 'max-cut'; known: auto, default, min-bytes, min-cut, recompute-attention",
        ),
        ({"min_bytes": "4KiB"}, OptionError, r"option min_bytes is a number of bytes, 0 or more; found '4KiB'"),
        ({"min_bytes": -1}, OptionError, r"option min_bytes is a number of bytes, 0 or more; found -1"),
        ({"on_plan": 1}, OptionError, r"option on_plan is a function of one CompressionPlan, or None; found 1"),
    ],
)
def test_a_bad_option_is_named_to_the_user(options, error, message):
    compiled = torch.compile(network(), backend="fxpipe", options=options)
    with pytest.raises(
        BackendCompilerFailed, match=rf"backend='fxpipe' raised:\n{error.__name__}: .*{message}"
    ) as caught:
        compiled(torch.randn(4, 32))
    assert isinstance(caught.value.inner_exception, error)


def test_a_bad_mode_is_named_to_the_user():
    compiled = torch.compile(network(), backend="fxpipe", mode="fastest")
    with pytest.raises(BackendCompilerFailed, match=r"Unrecognized mode=fastest, should be one of: default"):
        compiled(torch.randn(4, 32))


@pytest.mark.parametrize("marked", [False, True])
def test_the_sequence_length_may_change_from_call_to_call(marked):
    model, _, _ = build("gpt", n_layers=1, length=96)
    compiled = torch.compile(model, backend="fxpipe", options={"format": "bfp4b32"})
    kept = torch.compile(model, backend="fxpipe", options={"format": None}) if marked else model

    def inputs(length):
        tokens = torch.randint(128, (8, length))
        kwargs = {"input_ids": tokens, "labels": tokens.clone()}
        for tensor in kwargs.values() if marked else ():
            torch._dynamo.mark_dynamic(tensor, 1)
        return kwargs

    lengths = (64,) if marked else (64, 48)  # where nothing is marked, the second length makes it dynamic
    warm = [Step(model, f, (), inputs(n)) for n in lengths for f in (compiled, kept)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (80, 33, 96):
            kwargs = inputs(length)
            exact, near = Step(model, kept, (), kwargs), Step(model, compiled, (), kwargs)
            assert torch.equal(near.loss, exact.loss) if marked else torch.allclose(near.loss, exact.loss, rtol=1e-5)
            assert near.error(exact) < 0.15
            assert near.saved_bytes < 0.3 * exact.saved_bytes
            assert exact.error(Step(model, model, (), kwargs)) < 1e-5
    assert warm


def test_a_size_that_backward_knew_only_from_the_value_itself():
    weight = nn.Parameter(torch.linspace(0.1, 1, 64))

    def loss(a, b):
        return (torch.cat([a, b]).mul(weight).sin() * weight).sum()  # sin's input has a + b rows

    compiled = torch.compile(loss, backend="fxpipe", dynamic=True, options={"format": "bfp8b32", "min_bytes": 0})
    for rows in (3, 5), (20, 7), (4, 90):
        inputs = [torch.rand(n, 64) for n in rows]
        (near,), (exact,) = (torch.autograd.grad(f(*inputs), weight) for f in (compiled, loss))
        assert (near - exact).norm() < 0.02 * exact.norm()


def test_two_formats_in_one_process_do_not_share_code():
    model, x = Summed(), torch.randn(256, 32)
    four, eight = (torch.compile(model, backend="fxpipe", options={"format": f}) for f in ("bfp4b32", "bfp8b32"))
    sizes = [Step(model, f, (x,)).saved_bytes for f in (four, eight, four, eight)]
    assert sizes[0] == sizes[2] < 0.6 * sizes[1]
    assert sizes[1] == sizes[3]


def test_the_cache_on_disk_knows_the_format():
    model, x = Summed(), torch.randn(256, 32)

    def cache_use(**options):
        counters.clear()
        bytes = step(model, (x,), **options).saved_bytes
        return bytes, counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        four, hits = cache_use(format="bfp4b32")
        eight, hits_eight = cache_use(format="bfp8b32")
        assert (hits, hits_eight) == (0, 0)
        again, hits_again = cache_use(format="bfp4b32")
        assert again == four
        assert hits_again > 0
    assert four < 0.6 * eight


def test_the_cache_on_disk_and_a_function_that_must_be_called():
    model, x, plans = Summed(), torch.randn(256, 32), []
    with fresh_cache():
        plain = step(model, (x,), backend="inductor")
        first, second = (step(model, (x,), format="bfp4b32", on_plan=plans.append) for _ in range(2))
        assert len(plans) == 2
        assert first.saved_bytes == second.saved_bytes < 0.2 * plain.saved_bytes
        again = step(model, (x,), backend="inductor")
        assert torch.equal(again.gradient, plain.gradient)


def test_the_cache_key_holds_every_option():
    plain = BackendOptions(format="bfp4b32")
    others = [replace(plain, format=None), replace(plain, min_bytes=1), replace(plain, partitioner="default")]
    others += [replace(plain, exact_forms=False), replace(plain, format={"aten.relu": "none", "default": "bfp4b32"})]
    keys = [CompressingPartitioner(o).uuid() for o in [plain, *others]]
    assert len(set(keys)) == 6
    assert CompressingPartitioner(BackendOptions(format="bfp4b32")).uuid() == keys[0]
    reporting = CompressingPartitioner(replace(plain, on_plan=print))
    assert None not in (first := reporting.uuid(), second := CompressingPartitioner(reporting.options).uuid())
    assert first != second


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_outputs_without_training_are_inductors(context):
    model, x = network().eval(), torch.randn(64, 32)
    with context():
        near = torch.compile(model, backend="fxpipe", options={"format": "bfp4b32"})(x)
        torch._dynamo.reset()
        assert torch.equal(near, torch.compile(model, backend="inductor")(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_a_graph_break_gives_two_graphs_that_both_compress():
    first, second, x = network(), network(1), torch.randn(256, 32)
    plans = []

    @torch.compile(backend="fxpipe", options={"format": "bfp8b32", "on_plan": plans.append})
    def loss(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second(x).sum()

    (near,) = torch.autograd.grad(loss(x), first[0].weight)
    (exact,) = torch.autograd.grad(second(first(x)).sum(), first[0].weight)
    assert (near - exact).norm() < 0.02 * exact.norm()
    assert len(plans) == 2
    assert all(plan.stored_bytes < 0.4 * plan.raw_bytes for plan in plans)


def test_double_backward_is_refused():
    model, x = Summed(), torch.randn(64, 32)
    loss = torch.compile(model, backend="fxpipe", options={"format": "bfp8b32"})(x)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|requires create_graph=False"):
        torch.autograd.grad(loss, model.network[0].weight, create_graph=True)[0].sum().backward()


def test_autocast_keeps_the_copies_of_the_parameters_exact():
    model, args, kwargs = build("llama", n_layers=1)
    plans = []
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, args, kwargs, backend="inductor")
        near = step(model, args, kwargs, format="bfp8b32", partitioner="min-cut", on_plan=plans.append)
    assert torch.equal(near.loss, plain.loss)
    assert near.error(plain) < 0.02
    points = plans[0].save_points
    shapes = {tuple(p.shape) for p in model.parameters()}
    copies = [p for p in points if p.dtype == "bfloat16" and {p.shape, p.shape[::-1]} & shapes]
    assert len(copies) == 8  # q, k, v, o; gate, up, down; head
    assert {(p.decision, p.reason, p.stored_bytes) for p in copies} == {("recompute", "copy of a parameter", 0)}
    masks = [p for p in points if p.format == "either(-inf,0.0)"]
    assert [(p.decision, p.dtype) for p in masks] == [("pack", "bfloat16")]
    assert near.saved_bytes == plans[0].stored_bytes + 8 * 4  # rotary frequencies, a buffer


def test_logits_that_backward_exponentiates_stay_exact_under_autocast():
    head, x, labels = nn.Linear(32, 64), torch.randn(128, 32), torch.randint(64, (128,))
    plans = []

    @torch.compile(backend="fxpipe", options={"format": "bfp4b32", "on_plan": plans.append})
    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(head(x.sin()), labels)

    loss(x).backward()
    logits = [p for p in plans[0].save_points if p.shape == (128, 64)]
    assert [p.reason for p in logits] in (["exponentiated in backward"], ["log-softmax"])


def test_a_format_for_each_pattern():
    model, x, plans = Summed(), torch.randn(256, 32), []
    formats = {"aten.relu": "none", "network.0": "bfp8b32", "default": "bfp4b32"}
    step(model, (x,), format=formats, partitioner="default", on_plan=plans.append)
    points = {p.operator.removesuffix(".default"): p.format for p in plans[0].save_points if p.shape == (256, 64)}
    assert points == {"aten.addmm": "bfp8b32", "aten.mul.Tensor": "bfp4b32", "aten.relu": ""}


def test_a_pattern_that_matches_nothing_in_a_graph_is_told():
    with pytest.warns(UserWarning, match=r"'\*\.mpl\.\*' matches none of the .* values .* of modules network\.0, "):
        step(Summed(), (torch.randn(256, 32),), format={"*.mpl.*": "bfp4b32"}, partitioner="default")


def test_a_pattern_that_matches_nothing_is_told_again_by_the_next_process():
    """Another process finds the first one's code in Inductor's cache; here, after a reset, so would the second compilation."""
    for _ in range(2):
        with pytest.warns(UserWarning, match="matches none of the"):
            step(Summed(), (torch.randn(256, 32),), format={"*.nowhere.*": "bfp4b32"})


def test_a_format_with_seeds():
    """The same step twice is the same to the bit; another step rounds otherwise; dropout draws the numbers that it drew."""
    model, x = nn.Sequential(nn.Dropout(0.1), Summed()), torch.randn(256, 32)
    plain = step(model, (x,), backend="inductor")
    first, again = (step(model, (x,), format="bfp4b32+sr+dither") for _ in range(2))
    assert torch.equal(first.loss, plain.loss)
    assert torch.equal(first.gradient, again.gradient)
    assert 0 < first.error(plain) < 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_comes_back_finite(bad):
    x = torch.randn(64, 32)
    x[3, 5] = bad
    weight = nn.Parameter(torch.ones(32))
    compiled = torch.compile(
        lambda x: (x * 2 * weight).sum(), backend="fxpipe", options={"format": "bfp4b32", "min_bytes": 0}
    )
    compiled(x).backward()
    assert not torch.isfinite(weight.grad[5])


def test_an_empty_batch():
    model = Summed()
    empty = step(model, (torch.empty(0, 32),), format="bfp4b32", min_bytes=0)
    assert empty.loss == 0
    assert not empty.gradient.any()


def test_compiled_in_place():
    """The way into Hugging Face's Trainer, whose ``torch_compile_backend`` takes only the names that accelerate lists."""
    model, _, kwargs = build("gpt", n_layers=1)
    exact = Step(model, model, (), kwargs)
    model.compile(backend="fxpipe", options={"format": "bfp8b32"})
    near = Step(model, model, (), kwargs)
    assert near.saved_bytes < 0.4 * exact.saved_bytes
    assert near.error(exact) < 0.02
