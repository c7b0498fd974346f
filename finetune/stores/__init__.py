"""Images and region features: read by id, in any order, from any process."""
