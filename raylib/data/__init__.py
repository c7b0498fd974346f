"""From shards to batches: the on-disk format (`shards`, `tars`), reading it (`sources`), bringing it here
(`fetch`), images (`images`), the order of samples and loader processes (`loading`)."""
