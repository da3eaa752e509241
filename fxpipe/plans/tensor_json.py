"""Small tensors as JSON, and back: type, shape, device and the bytes themselves."""

import base64
import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxpipe.errors import PlanError


def tensors_to_data(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """By name: dtype, shape, device, and the values row by row in base64."""
    return {name: _to_data(tensor) for name, tensor in tensors.items()}


def tensors_from_data(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of ``tensors_to_data``; raises PlanError for an unknown type, or bytes that are not of that shape."""
    return {name: _from_data(name, one) for name, one in data.items()}


def _to_data(tensor: Tensor) -> dict[str, Any]:
    held = tensor.detach().cpu().contiguous()
    content = ctypes.string_at(held.data_ptr(), held.nbytes) if held.nbytes else b""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
        "data": base64.b64encode(content).decode(),
    }


def _from_data(name: str, data: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, data["dtype"], None)
    content = bytearray(base64.b64decode(data["data"], validate=True))
    n_values = torch.Size(data["shape"]).numel()
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"constant {name!r} has dtype {data['dtype']!r}, which torch does not know")
    if len(content) != n_values * dtype.itemsize:
        expected = f"{n_values * dtype.itemsize} for {data['dtype']} {data['shape']}"
        raise PlanError(f"constant {name!r} has {len(content)} bytes; expected {expected}")
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"]).to(data["device"])
