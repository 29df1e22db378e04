"""Ray, or the sentence that says how to get it."""

from __future__ import annotations

try:
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "asynchronous training needs ray: pip install 'quadric[async]'", name=missing.name
    ) from missing

__all__ = ["ActorUnavailableError", "RayActorError", "RayTaskError", "ray"]
