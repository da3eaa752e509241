"""Runs a compiled kernel's PTX on the CPU, all threads at once: a register is a numpy array, an element a thread.

Stricter than a device: every access must be aligned and lie inside a buffer that allows it, shuffles need whole warps,
registers must have been written before they are read. Threads that part at a branch go on by themselves. Shared memory is a
block's own; what another thread wrote there is read after a barrier only. Loops must end soon. What it does not know it
refuses by name. ptxas and the device itself are trusted.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from kernels.ptx import Instruction, Kernel, PtxError
from kernels.ptx_opcodes import DTYPES, OPCODES, Array, fused

WARP = 32
_ROUNDS = 1000
_NOTHING = 0x7FA5A5A5  # a NaN, for the half of a pair that the compiler leaves undefined as nothing depends on it
_REGISTER_BITS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}
_NUMBER = re.compile(r"-?\d+|0x[0-9A-Fa-f]+|0f[0-9A-F]{8}")
_SHARED = re.compile(r"(ld|st)\.shared\.b(8|16|32|64)")
_ACCESS = re.compile(r"(ld|st)\.global(?:\.L1::evict_\w+)?(?:\.L2::cache_hint)?(?:\.v([24]))?\.b(8|16|32|64)")


class Memory:
    """Buffers far apart in one address space, with guard bytes between them. Addresses do not fit into 32 bits."""

    BASE = 0x7_FFFF_F000
    GUARD = 4096
    FILLING = 0xA5

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        self.readable = np.empty(0, bool)
        self.writable = np.empty(0, bool)
        self.writes = np.empty(0, np.int64)

    def place(self, content: Array, writable: bool = False) -> int:
        """The address, a multiple of 256, of a new buffer. Who may write it may not read it."""
        before = self.GUARD + (-self.bytes.size) % 256
        address = self.BASE + self.bytes.size + before
        self.bytes = np.pad(self.bytes, (0, before + content.nbytes + self.GUARD), constant_values=self.FILLING)
        for name in ("readable", "writable", "writes"):
            old = getattr(self, name)
            setattr(self, name, np.pad(old, (0, self.bytes.size - old.size)))
        here = slice(address - self.BASE, address - self.BASE + content.nbytes)
        self.bytes[here] = self.FILLING if writable else content.view(np.uint8)
        self.readable[here] = not writable
        self.writable[here] = writable
        return address

    def at(self, address: int, n_bytes: int) -> Array:
        """What a buffer holds."""
        return self.bytes[address - self.BASE : address - self.BASE + n_bytes].copy()

    def check(self) -> None:
        """Every byte of the buffers to write is written exactly once, and no other byte has changed."""
        if not np.array_equal(self.writes, self.writable):
            raise PtxError("a byte is written more than once, or not at all")
        if not (self.bytes[~self.readable & ~self.writable] == self.FILLING).all():
            raise PtxError("a guard byte has changed")

    def index(self, addresses: Array, n_bytes: int, allowed: Array) -> Array:
        """Where each thread's bytes lie, [threads, n_bytes]."""
        if (addresses % np.uint64(n_bytes)).any():
            raise PtxError(f"an access of {n_bytes} bytes is not aligned to as many")
        index = addresses.astype(np.int64)[:, None] - self.BASE + np.arange(n_bytes)
        if ((index < 0) | (index >= self.bytes.size)).any() or not allowed[index].all():
            raise PtxError(f"an access of {n_bytes} bytes lies outside of the buffers")
        return index


