"""Tiles of a matrix: a bounding box of rows and columns shares a scale. Source: US20200210839A1, US12277502B2.

The codec knows runs of values only. Here a tensor becomes the matrix of its last dimension's rows, filled up with zeros to
whole tiles, and these are laid one after another, row by row of tiles, each tile row by row; and back.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from .format import BFPFormat


def to_stored(x: Tensor, fmt: BFPFormat) -> Tensor:
    """The values of ``x`` (any shape) in the order in which they are stored: [``fmt.stored_numel(x.shape)``]."""
    if not fmt.rows:
        return x.reshape(-1)
    n_rows, n_columns = _matrix(x.shape)
    matrix = pad(x.reshape(n_rows, n_columns), (0, -n_columns % fmt.columns, 0, -n_rows % fmt.rows))
    boxes = matrix.view(matrix.shape[0] // fmt.rows, fmt.rows, matrix.shape[1] // fmt.columns, fmt.columns)
    return boxes.transpose(1, 2).reshape(-1)


def from_stored(stored: Tensor, fmt: BFPFormat, shape: Sequence[int]) -> Tensor:
    """The tensor of that shape, contiguous, whose values are ``stored``."""
    if not fmt.rows:
        return stored.view(list(shape))
    n_rows, n_columns = _matrix(shape)
    down, across = -(-n_rows // fmt.rows), -(-n_columns // fmt.columns)
    matrix = stored.view(down, across, fmt.rows, fmt.columns).transpose(1, 2)
    matrix = matrix.reshape(down * fmt.rows, across * fmt.columns)
    return matrix.narrow(0, 0, n_rows).narrow(1, 0, n_columns).reshape(list(shape)).contiguous()


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1
