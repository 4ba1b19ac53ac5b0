"""The two kinds of failure a user can cause; the command line turns them into one message and an
exit code.
"""


class XinslmError(ValueError):
    """Something went wrong that the message explains: what, where, what to do. Exit code 1."""


class UsageError(XinslmError):
    """The request itself is off: a flag, a configuration key, a path that must not or must exist.
    Exit code 2.
    """


class Interrupted(XinslmError):
    """The run was stopped by Ctrl-C or a termination signal, after a checkpoint. Exit code 130."""
