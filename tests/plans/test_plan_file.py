import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from models import build
from torch import nn

import fxpipe
from fxpipe import printing
from fxpipe.errors import PlanError
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.plans import plan_folder

SIZES = {"mlp": {}, "cnn": {}, "gpt": {"n_layers": 2, "width": 32, "length": 16, "vocabulary": 64}}
FORMATS = {"mlp": None, "cnn": "bfp8b32", "gpt": "bfp4b32"}


def fresh(name):
    return build(name, **SIZES[name])


@cache
def plan_of(name):
    model, args, kwargs = fresh(name)
    options = fxpipe.Options(n_ranks=2, n_microbatches=2, format=FORMATS[name], min_bytes=256)
    return fxpipe.compile(model, (args, kwargs), options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved plan of the MLP, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("saved") / "plan"
    plan_of("mlp").save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "plan")


def load(folder, model=None):
    return fxpipe.load(folder, fresh("mlp")[0] if model is None else model)


def signed(folder, name, content):
    """The plan with other content in one file, and a manifest that agrees with it."""
    files = plan_folder.read_folder(folder)
    plan_folder.write_folder(folder, {**files, name: content})


def edited(folder, name, change):
    """The same with the file's JSON changed in place by ``change``."""
    data = json.loads((folder / name).read_text())
    change(data)
    signed(folder, name, json.dumps(data).encode())


def step(plan, args, kwargs):
    torch.manual_seed(0)
    loss = plan.pipe().step(*args, **kwargs)
    grads = {n: p.grad for n, p in plan.model.named_parameters()}
    return {"loss": loss, **grads, **{n: b.clone() for n, b in plan.model.named_buffers()}}


@pytest.mark.parametrize("name", SIZES)
def test_a_loaded_plan_trains_bitwise_like_the_saved_one(name, tmp_path):
    plan_of(name).save(tmp_path / "plan")
    model, args, kwargs = fresh(name)
    found = step(fxpipe.load(tmp_path / "plan", model), args, kwargs)
    model, args, kwargs = fresh(name)
    expected = step(replace(plan_of(name), model=model), args, kwargs)
    assert found.keys() == expected.keys()
    assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == []
    assert torch.isfinite(expected["loss"])


@pytest.mark.parametrize("name", SIZES)
def test_a_loaded_plan_is_the_saved_one(name, tmp_path):
    plan = plan_of(name)
    plan.save(tmp_path / "plan")
    loaded = fxpipe.load(tmp_path / "plan", plan.model)
    assert str(loaded) == str(plan)
    assert loaded.to_dict() == plan.to_dict()
    assert (loaded.options, loaded.microbatches, loaded.digest) == (plan.options, plan.microbatches, plan.digest)
    assert (loaded.program.signature, loaded.program.log) == (plan.program.signature, plan.program.log)
    assert printing.listing(loaded.program.graph) == printing.listing(plan.program.graph)
    for kind, fact in plan.program.facts.items():
        assert kind is LoweredStages or loaded.program.fact(kind) == fact


def test_a_plan_with_replicas_comes_back(tmp_path):
    model, args, kwargs = fresh("mlp")
    plan = fxpipe.compile(model, (args, kwargs), fxpipe.Options(n_ranks=3, replicas=(2, 1), n_microbatches=2))
    plan.save(tmp_path / "plan")
    loaded = fxpipe.load(tmp_path / "plan", model)
    assert str(loaded) == str(plan)
    assert loaded.spec().shared_ranks() == plan.spec().shared_ranks() != {}
    assert set(loaded.spec().shared_ranks().values()) == {(0, 1)}


@pytest.mark.parametrize("name", SIZES)
def test_the_graphs_come_back_node_by_node(name, tmp_path):
    plan = plan_of(name)
    plan.save(tmp_path / "plan")
    loaded = fxpipe.load(tmp_path / "plan", plan.model)
    for before, after in zip(plan.stages.stages, loaded.stages.stages, strict=True):
        for half in ("forward", "backward"):
            old, new = getattr(before, half), getattr(after, half)
            assert (new.inputs, new.outputs) == (old.inputs, old.outputs)
            assert new.graph_module.code == old.graph_module.code
            assert printing.listing(new.graph_module.graph) == printing.listing(old.graph_module.graph)
        for field in ("received", "inputs", "outputs", "output_needs_grad", "received_needs_grad"):
            assert getattr(after, field) == getattr(before, field)
        assert [printing.type_of(x) for x in after.example_outputs] == [
            printing.type_of(x) for x in before.example_outputs
        ]
        module = f"stage_{before.index}"
        old, new = (p.program.graph_module.get_submodule(module).graph for p in (plan, loaded))
        assert printing.listing(new) == printing.listing(old)


