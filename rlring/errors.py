"""The one exception a user of the library can cause."""


class UsageError(ValueError):
    """Arguments that cannot work: the message says what is wrong, what we got and what to do."""
