"""Ray, or the sentence that says how to get it."""

from __future__ import annotations

try:
    import ray
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "asynchronous training needs ray: pip install 'quadric[async]'", name=missing.name
    ) from missing


def forget_token() -> None:
    """Has Ray read its token again: it keeps the first that a process has seen."""
    AuthenticationTokenLoader.instance().reset_cache()


__all__ = ["ActorUnavailableError", "RayActorError", "RayTaskError", "forget_token", "ray"]
