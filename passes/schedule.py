"""schedule-stages: one program per rank."""

from dataclasses import dataclass
from typing import ClassVar

from fxpipe.errors import OptionError, unknown
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import Program
from fxpipe.ir.schedule import Schedule
from fxpipe.pass_base import Pass
from fxpipe.passes.schedule_orders import ORDERS, add_communication, order
from fxpipe.verify_schedule import verify_schedule


@dataclass(frozen=True)
class ScheduleStages(Pass):
    """Emits the actions that every rank runs for one step, and proves them complete and free of deadlock.

    Provides a compute-only Schedule; sends and receives are added when a plan runs. Example, two stages, three microbatches::

        rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
        rank 1: 1F0 1B0 1F1 1B1 1F2 1B2
    """

    name: ClassVar[str] = "schedule-stages"
    requires: ClassVar[tuple[type, ...]] = (Partition,)
    provides: ClassVar[tuple[type, ...]] = (Schedule,)
    rewrites: ClassVar[bool] = False
    n_microbatches: int = 1
    order: str = "1f1b"
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise OptionError(unknown("schedule", self.order, ORDERS))
        if self.n_microbatches < 1:
            raise OptionError(f"n_microbatches is {self.n_microbatches}; expected at least 1")

    def run(self, program: Program) -> Program:
        partition = program.fact(Partition)
        schedule = order(self.order, partition.n_stages, self.n_microbatches, partition.replicas)
        verify_schedule(schedule, self.max_in_flight)
        verify_schedule(add_communication(schedule))
        return program.with_facts(schedule)
