"""The path for CPU tensors, equal to ``reference`` bit for bit. A kernel compiled on first use will find its place here."""

from .reference import compress, decompress

__all__ = ["compress", "decompress"]
