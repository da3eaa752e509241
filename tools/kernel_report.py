"""What the Triton kernels compile to, without a GPU: instructions, registers, accesses, and a model of their speed.

    python tools/kernel_report.py [--target sm_90] [--format bfp4b32] [--all] [--numel 1000001] [--json] [--check]

Compiles each kernel ahead of time and counts the machine code. Nothing is measured: the pipes' rates, compute over
memory and the share of peak are a model (``Device``). With ``--check`` it exits with 1 where a kernel misses its budget
on sm_90; on any target, where it spills or uses shared memory or a barrier; on any of NVIDIA, where values go by less
than 128 bits or it takes more than 40 registers. ``+dither`` and ``:learned`` have no budget for counts; that of
``+search``, of norms, and of more than one outlier (128 registers too), is what it took when it was written.

"accessed" is what the threads ask for, "least" what must be moved: several threads load the exponent of one block, and
of those that count as storing it all but one are switched off. Sizes with a last tile that is not full compile a
second, masked path, which is counted too and has no budget. Of loads the model counts threads, not the lines of memory that
they touch: see ``block_tiles``. Fused producers are compared to the two kernels that they replace, in bytes, instructions and
modelled time.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

from fxpipe.triton_kernels import fused, launch, norm_launch
from fxpipe.triton_kernels.codec import has_one_outlier
from fxpipe.triton_kernels.format import BLOCKS, DTYPES, WIDTHS, BFPFormat

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = (
    "bfp4b32+e6m2", "bfp4b32+e5m3", "bfp4b32+e5", "bfp8b32+e5m3", "bfp4b32+unsigned+e5m3", "bfp4b32+twos",
    "bfp4b32+trunc", "bfp4b32+hash", "bfp8b32+hash", "bfp2b32+sr", "bfp4b32+sr", "bfp8b32+sr", "bfp4b32+unsigned+sr",
    "bfp2b32:gauss", "bfp3b32:gauss", "bfp4b32:gauss", "bfp5b32:gauss", "bfp3b32:gauss+unsigned", "bfp3b32:gauss+e6m2",
    "bfp2b32:gauss+se5m2", "bfp3b32:gauss+se5m2", "bfp3b32:lossy-lite", "bfp3b32:lossy-normal",
    "bfp2b32:lossy-aggressive", "bfp4b32+o1", "bfp4b32+e5m3+o1", "bfp8b32+o1", "bfp4b32+o2",
    "bfp4b32+e5m3+search", "bfp4b32+unsigned+e5m3+search", "bfp2b32:gauss+se5m2+search", "bfp3b32:gauss+e5m3+search",
    "bfp4b32:gauss+e6m2+search", "bfp4b32:gauss+e5m3+search", "bfp4b32:gauss+unsigned+e5m3+search",
    "bfp3b128+e5m3+search+o2",
    "bfp4b32+dither", "bfp4b32:gauss+e5m3+dither-density", "bfp4b32:learned+e5m3",
)  # fmt: skip
SEED = "LDG.E.64"
FUSED_FORMAT = "bfp4b32"
FUSED_DTYPES = ("bfloat16", "float32")
NORMS = {
    "sum, layer norm": norm_launch.Norm("layer", 1e-5, 1024, ("residual", "weight", "bias")),
    "sum, rms norm": norm_launch.Norm("rms", 1e-6, 1024, ("residual", "weight")),
    "dropout, sum, layer norm": norm_launch.Norm("layer", 1e-5, 1024, ("residual", "mask", "weight", "bias"), 1 / 0.9),
}
NORM_BUDGETS = {
    "sum, layer norm": {"none": (15, 72), "input": (21.5, 100), "both": (28.7, 98)},
    "sum, rms norm": {"none": (11.4, 62), "input": (18.3, 66), "both": (25.4, 66)},
    "dropout, sum, layer norm": {"none": (23, 72), "input": (29.7, 128), "both": (36.7, 100)},
}
"""What is stored; instructions a value and registers, as measured on sm_90: a warp holds a row, 32 values a thread."""

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MANY_REGISTERS = 128  # of a thread that looks for several outliers of a block, as measured
FULL = 1 << 20  # a size of full tiles
ALU_BUDGET = 6  # where values are rounded to nearest
ALU = tuple(
    "LOP3 IADD VIADD IMNMX VIMNMX HMNMX2 VHMNMX ISETP SEL SHF PRMT FMNMX FSETP FSEL LEA SGXT PLOP3 I2I HADD2 F2FP".split()
)
XU = tuple("MUFU POPC FLO BREV I2F F2I F2F FRND".split())
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """Published rates: multiprocessors, clock, memory; and lanes a clock of each pipe of a multiprocessor."""

    name: str
    n_multiprocessors: int
    hertz: float
    bytes_per_second: float
    lanes: dict[str, int]

    def busiest(self, pipes: dict[str, float], bytes_per_value: float) -> tuple[str, float]:
        """The pipe that is busy longest, and how long against the memory traffic, values at a time."""
        memory = bytes_per_value / self.bytes_per_second
        rate = self.n_multiprocessors * self.hertz
        return max(
            ((pipe, pipes[pipe] / lanes / rate / memory) for pipe, lanes in self.lanes.items()), key=lambda x: x[1]
        )

    @staticmethod
    def share_of_peak(compute_over_memory: float) -> float:
        """A model: 0.92 of the memory's peak can be had, less where compute takes about as long. +-10 points."""
        return 0.92 / math.hypot(1, 0.92 * compute_over_memory)


