"""The exception for errors that a user of the data package can cause."""


class DataError(ValueError):
    """Invalid data or arguments. The message says what is wrong, what was given and what to do."""
