"""Readers of official annotation files: generators that stream. `stream` has what they share."""
