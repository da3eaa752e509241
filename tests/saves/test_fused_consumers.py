"""Stored values decoded inside the loops that read them: where, in Inductor's code for a GPU, and to the bit."""

import re

import pytest
import torch
from kernels.emulator import Memory, emulate
from kernels.inputs import any_codes, every_class, same
from kernels.ptx import parse
from test_inline_kernels import calls, inlined, operators
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from without_gpu import generated, kernel_calls, loop_kernel, to_gpu

from fxpipe.inline_kernels import with_inlined_kernels
from fxpipe.triton_kernels import BFPFormat, reference

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

aten, fxp = torch.ops.aten, torch.ops.fxpipe
X_BLOCK = 1024
X = torch.randn(64, 96)


def reading(function, text: str = "bfp4b32", x: torch.Tensor = X, order=(0, 1), mode: str = "fake") -> fx.GraphModule:
    """The graph of ``function(gradient, decoded)``, on a GPU, as Inductor decomposes it."""

    def whole(g: torch.Tensor, *stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *planes, seed = stored
        value = fxp.bfp_decompress(
            planes, text, list(g.shape), list(order), g.dtype, seed if "dither" in text else None
        )
        found = function(g, value)
        return found if isinstance(found, tuple) else (found,)

    planes = fxp.bfp_compress(x, text, list(order))
    module = make_fx(whole, select_decomp_table(), tracing_mode=mode)(x, *planes, SEED)
    to_gpu(module.graph)
    return module


SEED = torch.tensor([5])


def linear(g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Backward of a linear layer and GELU: the gradient that it takes sums of is in memory for the product."""
    before = aten.gelu_backward(g, h)
    return before.t() @ g, before.sum(0)


def norm(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return g - h * (g * h).mean(1, keepdim=True)


LOOPS = {
    "pointwise": lambda g, h: g * h,
    "activation, twice": lambda g, h: (aten.gelu_backward(g, h), aten.gelu(h)),
    "a view": lambda g, h: g.view(-1) * h.view(-1),
    "a mask": lambda g, h: aten.threshold_backward(g, h, 0),
    "a linear layer": linear,
}
OTHERS = {
    "a matrix product": lambda g, h: g @ h.t(),
    "both": lambda g, h: (g * h, g @ h.t()),
    "returned": lambda g, h: (g * h, h),
    "nothing": lambda g, h: g + 1,
    "a sum": lambda g, h: h.sum(0),
    "a sum of products": lambda g, h: (g * h).sum(1),
    "a norm's": norm,
}


@pytest.mark.parametrize("function", LOOPS.values(), ids=LOOPS)
def test_loops_decode_what_they_read(function):
    graph = inlined(reading(function))
    assert not operators(graph)
    assert not calls(graph)


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_what_must_be_in_memory_has_the_kernel(function):
    assert len(calls(inlined(reading(function)))) == 1


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("bfp4b32", torch.float16),
        ("bfp4b4x8", torch.float32),
        ("bfp4b32+o1", torch.float32),
        ("bfp4b32:learned", torch.float32),
        ("bfp4b32+dither", torch.float32),
    ],
)
def test_what_loops_do_not_decode_has_the_kernel(text, dtype):
    assert len(calls(inlined(reading(LOOPS["pointwise"], text, X.to(dtype))))) == 1


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("function", "n_outputs"), [("activation, twice", 2), ("a mask", 1)])
def test_inductor_makes_one_kernel_of_both(function, n_outputs, order, mode):
    source = generated(reading(LOOPS[function], x=X.bfloat16(), order=order, mode=mode), **with_inlined_kernels())
    (kernel,) = kernel_calls(source)
    assert kernel.startswith("triton_poi")
    assert source.count("= empty_strided_cuda(") == n_outputs  # the results, and no decoded value


def test_a_linear_layers_backward_holds_no_decoded_value():
    source = generated(reading(LOOPS["a linear layer"], x=X.bfloat16()), **with_inlined_kernels())
    kernels = kernel_calls(source)
    assert kernels.count("extern_kernels.mm") == 1
    assert not any("decompress" in kernel for kernel in kernels)
    assert source.count("empty_strided_cuda((64, 96)") == 1  # the gradient, for the product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", ["bfp4b32", "bfp3b16:gauss+e5m3", "bfp7b8+unsigned", "bfp2b32+twos+e4"])
def test_the_kernel_that_inductor_makes_equals_the_reference(text, dtype, tmp_path):
    fmt, g = BFPFormat.parse(text), torch.Generator().manual_seed(3)
    x = every_class(170, dtype)[:2331].view(63, 37)
    stored = reference.compress(x.flatten(), fmt)
    planes = any_codes(stored, fmt, g)
    gradient = torch.randn(63, 37, generator=g).to(dtype)
    source = generated(reading(LOOPS["pointwise"], text, x), **with_inlined_kernels())
    (call,) = kernel_calls(source)
    kernel = parse(loop_kernel(source, call.removesuffix(".run"), tmp_path, X_BLOCK).asm["ptx"])
    for taken in (stored, planes):
        found = run(kernel, source, call, [gradient, *taken], gradient)
        decoded = reference.decompress(taken, fmt, x.numel(), dtype).view(63, 37)
        assert same(found, gradient * decoded)


def run(kernel, source: str, call: str, inputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """What the one kernel of ``source`` writes, for these inputs of the graph."""
    memory = Memory()
    out = memory.place(as_bytes(torch.zeros_like(like)), writable=True)
    at = {f"arg{i}_1": memory.place(as_bytes(x)) for i, x in enumerate(inputs)}
    names = re.findall(r"\w+", source.split(f"{call}(")[1].split(", stream", maxsplit=1)[0])
    arguments = [at.get(name, out) if not name.isdigit() else int(name) for name in names]
    emulate(kernel, memory, arguments, range(-(-like.numel() // X_BLOCK)))
    return torch.from_numpy(memory.at(out, like.nbytes)).view(like.dtype).view(like.shape)


def as_bytes(x: torch.Tensor):
    return x.contiguous().view(-1).view(torch.uint8).numpy()
