"""``fxpipe formats``: the family of storage formats with bits, signal to noise, bounds, and where the bits lie."""

import math
from typing import Any

import torch

from fxpipe import printing
from fxpipe.triton_kernels.format import GROUP, BFPFormat
from fxpipe.triton_kernels.reference import compress, decompress

FAMILY = {
    "bfp8b32": "as good as exact for training",
    "bfp5b32:gauss+e5m3+search": "the best at 5 bits",
    "bfp4b32": "the simplest and fastest at 4 bits",
    "bfp4b32+sr": "rounded at random, from a seed: without bias",
    "bfp4b32+hash": "the same from the value's own bits: without a seed",
    "bfp4b32+e5m3": "even levels, a finer scale",
    "bfp4b32:gauss+e5m3+search": "the best at 4 bits",
    "bfp4b32+unsigned": "for values that are never negative: zeros stay exact",
    "bfp4b32:gauss+unsigned+e5m3+search": "the best of these",
    "bfp4b128:gauss+e5m3+search+o2": "two outliers a block apart: heavy tails",
    "bfp4b4x8+e5m3": "tiles of a matrix",
    "bfp4b32+dither": "decoded at random in the code's cell, from a seed",
    "bfp3b32": "the simplest at 3 bits",
    "bfp3b32:lossy-lite": "the mantissas 0, 1, 3, 7",
    "bfp3b32:gauss+se5m2+search": "the best at 3 bits",
    "bfp3b32:gauss+e5m3+absmax": "the largest value of a block kept in place: for training",
    "bfp3b128+e5m3+search+o2": "even levels, two outliers: heavy tails",
    "bfp2b32:learned+se5m2+search": "levels fitted to each tensor",
    "bfp2b32:gauss+se5m2+search": "the best at 2 bits",
}
"""Formats worth knowing, and for what."""

_SAMPLES = 1 << 16


def rows(texts: list[str]) -> list[dict[str, Any]]:
    """What there is to say of each format: ``decibels`` are for Gaussian values, or their ReLU with ``+unsigned``.

    Raises:
        FormatError: a text names no format (``fxpipe.triton_kernels``).
    """
    formats = [BFPFormat.parse(text) for text in texts]
    return [
        {
            "format": str(fmt),
            "bits": fmt.bits_per_value,
            "decibels": round(decibels(fmt), 1),
            "error_bound": fmt.error_bound(),
            "block": layout(fmt),
            "use": FAMILY.get(str(fmt), ""),
        }
        for fmt in formats
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with the key to the letters."""
    cells = [
        [r["format"], f"{r['bits']:.3f}", f"{r['decibels']:.1f}", f"{r['error_bound']:.3f}", r["block"], r["use"]]
        for r in rows
    ]
    headers = ["format", "bits", "dB", "error", "a block's bits", ""]
    return f"{printing.table(cells, headers)}\n\n{_KEY}"


_KEY = """\
dB: signal to noise of Gaussian values (+unsigned: of their ReLU). error: the most that a value can be off, as a share of its
block's largest. Bits: s sign, m magnitude, i index of a level, e exponent, f fraction of a scale; of an outlier e exponent,
x mantissa, p place. `fxpipe formats FORMAT` draws each byte; the notation is described in help(fxpipe.BFPFormat)."""


def layout(fmt: BFPFormat) -> str:
    """A block in one line, such as ``32 * smmm + eeeeeeee``."""
    signed = not fmt.unsigned and not fmt.signed_levels
    code = "s" * signed + ("i" if fmt.codebook else "m") * (fmt.width - signed)
    scale = fmt.scale_kind
    fraction = scale.mantissa_bits
    parts = [
        f"{fmt.block} * {code}",
        "s" * scale.signed + "e" * (scale.bits - scale.signed - fraction) + "f" * fraction,
    ]
    if fmt.outliers:
        parts.append(f"{fmt.outliers} * eeee{'x' * fmt.outlier_extra_bits}{'p' * fmt.outlier_index_bits}")
    return " + ".join(parts)


def drawing(fmt: BFPFormat) -> str:
    """Every byte of eight values, high bit on the left: the value that each bit is of, s its sign; then the planes."""
    signed = not fmt.unsigned and not fmt.signed_levels
    bits = [
        "s" if signed and place == fmt.width - 1 else str(value) for value in range(GROUP) for place in range(fmt.width)
    ]
    split = ["".join(reversed(bits[start : start + 8])) for start in range(0, len(bits), 8)]
    heads = "".join(f"byte {i}".ljust(12) for i in range(len(split)))
    bytes_ = "".join(f"{byte[:4]} {byte[4:]}".ljust(12) for byte in split)
    planes = [f"  {p.name:10}{p.dtype} [{p.length}]" for p in fmt.planes(1 << 20)]
    levels = [f"levels of {255 if not fmt.signed_levels else 127}: {list(fmt.levels)}"] if fmt.levels else []
    return "\n".join([str(fmt), heads.rstrip(), bytes_.rstrip(), *levels, f"planes of {1 << 20} values:", *planes])


def decibels(fmt: BFPFormat) -> float:
    """Signal to noise of 65,536 Gaussian values, or of their ReLU."""
    x = torch.randn(_SAMPLES, generator=torch.Generator().manual_seed(0))
    x = x.relu() if fmt.unsigned else x
    seed = torch.tensor(0)
    y = decompress(compress(x, fmt, seed), fmt, x.numel(), x.dtype, seed)
    return 10 * math.log10(float(x.square().sum() / (x - y).square().sum()))