class Shared:
    """Each block's shared memory, [blocks, bytes], and which thread wrote a byte since the last barrier; -1 for none."""

    BYTES = 4096
    NONE = -1

    def __init__(self, first_block: int, n_blocks: int) -> None:
        self.first_block = first_block
        self.bytes = np.zeros((n_blocks, self.BYTES), np.uint8)
        self.written = np.zeros((n_blocks, self.BYTES), bool)
        self.writer = np.full((n_blocks, self.BYTES), self.NONE)
        self.reader = np.full((n_blocks, self.BYTES), self.NONE)

    def barrier(self) -> None:
        self.writer[:], self.reader[:] = self.NONE, self.NONE

    def access(self, block: Array, thread: Array, address: Array, values: Array | None, n_bytes: int) -> Array:
        """Store ``values``, or load where there are none; [threads, n_bytes]."""
        if (address % n_bytes).any() or (address + n_bytes > self.BYTES).any():
            raise PtxError("an access of shared memory is not aligned, or outside of it")
        at = (block - self.first_block)[:, None], address[:, None] + np.arange(n_bytes)
        thread = np.broadcast_to(thread[:, None], (thread.size, n_bytes))
        others = [self.writer[at], *([] if values is None else [self.reader[at]])]
        if any(((other != self.NONE) & (other != thread)).any() for other in others):
            raise PtxError("shared memory that another thread uses, without a barrier between them")
        if values is None:
            if not self.written[at].all():
                raise PtxError("shared memory is read before it is written")
            self.reader[at] = thread
            return self.bytes[at]
        self.bytes[at], self.writer[at], self.written[at] = values, thread, True
        return values


