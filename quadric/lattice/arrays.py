"""What the records of arcs demand of their arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def check_types(record: object, types: Mapping[str, type]) -> None:
    """Raises ``ValueError`` for the first field that is not a contiguous one-dimensional array of its type."""
    for name, dtype in types.items():
        array = getattr(record, name)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
            raise ValueError(
                f"{name} must be a one-dimensional {np.dtype(dtype).name} array, not {_describe(array)}; "
                f"build it from plain numbers with from_arcs"
            )
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous; pass numpy.ascontiguousarray({name})")


def _describe(array: object) -> str:
    if isinstance(array, np.ndarray):
        return f"{array.dtype} of shape {array.shape}"
    return type(array).__name__
