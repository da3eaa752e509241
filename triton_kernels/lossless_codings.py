"""The codings of a stream of symbols: exact by definition, each a pair of functions in ``CODINGS``.

An encoder takes the symbols and their layout and returns bytes; the decoder gives the same symbols for the bytes and the
layout, and raises CodingError for bytes that no encoder wrote. Integers of more than a byte have their little end first.
Source of the list: US12277502B2 (further lossless coding of compressed activations: zero compression, run lengths,
sparse rows and columns, entropy coding).
"""

import zlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from .bit_fields import CodingError, Reader, pack
from .streams import Layout, Symbols

Encoder = Callable[[Symbols, Layout], bytes]
Decoder = Callable[[bytes, Layout], Symbols]


def raw(symbols: Symbols, layout: Layout) -> bytes:
    """The symbols, packed: as many bytes as the planes."""
    return pack(symbols, layout.bits)


def raw_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    symbols = reader.fields(layout.length, layout.bits)
    reader.end()
    return symbols.astype(np.uint8)


def zero(symbols: Symbols, layout: Layout) -> bytes:
    """A byte g; a bit for each 2^g symbols, set where one is not zero; these groups, packed. g is 0 to 7, for least size."""
    log = min(range(8), key=lambda log: _zero_bits(symbols, log, layout.bits))
    groups, some = _zero_groups(symbols, log)
    return bytes([log]) + pack(some, 1) + pack(groups[some > 0].reshape(-1), layout.bits)


def _zero_groups(symbols: Symbols, log: int) -> tuple[Symbols, Symbols]:
    """The symbols in groups of 2^log, filled up with zeros; 1 for each group in which one is not zero."""
    groups = np.pad(symbols, (0, -len(symbols) % (1 << log))).reshape(-1, 1 << log)
    return groups, np.asarray(groups.any(axis=1)).astype(np.uint8)


def _zero_bits(symbols: Symbols, log: int, bits: int) -> int:
    groups, some = _zero_groups(symbols, log)
    return len(groups) + (int(some.sum()) * bits << log)


def zero_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    log = reader.integer(1)
    if log > 7:
        raise CodingError(f"groups of 2^{log} symbols, where there are at most 2^7")
    some = reader.fields(-(-layout.length >> log), 1).astype(bool)
    groups = np.zeros((len(some), 1 << log), np.uint8)
    groups[some] = reader.fields(int(some.sum()) << log, layout.bits).reshape(-1, 1 << log)
    reader.end()
    return groups.reshape(-1)[: layout.length]


