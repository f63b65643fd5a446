"""The one exception a user of the library can cause."""


class UsageError(ValueError):
    """Arguments that cannot work: the message says what is wrong, what we got and what to do."""


def shown(x: object) -> str:
    """Returns what was given, as an error names it: a small value itself, of anything else its type."""
    return repr(x) if isinstance(x, bool | int | float | str | None) else f"a {type(x).__name__}"
