"""Zero compression once more, in Python's integers: the layout in the docstring of ``zero_reference``, word for word."""

from collections.abc import Sequence


def zero_compressed(codes: Sequence[int], width: int, tile_groups: int) -> tuple[list[int], list[int], list[int]]:
    """Mask, start, and the words of payload that are used (unsigned)."""
    groups = [codes[i : i + 8] for i in range(0, len(codes), 8)]
    mask = [sum((code != 0) << j for j, code in enumerate(group)) for group in groups]
    start, words = [0], list[int]()
    for i in range(0, len(groups), tile_groups):
        kept = [code for group in groups[i : i + tile_groups] for code in group if code]
        number = sum(code << (k * width) for k, code in enumerate(kept))
        words += [number >> shift & 0xFFFFFFFF for shift in range(0, len(kept) * width, 32)]
        start.append(len(words))
    return mask, start, words
