"""Plan: everything that was decided, ready to be printed, saved and run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxpipe.ir.compression import CompressionPlan
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import Program
from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.microbatch import Microbatches
from fxpipe.passes.schedule_orders import add_communication
from fxpipe.pipeline import Options
from fxpipe.runtime.distributed import DistributedPipe, launched_ranks
from fxpipe.runtime.local import LocalPipe
from fxpipe.runtime.pipe import Pipe, PipeSpec


@dataclass(frozen=True)
class Plan:
    """The program after every pass, with the model that it trains.

    ``constants`` are tensors that the program needs and the model does not own. Made by ``fxpipe.compile`` or ``fxpipe.load``.
    """

    program: Program
    options: Options
    microbatches: Microbatches
    model: nn.Module = field(repr=False)
    digest: dict[str, str]
    constants: dict[str, Tensor] = field(repr=False)

    @property
    def partition(self) -> Partition:
        """The cut into stages."""
        return self.program.fact(Partition)

    @property
    def schedule(self) -> Schedule:
        """The compute-only program of every rank."""
        return self.program.fact(Schedule)

    @property
    def compression(self) -> CompressionPlan:
        """What happens to every value saved for backward."""
        return self.program.fact(CompressionPlan)

    @property
    def stages(self) -> LoweredStages:
        """The forward and backward graph of every stage."""
        return self.program.fact(LoweredStages)

    def pipe(self) -> Pipe:
        """The plan running: in this process, or as this process's rank under torchrun.

        Raises:
            OptionError: torchrun started another number of ranks than the plan has.
        """
        return (LocalPipe if launched_ranks() is None else DistributedPipe)(self.spec(), self.model)

    def spec(self) -> PipeSpec:
        """What a pipe needs of the plan."""
        placeholders = self.program.graph.find_nodes(op="placeholder")
        return PipeSpec(
            signature=self.program.signature,
            examples=tuple(n.meta["val"] for n in placeholders),
            microbatches=self.microbatches,
            stages=self.stages,
            schedule=self.schedule,
            lowered=add_communication(self.schedule),
            tied=self.partition.tied,
            constants=self.constants,
            compiler=self.options.stage_compiler,
            mean_loss=self.options.loss_reduction == "mean",
            timeout_seconds=self.options.timeout_seconds,
        )

    def __str__(self) -> str:
        from fxpipe.plans.page import page

        return page(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan's decisions as JSON-able data: stages, bottleneck, bound, schedule, save points."""
        from fxpipe.plans.plan_file import plan_dict

        return plan_dict(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan to a folder: graphs in ``torch.export``'s format, the rest JSON. Parameters are not in it."""
        from fxpipe.plans.plan_file import save_plan

        save_plan(self, Path(path))
