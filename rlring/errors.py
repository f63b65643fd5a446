"""The exception for errors that a user of the library can cause."""


class UsageError(ValueError):
    """Invalid arguments. The message says what is wrong, what was given and what to do."""


def shown(x: object) -> str:
    """Returns a value as text for an error message: its repr if it is a scalar, a string or None, else its type."""
    return repr(x) if isinstance(x, bool | int | float | str | None) else f"a {type(x).__name__}"
