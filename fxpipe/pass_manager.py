"""Pipeline: runs passes in order; checks what each requires, copies, times, verifies, records, dumps."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fxpipe.errors import VerifyError
from fxpipe.graph_module import copy_graph_module, lazy_graph_modules
from fxpipe.ir.program import PassRecord, Program
from fxpipe.pass_base import Pass
from fxpipe.verify import verify_program

Observer = Callable[[Pass, Program, Program], None]


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes.

    ``observers`` are called after each pass with (pass, program before, program after): printing, dumping, counting.
    """

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = field(default=())

    def __post_init__(self) -> None:
        known: set[type] = set()
        for step in self.passes:
            missing = [r.__name__ for r in step.requires if r not in known]
            if missing:
                raise VerifyError(f"{step.name} requires {', '.join(missing)}, which no pass before it provides")
            known |= set(step.provides)

    def run(self, program: Program) -> Program:
        """Runs every pass; the given program is not changed. Raises what a pass raises, or VerifyError."""
        verify_program(program, "the pipeline's input")
        with lazy_graph_modules(), _without_collection():
            for step in self.passes:
                before, program = program, _run(step, program)
                for observe in self.observers:
                    observe(step, before, program)
        return program


def _run(step: Pass, before: Program) -> Program:
    start = time.perf_counter()
    given = replace(before, graph_module=copy_graph_module(before.graph_module)) if step.rewrites else before
    program = step.run(given)
    seconds = time.perf_counter() - start
    verify_program(program, str(step))
    if not step.rewrites and program.graph_module is not before.graph_module:
        raise VerifyError(f"{step.name} says that it rewrites nothing, but left another graph")
    missing = [p.__name__ for p in step.provides if p not in program.facts]
    if missing:
        raise VerifyError(f"{step.name} provides {', '.join(missing)} but left none")
    record = PassRecord(str(step), seconds, len(program.graph.nodes))
    return replace(program, log=(*program.log, record))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Puts the search for cyclic garbage off: it would visit the many objects that passes make, and keep, again and again.

    Afterwards they count as old at once, by way of freezing and thawing; else the next search would visit them all as new.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@dataclass(frozen=True)
class Dump:
    """An observer that writes the listing before and after each pass: ``03-partition-stages.before.txt`` and ``.after.txt``."""

    folder: Path
    listing: Callable[[Program], str]

    def __call__(self, step: Pass, before: Program, after: Program) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{len(after.log):02d}-{step.name}"
        for when, program in (("before", before), ("after", after)):
            (self.folder / f"{stem}.{when}.txt").write_text(self.listing(program) + "\n")


def summary(program: Program) -> Sequence[tuple[str, float, int]]:
    """The program's history as rows of (pass, seconds, nodes)."""
    return [(r.text, r.seconds, r.n_nodes) for r in program.log]
