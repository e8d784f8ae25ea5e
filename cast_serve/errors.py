"""Everything that a user, a file or the machine can cause, and the command's exit code.

    CastError                      one line on stderr, without a traceback
    |- UsageError (ValueError)     exit 2: an option, a variable or a file is wrong
    |  |- CheckpointError          a directory cannot be read, or must not be overwritten
    |  `- PatternError             weights are not N:M, or cannot be
    `- FailedError (RuntimeError)  exit 1: what was asked for was right and did not succeed
       |- KernelBuildError         the kernels cannot be compiled or loaded
       |- PushError                a directory is written, but did not reach the hub
       |- VariantError             a worker that the gateway started has ended for good
       `- RollError                the new worker did not come up; the old one serves on

Any other exception is a bug, and shows its traceback (exit 1). What clients see
is not here but in gateway/api/errors.py; functions that a program calls, such as the kernels, raise
ValueError and TypeError where their arguments do not belong together.
"""


class CastError(Exception):
    """A cause outside this program; the message names it, its limit and the remedy."""


class UsageError(CastError, ValueError):
    """An option, a variable of the environment or a file is wrong."""


class CheckpointError(UsageError):
    """A directory is not a checkpoint that can be read, or must not be overwritten."""


class PatternError(UsageError):
    """Weights are not N:M, or cannot be; or the pattern itself is invalid."""


class FailedError(CastError, RuntimeError):
    """What was asked for was right, and did not succeed."""


class KernelBuildError(FailedError):
    """The kernels cannot be compiled or loaded."""


class PushError(FailedError):
    """A directory is written, but could not be pushed to the hub."""


class VariantError(FailedError):
    """A worker that the gateway started has ended for good."""


class RollError(FailedError):
    """The new worker did not come up; the old one serves on."""
