"""A kernel with one thing wrong is caught: the inputs that the compiled kernels are held to have teeth."""

import random
import re

import pytest
import torch
from kernels import emulated
from kernels.inputs import any_codes, classes_in_turn, halfway, same, spikes, tops
from kernels.mutations import Mutation, mutations
from kernels.ptx import Kernel, PtxError
from torch import Tensor

from fxpipe.triton_kernels import BFPFormat, launch, reference

SAMPLE, OF_LONG = 20, 10  # mutations of each kernel, and of a long one; no two alike but for the registers' numbers
LONG = 1200  # instructions
KERNELS = [
    (90, "bfp4b32", torch.bfloat16),
    (90, "bfp2b16+unsigned", torch.float32),
    (80, "bfp5b128+unsigned", torch.float16),
    (90, "bfp8b32+unsigned", torch.bfloat16),
    (100, "bfp3b64", torch.float32),
    (90, "bfp4b16:gauss+e5m3", torch.bfloat16),
    (90, "bfp4b32+sr", torch.bfloat16),
    (90, "bfp4b32+o1", torch.bfloat16),
    (90, "bfp4b32+o2t1", torch.bfloat16),
    (100, "bfp3b8+twos+e4+hash", torch.float32),
    (90, "bfp4b32:gauss+e6m2+search", torch.bfloat16),
]
EQUIVALENT = {
    "one NaN for another": r"selp\.[bf]32 %r, (0f7FC00000|2143322048), .* -> \S+ %r, (0f7F\w+|214332204\d), .*",
    "the path for a tile in part serves a full tile too": (
        r"(setp\.ne\.b32 %p, %r, 4096 -> setp\.ne\.b32 %p, %r, 4097|@%p (bra .*) -> \2)"
    ),
    "lanes 1, 2, 4 apart reach each other over 1, 3, 5, too": r"shfl\S+ %r, %r, ([248]), .* -> .* [359], 31, -1",
    "of a group's number only that of its block is used": r"or\S+ %r, %r, (128|256|384) -> \S+ %r, %r, (129|257|385)",
    "the next thread of a block holds the same exponent": r"setp\.(eq|ne)\S+ %p, %r, 0 -> setp\.\1\S+ %p, %r, 1",
    "the other thread of two does": r"bfp\db16\S* \S+ compress: @%p (st\.global\.b8 .*) -> @!%p \1",
    "the coefficients of a polynomial have room for rounding": (
        r":gauss\S* \S+ compress: fma\.rn\.f32 %r, %r, (%r|0f\w+), 0f([3B]\w|[4C][01])\w{6} -> fma\.rn\.f32 .*"
    ),
    "below the bits of a bfloat16 an outlier has nothing that counts": (
        r"\+o1 bfloat16 (compress: and\.b32 %r, %r, (-65536 -> .* -65535|3840 -> .* 3841)|"
        r"decompress: and.* 125829120 -> .* 125829121)"
    ),
    "rounding to bfloat16 drops an ulp, below as well": (
        r"\+o1 bfloat16 decompress: (mul\.f32 %r, %r, 0f\w+ -> mul\.f32 .*|add\.s32 %r, %r, -16777216 -> .* -16777215)"
    ),
    "-2 is as little a place as -1": r"\+o1 \S+ decompress: selp\.b32 %r, -1, %r, %p -> selp\.b32 %r, -2, .*",
    "no bfloat16 is the greatest float32": r"bfloat16 compress: setp.gt.u32 %p, %r, 2139095039 -> setp.ge.*",
    "1/2 but for half an ulp: sums are those of 1/2, or round alike": r"\+unsigned\S* .*0fBF000000 -> .*0fBEFFFFFF",
    "of the later values of a word no bit of a negative float of 16 bits lies in it; float32 is held to this": (
        r"unsigned\S* b?float16 compress: min\.relu\.s32 (.*) -> min\.s32 \1"
    ),
    "no value of eight bits is more than 255 steps": (
        r"bfp8\S+unsigned bfloat16 compress: min\.s32 %r, %r, 255 -> min\.s32 %r, %r, 256"
    ),
    "the least float32 comes to less than half the least float16": (
        r"bfp\S+ float16 decompress: max\.f32 %r, %r, 0f00000000 -> max\.f32 %r, %r, 0f00000001"
    ),
    "bfloat16 drops an ulp of float32": r"bfp\S+ bfloat16 decompress: mul\.f32 %r, %r, (0f\w+)0 -> mul.* \1(?#-)1",
    "below the fields there is nothing but zeros": (
        r"bfp\S+ \S+ decompress: and\.b32 %r, %r, (133160880|1984|384|96|62|24|6) -> and\.b32 %r, %r, "
        r"(133160881|1985|385|97|63|25|7)"
    ),
    "an ulp below the sign of a level is an ulp of float32": (
        r"bfp\S+:\S+ bfloat16 decompress: and\.b32 %r, %r, -2147483648 -> .* -2147483647"
    ),
    "below the bits of a half there is nothing that carries into its sign": (
        r"bfp\S+ float16 decompress: and\.b32 %r, %r, 2147449856 -> .* 2147449857"
    ),
    "sixteen times a thread's number has no lowest bit": (
        r"bfp3b64 float32 compress: and\.b32 %r, %r, 2032 -> and\.b32 %r, %r, 2033"
    ),
    "no bfloat16 times the peak factor lies an ulp above a scale": (
        r"bfp4b16:gauss\+e5m3 bfloat16 compress: add\.s32 %r, %r, 1048575 -> .* 1048574"
    ),
    "no bfloat16 within that scale comes to more than 255 steps": (
        r"bfp4b16:gauss\+e5m3 bfloat16 compress: min\.u32 %r, %r, 1258291455 -> .* 1258291456"
    ),
    "below the bits of a bfloat16 nothing moves its product past a scale": (
        r"bfp4b16:gauss\+e5m3 bfloat16 compress: and\.b32 %r, %r, 2147418112 -> .* 2147418113"
    ),
    "the largest of what is left is more than 1 and below the keys' lowest bits": (
        r"\+o2t1 \S+ compress: selp\.b32 %r, %r, 0, %p -> selp\.b32 %r, %r, -?1, %p"
    ),
    "the lowest bit of a bfloat16 is beneath all scales, and changes no power of two": (
        r"\+o2t1 bfloat16 compress: selp\.b32 %r, -1, (-65536|65535), %p -> selp\.b32 %r, (-1, -65535|-2, -?\d+), %p"
    ),
    "places in a block of 32 have five bits": (
        r"bfp4b32\+o2t1 \S+ compress: bfe\.u32 %r, %r, 1, 7 -> bfe\.u32 %r, %r, 1, [568]"
    ),
    "how far apart two numbers are has no sign": r"\+search \S+ compress: sub\.rn\.f16x2 (%r, %r, %r) -> sub\.rn\.f16x2 \1",
    "squares are added up in any order": r"\+search \S+ compress: prmt\.b32 (%r, %r, %r, %r) -> prmt\.b32 \1",
}
"""Why mutations change no result, and which, as regular expressions for ``alike``."""


