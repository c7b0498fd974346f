"""What the trials of a search share, kept once in Ray's object store (`raylib.cache`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_here: dict[
    tuple[str, str], Any
] = {}  # what this process had from a shelf: its next trial need not unpack it again


@ray.remote(num_cpus=0)
class _Shelf:
    """References by key. It owns the objects: they outlive the trial that made them."""

    def __init__(self):
        self.references: dict[str, ray.ObjectRef] = {}

    def find(self, key: str) -> ray.ObjectRef | None:
        return self.references.get(key)

    def keep(self, key: str, value: Any) -> ray.ObjectRef:
        return self.references.setdefault(key, ray.put(value))


class Shelf:
    """A `raylib.cache.Store` for as long as the search runs, on its driver's node; it travels to trials as a
    handle."""

    def __init__(self, folder: Path):
        self.folder = folder
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.actor = _Shelf.options(scheduling_strategy=here).remote()

    def fetch(self, key: str, make: Callable[[], Any]) -> Any:
        known = (self.actor._actor_id.hex(), key)
        if known not in _here:
            for old in [other for other in _here if other[0] != known[0]]:
                del _here[old]  # an earlier search's
            _here[known] = self._from_there(key, make)
        return _here[known]

    def _from_there(self, key: str, make: Callable[[], Any]) -> Any:
        try:
            if (found := ray.get(self.actor.find.remote(key))) is not None:
                return ray.get(found)
            made = make()
            ray.get(self.actor.keep.remote(key, made))
            return made
        except (RayActorError, ObjectLostError):  # with its node; what it held can be made again
            return make()
