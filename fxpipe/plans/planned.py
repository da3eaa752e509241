"""What the page, the file and the prediction see of a plan: its facts, not how it runs."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from fxpipe.ir.compression import CompressionPlan
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import Program
from fxpipe.ir.schedule import Schedule
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.microbatch import Microbatches
from fxpipe.pipeline import Options


class Planned(Protocol):
    """A ``fxpipe.plans.plan.Plan``, which stands on a higher floor; see there."""

    @property
    def program(self) -> Program: ...
    @property
    def options(self) -> Options: ...
    @property
    def microbatches(self) -> Microbatches: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def digest(self) -> Mapping[str, str]: ...
    @property
    def constants(self) -> Mapping[str, Tensor]: ...
    @property
    def partition(self) -> Partition: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def compression(self) -> CompressionPlan: ...
    @property
    def stages(self) -> LoweredStages: ...
