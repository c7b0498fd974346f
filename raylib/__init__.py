"""All that the stages share."""

__version__ = "0.1.0"
