"""keep-loss: training needs the loss and nothing else."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from fxpipe.errors import TraceError
from fxpipe.graph_module import returned, set_returned
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
        loss = returned(program.graph)[index]
        _check(loss)
        set_returned(program.graph, [loss])
        program.graph_module.recompile()
        signature = replace(program.signature, n_outputs=1, loss_index=0, out_spec=pytree.tree_structure({"loss": 0}))
        return replace(program.with_graph(program.graph_module), signature=signature)


def _check(loss: Any) -> None:
    value = loss.meta["val"] if isinstance(loss, fx.Node) else loss
    if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise TraceError(f"the loss is {found}; training needs one floating number: take the mean or the sum")
