import json
from pathlib import Path

import pytest

from fxpipe.cli import main, parser


def test_what_is_not_asked_is_left_to_the_options():
    assert vars(parser().parse_args(["plan", "demo:gpt"])) == {
        "command": "plan",
        "model": "demo:gpt",
        "measured": False,
        "profile": None,
        "json": False,
        "dump": None,
        "save": None,
        "at": [],
        "topology": None,
        "sweep": False,
        "explain": None,
    }


def test_every_option_is_read():
    line = (
        "run file.py:build --ranks 4 --microbatches 16 --format bfp4b32 --device H100 --schedule gpipe "
        "--bandwidth 12GB/s --memory 12GiB --profile times.json --dump out --steps 3 --json"
    )
    arguments = parser().parse_args(line.split())
    assert (arguments.n_ranks, arguments.n_microbatches, arguments.steps) == (4, 16, 3)
    assert (arguments.format, arguments.device, arguments.schedule) == ("bfp4b32", "H100", "gpipe")
    assert (arguments.bandwidth, arguments.memory) == ("12GB/s", "12GiB")
    assert (arguments.profile, arguments.dump, arguments.json) == (Path("times.json"), Path("out"), True)


def test_dynamic_dimensions_are_gathered_by_input():
    arguments = parser().parse_args("show demo:gpt --dynamic input_ids:0,1 --dynamic labels:0".split())
    assert arguments.dynamic == [("input_ids", [0, 1]), ("labels", [0])]


def test_sizes_are_read():
    line = "plan demo:gpt --topology 4@1GB/s --at batch=16 --at input_ids:1=256"
    assert parser().parse_args(line.split()).at == [("batch", 0, 16), ("input_ids", 1, 256)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan demo:gpt --at length=16", "argument --at: 'length=16' is not a size of the inputs, such as batch=16 or"),
        ("plan demo:gpt --at batch=0", "argument --at: 'batch=0' is not a size of the inputs"),
        ("plan demo:gpt --ranks 0", "argument --ranks: '0' is not a number of 1 or more"),
        ("plan demo:gpt --ranks two", "argument --ranks: 'two' is not a number of 1 or more"),
        (
            "plan demo:gpt --memory 12Gb",
            "argument --memory: '12Gb' is not a number of bytes; write a number and one of",
        ),
        ("plan demo:gpt --bandwidth 12GB", "argument --bandwidth: '12GB' is not a bandwidth"),
        (
            "show demo:gpt --dynamic 0",
            "argument --dynamic: '0' is not an input with its dimensions, such as input_ids:0",
        ),
        ("plan demo:gpt --rank 2 --nonsense", "unrecognized arguments: --nonsense"),
        ("plan", "the following arguments are required: MODEL"),
        ("draw demo:gpt", "invalid choice: 'draw'"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failure_is_one_line_and_an_exit_code(capsys):
    assert main(["show", "demo:resnet"]) == 2
    assert capsys.readouterr().err.startswith("fxpipe show: unknown demo 'resnet'; known: bert")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("flops", 0, ""),
        ("flops", 2000, "2.00 KFLOP"),
        ("saved_bytes", 2048, "2.00 KiB"),
        ("forward_seconds", 0.5, "500 ms"),
    ],
)
def test_costs_have_units(field, value, text):
    from fxpipe.commands import _quantity

    assert _quantity(field, value) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan demo:mlp --at batch=8", "a plan that runs is made for its example inputs; give --at with --topology"),
        ("show demo:mlp --at batch=8 --measured", "measured times hold for the example's sizes alone"),
        ("show demo:mlp --at batch=8 --dynamic 0:0", "--dynamic leaves sizes open and --at gives them; leave one out"),
        ("plan demo:mlp --topology 2@1GB/s --at nope:0=8", "unknown input 'nope'; known: 0, 1, batch"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(line, message, capsys):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_plan_for_another_batch_is_of_that_batch(capsys):
    main(["plan", "demo:mlp", "--topology", "1@1GB/s", "--json", "--at", "batch=256"])
    larger = json.loads(capsys.readouterr().out)
    main(["plan", "demo:mlp", "--topology", "1@1GB/s", "--json"])
    example = json.loads(capsys.readouterr().out)
    assert example["bottleneck_seconds"] < larger["bottleneck_seconds"]