def _lanes(fma: int) -> dict[str, int]:
    return {"issue": 128, "alu": 64, "imad": 64, "fma": fma, "lsu": 32, "xu": 16}


DEVICES = {
    "sm_80": Device("A100", 108, 1.41e9, 2.039e12, _lanes(64)),
    "sm_90": Device("H100", 132, 1.70e9, 3.35e12, _lanes(128)),
    "sm_100": Device("B200", 148, 1.85e9, 8.0e12, _lanes(128)),
}


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Counts are for one value: instructions of a thread over the values that it handles."""

    target: str
    kind: str
    format: str
    dtype: str
    instructions: float
    pipes: dict[str, float]
    registers: int
    spills: int
    shared_bytes: int
    barriers: int
    accesses: dict[str, int]
    bytes_accessed: float
    bytes_per_value: float
    busiest_pipe: str = ""
    compute_over_memory: float = 0.0
    shortfalls: tuple[str, ...] = ()


def report(target: str, kind: launch.Kind, fmt: BFPFormat, dtype: str, numel: int = FULL) -> Report:
    """Compile one kernel for tensors of ``numel`` values, and count."""
    compiled = launch.compile_for(TARGETS[target], kind, fmt, dtype, numel)
    made = _counted(compiled, target, kind, str(fmt), dtype, ITEMSIZE[dtype] + fmt.bits_per_value / 8, launch.TILE)
    return replace(made, shortfalls=tuple(_shortfalls(made, fmt, full=numel % launch.TILE == 0)))


def fused_reports(target: str) -> list[Report]:
    """Each activation and the sum with what it reads or writes stored, and alone, which reads and writes and stores nothing."""
    made = []
    for dtype in FUSED_DTYPES:
        fmt = BFPFormat.parse(FUSED_FORMAT)
        for producer in fused.PRODUCERS:
            for stored in ("none", *fused.stored_by(producer)):
                compiled = launch.compile_fused_for(TARGETS[target], producer, stored, fmt, dtype, FULL)
                n_tensors = 2 if producer in fused.ACTIVATIONS else 3
                bytes_per_value = n_tensors * ITEMSIZE[dtype] + (fmt.bits_per_value / 8 if stored != "none" else 0)
                text = f"{fmt}, {stored}" if stored != "none" else ""
                made.append(_counted(compiled, target, producer, text, dtype, bytes_per_value, launch.TILE))
    return [replace(m, shortfalls=tuple(_memory_shortfalls(m))) for m in made] + norm_reports(target)


def norm_reports(target: str) -> list[Report]:
    """Norms of sums over rows of 1024 values, one a warp, in bfloat16; likewise."""
    made, fmt = [], BFPFormat.parse(FUSED_FORMAT)
    for name, norm in NORMS.items():
        for stored, budget in NORM_BUDGETS[name].items():
            compiled = norm_launch.compile_norm_for(TARGETS[target], norm, stored, fmt, "bfloat16", FULL // norm.width)
            n_stored = {"none": 0, "input": 1, "both": 2}[stored]
            mask = 9 / 8 if "mask" in norm.has else 0  # a byte is read, a bit written
            bytes_per_value = 8 + mask + n_stored * fmt.bits_per_value / 8
            text = f"{fmt}, {stored}" if stored != "none" else ""
            one = _counted(compiled, target, name, text, "bfloat16", bytes_per_value, norm.width)
            made.append(replace(one, shortfalls=tuple(_memory_shortfalls(one) + _norm_shortfalls(one, *budget))))
    return made


def _counted(
    compiled: Any, target: str, kind: str, fmt: str, dtype: str, bytes_per_value: float, values: int
) -> Report:
    """``values``: those of a program."""
    values_per_thread = values / (compiled.metadata.num_warps * TARGETS[target].warp_size)
    count = _count_amd if target.startswith("gfx") else _count_nvidia
    ops, registers, spills, shared_bytes = count(compiled)
    pipes = Counter({"issue": len(ops)})
    for op in ops:
        pipes[_pipe(op)] += 2 if op in ("FFMA2", "FADD2", "FMUL2") else 1
    per_value = {pipe: n / values_per_thread for pipe, n in pipes.items()}
    busiest, ratio = "", 0.0
    if target in DEVICES:
        per_value = {pipe: per_value.get(pipe, 0.0) for pipe in DEVICES[target].lanes}
        busiest, ratio = DEVICES[target].busiest(per_value, bytes_per_value)
    accesses = Counter(op for op in ops if re.match(r"(LD|ST)[GSL]|SHFL|(global|flat|scratch|buffer|ds)_", op))
    return Report(
        target=target,
        kind=kind,
        format=fmt,
        dtype=dtype,
        instructions=per_value["issue"],
        pipes=per_value,
        registers=registers,
        spills=spills,
        shared_bytes=shared_bytes,
        barriers=sum(op.startswith(("BAR", "s_barrier")) for op in ops),
        accesses=dict(accesses),
        bytes_accessed=sum(n * _access_bytes(op) for op, n in accesses.items()) / values_per_thread,
        bytes_per_value=bytes_per_value,
        busiest_pipe=busiest,
        compute_over_memory=ratio,
    )


def _memory_shortfalls(made: Report) -> list[str]:
    if made.spills or made.shared_bytes or made.barriers:
        return [f"{made.spills} spills, {made.shared_bytes} bytes shared, {made.barriers} barriers; must be none"]
    return []


def _norm_shortfalls(made: Report, instructions: float, registers: int) -> list[str]:
    if made.target != "sm_90" or (made.instructions <= instructions and made.registers <= registers):
        return []
    return [f"{made.instructions:.2f} instructions, {made.registers} registers, budget {instructions} and {registers}"]


def _shortfalls(made: Report, fmt: BFPFormat, full: bool) -> list[str]:
    """Where a kernel misses its budget: memory on every target, the width of accesses on NVIDIA's, counts on sm_90."""
    found = _memory_shortfalls(made)
    full = full and not fmt.dither and fmt.codebook != "learned"  # these have no budget
    if full and made.busiest_pipe:
        wide = "LDG.E.128" if made.kind == "compress" else "STG.E.128"
        values = [op for op in made.accesses if op.startswith(wide[:3])]
        if made.kind == "compress" and fmt.compress_needs_seed and made.accesses.get(SEED) == 1:
            values.remove(SEED)
        if values != [wide]:
            found.append(f"values go by {values}, must be {wide}")
        most = MANY_REGISTERS if _has_many_outliers(made, fmt) else 40
        if made.registers > most:
            found.append(f"{made.registers} registers, budget {most}")
    if full and made.target == "sm_90":
        instructions, ratio, alu = _budget(made, fmt)
        if made.instructions > instructions:
            found.append(f"{made.instructions:.2f} instructions, budget {instructions}")
        if made.compute_over_memory > ratio:
            found.append(f"compute over memory {made.compute_over_memory:.2f}, budget {ratio}")
        if made.pipes["alu"] > alu:
            found.append(f"{made.pipes['alu']:.2f} on the ALU pipe, budget {alu}")
    return found


