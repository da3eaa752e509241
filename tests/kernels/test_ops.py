"""The operators: one node in every graph, any strides, clear errors."""

import itertools

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from kernels.inputs import every_class, same
from torch.fx.experimental.proxy_tensor import make_fx

from fxpipe.triton_kernels import BFPFormat, FormatError, ops, reference, tiling

bfp_compress = torch.ops.fxpipe.bfp_compress
bfp_decompress = torch.ops.fxpipe.bfp_decompress
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # on loading Inductor

SHAPES = [(), (0,), (1,), (33,), (5, 7), (3, 0, 4), (2, 3, 8, 9)]


def through(x: torch.Tensor, fmt: str, order: list[int]) -> torch.Tensor:
    return bfp_decompress(bfp_compress(x, fmt, order), fmt, list(x.shape), order, x.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp7b8+unsigned"])
def test_compress_and_decompress_any_shape(shape, fmt):
    x = torch.randn(shape)
    packed = ops.compress(x, fmt)
    assert isinstance(packed, tuple)
    assert sum(plane.nbytes for plane in packed) == BFPFormat.parse(fmt).stored_bytes(x.numel())
    expected = reference.compress(x.flatten(), BFPFormat.parse(fmt))
    assert all(map(same, packed, expected))
    y = ops.decompress(packed, fmt, x.shape, x.dtype)
    assert same(y, reference.decompress(expected, BFPFormat.parse(fmt), x.numel(), x.dtype).view(shape))


SEED = torch.tensor(5)
OTHERS = [
    "bfp4b32:gauss+e5m3+search+o1", "bfp3b8x4:learned+e5", "bfp4b32+sr+dither", "bfp2b1x16:gauss+se5m2+search",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", OTHERS)
def test_every_kind_of_format_on_any_shape(text, shape):
    fmt, x = BFPFormat.parse(text), torch.randn(shape)
    packed = ops.compress(x, fmt, SEED)
    stored = tiling.to_stored(x, fmt)
    expected = reference.compress(stored, fmt, SEED)
    assert all(map(same, packed, expected))
    assert sum(plane.nbytes for plane in packed) == fmt.stored_bytes(fmt.stored_numel(shape))
    y = ops.decompress(packed, fmt, x.shape, x.dtype, SEED)
    again = reference.decompress(expected, fmt, stored.numel(), x.dtype, SEED)
    assert same(y, tiling.from_stored(again, fmt, shape))


@pytest.mark.parametrize("text", OTHERS)
def test_opcheck_of_every_kind_of_format(text):
    x = torch.randn(3, 5, 8)
    planes = bfp_compress(x, text, [2, 0, 1], SEED)
    torch.library.opcheck(bfp_compress, (x, text, [2, 0, 1], SEED))
    torch.library.opcheck(bfp_decompress, (planes, text, [3, 5, 8], [2, 0, 1], torch.float32, SEED))


@pytest.mark.parametrize("text", OTHERS)
def test_symbolic_shapes_of_every_kind_of_format(text):
    def there_and_back(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        planes = bfp_compress(x, text, [1, 0], seed)
        return bfp_decompress(planes, text, [x.shape[0], x.shape[1]], [1, 0], x.dtype, seed)

    x = torch.randn(6, 50)
    graph = make_fx(there_and_back, tracing_mode="symbolic")(x, SEED)
    for part in (x, x[:4, :33], x[:1]):
        assert same(graph(part, SEED), there_and_back(part, SEED))


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (None, r"format 'bfp4b8\+sr\+dither' needs a seed here, an int64 tensor of one value; found none"),
        (torch.tensor(1, dtype=torch.int32), "found torch.int32 of shape"),
        (torch.tensor([1, 2]), r"found torch.int64 of shape \[2\]"),
    ],
)
def test_a_seed_is_asked_for(seed, message):
    x, text = torch.randn(8), "bfp4b8+sr+dither"
    with pytest.raises(ValueError, match=message):
        ops.compress(x, text, seed)
    with pytest.raises(ValueError, match=message):
        ops.decompress(ops.compress(x, text, SEED), text, [8], torch.float32, seed)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        ops.compress(mode.from_tensor(x), text, seed if seed is None else mode.from_tensor(seed))


def test_a_format_may_be_given_as_a_value():
    x = torch.randn(10)
    assert all(map(same, ops.compress(x, BFPFormat(4, 8)), ops.compress(x, "bfp4b8")))


def layouts() -> list[torch.Tensor]:
    x = torch.randn(2, 3, 4, 5)
    return [
        x,
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        x[:, ::2, 1:, ::3],
        x[:1].expand(7, 3, 4, 5),
        x.flip(0),
        torch.randn(1, 3, 1, 1),
    ]


@pytest.mark.parametrize("x", layouts(), ids=lambda x: f"{list(x.shape)}-{list(x.stride())}")
def test_an_order_gives_the_same_values_whatever_the_strides(x):
    for order in map(list, itertools.permutations(range(4))):
        planes = bfp_compress(x, "bfp4b8", order)
        dense = x.permute(order).contiguous()
        assert all(map(same, planes, reference.compress(dense.flatten(), BFPFormat.parse("bfp4b8"))))
        y = bfp_decompress(planes, "bfp4b8", list(x.shape), order, x.dtype)
        assert y.shape == x.shape
        assert y.permute(order).is_contiguous()
        assert same(y.permute(order).contiguous(), through(dense, "bfp4b8", [0, 1, 2, 3]))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 3, 1], [1, 3, 2, 0]])
