"""What Ray actors answer, and the way to shards that are actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from quadric.parallel.engine import ActorUnavailableError, RayError, RayTaskError, ray
from quadric.parallel.exchange import Answer, Push
from quadric.parallel.worker import Link

logger = logging.getLogger(__name__)

SILENT_SECONDS = 60.0
"""Where nothing was heard for as long, a person is told."""


def heard(call: Callable[[], Any], *, seconds: float = 300.0) -> Any:
    """The answer of an actor that may be about to be started again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = call()
            if not ray.wait([answer], timeout=SILENT_SECONDS)[0]:
                logger.warning("a shard has not answered for %.0f s: its process may be stopped", SILENT_SECONDS)
            return got(answer)
        except ActorUnavailableError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"a shard has not come back in {seconds:.0f} s: {error}") from error
            time.sleep(0.05)
        except RayError as error:
            raise RuntimeError(f"a shard is lost: {error}") from error


def got(answer: Any) -> Any:
    """What an actor has answered.

    Raises:
        ValueError: what it was given was faulty, as it says.
        RuntimeError: it failed in another way.
    """
    try:
        return ray.get(answer)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise RuntimeError(f"{error.function_name} failed ({type(error.cause).__name__}: {error.cause})") from error


class ActorLink(Link):
    """The way to shards that are actors: all at once, and again where one is started anew."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = shards

    def pull(self) -> list[Answer]:
        return self._all([shard.pull.remote for shard in self._shards])

    def push(self, pushes: Sequence[Push]) -> list[Answer]:
        return self._all([partial(s.push.remote, push) for s, push in zip(self._shards, pushes, strict=True)])

    def _all(self, calls: Sequence[Callable[[], Any]]) -> list[Answer]:
        answers = []
        for call, made in [(call, call()) for call in calls]:
            try:
                answers.append(got(made))
            except ActorUnavailableError:
                answers.append(heard(call))
        return answers