def _budget(made: Report, fmt: BFPFormat) -> tuple[float, float, float]:
    """Instructions a value, compute over memory, and instructions on the ALU pipe, which is full before issue is."""
    narrow = fmt.width <= 4
    if _has_many_outliers(made, fmt):
        return _budget_of_many(made, fmt), math.inf, math.inf
    if fmt.search and made.kind == "compress":
        return _search_budget(fmt), math.inf, math.inf
    if fmt.codebook:
        return 16, 0.85, 16
    if fmt.outliers:
        return 14, 0.75, 14
    if made.kind == "compress":
        if fmt.rounding != "nearest":
            return 17, 0.75, 17
        return 11 if narrow or made.dtype == "float32" else 13, 0.55, ALU_BUDGET
    return 9 if narrow else 11, 0.55, ALU_BUDGET


def _search_budget(fmt: BFPFormat) -> float:
    """What the same format may take without a search, and for each scale that is tried so many more, as measured."""
    if not fmt.codebook:
        return 11 + 8 * len(fmt.search_offsets)
    return 16 + (3 + 0.9 * fmt.n_levels) * len(fmt.search_offsets)


def _has_many_outliers(made: Report, fmt: BFPFormat) -> bool:
    """More than the one that is found, and put back, without much ado."""
    return fmt.outliers > 1 or (fmt.outliers > 0 and made.kind == "compress" and not has_one_outlier(fmt))


