"""The levels of non-uniform codes: the sets that have names, and how a set is fitted to data. Imports no torch.

A codebook is a rising tuple of magnitudes in 0 .. 255. Values become integers n on the grid of ``GRID_BITS`` bits of
magnitude, as in ``bfp8`` but without the sign, and the code of n is the index of the nearest level, ties to the lower one.

``lossy-lite``, ``lossy-normal`` and ``lossy-aggressive`` are the sets {0, 1, 3, 7}, {0, 1, 7} and {0, 7} of the values of
a 3-bit mantissa: US12277502B2 and its parent US11562247B2. The sets are those of the patent as a published summary quotes
them; which name goes with which set is our reading, by their size.
"""

import itertools
from collections.abc import Sequence

GRID_BITS = 8
"""Bits of the magnitudes that a codebook is made of."""

TOP = (1 << GRID_BITS) - 1
GRID = range(TOP + 1)
SIGNED_GRID = range(-127, 128)
"""Of levels that have their signs, under a signed scale: of 7 bits of magnitude, so that a level is a byte."""

MAX_BITS = 4
"""Most bits of magnitude that a code may have: 16 levels."""

LOSSY = {"lossy-lite": (2, (0, 1, 3, 7)), "lossy-normal": (2, (0, 1, 7)), "lossy-aggressive": (1, (0, 7))}
"""The patents' sets: bits of magnitude, and the values of a 3-bit mantissa that are kept."""

MAX_SIGNED_WIDTH = 3
"""Most bits of a code whose level has its sign: 8 levels."""

NAMES = ("gauss", "learned", *LOSSY)

# Least squared error for Gaussian values under the scale of a block (and for their ReLU): levels of 1, 2, 3 and 4 bits.
# By signed or unsigned, scale a float or a power of two, and block. Fitted to 2^19 samples, under searched scales for floats.
_GAUSS = {
    (False, False, 8): "33bf 194e8eea 0c243d567291b7e7 06111d2a3743505d6b7a899aadc3dfec",
    (False, False, 16): "2faa 194c8be7 0c233c557190b6e7 06111d2a3743505d6a79899aacc1deef",
    (False, False, 32): "2fa2 174883dc 0c233a536e8db4e9 06111d2a3643505d6a798899abc0ddfa",
    (False, False, 64): "2f9f 17467fd2 0b223a536e8db4eb 06111c2835424f5c69778697a9bed8f7",
    (False, False, 128): "2d98 16447bca 0b2239526d8cb3ec 06111c2835424f5c69778696a8bdd7fa",
    (False, True, 8): "2891 164683c4 0a1f364e698aadde 040d161f28333e4a576676879aafcaeb",
    (False, True, 16): "2481 143f74b6 0a1d32496485a8da 040c151e27303b465362738596abc6e9",
    (False, True, 32): "206d 11345f9d 091a2d41577294c9 040b141d262f38414c596675879cb9e2",
    (False, True, 64): "1e63 1031588f 08192a3d526988b7 040b141d262f38414a5562718093aed5",
    (False, True, 128): "1d60 0f305589 08192a3c4f6683ae 040b141d262f38414a55616e7d90a7ca",
    (True, False, 8): "0088 002475eb 000e29466588b2e7 000613202d3a475665748596aac1dfec",
    (True, False, 16): "006f 002372e6 000d28456487b1e8 000613202d3a475564738495a9c0deed",
    (True, False, 32): "0062 00226ddb 000d28446385aee7 000613202d3a475564738394a7bcdbee",
    (True, False, 64): "005a 002067cc 000d28436182ace7 000613202d3a475564738394a6bbd7f6",
    (True, False, 128): "0053 001f62be 000d28436082ace9 000613202d3a475463728293a5bad5f5",
    (True, True, 8): "0057 001a55a6 000d2844638aaedf 00050f18222d3946556475879ab0cbec",
    (True, True, 16): "0048 001952a3 000d26416086a9dc 00050f18222d39465362738698adc8eb",
    (True, True, 32): "003e 00184d9a 000a1f354e6d92cd 00040d161f28323d48556475889fbce4",
    (True, True, 64): "0037 0016478c 000a1e334c698ec5 00040d161f28323d48556372859ab7e0",
    (True, True, 128): "0034 0015427e 00091c31465f80af 00040d161f28313b46515e6d7d90a9d2",
}


