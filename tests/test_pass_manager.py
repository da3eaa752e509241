"""Pipeline: requires and provides, copies, the log, dumps; and verify_program, which it runs after every pass."""

import dataclasses
import gc
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from stages import inputs_of, traced

from fxpipe.errors import VerifyError
from fxpipe.graph_module import copy_graph_module
from fxpipe.ir.program import Program, Signature
from fxpipe.pass_base import Pass
from fxpipe.pass_manager import Dump, Pipeline, summary
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.printing import listing, program_listing
from fxpipe.verify import around, verify_program

aten = torch.ops.aten


@dataclass(frozen=True)
class Count:
    """A fact."""

    nodes: int


@dataclass(frozen=True)
class CountNodes(Pass):
    name: ClassVar[str] = "count-nodes"
    provides: ClassVar[tuple[type, ...]] = (Count,)
    forget: bool = False

    def run(self, program):
        return program if self.forget else program.with_facts(Count(len(program.graph.nodes)))


@dataclass(frozen=True)
class UseCount(Pass):
    name: ClassVar[str] = "use-count"
    requires: ClassVar[tuple[type, ...]] = (Count,)

    def run(self, program):
        program.fact(Count)
        return program


@dataclass(frozen=True)
class Edit(Pass):
    """Edits the graph as the test says."""

    name: ClassVar[str] = "edit"
    how: object = dataclasses.field(default=None, repr=False)

    def run(self, program):
        self.how(program)
        return program.with_graph(program.graph_module)


def first(program, op="call_function"):
    return next(n for n in program.graph.nodes if n.op == op)


def text_of(program):
    return listing(program.graph)


def test_a_pass_that_lacks_what_it_requires_is_refused_before_anything_runs():
    with pytest.raises(VerifyError, match=r"^use-count requires Count, which no pass before it provides$"):
        Pipeline((UseCount(), CountNodes()))
    Pipeline((CountNodes(), UseCount()))


def test_a_pass_that_leaves_nothing_is_refused():
    with pytest.raises(VerifyError, match=r"^count-nodes provides Count but left none$"):
        Pipeline((CountNodes(forget=True),)).run(traced("mlp"))


@dataclass(frozen=True)
class Decide(Pass):
    """Says that it edits nothing."""

    name: ClassVar[str] = "decide"
    rewrites: ClassVar[bool] = False
    lies: bool = False

    def run(self, program):
        return program.with_graph(copy_graph_module(program.graph_module)) if self.lies else program


def test_a_pass_that_only_decides_gets_no_copy_and_may_leave_no_other_graph():
    program = traced("mlp")
    assert Pipeline((Decide(),)).run(program).graph_module is program.graph_module
    with pytest.raises(VerifyError, match=r"^decide says that it rewrites nothing, but left another graph$"):
        Pipeline((Decide(lies=True),)).run(program)


def test_the_passes_that_only_decide_leave_the_graph_as_it_was():
    steps = default_pipeline(Options(n_ranks=2, n_microbatches=2, format="bfp4b32"))
    deciding = []

    def look(step, before, after):
        if not step.rewrites:
            deciding.append(step.name)
            assert program_listing(after) == seen[-1], step.name
        seen.append(program_listing(after))

    program = traced("mlp")
    seen = [program_listing(program)]
    Pipeline(steps.passes, observers=(look,)).run(program)
    assert deciding == ["annotate-costs", "partition-stages", "schedule-stages", "choose-save-points"]


def test_a_rewrite_drops_the_facts_that_it_does_not_preserve():
    pipeline = Pipeline((CountNodes(), Edit(how=lambda program: None), UseCount()))
    with pytest.raises(
        VerifyError, match="the program has no Count; known facts: none; run the pass that provides it first"
    ):
        pipeline.run(traced("mlp"))


def test_facts_are_named_in_the_message():
    program = traced("mlp").with_facts(Count(1), 2)
    with pytest.raises(VerifyError, match="has no str; known facts: Count, int;"):
        program.fact(str)
    kept = program.with_graph(program.graph_module, preserves=(Count,))
    assert set(kept.facts) == {Count}
    assert set(program.with_facts(Count(5)).facts) == {Count, int}
    assert program.with_facts(Count(5)).fact(Count) == Count(5)
    assert program.fact(Count) == Count(1)


def test_the_given_program_is_not_changed():
    program = traced("mlp")
    before = text_of(program)
    metas = [dict(n.meta) for n in program.graph.nodes]

    def spoil(changed):
        node = next(n for n in changed.graph.nodes if n.target is aten.relu.default)
        node.target = aten.sigmoid.default
        for each in changed.graph.nodes:
            each.meta["touched"] = True
        changed.graph_module.recompile()

    after = Pipeline((Edit(how=spoil),)).run(program)
    assert text_of(program) == before != text_of(after)
    assert [dict(n.meta) for n in program.graph.nodes] == metas
    assert program.log == ()
    assert not torch.equal(after.graph_module(*inputs_of("mlp"))[0], program.graph_module(*inputs_of("mlp"))[0])
    own = dict(program.graph_module.named_parameters())
    assert all(p is own[n] for n, p in after.graph_module.named_parameters())


