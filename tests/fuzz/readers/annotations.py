"""Readers of lexicons, dictionaries, translations, predictions and whatever analyses read."""

from tests.fuzz.reader import Reader

READERS: list[Reader] = []
