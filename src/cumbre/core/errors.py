"""The one exception tree.

::

    CumbreError
    ├── UserError               bad input of a person: says what was expected and what to do
    │   ├── ConfigurationError  a key of a site or instrument file
    │   └── NotFoundError       asked for something that is not there
    ├── ConflictError           the same id with other content
    ├── TransientError          try again later (network, lock, full queue)
    │   └── DeadlineError       a wait that ran out
    ├── UnprocessableDataError  these data will never work: record the outcome, go on with the next
    │   ├── BadFileError        a file that is not what it claims: goes to quarantine
    │   └── NoWorkFoundError    nothing to do for these data (no template, no stars)
    └── FatalError              do not retry; the process must stop

The outcome words follow ``lsst.pipe.base`` (NoWorkFound, UnprocessableData, RepeatableQuantumError).
"""

from __future__ import annotations


class CumbreError(Exception):
    """Root of all errors that cumbre raises on purpose."""

    outcome = "Failed"
    exit_code = 1


class UserError(CumbreError):
    """Bad input of a person; the message says what was expected and what to do."""

    outcome = "UserError"
    exit_code = 2


class ConfigurationError(UserError):
    """A key of a configuration file is wrong; the message names file, key, value and expectation."""

    outcome = "ConfigurationError"


class NotFoundError(UserError):
    """Something asked for is not there."""

    outcome = "NotFound"
    exit_code = 3


class ConflictError(CumbreError):
    """The same identifier arrived with other content; the first one is kept."""

    outcome = "Conflict"


class TransientError(CumbreError):
    """A passing fault: the same call may succeed later."""

    outcome = "Transient"


class DeadlineError(TransientError):
    """A wait ran out."""

    outcome = "Deadline"


class UnprocessableDataError(CumbreError):
    """These data can never be processed; retrying gives the same answer."""

    outcome = "UnprocessableData"


class BadFileError(UnprocessableDataError):
    """A file is not what it claims to be (truncated, wrong checksum, missing keywords)."""

    outcome = "BadFile"


class NoWorkFoundError(UnprocessableDataError):
    """Nothing to do for these data, and that is not a failure."""

    outcome = "NoWorkFound"


class FatalError(CumbreError):
    """Do not retry; the process must stop."""

    outcome = "Fatal"
