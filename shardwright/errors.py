"""Errors a user can cause. Each message says what is wrong and names the mend.

Every folder may import this module; it imports nothing.
"""


class ShardwrightError(Exception):
    """Base of all errors raised on purpose; the command line prints the message alone."""

    exit_code = 1


class UsageError(ShardwrightError):
    """A call or option that this version cannot serve."""

    exit_code = 2


class ConfigError(ShardwrightError):
    """A model configuration that is not fully supported; names the field."""


class CheckpointError(ShardwrightError):
    """A checkpoint that is missing, damaged or does not fit its configuration."""


class ShardingError(ShardwrightError):
    """A program or a placement that cannot be partitioned."""


class BuildError(ShardwrightError):
    """A tool or library that the build needs is missing or failed."""


class ArtifactError(ShardwrightError):
    """A built artefact that is missing, unfinished, damaged or of another version."""


class DeviceError(ShardwrightError):
    """The machine's devices do not fit the artefact."""


class WorkerError(ShardwrightError):
    """A worker process failed or died."""


class InputError(ShardwrightError):
    """A prompt or sampling option out of range."""
