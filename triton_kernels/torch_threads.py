"""Python functions in torch's own OpenMP threads, for loops that let go of the interpreter's lock.

A pool of one's own would compete for the cores with torch's threads, which go on turning for a while after their work.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def gomp_parallel() -> int:
    """The address of ``GOMP_parallel`` in the OpenMP that torch was linked with, by whatever file name; 0 if it has none."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def share_out(run: Callable[[int, int], None], parts: Sequence[tuple[int, int]]) -> None:
    """``run(*part)`` for each of the parts, on as many threads as torch has; without OpenMP on this one.

    What makes tensors has no place in ``run``: torch's modes (inference, say) are those of the caller's thread alone.

    Raises:
        Exception: the first that ``run`` raised, once all threads have ended.
    """
    left, failures = iter(parts), list[BaseException]()

    def take_parts(_: int | None) -> None:
        try:
            while (part := next(left, None)) is not None:
                run(*part)
        except BaseException as failure:
            failures.append(failure)

    n_threads = min(torch.get_num_threads(), len(parts))
    if n_threads > 1 and gomp_parallel():
        parallel = ctypes.CFUNCTYPE(None, _FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(gomp_parallel())
        parallel(_FUNCTION(take_parts), None, n_threads, 0)
    else:
        take_parts(None)
    if failures:
        raise failures[0]
