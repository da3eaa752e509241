"""use-costs: costs that were found elsewhere, such as a measured profile."""

from dataclasses import dataclass, field
from typing import ClassVar

from fxpipe.errors import PlanError
from fxpipe.ir.cost import CostTable
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass


@dataclass(frozen=True)
class UseCosts(Pass):
    """Adds the given CostTable after checking that it has a row for every node of the graph. Changes no node."""

    name: ClassVar[str] = "use-costs"
    provides: ClassVar[tuple[type, ...]] = (CostTable,)
    rewrites: ClassVar[bool] = False

    costs: CostTable = field(default=CostTable((), "none", "modelled"), repr=False)

    def run(self, program: Program) -> Program:
        missing = [n.name for n in program.graph.nodes if n.op == "call_function" and n.name not in self.costs]
        if missing:
            raise PlanError(
                f"the profile has no row for node {missing[0]!r} and {len(missing) - 1} more; "
                "it is of another graph, measure again"
            )
        return program.with_facts(self.costs)
