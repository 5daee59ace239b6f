"""What can go wrong for a user, each with the exit code a script can rely on.

Such an error is one line: the thing, its value, what to do. Where several keys of a file do not exist, a line a key
follows. The command prints it on standard error without a traceback. A broken promise of the program itself is an
`assert`, never one of these.
"""


class DpoError(Exception):
    """A mistake or mishap that the user can act on; `exit_code` is what the command ends with."""

    exit_code = 1
    details: tuple[str, ...] = ()  # further lines
    told: bool | None = None  # whether another process of the run says it; None: the ranks have not met


class ConfigError(DpoError):
    """The command line or a YAML file asks for something that does not exist or cannot work."""

    exit_code = 2


class UnknownKeyError(ConfigError):
    """A key that does not exist."""


class DataError(DpoError):
    """Preference data is missing, malformed, or leaves nothing to train on."""

    exit_code = 3


class CheckpointError(DpoError):
    """A checkpoint, adapter or model is missing, damaged, or does not fit this run."""

    exit_code = 4


class DivergedError(DpoError):
    """Loss or gradient is no longer finite, or the monitor has stopped a run that ruins its model."""

    exit_code = 5


class OutOfMemoryError(DpoError):
    """The device cannot hold the run."""

    exit_code = 6


class StorageError(DpoError):
    """The run directory cannot be written."""

    exit_code = 7


class StoppedError(DpoError):
    """A signal stopped the run, and what was done is saved: run again with resume=auto to continue."""

    exit_code = 75


class InterruptedByUserError(StoppedError):
    """Ctrl-C stopped the run after a checkpoint was saved."""

    exit_code = 130


class LostRankError(StoppedError):
    """A process of a run on several is gone, and the others cannot continue without it."""
