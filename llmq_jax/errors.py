"""The one error type for bad input."""


class BadInput(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where, and what to do about it. Commands print it and exit with code 2.
    """
