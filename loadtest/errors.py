"""What a user, a file or a server can cause -> an exception, and the exit code of `cast-loadtest`.

    UsageError (ValueError)        exit 2: an option or a file is wrong
    |- UnreachableError            the server cannot be asked for its variants
    `- QualityError                the server is not one that can be asked for quality
    FailedError (RuntimeError)     exit 1: what was asked for was right and did not succeed
    |- LaunchError                 the servers did not start
    `- RecordError                 a record cannot be written

Any other exception is a fault of ours: it shows its traceback and exits with 1. What becomes of a
single request is not here but a class of error in its record (send/client.py).
"""

from cast_serve.errors import FailedError, UsageError

__all__ = ["FailedError", "LaunchError", "QualityError", "RecordError", "UnreachableError"]
__all__ += ["UsageError"]


class UnreachableError(UsageError):
    """The server cannot be asked for its variants."""


class QualityError(UsageError):
    """Quality cannot be measured: the server is not one that can be asked for it."""


class LaunchError(FailedError):
    """The servers did not start."""


class RecordError(FailedError):
    """A record cannot be written."""
