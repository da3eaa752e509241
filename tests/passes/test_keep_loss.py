"""keep-loss: the loss alone is returned; what cannot be a loss is refused."""

import pytest
import torch
import torch.utils._pytree as pytree
from models import MODELS
from stages import SEED, eager, inputs_of, traced
from torch import nn

from fxpipe.errors import TraceError
from fxpipe.pass_manager import Pipeline
from fxpipe.passes.keep_loss import KeepLoss
from fxpipe.trace import trace

X = torch.ones(3, 4)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_loss_is_returned(name):
    program = Pipeline((KeepLoss(),)).run(traced(name))
    assert (program.signature.n_outputs, program.signature.loss_index) == (1, 0)
    assert program.signature.inputs == traced(name).signature.inputs
    torch.manual_seed(SEED)
    outputs = program.graph_module(*inputs_of(name))
    assert len(outputs) == 1
    assert torch.equal(outputs[0], eager(name).loss)
    assert pytree.tree_unflatten(list(outputs), program.signature.out_spec) == {"loss": outputs[0]}


def test_the_loss_need_not_be_first():
    program = trace(Returns(lambda x: {"codes": x * 2, "loss": x.sum()}), (X,))
    assert program.signature.loss_index == 1
    assert KeepLoss().run(program).graph_module(X) == (torch.tensor(12.0),)


def refusal(function):
    with pytest.raises(TraceError) as caught:
        KeepLoss().run(trace(Returns(function), (X,)))
    return str(caught.value)


def test_a_program_without_a_loss():
    assert refusal(lambda x: x * 2) == (
        "the program has no loss: no output is named 'loss' and the first is not a floating scalar; "
        "return the loss from the model, or give loss_fn and target"
    )


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda x: x.sum(dim=1), r"torch.float32 [3]"),
        (lambda x: (x > 0).sum(), "torch.int64 []"),
        (lambda x: 3.0, "3.0"),
        (lambda x: None, "None"),
    ],
)
def test_what_is_no_scalar_loss(loss, found):
    message = refusal(lambda x: {"codes": x, "loss": loss(x)})
    assert message == f"the loss is {found}; training needs one floating number: take the mean or the sum"
