"""The ``torch.compile`` backend: Inductor, with the values that it saves for backward compressed.

``torch.compile(model, backend="fxpipe", options={"format": "bfp4b32"})``, or the name wherever a backend name is taken.
The joint graph comes through Inductor's public ``custom_partitioner_fn``; the rewrite is the one of ``passes/compress.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.fx as fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from fxpipe.errors import OptionError, unknown
from fxpipe.ir.compression import CompressionPlan
from fxpipe.passes.compress import compress_halves, parse_format
from fxpipe.passes.lower import PARTITIONERS
from fxpipe.save_points import MIN_BYTES, choose_save_points, share_storages

DEFAULT_FORMAT = "bfp8b32"
"""Used where no options can be given; safe for every model: gradients within about one percent."""


@dataclass(frozen=True)
class BackendOptions:
    """The options of the backend. ``on_plan`` is called with the CompressionPlan of each graph that is compiled.

    format: of saved activations, or ``None`` to keep them. min_bytes: smaller values are kept.
    partitioner: what forward saves, ``min-cut`` or ``default``.
    """

    format: str | None = DEFAULT_FORMAT
    min_bytes: int = MIN_BYTES
    partitioner: str = "min-cut"
    on_plan: Callable[[CompressionPlan], None] | None = None

    def __post_init__(self) -> None:
        parse_format(self.format)
        if self.partitioner not in PARTITIONERS:
            raise OptionError(unknown("partitioner", self.partitioner, PARTITIONERS))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "BackendOptions":
        """Options from ``torch.compile``'s dict; raises OptionError for a name that is not one, listing those that are."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError(unknown("option", name, known))
        return cls(**options)


class CompressingPartitioner(CustomPartitionerFn):
    """Inductor's partitioner, then the save-point rewrite on the two halves."""

    def __init__(self, options: BackendOptions) -> None:
        self.options = options

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        options = self.options
        if options.partitioner == "default":
            kwargs.pop("compiler", None)
        n_outputs: int = kwargs["num_fwd_outputs"]
        forward, backward = PARTITIONERS[options.partitioner](gm, joint_inputs, **kwargs)
        share_storages(forward.graph, backward.graph, n_outputs)
        points = choose_save_points(
            forward.graph, backward.graph, n_outputs, parse_format(options.format), min_bytes=options.min_bytes
        )
        compress_halves(forward, backward, n_outputs, points)
        if options.on_plan is not None:
            options.on_plan(CompressionPlan(points))
        return forward, backward

    def uuid(self) -> Any:
        """Everything that the compiled code depends on: the options, and the source of the rewrite."""
        if self.options.on_plan is not None:
            return None  # a cached graph would not call it
        own = Path(__file__).parent
        import fxpipe.passes.compress
        import fxpipe.triton_kernels as kernels

        sources = [own / "save_points.py", own / "value_facts.py", fxpipe.passes.compress.__file__]
        sources += sorted(Path(kernels.__path__[0]).glob("*.py"))
        options = tuple(getattr(self.options, f.name) for f in fields(self.options))
        return get_hash_for_files(tuple(map(str, sources)), str(options))


def fxpipe(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's with Inductor and compressed saves; registered as the backend ``fxpipe``.

    Raises:
        OptionError: an option is unknown or has a bad value.
    """
    import fxpipe.triton_kernels.ops  # noqa: F401  (registers the operators)
    from torch._inductor.compile_fx import compile_fx

    partitioner = CompressingPartitioner(BackendOptions.from_mapping(options or {}))
    patches = {"custom_partitioner_fn": partitioner}
    compiled: Callable[..., Any] = compile_fx(graph_module, example_inputs, config_patches=patches)
    return compiled


