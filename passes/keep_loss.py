"""keep-loss: training needs the loss and nothing else."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.utils._pytree as pytree

from fxpipe.errors import TraceError
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass


@dataclass(frozen=True)
class KeepLoss(Pass):
    """Returns the loss alone, so that nothing is kept alive only to be returned.

    Before::

        return (loss, logits)

    After::

        return (loss,)
    """

    name: ClassVar[str] = "keep-loss"

    def run(self, program: Program) -> Program:
        index = program.signature.loss_index
        if index is None:
            raise TraceError(
                "the program has no loss: no output is named 'loss' and the first is not a floating scalar; "
                "return the loss from the model, or give loss_fn and target"
            )
        output = program.graph.output_node()
        output.args = ((output.args[0][index],),)
        program.graph_module.recompile()
        signature = replace(program.signature, n_outputs=1, loss_index=0, out_spec=pytree.tree_structure({"loss": 0}))
        return replace(program.with_graph(program.graph_module), signature=signature)
