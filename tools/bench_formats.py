"""Signal to noise of every kind of format at equal bits, beside other formats and the rate-distortion limit.

    python tools/bench_formats.py [--values 1048576] [--format FORMAT ...] [--check] [--json]

Bits are all-in: codes, scales, outliers; the Gaussian limit is 6.02 dB a bit. Data: unit Gaussian; Student's t with 3 degrees
of freedom; 256 channels of lognormal width; the ReLU and the GELU of a Gaussian. ``ideal`` is the first-order entropy of the
codes and of the scales, and the bits of the outliers; ``entropy`` and ``deflate`` are the bytes that ``lossless.encode`` makes
of the planes with these codings, decoded again to be sure, tables and header included: all in bits a value and for Gaussian
data. Other formats are simulated value by value, with unlimited range where theirs is limited. Formats are encoded by the
definition, ``fxpipe.triton_kernels.reference``, so any correct kernel has these figures.
Prints a table, or JSON. ``--check`` exits with 1 where a figure of ``TARGETS`` is missed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fxpipe import printing
from fxpipe.triton_kernels import BFPFormat, lossless, packing, reference

DATA = ("gauss", "t3", "channels", "relu", "gelu")
BLOCK = 256  # values of a group of the affine format
FORMATS = """
    bfp2b32 bfp2b32+search bfp2b32:gauss+e5m3+search bfp2b32:gauss+se5m2+search bfp2b32:learned+se5m2+search
    bfp2b32:gauss+unsigned+e5m3+search bfp2b64:gauss+se5m2+search+o1
    bfp3b32 bfp3b32:lossy-lite bfp3b32+e5m3 bfp3b32:gauss+e5m3+search bfp3b32:gauss+se5m2+search bfp3b32:gauss+e5m3+absmax
    bfp3b64+e5m3+o1 bfp3b128+e5m3+search+o2 bfp3b128:gauss+e5m3+search+o2 bfp3b128:gauss+se5m2+search+o2
    bfp3b32:gauss+unsigned+e5m3+search
    bfp4b32 bfp4b32+sr bfp4b32+e5m3+sr bfp4b32+dither bfp4b32+e5 bfp4b32+unsigned bfp4b32+e6m2 bfp4b32+e5m3
    bfp4b32+e5m3+search bfp4b32:gauss bfp4b32:gauss+e5m3 bfp4b32:gauss+e5m3+search bfp4b32:learned+e5m3+search
    bfp4b32+unsigned+e5m3+search bfp4b32:gauss+unsigned+e5m3+search bfp4b128:gauss+e5m3+search+o1
    bfp4b128:gauss+e5m3+search+o2
    bfp5b32 bfp5b32+e5m3 bfp5b32:gauss+e5m3+search bfp8b32 bfp8b32+e5m3
""".split()
ENTROPY_CODED = ("bfp5b128:001830465d748ba3bad4f1+e5m3",)
"""11 nearly even magnitudes, made for entropy coding: 5 bits as they lie in memory, 4 when coded."""

TARGETS = (  # data, at most so many bits, at least so many dB; or so many after coding
    ("gauss", 5.25, 27.8),
    ("gauss", 4.25, 22.0),
    ("gauss", 3.25, 15.8),
    ("gauss", 2.25, 9.8),
    ("t3", 4.3, 18.8),
    ("relu", 4.25, 25.0),
    ("gauss, ideal", 4.0, 22.0),
    ("gauss, entropy", 4.0, 22.0),
)


@dataclass(frozen=True)
class Row:
    """A format's bits a value and its signal to noise in dB, by data."""

    name: str
    bits: float
    decibels: dict[str, float]
    ideal_bits: float | None = None
    entropy_bits: float | None = None
    deflate_bits: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 20)
    parser.add_argument("--format", action="append", metavar="FORMAT", help="instead of the usual ones")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure falls short")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    data = samples(options.values)
    rows = [measured(text, data) for text in options.format or (*FORMATS, *ENTROPY_CODED)]
    rows += [simulated(name, bits, restore, data) for name, (bits, restore) in PEERS.items()]
    checks = [check(rows, *target) for target in TARGETS]
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "targets": checks}))
    else:
        print(table(rows), "", *map(verdict, checks), sep="\n")
    return 1 if options.check and not all(made["reached"] for made in checks) else 0


