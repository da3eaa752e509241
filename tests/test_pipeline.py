"""Options, and the default pipeline that they make."""

import dataclasses

import pytest

from fxpipe.errors import FormatError, OptionError
from fxpipe.pipeline import PASSES, Options, default_pipeline

NAMES = [
    "keep-loss", "canonicalize", "annotate-costs", "partition-stages", "split-stages", "schedule-stages", "lower-stages",
    "choose-save-points", "compress-save-points",
]  # fmt: skip


def test_the_passes_in_order():
    assert [p.name for p in default_pipeline(Options()).passes] == NAMES
    assert all(PASSES[n].name == n for n in NAMES)
    assert [n for n, p in PASSES.items() if not p.exact] == ["compress-save-points"]


def test_the_options_reach_their_passes():
    options = Options(
        n_ranks=3, n_microbatches=6, schedule="gpipe", format="bfp8b64", min_bytes=10, partitioner="default", device="A100",
        bandwidth="1GB/s", memory="2GiB",
    )  # fmt: skip
    texts = [str(p) for p in default_pipeline(options).passes]
    assert texts == [
        "keep-loss",
        "canonicalize",
        "annotate-costs{device=A100}",
        "partition-stages{n_stages=3,bandwidth_bytes_per_second=1000000000.0,memory_bytes=2147483648,n_microbatches=6}",
        "split-stages",
        "schedule-stages{n_microbatches=6,order=gpipe}",
        "lower-stages{partitioner=default}",
        "choose-save-points{format=bfp8b64,min_bytes=10}",
        "compress-save-points",
    ]


def test_replicas_are_kept_as_text():
    options = Options(n_ranks=4, replicas=(2, 1, 1), n_microbatches=2)
    assert options == Options(n_ranks=4, replicas="2,1,1", n_microbatches=2)
    assert (
        "partition-stages{n_stages=3,bandwidth_bytes_per_second=10000000000.0,n_microbatches=2,replicas=2,1,1}"
        in str(default_pipeline(options).passes[3])
    )
    with pytest.raises(OptionError, match="3 ranks of a stage for n_microbatches 2; each needs a microbatch at least"):
        Options(n_ranks=4, replicas=[3, 1], n_microbatches=2)


def test_options_from_a_mapping():
    assert Options.from_mapping({}) == Options()
    assert Options.from_mapping({"n_ranks": 2, "format": "bfp4b32"}) == Options(n_ranks=2, format="bfp4b32")


@pytest.mark.parametrize(("format", "partitioner"), [(None, "min-cut"), ("bfp4b32", "min-bytes")])
def test_values_are_computed_again_for_memory_where_they_are_compressed(format, partitioner):
    (step,) = (s for s in default_pipeline(Options(format=format)).passes if s.name == "lower-stages")
    assert step.partitioner == partitioner


@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_forward_stays_exact_unless_inductor_compiles_it(compiler):
    assert default_pipeline(Options(stage_compiler=compiler)).passes[-1].exact_forward == (compiler == "none")


def test_an_unknown_option_lists_the_known():
    known = ", ".join(sorted(f.name for f in dataclasses.fields(Options)))
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({"n_rank": 2})
    assert str(caught.value) == f"unknown option 'n_rank'; known: {known}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_ranks", 0, "n_ranks is 0; expected an integer of at least 1"),
        ("n_ranks", "2", "n_ranks is '2'; expected an integer of at least 1"),
        ("n_microbatches", -1, "n_microbatches is -1; expected an integer of at least 1"),
        ("n_microbatches", 1.5, "n_microbatches is 1.5; expected an integer of at least 1"),
        ("schedule", "zigzag", "unknown schedule 'zigzag'; known: 1f1b, gpipe"),
        ("format", "bfp4", "bfp4"),
        ("format", "bfp9b32", "bfp9b32"),
        ("min_bytes", -1, "min_bytes is -1; expected at least 0"),
        (
            "partitioner",
            "max-cut",
            "unknown partitioner 'max-cut'; known: auto, default, min-bytes, min-cut, recompute-attention",
        ),
        ("objective", "beauty", "beauty"),
        ("device", "abacus", "unknown device 'abacus'; known: "),
        ("bandwidth", "fast", "fast"),
        ("memory", "much", "much"),
        ("stage_compiler", "gcc", "unknown stage_compiler 'gcc'; known: inductor, none"),
        ("loss_reduction", "max", "unknown loss_reduction 'max'; known: mean, sum"),
        ("replicas", "1,1", "replicas 1,1 are 2 ranks; n_ranks is 1"),
        ("replicas", "half", "replicas are 'half'; expected how many ranks each stage runs on"),
        ("timeout_seconds", 0, "timeout_seconds is 0; expected more than 0"),
        ("timeout_seconds", float("nan"), "timeout_seconds is nan; expected more than 0"),
    ],
)
def test_a_bad_value_is_refused_at_once(name, value, message):
    with pytest.raises(OptionError) as caught:
        Options(**{name: value})
    assert message in str(caught.value)


def test_a_bad_format_says_what_is_legal():
    with pytest.raises(FormatError, match="32"):
        Options(format="bfp4b33")


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().n_ranks = 2
    assert dataclasses.replace(Options(), n_ranks=4).n_ranks == 4
