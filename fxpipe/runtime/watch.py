"""Which rank failed first, when a rank finds that it can go no further.

Every rank holds one open receive from every other, over a gloo group of its own. A rank that fails, or that loses another,
tells all others which rank it holds to be the cause, and only then raises its error. So a rank that loses a neighbour either
has the neighbour's own account, or finds that nothing can be sent to it because its process is gone. No server is asked, and
a run without failures pays nothing. (Nothing here waits for a message: a wait that times out closes all of gloo's connections.)
"""

import contextlib
import datetime
import re
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from fxpipe.errors import RuntimeFailure

GRACE_SECONDS = 3.0
"""How long a rank that lost another looks for the reason before it says that it did not answer."""
POLL_SECONDS = 0.1
ACCOUNT, PROBE = 0, 1
"""The tags of what is sent: the rank that is the cause, and a message that nobody takes, to see whether it can be sent."""
NOTHING = -1


class Watch:
    """This rank's part. ``timeout_seconds`` bounds the waits of all other groups; here it is named in messages."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._rank = dist.get_rank()
        self._others = tuple(r for r in range(dist.get_world_size()) if r != self._rank)
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
        self._heard = {r: torch.full((), NOTHING) for r in self._others}
        self._open = [dist.irecv(x, r, self._group, tag=ACCOUNT) for r, x in self._heard.items()]
        self._sent: list[tuple[dist.Work | None, torch.Tensor]] = []  # gloo reads a tensor until it has left

    @contextlib.contextmanager
    def exchange(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Around an exchange with ``peers``: its errors become a RuntimeFailure that names the rank that failed first."""
        try:
            yield
        except RuntimeFailure:
            raise
        except RuntimeError as e:
            lost = self._first_failed(tuple(peers))
            raise RuntimeFailure(f"rank {self._rank} could not {what}: {self._problem(lost)} ({first_line(e)})") from e

    def report(self, cause: int) -> None:
        """Tells every other rank that this one stops because of rank ``cause``."""
        for rank in self._others:
            self._send(cause, rank, ACCOUNT)

    def _problem(self, lost: tuple[int, ...]) -> str:
        limit = f"{self.timeout_seconds:g} s (timeout_seconds)"
        if lost == (self._rank,):
            return f"the others stopped waiting for this rank after {limit}"
        name = f"rank {lost[0]}" if len(lost) == 1 else f"one of ranks {', '.join(map(str, lost))}"
        return f"{name} failed, died or did not answer within {limit}; look at its output"

    def _first_failed(self, suspects: tuple[int, ...]) -> tuple[int, ...]:
        """The rank that failed first as far as the accounts lead, or all suspects where there is no trace."""
        if len(suspects) == 1:
            self.report(suspects[0])
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            gone = [r for r in suspects if not self._send(NOTHING, r, PROBE)]
            accused = [a for r in suspects if (a := self._account_of(r)) != NOTHING]
            if accused or gone:
                cause = self._follow((accused or gone)[0])
                if len(suspects) > 1:
                    self.report(cause)
                return (cause,)
            time.sleep(POLL_SECONDS)
        return suspects

    def _follow(self, cause: int) -> int:
        """From account to account to the rank that has given none, or that names itself."""
        seen = {self._rank}
        while cause not in seen and (further := self._account_of(cause)) != NOTHING:
            seen.add(cause)
            cause = further
        return cause

    def _account_of(self, rank: int) -> int:
        return int(self._heard[rank])

    def _send(self, value: int, rank: int, tag: int) -> bool:
        """Whether the process of ``rank`` is there to send to."""
        message = torch.tensor(value)
        try:
            self._sent.append((dist.isend(message, rank, self._group, tag=tag), message))
        except RuntimeError:
            return False
        return True


def first_line(error: Exception) -> str:
    """The first sentence of an error's message without gloo's place in its own source, or its class where it has none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S*\] ", "", line).split(". ")[0]
