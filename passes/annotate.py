"""annotate-costs: flops, bytes and seconds of every node, modelled on a named device."""

from dataclasses import dataclass
from typing import ClassVar

from fxpipe.costs.cost_model import modelled_costs
from fxpipe.costs.devices import device
from fxpipe.ir.cost import CostTable
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass


@dataclass(frozen=True)
class AnnotateCosts(Pass):
    """Adds the CostTable of the graph, its seconds a roofline of ``device`` (a name of ``fxpipe.costs.devices``).

    Changes no node. Raises OptionError for a device that is not known, VerifyError for a graph that cannot be walked.
    """

    name: ClassVar[str] = "annotate-costs"
    provides: ClassVar[tuple[type, ...]] = (CostTable,)
    rewrites: ClassVar[bool] = False

    device: str = "cpu"

    def __post_init__(self) -> None:
        device(self.device)  # raises for a name that is not known

    def run(self, program: Program) -> Program:
        return program.with_facts(modelled_costs(program.graph_module, device(self.device)))
