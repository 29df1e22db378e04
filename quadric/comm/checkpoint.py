"""Checkpoints that all ranks of a job write together, and that any number of ranks can read.

The files are those of ``torch.distributed.checkpoint``: the ranks, which hold the same state, share the work of writing
it, each tensor by one of them. A checkpoint is a numbered folder within the folder it is asked for. It is filled under
another name and takes its number when it is whole and on the disk of all ranks; only then do older ones go. Whatever
kills the job, the highest number is a whole checkpoint. Checksums tell whether a tensor is what was written. Ranks on
several machines need a file system that they share.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator
from quadric.files import Unwritable, new_folder, writing_to

_STRUCTURE, _CHECKSUM = "structure", "checksum"
_PLAIN = (bool, int, float, str, type(None))
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (ValueError, FileNotFoundError, Unwritable)}


def save(state: dict[str, Any], folder: Path, communicator: Communicator) -> None:
    """Makes ``state`` the checkpoint in ``folder``; the one before stays until then. Called by all ranks together.

    Args:
        state: tensors, numbers, strings, truth values and None in lists, tuples and dicts with names or whole numbers
            as keys; the same on all ranks.
        folder: holds nothing else.
        communicator: of the ranks.

    Raises:
        ValueError: something else is in the state, or the ranks hold other states.
        Unwritable: one of the ranks cannot write there; on all ranks.
        RuntimeError: another rank died or fell silent.
    """
    tensors, structure = _taken_apart(state)
    communicator.agree("the state to save", structure)
    tensors[_STRUCTURE] = torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)
    tensors[_CHECKSUM] = torch.tensor(_checksum(tensors[_STRUCTURE]))

    with ExitStack() as stack:

        def begin() -> str:
            if communicator.rank:
                return ""
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
                last = max(_numbers(folder), default=0)
            return str(stack.enter_context(new_folder(folder / str(last + 1), exclusive=True)))

        place = Path(_together(communicator, f"the beginning of a checkpoint in {folder}", begin)[0])
        with _shared(communicator, f"writing a checkpoint in {folder}"):
            dcp.save(tensors, storage_writer=_Writer(place), **_alone(communicator))

        def end() -> str:
            stack.close()
            return ""

        _together(communicator, f"the end of a checkpoint in {folder}", end)
    if communicator.rank == 0:
        for number in sorted(_numbers(folder))[:-1]:
            shutil.rmtree(folder / str(number), ignore_errors=True)


def load(folder: Path, communicator: Communicator) -> dict[str, Any]:
    """The state that `save` wrote in ``folder``, on the CPU. Called by all ranks together; no code in it is run.

    Raises:
        FileNotFoundError: there is no checkpoint; on all ranks.
        ValueError: a file of it is damaged or missing, for one of the ranks; on all ranks.
        RuntimeError: another rank died or fell silent.
    """

    def newest() -> str:
        with _reading(folder):
            numbers = _numbers(folder) if communicator.rank == 0 else [0]
            whole = [number for number in numbers if (folder / str(number) / ".metadata").exists()]
        if not numbers:
            raise FileNotFoundError(f"folder={folder}: no checkpoint there")
        return str(max(whole or numbers))

    place = folder / _together(communicator, f"the search for a checkpoint in {folder}", newest)[0]
    tensors: dict[str, Tensor] = {}

    def allocate() -> str:
        metadata = _Reader(place).read_metadata()
        with _reading(place):
            for name, kept in metadata.state_dict_metadata.items():
                if not isinstance(kept, dcp.TensorStorageMetadata):
                    raise ValueError(f"{name} is not a tensor")
                tensors[name] = torch.empty(kept.size, dtype=kept.properties.dtype)
        return ""

    _together(communicator, f"reading {place}", allocate)
    with _shared(communicator, f"reading {place}"):
        dcp.load(tensors, storage_reader=_Reader(place), **_alone(communicator))
    state: dict[str, Any] = {}

    def put_together() -> str:
        with _reading(place):
            if _checksum(tensors[_STRUCTURE]) != int(tensors[_CHECKSUM]):
                raise ValueError(f"{_STRUCTURE} is not what was written")
            state.update(_put_together(json.loads(tensors[_STRUCTURE].numpy().tobytes()), tensors))
        return ""

    _together(communicator, f"checking {place}", put_together)
    return state


def _numbers(folder: Path) -> list[int]:
    """Of the checkpoints in ``folder``, whole or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]


