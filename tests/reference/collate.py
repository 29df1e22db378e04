"""Minibatches by their definition: every utterance padded by itself, every window cut out of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quadric.data.batch import Batch, Example, Window, pad_context


def collate(examples: Sequence[Example], left: int, right: int, *, windows: Sequence[Window] | None = None) -> Batch:
    """One minibatch of whole utterances, or of one window ``(start, stop)`` of each when ``windows`` are given."""
    whole = [(0, len(example.features)) for example in examples]
    chosen = whole if windows is None else list(windows)
    for example, window, full in zip(examples, chosen, whole, strict=True):
        assert len(example.target) == full[1] and 0 <= window[0] < window[1] <= full[1]
        assert window == full or isinstance(example.target, np.ndarray), "an object cannot be cut"
    lengths = [stop - start for start, stop in chosen]
    frames = left + max(lengths) + right
    rows = [
        pad_context(example.features, left, right + max(lengths))[start : start + frames]
        for example, (start, _) in zip(examples, chosen, strict=True)
    ]
    inputs = torch.from_numpy(np.stack(rows).astype(np.float32))
    if not isinstance(examples[0].target, np.ndarray):
        return Batch(inputs, [example.target for example in examples], sum(lengths))
    targets = [
        [*example.target[start:stop].tolist(), *[-1] * (max(lengths) - (stop - start))]
        for example, (start, stop) in zip(examples, chosen, strict=True)
    ]
    return Batch(inputs, torch.tensor(targets, dtype=torch.int64), sum(lengths))
