"""The planes of a compressed tensor made smaller without loss, on the host: for what is sent, written or kept for long.

    planes = fxpipe.compress(x, "bfp4b32")
    data = lossless.encode(planes, "bfp4b32", x.shape)          a uint8 tensor
    planes = lossless.decode(data, "bfp4b32", x.shape)          the same planes, bit for bit

The planes are taken apart into streams of symbols (``streams``), each coded by itself (``lossless_codings``)::

    raw            as they are
    zero           a bit for each 1 to 128 symbols, and those that are not all zero
    run-length     runs of zeros
    sparse-row     how many symbols of each row are not zero, and in which columns;   sparse-column the other way round
    deflate        zlib
    entropy        asymmetric numeral systems with the stream's own frequencies; needs the package constriction
    auto           for each stream whichever of these is least, so never more than raw and the header

The data, little end first::

    4 bytes  "fxpl"      1 byte  version      4 bytes  CRC-32 of all that follows
    2 + n bytes          the format's text
    1 + 8 n bytes        the shape
    1 + 9 n bytes        for each stream the number of its coding, 1 byte, and its bytes, 8
    the streams

Source: US12277502B2 (further lossless coding of compressed activations).
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import streams
from .bit_fields import CodingError, Reader
from .format import BFPFormat
from .lossless_codings import CODINGS, ans
from .streams import Layout, Symbols

__all__ = ["CODINGS", "CodingError", "decode", "encode", "header_bytes"]

_MAGIC = b"fxpl"
_VERSION = 1
_NAMES = list(CODINGS)


def encode(planes: Sequence[Tensor], format: str | BFPFormat, shape: Sequence[int], coding: str = "auto") -> Tensor:
    """``planes``, as ``compress`` makes them of a tensor of ``shape`` in ``format``, as uint8 [n] on the CPU.

    ``coding`` is one of the names above; ``auto`` does without ``entropy`` where constriction is not installed. With an
    ``order`` (``ops``), ``shape`` is the permuted one.

    Raises:
        CodingError: ``coding`` is unknown, or ``planes`` are not those of that format and shape.
        FormatError: ``format`` names no format.
        ModuleNotFoundError: ``entropy`` is asked for, and constriction is not installed.
    """
    fmt = format if isinstance(format, BFPFormat) else BFPFormat.parse(format)
    names = _tried(coding)
    _check_planes(planes, fmt, shape)
    symbols = streams.split([plane.detach().cpu() for plane in planes], fmt, shape)
    coded = [_least(stream, layout, names) for stream, layout in zip(symbols, streams.layouts(fmt, shape), strict=True)]
    table = b"".join(bytes([_NAMES.index(name)]) + len(data).to_bytes(8, "little") for name, data in coded)
    body = b"".join([_described(fmt, shape), bytes([len(coded)]), table, *(data for _, data in coded)])
    whole = _MAGIC + bytes([_VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body
    return torch.from_numpy(np.frombuffer(whole, np.uint8).copy())


def decode(data: Tensor, format: str | BFPFormat, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The planes, on the CPU, that ``encode`` was given with the same ``format`` and ``shape``.

    Raises:
        CodingError: ``data`` is no such coding, is damaged, or is of another format or shape; the message says what it is.
        FormatError: ``format`` names no format.
        ModuleNotFoundError: a stream is coded by ``entropy``, and constriction is not installed.
    """
    fmt = format if isinstance(format, BFPFormat) else BFPFormat.parse(format)
    reader = Reader(_checked_body(data))
    found = _format_and_shape(reader)
    if found != (str(fmt), list(shape)):
        raise CodingError(f"the data is of format '{found[0]}', shape {found[1]}, not '{fmt}', {list(shape)}")
    layouts = streams.layouts(fmt, shape)
    count = reader.integer(1)
    if count != len(layouts):
        raise CodingError(f"the data has {count} streams, where format '{fmt}' has {len(layouts)}")
    table = [(reader.integer(1), reader.integer(8)) for _ in layouts]
    symbols = [_decoded(*entry, reader, layout) for entry, layout in zip(table, layouts, strict=True)]
    reader.end()
    return streams.join(symbols, fmt, shape)


def header_bytes(format: str | BFPFormat, shape: Sequence[int]) -> int:
    """Bytes that ``encode`` adds to those of the streams."""
    fmt = format if isinstance(format, BFPFormat) else BFPFormat.parse(format)
    return len(_MAGIC) + 5 + len(_described(fmt, shape)) + 1 + 9 * len(streams.layouts(fmt, shape))


def _tried(coding: str) -> list[str]:
    """The names of the codings among which the least is taken."""
    if coding != "auto":
        if coding not in CODINGS:
            raise CodingError(f"unknown coding {coding!r}; known: auto, {', '.join(CODINGS)}")
        return [coding]
    try:
        ans()
    except ModuleNotFoundError:
        return [name for name in CODINGS if name != "entropy"]
    return _NAMES


def _check_planes(planes: Sequence[Tensor], fmt: BFPFormat, shape: Sequence[int]) -> None:
    expected = [f"{p.name} {p.dtype} [{p.length}]" for p in fmt.planes(fmt.stored_numel(shape))]
    found = [f"{str(plane.dtype).removeprefix('torch.')} {list(plane.shape)}" for plane in planes]
    if found != [text.partition(" ")[2] for text in expected]:
        raise CodingError(
            f"format '{fmt}' stores shape {list(shape)} as {', '.join(expected)}; found {', '.join(found) or 'nothing'}"
        )


def _least(symbols: Symbols, layout: Layout, names: Sequence[str]) -> tuple[str, bytes]:
    return min(((name, CODINGS[name][0](symbols, layout)) for name in names), key=lambda made: len(made[1]))


def _described(fmt: BFPFormat, shape: Sequence[int]) -> bytes:
    text = str(fmt).encode()
    dims = b"".join(int(dim).to_bytes(8, "little") for dim in shape)
    return len(text).to_bytes(2, "little") + text + bytes([len(shape)]) + dims


def _format_and_shape(reader: Reader) -> tuple[str, list[int]]:
    text = reader.take(reader.integer(2)).decode(errors="replace")
    return text, [reader.integer(8) for _ in range(reader.integer(1))]


def _checked_body(data: Tensor) -> bytes:
    """What lies behind the checksum."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise CodingError(
            f"coded planes are a uint8 tensor of one dimension, not {data.dtype} of shape {list(data.shape)}"
        )
    reader = Reader(data.detach().cpu().numpy().tobytes())
    magic, version = reader.take(4), reader.integer(1)
    if magic != _MAGIC:
        raise CodingError(f"coded planes begin with {_MAGIC!r}, and this data with {magic!r}")
    if version != _VERSION:
        raise CodingError(f"the data is of version {version}; this fxpipe reads version {_VERSION}")
    checksum, body = reader.integer(4), reader.rest()
    if zlib.crc32(body) != checksum:
        raise CodingError(
            f"the data is damaged: the checksum of its {len(body)} bytes is {zlib.crc32(body):08x}, not {checksum:08x}"
        )
    return body


def _decoded(number: int, size: int, reader: Reader, layout: Layout) -> Symbols:
    if number >= len(_NAMES):
        raise CodingError(f"stream {layout.name} has coding {number}; known: 0 to {len(_NAMES) - 1}")
    name = _NAMES[number]
    data = reader.take(size)
    try:
        return CODINGS[name][1](data, layout)
    except CodingError as error:
        raise CodingError(f"stream {layout.name}, coded as {name} in {size} bytes: {error}") from error
