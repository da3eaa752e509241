"""Which values cross from forward to backward, and what is done with each."""

from dataclasses import dataclass

from fxpipe.errors import VerifyError, unknown

DECISIONS = ("keep", "compress", "pack", "recompute")


@dataclass(frozen=True)
class SavePoint:
    """A value that forward keeps for backward in one stage.

    ``decision`` is ``keep``, ``compress``, where ``format`` is the text of the BFP format, ``pack``, where it is that of an
    exact form (``fxpipe.saves.exact_forms``), or ``recompute``, from a parameter; ``reason`` says why in words.
    ``stored_bytes`` is what stays in memory between forward and backward. Bytes are for one microbatch.
    """

    stage_index: int
    name: str
    operator: str
    dtype: str
    shape: tuple[int | str, ...]
    raw_bytes: int
    stored_bytes: int
    decision: str
    format: str
    reason: str

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise VerifyError(unknown("save point decision", self.decision, DECISIONS))
        if (self.decision in ("compress", "pack")) != bool(self.format):
            raise VerifyError(f"save point {self.name}: decision {self.decision!r} with format {self.format!r}")


@dataclass(frozen=True)
class CompressionPlan:
    """The save points of all stages, in order of stage and then of the forward graph."""

    save_points: tuple[SavePoint, ...]

    def of_stage(self, stage_index: int) -> tuple[SavePoint, ...]:
        """The save points of one stage."""
        return tuple(p for p in self.save_points if p.stage_index == stage_index)

    @property
    def raw_bytes(self) -> int:
        return sum(p.raw_bytes for p in self.save_points)

    @property
    def stored_bytes(self) -> int:
        return sum(p.stored_bytes for p in self.save_points)
