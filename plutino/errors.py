"""Every error a person can cause or meet.

    PlutinoError
    ├── ConfigError            a job spec or an option is wrong
    │   └── DataError          a data file or one of its rows is wrong
    ├── ModelError             the base model cannot be used (unknown family, missing tensor, no safetensors)
    │   └── QuantizationError      a scheme cannot hold a weight, or packed tensors are not what they should be
    ├── PlanError
    │   └── InfeasiblePlanError    the job does not fit the devices
    │       └── UnmeasuredError        those that could be measured
    ├── WireError
    │   ├── FrameError         a frame is corrupted, truncated, oversized or malformed
    │   ├── StaleFrameError    a frame belongs to an older plan epoch or another job
    │   └── PeerLostError      a data stream to a peer broke and did not come back
    ├── AgentError
    │   ├── AgentLostError     a device left
    │   └── OutOfMemoryError   a worker passed its memory budget
    ├── JobError
    │   ├── UnknownJobError
    │   ├── InvalidTransitionError
    │   └── NumericsError      a loss or a gradient is not finite, or a batch carries no label
    ├── ExportError            an adapter failed its verification and was not published
    ├── SecurityError          something would have been exposed
    └── StoreError             the coordinator's database is in use, damaged, or refuses a write

A message says what happened, with the numbers, and the way out.
"""

from __future__ import annotations


class PlutinoError(Exception):
    """Base of all errors of plutino; its text is meant for the person who can mend the cause."""

    exit_code = 1


class ConfigError(PlutinoError):
    """A job spec, an option or a file name is wrong."""

    exit_code = 2


class DataError(ConfigError):
    """A data file cannot be read, or rows of it cannot be used."""


class ModelError(PlutinoError):
    """The base model cannot be used."""

    exit_code = 3


class QuantizationError(ModelError):
    """A quantisation scheme cannot hold a weight, or packed tensors are not those of one."""


class PlanError(PlutinoError):
    """No plan could be made."""

    exit_code = 4


class InfeasiblePlanError(PlanError):
    """The job does not fit the devices that are in."""


class UnmeasuredError(InfeasiblePlanError):
    """The job does not fit the devices that could be measured; others could not, beside other jobs for instance."""


class WireError(PlutinoError):
    """A message between processes cannot be used."""

    exit_code = 5


class FrameError(WireError):
    """A data frame is corrupted, truncated, oversized or malformed."""


class StaleFrameError(WireError):
    """A data frame belongs to another job, an older plan epoch or a finished unit."""


class PeerLostError(WireError):
    """The data stream to a peer broke and could not be set up again in time."""


class AgentError(PlutinoError):
    """A device cannot do what it was asked."""

    exit_code = 6


class AgentLostError(AgentError):
    """A device or one of its workers went away."""


class OutOfMemoryError(AgentError):
    """A worker needed more memory than its budget."""


class JobError(PlutinoError):
    """A job cannot go on, or cannot do what was asked of it."""

    exit_code = 7


class UnknownJobError(JobError):
    """No job has this id."""


class InvalidTransitionError(JobError):
    """The job's state does not allow this."""


class ActivationCacheError(JobError):
    """Entries of the activation cache are gone or damaged where nothing can be computed anew."""


class NumericsError(JobError):
    """A loss or a gradient is not finite, or a batch carries no label token."""


class ExportError(PlutinoError):
    """An adapter failed its verification; nothing was published."""

    exit_code = 8


class SecurityError(PlutinoError):
    """Refused because it would expose the coordinator or a device."""

    exit_code = 9


class UnreachableError(PlutinoError):
    """The coordinator does not answer."""

    exit_code = 10


class StoreError(PlutinoError):
    """The coordinator's database is in use, damaged, or refuses a write."""

    exit_code = 11
