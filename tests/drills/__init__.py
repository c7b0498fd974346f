"""Drills: what is broken on purpose, a row each. `make drills` runs them all: `python -m tests.drills`."""
