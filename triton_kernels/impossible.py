"""Why some combinations of a format's fields cannot be. Imports no torch."""

import itertools

from . import codebooks
from .grammar import BLOCKS, WIDTHS
from .scales import SCALES

MAX_THRESHOLD = 13


def why_not(
    width: int,
    block: int,
    unsigned: bool,
    rows: int,
    codebook: str,
    twos: bool,
    scale: str,
    search: bool,
    absmax: bool,
    rounding: str,
    outliers: int,
    outlier_threshold: int,
    dither: str,
) -> str:
    """The reason why no ``BFPFormat`` has these fields, or nothing."""
    bits = width if unsigned else width - 1
    rules = (
        (width not in WIDTHS, f"the width is {width}"),
        (block not in BLOCKS, f"the block is {block}"),
        (rows < 0 or (rows > 0 and block % rows != 0), f"the block of {block} has {rows} rows"),
        (scale not in SCALES, f"the scale is {scale!r}"),
        (rounding not in ("nearest", "sr", "hash", "trunc"), f"the rounding is {rounding!r}"),
        (dither not in ("", "uniform", "density"), f"the dither is {dither!r}"),
        (twos and unsigned, "'+twos' and '+unsigned' exclude each other: there is no sign to complement"),
        (
            scale == "se5m2" and not codebook,
            "'+se5m2', a scale with a sign, needs a codebook: even levels are symmetric",
        ),
        (scale == "se5m2" and unsigned, "'+se5m2', a scale with a sign, and '+unsigned' exclude each other"),
        (bool(codebook) and twos, "codebooks have a sign and a level, not '+twos'"),
        (
            bool(codebook) and rounding != "nearest",
            f"'+{rounding}' does not go with a codebook: its top level may lie below the largest value, and either way "
            "of rounding would be biased",
        ),
        (search and absmax, "'+search' and '+absmax' exclude each other: each says how the scale is chosen"),
        (
            absmax and scale in SCALES and SCALES[scale].mantissa_bits == 0,
            "'+absmax' puts the largest value at the top level, for which a power of two is too coarse: it needs a float "
            "scale",
        ),
        (absmax and rounding != "nearest", f"'+absmax' may clip the largest value, which would bias '+{rounding}'"),
        (
            absmax and codebook == "learned",
            "':learned' levels are fitted after the scale, and '+absmax' needs them before",
        ),
        (search and rounding != "nearest", f"'+search' weighs errors of rounding to nearest, not of '+{rounding}'"),
        (not 0 <= outliers < block, f"{outliers} outliers leave none of a block's {block} values"),
        (not 0 <= outlier_threshold <= MAX_THRESHOLD, f"an outlier is at most 2^{MAX_THRESHOLD} times the rest"),
        (outlier_threshold > 0 and outliers == 0, "a threshold needs outliers"),
    )
    reasons = [reason for applies, reason in rules if applies]
    if reasons or not codebook:
        return reasons[0] if reasons else ""
    if scale == "se5m2":
        return _why_not_signed(codebook, width) or _why_no_top(codebook, absmax)
    return _why_not_codebook(codebook, bits, unsigned)


def _why_not_signed(codebook: str, width: int) -> str:
    if width > codebooks.MAX_SIGNED_WIDTH:
        return f"under '+se5m2' a codebook has at most {1 << codebooks.MAX_SIGNED_WIDTH} levels: widths 2 and 3"
    if codebook in codebooks.LOSSY:
        return f"':{codebook}' has magnitudes, and '+se5m2' is for levels with their signs"
    return "" if codebook in codebooks.NAMES else _why_not_levels(codebook, width, signed=True)


def _why_no_top(codebook: str, absmax: bool) -> str:
    if not absmax or codebook in codebooks.NAMES:
        return ""
    top = codebooks.from_hex(codebook, signed=True)[-1]
    return "" if top > 0 else f"'+absmax' puts the largest value at the top level, which is {top}"


def _why_not_codebook(codebook: str, bits: int, unsigned: bool) -> str:
    """The reason why codes of ``bits`` bits of magnitude cannot have this codebook, or nothing."""
    if bits > codebooks.MAX_BITS:
        widths = "2 to 4" if unsigned else "2 to 5"
        return f"a codebook has at most {1 << codebooks.MAX_BITS} levels: widths {widths}"
    if codebook in codebooks.LOSSY:
        wanted = codebooks.LOSSY[codebook][0]
        widths = f"bfp{wanted + 1}" + (f", or bfp{wanted} with '+unsigned'" if wanted > 1 else "")
        return "" if bits == wanted else f"':{codebook}' has {wanted} bits of magnitude: {widths}"
    return "" if codebook in codebooks.NAMES else _why_not_levels(codebook, bits, unsigned=unsigned)


def _why_not_levels(codebook: str, bits: int, *, unsigned: bool = False, signed: bool = False) -> str:
    if any(digit not in "0123456789abcdef" for digit in codebook):
        return f"unknown codebook ':{codebook}'"
    if len(codebook) % 2 or not 4 <= len(codebook) <= 2 << bits:
        return f"it takes 2 to {1 << bits} levels, two hexadecimal digits each, and ':{codebook}' has {len(codebook)} digits"
    levels = codebooks.from_hex(codebook, signed=signed)
    if any(a >= b for a, b in itertools.pairwise(levels)):
        return f"the levels {list(levels)} do not rise"
    if signed and levels[0] < codebooks.SIGNED_GRID[0]:
        return f"the first level is {levels[0]}, and the least is {codebooks.SIGNED_GRID[0]}"
    return f"the first level is {levels[0]}, and '+unsigned' has 0 there" if unsigned and levels[0] else ""
