"""One FX graph in ``torch.export``'s own JSON, and back. No tensor is in it, and reading it runs nothing.

torch's reader trusts its input: it evaluates sizes as Python, takes any attribute of torch for an operator, and unpickles
weights. So a graph is checked before it is handed over: sizes are numbers, operators registered ones, weights absent.
"""

import json
import operator
from collections.abc import Callable, Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import torch.fx as fx
from torch import Tensor
from torch._export.serde import schema, serialize as serde
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace
from torch.export import graph_signature as signature

from fxpipe.errors import PlanError
from fxpipe.printing import listing

PLACE_META = ("stack_trace", "nn_module_stack")  # where in the model a node comes from
HIGHER_ORDER = ("torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.higher_order.wrap_with_autocast")
NOT_IN_A_PLAN = {
    "as_expr": "a size that is no number",
    "as_custom_obj": "an object that is no tensor",
    "as_operator": "an operator as an argument",
}


def graph_to_json(module: fx.GraphModule) -> bytes:
    """The text that stands as ``models/model.json`` in torch's ``.pt2`` archives.

    Tensors that the graph reads with get_attr become placeholders. What each of those stands for, and the order of the nodes,
    is in the graph's ``custom`` metadata, which torch's format leaves to its users.

    Raises:
        PlanError: the format has no place for something in the graph; names it.
    """
    graph, attributes = _lifted(module)
    try:
        text = _serialized(fx.GraphModule(module, graph), attributes)
        again = listing(_deserialized(json.loads(text), {})[0])
    except (serde.SerializeError, PlanError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise PlanError(f"a graph of this plan cannot be stored: {_cause(e)}") from e
    for line, found in zip(listing(graph).splitlines(), again.splitlines(), strict=True):
        if line != found:
            raise PlanError(f"a graph of this plan cannot be stored: {line!r} would come back as {found!r}")
    return text


def graph_from_json(text: bytes, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The inverse of ``graph_to_json``; what the graph reads with get_attr is taken from ``tensors`` by its name.

    Raises:
        PlanError: the text is not what ``graph_to_json`` writes, or calls something that is no registered operator.
    """
    try:
        program = json.loads(text)
        attributes = _custom(program)["attributes"]
        graph, submodules = _deserialized(program, attributes)
        return fx.GraphModule({**submodules, **{name: tensors[name] for name in attributes.values()}}, graph)
    except PlanError:
        raise
    except Exception as e:  # anything that torch's reader may raise on a text that it did not write
        raise PlanError(f"not a graph that fxpipe wrote: {type(e).__name__}: {_cause(e)}") from e


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom, without the trace that torch's messages end in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _custom(program: dict[str, Any]) -> dict[str, Any]:
    """What fxpipe adds to torch's format; see ``_serialized``."""
    found: dict[str, Any] = json.loads(program["graph_module"]["metadata"]["custom"])
    return found


# Writing.


def _lifted(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, str]]:
    """A copy whose tensors all come in through placeholders, and the attribute that each added one stands for."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    attributes: dict[str, str] = {}
    parts: dict[tuple[Any, ...], fx.Node] = {}
    for node in module.graph.nodes:
        meta = {key: node.meta[key] for key in ("val", *PLACE_META) if key in node.meta}
        if node.op == "call_function":
            meta.setdefault("val", None)  # the format does not tell no value from the value None
        if node.target is operator.getitem and node.args in parts:
            copies[node] = parts[node.args]  # the format has one name for each part of a tuple
            continue
        value = operator.attrgetter(node.target)(module) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
            attributes[copies[node].name] = node.target
            meta = {"val": value, **meta}
        elif isinstance(value, fx.GraphModule):
            # torch's reader will name it so.
            copies[node] = graph.create_node("get_attr", node.target, name=node.target)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target is operator.getitem:
            parts[node.args] = copies[node]
        copies[node].meta = meta
    return graph, attributes


def _serialized(module: fx.GraphModule, attributes: dict[str, str]) -> bytes:
    writer = serde.GraphModuleSerializer(_signature(module.graph), [])
    placeholders = module.graph.find_nodes(op="placeholder")
    module.meta = {
        "custom": {
            "order": [node.name for node in module.graph.nodes],
            "attributes": attributes,
            "placeholders": {node.name: writer.serialize_metadata(node) for node in placeholders},
        }
    }
    program = schema.ExportedProgram(
        graph_module=writer.serialize(module),
        opset_version={"aten": torch._C._get_max_operator_version()},
        range_constraints={},
        schema_version=schema.SchemaVersion(*schema.SCHEMA_VERSION),
        verifiers=["TRAINING"],
        torch_version=torch.__version__,
    )
    text: bytes = serde._to_json_bytes(program)
    return text


def _signature(graph: fx.Graph) -> signature.ExportGraphSignature:
    """Every placeholder is an input and every returned value an output of the user."""
    inputs = graph.find_nodes(op="placeholder")
    outputs: Any = graph.output_node().args[0]
    return signature.ExportGraphSignature(
        [signature.InputSpec(signature.InputKind.USER_INPUT, _argument(node), None) for node in inputs],
        [signature.OutputSpec(signature.OutputKind.USER_OUTPUT, _argument(value), None) for value in outputs],
    )


def _argument(value: Any) -> signature.TensorArgument | signature.ConstantArgument:
    return signature.TensorArgument(value.name) if isinstance(value, fx.Node) else signature.ConstantArgument("", value)


# Reading.


def _deserialized(program: dict[str, Any], attributes: dict[str, str]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph, with get_attr for the placeholders in ``attributes``, and the graphs inside it by their names."""
    _check(program)
    stored = _reader(schema.GraphModule)({**program["graph_module"], "module_call_graph": []})
    module = serde.GraphModuleDeserializer().deserialize(stored, {}, {}).graph_module
    return _arranged(module.graph, _custom(program), attributes), dict(module.named_children())


def _check(value: Any) -> None:
    """Refuses what torch's reader would evaluate or look up, and drops metadata that it would look up."""
    if isinstance(value, list):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in NOT_IN_A_PLAN:
                raise PlanError(f"it holds {NOT_IN_A_PLAN[key]}, which no plan does: {str(item)[:80]}")
            if key == "nodes" and isinstance(item, list):
                for node in item:
                    _check_operator(node["name"], node["target"])
                    node["metadata"] = _place(node["metadata"])
            _check(item)


def _place(metadata: dict[str, str]) -> dict[str, str]:
    return {key: metadata[key] for key in PLACE_META if key in metadata}


def _check_operator(name: str, target: str) -> None:
    if target in HIGHER_ORDER:
        return
    found: Any = torch.ops
    path = target.removeprefix("torch.ops.").split(".")
    if target.startswith("torch.ops.") and len(path) == 3:
        for part, kind in zip(path, (_OpNamespace, OpOverloadPacket, OpOverload), strict=True):
            found = getattr(found, part, None)
            if not isinstance(found, kind):
                break
    if not isinstance(found, OpOverload):
        raise PlanError(f"node {name!r} calls {target!r}, no registered operator; import the package that defines it")
    if any(argument.name == "filename" for argument in found._schema.arguments):
        raise PlanError(f"node {name!r} calls {target!r}, which opens a file; no plan does that")


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """JSON to the classes of torch's schema: as torch's own, but many times as fast, for it looks at each class once."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # always with None
        inner = _reader(arguments[0])
        return lambda data: None if data is None else inner(data)
    if origin in (list, dict):
        inner = _reader(arguments[-1])
        if origin is list:
            return lambda data: [inner(item) for item in data]
        return lambda data: {key: inner(item) for key, item in data.items()}
    if not hasattr(kind, "__dataclass_fields__"):
        return float if kind is float else lambda data: data
    make = kind.create if hasattr(kind, "create") else kind  # one of several, named by its only key; or a record
    readers: dict[str, Callable[[Any], Any]] = {}  # filled at first use: the classes hold each other

    def read(data: dict[str, Any]) -> Any:
        if not readers:
            readers.update((key, _reader(hint)) for key, hint in get_type_hints(kind, globalns=vars(schema)).items())
        return make(**{key: readers[key](item) for key, item in data.items() if key in readers})

    return read


def _arranged(stored: fx.Graph, custom: dict[str, Any], attributes: dict[str, str]) -> fx.Graph:
    """The nodes that were stored, in their order: torch's reader adds a getitem for each unused part of a tuple."""
    named = {node.name: node for node in stored.nodes}
    reader = serde.GraphModuleDeserializer()
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for name in custom["order"]:
        node = named[name]
        if name in attributes:
            copies[node] = graph.create_node("get_attr", attributes[name], name=name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        own = reader.deserialize_metadata(_place(custom["placeholders"].get(name, {})))
        value = {"val": node.meta.get("val")} if node.op in ("placeholder", "call_function") else {}
        copies[node].meta = value | {key: node.meta[key] for key in PLACE_META if node.meta.get(key)} | own
    return graph
