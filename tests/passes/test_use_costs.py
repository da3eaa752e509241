"""use-costs: costs of this graph are taken over as they are, costs of another are refused."""

import dataclasses

import pytest
from stages import traced

from fxpipe.errors import PlanError
from fxpipe.ir.cost import CostTable
from fxpipe.pass_manager import Pipeline
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.use_costs import UseCosts
from fxpipe.pipeline import Options, default_pipeline

MODELLED = AnnotateCosts().run(traced("mlp")).fact(CostTable)
MEASURED = dataclasses.replace(MODELLED, source="measured")


def test_the_costs_are_taken_over():
    before = traced("mlp")
    after = UseCosts(MEASURED).run(before)
    assert after.fact(CostTable) is MEASURED
    assert after.graph_module is before.graph_module
    assert str(UseCosts(MEASURED)) == "use-costs"
    assert Pipeline((UseCosts(MEASURED),)).run(before).log[0].text == "use-costs"


def test_more_rows_than_nodes_are_no_harm():
    row = dataclasses.replace(MEASURED.nodes[0], name="of_a_node_that_was_dead")
    table = dataclasses.replace(MEASURED, nodes=(*MEASURED.nodes, row))
    assert UseCosts(table).run(traced("mlp")).fact(CostTable) is table


def test_costs_of_another_graph():
    table = dataclasses.replace(MEASURED, nodes=MEASURED.nodes[:2])
    missing = [n.name for n in traced("mlp").graph.nodes if n.op == "call_function"][2:]
    with pytest.raises(PlanError) as caught:
        UseCosts(table).run(traced("mlp"))
    assert str(caught.value) == (
        f"the profile has no row for node {missing[0]!r} and {len(missing) - 1} more; it is of another graph, measure again"
    )
    with pytest.raises(PlanError, match="it is of another graph"):
        UseCosts().run(traced("mlp"))


def test_in_the_default_pipeline_they_replace_the_model():
    names = [p.name for p in default_pipeline(Options(), costs=MEASURED).passes]
    assert names[2] == "use-costs"
    assert "annotate-costs" not in names
