"""safetensors' names of torch's dtypes. torch is imported when one is asked for: layouts are known without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_NAMES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_NAMES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype. Raises ValueError."""
    name = str(dtype).removeprefix("torch.")
    if name not in _NAMES:
        raise ValueError(f"weights of dtype {name} cannot travel; known are {', '.join(_NAMES)}")
    return _NAMES[name]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`. Raises ValueError."""
    import torch

    for own, theirs in _NAMES.items():
        if theirs == name:
            found: torch.dtype = getattr(torch, own)
            return found
    raise ValueError(f"dtype {name} is none of {', '.join(_NAMES.values())}")


def bits_dtype(itemsize: int) -> torch.dtype:
    """Integers of as many bytes (1, 2, 4 or 8): what the bits of an element are compared and changed as."""
    import torch

    found: torch.dtype = getattr(torch, _INTEGERS[itemsize])
    return found