def test_parameters_are_the_models_own_and_none_is_stored(tmp_path):
    model, args, _ = fresh("mlp")
    with torch.no_grad():
        model.head.bias.fill_(0.123456789)
    plan = fxpipe.compile(model, args)
    plan.save(tmp_path / "plan")
    loaded = fxpipe.load(tmp_path / "plan", model)
    assert loaded.program.graph_module.get_submodule("stage_0").head.bias is model.head.bias
    assert sorted(str(f.relative_to(tmp_path / "plan")) for f in (tmp_path / "plan").rglob("*.*")) == [
        "constants.json",
        "costs.json",
        "graphs/inputs.json",
        "graphs/stage_0.backward.json",
        "graphs/stage_0.forward.json",
        "graphs/stage_0.json",
        "manifest.json",
        "plan.json",
    ]
    assert json.loads((tmp_path / "plan" / "constants.json").read_text()) == {}


def test_constants_of_the_program_are_stored(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return (self.linear(x) * torch.tensor([1.0, -0.0, float("inf"), 1e-45]).nan_to_num(posinf=2.0)).sum()

    model = Scaled()
    plan = fxpipe.compile(model, torch.ones(2, 4))
    plan.save(tmp_path / "plan")
    loaded = fxpipe.load(tmp_path / "plan", model)
    assert plan.constants
    for name, value in plan.constants.items():
        assert torch.equal(value.view(torch.int32), loaded.constants[name].view(torch.int32))
    assert torch.equal(loaded.pipe().step(torch.ones(2, 4)), plan.pipe().step(torch.ones(2, 4)))


def test_saving_again_replaces_the_plan_and_leaves_nothing_beside(folder):
    plan_of("cnn").save(folder)
    assert str(fxpipe.load(folder, plan_of("cnn").model)) == str(plan_of("cnn"))
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_the_old_plan(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(plan_folder, "_take_place", fail)
    with pytest.raises(PlanError, match=r"the plan cannot be written to .*: disk full"):
        plan_of("cnn").save(folder)
    assert str(load(folder)) == str(plan_of("mlp"))
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_other_peoples_folders_and_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(PlanError, match="a folder with something else than a plan in it"):
        plan_of("mlp").save(tmp_path)
    with pytest.raises(PlanError, match="is a file; a plan is a folder"):
        plan_of("mlp").save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "chapter 1"


FILES = (
    "plan.json",
    "costs.json",
    "constants.json",
    "graphs/inputs.json",
    "graphs/stage_1.json",
    "graphs/stage_0.backward.json",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_altered_or_missing_is_named(folder, name):
    content = (folder / name).read_bytes()
    for damage, message in (
        (content[:-1], rf"{name}: the file was cut short: {len(content) - 1} bytes, expected {len(content)}"),
        (b"", rf"{name}: the file was cut short: 0 bytes"),
        (content[:-2] + b" }", rf"{name}: the file was altered since it was saved"),
        (content + b" ", rf"{name}: the file was altered since it was saved"),
    ):
        (folder / name).write_bytes(damage)
        with pytest.raises(PlanError, match=message):
            load(folder)
    (folder / name).unlink()
    with pytest.raises(PlanError, match=rf"{name}: the file is missing; copy the whole folder, or make the plan again"):
        load(folder)


def test_a_manifest_cut_short_or_missing_is_named(folder):
    content = (folder / "manifest.json").read_bytes()
    for damage in (content[: len(content) // 2], b"", b"[]", b"{}"):
        (folder / "manifest.json").write_bytes(damage)
        with pytest.raises(PlanError, match=r"manifest.json: the file was cut short or altered"):
            load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(PlanError, match=r"manifest.json: the file is missing"):
        load(folder)
    with pytest.raises(PlanError, match=r"there is nothing; expected the folder that Plan.save wrote"):
        load(folder / "none")
    with pytest.raises(PlanError, match="there is a file; expected the folder"):
        load(folder / "plan.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "format_version",
            2,
            r"the plan has format version 2, written by fxpipe 9.9; this is fxpipe .*, which reads version 1",
        ),
        ("torch", "2.12.1+cpu", r"the plan was made with torch 2.12.1\+cpu, this is torch 2.13"),
        ("kind", "recipe", r"not the manifest of a plan, its kind is 'recipe'"),
        ("files", {"../plan.json": {}}, "not the manifest of a plan"),
        ("files", {"/etc/hosts": {}}, "not the manifest of a plan"),
        ("files", {"plan.json": {}}, "plan.json: the file cannot be read"),
        ("files", {}, r"plan.json: not what fxpipe writes \(KeyError: 'plan.json'\)"),
    ],
)
def test_a_plan_of_another_version_or_kind_is_refused(folder, key, value, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "fxpipe": "9.9", key: value}))
    with pytest.raises(PlanError, match=message):
        load(folder)


def remove_parameter(model):
    model.head.bias = None


def share_parameter(model):
    model.layers[1][0].weight = model.layers[0][0].weight


def freeze(model):
    model.head.requires_grad_(False)


def add_buffer(model):
    model.register_buffer("seen", torch.zeros(1))


def replace_module(model):
    model.layers[0][1] = nn.GELU()


def replace_code(model):
    class Mlp(type(model)):
        def forward(self, x, target):
            return super().forward(2 * x, target)

    Mlp.__qualname__ = type(model).__qualname__
    model.__class__ = Mlp


@pytest.mark.parametrize(
    ("change", "aspect"),
    [
        (remove_parameter, "parameters"),
        (share_parameter, "parameters"),
        (freeze, "parameters"),
        (add_buffer, "buffers"),
        (replace_module, "structure"),
        (nn.Module.eval, "structure"),
        (replace_code, "code"),
    ],
)
def test_a_model_that_changed_is_refused_and_the_change_named(saved, change, aspect):
    model = fresh("mlp")[0]
    change(model)
    with pytest.raises(
        PlanError, match=rf"the model is not the one that the plan was made for: Mlp differs in its .*{aspect} \("
    ):
        load(saved, model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plan.json", lambda d: d["options"].pop("n_ranks"), "options: field 'n_ranks' of Options is missing"),
        ("plan.json", lambda d: d["options"].update(speed=1), "options: field 'speed' of Options is unknown"),
        ("plan.json", lambda d: d["options"].update(n_ranks="2"), "options.n_ranks is '2'; expected int"),
        (
            "plan.json",
            lambda d: d["partition"]["stages"][1].update(nodes="x"),
            r"partition.stages\[1\].nodes is 'x'; expected tuple",
        ),
        ("plan.json", lambda d: d["partition"].update(stages=None), "partition.stages is None; expected tuple"),
        ("plan.json", lambda d: d["compression"].update(save_points=[7]), r"save_points\[0\] is 7; expected an object"),
        ("plan.json", lambda d: d["schedule"]["programs"][0].append("0X0"), "plan.json: .*not an action: '0X0'"),
        (
            "plan.json",
            lambda d: d["stages"][0]["forward"]["inputs"].append("input 9"),
            "plan.json: .* placeholders but",
        ),
        (
            "plan.json",
            lambda d: d["stages"][0]["forward"]["inputs"].__setitem__(0, "wish W"),
            "unknown kind of binding 'wish'",
        ),
        (
            "plan.json",
            lambda d: d["stages"][0].update(index=5),
            r"plan.json: not what fxpipe writes \(KeyError: 'stage_5'\)",
        ),
        ("plan.json", lambda d: d["chain"]["calls"].reverse(), "plan.json: not what fxpipe writes"),
        ("costs.json", lambda d: d.pop("device"), "costs.json: not a cost table: no 'device'"),
        (
            "constants.json",
            lambda d: d.update(c={"dtype": "float99", "shape": [1], "device": "cpu", "data": ""}),
            "dtype 'float99'",
        ),
        (
            "constants.json",
            lambda d: d.update(c={"dtype": "int16", "shape": [2], "device": "cpu", "data": "AAA="}),
            "constants.json: constant 'c' has 2 bytes; expected 4 for int16",
        ),
        ("graphs/stage_0.json", lambda d: d.pop("graph_module"), "stage_0.json: not a graph that fxpipe wrote"),
        (
            "graphs/stage_0.json",
            lambda d: d["graph_module"]["graph"]["nodes"].pop(),
            "stage_0.json: not a graph that fxpipe wrote",
        ),
    ],
)
def test_content_that_fxpipe_did_not_write_is_refused(folder, name, change, message):
    edited(folder, name, change)
    with pytest.raises(PlanError, match=message):
        load(folder)


