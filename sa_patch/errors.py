"""The one exception class for mistakes a user can mend."""


class UserError(ValueError):
    """A request that cannot be served, explained in one sentence.

    The message says what was wrong, what is allowed and what to do. The command line prints it
    without a traceback and exits with status 2; in a notebook it is an ordinary ``ValueError``.
    """