class Trial:
    """What a compiled kernel is asked, and the right answers. Once a case fails, the rest need not be run."""

    def __init__(self, kind: launch.Kind, fmt: BFPFormat, dtype: torch.dtype) -> None:
        self.kind, self.fmt, self.dtype = kind, fmt, dtype
        self.cases = [self._case(classes_in_turn(8 * launch.TILE + 2817, dtype))]
        self.cases += [self._case(tops(n, torch.Generator().manual_seed(n)).abs().to(dtype)) for n in EDGES]
        self.cases += [self._case(spikes(4090 + n, torch.Generator().manual_seed(n)).to(dtype)) for n in range(6)]
        self.cases += [self._case(halfway(launch.TILE).to(dtype))]
        self.cases += [self._case(classes_in_turn(launch.TILE - 2 * seed, dtype, seed)) for seed in range(1, 21)]
        self.cases += [self._case(classes_in_turn(32 * launch.TILE + 1, dtype, seed)) for seed in (21, 22)]

    def _case(self, x: Tensor) -> tuple[int, object, object]:
        stored = reference.compress(x, self.fmt, emulated.SEED)
        if self.kind == "compress":
            return x.numel(), x, stored
        codes = any_codes(stored, self.fmt, torch.Generator().manual_seed(x.numel()))
        return x.numel(), codes, reference.decompress(codes, self.fmt, x.numel(), self.dtype, emulated.SEED)

    def passed(self, kernel: Kernel) -> bool:
        try:
            return all(self._right(kernel, *case) for case in self.cases)
        except PtxError:
            return False

    def _right(self, kernel: Kernel, numel: int, given, expected) -> bool:
        if self.kind == "compress":
            return all(map(same, emulated.compress(kernel, given, self.fmt), expected))
        return same(emulated.decompress(kernel, given, self.fmt, numel, self.dtype), expected)


def _edges() -> list[int]:
    """Sizes of one tile that end at each place of a group, in each quarter of the tile; and whole blocks of any size."""
    inside = [1024 * quarter + 8 * (5 * j + quarter) + j for quarter in range(4) for j in range(8)]
    return [
        launch.TILE - 1,
        *(n for n in inside if n),
        *(1024 * quarter + 384 + more for quarter in range(4) for more in (0, 5)),
    ]


EDGES = _edges()


def alike(mutation: Mutation) -> str:
    """The mutation without the registers' numbers."""
    return re.sub(r"%([a-z]+)\d+", r"%\1", str(mutation))


def equivalent(of: str, mutation: Mutation) -> bool:
    text = f"{of}: {alike(mutation)}"
    return any(re.search(f"{known}$", text) for known in EQUIVALENT.values())


def sample(kernel: Kernel, n: int) -> list[Mutation]:
    """``n`` of the kernel's mutations, each of a kind of its own, the same in every run."""
    g = random.Random(0)
    found = list(mutations(kernel))
    g.shuffle(found)
    kinds = {alike(mutation): mutation for mutation in found}
    return list(kinds.values())[:n]


@pytest.mark.parametrize("kind", launch.KERNELS)
@pytest.mark.parametrize(("target", "name", "dtype"), KERNELS, ids=str)
def test_mutations_are_caught(target, name, dtype, kind):
    fmt = BFPFormat.parse(name)
    kernel = emulated.compiled_for(target, kind, fmt, dtype, 1)
    trial = Trial(kind, fmt, dtype)
    assert trial.passed(kernel)
    n = OF_LONG if len(kernel.instructions) > LONG else SAMPLE
    survivors = [mutation for mutation in sample(kernel, n) if trial.passed(mutation.of(kernel))]
    of = f"{fmt} {str(dtype).removeprefix('torch.')} {kind}"
    assert [str(mutation) for mutation in survivors if not equivalent(of, mutation)] == []
