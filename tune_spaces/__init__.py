"""Searches: spaces for every method, the stages that they are searched over, the command."""
