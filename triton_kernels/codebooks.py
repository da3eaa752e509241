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
MAX_BITS = 4
"""Most bits of magnitude that a code may have: 16 levels."""

LOSSY = {"lossy-lite": (2, (0, 1, 3, 7)), "lossy-normal": (2, (0, 1, 7)), "lossy-aggressive": (1, (0, 7))}
"""The patents' sets: bits of magnitude, and the values of a 3-bit mantissa that are kept."""

NAMES = ("gauss", "learned", *LOSSY)

# Least squared error for Gaussian values under the scale of a block (and for their ReLU): levels of 1, 2, 3 and 4 bits.
# By signed or unsigned, scale a float or a power of two, and block. Fitted to 2^18 samples, searched scales for floats.
_GAUSS = {
    (False, False, 8): "31b5 194d8be6 0c243d567291b7e7 06121e2a3743505d6b7a899aadc3deec",
    (False, False, 16): "2fa9 184a87e1 0c233c557190b6e7 06121e2a3743505d6b79899aacc1dded",
    (False, False, 32): "2fa2 174882da 0b233a536e8eb4e9 06121e2a3743505d6b798899abbfdbf0",
    (False, False, 64): "2f9f 17467fd2 0b223a536e8db3eb 06121e2a36434f5c6a788697a9bdd7f4",
    (False, False, 128): "2e9a 16457bca 0b2239526d8cb3ec 06121e2a36434f5c69778696a8bdd7f8",
    (False, True, 8): "2891 164683c5 0a1f354d698aadde 040d161f29333e4a5765758799afcaeb",
    (False, True, 16): "2480 143e72b5 091d32486383a6d9 040d151e27313b475361718395aac5e8",
    (False, True, 32): "206e 11345e9c 081a2c40567092c8 040d151d262f38424c586575879cb8e2",
    (False, True, 64): "1d63 1032588f 08192a3c506887b4 040d151d262f38414b55626f8093add5",
    (False, True, 128): "1d61 1030568a 08192a3b4f6683ad 040d151d262f38414a55606e7d8fa7cb",
    (True, False, 8): "0085 002373e7 000d29466588b1e7 000613202d3a485664748496aac1dfeb",
    (True, False, 16): "006e 002370e1 000d28456486b0e7 000613202d3a485664738495a9c0deec",
    (True, False, 32): "0062 00216bd7 000d28446385aee7 000613202d3a485664738394a7bcdbee",
    (True, False, 64): "005d 002066c9 000d28436182ace7 000613202d3a485664738394a6bad6f2",
    (True, False, 128): "0057 001f62be 000d28436182ace8 000613202d3a485563728293a5bad5f4",
    (True, True, 8): "0057 001a55a6 000d2744638aaedf 00050e18222d39465464758799afcaec",
    (True, True, 16): "0048 001952a2 000c26416086aadc 00050e18222d39465362738698adc8ea",
    (True, True, 32): "003e 00184d9b 000a1f354e6c92cd 00040d161f29323d48556374889fbce4",
    (True, True, 64): "0037 0016478c 000a1e334c688dc4 00040d161f29323d48546272859ab7e0",
    (True, True, 128): "0034 0015427e 00091c30465f7faf 00040d161f28323c46515e6c7c90a9d3",
}


def gauss(bits: int, block: int, *, unsigned: bool, power_of_two: bool) -> tuple[int, ...]:
    """The levels of ``bits`` bits of magnitude for Gaussian values in blocks of ``block``, or for their ReLU."""
    return tuple(bytes.fromhex(_GAUSS[unsigned, power_of_two, block].split()[bits - 1]))


def lossy(name: str) -> tuple[int, ...]:
    """The levels of one of ``LOSSY``."""
    return tuple(value << (GRID_BITS - 3) for value in LOSSY[name][1])


def codes_of_grid(levels: Sequence[int]) -> list[int]:
    """The code of each n in 0 .. 255: the index of the nearest level, ties to the lower one."""
    return [sum(2 * n > a + b for a, b in itertools.pairwise(levels)) for n in range(TOP + 1)]


def fit(histogram: Sequence[int], start: Sequence[int], *, rounds: int, first_is_zero: bool) -> tuple[int, ...]:
    """Levels of small squared error for values whose n is counted by ``histogram`` [256]: Lloyd's algorithm, in integers.

    With ``first_is_zero`` the first level stays 0, for zeros alone, and counted values go to the others.
    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    fixed, levels = ([0], list(start[1:])) if first_is_zero else ([], list(start))
    for _ in range(rounds):
        counts, sums = [0] * len(levels), [0] * len(levels)
        for n, code in enumerate(codes_of_grid(levels)):
            counts[code] += histogram[n]
            sums[code] += histogram[n] * n
        means = [(2 * s + c) // (2 * c) if c else level for s, c, level in zip(sums, counts, levels, strict=True)]
        moved = _rising(means, len(fixed))
        if moved == levels:
            break
        levels = moved
    return (*fixed, *levels)


def _rising(levels: list[int], least: int) -> list[int]:
    """The same, moved as little as makes each greater than the one before it, within ``least`` .. 255."""
    for i, level in enumerate(levels):
        levels[i] = max(level, levels[i - 1] + 1 if i else least)
    for i in reversed(range(len(levels))):
        levels[i] = min(levels[i], levels[i + 1] - 1 if i + 1 < len(levels) else TOP)
    return levels
