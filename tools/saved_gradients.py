"""Models whose saves are compressed, run by eager operators: what that does to a gradient.

For ``bench_quality.py``. Cut by the partitioner on Inductor's decompositions and run as they are: the rewrite is the backend's
own, and no compiler's rounding is mixed in.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._inductor.config as inductor_config
import torch._inductor.lowering
import torch.fx as fx
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from one_step import one_step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from fxpipe.backend import BackendOptions, CompressingPartitioner
from fxpipe.demos import demo
from fxpipe.ir.compression import CompressionPlan

MODELS = ("cnn", "vit", "llama")
FP8 = {
    "allowed_dtypes": "torch.float32;torch.bfloat16", "size_in_mb": 8 / 1024, "skip_dynamo_guards": True,
    "quantize_dynamic_shape": False, "use_scaling": True, "exclude_primals": True,
}  # fmt: skip
VIT = {"batch": 4, "size": 64, "patch": 8, "width": 192, "n_layers": 4, "n_heads": 6, "n_classes": 100}
LLAMA = {"batch": 2, "length": 128, "vocabulary": 1024, "width": 192, "n_layers": 4, "n_heads": 6}

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


class ByEagerOperators(CompressingPartitioner):
    """The backend's partitioner for a compiler that leaves layouts as they are."""

    def channels_last(self, forward: fx.GraphModule) -> Collection[fx.Node]:
        return ()


def by_eager_operators(partitioner: Partitioner) -> Any:
    """A backend for ``torch.compile`` that cuts the joint graph so, and runs the halves as they are."""

    def run(graph_module: fx.GraphModule, _: Sequence[object]) -> Any:
        return make_boxed_func(graph_module.forward)

    return aot_autograd(
        fw_compiler=run, bw_compiler=run, partition_fn=partitioner, decompositions=select_decomp_table()
    )


def setting(
    name: str, partitioner: str = "auto"
) -> tuple[Partitioner, AbstractContextManager[None], list[CompressionPlan]]:
    """How the joint graph is cut, the configuration to run under, and where plans will be found.

    ``name`` is a format, ``fp32``, or for torch's own 8 bits ``e4m3`` or ``e5m2``.
    """
    plans: list[CompressionPlan] = []
    if name in ("e4m3", "e5m2"):
        kind = {"e4m3": "torch.float8_e4m3fn", "e5m2": "torch.float8_e5m2"}[name]
        options = {"activation_quantization_aten_pass": {**FP8, "quant_type": kind}}
        patched: Any = inductor_config.patch(post_grad_fusion_options=options)
        return min_cut_rematerialization_partition, patched, plans
    if name == "fp32":
        return min_cut_rematerialization_partition, nullcontext(), plans
    options = BackendOptions(format=name, partitioner=partitioner, on_plan=plans.append)
    return ByEagerOperators(options), nullcontext(), plans


def bits(plans: Sequence[CompressionPlan]) -> float | None:
    """Stored bits a value over everything that was compressed."""
    points = [p for plan in plans for p in plan.save_points if p.decision == "compress"]
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    values = sum(p.raw_bytes // sizes[p.dtype] for p in points)
    return 8 * sum(p.stored_bytes for p in points) / values if values else None


def gradient_model(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A fresh model with its inputs; the same on every call."""
    if name == "cnn":
        import transformers

        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=100
        )
        model = transformers.ResNetForImageClassification(config).train()
        return model, (), {"pixel_values": torch.randn(8, 3, 96, 96), "labels": torch.randint(100, (8,))}
    model, inputs = demo(name)(**{"vit": VIT, "llama": LLAMA}[name])
    return (model, (), inputs) if isinstance(inputs, dict) else (model, inputs, {})


def gradient(model_name: str, setting_name: str) -> dict[str, Any]:
    """Loss, bytes and bits of one step, and all gradients as one vector."""
    torch._dynamo.reset()
    model, args, kwargs = gradient_model(model_name)
    partitioner, patched, plans = setting(setting_name)
    compiled = torch.compile(model, backend=by_eager_operators(partitioner))
    with patched:
        loss, saved_bytes, vector = one_step(model, compiled, args, kwargs)
    return {"loss": loss, "saved_bytes": saved_bytes, "bits": bits(plans), "gradient": vector}


def gradient_rows(settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each model and setting."""
    for model in MODELS:
        exact = gradient(model, "fp32")
        for name in settings:
            found = gradient(model, name)
            error = ((found["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm()).item()
            yield {
                "model": model,
                "setting": name,
                "bits": found["bits"],
                "of_bytes": found["saved_bytes"] / exact["saved_bytes"],
                "same_loss": found["loss"] == exact["loss"],
                "error": error,
            }