def _budget_of_many(made: Report, fmt: BFPFormat) -> float:
    """What the same format may take without outliers, and for each so many more, as measured."""
    if made.kind == "decompress":
        return 14 + 7 * (fmt.outliers - 1)
    without = _search_budget(fmt) if fmt.search else 16 if fmt.codebook else 11 if fmt.width <= 4 else 13
    return without + 5 + 3 * fmt.outliers


def _pipe(op: str) -> str:
    """The pipe of an NVIDIA instruction, as far as that is public. AMD's: vector, scalar or memory."""
    if op.islower() or "_" in op:
        return {"v": "vector", "s": "scalar"}.get(op.split("_", maxsplit=1)[0], "memory")
    name = op.split(".", maxsplit=1)[0]
    if name.startswith(XU) and not name.startswith("F2FP"):
        return "xu"
    if re.fullmatch("F(FMA|ADD|MUL)2?", name):
        return "fma"
    if name.startswith(("LDG", "STG", "LDS", "STS", "SHFL", "LDSM", "STSM", "LDL", "STL")):
        return "lsu"
    if name == "IMAD":
        return "imad"
    return "alu" if name.startswith(ALU) else "other"


def _access_bytes(op: str) -> int:
    """Bytes that one thread loads from or stores to device memory with an instruction."""
    if op.startswith(("LDG", "STG")):
        width = re.search(r"\.[US]?(8|16|64|128)\b", op)
        return int(width[1]) // 8 if width else 4
    amd = re.match(r"(?:global|flat|buffer)_(?:load|store)_(?:[us])?(byte|short|dwordx?(\d?))", op)
    if amd is None:
        return 0
    return {"byte": 1, "short": 2}.get(amd[1], 4 * int(amd[2] or 1))


def _count_nvidia(compiled: Any) -> tuple[list[str], int, int, int]:
    """Instructions to the last EXIT, registers a thread, spill instructions, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        listing = _run("nvdisasm", "-c", cubin.name)
        usage = _run("cuobjdump", "-res-usage", cubin.name)
    ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    ops = ops[: max(place for place, op in enumerate(ops) if op.startswith("EXIT")) + 1]
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = sum(op.startswith(("LDL", "STL")) for op in ops)
    return ops, figures["REG"], spills, compiled.metadata.shared


def _count_amd(compiled: Any) -> tuple[list[str], int, int, int]:
    listing = compiled.asm["amdgcn"]
    ops = re.findall(r"^\t([a-z]+_[a-z0-9_]+)\b", listing[: listing.rindex("s_endpgm")], re.MULTILINE)
    figures = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", listing)}
    spills = figures["sgpr_spill_count"] + figures["vgpr_spill_count"]
    return ops, figures["vgpr_count"], spills, compiled.metadata.shared


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def selection(everything: bool) -> list[tuple[BFPFormat, str]]:
    """Formats and dtypes to report: all of no option, or each width, block, dtype and option once."""
    if everything:
        return [(BFPFormat(w, b, u), d) for w in WIDTHS for b in BLOCKS for u in (False, True) for d in DTYPES]
    chosen = [(BFPFormat(width, 32), "bfloat16") for width in WIDTHS]
    chosen += [(BFPFormat(width, 32, unsigned=True), "bfloat16") for width in (2, 4, 8)]
    chosen += [(BFPFormat(4, block), "bfloat16") for block in BLOCKS if block != 32]
    chosen += [(BFPFormat.parse(text), "bfloat16") for text in OPTIONS]
    return chosen + [(BFPFormat(width, 32), dtype) for width in (4, 8) for dtype in ("float32", "float16")]


def _row(made: Report) -> list[object]:
    model = share = ""
    pipes = " ".join(f"{pipe} {n:.2f}" for pipe, n in made.pipes.items() if pipe != "issue")
    if made.busiest_pipe:
        model = f"{made.compute_over_memory:.2f} {made.busiest_pipe}"
        share = f"{Device.share_of_peak(made.compute_over_memory):.0%}"
    accesses = " ".join(f"{n}x{op}" for op, n in made.accesses.items())
    return [
        made.kind, made.format, made.dtype, f"{made.instructions:.2f}", pipes, made.registers, made.spills,
        made.shared_bytes, made.barriers, f"{made.bytes_accessed:.3f}", f"{made.bytes_per_value:.3f}", model, share,
        accesses, "; ".join(made.shortfalls) or "ok",
    ]  # fmt: skip


def _picoseconds(made: Report) -> float:
    """A model: what one value takes of the memory's time."""
    device = DEVICES[made.target]
    return 1e12 * made.bytes_per_value / device.bytes_per_second / device.share_of_peak(made.compute_over_memory)


