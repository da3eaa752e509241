import itertools
import sys

import pytest
import torch
from models import HUGGING_FACE, MODELS, build
from torch.utils._pytree import tree_leaves

from fxpipe.demos import demo, text
from fxpipe.errors import OptionError


@pytest.mark.parametrize("name", MODELS)
def test_exports_and_gives_eager_numbers(name):
    model, args, kwargs = build(name)
    assert model.training
    exported = torch.export.export(model, args, kwargs).module()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    eager = tree_leaves(model(*args, **kwargs))
    model.load_state_dict(before)  # BatchNorm has counted
    torch.manual_seed(1)
    graph = tree_leaves(exported(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))
    assert sum(leaf.ndim == 0 and leaf.requires_grad for leaf in eager) == 1, "one scalar to differentiate"


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_weights_and_inputs_and_leaves_the_callers_random_state(name):
    state = torch.get_rng_state()
    first, second, other = build(name), build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)

    def tensors(model, args, kwargs):
        return [*model.state_dict().values(), *tree_leaves((args, kwargs))]

    assert all(torch.equal(a, b) for a, b in zip(tensors(*first), tensors(*second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(*first), tensors(*other), strict=True))


def test_every_microbatch_of_bert_has_as_many_labels():
    _, _, inputs = build("bert")
    assert set((inputs["labels"] != -100).sum(dim=1).tolist()) == {28}


def test_tied_shares_one_weight():
    model, _, _ = build("tied")
    assert model.head.weight is model.embed.weight


def test_unknown_name_lists_the_known():
    with pytest.raises(OptionError, match=r"unknown demo 'resnet'; known: bert, cnn, gpt"):
        demo("resnet")


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_without_transformers_the_error_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OptionError, match=rf"demo '{name}' needs transformers .*pip install 'fxpipe\[hf\]'"):
        build(name)


def test_text_is_large_and_its_parts_share_no_page():
    train, validation = text.read("train"), text.read("validation")
    assert len(train) > 300_000
    assert len(train) / 20 < len(validation) < len(train) / 4
    assert not set(train.split("\n\n\n")) & set(validation.split("\n\n\n"))


def test_encoding_keeps_ascii_and_marks_the_rest():
    assert text.decode(text.encode("def f(x):\n    é")) == "def f(x):\n    ?"
    assert int(text.encode(text.read("train")).max()) < text.VOCABULARY


def test_text_batches_repeat_by_seed():
    def take(**options):
        return [batch["input_ids"] for batch in itertools.islice(text.text_batches(4, 16, **options), 3)]

    first = take(seed=3)
    assert all(batch.shape == (4, 16) and batch.dtype == torch.int64 for batch in first)
    assert all(torch.equal(a, b) for a, b in zip(first, take(seed=3), strict=True))
    assert not torch.equal(first[0], take(seed=4)[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], take(seed=3, part="validation")[0])
