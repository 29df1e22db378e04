"""Weighted acceptors and lattices, and what is summed over their paths, compiled by numba."""

from importlib.util import find_spec

if find_spec("numba") is None:
    raise ModuleNotFoundError(
        "lattices, the losses over them and quadric.speech need numba: pip install 'quadric[lattice]'", name="numba"
    )