# The same for values with their signs, 2 and 3 bits, under a scale that has the sign of the largest value.
_GAUSS_SIGNED = {
    8: "bbf2246c a7cbe6fe152e4d75",
    16: "b9f1246c a7cbe6fe152e4b75",
    32: "b6f12469 a7cbe6fe152e4b75",
    64: "b3ee2162 a6cbe6fe152e4b76",
    128: "baed1a4f a6cbe6fe152d4a75",
}


def gauss(bits: int, block: int, *, unsigned: bool, power_of_two: bool) -> tuple[int, ...]:
    """The levels of ``bits`` bits of magnitude for Gaussian values in blocks of ``block``, or for their ReLU."""
    return from_hex(_GAUSS[unsigned, power_of_two, block].split()[bits - 1], signed=False)


def gauss_signed(width: int, block: int) -> tuple[int, ...]:
    """The levels of ``width`` bits for Gaussian values in blocks of ``block`` whose largest value is made positive."""
    return from_hex(_GAUSS_SIGNED[block].split()[width - 2], signed=True)


def from_hex(text: str, *, signed: bool) -> tuple[int, ...]:
    """The levels that two hexadecimal digits each spell: bytes, of which 128 and more are negative if ``signed``."""
    return tuple(byte - 256 if signed and byte > TOP // 2 else byte for byte in bytes.fromhex(text))


def lossy(name: str) -> tuple[int, ...]:
    """The levels of one of ``LOSSY``."""
    return tuple(value << (GRID_BITS - 3) for value in LOSSY[name][1])


def codes_of_grid(levels: Sequence[int], grid: range = GRID) -> list[int]:
    """The code of each n of the grid: the index of the nearest level, ties to the lower one."""
    return [sum(2 * n > a + b for a, b in itertools.pairwise(levels)) for n in grid]


def fit(
    histogram: Sequence[int], start: Sequence[int], *, grid: range, rounds: int, first_is_zero: bool
) -> tuple[int, ...]:
    """Levels of small squared error for values on the grid, counted by ``histogram``: Lloyd's algorithm, in integers.

    With ``first_is_zero`` the first level stays 0, for zeros alone, and counted values go to the others.
    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    fixed, levels = ([0], list(start[1:])) if first_is_zero else ([], list(start))
    for _ in range(rounds):
        counts, sums = [0] * len(levels), [0] * len(levels)
        for n, code, count in zip(grid, codes_of_grid(levels, grid), histogram, strict=True):
            counts[code] += count
            sums[code] += count * n
        means = [(2 * s + c) // (2 * c) if c else level for s, c, level in zip(sums, counts, levels, strict=True)]
        moved = _rising(means, len(fixed) or grid[0], grid[-1])
        if moved == levels:
            break
        levels = moved
    return (*fixed, *levels)


def _rising(levels: list[int], least: int, greatest: int) -> list[int]:
    """The same, moved as little as makes each greater than the one before it, within ``least`` .. ``greatest``."""
    for i, level in enumerate(levels):
        levels[i] = max(level, levels[i - 1] + 1 if i else least)
    for i in reversed(range(len(levels))):
        levels[i] = min(levels[i], levels[i + 1] - 1 if i + 1 < len(levels) else greatest)
    return levels


def cells(
    levels: Sequence[int], n_levels: int, grid: range, *, signed: bool, first_is_zero: bool
) -> tuple[list[int], list[int]]:
    """The least and the greatest n of each code's cell; those at the ends reach as far beyond the level as before it.

    Codes beyond the levels, up to ``n_levels``, have the last level's.
    """
    edges = [(a + b) // 2 for a, b in itertools.pairwise(levels)]
    lowest = max(grid[0], 2 * levels[0] - edges[0]) if signed else 0
    first = [lowest, *(edge + 1 for edge in edges)]
    if first_is_zero:
        first[1] = 1
    last = [*edges, min(grid[-1], 2 * levels[-1] - first[-1])]
    spare = n_levels - len(levels)
    return first + first[-1:] * spare, last + last[-1:] * spare
