"""The ``torch.compile`` backend: Inductor, with the values that it saves for backward compressed.

``torch.compile(model, backend="fxpipe", options={"format": "bfp4b32"})``, or the name wherever a backend name is taken.
The joint graph comes through Inductor's public ``custom_partitioner_fn``; the rewrite is the one of ``passes/compress.py``.
On GPUs Inductor inlines the kernels of the operators (``inline_kernels``).
"""

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast
from uuid import uuid4

import torch.fx as fx
from torch._inductor import list_mode_options
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from fxpipe import inductor
from fxpipe.errors import OptionError, unknown
from fxpipe.graph_module import returned, set_own_values
from fxpipe.inline_kernels import with_inlined_kernels
from fxpipe.ir.compression import CompressionPlan
from fxpipe.lowering import joint
from fxpipe.lowering.joint import AUTO, PARTITIONERS, partitioner_for
from fxpipe.passes import compress
from fxpipe.passes.compress import compress_halves
from fxpipe.saves import (
    backward_facts,
    exact_forms,
    format_rules,
    fused_norms,
    fused_producers,
    in_memory,
    norm_patterns,
    save_points,
    value_facts,
    value_ranges,
)
from fxpipe.saves.format_rules import FormatRules
from fxpipe.saves.save_points import (
    MIN_BYTES,
    choose_save_points,
    names_of_saved,
    save_relus,
    save_softmaxes,
    share_storages,
)
from fxpipe.triton_kernels import exact, format as formats, ops

DEFAULT_FORMAT = "bfp8b32"
"""Used where no options can be given; safe for every model: gradients within about one percent."""


@dataclass(frozen=True)
class BackendOptions:
    """The options of the backend. ``on_plan`` is called with the CompressionPlan of each graph that is compiled.

    format: of saved activations, ``None`` to keep them, or a format for each pattern of a node's name, operator or module
    path, as for ``fxpipe.Options``; where a pattern matches nothing in a graph, a warning lists what there is: no error, as
    another graph of the same model may have it.
    min_bytes: smaller values are kept. exact_forms: with a format, also pack bools, integers of a known range and masks without
    loss, and compute copies of parameters again. partitioner: what forward saves, as for ``fxpipe.Options``.
    """

    format: str | None = DEFAULT_FORMAT
    min_bytes: int = MIN_BYTES
    exact_forms: bool = True
    partitioner: str = AUTO
    on_plan: Callable[[CompressionPlan], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", FormatRules.parse(self.format).text)
        if type(self.min_bytes) is not int or self.min_bytes < 0:
            raise OptionError(f"option min_bytes is a number of bytes, 0 or more; found {self.min_bytes!r}")
        if not isinstance(self.exact_forms, bool):
            raise OptionError(f"option exact_forms is True or False; found {self.exact_forms!r}")
        if not (self.on_plan is None or callable(self.on_plan)):
            raise OptionError(f"option on_plan is a function of one CompressionPlan, or None; found {self.on_plan!r}")
        if self.partitioner not in (AUTO, *PARTITIONERS):
            raise OptionError(unknown("partitioner", self.partitioner, (AUTO, *PARTITIONERS)))

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
        partitioner = partitioner_for(options.partitioner, options.format)
        if partitioner == "default":
            kwargs.pop("compiler", None)
        n_outputs: int = kwargs["num_fwd_outputs"]
        if options.format is not None:
            save_relus(gm.graph)
            save_softmaxes(gm.graph)
        forward, backward = PARTITIONERS[partitioner](gm, joint_inputs, **kwargs)
        share_storages(forward.graph, backward.graph, n_outputs)
        rules = FormatRules.parse(options.format)
        points = choose_save_points(
            forward.graph,
            backward.graph,
            n_outputs,
            rules,
            min_bytes=options.min_bytes,
            parameters=_parameters(forward.graph, backward.graph, kwargs.get("static_lifetime_input_indices") or ()),
            exact_forms=options.exact_forms,
        )
        if problem := rules.unmatched(names_of_saved(forward.graph, backward.graph, n_outputs)):
            warnings.warn(f"in one compiled graph, {problem}", stacklevel=2)
        compress_halves(forward, backward, n_outputs, points, self.channels_last(forward), exact_forward=False)
        set_own_values(backward.graph)
        if options.on_plan is not None:
            options.on_plan(CompressionPlan(points))
        return forward, backward

    def channels_last(self, forward: fx.GraphModule) -> Collection[fx.Node]:
        """The values whose memory the compiler will put in that order."""
        return inductor.channels_last(forward) if self.options.format is not None else ()

    def uuid(self) -> Any:
        """Everything that the compiled code depends on: the options, and the source of the rewrite.

        Never ``None``: contrary to its documentation torch 2.13 caches then too, under the key of plain Inductor. A key of its
        own, so that nothing comes from the cache, where that would lose the call of ``on_plan`` or the warning of a pattern
        that matches nothing, and where module paths decide on formats: the cache's key does not hold them.
        """
        if self.options.on_plan is not None or FormatRules.parse(self.options.format).rules:
            return uuid4().bytes
        facts = (value_facts, value_ranges, backward_facts, exact_forms, format_rules)
        rewrite = (joint, save_points, compress, fused_norms, norm_patterns, in_memory, fused_producers, inductor)
        modules = (sys.modules[__name__], *rewrite, *facts, formats, ops, exact)
        return get_hash_for_files(tuple(str(m.__file__) for m in modules), str(self.options))


def _parameters(forward: fx.Graph, backward: fx.Graph, lasting: Sequence[int]) -> list[fx.Node]:
    """The placeholders that last as long as the model and get a gradient: the others are buffers, which forward may change."""
    placeholders, gradients = forward.find_nodes(op="placeholder"), returned(backward)
    return [placeholders[i] for i in lasting if i < len(gradients) and gradients[i] is not None]


def fxpipe(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's with Inductor and compressed saves; registered as the backend ``fxpipe``.

    ``options`` are fxpipe's own, the fields of BackendOptions; ``mode`` is Inductor's. ``torch.compile`` takes one of them.

    Raises:
        OptionError: an option is unknown or has a bad value. ``torch.compile`` shows it inside a BackendCompilerFailed.
    """
    from torch._inductor.compile_fx import compile_fx

    inductor.register()
    partitioner = CompressingPartitioner(BackendOptions.from_mapping(options or {}))
    own = {"custom_partitioner_fn": partitioner, **inductor.SETTINGS, **with_inlined_kernels()}
    patches = {**list_mode_options(mode or "default"), **own}
    return cast(Callable[..., Any], compile_fx(graph_module, example_inputs, config_patches=patches))
