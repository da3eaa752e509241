import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pytest

from fxpipe.errors import PlanError
from fxpipe.plans.records import record_from


@dataclass(frozen=True)
class Leaf:
    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    first: Leaf
    weight: float
    note: str | None
    sizes: Mapping[str, int]
    good: bool = True


TREE = Tree((Leaf("a", (1, "s0")), Leaf("b", ())), Leaf("c", (2,)), 0.5, None, {"s0": 4})


def data_of(**changes):
    return {**json.loads(json.dumps(asdict(TREE))), **changes}


def test_what_asdict_wrote_is_read_back():
    assert record_from(Tree, data_of(), "tree") == TREE


def test_an_integer_is_read_as_a_float_where_one_is_asked():
    found = record_from(Tree, data_of(weight=2), "tree").weight
    assert (found, type(found)) == (2.0, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (data_of(colour="red"), "tree: field 'colour' of Tree is unknown"),
        ({"leaves": []}, "tree: field 'first' of Tree is missing; found"),
        ([], r"tree is \[\]; expected an object with the fields of Tree"),
        (data_of(leaves={}), r"tree.leaves is {}; expected tuple"),
        (data_of(leaves=[{"name": 1, "shape": []}]), r"tree.leaves\[0\].name is 1; expected str"),
        (data_of(leaves=[{"name": "a", "shape": [1.5]}]), r"tree.leaves\[0\].shape\[0\] is 1.5; expected int or str"),
        (data_of(note=3), "tree.note is 3; expected str or NoneType"),
        (data_of(good=1), "tree.good is 1; expected bool"),
        (data_of(weight=True), "tree.weight is True; expected float"),
        (data_of(sizes={"s0": "4"}), r"tree.sizes\['s0'\] is '4'; expected int"),
        (data_of(note=["x" * 99]), r"tree.note is .{57}\.\.\.; expected"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(PlanError, match=message):
        record_from(Tree, data, "tree")
