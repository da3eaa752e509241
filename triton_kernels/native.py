"""The path for CPU tensors compiled from ``bfp.c`` and ``bfp_*.h``: built on first use, equal to ``reference`` bit for bit.

The compiler is one that Inductor would need anyway. Where there is none, or it fails, that is logged once and ``cpu``
goes on with eager operators; FXPIPE_NATIVE=0 in the environment asks for those. The kernel runs in torch's own OpenMP
threads, as many as ``torch.get_num_threads()``, without the interpreter's lock.

The library lies in $XDG_CACHE_HOME/fxpipe (~/.cache/fxpipe), or in the temporary directory if that cannot be written,
named by a hash of all that it depends on, and is moved there whole: processes may build at once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import codebooks, learned
from .format import GROUP, BFPFormat
from .native_format import NativeFormat, native_format
from .plane_layout import plane_layouts
from .reference import checked_seed, dtype_name
from .torch_threads import gomp_parallel

SOURCE = Path(__file__).with_name("bfp.c")
HEADERS = tuple(sorted(SOURCE.parent.glob("bfp_*.h")))
COMPILERS = ("$CC", "$CXX", "cc", "gcc", "clang", "g++")
FLAGS = (*"-x c -O3 -fno-math-errno -fno-trapping-math -fno-strict-aliasing -fPIC -shared".split(),)
FLAGS_OF_THIS_CPU = ("-march=native",)  # left out where the compiler does not know them
_TIMEOUT_SECONDS = 120
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features", "isa")


class Unavailable(Exception):
    """Why there is no compiled kernel."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """The loaded library: its functions, and the address of ``GOMP_parallel``, or 0."""

    run: "ctypes._NamedFuncPointer"
    run_bools: "ctypes._NamedFuncPointer"
    parallel: int
    path: Path


def compress(x_flat: Tensor, fmt: BFPFormat, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """As ``reference.compress``, if ``ready()``."""
    name = dtype_name(x_flat.dtype, fmt)
    seed = checked_seed(seed, fmt, fmt.compress_needs_seed)
    values = x_flat.contiguous()
    levels = learned.levels_of(values, fmt) if fmt.codebook == "learned" else fmt.levels
    numel = values.numel()
    n_blocks = fmt.n_blocks(numel)
    planes = [values.new_empty(plane.length(n_blocks), dtype=plane.dtype) for plane in plane_layouts(fmt)]
    _run(0, values, planes, native_format(fmt, name, levels), numel, seed)
    if fmt.codebook == "learned":
        planes[-1].copy_(torch.tensor([level & 255 for level in levels]))
    return tuple(planes)


def decompress(
    planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """As ``reference.decompress``, if ``ready()``; the planes are contiguous and of their due lengths."""
    name = dtype_name(dtype, fmt)
    seed = checked_seed(seed, fmt, fmt.decompress_needs_seed)
    levels = fmt.levels
    if fmt.codebook == "learned":
        levels = codebooks.from_hex(bytes(planes[-1].tolist()).hex(), signed=fmt.signed_levels)
    values = planes[0].new_empty(numel, dtype=dtype)
    _run(1, values, planes, native_format(fmt, name, levels), numel, seed)
    return values


def pack_bools(x_flat: Tensor) -> Tensor | None:
    """Bools [n] -> uint8 [ceil(n / 8)]: value j of eight is bit j, the last byte filled up with zeros.

    None without a kernel.
    """
    values = x_flat.contiguous()
    packed = values.new_empty((values.numel() + GROUP - 1) // GROUP, dtype=torch.uint8)
    return packed if _run_bools(0, values, packed) else None


def unpack_bools(packed: Tensor, numel: int) -> Tensor | None:
    """The ``numel`` bools that ``packed`` stores, as ``pack_bools`` lays them out. None without a kernel."""
    values = packed.new_empty(numel, dtype=torch.bool)
    return values if _run_bools(1, values, packed.contiguous()) else None


def ready() -> bool:
    """Whether the kernel can be used; builds and loads it when first asked."""
    return _kernel_or_reason()[0] is not None


def describe() -> str:
    """Which path CPU tensors take, and why."""
    kernel, reason = _kernel_or_reason()
    return f"native ({kernel.path})" if kernel else f"eager ({reason})"


def _run(
    decompress: int, values: Tensor, planes: Sequence[Tensor], native: NativeFormat, numel: int, seed: Tensor | None
) -> None:
    kernel = _kernel_or_reason()[0]
    assert kernel is not None
    addresses = (ctypes.c_void_p * len(planes))(*[plane.data_ptr() for plane in planes])
    number = 0 if seed is None else int(seed.item())
    threads = torch.get_num_threads()
    kernel.run(decompress, native, values.data_ptr(), addresses, numel, number, kernel.parallel, threads)


def _run_bools(unpack: int, values: Tensor, packed: Tensor) -> bool:
    kernel = _kernel_or_reason()[0]
    if kernel is None:
        return False
    threads = torch.get_num_threads()
    kernel.run_bools(unpack, values.data_ptr(), packed.data_ptr(), values.numel(), kernel.parallel, threads)
    return True


@cache
def _kernel_or_reason() -> tuple[Kernel | None, str]:
    if os.environ.get("FXPIPE_NATIVE") == "0":
        return None, "FXPIPE_NATIVE is 0"
    try:
        return _load(), ""
    except Unavailable as reason:
        logging.getLogger("fxpipe").warning(
            "CPU tensors are compressed by eager operators, to the same bits but several times as slow: %s. "
            "FXPIPE_NATIVE=0 asks for that.",
            reason,
        )
        return None, str(reason)


def _load() -> Kernel:
    if sys.byteorder != "little":
        raise Unavailable("this machine is big-endian")
    compiler = _compiler()
    name = f"bfp-{_key(compiler)}.so"
    failures = []
    for directory in _directories():
        try:
            _make_private(directory)
            if not (directory / name).exists():
                _build(compiler, directory / name)
            return _bind(directory / name)
        except OSError as error:
            failures.append(f"{directory}: {error}")
    raise Unavailable("no directory to keep the kernel in: " + "; ".join(failures))


def _bind(path: Path) -> Kernel:
    library = ctypes.CDLL(str(path))
    run, run_bools = library.fxpipe_bfp, library.fxpipe_bools
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    native = ctypes.POINTER(NativeFormat)
    run.argtypes = [number, native, pointer, pointer, size, ctypes.c_int64, pointer, ctypes.c_uint]
    run_bools.argtypes = [number, pointer, pointer, size, pointer, ctypes.c_uint]
    run.restype = run_bools.restype = None
    if library.fxpipe_format_bytes() != ctypes.sizeof(NativeFormat):
        raise Unavailable(f"{path} has another layout of formats")
    return Kernel(run, run_bools, gomp_parallel(), path)


def _compiler() -> list[str]:
    """The command of the first compiler there is."""
    for name in COMPILERS:
        command = shlex.split(os.environ.get(name[1:], "")) if name.startswith("$") else [name]
        if command and shutil.which(command[0]):
            return command
    raise Unavailable(f"no C compiler found; looked for {', '.join(COMPILERS)}")


def _key(compiler: Sequence[str]) -> str:
    """A hash of all that the library depends on."""
    version = _output([*compiler, "--version"])
    sources = [source.read_text() for source in (SOURCE, *HEADERS)]
    parts = [*sources, *compiler, version, *FLAGS, *FLAGS_OF_THIS_CPU, platform.machine(), *_cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> list[str]:
    """What Linux says of the processors' kind: libraries are built for one, and homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.node()]
    return sorted({line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in _CPU_FIELDS})


def _directories() -> Iterator[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():
        yield home / "fxpipe"
    yield Path(tempfile.gettempdir()) / f"fxpipe-{os.getuid()}"


def _make_private(directory: Path) -> None:
    """Make ``directory``, unless it is there; code is not loaded from where others may write."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError("belongs to, or can be written by, another user")


def _build(compiler: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        library = Path(scratch) / path.name
        command = [*compiler, *FLAGS, "-o", str(library), str(SOURCE), "-lm"]
        try:
            _output([*command, *FLAGS_OF_THIS_CPU])
        except Unavailable:
            _output(command)
        library.replace(path)


def _output(command: Sequence[str]) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"`{shlex.join(command)}` failed with {error.returncode}: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{shlex.join(command)}` failed: {error}") from error
    return process.stdout