def test_nothing_is_copied_where_the_order_is_that_of_the_memory(order):
    inverse = sorted(range(4), key=order.__getitem__)
    x = torch.randn(3, 4, 5, 6).permute(inverse)
    seen = []
    watched = ops._compress_with(lambda flat, fmt, _: seen.append(flat.data_ptr()) or reference.compress(flat, fmt))
    watched(x, "bfp4b32", order)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 3, 1]])
@inductor
def test_opcheck(order, dtype):
    x = torch.randn(2, 3, 8, 9).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(bfp_compress, (x, "bfp5b16", order))
    planes = bfp_compress(x, "bfp5b16", order)
    torch.library.opcheck(bfp_decompress, (planes, "bfp5b16", list(x.shape), order, dtype))


def test_nothing_requires_grad():
    x = torch.randn(64, requires_grad=True)
    packed = ops.compress(x, "bfp4b32")
    assert not any(plane.requires_grad for plane in packed)
    assert not ops.decompress(packed, "bfp4b32", x.shape, x.dtype).requires_grad


def body(x: torch.Tensor) -> torch.Tensor:
    planes = bfp_compress(x * 2, "bfp4b32+unsigned", [1, 0])
    return bfp_decompress(planes, "bfp4b32+unsigned", [x.shape[0], x.shape[1]], [1, 0], x.dtype) + 1


def nodes(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "bfp" in str(node.target)]


ONE_NODE_EACH = ["fxpipe.bfp_compress.default", "fxpipe.bfp_decompress.default"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_one_node_each_under_make_fx(mode):
    x = torch.randn(6, 50)
    graph = make_fx(body, tracing_mode=mode)(x)
    assert nodes(graph) == ONE_NODE_EACH
    assert same(graph(x), body(x))
    if mode == "symbolic":
        assert same(graph(x[:4, :33]), body(x[:4, :33]))


@inductor
def test_one_node_each_under_aot_autograd():
    seen = []

    def compiler(graph, _):
        seen.append(nodes(graph))
        return make_boxed_func(graph.forward)

    x = torch.randn(6, 50)
    assert same(aot_function(body, compiler)(x), body(x))
    assert seen == [ONE_NODE_EACH]


@inductor
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_on_cpu(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(body, dynamic=dynamic, fullgraph=True)
    x = every_class(32, torch.float32).view(8, -1).clone()
    assert same(compiled(x), body(x))
    with torch.compiler.set_stance("fail_on_recompile" if dynamic else "default"):
        assert same(compiled(x[:5, :33].clone()), body(x[:5, :33]))


def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones():
    x = torch.randn(4, 6, 10)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = bfp_compress(mode.from_tensor(x), "bfp7b16", [2, 0, 1])
        fake_y = bfp_decompress(fake, "bfp7b16", [4, 6, 10], [2, 0, 1], torch.bfloat16)
    real = bfp_compress(x, "bfp7b16", [2, 0, 1])
    real_y = bfp_decompress(real, "bfp7b16", [4, 6, 10], [2, 0, 1], torch.bfloat16)
    for a, b in zip([*fake, fake_y], [*real, real_y], strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


# Bad arguments


X = torch.zeros(4, 8)
PLANES = bfp_compress(X, "bfp7b32", [0, 1])
DECODE = (PLANES, "bfp7b32", [4, 8], [0, 1], torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, "bfp9b32", [0, 1]), FormatError, "format 'bfp9b32' cannot be: the width is 9; a format is bfp"),
        (
            (X.double(), "bfp4b32", [0, 1]),
            TypeError,
            "'bfp4b32' holds values of dtype float32, bfloat16, float16, not float64",
        ),
        (
            (X.int(), "bfp4b32", [0, 1]),
            TypeError,
            "'bfp4b32' holds values of dtype float32, bfloat16, float16, not int32",
        ),
        ((X, "bfp4b32", [0]), ValueError, r"'bfp4b32': order \[0\] is not a permutation of the 2 dimensions \[0, 1\]"),
        ((X, "bfp4b32", [0, 0]), ValueError, r"order \[0, 0\] is not a permutation"),
    ],
)
def test_compress_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        bfp_compress(*arguments)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=message):
        bfp_compress(mode.from_tensor(arguments[0]), *arguments[1:])


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (
            0,
            PLANES[:-1],
            ValueError,
            "'bfp7b32' has the planes code32 int32, code16 int16, code8 uint8, .*; found int32",
        ),
        (0, [PLANES[0].float(), *PLANES[1:]], ValueError, "has the planes .* found float32, int16"),
        (
            1,
            "bfp4b32",
            ValueError,
            "'bfp4b32' has the planes code32 int32, exponent uint8; found int32, ",
        ),
        (1, "bfp", FormatError, "format 'bfp' cannot be"),
        (3, [1, 1], ValueError, r"order \[1, 1\] is not a permutation of the 2 dimensions \[0, 1\]"),
        (4, torch.int64, TypeError, "not int64"),
    ],
)
def test_decompress_refuses(place, value, error, message):
    arguments = [*DECODE[:place], value, *DECODE[place + 1 :]]
    with pytest.raises(error, match=message):
        bfp_decompress(*arguments)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=message):
        bfp_decompress(list(map(mode.from_tensor, arguments[0])), *arguments[1:])


@pytest.mark.parametrize("shape", [[4, 9], [4, 4, 8]])
def test_decompress_refuses_planes_of_another_size(shape):
    with pytest.raises(ValueError, match=r"plane code32 of \d+ values, shape .* has the shape \[\d+\], not \[4\]"):
        ops.decompress(PLANES, "bfp7b32", shape, torch.float32)
    with pytest.raises(ValueError, match=r"not \[2, 2\]"):
        ops.decompress([PLANES[0].view(2, 2), *PLANES[1:]], "bfp7b32", [4, 8], torch.float32)
