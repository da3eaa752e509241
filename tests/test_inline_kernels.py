"""The last step before Inductor on a GPU: operators of storage become Triton calls, and Inductor inlines their kernels."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config
import triton.language as tl
from kernels import emulated
from kernels.inputs import classes_in_turn, same
from kernels.ptx import parse
from stages import compressed
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as triton_call
from torch._inductor.codecache import FxGraphHashDetails
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.jit import ConstexprFunction, JITFunction
from without_gpu import an_h100, generated, inlined_kernel, kernel_calls, to_gpu

from fxpipe import backend, inline_kernels
from fxpipe.graph_module import copy_graph_module
from fxpipe.inline_kernels import InlineKernels, with_inlined_kernels
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.runtime import stage_runner
from fxpipe.triton_kernels import BFPFormat, launch, reference

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

fxp = torch.ops.fxpipe
SEED = torch.tensor([5])


def stored(text: str, decoded: bool = True, order: tuple[int, ...] = (0, 1)):
    """A function that stores a ReLU's output, and restores it."""

    def function(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(x)
        planes = fxp.bfp_compress(y, text, list(order), seed)
        if not decoded:
            return y, *planes
        return y, *planes, fxp.bfp_decompress(planes, text, list(y.shape), list(order), y.dtype, seed)

    return function


def on_gpu(function, x: torch.Tensor, mode: str = "fake") -> torch.fx.GraphModule:
    module = make_fx(function, tracing_mode=mode)(x, SEED)
    to_gpu(module.graph)
    return module


def inlined(module: torch.fx.GraphModule) -> torch.fx.Graph:
    with an_h100():
        InlineKernels()(module.graph)
    module.graph.lint()
    return module.graph


def calls(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return graph.find_nodes(op="call_function", target=triton_call)


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if str(n.target).startswith("fxpipe.bfp")}


@pytest.mark.parametrize(
    ("text", "planes"),
    [
        ("bfp4b32", ["code32_ptr", "scale_ptr"]),
        ("bfp7b16", ["code32_ptr", "code16_ptr", "code8_ptr", "scale_ptr"]),
        ("bfp4b32+o1", ["code32_ptr", "scale_ptr", "outlier_ptr"]),
        ("bfp4b32+search+o2t1", ["code32_ptr", "scale_ptr", "outlier_ptr"]),
        ("bfp4b32+sr", ["code32_ptr", "scale_ptr"]),
        ("bfp2b32:gauss+e4", ["code16_ptr", "scale_ptr"]),
    ],
)
def test_a_node_becomes_one_call_that_writes_its_planes(text, planes):
    module = on_gpu(stored(text), torch.randn(64, 64))
    before = [n.meta["val"] for n in module.graph.output_node().args[0]]
    graph = inlined(module)
    assert not operators(graph)
    store, restore = calls(graph)
    assert store.kwargs["tensors_to_clone"] == planes
    assert restore.kwargs["tensors_to_clone"] == ["y_ptr"]
    read = {name for name, value in store.kwargs["kwargs"].items() if value is store.kwargs["kwargs"]["x_ptr"]}
    assert not read & set(planes)  # what is written is nothing else's
    after = [n.meta["val"] for n in graph.output_node().args[0]]
    assert [(v.shape, v.dtype, v.device, v.stride()) for v in after] == [
        (v.shape, v.dtype, v.device, v.stride()) for v in before
    ]
    assert len({v.untyped_storage()._cdata for v in after}) == len(after)


@pytest.mark.parametrize("text", ["bfp4b32", "bfp4b4x8+e5m3"])
def test_equal_layouts_are_traced_once(text, monkeypatch):
    traced = []
    trace = inline_kernels._trace
    monkeypatch.setattr(inline_kernels, "_trace", lambda node, function: traced.append(node) or trace(node, function))

    def twice(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*stored(text)(x, seed), *stored(text)(x + 1, seed))

    graph = inlined(on_gpu(twice, torch.randn(64, 64)))
    assert len(traced) == 2
    assert len(calls(graph)) == 4
    values = [n.meta["val"].untyped_storage()._cdata for n in graph.output_node().args[0]]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("bfp4b32:learned", ["compress"]),
        ("bfp4b32:learned+dither", ["compress"]),
    ],
)
def test_what_has_no_kernel_stays_one_node(text, kinds):
    graph = inlined(on_gpu(stored(text), torch.randn(64, 64)))
    assert {name for name in operators(graph) if "bfp_" in name} == {f"fxpipe.bfp_{kind}.default" for kind in kinds}
    assert len(calls(graph)) == 2 - len(kinds)


def test_on_the_cpu_nothing_changes():
    module = make_fx(stored("bfp4b32"), tracing_mode="fake")(torch.randn(64, 64), SEED)
    before = str(module.graph)
    InlineKernels()(module.graph)
    assert str(module.graph) == before


def test_a_value_that_is_concatenated_too_stays_one_node():
    def function(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, *planes = stored("bfp4b32", decoded=False)(x, seed)
        return torch.cat([x[:1], y]), *planes

    assert operators(inlined(on_gpu(function, torch.randn(64, 33)))) == {"fxpipe.bfp_compress.default"}


@pytest.mark.parametrize(("start", "copies"), [(0, 0), (1, 1), (8, 0)])
def test_a_part_that_starts_where_no_kernel_can_is_copied(start, copies):
    def function(x: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
        return fxp.bfp_compress(x[start:], "bfp4b32", [0], seed)

    graph = inlined(on_gpu(function, torch.randn(99).bfloat16()))
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)) == copies