class Threads:
    """Threads that run in step, with their registers. ``fuse`` multiplies and adds in one, as ptxas may."""

    def __init__(self, kernel: Kernel, memory: Memory, shared: Shared, arguments: dict[str, int], fuse: bool) -> None:
        self.kernel, self.memory, self.shared, self.arguments, self.fuse = kernel, memory, shared, arguments, fuse
        self.registers: dict[str, Array] = {}
        self.products: dict[str, tuple[Array, Array]] = {}
        self.rounds = 0  # of loops, so far

    def part(self, chosen: Array) -> "Threads":
        """Some of the threads, by themselves."""
        some = Threads(self.kernel, self.memory, self.shared, self.arguments, self.fuse)
        some.registers = {name: values[chosen] for name, values in self.registers.items()}
        some.rounds = self.rounds
        return some

    @property
    def n(self) -> int:
        return int(self.registers["%tid.x"].size)

    def run(self, place: int) -> None:
        """From the instruction at ``place`` to the end."""
        while True:
            instruction = self.kernel.instructions[place]
            try:
                active = self._active(instruction)
                if instruction.opcode == "ret":
                    return None
                if instruction.opcode in ("bra", "bra.uni"):
                    to = self.kernel.labels[instruction.operands[0]]
                    if to <= place and active.any():
                        self.rounds += 1
                        if self.rounds > _ROUNDS:
                            raise PtxError(f"the emulator runs no loops of more than {_ROUNDS} rounds")
                    if not active.all() and active.any():
                        self.part(active).run(to)
                        return self.part(~active).run(place + 1)
                    place = to if active.all() else place + 1
                    continue
                self._step(instruction, active)
            except PtxError as error:
                if ", at instruction" in str(error):
                    raise
                raise PtxError(f"{error}, at instruction {place}: {instruction}") from None
            place += 1

    def _active(self, instruction: Instruction) -> Array:
        if not instruction.predicate:
            return np.ones(self.n, bool)
        return self.read(instruction.predicate, "pred") ^ instruction.negated

    def _step(self, instruction: Instruction, active: Array) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode.startswith("ld.param."):
            self.write(operands[0], np.full(1, self.arguments[operands[1][1:-1]], np.int64), active)
        elif access := _ACCESS.fullmatch(opcode):
            hinted = "cache_hint" in opcode  # the last operand says what to keep in the cache
            operands = operands[: len(operands) - hinted]
            self._access(access[1], int(access[2] or 1), DTYPES[f"b{access[3]}"], operands, active)
        elif opcode.startswith("createpolicy."):
            pass
        elif access := _SHARED.fullmatch(opcode):
            self._access_shared(access[1], DTYPES[f"b{access[2]}"], operands, active)
        elif opcode == "bar.sync":
            if self.n != self.shared.bytes.shape[0] * self.kernel.n_threads or not active.all():
                raise PtxError("a barrier that not all threads come to")
            self.shared.barrier()
        elif opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            self.write(operands[0], self._shuffled(opcode, operands, active), active)
        elif known := OPCODES.get(f"{opcode} of {len(operands) - 1}", OPCODES.get(opcode)):
            values = [self.read(name, type_) for name, type_ in zip(operands[1:], known.operands, strict=True)]
            result = known.function(*values)
            if self.fuse and known.result in ("f32", "f32x2"):
                result = self._fused(instruction, values, result)
            self.write(operands[0], result, active)
        else:
            raise PtxError(f"unknown opcode '{opcode}'")

    def _fused(self, instruction: Instruction, values: list[Array], result: Array) -> Array:
        """A product is remembered; where an addition takes it up, both are one operation."""
        name, *taken = instruction.operands
        self.products.pop(name, None)
        if instruction.opcode.startswith("mul."):
            self.products[name] = (values[0], values[1])
        elif instruction.opcode.startswith(("add.", "sub.")):
            for product, other in ((0, 1), (1, 0)):
                if factors := self.products.get(taken[product]):
                    minus = -1 if instruction.opcode.startswith("sub.") else 1
                    a, c = (factors[0] * minus, values[other]) if product else (factors[0], values[other] * minus)
                    return fused(np.broadcast_to(a, result.shape), factors[1], c)
        return result

    def _access(self, kind: str, n: int, dtype: Any, operands: Sequence[str], active: Array) -> None:
        address, vector = operands if kind == "st" else reversed(operands)
        base, _, offset = address[1:-1].replace(" ", "").partition("+")
        addresses = self.read(base, "u64")[active] + np.array([int(offset or 0)], np.uint64)
        names = vector.strip("{ }").split(",")
        if len(names) != n:
            raise PtxError(f"{n} values do not go into {vector}")
        if kind == "st":
            values = np.stack([self.read(name.strip(), f"b{8 * dtype.itemsize}")[active] for name in names], axis=1)
            index = self.memory.index(addresses, n * dtype.itemsize, self.memory.writable)
            self.memory.bytes[index] = values.view(np.uint8)
            np.add.at(self.memory.writes, index, 1)
        else:
            index = self.memory.index(addresses, n * dtype.itemsize, self.memory.readable)
            loaded = self.memory.bytes[index].view(dtype).reshape(-1, n)
            for name, column in zip(names, loaded.T, strict=True):
                values = np.zeros(self.n, dtype)
                values[active] = column
                self.write(name.strip(), values, active)

    def _access_shared(self, kind: str, dtype: Any, operands: Sequence[str], active: Array) -> None:
        address, value = operands if kind == "st" else reversed(operands)
        base, _, offset = address[1:-1].replace(" ", "").partition("+")
        addresses = np.broadcast_to(self.read(base, "u32").astype(np.int64) + int(offset or 0), self.n)[active]
        block, thread = (self.read(name, "u32").astype(np.int64)[active] for name in ("%ctaid.x", "%tid.x"))
        values = None
        if kind == "st":
            values = np.broadcast_to(self.read(value.strip("{ }"), f"b{8 * dtype.itemsize}"), self.n)[active]
            values = np.ascontiguousarray(values).view(np.uint8).reshape(-1, dtype.itemsize)
        found = self.shared.access(block, thread, addresses, values, dtype.itemsize)
        if kind == "ld":
            loaded = np.full(self.n, _NOTHING % (1 << 8 * dtype.itemsize), dtype)  # where nothing depends on it
            loaded[active] = np.ascontiguousarray(found).view(dtype).reshape(-1)
            register = value.strip("{ }")
            self.write(register, loaded, active if register in self.registers else np.ones(self.n, bool))

    def _shuffled(self, opcode: str, operands: Sequence[str], active: Array) -> Array:
        """``bfly``: of the lane whose number differs in given bits; ``idx``: of the lane that each names."""
        value, which, clamp, members = operands[1:]
        threads = self.read("%tid.x", "u32")
        lanes = threads[: threads.size // WARP * WARP].reshape(-1, WARP) % WARP
        if clamp != "31" or members != "-1" or not active.all() or threads.size % WARP or (lanes != range(WARP)).any():
            raise PtxError("only whole warps shuffle")
        values = np.broadcast_to(self.read(value, "b32"), self.n).reshape(-1, WARP)
        if opcode == "shfl.sync.idx.b32":
            chosen = np.broadcast_to(self.read(which, "u32"), self.n).reshape(-1, WARP) % WARP
            return np.take_along_axis(values, chosen.astype(np.int64), axis=1).reshape(-1)
        if not which.isdigit() or int(which) >= WARP:
            raise PtxError("a shuffle's distance is a number below 32")
        return values[:, np.arange(WARP) ^ int(which)].reshape(-1)

    def read(self, operand: str, type_: str) -> Array:
        """A register, a number, or several registers in braces, as values of a PTX type; one, or one a thread."""
        dtype = DTYPES[type_]
        if operand.startswith("{"):
            names = [name.strip() for name in operand[1:-1].split(",")]
            nothing = np.full(1, _NOTHING % (1 << 8 * dtype.itemsize // len(names)), f"u{dtype.itemsize // len(names)}")
            parts = [self.registers.get(name, nothing) for name in names]
            return np.stack(np.broadcast_arrays(*parts), axis=1).view(dtype).reshape(-1)
        if operand == "global_smem":
            return np.zeros(1, dtype)
        if not operand.startswith("%"):
            if type_ == "f32x2":
                raise PtxError(f"the number {operand} stands where two are meant")
            digits = operand.removesuffix("U")
            if not _NUMBER.fullmatch(digits):
                raise PtxError(f"'{operand}' is neither register nor number")
            number = int("0x" + digits[2:] if digits.startswith("0f") else digits, 0)
            bits = number % (1 << 8 * dtype.itemsize)
            return np.full(1, bits, f"u{dtype.itemsize}").view(dtype)
        if operand not in self.registers:
            raise PtxError(f"{operand} is read before it is written")
        stored = self.registers[operand]
        if type_ == "f32x2":
            return stored.view(dtype)
        if stored.dtype.itemsize > dtype.itemsize:
            stored = stored.astype(f"u{dtype.itemsize}")
        return stored.view(dtype)

    def write(self, operand: str, result: Array, active: Array) -> None:
        """Into a register, extended to its size, or several in braces, in the threads that are active."""
        if operand.startswith("{"):
            names = [name.strip() for name in operand[1:-1].split(",")]
            columns = result.reshape(-1, 1).view(f"u{result.itemsize // len(names)}").T
            for name, column in zip(names, columns, strict=True):
                if name != "_":
                    self.write(name, np.ascontiguousarray(column), active)
            return
        stored = _stored(operand)
        if result.dtype == np.float32 and stored.itemsize == 8:
            values = result.view(stored)
        elif result.dtype.kind == "f":
            values = result.view(f"u{result.itemsize}")
        else:
            values = result.astype(stored)
        values = np.broadcast_to(values, self.n)
        if not active.all():
            if operand not in self.registers:
                raise PtxError(f"{operand} is first written by some threads only")
            values = np.where(active, values, self.registers[operand])
        self.registers[operand] = np.ascontiguousarray(values)


def _stored(register: str) -> Any:
    letters = re.match(r"%([a-z]+)\d+", register)
    if letters is None or letters[1] not in _REGISTER_BITS:
        raise PtxError(f"'{register}' is no register to write")
    return DTYPES[_REGISTER_BITS[letters[1]]]


def emulate(
    kernel: Kernel, memory: Memory, arguments: Sequence[int], programs: Sequence[int], fuse: bool = False
) -> None:
    """Run the blocks ``programs`` of a launch with ``arguments``; what they write is in ``memory``, and checked.

    Raises:
        PtxError: an opcode is unknown, or a thread does what it must not; the message names the instruction.
    """
    unused = [0] * (len(kernel.parameters) - len(arguments))  # Triton adds pointers to scratch memory
    by_name = dict(zip(kernel.parameters, [*arguments, *unused], strict=True))
    threads = Threads(kernel, memory, Shared(min(programs), len(programs)), by_name, fuse)
    threads.registers["%tid.x"] = np.tile(np.arange(kernel.n_threads, dtype=np.uint32), len(programs))
    threads.registers["%ctaid.x"] = np.repeat(np.array(programs, np.uint32), kernel.n_threads)
    with np.errstate(all="ignore"):
        threads.run(0)
    memory.check()