def run_length(symbols: Symbols, layout: Layout) -> bytes:
    """A byte r, 8 bytes t; t run lengths of r bits; the symbols that are not zero, packed. r is 1 to 8, for least size.

    A run length is of zeros, a symbol that is not zero behind them; 2^r - 1 stands for as many zeros and no symbol. Zeros at
    the end are not written.
    """
    places = np.flatnonzero(symbols)
    zeros = np.diff(places, prepend=-1) - 1
    bits = min(range(1, 9), key=lambda r: (len(zeros) + int((zeros // ((1 << r) - 1)).sum())) * r)
    most = (1 << bits) - 1
    full, last = np.divmod(zeros, most)
    runs = np.full(len(zeros) + int(full.sum()), most)
    runs[np.cumsum(full + 1) - 1] = last
    return bytes([bits]) + len(runs).to_bytes(8, "little") + pack(runs, bits) + pack(symbols[places], layout.bits)


def run_length_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    bits, count = reader.integer(1), reader.integer(8)
    if not 1 <= bits <= 8:
        raise CodingError(f"run lengths of {bits} bits, where there are 1 to 8")
    runs = reader.fields(count, bits)
    ends = runs < (1 << bits) - 1
    places = (np.cumsum(runs + ends) - 1)[ends]
    return _scattered(places, reader, layout)


def sparse_row(symbols: Symbols, layout: Layout) -> bytes:
    """By row of the matrix: a byte w; for each row, in w bits, how many of its symbols are not zero; the columns of these, row
    by row, in as many bits as the last column's number has; these symbols, packed."""
    places = np.flatnonzero(symbols)
    rows, columns = np.divmod(places, layout.columns)
    return _sparse(rows, columns, _n_rows(layout), layout.columns) + pack(symbols[places], layout.bits)


def sparse_row_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    rows, columns = _sparse_decoded(reader, _n_rows(layout), layout.columns)
    return _scattered(rows * layout.columns + columns, reader, layout)


def sparse_column(symbols: Symbols, layout: Layout) -> bytes:
    """The same by column: how many in each, and their rows."""
    rows, columns = np.divmod(np.flatnonzero(symbols), layout.columns)
    order = np.lexsort((rows, columns))
    rows, columns = rows[order], columns[order]
    values = symbols[rows * layout.columns + columns]
    return _sparse(columns, rows, layout.columns, _n_rows(layout)) + pack(values, layout.bits)


def sparse_column_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    columns, rows = _sparse_decoded(reader, layout.columns, _n_rows(layout))
    return _scattered(rows * layout.columns + columns, reader, layout)


def _n_rows(layout: Layout) -> int:
    return -(-layout.length // layout.columns)


def _sparse(lines: NDArray[np.int64], inside: NDArray[np.int64], n_lines: int, length: int) -> bytes:
    counts = np.bincount(lines, minlength=n_lines)
    bits = int(counts.max(initial=0)).bit_length()
    return bytes([bits]) + pack(counts, bits) + pack(inside, _index_bits(length))


def _sparse_decoded(reader: Reader, n_lines: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    bits = reader.integer(1)
    counts = reader.fields(n_lines, min(bits, 63))
    if bits > 63 or counts.max(initial=0) > length:
        raise CodingError(f"a line of {length} symbols has more than so many that are not zero")
    return np.repeat(np.arange(n_lines), counts), reader.fields(int(counts.sum()), _index_bits(length))


def _index_bits(length: int) -> int:
    return max(length - 1, 0).bit_length()


def _scattered(places: NDArray[np.int64], reader: Reader, layout: Layout) -> Symbols:
    """The rest of the reader, at these places, and zeros elsewhere."""
    values = reader.fields(len(places), layout.bits)
    reader.end()
    if len(places) and int(places.max()) >= layout.length:
        raise CodingError(f"a symbol at place {int(places.max())} of {layout.length}")
    symbols = np.zeros(layout.length, np.uint8)
    symbols[places] = values
    return symbols


def deflate(symbols: Symbols, layout: Layout) -> bytes:
    """The packed symbols by zlib (RFC 1950): repeats and Huffman codes of bytes."""
    return zlib.compress(raw(symbols, layout))


def deflate_decoded(data: bytes, layout: Layout) -> Symbols:
    inflate = zlib.decompressobj()
    try:
        packed = inflate.decompress(data, layout.n_bytes + 1)
    except zlib.error as error:
        raise CodingError(f"zlib says: {error}") from error
    if not (inflate.eof or not data) or inflate.unused_data:
        raise CodingError(f"zlib's data does not end with its {len(packed)} bytes, where {layout.n_bytes} are expected")
    return raw_decoded(packed, layout)


def entropy(symbols: Symbols, layout: Layout) -> bytes:
    """A byte: the least symbol; a byte: how many symbols there may be from it on, less 1; their frequencies of 2 bytes each;
    words of 4 bytes, by asymmetric numeral systems with these frequencies. Alike symbols take no word.

    Raises:
        ModuleNotFoundError: the package constriction is not installed.
    """
    constriction = ans()
    least = int(symbols.min(initial=255)) if len(symbols) else 0
    counts = np.bincount(symbols)[least:] if len(symbols) else np.ones(1, np.int64)
    frequencies = -(-counts * _MOST_FREQUENT // counts.max())
    table = bytes([least, len(counts) - 1]) + pack(frequencies, 16)
    if len(counts) == 1:
        return table
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32) - least, _model(frequencies, constriction))
    words: NDArray[np.uint32] = coder.get_compressed()
    return table + words.astype("<u4").tobytes()


def entropy_decoded(data: bytes, layout: Layout) -> Symbols:
    reader = Reader(data)
    least, count = reader.integer(1), reader.integer(1) + 1
    frequencies, words = reader.fields(count, 16), reader.rest()
    if count == 1:
        Reader(words).end()
        if least >> layout.bits:
            raise CodingError(f"symbol {least} in a stream of {layout.bits} bits")
        return np.full(layout.length, least, np.uint8)
    if len(words) % 4 or not frequencies.any():
        raise CodingError(
            f"{len(words)} bytes of words of 4 bytes, under {int((frequencies > 0).sum())} frequencies above 0"
        )
    constriction = ans()
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    except ValueError as error:
        raise CodingError(f"the words are none of the coder: {error}") from error
    symbols: NDArray[np.int32] = coder.decode(_model(frequencies, constriction), layout.length) + least
    if not coder.is_empty() or symbols.max(initial=0) >> layout.bits:
        raise CodingError(f"the words are not those of {layout.length} symbols of {layout.bits} bits")
    return symbols.astype(np.uint8)


_MOST_FREQUENT = (1 << 16) - 1


def _model(frequencies: NDArray[np.int64], constriction: ModuleType) -> object:
    return constriction.stream.model.Categorical(frequencies.astype(np.float64) / frequencies.sum(), perfect=False)


def ans() -> ModuleType:
    """The package constriction, the coder of asymmetric numeral systems (Duda, 2013) behind ``entropy``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import constriction
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "coding 'entropy' needs the package constriction, which is not installed: pip install 'fxpipe[coding]'; "
            "'deflate' needs nothing"
        ) from error
    module: ModuleType = constriction
    return module


CODINGS: dict[str, tuple[Encoder, Decoder]] = {
    "raw": (raw, raw_decoded),
    "zero": (zero, zero_decoded),
    "run-length": (run_length, run_length_decoded),
    "sparse-row": (sparse_row, sparse_row_decoded),
    "sparse-column": (sparse_column, sparse_column_decoded),
    "deflate": (deflate, deflate_decoded),
    "entropy": (entropy, entropy_decoded),
}
"""By name; their order is their number in a file."""
