"""All readers of the product, by name."""

from tests.fuzz.reader import Reader
from tests.fuzz.readers import (
    annotations,
    corpora,
    folders,
    formats,
    runs,
    shards,
    state,
    stored,
    stores,
    weights,
)

AREAS = (state, runs, stored, weights, stores, folders, formats, annotations, corpora, shards)
READERS: dict[str, Reader] = {reader.name: reader for area in AREAS for reader in area.READERS}
assert len(READERS) == sum(len(area.READERS) for area in AREAS), "two readers of one name"
