"""save_relus: torch.compile's decompositions make a ReLU cheap to compute again; then it is saved all the same."""

import copy

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import lowering  # noqa: F401  (that of max-pool needs it)
from torch._inductor.decomposition import select_decomp_table

from fxpipe.backend import BackendOptions, CompressingPartitioner


def nop(module, inputs):
    return make_boxed_func(module.forward)


def test_a_relu_is_saved_and_not_computed_again_from_what_is_compressed():
    """torch.compile's decompositions make BatchNorm and ReLU cheap to compute again in backward: other zeros would come out."""
    plans = []
    partition = CompressingPartitioner(BackendOptions(format="bfp4b32", min_bytes=0, on_plan=plans.append))
    compiler = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, partition_fn=partition, decompositions=select_decomp_table
    )
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    )
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 12, 12)
    torch.compile(model, backend=compiler)(x).square().mean().backward()
    twin(x).square().mean().backward()
    points = {p.operator: p for p in plans[0].save_points if len(p.shape) == 4 and p.shape[1] == 8 and p.shape[2] == 10}
    assert points["aten.convolution.default"].decision == "compress"
    assert not {p.reason for p in plans[0].save_points} & {"compared in backward", "divided by in backward"}
    assert points.keys() & {"aten.relu.default", "aten.le.Scalar"}  # the ReLU, or its mask
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.25 * theirs.grad.norm() + 1e-6