def samples(n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    chi_squared = torch.randn(3, n, generator=g).square().sum(dim=0)
    widths = torch.exp(torch.randn(256, generator=g))
    channels = torch.randn(n // 256, 256, generator=g) * widths
    gelu = torch.nn.functional.gelu(x)
    t3 = torch.randn(n, generator=g) / (chi_squared / 3).sqrt()
    return dict(zip(DATA, (x, t3, channels.flatten(), x.relu(), gelu), strict=True))


def decibels(x: Tensor, y: Tensor) -> float:
    return round(10 * math.log10(x.double().square().sum() / (x.double() - y.double()).square().sum()), 2)


def measured(text: str, data: dict[str, Tensor]) -> Row:
    fmt = BFPFormat.parse(text)
    seed = torch.tensor(0)
    found: dict[str, float] = {}
    coded: list[float | None] = []
    for name, x in data.items():
        if fmt.unsigned and bool((x < 0).any()):
            continue
        planes = reference.compress(x, fmt, seed)
        found[name] = decibels(x, reference.decompress(planes, fmt, x.numel(), x.dtype, seed))
        if name == "gauss":
            total_bits = (
                ideal_bits(planes, fmt, x.numel()),
                coded_bits(planes, fmt, x.numel(), "entropy"),
                coded_bits(planes, fmt, x.numel(), "deflate"),
            )
            coded = [round(total / x.numel(), 4) for total in total_bits]
    return Row(text, fmt.bits_per_value, found, *coded)


def ideal_bits(planes: tuple[Tensor, ...], fmt: BFPFormat, numel: int) -> float:
    """The entropy of the codes and of the scales, and the bits of all else."""
    n_codes = len(fmt.group_planes)
    codes = packing.unpack(planes[:n_codes], fmt.width, fmt.group_planes).flatten()
    scales = packing.unpack_scales(planes[n_codes:], fmt, fmt.n_blocks(numel))
    others = 16 * fmt.outliers * scales.numel()
    return entropy(codes) * codes.numel() + entropy(scales) * scales.numel() + others


def entropy(symbols: Tensor) -> float:
    shares = symbols.bincount().double() / symbols.numel()
    return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())


def coded_bits(planes: tuple[Tensor, ...], fmt: BFPFormat, numel: int, coding: str) -> int:
    """Bits of all that must be kept, which gives the planes again."""
    data = lossless.encode(planes, fmt, (numel,), coding)
    assert all(map(torch.equal, lossless.decode(data, fmt, (numel,)), planes)), f"{coding} lost a bit of '{fmt}'"
    return 8 * data.numel()


def simulated(name: str, bits: float, restore: Callable[[Tensor], Tensor], data: dict[str, Tensor]) -> Row:
    return Row(name, bits, {kind: decibels(x, restore(x)) for kind, x in data.items()})


def mxfp4(x: Tensor) -> Tensor:
    """OCP Microscaling v1.0: E2M1 in blocks of 32, scale 2^(floor(log2 of the largest) - 2), saturating."""
    blocks = x.view(-1, 32)
    scale = torch.exp2(blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30).log2().floor() - 2)
    return (e2m1(blocks / scale) * scale).view_as(x)


def nvfp4(x: Tensor) -> Tensor:
    """E2M1 in blocks of 16 under an E4M3 scale, and a float32 for the tensor."""
    blocks = x.view(-1, 16)
    whole = blocks.abs().max() / (6 * 448)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    return (e2m1(blocks / scale.clamp_min(1e-30)) * scale).view_as(x)


def e2m1(x: Tensor) -> Tensor:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    edges = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(x.abs().contiguous(), edges)] * x.sign()


def fp8(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """As PyTorch's pass stores saved activations: a float32 scale a row, here of 1024 values."""

    def restore(x: Tensor) -> Tensor:
        rows = x.view(-1, 1024)
        scale = torch.finfo(dtype).max / rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        return ((rows * scale).to(dtype).float() / scale).view_as(x)

    return restore


def affine(x: Tensor) -> Tensor:
    """4 bits between the least and the greatest of 256 values, both bfloat16 (as ActNN and GACT), to nearest."""
    groups = x.view(-1, BLOCK)
    least = groups.amin(dim=1, keepdim=True).bfloat16().float()
    step = ((groups.amax(dim=1, keepdim=True) - least).bfloat16().float() / 15).clamp_min(1e-30)
    return (((groups - least) / step).round().clamp(0, 15) * step + least).view_as(x)


PEERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "MXFP4": (4.25, mxfp4),
    "NVFP4": (4.5, nvfp4),
    "affine 4-bit, 256": (4.125, affine),
    "fp8 e4m3, row": (8 + 32 / 1024, fp8(torch.float8_e4m3fn)),
    "fp8 e5m2, row": (8 + 32 / 1024, fp8(torch.float8_e5m2)),
}


def check(rows: list[Row], data: str, bits: float, wanted: float) -> dict[str, object]:
    """The best of our formats within the bits: whether it reaches what is wanted."""
    kind, _, coding = data.partition(", ")
    best, name = -math.inf, "none"
    for row in rows:
        spent = {"": row.bits, "ideal": row.ideal_bits, "entropy": row.entropy_bits}[coding]
        if row.name.startswith("bfp") and spent is not None and spent <= bits and row.decibels.get(kind, best) > best:
            best, name = row.decibels[kind], row.name
    return {"data": data, "bits": bits, "wanted": wanted, "found": best, "format": name, "reached": best >= wanted}


def verdict(made: dict[str, object]) -> str:
    word = "reached" if made["reached"] else "MISSED"
    return (
        f"{made['data']}: {made['wanted']} dB at {made['bits']} bits {word}: {made['found']} dB with {made['format']}"
    )


def table(rows: list[Row]) -> str:
    lines = [
        [r.name, f"{r.bits:.3f}", *(shown(r.decibels.get(kind)) for kind in DATA), f"{6.0206 * r.bits:.2f}",
         shown(r.ideal_bits), shown(r.entropy_bits), shown(r.deflate_bits)]
        for r in sorted(rows, key=lambda r: r.bits)
    ]  # fmt: skip
    return printing.table(lines, ["format", "bits", *DATA, "limit, gauss", "ideal bits", "entropy", "deflate"])


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


if __name__ == "__main__":
    sys.exit(main())