def _taken_apart(state: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors by the paths to them, and how they, by their records, and all other values stand to each other."""
    tensors: dict[str, Tensor] = {}

    def node(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:  # 1 and "1" are two keys of one dict
                path += "'"
            tensors[path] = value.detach()
            return {"tensor": [path, *_record(tensors[path])]}
        if isinstance(value, dict):
            for key in value:
                if type(key) not in (str, int):
                    raise ValueError(f"{path} has the key {key!r}: name it by a string or a whole number")
            return {"dict": [[key, node(item, f"{path}/{key}")] for key, item in value.items()]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [node(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if type(value) not in _PLAIN:
            raise ValueError(
                f"{path} is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings, truth values and "
                "None in lists, tuples and dicts"
            )
        return value

    structure = json.dumps(node(state, "state"))
    return tensors, structure


def _record(tensor: Tensor) -> list[Any]:
    """What is kept of a tensor to know it again."""
    return [str(tensor.dtype), list(tensor.shape), _checksum(tensor)]


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of its elements, as they are on a CPU, row by row."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data)


def _put_together(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that `_taken_apart` took apart, if its tensors are the same to the bit."""
    if not isinstance(node, dict):
        return node
    ((kind, inside),) = node.items()
    if kind == "tensor":
        path, *record = inside
        if _record(tensors[path]) != record:
            raise ValueError(f"{path} is not what was written")
        return tensors[path]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in inside}
    items = [_put_together(item, tensors) for item in inside]
    return items if kind == "list" else tuple(items)


def _together(communicator: Communicator, what: str, work: Callable[[], str]) -> list[str]:
    """What ``work`` returns on each rank; an error of one is raised on all."""
    own: Exception | None = None
    try:
        said = ["", 0, work()]
    except tuple(_ERRORS.values()) as error:
        own = error
        said = [type(error).__name__, getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)]
    answers = [json.loads(text) for text in communicator.gather(what, json.dumps(said))]
    if own is not None:
        raise own
    for kind, number, text in answers:
        if kind:
            raise _ERRORS[kind](text) if number is None else _ERRORS[kind](number, text)
    return [text for _, _, text in answers]


def _alone(communicator: Communicator) -> dict[str, bool]:
    """What says that the other ranks of this process's job take no part, where it has one."""
    # torch 2.6 has no such argument; it cannot save on one rank of several.
    return {"no_dist": True} if communicator.size == 1 and dist.is_initialized() else {}


@contextmanager
def _shared(communicator: Communicator, what: str) -> Iterator[None]:
    """Around a call of torch.distributed.checkpoint, whose failures on one rank are raised on all."""
    joint: AbstractContextManager[None] = nullcontext()
    if isinstance(communicator, Collective):
        joint = communicator.operation(what)
    try:
        with joint, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except dcp.CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        if isinstance(error, Unwritable | ValueError):
            raise error from failed
        raise RuntimeError(f"{what} failed on rank {rank} ({type(error).__name__}: {error})") from failed


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Turns what goes wrong in reading a checkpoint, which is as much as can be damaged, into one kind of error."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"folder={place} is not a checkpoint of this program, or not on a disk that all ranks share "
            f"({type(error).__name__}: {error})"
        ) from error


class _Writer(dcp.FileSystemWriter):
    """Writes files as torch does. Failures name the remedy; those of another rank arrive without their cause."""

    def prepare_local_plan(self, *args: Any, **kwargs: Any) -> Any:
        with self._writing():
            return super().prepare_local_plan(*args, **kwargs)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with self._writing():
            return super().write_data(*args, **kwargs)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        with self._writing():
            super().finish(*args, **kwargs)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing_to(Path(self.path)):
            try:
                yield
            except RuntimeError as error:
                cause = error.__context__  # torch has its own error for a file that it cannot finish
                if isinstance(cause, OSError):
                    raise cause from error
                raise


class _Reader(dcp.FileSystemReader):
    """Reads files as torch does, but runs no code from the list of the tensors, which is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        with _reading(Path(self.path)):
            with (Path(self.path) / ".metadata").open("rb") as file:
                _Records(file).load()
            return super().read_metadata(*args, **kwargs)

    def read_data(self, *args: Any, **kwargs: Any) -> Any:
        with _reading(Path(self.path)):
            return super().read_data(*args, **kwargs)


class _Records(pickle.Unpickler):
    """Reads a pickle of plain values and of the records and types of torch; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("torch", "pathlib"):
            found = super().find_class(module, name)
            record = isinstance(found, type) and (
                dataclasses.is_dataclass(found) or issubclass(found, enum.Enum | PurePath | torch.Size)
            )
            if record or isinstance(found, torch.dtype) or (module, name) == ("torch.serialization", "_get_layout"):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not data")
