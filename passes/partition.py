"""partition-stages: decides where the program is cut into pipeline stages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import torch
import torch.fx as fx
import torch.nn as nn

from fxpipe.costs.replica_widths import replica_widths
from fxpipe.costs.storages import attribute_of
from fxpipe.cuts.chain import TICKS_PER_SECOND, Chain, Cut, Limits
from fxpipe.cuts.cut_rules import CutRules, cut_rules
from fxpipe.cuts.cut_search import CutSearch
from fxpipe.cuts.replicated_cuts import ReplicatedSearch
from fxpipe.cuts.stage_hints import parse_hints
from fxpipe.errors import OptionError, PartitionError, unknown
from fxpipe.ir.cost import CostTable
from fxpipe.ir.partition import Partition, StagePlan, TiedParameter
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass
from fxpipe.units import format_bytes

OBJECTIVES = ("time",)
FAMILY = "contiguous cuts of the program order"
AUTO = "auto"
MOST_TRIED = 128  # stages, where their number is left open


@dataclass(frozen=True)
class PartitionStages(Pass):
    """Cuts the program order into ``n_stages`` consecutive stages so that the slowest stage or link is as fast as can be.

    The problem of US12056604B2 and PipeDream (SOSP 2019) with one worker for each stage: a stage takes the longest of its
    forward and backward seconds and its two links; a link carries, each once, the values made before the cut and read after
    it, and the gradients of the differentiable ones back, at ``bandwidth_bytes_per_second``. Values that skip stages are
    relayed. Cheap values that depend only on inputs are computed again in the stage that reads them
    (``fxpipe.cuts.recompute``).

    ``memory_bytes`` limits every stage, ``None`` none: parameters and their gradients, buffers, what the stage sends, the
    gradients that it receives and sends; and for each microbatch in flight, of which stage s holds
    min(``n_microbatches``, n_stages - s), what it received and what it saves for backward. Optimizer state and the
    temporaries of operators are not counted. ``n_stages`` ``None`` takes the fewest stages that fit (1 without a limit).

    ``replicas``, such as ``2,1,1``: on how many ranks each stage runs, which take its microbatches in turn
    (``fxpipe.cuts.replicated_cuts``); ``auto``: as the planner finds best for ``n_stages`` ranks
    (``fxpipe.costs.replica_widths``); empty: one each. A replicated stage may not update buffers.

    ``stage_hints``, ``module=hint;module=hint``: modules (or nodes) of one hint share a stage, of two hints they do not.

    Decides only: adds the fact Partition and leaves the graph alone.

    Raises:
        OptionError: an option has a value that it cannot take.
        PartitionError: the program has fewer legal cuts, or no cut fits the memory; says what is possible.
    """

    name: ClassVar[str] = "partition-stages"
    requires: ClassVar[tuple[type, ...]] = (CostTable,)
    provides: ClassVar[tuple[type, ...]] = (Partition,)
    rewrites: ClassVar[bool] = False

    n_stages: int | None = None
    objective: str = "time"
    bandwidth_bytes_per_second: float = 12.5e9  # 100 Gbit/s
    memory_bytes: int | None = None
    n_microbatches: int | None = None
    stage_hints: str = ""
    replicas: str = ""

    def __post_init__(self) -> None:
        parse_hints(self.stage_hints)
        replicas = parse_replicas(self.replicas)
        if self.replicas == AUTO and self.n_stages is None:
            raise OptionError(
                f"{self.name}: replicas are {AUTO!r}, for which n_stages must say how many ranks there are"
            )
        if replicas and self.n_stages not in (None, len(replicas)):
            raise OptionError(
                f"{self.name}: replicas {self.replicas} are of {len(replicas)} stages, not {self.n_stages}"
            )
        if self.objective not in OBJECTIVES:
            raise OptionError(f"{self.name}: {unknown('objective', self.objective, OBJECTIVES)}")
        for option in ("n_stages", "memory_bytes", "n_microbatches"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"{self.name}: {option} is {value!r}; expected a whole number, at least 1, or none")
        if not self.bandwidth_bytes_per_second > 0:
            raise OptionError(
                f"{self.name}: bandwidth_bytes_per_second is {self.bandwidth_bytes_per_second!r}; expected more than 0"
            )

    def run(self, program: Program) -> Program:
        rules = cut_rules(
            program, program.fact(CostTable), self.bandwidth_bytes_per_second, parse_hints(self.stage_hints)
        )
        chain = rules.chain()
        search, replicas = CutSearch(chain), self._replicas(rules)
        if replicas:
            cut = self._replicated(replicas, rules, chain, search)
        else:
            cut = self._fewest(search) if self.n_stages is None else self._exactly(self.n_stages, search)
        return program.with_facts(_partition(rules, chain, cut, self.objective, replicas or (1,) * len(cut.ticks)))

    def _replicas(self, rules: CutRules) -> tuple[int, ...]:
        if self.replicas == AUTO and self.n_stages is not None:
            return replica_widths(rules, self.n_stages, self.bandwidth_bytes_per_second, self.n_microbatches or 1)
        return parse_replicas(self.replicas)

    def _limits(self, n_stages: int) -> Limits:
        return Limits(n_stages, self.memory_bytes, self.n_microbatches)

    def _replicated(self, replicas: tuple[int, ...], rules: CutRules, chain: Chain, search: CutSearch) -> Cut:
        self._check_possible(len(replicas), search)
        limits = Limits(len(replicas), self.memory_bytes, self.n_microbatches, replicas)
        ticks_per_byte = Fraction(TICKS_PER_SECOND) / Fraction(self.bandwidth_bytes_per_second)
        cut = ReplicatedSearch(chain, limits, ticks_per_byte).best()
        if cut is None:
            raise PartitionError(
                f"no cut into {len(replicas)} stages on {','.join(map(str, replicas))} ranks "
                + " and ".join(self._kept(rules, chain))
            )
        return cut

    def _exactly(self, n_stages: int, search: CutSearch) -> Cut:
        self._check_possible(n_stages, search)
        cut = search.best(self._limits(n_stages))
        return self._refuse(n_stages, search) if cut is None else cut

    def _kept(self, rules: CutRules, chain: Chain) -> Iterator[str]:
        """What a cut for replicas must keep to."""
        if chain.apart:
            yield "keeps the stage hints apart"
        if chain.alone:
            names = [rules.nodes[place].name for place in chain.alone]
            yield (
                f"has what updates buffers ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) in stages of one rank, "
                "for a replica sees only its own microbatches (eval mode updates none)"
            )
        if self.memory_bytes is not None:
            yield f"keeps to {format_bytes(self.memory_bytes)} a rank"

    def _check_possible(self, n_stages: int, search: CutSearch) -> None:
        if n_stages > search.most_stages():
            raise PartitionError(
                f"{n_stages} stages were asked for, but the program can be cut into {search.most_stages()} at most: "
                f"ask for no more"
            )

    def _fewest(self, search: CutSearch) -> Cut:
        most = min(search.most_stages(), MOST_TRIED)
        for n_stages in range(min(most, search.least_stages()), most + 1):
            if (cut := search.best(self._limits(n_stages))) is not None:
                return cut
        return self._refuse(most, search)

    def _refuse(self, n_stages: int, search: CutSearch) -> Cut:
        fastest = search.best(Limits(n_stages, None, self.n_microbatches))
        if fastest is None or self.memory_bytes is None:
            raise PartitionError(
                f"no cut into {n_stages} stages keeps the stage hints apart: they need {search.least_stages()} stages at "
                f"least, with a legal cut and work between them; ask for more stages, or for fewer hints"
            )
        needs = fastest.memory_bytes
        worst = needs.index(max(needs))
        least = search.least_memory_bytes(self._limits(n_stages))
        raise PartitionError(
            f"no cut into {n_stages} stages keeps to {format_bytes(self.memory_bytes)} a stage: in the fastest one stage "
            f"{worst} needs {format_bytes(needs[worst])} ({needs[worst]} bytes), and the least with which a cut exists is "
            f"{format_bytes(least)} ({least} bytes). Allow more memory, or more stages, or fewer microbatches in flight"
        )


def parse_replicas(text: str) -> tuple[int, ...]:
    """``2,1,1`` as numbers; none where the text is empty or ``auto``.

    Raises:
        OptionError: the text is not of that form.
    """
    parts = text.split(",") if text not in ("", AUTO) else []
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise OptionError(
            f"replicas are {text!r}; expected how many ranks each stage runs on, such as '2,1,1', or {AUTO!r}"
        )
    return tuple(map(int, parts))


def _partition(rules: CutRules, chain: Chain, cut: Cut, objective: str, replicas: tuple[int, ...]) -> Partition:
    spans = list(pairwise(cut.boundaries))
    names = _tensor_names(rules)
    stages = tuple(_stage(rules, names, index, a, b, cut.memory_bytes[index]) for index, (a, b) in enumerate(spans))
    whole = sum(w.forward_ticks + w.backward_ticks for w in rules.work)
    largest = max(w.forward_ticks + w.backward_ticks for w in rules.work)
    return Partition(
        stages=stages,
        tied=_tied(stages),
        objective=objective,
        bottleneck_seconds=cut.bottleneck_ticks / TICKS_PER_SECOND,
        bottleneck=_bottleneck(chain, cut, replicas),
        lower_bound_seconds=max(largest / max(replicas), whole / sum(replicas)) / TICKS_PER_SECOND,
        proved_optimal=FAMILY,
        replicas=replicas,
    )


def _bottleneck(chain: Chain, cut: Cut, replicas: tuple[int, ...]) -> str:
    if cut.bottleneck_ticks in cut.ticks:
        return f"stage {cut.ticks.index(cut.bottleneck_ticks)} compute"
    n_links = (min(pair) for pair in pairwise(replicas))
    links = [-(-chain.link_ticks[b] // n) for b, n in zip(cut.boundaries[1:-1], n_links, strict=True)]
    slowest = links.index(cut.bottleneck_ticks)
    return f"link {slowest}-{slowest + 1}"


def _tied(stages: tuple[StagePlan, ...]) -> tuple[TiedParameter, ...]:
    users: dict[str, list[int]] = {}
    for stage in stages:
        for name in stage.parameters:
            users.setdefault(name, []).append(stage.index)
    return tuple(TiedParameter(name, at[0], tuple(at)) for name, at in users.items() if len(at) > 1)


def _tensor_names(rules: CutRules) -> dict[int, str]:
    """One name for each parameter and buffer, by identity: that under which it is read first."""
    names: dict[int, str] = {}
    for reader in (*rules.nodes, rules.program.graph.output_node()):
        for node in reader.all_input_nodes:
            if node.op == "get_attr":
                names.setdefault(id(attribute_of(rules.program.graph_module, node)), str(node.target))
    return names


def _stage(rules: CutRules, names: dict[int, str], index: int, a: int, b: int, memory_bytes: int) -> StagePlan:
    again = _recomputed(rules, a, b)
    computed = [*again, *rules.nodes[a:b]]
    read = list(dict.fromkeys(source for reader in _readers(rules, computed, b) for source in reader.all_input_nodes))
    parameters, buffers = _tensors(rules, read)
    work = [rules.work[rules.position[node]] for node in computed]
    sent = _crossing(rules, b)
    return StagePlan(
        index=index,
        nodes=_names(rules.nodes[a:b]),
        recomputed=_names(again),
        received=_names(_crossing(rules, a)),
        sent=_names(sent),
        inputs=_names(node for node in rules.program.graph.find_nodes(op="placeholder") if node in read),
        parameters=tuple(names[key] for key in parameters),
        buffers=tuple(names[key] for key in buffers),
        forward_seconds=sum(w.forward_ticks for w in work) / TICKS_PER_SECOND,
        backward_seconds=sum(w.backward_ticks for w in work) / TICKS_PER_SECOND,
        parameter_bytes=sum(p.nbytes for p in parameters.values()),
        saved_bytes=sum(w.saved_bytes for w in work),
        sent_bytes=sum(rules.work[rules.position[node]].output_bytes for node in sent),
        memory_bytes=memory_bytes,
    )


def _recomputed(rules: CutRules, a: int, b: int) -> list[fx.Node]:
    """What stage ``[a, b)`` computes though an earlier stage has computed it too, in program order."""
    sources = (source for reader in _readers(rules, rules.nodes[a:b], b) for source in reader.all_input_nodes)
    needed = {node for source in sources for node in rules.closures.get(source, ())}
    return sorted((n for n in needed if rules.position[n] < a), key=rules.position.__getitem__)


def _readers(rules: CutRules, computed: Iterable[fx.Node], b: int) -> Iterator[fx.Node]:
    yield from computed
    if b == len(rules.nodes):
        yield rules.program.graph.output_node()


def _crossing(rules: CutRules, b: int) -> list[fx.Node]:
    if b == len(rules.nodes):
        return []
    return [
        n for n, last in zip(rules.nodes[:b], rules.last_use, strict=False) if last >= b and n not in rules.closures
    ]


def _tensors(rules: CutRules, read: Iterable[fx.Node]) -> tuple[dict[int, nn.Parameter], dict[int, torch.Tensor]]:
    """The parameters and the other tensors among what is read, by identity, each once."""
    found = {id(t): t for t in (attribute_of(rules.program.graph_module, n) for n in read if n.op == "get_attr")}
    parameters = {key: t for key, t in found.items() if isinstance(t, nn.Parameter)}
    return parameters, {k: t for k, t in found.items() if isinstance(t, torch.Tensor) and k not in parameters}


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)
