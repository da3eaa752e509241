"""Inductor's code for a GPU that is not there: generated, not run. The mocks are of private parts of torch, and all here."""

import ast
import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import torch.fx as fx
import torch.utils._triton
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, regs_per_multiprocessor=65536, gcnArchName="", total_memory=80 << 30,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20,
)  # fmt: skip
ANSWERS: dict[str, Callable[..., object]] = {
    "get_device_properties": lambda _=None: H100,
    "get_compute_capability": lambda _=None: 90,
    "is_available": lambda: True,
    "is_bf16_supported": lambda **_: True,
    "current_device": lambda: 0,
    "raise_if_triton_unavailable": lambda _=None: None,
}
OPTIONS = {
    "force_disable_caches": True, "compile_threads": 1, "joint_graph_constant_folding": False, "shape_padding": False,
}  # fmt: skip
"""No code from an earlier run; nothing computed or timed on the GPU."""
DRIVER = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)


@contextmanager
def an_h100() -> Iterator[list[str]]:
    """Inside, Inductor compiles for an H100; the list gets the source of each graph, in the order of their compilation."""
    sources: list[str] = []
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.callback(_forget_what_there_is)
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        for target in (CudaInterface.Worker, torch.cuda):
            stack.enter_context(mock.patch.object(target, "get_device_properties", ANSWERS["get_device_properties"]))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)))
        not_run = SimpleNamespace(call=None, runner=None, __file__="not run")
        stack.enter_context(mock.patch.object(PyCodeCache, "load_by_key_path", return_value=not_run))
        stack.enter_context(mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block"))
        # its patterns index fake tensors, which takes a device
        stack.enter_context(mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"))
        stack.enter_context(inductor_config.patch(OPTIONS))
        triton.runtime.driver.set_active(DRIVER)
        stack.callback(triton.runtime.driver.set_active, before)
        _forget_what_there_is()
        yield sources


def _forget_what_there_is() -> None:
    """Of the machine, which torch asks once and remembers."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def kernel_calls(source: str) -> list[str]:
    """What the generated code calls, in order: names of kernels and ``torch.ops``."""
    lines = source[source.index("    def call(") :].splitlines()
    calls = (line.strip().split("(")[0].split(" = ")[-1] for line in lines)
    return [call for call in calls if call.endswith(".run") or call.startswith(("torch.ops.", "extern_kernels."))]


def to_gpu(graph: fx.Graph) -> None:
    """Makes the fake values of a graph traced on the CPU those of a GPU; autograd needs a real one to trace there."""
    mode = next(n.meta["val"].fake_mode for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
    with mode:
        for node in graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta["val"], torch.Tensor):
                val = node.meta["val"]
                node.meta["val"] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="cuda")
            elif node.op == "call_function":
                if "device" in node.kwargs:
                    node.update_kwarg("device", torch.device("cuda", 0))
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
                node.meta.pop("eager_input_vals", None)


def generated(module: fx.GraphModule, **options: object) -> str:
    """Inductor's source for a graph whose values are on a GPU, with these options of its own."""
    from torch._inductor.compile_fx import compile_fx_inner

    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in values if isinstance(v, torch.Tensor))
    with an_h100() as sources, inductor_config.patch(options), V.set_fake_mode(mode):
        compile_fx_inner(module, values)
    (source,) = sources
    return source


def inlined_kernel(source: str, name: str, folder: Path) -> CompiledKernel:
    """The kernel ``name`` as Inductor would compile it from its generated source alone."""
    return _compiled(*_written(source, name, folder, "user_autotune"), {})


def loop_kernel(source: str, name: str, folder: Path, x_block: int) -> CompiledKernel:
    """The same of a pointwise kernel of Inductor's own, with so many values a program."""
    return _compiled(*_written(source, name, folder, "pointwise"), {"XBLOCK": x_block})


def _written(source: str, name: str, folder: Path, decorator: str) -> tuple[Any, dict[str, Any]]:
    """A kernel's function, and what the decorator is told of it."""
    texts = {
        node.targets[0].id: node.value.args[1].value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and "async_compile.triton" in ast.unparse(node)
    }
    path = folder / f"{name}.py"
    path.write_text(texts[name])
    with (
        mock.patch.object(triton_heuristics, decorator, lambda **made: lambda fn: (fn, made)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        made = runpy.run_path(str(path))
    return next(v for v in made.values() if isinstance(v, tuple))


def _compiled(fn: Any, made: dict[str, Any], sizes: dict[str, int]) -> CompiledKernel:
    meta, target = made["triton_meta"], DRIVER.get_current_target()
    ast_source = triton.compiler.ASTSource(fn, meta["signature"], {**meta["constants"], **sizes}, meta["configs"][0])
    options = {k: v for k, v in made.get("configs", [{}])[0].items() if k in ("num_warps", "num_stages")}
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(DRIVER)
    try:
        return triton.compile(ast_source, target=target, options=options)
    finally:
        triton.runtime.driver.set_active(before)
