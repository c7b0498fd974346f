"""The object cache of a search (`raylib.cache.ObjectCache`) in Ray's object store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# {(cache's actor, key): object} that this process has unpacked: its next trial need not unpack it again
_unpacked: dict[tuple[str, str], Any] = {}


@ray.remote(num_cpus=0)
class _ReferenceTable:
    """Object references by key. An object lives as long as its owner, so this actor, and not the trial that
    created it, puts it into the store: trials end long before the search does."""

    def __init__(self):
        self.references: dict[str, ray.ObjectRef] = {}

    def get(self, key: str) -> ray.ObjectRef | None:
        return self.references.get(key)

    def put(self, key: str, value: Any) -> None:
        self.references.setdefault(key, ray.put(value))


class RayObjectCache:
    """Objects in Ray's object store, for as long as the search runs, owned on its driver's node. It is
    pickled to trials as a handle of the actor that holds the references."""

    def __init__(self, folder: Path):
        self.folder = folder
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        table: Any = _ReferenceTable  # a class of Ray's since its decorator
        self.actor = table.options(scheduling_strategy=driver_node).remote()

    def get_or_create(self, key: str, fn: Callable[[], Any]) -> Any:
        """Return the object stored under `key`; if there is none, store `fn()` and return it."""
        actor = self.actor._actor_id.hex()
        if (actor, key) not in _unpacked:
            for other in [other for other in _unpacked if other[0] != actor]:
                del _unpacked[other]  # an earlier search's, in a process that Ray uses again
            _unpacked[actor, key] = self._fetch(key, fn)
        return _unpacked[actor, key]

    def _fetch(self, key: str, fn: Callable[[], Any]) -> Any:
        try:
            reference = ray.get(self.actor.get.remote(key))
            if reference is not None:
                return ray.get(reference)
            value = fn()
            ray.get(self.actor.put.remote(key, value))
            return value
        except (RayActorError, ObjectLostError):
            # lost with its node; whatever is cached follows from its key, so every trial can make its own
            return fn()
