"""From shards to batches: the on-disk format (`shards`), reading it (`source`), bringing it here (`fetch`),
the order of samples (`lanes`), pictures (`images`), loader processes (`loading`)."""
