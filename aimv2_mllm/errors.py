"""The two ways in which a command ends badly; `__main__` turns them into one line and an exit code."""


class UsageError(ValueError):
    """What was asked cannot be done (exit code 2): the message says what, where, and what to do instead."""


class RunFailed(RuntimeError):
    """A run started and could not go on (exit code 1): the message says why and what is kept."""
