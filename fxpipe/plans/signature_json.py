"""The calling convention of a program as JSON, and back."""

import json
from typing import Any

import torch.utils._pytree as pytree

from fxpipe.errors import PlanError
from fxpipe.ir.program import Signature

CONSTANTS = (bool, int, float, str, type(None))


def signature_to_data(signature: Signature) -> dict[str, Any]:
    """JSON's types only.

    Raises:
        PlanError: a constant input, or a container among the inputs, has no spelling in JSON; names it.
    """
    for position, value in signature.constants:
        if type(value) not in CONSTANTS:
            raise PlanError(
                f"input leaf {position} is the constant {value!r}, a {type(value).__name__}, which cannot be stored in a plan; "
                "let it be part of the model, or give a number or a text"
            )
    return {
        "inputs": list(signature.inputs),
        "paths": list(signature.paths),
        "constants": [list(pair) for pair in signature.constants],
        "in_spec": _spec_to_text(signature.in_spec),
        "out_spec": _spec_to_text(signature.out_spec),
        "n_outputs": signature.n_outputs,
        "loss_index": signature.loss_index,
        "sizes": dict(signature.sizes),
    }


def signature_from_data(data: dict[str, Any]) -> Signature:
    """The inverse of ``signature_to_data``; raises PlanError for a container that is not one of the inputs' kinds."""
    specs = {name: _spec_from_text(data[name]) for name in ("in_spec", "out_spec")}
    sequences = {"inputs": tuple(data["inputs"]), "paths": tuple(data["paths"])}
    return Signature(**{**data, **sequences, **specs, "constants": tuple((i, value) for i, value in data["constants"])})


def _spec_to_text(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        _check_spec(json.loads(text)[1])
    except (NotImplementedError, TypeError, AttributeError) as e:
        raise PlanError(
            f"the inputs or outputs of the model hold a container that cannot be stored in a plan: {e}"
        ) from e
    return text


def _spec_from_text(text: str) -> pytree.TreeSpec:
    _check_spec(json.loads(text)[1])
    spec: pytree.TreeSpec = pytree.treespec_loads(text)
    return spec


def _check_spec(spec: dict[str, Any]) -> None:
    """Refuses the two for which torch's reader imports a module that the text names: defaultdict and keys that are enums."""
    if spec["type"] == "collections.defaultdict" or "__enum__" in str(spec["context"]):
        raise PlanError(
            f"the inputs or outputs of the model hold a {spec['type']} with context {str(spec['context'])[:60]}, which cannot "
            "be stored in a plan; use dicts with text as keys"
        )
    for child in spec["children_spec"]:
        _check_spec(child)
