"""What things cost: nodes and devices. Numbers are exact and carry their unit in their name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import sympy

from fxpipe.errors import OptionError, PlanError, VerifyError, unknown

Size: TypeAlias = int | sympy.Expr
Time: TypeAlias = float | sympy.Expr
SOURCES = ("modelled", "measured")


@dataclass(frozen=True)
class NodeCost:
    """The cost of one node for one microbatch on one device.

    Counts are integers, or sympy expressions over the program's dynamic dimensions.
    ``saved_bytes`` is what eager autograd would keep for backward because of this node: the bytes of storages
    that this node produced and that some node saves, each storage once, parameters and inputs of the program excluded.
    ``parameter_bytes`` counts the parameters that this node reads, each parameter at its first reader only, so that the
    sum over nodes is the size of the model.
    """

    name: str
    operator: str
    flops: Size
    backward_flops: Size
    bytes_read: Size
    bytes_written: Size
    output_bytes: Size
    parameter_bytes: Size
    saved_bytes: Size
    forward_seconds: Time
    backward_seconds: Time

    def __post_init__(self) -> None:
        for field in COST_FIELDS:
            value = getattr(self, field)
            number = (int, float) if field in TIME_FIELDS else int
            if isinstance(value, sympy.Expr):
                continue
            if not isinstance(value, number) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise VerifyError(
                    f"cost of node {self.name}: {field} is {value!r}; expected a finite number, at least 0"
                )

    def at(self, sizes: Mapping[str, int]) -> "NodeCost":
        """The same cost with dynamic dimensions replaced by numbers, ``sizes`` mapping symbol name to value."""
        return NodeCost(self.name, self.operator, *(_at(getattr(self, f), sizes) for f in COST_FIELDS))


COST_FIELDS = tuple(f for f in NodeCost.__dataclass_fields__ if f not in ("name", "operator"))
TIME_FIELDS = tuple(f for f in COST_FIELDS if f.endswith("_seconds"))


def _at(value: Any, sizes: Mapping[str, int]) -> Any:
    if not isinstance(value, sympy.Expr):
        return value
    bound = value.subs({s: sizes[s.name] for s in value.free_symbols if s.name in sizes})
    if not bound.is_number:
        return bound
    return int(bound) if bound.is_integer else float(bound)


@dataclass(frozen=True)
class CostTable(Mapping[str, NodeCost]):
    """The cost of every node of a program, by node name, in program order.

    ``source`` says where the seconds come from: ``modelled`` (roofline of the device) or ``measured`` (run on it).
    """

    nodes: tuple[NodeCost, ...]
    device: str
    source: str

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise OptionError(unknown("cost source", self.source, SOURCES))
        by_name = {n.name: n for n in self.nodes}
        if len(by_name) != len(self.nodes):
            names = [n.name for n in self.nodes]
            raise VerifyError(f"the cost table has node {max(names, key=names.count)} more than once")
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> NodeCost:
        by_name: dict[str, NodeCost] = self.__dict__["_by_name"]
        return by_name[name]

    def __iter__(self) -> Iterator[str]:
        return (n.name for n in self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def at(self, sizes: Mapping[str, int]) -> "CostTable":
        """The table with dynamic dimensions replaced by numbers."""
        return CostTable(tuple(n.at(sizes) for n in self.nodes), self.device, self.source)

    def to_json(self) -> str:
        """One JSON object; symbolic entries as sympy text. ``from_json`` is the inverse."""
        rows = [{k: str(v) if isinstance(v, sympy.Expr) else v for k, v in asdict(n).items()} for n in self.nodes]
        return json.dumps({"device": self.device, "source": self.source, "nodes": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> "CostTable":
        """Reads ``to_json``'s text; raises PlanError where it is not that."""
        try:
            data = json.loads(text)
            rows = tuple(NodeCost(**{k: _read(k, v) for k, v in row.items()}) for row in data["nodes"])
            return CostTable(rows, _text(data["device"]), _text(data["source"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, VerifyError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else str(e)
            raise PlanError(f"not a cost table: {reason}; expected the JSON that CostTable.to_json writes") from e


def _read(field: str, value: Any) -> Any:
    if field in COST_FIELDS:
        return parse_size(value) if isinstance(value, str) else value
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def parse_size(text: str) -> sympy.Expr:
    """Reads an arithmetic expression over integers and symbols without evaluating Python code."""
    from fxpipe.ir.expression import parse_expression

    return parse_expression(text)


@dataclass(frozen=True)
class Device:
    """A named device with its peak rates; ``source`` says where the numbers were read or measured."""

    name: str
    flops_per_second: Mapping[str, float]  # by dtype name: "float32" (required), "bfloat16", "float16", ...
    memory_bytes_per_second: float
    memory_bytes: int
    launch_seconds: float  # fixed cost of starting one operator
    source: str

    def __post_init__(self) -> None:
        if "float32" not in self.flops_per_second:
            raise OptionError(f"device {self.name} has no float32 rate; it stands for every type that is not listed")
        rates = {**self.flops_per_second, "memory": self.memory_bytes_per_second, "memory size": self.memory_bytes}
        for what, rate in rates.items():
            if not rate > 0:
                raise OptionError(f"device {self.name}: {what} is {rate}; expected more than 0")
        if not self.launch_seconds >= 0:
            raise OptionError(f"device {self.name}: launch time is {self.launch_seconds}; expected at least 0")

    def peak_flops_per_second(self, dtype: str) -> float:
        """The rate for a type of number; that of float32 where the device does not list the type."""
        return self.flops_per_second.get(dtype, self.flops_per_second["float32"])