def test_a_copy_keeps_the_mode():
    program = traced("mlp")
    assert program.graph_module.training
    assert Pipeline((CountNodes(),)).run(program).graph_module.training


def test_the_log_says_what_ran():
    program = Pipeline((CountNodes(), UseCount())).run(traced("mlp"))
    n_nodes = len(program.graph.nodes)
    assert [(r.text, r.n_nodes) for r in program.log] == [("count-nodes", n_nodes), ("use-count", n_nodes)]
    assert all(0 < r.seconds < 60 for r in program.log)
    assert summary(program) == [(r.text, r.seconds, r.n_nodes) for r in program.log]
    longer = Pipeline((CountNodes(),)).run(program)
    assert longer.log[:2] == program.log
    assert len(longer.log) == 3


def test_observers_see_before_and_after():
    seen = []
    passes = (CountNodes(), UseCount())
    end = Pipeline(passes, (lambda *arguments: seen.append(arguments),)).run(start := traced("mlp"))
    assert [step for step, _, _ in seen] == list(passes)
    assert [before.log for _, before, _ in seen] == [(), end.log[:1]]
    assert seen[0][1] is start
    assert seen[1][2] is end


def test_dumps(tmp_path):
    folder = tmp_path / "made" / "here"
    program = traced("mlp")

    def drop_name(changed):
        first(changed)._rename("renamed")

    Pipeline((CountNodes(), Edit(how=drop_name)), (Dump(folder, text_of),)).run(program)
    names = ["01-count-nodes.after.txt", "01-count-nodes.before.txt", "02-edit.after.txt", "02-edit.before.txt"]
    assert sorted(f.name for f in folder.iterdir()) == names
    texts = [(folder / n).read_text() for n in names]
    assert texts[0] == texts[1] == texts[3] == text_of(program) + "\n"
    assert "renamed" in texts[2]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            Pipeline((Edit(how=lambda program: 1 / 0),)).run(traced("mlp"))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def without_shape(program):
    del next(n for n in program.graph.nodes if n.target is aten.relu.default).meta["val"]


def called_method(program):
    node = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    with program.graph.inserting_before(node):
        program.graph.call_method("relu", (node.args[0],))


def out_of_order(program):
    relus = [n for n in program.graph.nodes if n.target is aten.relu.default]
    relus[0].replace_input_with(relus[0].args[0], relus[1])


def renamed_input(program):
    first(program, "placeholder")._rename("other")


def two_outputs(program):
    program.graph.output_node().args = (program.graph.output_node().args[0] * 2,)


def one_value(program):
    program.graph.output_node().args = (program.graph.output_node().args[0][0],)


BREAKS = [
    (without_shape, r"after edit: node relu has no shape \(meta\['val'\]\)\n"),
    (called_method, r"after edit: node relu_6 is a call_method, which a program may not hold\n"),
    (out_of_order, r"after edit: the graph is not well formed: .*relu"),
    (renamed_input, r"after edit: placeholders are \('other', 'args_1'\), the signature says \('args_0', 'args_1'\)"),
    (two_outputs, r"after edit: the graph returns .*, the signature says 1 outputs"),
    (one_value, r"after edit: the graph returns cross_entropy_loss, the signature says 1 outputs"),
]


@pytest.mark.parametrize(("how", "message"), BREAKS, ids=[h.__name__ for h, _ in BREAKS])
def test_a_broken_graph_is_found(how, message):
    with pytest.raises(VerifyError, match=message):
        Pipeline((Edit(how=how),)).run(traced("mlp"))


def test_the_graph_is_drawn_around_the_fault():
    with pytest.raises(VerifyError) as caught:
        Pipeline((Edit(how=without_shape),)).run(traced("mlp"))
    drawn = str(caught.value).splitlines()[1:]
    assert [line[0] for line in drawn] == [" ", " ", ">", " ", " "]
    assert drawn[2].startswith("> %relu : ")
    assert "%linear : " in drawn[1]
    assert "%linear_1 : " in drawn[3]


def test_the_drawing_stops_at_the_ends_of_the_graph():
    nodes = list(traced("mlp").graph.nodes)
    assert around(nodes[0]).splitlines()[0].startswith("> ")
    assert len(around(nodes[0]).splitlines()) == 3
    assert around(nodes[-1], radius=1).splitlines()[-1].startswith("> ")


def test_the_input_of_the_pipeline_is_checked_too():
    program = traced("mlp")
    broken = dataclasses.replace(program, signature=dataclasses.replace(program.signature, n_outputs=2))
    with pytest.raises(VerifyError, match="after the pipeline's input: the graph returns"):
        Pipeline(()).run(broken)
    verify_program(program, "nothing")


def test_a_signature_checks_itself():
    given = vars(traced("mlp").signature)
    with pytest.raises(VerifyError, match="signature has 1 inputs but 2 paths"):
        Signature(**{**given, "inputs": ("x",)})
    for index in (-1, 1):
        with pytest.raises(VerifyError, match=f"loss index {index} is outside the 1 outputs"):
            Signature(**{**given, "loss_index": index})
    assert isinstance(traced("mlp"), Program)
