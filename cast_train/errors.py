"""What a user, a file or a run can cause -> the errors of `cast-train`, beside cast_serve's.

    CastError                    one line on stderr, without a traceback
    |- UsageError (ValueError)   exit 2: an option, a setting or a file is wrong
    |  `- NotFiniteError         what a model computes is Inf or NaN
    `- FailedError (RuntimeError)  exit 1
       |- DivergedError          further steps would only overwrite good checkpoints
       `- StoppedError           exit 130: the run was asked to stop, and is saved

Any other exception is a fault of ours, and is shown with its traceback.
"""

from cast_serve.errors import FailedError, UsageError


class NotFiniteError(UsageError):
    """What a model computes is Inf or NaN."""


class DivergedError(FailedError):
    """The loss is not finite; further steps would only overwrite good checkpoints."""


class StoppedError(FailedError):
    """The run was asked to stop, and did; what it had learnt is saved."""
