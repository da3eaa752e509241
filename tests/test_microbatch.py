"""microbatch: what is cut, what goes whole, and what is said of inputs that do not fit."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fxpipe.errors import InputError
from fxpipe.microbatch import Microbatches, check_shapes, tensor_leaves
from fxpipe.trace import trace


class Nested(nn.Module):
    def forward(self, x, pair, *, mask, scale):
        return (x + pair[0] + pair[1]) * mask * scale


X = torch.arange(24.0).reshape(6, 4)
MASK = torch.ones(1, 4)
SIGNATURE = trace(Nested(), (X, (X, X)), {"mask": MASK, "scale": 2}).signature
PATHS = ("x", "y")


def call(args=(X, (X, X)), target=None, **kwargs):
    return tensor_leaves(SIGNATURE, args, {"mask": MASK, "scale": 2, **kwargs}, target)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_the_parts_are_the_whole(n, size, columns):
    x, y = torch.randn(n * size, columns), torch.randint(9, (n * size,))
    cut = Microbatches.of([x, y], PATHS, n)
    parts = cut.split([x, y])
    assert (cut.n, cut.batch_size, len(parts)) == (n, n * size, n)
    for whole, of_each in ((x, [p[0] for p in parts]), (y, [p[1] for p in parts])):
        assert torch.equal(torch.cat(of_each), whole)
        assert all(len(p) == size for p in of_each)


def test_parts_are_views():
    first, second = Microbatches.of([X], ("x",), 2).split([X])
    assert first[0].data_ptr() == X.data_ptr()
    assert second[0].storage_offset() == 12


def test_what_has_no_batch_goes_whole():
    number, row = torch.tensor(3.0), torch.ones(1, 9)
    cut = Microbatches.of([number, row, X], ("a", "b", "c"), 3)
    assert cut.batched == (False, False, True)
    for part in cut.split([number, row, X]):
        assert part[0] is number
        assert part[1] is row
        assert part[2].shape == (2, 4)


def test_a_batch_of_one():
    cut = Microbatches.of([torch.ones(1, 4)], ("x",), 1)
    assert (cut.batch_size, cut.batched) == (1, (False,))
    with pytest.raises(InputError, match="2 microbatches do not divide the batch of 1"):
        Microbatches.of([torch.ones(1, 4)], ("x",), 2)


def test_a_batch_that_does_not_divide():
    with pytest.raises(InputError) as caught:
        Microbatches.of([X], ("x",), 4)
    assert str(caught.value) == (
        "4 microbatches do not divide the batch of 6; choose a batch that is a multiple of 4, or one of 1, 2, 3, 6 microbatches"
    )


def test_an_input_that_is_no_part_of_the_batch():
    with pytest.raises(InputError) as caught:
        Microbatches.of([X, torch.ones(5)], PATHS, 2)
    assert str(caught.value) == (
        "input 'y' has 5 rows, but the batch has 6 (from the first input); "
        "every tensor's dimension 0 must be the batch, or 1"
    )
    with pytest.raises(InputError, match="input 'y' has 0 rows"):
        Microbatches.of([X, torch.ones(0)], PATHS, 2)


def test_the_leaves_of_a_call():
    y, z = X + 1, X + 2
    found = tensor_leaves(SIGNATURE, (X, (y, z)), {"scale": 2, "mask": MASK}, None)  # in any order
    assert [t.data_ptr() for t in found] == [t.data_ptr() for t in (X, y, z, MASK)]


def test_too_few_or_unknown_inputs():
    with pytest.raises(InputError) as caught:
        tensor_leaves(SIGNATURE, (X,), {"mask": MASK, "colour": 1}, None)
    assert str(caught.value) == (
        "step takes 2 positional inputs and ['mask', 'scale'] by keyword; "
        "found 1 positional, missing ['scale'], unknown ['colour']"
    )


def test_inputs_nested_otherwise():
    with pytest.raises(
        InputError,
        match=r"(?s)the inputs are nested differently from the traced ones: expected TreeSpec.*, found TreeSpec",
    ):
        call((X, (X,)))
    with pytest.raises(InputError, match="nested differently"):
        call((X, [X, X]))
    with pytest.raises(InputError, match="nested differently"):
        call(target=(X, X))


def test_another_constant():
    with pytest.raises(InputError, match="input leaf 4 was the constant 2 when traced, now 3; compile again for it"):
        call(scale=3)
    with pytest.raises(InputError, match=r"was the constant 2 when traced, now tensor\(2\)"):
        call(scale=torch.tensor(2))
    with pytest.raises(InputError, match="was the constant None when traced"):
        call(target=X)


def test_a_number_for_a_tensor():
    with pytest.raises(InputError, match="input 'mask' is float; expected a tensor, as when traced"):
        call(mask=1.0)


def test_shapes():
    examples = call()
    check_shapes(SIGNATURE, examples, examples)
    for wrong in (X[:5], X.double()):
        with pytest.raises(InputError) as caught:
            check_shapes(SIGNATURE, examples, [X, wrong, X, MASK])
        assert str(caught.value) == (
            f"input '1[0]' has {wrong.dtype} {list(wrong.shape)} in a microbatch; the plan was made for torch.float32 [6, 4]; "
            "give inputs of that shape or compile again"
        )
