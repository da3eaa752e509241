"""Planes survive every lossless coding bit for bit; sizes are those worked out by hand; damage is found and named."""

import math
import sys
import zlib

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from fxpipe.triton_kernels import BFPFormat, lossless, lossless_codings, reference, tiling
from fxpipe.triton_kernels.lossless import CODINGS, CodingError, decode, encode, header_bytes
from fxpipe.triton_kernels.streams import Layout

FORMATS = (
    "bfp4b32 bfp2b8 bfp3b16+unsigned bfp5b32+e5 bfp7b8+e4 bfp8b128 bfp6b64+twos bfp4b4x8+e5m3+o2 bfp3b32x1 "
    "bfp2b32:learned+se5m2 bfp4b32:gauss+e5m3+search bfp4b16:learned+unsigned+o1"
).split()
ALL = ["auto", *CODINGS]


def planes_of(x: torch.Tensor, text: str) -> tuple[torch.Tensor, ...]:
    fmt = BFPFormat.parse(text)
    return reference.compress(tiling.to_stored(x, fmt), fmt)


def assert_same(found, expected):
    assert [plane.dtype for plane in found] == [plane.dtype for plane in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stream_bytes(x: torch.Tensor, text: str, coding: str) -> int:
    return encode(planes_of(x, text), text, x.shape, coding).numel() - header_bytes(text, x.shape)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any small shape, empty and ragged ones too; of any share of zeros, from none to all."""
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keep = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return (torch.randn(shape, generator=g).abs() + 0.25) * keep


@settings(deadline=None, max_examples=60)
@given(x=tensors(), text=st.sampled_from(FORMATS), coding=st.sampled_from(ALL))
@example(x=torch.empty(0), text="bfp4b32", coding="auto")
@example(x=torch.tensor(1.0), text="bfp4b4x8+e5m3+o2", coding="sparse-column")
@example(x=torch.zeros(3, 50), text="bfp8b128", coding="entropy")
def test_round_trip(x, text, coding):
    planes = planes_of(x, text)
    assert_same(decode(encode(planes, text, x.shape, coding), text, x.shape), planes)


@pytest.mark.parametrize("coding", ALL)
@pytest.mark.parametrize("text", FORMATS)
def test_round_trip_of_any_bits(text, coding):
    """Codes, scales and entries that no compressor writes, and what fills up the last block and group."""
    fmt, shape = BFPFormat.parse(text), (5, 21)
    g = torch.Generator().manual_seed(0)
    any_bytes = [torch.randint(0, 256, (p.n_bytes,), generator=g).byte() for p in fmt.planes(fmt.stored_numel(shape))]
    planes = [
        b.view(getattr(torch, p.dtype)) for b, p in zip(any_bytes, fmt.planes(fmt.stored_numel(shape)), strict=True)
    ]
    assert_same(decode(encode(planes, text, shape, coding), text, shape), planes)


@settings(deadline=None, max_examples=60)
@given(
    symbols=st.lists(st.integers(0, 7), max_size=300),
    columns=st.integers(1, 40),
    coding=st.sampled_from(list(CODINGS)),
)
def test_round_trip_of_one_stream(symbols, columns, coding):
    layout = Layout("code", 3, len(symbols), columns)
    array = torch.tensor(symbols, dtype=torch.uint8).numpy()
    encoder, decoder = CODINGS[coding]
    assert decoder(encoder(array, layout), layout).tolist() == symbols


@pytest.mark.parametrize("text", FORMATS)
def test_raw_is_as_large_as_the_planes_and_auto_no_larger(text):
    x = torch.randn(7, 60, generator=torch.Generator().manual_seed(0)).abs()
    size = sum(plane.nbytes for plane in planes_of(x, text))
    assert stream_bytes(x, text, "raw") == size
    assert stream_bytes(x, text, "auto") <= size


# Sizes by hand: 64 codes of 4 bits, a matrix [4, 16] whose symbols 5, 5 and 7 stand at (0, 3), (0, 4) and (2, 15).
SIXTY_FOUR = torch.zeros(64, dtype=torch.uint8)
SIXTY_FOUR[[3, 4, 47]] = torch.tensor([5, 5, 7], dtype=torch.uint8)
BY_HAND = {
    "raw": 32,  # 64 * 4 bits
    "zero": 1 + 4 + 3,  # groups of 2: 32 bits, and three groups of 8 bits
    "run-length": 1 + 8 + 3 + 2,  # runs 3, 0 and 42 in 6 bits each (in 5 bits there are 4 of them); 3 codes of 4 bits
    "sparse-row": 1 + 1 + 2 + 2,  # counts 2 0 1 0 of 2 bits; 3 columns of 4 bits; 3 codes
    "sparse-column": 1 + 2 + 1 + 2,  # 16 counts of 1 bit; 3 rows of 2 bits; 3 codes
}


@pytest.mark.parametrize("coding", BY_HAND)
def test_sizes_by_hand(coding):
    layout = Layout("code", 4, 64, 16)
    assert len(CODINGS[coding][0](SIXTY_FOUR.numpy(), layout)) == BY_HAND[coding]


def test_bytes_by_hand():
    """The same stream, every bit drawn."""
    layout = Layout("code", 4, 64, 16)
    array = SIXTY_FOUR.numpy()
    assert (
        CODINGS["zero"][0](array, layout).hex(" ") == "01 06 00 80 00 50 05 70"
    )  # groups 1, 2 and 23; 0 5, 5 0 and 0 7
    assert CODINGS["run-length"][0](array, layout).hex(" ") == "06 03 00 00 00 00 00 00 00 03 a0 02 55 07"
    assert CODINGS["sparse-row"][0](array, layout).hex(" ") == "02 12 43 0f 55 07"
    assert CODINGS["sparse-column"][0](array, layout).hex(" ") == "01 18 80 20 55 07"


def test_the_order_of_sparse_symbols_is_torchs():
    dense = torch.randint(0, 16, (9, 12), generator=torch.Generator().manual_seed(0)) * (torch.rand(9, 12) < 0.3)
    layout, array = Layout("code", 4, 108, 12), dense.byte().flatten().numpy()
    with pytest.warns(UserWarning, match="Sparse"):
        by_row, by_column = dense.to_sparse_csr(), dense.to_sparse_csc()
    for coding, indices, values in (
        ("sparse-row", by_row.col_indices(), by_row.values()),
        ("sparse-column", by_column.row_indices(), by_column.values()),
    ):
        tail = "".join(f"{byte:08b}"[::-1] for byte in CODINGS[coding][0](array, layout))
        codes = "".join(f"{int(value):04b}"[::-1] for value in values)
        places = "".join(f"{int(index):04b}"[::-1] for index in indices)
        assert padded(places) + padded(codes) == tail[-len(padded(places) + padded(codes)) :]


def padded(bits: str) -> str:
    return bits + "0" * (-len(bits) % 8)


def test_deflate_is_zlibs():
    data = CODINGS["deflate"][0](SIXTY_FOUR.numpy(), Layout("code", 4, 64, 16))
    assert zlib.decompress(data).hex() == "0050050000000000" + "00" * 15 + "70" + "00" * 8


def test_entropy_comes_to_the_entropy():
    """Within a thousandth, and the table, of the least that any coding of single codes can do."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor(reference_codes(x)).bincount().double() / x.numel()
    least_bits = float(-(shares[shares > 0] * shares[shares > 0].log2()).sum()) * x.numel()
    code_bits = 8 * len(CODINGS["entropy"][0](codes_array(x), Layout("code", 4, x.numel(), x.numel())))
    assert least_bits <= code_bits <= 1.001 * least_bits + 8 * (2 + 2 * 16)


def reference_codes(x: torch.Tensor) -> list[int]:
    return [byte >> shift & 15 for byte in planes_of(x, "bfp4b32")[0].view(torch.uint8).tolist() for shift in (0, 4)]


def codes_array(x: torch.Tensor):
    return torch.tensor(reference_codes(x), dtype=torch.uint8).numpy()


def test_a_lone_symbol_that_is_too_large_is_refused():
    with pytest.raises(CodingError, match="symbol 9 in a stream of 3 bits"):
        CODINGS["entropy"][1](bytes.fromhex("0900ffff"), Layout("code", 3, 5, 5))


def test_symbols_all_alike_cost_a_table_alone():
    layout = Layout("code", 8, 100_000, 100)
    assert CODINGS["entropy"][0](torch.full((100_000,), 9).byte().numpy(), layout).hex() == "0900ffff"


@pytest.fixture
def no_constriction(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)


@pytest.mark.usefixtures("no_constriction")
def test_without_constriction_entropy_says_what_to_install_and_auto_does_without():
    x = torch.randn(64)
    planes = planes_of(x, "bfp4b32")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fxpipe\[coding\]'; 'deflate' needs nothing"):
        encode(planes, "bfp4b32", x.shape, "entropy")
    assert_same(decode(encode(planes, "bfp4b32", x.shape), "bfp4b32", x.shape), planes)


def test_data_of_entropy_without_constriction(monkeypatch):
    x = torch.randn(64)
    data = encode(planes_of(x, "bfp4b32"), "bfp4b32", x.shape, "entropy")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        decode(data, "bfp4b32", x.shape)


X = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).relu()


