"""The two ways in which a command ends badly; `__main__` makes them one line and an exit code."""


class UsageError(ValueError):
    """What was asked cannot be done (exit code 2): the message says what, where, what to do."""


class RunFailed(RuntimeError):
    """A run started and could not go on (exit code 1): the message says why and what is kept."""
