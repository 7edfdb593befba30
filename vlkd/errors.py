"""The one exception that ends a command with a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what was found, what was expected and what to do.

    The command line prints the message alone and exits with code 2; every other exception is ours and exits with 1.
    """


class TooLong(UserError):
    """A text with more tokens than a model takes."""
