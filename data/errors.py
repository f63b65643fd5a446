"""The one exception a user of the data package can cause."""


class DataError(ValueError):
    """Data or arguments that cannot work: the message says what is wrong, what we got and what to do."""
