"""The layer graphs of well-known models as profiles: traced on the meta device, costs modelled on a named one.

A layer is one call of a module that the model names as such (a convolution with its BatchNorm and ReLU, an LSTM, a Linear), as
PipeDream's profiler saw them, or a stretch of what stands between two of them in the same module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from known_models import Cells, Conv, Gnmt, Lstm, bert, densenet, gpt2, inception, resnet50, vgg16
from torch import Tensor, nn
from torch.nn import functional as F

from fxpipe.costs.layer_profile import layer_profile
from fxpipe.cuts.cut_rules import cut_rules
from fxpipe.ir.cost import CostTable
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.keep_loss import KeepLoss
from fxpipe.trace import trace

RECOMPUTE_BELOW = 12e9  # bytes per second of the link that decides what is computed again in place of being sent


@dataclass(frozen=True)
class Known:
    """``make`` builds the model; ``inputs`` the tensors of one microbatch and the target; ``whole`` are the modules, besides
    those without children, that count as one layer."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Tensor, ...], Tensor | None]]
    whole: tuple[type[nn.Module], ...] = (Conv, Lstm)


def _images() -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.empty(32, 3, 224, 224),), torch.zeros(32, dtype=torch.int64)


def _sentences() -> tuple[tuple[Tensor, ...], Tensor]:
    words = torch.zeros(64, 50, dtype=torch.int64)
    return (words, words.clone()), words.clone()


def _tokens() -> tuple[tuple[Tensor, ...], None]:
    return (torch.zeros(8, 512, dtype=torch.int64),), None


MODELS = {
    "VGG-16": Known(vgg16, _images),
    "ResNet-50": Known(resnet50, _images),
    "Inception-like": Known(inception, _images),
    "DenseNet-like": Known(densenet, _images),
    "NASNet-like": Known(lambda: Cells(44), _images),
    "GNMT-like": Known(Gnmt, _sentences),
    "BERT": Known(bert, _tokens),
    "GPT-2": Known(gpt2, _tokens),
}


class _WithLoss(nn.Module):
    """The cross-entropy of what the model returns, or of each token against itself where there is no target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...], target: Tensor | None) -> Tensor:
        if target is None:
            logits, target = self.model(*inputs).logits, inputs[0]
        else:
            logits = self.model(*inputs)
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def known_profile(name: str, device: str) -> dict[str, Any]:
    """The layer graph of a model as JSON, its costs modelled on a named device."""
    known = MODELS[name]
    with torch.device("meta"):
        model = _WithLoss(known.make())
        program = trace(model, known.inputs())
    for step in (KeepLoss(), Canonicalize(), AnnotateCosts(device=device)):
        program = step.run(program)
    found = layer_profile(cut_rules(program, program.fact(CostTable), RECOMPUTE_BELOW))
    layers = {
        path for path, m in model.named_modules() if isinstance(m, known.whole) or not any(True for _ in m.children())
    }
    return contracted(found, [_layer(node["name"], layers) for node in found["nodes"]])


def _layer(path: str, layers: set[str]) -> str:
    """The outermost layer that a path lies in, or the path itself; ``a.b@1`` is the second call of ``a.b``."""
    parts = path.split(".")
    for n in range(1, len(parts) + 1):
        if ".".join(part.partition("@")[0] for part in parts[:n]) in layers:
            return ".".join(parts[:n])
    return path


def contracted(profile: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A profile whose nodes are those of another, neighbours with one key made one."""
    nodes, edges = profile["nodes"], profile["edges"]
    starts = [0, *(i for i in range(1, len(nodes)) if keys[i] != keys[i - 1]), len(nodes)]
    group_of = {nodes[i]["id"]: g for g, (a, b) in enumerate(pairwise(starts)) for i in range(a, b)}
    across = sorted({(group_of[a], group_of[b]) for a, b in edges if group_of[a] != group_of[b]})
    sent = {a for a, b in edges if group_of[a] != group_of[b]}
    found = []
    for a, b in pairwise(starts):
        row = {f: sum(n[f] for n in nodes[a:b]) for f in ("forward_seconds", "backward_seconds", "parameter_bytes")}
        out = sum(n["output_bytes"] for n in nodes[a:b] if n["id"] in sent or b == len(nodes))
        found.append({"id": len(found), "name": keys[a], **row, "output_bytes": out})
    return {"nodes": found, "edges": [list(pair) for pair in across]}
