import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export

from fxpipe import printing


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

    def forward(self, x):
        hidden = self.layers(x)
        values, indices = hidden.max(dim=-1)
        return torch.cat([values, values]).neg(), indices


def small_graph(batch: int = 2, **options) -> fx.Graph:
    return export(Small(), (torch.zeros(batch, 3),), **options).module(check_guards=False).graph


def test_listing_shows_name_type_operator_and_place():
    assert printing.listing(small_graph()).splitlines() == [
        "layers_0_weight: f32[4, 3] = get_attr[layers.0.weight]",
        "layers_0_bias: f32[4] = get_attr[layers.0.bias]",
        "x: f32[2, 3] = placeholder",
        "linear: f32[2, 4] = aten.linear(x, layers_0_weight, layers_0_bias)  # layers.0",
        "relu: f32[2, 4] = aten.relu(linear)  # layers.1",
        "max_1: (f32[2], i64[2]) = aten.max.dim(relu, -1)",
        "getitem: f32[2] = max_1[0]",
        "getitem_1: i64[2] = max_1[1]",
        "cat: f32[4] = aten.cat([getitem, getitem])",
        "neg: f32[4] = aten.neg(cat)",
        "return (neg, getitem_1)",
    ]


def test_dynamic_sizes_stay_symbols():
    lines = printing.listing(small_graph(dynamic_shapes={"x": {0: Dim("batch")}})).splitlines()
    symbol = next(line for line in lines if line.startswith("x: "))[len("x: f32[") :].split(",")[0]
    assert symbol.startswith("s")
    assert f"relu: f32[{symbol}, 4] = aten.relu(linear)  # layers.1" in lines
    assert f"cat: f32[2*{symbol}] = aten.cat([getitem, getitem])" in lines


def test_equal_graphs_have_equal_listings_and_no_difference():
    first, second = printing.listing(small_graph()), printing.listing(small_graph())
    assert first == second
    assert printing.diff(first, second) == ""


def test_diff_shows_the_changed_lines():
    graph = small_graph()
    before = printing.listing(graph)
    relu = next(node for node in graph.nodes if node.name == "relu")
    relu.target = torch.ops.aten.sigmoid.default
    assert printing.diff(before, printing.listing(graph), ("traced", "edited")).splitlines() == [
        "--- traced",
        "+++ edited",
        "@@ -2,7 +2,7 @@",
        " layers_0_bias: f32[4] = get_attr[layers.0.bias]",
        " x: f32[2, 3] = placeholder",
        " linear: f32[2, 4] = aten.linear(x, layers_0_weight, layers_0_bias)  # layers.0",
        "-relu: f32[2, 4] = aten.relu(linear)  # layers.1",
        "+relu: f32[2, 4] = aten.sigmoid(linear)  # layers.1",
        " max_1: (f32[2], i64[2]) = aten.max.dim(relu, -1)",
        " getitem: f32[2] = max_1[0]",
        " getitem_1: i64[2] = max_1[1]",
    ]


def test_arguments_of_every_kind():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(
        torch.ops.aten.full.default, ([2, x], 1.5), {"dtype": torch.bool, "device": torch.device("cpu"), "layout": None}
    )
    graph.call_function(torch.ops.aten.pad.default, (x, (1,), "constant"))
    assert printing.listing(graph).splitlines()[1:] == [
        "full_default = aten.full([2, x], 1.5, dtype=b8, device=cpu, layout=None)",
        "pad_default = aten.pad(x, (1,), 'constant')",
    ]


def test_table_leans_quantities_right_and_leaves_none_empty():
    assert printing.table([["a", 1, 2.5, "1.50 KiB"], ["bb", 10, None, "120 B"]], ["x", "y", "z", "bytes"]) == (
        "x      y    z     bytes\n"
        "---  ---  ---  --------\n"
        "a      1  2.5  1.50 KiB\n"
        "bb    10          120 B"
    )  # fmt: skip


@pytest.mark.parametrize("text", ["1.50", "1e3", "0x10", "nan"])
def test_table_leaves_texts_that_look_like_numbers_alone(text):
    assert printing.table([[text]], ["value"]).splitlines()[2].strip() == text


def test_empty_table_keeps_its_headers():
    assert printing.table([], ["a", "b"]).splitlines()[0].split() == ["a", "b"]