def _comparison(made: list[Report], target: str) -> list[list[object]]:
    """Each fused kernel beside the two that it replaces, or three where it stores two values."""
    rows: list[list[object]] = []
    compress = {dtype: report(target, "compress", BFPFormat.parse(FUSED_FORMAT), dtype) for dtype in FUSED_DTYPES}
    for one in made:
        if not one.format:
            alone = one
            continue
        pair = [alone, *[compress[one.dtype]] * (2 if one.format.endswith("both") else 1)]
        rows.append([
            one.kind, one.format, one.dtype, f"{one.bytes_per_value:.2f}", f"{sum(p.bytes_per_value for p in pair):.2f}",
            f"{one.instructions:.1f}", " + ".join(f"{p.instructions:.1f}" for p in pair), one.registers,
            f"{one.compute_over_memory:.2f}", f"{_picoseconds(one):.2f}", f"{sum(map(_picoseconds, pair)):.2f}",
        ])  # fmt: skip
    return rows


FUSED_HEADERS = [
    "producer", "stored", "dtype", "bytes/value", "of the pair", "inst/value", "of the pair", "registers",
    "compute/memory (model)", "ps/value (model)", "of the pair (model)",
]  # fmt: skip
HEADERS = [
    "kernel", "format", "dtype", "inst/value", "of these", "registers", "spills", "shared", "barriers",
    "accessed", "least bytes/value", "compute/memory (model)", "of peak (model)", "accesses a thread", "budget",
]  # fmt: skip


def main() -> int:
    """Compile, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--format", action="append", help="these formats, in bfloat16, instead of the usual selection")
    parser.add_argument("--all", action="store_true", help="every width, block, option and dtype")
    parser.add_argument("--norms", action="store_true", help="norms alone")
    parser.add_argument("--numel", type=int, default=FULL, help="values of the tensor (default: 2^20)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a kernel misses its budget")
    options = parser.parse_args()
    chosen = [(BFPFormat.parse(text), "bfloat16") for text in options.format or ()] or selection(options.all)
    chosen = [] if options.norms else chosen
    reports = {
        target: [report(target, kind, fmt, dtype, options.numel) for fmt, dtype in chosen for kind in launch.KERNELS]
        for target in options.target or TARGETS
    }
    fused_too = not options.format and not options.norms and options.numel == FULL
    of_fused = {target: fused_reports(target) for target in reports if fused_too and target in DEVICES}
    for target in reports:
        if options.norms or (fused_too and target not in DEVICES):  # the others' are compared below
            reports[target] += norm_reports(target)
    everything = [made for group in (reports, of_fused) for of_target in group.values() for made in of_target]
    if options.json:
        print(json.dumps([asdict(made) for made in everything], indent=1))
    else:
        for target, of_target in reports.items():
            device = f", modelled as {DEVICES[target].name}" if target in DEVICES else ""
            print(f"\n{target}{device}; counts are for one of {options.numel} values\n")
            print(tabulate([_row(made) for made in of_target], HEADERS, disable_numparse=True))
        for target, of_target in of_fused.items():
            print(
                f"\n{target}: a producer and the storing of its input or output in one kernel, against two or three\n"
            )
            print(tabulate(_comparison(of_target, target), FUSED_HEADERS, disable_numparse=True))
    return int(options.check and any(made.shortfalls for made in everything))


if __name__ == "__main__":
    sys.exit(main())
