"""Kernels with one thing wrong: each operator, number, predicate and order of operands of a compiled kernel in turn."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kernels.ptx import Instruction, Kernel

_OTHER = {
    "add": ["sub"], "sub": ["add"], "mul": ["add"], "min": ["max"], "max": ["min"],
    "and": ["or"], "or": ["and"], "xor": ["and"], "not": ["mov"], "shl": ["shr"], "shr": ["shl"],
    "setp.eq": ["setp.ne"], "setp.ne": ["setp.eq"], "setp.lt": ["setp.le", "setp.ge"], "setp.le": ["setp.lt"],
    "setp.gt": ["setp.ge"], "setp.ge": ["setp.gt"], "min.relu": ["min"], "bra": ["bra"],
}  # fmt: skip
_ORDERED = ("sub", "selp", "prmt", "shf", "shl", "shr")
_NUMBER = re.compile(r"-?\d+|0x[0-9A-Fa-f]+U?|0f[0-9A-F]{8}")
_FILLING = re.compile(r"mov\.u(16|32) %rs?\d+, 0x0")  # what a load is to leave where it does not load


@dataclass(frozen=True)
class Mutation:
    """``after`` stands in place of ``before``."""

    before: Instruction
    after: Instruction

    def of(self, kernel: Kernel) -> Kernel:
        """The kernel with the fault."""
        instructions = list(kernel.instructions)
        instructions[self.before.place] = self.after
        return replace(kernel, instructions=tuple(instructions))

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"


def mutations(kernel: Kernel) -> Iterator[Mutation]:
    """Every mutation of ``kernel``, in the order of its instructions."""
    for instruction in kernel.instructions:
        if not _FILLING.fullmatch(str(instruction)):
            for other in (*_operators(instruction), *_numbers(instruction), *_orders(instruction)):
                yield Mutation(instruction, other)
        if instruction.predicate:
            yield Mutation(instruction, replace(instruction, negated=not instruction.negated))
            yield Mutation(instruction, replace(instruction, predicate="", negated=False))


def _operators(instruction: Instruction) -> Iterator[Instruction]:
    for length in (2, 1):
        name, rest = _split(instruction.opcode, length)
        for other in _OTHER.get(name, []) if name != "bra" else []:
            kind = {"shl": ".b", "shr": ".u"}.get(other, rest[:2])
            yield replace(instruction, opcode=other + kind + rest[2:])
        if name in _OTHER:
            return


def _split(opcode: str, length: int) -> tuple[str, str]:
    parts = opcode.split(".")
    return ".".join(parts[:length]), "".join(f".{part}" for part in parts[length:])


def _numbers(instruction: Instruction) -> Iterator[Instruction]:
    for place, operand in enumerate(instruction.operands):
        if _NUMBER.fullmatch(operand):
            for step in (1, -1):
                yield _with(instruction, {place: _next(operand, step)})


def _next(number: str, step: int) -> str:
    if number.startswith("0f"):
        return f"0f{(int(number[2:], 16) + step) % 2**32:08X}"
    return str(int(number.removesuffix("U"), 0) + step)


def _orders(instruction: Instruction) -> Iterator[Instruction]:
    if instruction.opcode.startswith(_ORDERED) and not re.fullmatch(r"sh[lr]\.\w16", instruction.opcode):  # by 32 bits
        yield _with(instruction, {1: instruction.operands[2], 2: instruction.operands[1]})


def _with(instruction: Instruction, changed: dict[int, str]) -> Instruction:
    operands = tuple(changed.get(place, operand) for place, operand in enumerate(instruction.operands))
    return replace(instruction, operands=operands)
