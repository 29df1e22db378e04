"""Ray, asking for tokens, or the sentence that says how to get it.

Ray reads whether it asks for tokens when it is imported, so that this is settled here, before.
"""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

os.environ.setdefault("RAY_AUTH_MODE", "token")

try:
    import ray
    from ray import cloudpickle
    from ray._private import ray_constants, worker
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationMode,
        AuthenticationTokenLoader,
        get_authentication_mode,
    )
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "asynchronous training needs ray: pip install 'quadric[async]'", name=missing.name
    ) from missing


_BEYOND_LOOPBACK = ray_constants.ENABLE_RAY_CLUSTER
_print = worker.print_to_stdstream


def _print_all_but_raylets(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """What a raylet has to say of every process that ends is for the log: on the output it stands among results."""
    if data.get("pid") == "raylet":
        logger.debug("%s", data.get("lines"))
    else:
        _print(data, *args, **kwargs)


worker.print_to_stdstream = _print_all_but_raylets


def check_mode() -> None:
    """Refuses a Ray that was imported before, and told to let in whoever comes."""
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        raise ValueError(
            "RAY_AUTH_MODE was not token when ray was imported: set it to token or leave it out (a program that "
            "imports ray itself imports quadric.parallel.cluster before)"
        )


def stay_on_loopback(on: bool = True) -> None:
    """Does in this process what ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` does where it is set before Ray is imported."""
    ray_constants.ENABLE_RAY_CLUSTER = _BEYOND_LOOPBACK and not on


def forget_token() -> None:
    """Has Ray read its token again: it keeps the first that a process has seen."""
    AuthenticationTokenLoader.instance().reset_cache()


__all__ = [
    "ActorUnavailableError",
    "RayError",
    "RayTaskError",
    "check_mode",
    "cloudpickle",
    "forget_token",
    "ray",
    "stay_on_loopback",
]
