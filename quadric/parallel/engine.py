"""Ray, asking for tokens, or the sentence that says how to get it.

Ray reads whether it asks for tokens when it is imported, so that this is settled here, before.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")

try:
    import ray
    from ray import cloudpickle
    from ray._private import ray_constants
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


def check_mode() -> None:
    """Refuses a Ray that was imported before, and told to let in whoever comes."""
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        raise ValueError(
            "RAY_AUTH_MODE was not token when ray was imported: import quadric.parallel.cluster before ray, or set it"
        )


def stay_on_loopback() -> None:
    """Does in this process what ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` does where it is set before Ray is imported."""
    ray_constants.ENABLE_RAY_CLUSTER = False


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