@pytest.mark.parametrize("coding", ALL)
def test_every_single_damage_is_found(coding):
    data = encode(planes_of(X, "bfp4b32"), "bfp4b32", X.shape, coding)
    for place in range(data.numel()):
        damaged = data.clone()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CodingError):
            decode(damaged, "bfp4b32", X.shape)
    for length in range(data.numel()):
        with pytest.raises(CodingError):
            decode(data[:length], "bfp4b32", X.shape)


@pytest.mark.parametrize("coding", CODINGS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_streams_that_no_encoder_wrote_are_symbols_or_an_error(coding, data):
    """As if the checksum held by chance: no other exception, no symbol that is too large."""
    layout = Layout("code", 3, data.draw(st.integers(0, 60)), data.draw(st.integers(1, 12)))
    encoder, decoder = CODINGS[coding]
    right = encoder(torch.arange(layout.length).mul(7).bitwise_and(5).byte().numpy(), layout)
    wrong = bytearray(right) + data.draw(st.binary(max_size=3))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)):
        wrong[place : place + 1] = bytes([byte])  # or one more at the end
    try:
        symbols = decoder(bytes(wrong), layout)
    except CodingError:
        return
    assert symbols.shape == (layout.length,)
    assert symbols.max(initial=0) < 8


ERRORS = {
    "begin with b'fxpl', and this data with b'PK34'": lambda data: torch.cat([as_data(b"PK34"), data[4:]]),
    "is of version 9; this fxpipe reads version 1": lambda data: torch.cat([data[:4], as_data(b"\x09"), data[5:]]),
    "the checksum of its .* bytes is .*, not": lambda data: torch.cat([data, data]),
    "4 bytes are expected at byte 0 of 0: the data is cut off": lambda data: data[:0],
    r"a uint8 tensor of one dimension, not torch.float32 of shape \[3\]": lambda data: torch.zeros(3),
    "stream code has coding 77; known: 0 to 6": lambda data: resealed(data, -18 - planes_bytes(), 77),
    "1 bytes too many": lambda data: resealed(torch.cat([data, data[:1]]), 9, 7),
    "the data has 3 streams, where format 'bfp4b32' has 2": lambda data: resealed(data, -19 - planes_bytes(), 3),
    "stream code, coded as deflate in 80 bytes: zlib says": lambda data: resealed(data, -18 - planes_bytes(), 5),
}


