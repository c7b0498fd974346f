"""What the trials of a search share, kept once in Ray's object store (`raylib.shared`)."""

from collections.abc import Callable
from typing import Any

import ray


@ray.remote(num_cpus=0)
class _Shelf:
    """References by key. It owns the objects: they outlive the trial that made them."""

    def __init__(self):
        self.references: dict[str, ray.ObjectRef] = {}

    def find(self, key: str) -> ray.ObjectRef | None:
        return self.references.get(key)

    def keep(self, key: str, value: Any) -> ray.ObjectRef:
        return self.references.setdefault(key, ray.put(value))

    def keys(self) -> list[str]:
        return sorted(self.references)


class Shelf:
    """A `raylib.shared.Store` for as long as the search runs; it travels to trials as a handle. What a process has once had it
    keeps, for its next trial."""

    def __init__(self):
        self.actor = _Shelf.remote()
        self.here: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        return {"actor": self.actor, "here": {}}

    def fetch(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.here:
            found = ray.get(self.actor.find.remote(key))
            self.here[key] = make() if found is None else ray.get(found)
            if found is None:
                ray.get(self.actor.keep.remote(key, self.here[key]))
        return self.here[key]

    def keys(self) -> list[str]:
        """What is kept."""
        return ray.get(self.actor.keys.remote())
