"""Block floating-point storage of tensors: the formats, their definition in plain torch, and their kernels.

A leaf of fxpipe: it imports nothing of fxpipe. Importing this package imports neither torch nor triton. ``ops``
registers the operators ``fxpipe::bfp_compress`` and ``fxpipe::bfp_decompress``; whoever needs them imports it.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is the package fxpipe.triton_kernels; import it under that name "
        "(a bare 'triton_kernels' is another project's package)"
    )

from .format import BFPFormat, FormatError, Plane

__all__ = ["BFPFormat", "FormatError", "Plane"]