def as_data(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def planes_bytes() -> int:
    return sum(plane.nbytes for plane in planes_of(X, "bfp4b32"))


def resealed(data: torch.Tensor, place: int, byte: int) -> torch.Tensor:
    """With one byte replaced, and the checksum made right."""
    data = data.clone()
    data[place] = byte
    data[5:9] = as_data(zlib.crc32(bytes(data[9:].tolist())).to_bytes(4, "little"))
    return data


@pytest.mark.parametrize("message", ERRORS)
def test_foreign_data(message):
    data = encode(planes_of(X, "bfp4b32"), "bfp4b32", X.shape, "raw")
    with pytest.raises(CodingError, match=message):
        decode(ERRORS[message](data), "bfp4b32", X.shape)


def test_data_of_another_tensor():
    data = encode(planes_of(X, "bfp4b32"), "bfp4b32", X.shape)
    with pytest.raises(CodingError, match=r"of format 'bfp4b32', shape \[4, 33\], not 'bfp4b16', \[4, 33\]"):
        decode(data, "bfp4b16", X.shape)
    with pytest.raises(CodingError, match=r"of format 'bfp4b32', shape \[4, 33\], not 'bfp4b32', \[33, 4\]"):
        decode(data, "bfp4b32", (33, 4))


def test_planes_of_another_tensor():
    with pytest.raises(
        CodingError, match=r"as code32 int32 \[8\], exponent uint8 \[2\]; found int32 \[20\], uint8 \[5\]"
    ):
        encode(planes_of(X, "bfp4b32"), "bfp4b32", (8, 8))
    with pytest.raises(CodingError, match="found nothing"):
        encode([], "bfp4b32", (8, 8))


def test_an_unknown_coding():
    with pytest.raises(CodingError, match="unknown coding 'lzma'; known: auto, raw, zero, run-length, sparse-row"):
        encode(planes_of(X, "bfp4b32"), "bfp4b32", X.shape, "lzma")


def test_the_data_is_no_pickle_and_holds_no_more_than_it_says():
    data = encode(planes_of(X, "bfp4b32"), "bfp4b32", X.shape, "raw")
    assert data.numel() == planes_bytes() + header_bytes("bfp4b32", X.shape)
    assert header_bytes("bfp4b32", X.shape) == 4 + 1 + 4 + (2 + 7) + (1 + 2 * 8) + (1 + 2 * 9)
    assert math.prod(X.shape) == int.from_bytes(bytes(data[19:27].tolist()), "little") * 33
    assert lossless.CODINGS is lossless_codings.CODINGS
