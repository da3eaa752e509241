"""The front door of fxpipe. Each name loads its module when first used, so ``import fxpipe`` loads no torch."""

from importlib import import_module, util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxpipe.api import compile as compile, load as load, stage_hint as stage_hint
    from fxpipe.errors import FxpipeError as FxpipeError
    from fxpipe.ir.program import Program as Program
    from fxpipe.pass_base import Pass as Pass
    from fxpipe.pass_manager import Pipeline as Pipeline
    from fxpipe.pipeline import Options as Options
    from fxpipe.planner.partition import partition as partition
    from fxpipe.plans.plan import Plan as Plan
    from fxpipe.triton_kernels.format import BFPFormat as BFPFormat
    from fxpipe.triton_kernels.ops import compress as compress, decompress as decompress

if util.find_spec("fxpipe.passes") is None:
    raise ImportError(f"{__file__} is a bare checkout, without fxpipe.passes: `pip install -e` it, or start elsewhere")
__version__ = "0.1.0"
_NAMES_OF_MODULE = {
    "fxpipe.api": ("compile", "load", "stage_hint"),
    "fxpipe.errors": ("FxpipeError",),
    "fxpipe.ir.program": ("Program",),
    "fxpipe.pass_base": ("Pass",),
    "fxpipe.pass_manager": ("Pipeline",),
    "fxpipe.pipeline": ("Options",),
    "fxpipe.plans.plan": ("Plan",),
    "fxpipe.planner.partition": ("partition",),
    "fxpipe.triton_kernels.format": ("BFPFormat",),
    "fxpipe.triton_kernels.ops": ("compress", "decompress"),
}
_HOME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fxpipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
