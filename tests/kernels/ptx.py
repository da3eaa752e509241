"""PTX, the assembly language of NVIDIA's devices, as data: the instructions of a compiled kernel.

PTX ISA: docs.nvidia.com/cuda/parallel-thread-execution. Only what Triton writes for straight-line kernels is read.
"""

import re
from dataclasses import dataclass

_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?;")
_LABEL = re.compile(r"(\$\w+):")
_COMMENT = re.compile(r"//.*")
_BETWEEN = re.compile(r",\s*(?![^{\[]*[}\]])")  # commas outside of braces and brackets


class PtxError(Exception):
    """A kernel says or does what the emulator does not know, or what no device allows."""


@dataclass(frozen=True)
class Instruction:
    """``@%p1 min.s32 %r3, %r2, 15;`` with its place among the instructions of its kernel."""

    place: int
    opcode: str
    operands: tuple[str, ...]
    predicate: str = ""
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel, where its labels stand among them, its parameters in order, and its block size."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]
    n_threads: int


def parse(text: str) -> Kernel:
    """The one kernel in ``text``."""
    head, body = text.split("\n{\n", maxsplit=1)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.split("\n}", maxsplit=1)[0].splitlines():
        code = _COMMENT.sub("", line).strip()
        if label := _LABEL.fullmatch(code):
            labels[label[1]] = len(instructions)
        elif code and not code.startswith("."):
            instructions.append(_instruction(code, len(instructions)))
    threads = re.search(r"\.reqntid (\d+)", head)
    if threads is None:
        raise PtxError("the kernel does not say how many threads it has")
    return Kernel(tuple(instructions), labels, tuple(re.findall(r"(\w+_param_\d+)", head)), int(threads[1]))


def _instruction(code: str, place: int) -> Instruction:
    match = _LINE.fullmatch(code)
    if match is None:
        raise PtxError(f"cannot read {code!r}")
    negated, predicate, opcode, operands = match.groups()
    parts = tuple(part.strip() for part in _BETWEEN.split(operands or "") if part)
    return Instruction(place, opcode, parts, predicate or "", bool(negated))