def test_sizes_that_are_not_known():
    module = on_gpu(stored("bfp4b32", order=(1, 0)), torch.randn(50, 40), mode="symbolic")
    env = next(iter(module.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(env.guards)
    graph = inlined(module)
    store, restore = calls(graph)
    assert not operators(graph)
    assert len(env.guards) == guards  # compiled for every size
    for call in (store, restore):
        assert isinstance(call.kwargs["kwargs"]["numel"], torch.fx.Node)
        assert call.kwargs["kwargs"]["EVEN"] is False
    source = generated(
        on_gpu(stored("bfp4b32", order=(1, 0)), torch.randn(50, 40), "symbolic"), **with_inlined_kernels()
    )
    assert [c for c in kernel_calls(source) if "compress" in c] == ["compress_kernel_0.run", "decompress_kernel_1.run"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inductor_makes_one_producer_and_one_inlined_kernel(dtype):
    module = on_gpu(stored("bfp4b32", decoded=False), torch.randn(64, 64).to(dtype))
    source = generated(module, **with_inlined_kernels())
    producer, kernel = kernel_calls(source)
    assert producer.startswith("triton_poi_fused")
    assert kernel == "compress_kernel_0.run"
    assert "torch.ops.fxpipe" not in source
    assert "empty_strided_cuda((512, ), (1, ), torch.int32)" in source  # written in place: no copy of it

    module = on_gpu(stored("bfp4b32", decoded=False), torch.randn(64, 64).to(dtype))
    _, kernel = kernel_calls(generated(module))
    assert kernel == "torch.ops.fxpipe.bfp_compress.default"  # as it is without the pass


def test_after_the_passes_of_the_user():
    class Own(CustomGraphPass):
        def __call__(self, graph):
            raise NotImplementedError

        def uuid(self):
            return "own"

    own = Own()
    for there in (own, [own]):
        with inductor_config.patch(post_grad_custom_post_pass=there):
            assert with_inlined_kernels() == {"post_grad_custom_post_pass": [own, inline_kernels._PASS]}
    assert with_inlined_kernels() == {"post_grad_custom_post_pass": [inline_kernels._PASS]}


@pytest.mark.parametrize(
    "text", ["bfp4b32", "bfp5b16:gauss+e5m3", "bfp4b32+o1", "bfp4b32:gauss+e6m2+search", "bfp4b32+o2"]
)
def test_the_code_that_inductor_generates_equals_the_reference(text, tmp_path):
    module = on_gpu(stored(text, decoded=False), torch.randn(33, 64).bfloat16())
    ptx = parse(inlined_kernel(generated(module, **with_inlined_kernels()), "compress_kernel_0", tmp_path).asm["ptx"])
    x = classes_in_turn(33 * 64, torch.bfloat16)
    fmt = BFPFormat.parse(text)
    assert all(map(same, emulated.compress(ptx, x, fmt), reference.compress(x, fmt)))


@pytest.mark.parametrize("kernel", [*launch.KERNELS.values()], ids=lambda k: k.fn.__name__)
def test_names_are_unique_in_all_that_inductor_copies_with_a_kernel(kernel):
    """It copies functions and constants by name into one file, and takes a second of one name for the first."""
    seen, waiting = {}, [kernel]
    while waiting:
        for name, value in _globals_of(waiting.pop()).items():
            assert not isinstance(value, type(ast)), f"{name}: Inductor does not copy what is in a module"
            assert not isinstance(value, tl.pointer_type)
            if name not in seen and isinstance(value, JITFunction | ConstexprFunction):
                assert value.fn.__name__ == name  # copied under that name
                waiting.append(value)
            assert _same(seen.setdefault(name, value), value), name


def _globals_of(function) -> dict[str, object]:
    code, there = function.fn.__code__, function.fn.__globals__
    return {name: there[name] for name in code.co_names if name in there and name not in ("tl", "triton")}


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, tl.constexpr) and isinstance(b, tl.constexpr) and a.value == b.value)


def test_both_halves_of_a_stage(monkeypatch):
    """Through the second door: what a stage gives to Inductor, its values moved to a GPU."""
    stage = compressed("mlp").fact(LoweredStages).stages[0]
    for half, kernel in ((stage.forward, "compress_kernel"), (stage.backward, "decompress_kernel")):
        module = copy_graph_module(half.graph_module)
        to_gpu(module.graph)
        with an_h100() as sources:
            stage_runner.inductor(replace(half, graph_module=module))
        (source,) = sources
        assert "torch.ops.fxpipe" not in source
        assert any(call.startswith(kernel) for call in kernel_calls(source))


def test_the_backend_asks_for_it(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda *_, config_patches: asked.update(config_patches)
    )
    backend.fxpipe(torch.fx.symbolic_trace(torch.nn.ReLU()), [torch.randn(3)])
    assert asked["post_grad_custom_post_pass"] == [inline_kernels._PASS]


def test_cached_code_is_of_these_kernels(monkeypatch):
    """Inductor's key holds the pass; the pass's changes with the sources of the kernels."""
    seen = []
    monkeypatch.setattr(inline_kernels, "get_hash_for_files", lambda paths: seen.extend(paths) or b"key")
    inline_kernels._hash_of_sources.cache_clear()
    assert InlineKernels().uuid() == b"key"
    inline_kernels._hash_of_sources.cache_clear()
    names = {Path(path).name for path in seen}
    assert names >= {"inline_kernels.py", "ops.py", "launch.py", "kernels.py", "tiles.py", "codec.py", "tiling.py"}
    with inductor_config.patch(with_inlined_kernels()):
        ours = FxGraphHashDetails(None, [], {}, []).post_grad_custom_post_pass
    assert ours == (InlineKernels().uuid(),)
