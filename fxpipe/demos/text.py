"""Real text to learn from: the reference pages that Python's own ``help()`` shows.

``pydoc_data.topics`` is part of the standard library, so the text is there wherever fxpipe runs, without a download:
some 460,000 characters of English, grammar and code. Characters are the tokens; those outside ASCII become ``?``, so
the vocabulary has the same 128 entries under every version of Python.
"""

from collections.abc import Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor

VOCABULARY = 128
Part = Literal["train", "validation"]


def read(part: Part) -> str:
    """The pages of one part, in the order of their names: every eighth is for validation, the others for training."""
    from pydoc_data.topics import topics

    pages = [page for _, page in sorted(topics.items())]
    held_out = pages[7::8]
    return "\n".join(held_out if part == "validation" else [page for page in pages if page not in held_out])


def encode(text: str) -> Tensor:
    """``text`` as tokens, int64 [len(text)]."""
    return torch.tensor(list(text.encode("ascii", errors="replace")))


def decode(tokens: Tensor) -> str:
    """The inverse of ``encode`` on ASCII text."""
    return bytes(tokens.tolist()).decode("ascii")


def text_batches(batch: int, length: int, *, seed: int = 0, part: Part = "train") -> Iterator[dict[str, Tensor]]:
    """Endless random windows of the text, the same for the same ``seed``.

    Each is ``{"input_ids": int64 [batch, length], "labels": the same}``: Hugging Face models shift labels themselves.
    """
    tokens = _tokens(part)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length + 1, (batch, 1), generator=generator)
        window = tokens[starts + torch.arange(length)]
        yield {"input_ids": window, "labels": window.clone()}


@cache
def _tokens(part: Part) -> Tensor:
    return encode(read(part))
