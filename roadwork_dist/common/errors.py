"""Errors that the user can fix. The command line prints their text without a traceback."""


class RoadworkError(Exception):
    """Base class of every error that the user, not the library, has to fix.

    The message is one clear line: what was got, what was expected, what to do.
    """


class ConfigError(RoadworkError):
    """A value of the configuration cannot be used."""


class DataError(RoadworkError):
    """A table, a row or a photo cannot be used."""


class BackboneError(RoadworkError):
    """A backbone or an encoder cannot be loaded."""


class CheckpointError(RoadworkError):
    """A checkpoint cannot be written, or no checkpoint can be read."""


class NonFiniteLossError(RoadworkError):
    """The loss or its gradient was not finite for too many steps in a row."""


class LossSpikeError(RoadworkError):
    """The loss rose far above its earlier level."""


class InterruptedRunError(RoadworkError):
    """The run was asked to stop and has saved its state; starting it again resumes it."""


class RunLockedError(RoadworkError):
    """Another run is using the run folder."""


class LoaderWorkerError(RoadworkError):
    """A loader process was killed."""


class LostPeerError(RoadworkError):
    """Another rank has ended, so this one cannot continue."""


class MissingDependencyError(RoadworkError, ImportError):
    """An optional package is not installed."""
