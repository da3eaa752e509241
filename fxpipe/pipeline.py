"""Options, and the whole default pipeline on one screen. The only file that names the passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fxpipe.cuts.stage_hints import hints_text
from fxpipe.errors import OptionError, unknown
from fxpipe.ir.cost import CostTable
from fxpipe.lowering.joint import AUTO, PARTITIONERS, partitioner_for
from fxpipe.pass_base import Pass
from fxpipe.pass_manager import Observer, Pipeline
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.compress import ChooseSavePoints, CompressSavePoints
from fxpipe.passes.keep_loss import KeepLoss
from fxpipe.passes.lower import LowerStages
from fxpipe.passes.partition import PartitionStages, parse_replicas
from fxpipe.passes.schedule import ScheduleStages
from fxpipe.passes.split import SplitStages
from fxpipe.passes.use_costs import UseCosts
from fxpipe.saves.format_rules import FormatRules
from fxpipe.saves.save_points import MIN_BYTES
from fxpipe.units import parse_bytes, parse_bytes_per_second

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        KeepLoss,
        Canonicalize,
        AnnotateCosts,
        UseCosts,
        PartitionStages,
        SplitStages,
        ScheduleStages,
        LowerStages,
        ChooseSavePoints,
        CompressSavePoints,
    )
}
CHOICES = {
    "partitioner": (AUTO, *PARTITIONERS),
    "stage_compiler": ("none", "inductor"),
    "loss_reduction": ("mean", "sum"),
}


@dataclass(frozen=True)
class Options:
    """What to build. Every field has a default; an unknown name or value raises OptionError listing the known ones.

    n_ranks: processes, one stage each. replicas: on how many of them each stage runs, first to last, such as ``(2, 1, 1)`` of
    4 ranks, or ``"auto"``; they take its microbatches in turn and add up their gradients.
    n_microbatches: parts of a batch that flow through the pipeline.
    schedule: ``1f1b`` or ``gpipe``. format: of saved activations (``bfp4b32``), or ``None`` to keep them as they are, or for
    each pattern of a node's name, operator or module path (``fnmatch``; the first that matches counts) such a format:
    ``{"*.mlp.*": "bfp4b32", "aten.relu": "none", "default": "bfp8b32"}``, kept as text.
    min_bytes: smaller values are kept. exact_forms: with a format, also pack bools, integers of a known range and masks without
    loss, and compute copies of parameters again. partitioner: what forward saves (``lower-stages``); ``auto`` is ``min-bytes``
    with a format, else ``min-cut``; ``recompute-attention`` saves less still, for time.
    objective: of the cut, ``time``. device: whose costs are modelled (``fxpipe.costs.devices``).
    bandwidth: of the link between ranks (``"12GB/s"``); memory: of each rank (``"16GiB"``), ``None`` for no limit.
    stage_hints: modules (or nodes) by name, each with a hint: those of one hint share a stage, those of two do not; the marks
    of ``fxpipe.stage_hint`` in the model are added.
    stage_compiler: ``none`` runs the graphs as they are, bitwise like eager; ``inductor`` compiles them.
    loss_reduction: how the model's loss combines its batch, ``mean`` or ``sum``, so that microbatches add up to the same.
    timeout_seconds: how long a rank waits for another.
    """

    n_ranks: int = 1
    n_microbatches: int = 1
    schedule: str = "1f1b"
    format: str | None = None
    min_bytes: int = MIN_BYTES
    exact_forms: bool = True
    partitioner: str = AUTO
    objective: str = "time"
    device: str = "cpu"
    bandwidth: str = "10GB/s"
    memory: str | None = None
    stage_hints: str | Mapping[str, object] = ""
    stage_compiler: str = "none"
    loss_reduction: str = "mean"
    timeout_seconds: float = 300.0
    replicas: str | Sequence[int] = ""

    def __post_init__(self) -> None:
        for name in ("n_ranks", "n_microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; expected an integer of at least 1")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise OptionError(unknown(name, getattr(self, name), known))
        if not self.timeout_seconds > 0:
            raise OptionError(f"timeout_seconds is {self.timeout_seconds}; expected more than 0")
        object.__setattr__(self, "format", FormatRules.parse(self.format).text)
        object.__setattr__(self, "stage_hints", hints_text(self.stage_hints))
        if not isinstance(self.replicas, str):
            object.__setattr__(self, "replicas", ",".join(map(str, self.replicas)))
        self._check_replicas()
        default_pipeline(self)  # every pass checks its own options

    def _check_replicas(self) -> None:
        replicas = parse_replicas(str(self.replicas))
        if replicas and sum(replicas) != self.n_ranks:
            raise OptionError(f"replicas {self.replicas} are {sum(replicas)} ranks; n_ranks is {self.n_ranks}")
        if max(replicas, default=1) > self.n_microbatches:
            raise OptionError(
                f"replicas {self.replicas}: {max(replicas)} ranks of a stage for n_microbatches {self.n_microbatches}; each "
                "needs a microbatch at least"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "Options":
        """Options from a dict such as ``torch.compile``'s; raises OptionError for a name that is not one."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError(unknown("option", name, known))
        return cls(**options)


def default_pipeline(
    options: Options, costs: CostTable | None = None, observers: tuple[Observer, ...] = ()
) -> Pipeline:
    """The passes from a traced program to one that runs. ``costs`` replaces the modelled ones (a measured profile)."""
    return Pipeline(
        (
            KeepLoss(),
            Canonicalize(),
            AnnotateCosts(device=options.device) if costs is None else UseCosts(costs=costs),
            PartitionStages(
                n_stages=len(parse_replicas(str(options.replicas))) or options.n_ranks,
                objective=options.objective,
                bandwidth_bytes_per_second=parse_bytes_per_second(options.bandwidth),
                memory_bytes=None if options.memory is None else parse_bytes(options.memory),
                n_microbatches=options.n_microbatches,
                stage_hints=hints_text(options.stage_hints),
                replicas=str(options.replicas),
            ),
            SplitStages(),
            ScheduleStages(n_microbatches=options.n_microbatches, order=options.schedule),
            LowerStages(partitioner=partitioner_for(options.partitioner, options.format)),
            ChooseSavePoints(format=options.format, min_bytes=options.min_bytes, exact_forms=options.exact_forms),
            CompressSavePoints(exact_forward=options.stage_compiler == "none"),
        ),
        observers,
    )