def test_containers_for_which_a_module_would_be_imported_are_refused(folder):
    spec = {
        "type": "collections.defaultdict",
        "context": {"default_factory_module": "antigravity"},
        "children_spec": [],
    }
    edited(folder, "plan.json", lambda d: d["signature"].update(in_spec=json.dumps([1, spec])))
    with pytest.raises(PlanError, match=r"plan.json: .* hold a collections.defaultdict"):
        load(folder)
    spec = {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "antigravity:X"}]', "children_spec": []}
    edited(folder, "plan.json", lambda d: d["signature"].update(in_spec=json.dumps([1, spec])))
    with pytest.raises(PlanError, match=r"plan.json: .* hold a builtins.dict with context .*__enum__"):
        load(folder)


def test_plan_dict_has_what_the_command_line_promises():
    plan = plan_of("gpt")
    data = json.loads(json.dumps(plan.to_dict()))
    assert {"nodes", "forward_seconds", "backward_seconds", "parameter_bytes"} <= data["stages"][0].keys()
    assert data["bottleneck_seconds"] >= data["lower_bound_seconds"] > 0
    assert data["schedule"] == [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]
    assert {"name", "raw_bytes", "stored_bytes", "format"} <= data["save_points"][0].keys()
    assert data["stored_bytes"] == sum(point["stored_bytes"] for point in data["save_points"])
    assert data["predicted"]["step_seconds"] > 0
    assert len(data["predicted"]["peak_bytes"]) == data["n_ranks"] == 2
    assert [tied["name"] for tied in data["tied"]] == [tied.name for tied in plan.partition.tied]
