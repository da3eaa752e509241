"""A random state of one's own, so that building a demo neither depends on the caller's nor disturbs it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the CPU's random numbers start at ``seed``; afterwards they go on where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
