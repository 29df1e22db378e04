"""Gradients compressed or combined on their way through ``DistributedDataParallel``, as communication hooks.

    model = DistributedDataParallel(network)
    model.register_comm_hook(ScaleComState(network.parameters(), share=0.01), scalecom_hook)

torch has others, in ``torch.distributed.algorithms.ddp_comm_hooks``, which need nothing of quadric: ``powerSGD_hook``
(low rank, with error feedback), ``fp16_compress_hook`` and ``bf16_compress_hook`` (without).

Every hook leaves the same gradient on all ranks, to the bit. A gradient that is not finite on one rank comes out not
finite on all, and the residues of its bucket, not those of others, stay as they were on all, for a step that is
skipped. Residues belong to parameters, so they outlive DDP's new division into buckets after the first backward pass.
They differ from rank to rank: each saves the `state_dict` of its own.
"""

# No postponed annotations: DDP refuses a hook whose annotations are strings.

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from quadric.comm.combine import adasum
from quadric.comm.compression import AdaComp, CLTk, Compressor, bin_lengths, largest
from quadric.comm.message import Signs

C = TypeVar("C", bound=Compressor)


class HookState(ABC, Generic[C]):
    """A compressor for each of a model's parameters, on one rank.

    Args:
        parameters: of the model that DDP wraps, as ``network.parameters()`` gives them.
        group: of the ranks; None: all of the job.

    Attributes:
        bytes_sent: what this rank has put into collectives so far, padding and indices included; a plain all-reduce
            has put in four bytes an entry.
    """

    def __init__(self, parameters: Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> None:
        self.group = _known(group)
        self.compressors = {p: self.compressor(p) for p in parameters if p.requires_grad}
        self.bytes_sent = 0

    @abstractmethod
    def compressor(self, parameter: Tensor) -> C:
        """A new one for this parameter."""

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Of the group."""
        return dist.get_world_size(self.group)

    def parts(self, bucket: dist.GradBucket) -> list[tuple[C, Tensor]]:
        """The compressor and the gradient, a view of the bucket's buffer, of every parameter in the bucket.

        Raises:
            ValueError: a parameter that this state was not built for.
        """
        parameters = bucket.parameters()
        unknown = [list(p.shape) for p in parameters if p not in self.compressors]
        if unknown:
            raise ValueError(f"parameters of shapes {unknown}: build the state with all parameters that DDP trains")
        gradients = bucket.buffer().split([p.numel() for p in parameters])
        return [(self.compressors[p], gradient) for p, gradient in zip(parameters, gradients, strict=True)]

    def undo(self, bucket: Sequence[Tensor], before: Sequence[C]) -> None:
        """Puts back the compressors of a bucket's parameters, as shallow copies had them before."""
        self.compressors.update(zip(bucket, before, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The residues of this rank, in the order of the parameters."""
        return {"compressors": [compressor.state_dict() for compressor in self.compressors.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the state of this rank.

        Raises:
            ValueError: it is of other parameters.
        """
        if len(state["compressors"]) != len(self.compressors):
            raise ValueError(
                f"state: of {len(state['compressors'])} parameters, these are {len(self.compressors)}: build it for "
                "the model that was trained"
            )
        for compressor, kept in zip(self.compressors.values(), state["compressors"], strict=True):
            compressor.load_state_dict(kept)


class AdaCompState(HookState[AdaComp]):
    """What `adacomp_hook` keeps: of every parameter a residue.

    Args:
        parameters, group: as in `HookState`.
        bin: entries of a bin; None: the paper's, 50 for kernels of convolutions and 500 for others.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, bin: int | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        self.bin = bin
        super().__init__(parameters, group=group)

    def compressor(self, parameter: Tensor) -> AdaComp:
        return AdaComp([parameter.numel()], bin_lengths([parameter]) if self.bin is None else self.bin)


class ScaleComState(HookState[CLTk]):
    """What `scalecom_hook` keeps: of every parameter a memory, and which step this is.

    Args:
        parameters, group: as in `HookState`.
        share, memory: of the entries of each bucket, and b of the filter; see `CLTk`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        share: float,
        memory: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.share, self.memory, self.step = share, memory, 0
        super().__init__(parameters, group=group)

    def compressor(self, parameter: Tensor) -> CLTk:
        return CLTk(self.share, self.memory)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step = state["step"]


class CombinerState:
    """What `combiner_hook` needs to know.

    Args:
        combine: what becomes of the gradients of all ranks for one parameter: `adasum` or `graph_any2vec`.
        group: of the ranks; None: all of the job.
    """

    def __init__(
        self, combine: Callable[[Sequence[Tensor]], Tensor] = adasum, *, group: dist.ProcessGroup | None = None
    ) -> None:
        self.combine, self.group = combine, _known(group)


@torch.no_grad()
def adacomp_hook(state: AdaCompState, bucket: dist.GradBucket) -> Future[Tensor]:
    """The mean of the ranks' `AdaComp` messages. Every rank receives those of all others.

    The lengths of the messages are exchanged first, for which the backward pass waits; not for the messages, which are
    filled up to the longest.
    """
    buffer, size, parts = bucket.buffer(), state.size, state.parts(bucket)
    parameters, before = bucket.parameters(), [copy.copy(compressor) for compressor, _ in parts]
    sent = np.concatenate([compressor.compress(gradient).to_bytes() for compressor, gradient in parts])  # type: ignore[attr-defined]
    lengths = [torch.zeros(1, dtype=torch.int64, device=buffer.device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(sent)], device=buffer.device), group=state.group)
    longest = max(int(length) for length in lengths)
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(sent)] = torch.from_numpy(sent)
    own = own.to(buffer.device)
    received = [torch.empty_like(own) for _ in range(size)]
    work = dist.all_gather(received, own, group=state.group, async_op=True)
    state.bytes_sent += 8 + longest

    def mean(future: Future[Any]) -> Tensor:
        future.value()
        total = torch.zeros_like(buffer, dtype=torch.promote_types(buffer.dtype, torch.float32))
        for message in received:
            data = message.cpu().numpy()
            for (compressor, _), place in zip(parts, total.split([len(g) for _, g in parts]), strict=True):
                signs, data = Signs.from_bytes(data, compressor.sizes, compressor.bins)
                if not signs.finite:
                    state.undo(parameters, before)
                    return buffer.fill_(torch.nan)
                signs.add_to(place, 1 / size)
        return buffer.copy_(total)

    return work.get_future().then(mean)


@torch.no_grad()
def scalecom_hook(state: ScaleComState, bucket: dist.GradBucket) -> Future[Tensor]:
    """The mean of the ranks' `CLTk` messages, by an all-reduce of the entries that this step's leader has chosen.

    The ranks lead in turn, each choosing the largest of a whole bucket: by that measure some parameters matter more
    than others. A job that is resumed goes on from the same memories, but where DDP has several buckets its first step
    chooses within others: DDP divides the parameters anew after the first backward pass. The backward pass waits for
    the leader's indices, not for the sum.
    """
    buffer, parts = bucket.buffer(), state.parts(bucket)
    parameters, before = bucket.parameters(), [copy.copy(compressor) for compressor, _ in parts]
    sizes = [len(gradient) for _, gradient in parts]
    leader = state.step % state.size
    total = torch.cat([compressor.total(gradient) for compressor, gradient in parts])
    indices = largest(total, state.share)  # a follower's own are overwritten
    dist.broadcast(indices, dist.get_global_rank(state.group, leader), group=state.group)
    if bool(total.isfinite().all()):
        places = torch.bucketize(indices, torch.tensor(sizes, device=indices.device).cumsum(0), right=True)
        chosen = indices.split(places.bincount(minlength=len(sizes)).tolist())
        starts = np.cumsum([0, *sizes]).tolist()
        messages = [c.compress(g, at - start) for (c, g), at, start in zip(parts, chosen, starts, strict=False)]
        values = torch.cat([message.numbers() for message in messages]).to(buffer.device)
    else:
        values = torch.full(indices.shape, torch.nan, device=buffer.device)
    work = dist.all_reduce(values, group=state.group, async_op=True)
    state.bytes_sent += values.nbytes + (indices.nbytes if state.rank == leader else 0)
    state.step += bucket.is_last()

    def mean(future: Future[Any]) -> Tensor:
        future.value()
        if not bool(values.isfinite().all()):
            state.undo(parameters, before)
        buffer.zero_()
        buffer[indices] = (values / state.size).to(buffer.dtype)
        return buffer

    return work.get_future().then(mean)


@torch.no_grad()
def combiner_hook(state: CombinerState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Combines the ranks' gradients, parameter by parameter, by what the state says in place of the mean.

    Every rank receives the gradients of all others whole, which is for few ranks: of N, N - 1 times a gradient over
    every wire, where a ring's all-reduce sends twice one.
    """
    buffer = bucket.buffer()
    received = [torch.empty_like(buffer) for _ in range(dist.get_world_size(state.group))]
    work = dist.all_gather(received, buffer, group=state.group, async_op=True)
    sizes = [p.numel() for p in bucket.parameters()]

    def combined(future: Future[Any]) -> Tensor:
        future.value()
        layers = zip(*(gradient.split(sizes) for gradient in received), strict=True)
        return buffer.copy_(torch.cat([state.combine(layer) for layer in layers]))

    return work.get_future().then(combined)


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("group=None: this process belongs to no job yet; join one first, as DDP needs it too")
    return group
