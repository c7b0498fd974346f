"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """A mistake in the input, told in one line: what, where, what to do. Entry points print it and exit with 2."""
