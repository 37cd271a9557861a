"""Every failure has a verdict and a remedy; this module is the one table of both.

    HeadraceError
    ├── UserError              the user can mend it by an edit or a command (exit code 2)
    │   ├── ConfigError        headrace.toml, or a value in it
    │   └── ModelError         a model file that does not parse, bind or fit
    ├── SourceError
    │   ├── SourceUnavailable  connection refused or lost: RETRY
    │   ├── SourceGap          changes we do not hold are gone from the source: the source stops
    │   └── MalformedMessage   bytes that are not what the protocol says
    ├── LogError
    │   ├── LogDamaged         a hash, an offset, an order or a page's checksum that does not hold
    │   ├── LogFull            no room on its disk: RETRY, and the source is not confirmed meanwhile
    │   ├── LogNotDurable      the system could not write it to the disk: capture stops
    │   ├── ConsumersUnknown   their file cannot be read: RETRY, and nothing is deleted meanwhile
    │   ├── LogTrimmed         entries that are asked for have been deleted by retention
    │   └── CursorLost         a consumer was too far behind, and the log was trimmed beyond it
    ├── DestinationError
    │   ├── DestinationUnavailable it cannot be reached, or does not answer in time: RETRY
    │   │   ├── DestinationBusy    another process holds it
    │   │   └── CommitUnknown      the connection broke in a commit: its progress tells
    │   └── ForeignDestination its progress belongs to another log: refused before anything is read
    ├── StateInUse             another process runs on this state folder
    └── ModelBroken            a model that cannot run at all: SUSPEND
        ├── BreakerTripped     too many of its changes fail one after another
        └── QuarantineFull     its records would be more than the quarantine may hold

Verdicts: RETRY, the world is broken and not the record; QUARANTINE, the record is broken; SUSPEND,
the model (or the source) is broken and stops alone. Each message says what happened, to what, and
`remedy` says what to do.
"""

from __future__ import annotations

import enum

RESYNC = (
    "Run `headrace resync {source}`: it copies every table again and repairs what differs, deletes included."
)
"""The remedy of every gap; `format` it with the source's name."""


class Verdict(enum.Enum):
    """What to do with a failure."""

    RETRY = "retry"
    QUARANTINE = "quarantine"
    SUSPEND = "suspend"


class HeadraceError(Exception):
    """A failure that Headrace understands.

    `remedy` is one sentence for the operator, or '' where there is nothing to do but wait.
    """

    verdict = Verdict.SUSPEND
    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def paragraph(self) -> str:
        """Message and remedy as one paragraph for a terminal."""
        return f"{self} {self.remedy}".strip()


class UserError(HeadraceError):
    """Something that the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """headrace.toml is not what it should be; the message lists every mistake at once."""


class ModelError(UserError):
    """A model file that does not parse, bind or fit its table."""


class SourceError(HeadraceError):
    """The source database refused, or is not what it was."""


class SourceUnavailable(SourceError):
    """The source cannot be reached now."""

    verdict = Verdict.RETRY


class SourceGap(SourceError):
    """Changes that the log does not hold are no longer to be had from the source."""


class MalformedMessage(SourceError):
    """Bytes from the source that the protocol does not allow; `what` is the fault without its place."""

    def __init__(self, message: str, remedy: str = "", what: str = "") -> None:
        super().__init__(message, remedy)
        self.what = what


class LogError(HeadraceError):
    """The log cannot be used."""


class LogDamaged(LogError):
    """The log's content is not what was written."""


class LogFull(LogError):
    """There is no room for more; nothing is confirmed to the source until there is."""

    verdict = Verdict.RETRY


class LogBusy(LogError):
    """Another process holds a file of the log for longer than it is waited for."""

    verdict = Verdict.RETRY


class LogNotDurable(LogError):
    """An fsync failed: what was written may not be on the disk, and trying again proves nothing."""


class ConsumersUnknown(LogError):
    """The file of the log's consumers cannot be read; what they may need is kept until it can be."""

    verdict = Verdict.RETRY


class LogTrimmed(LogError):
    """The log no longer holds what is asked for."""


class StagingBehind(LogTrimmed):
    """Staging lacks entries that retention has deleted; it goes on once every table has been copied again."""

    verdict = Verdict.RETRY


class CursorLost(LogTrimmed):
    """A consumer's next entries were deleted, since it held up more than `hold_max`."""


class DestinationError(HeadraceError):
    """The destination refused."""


class DestinationUnavailable(DestinationError):
    """The destination cannot be had now; it is waited for."""

    verdict = Verdict.RETRY


class DestinationBusy(DestinationUnavailable):
    """Another process holds the destination."""


class CommitUnknown(DestinationUnavailable):
    """The connection broke while a transaction was committed: it may or may not be."""


class ForeignDestination(DestinationError):
    """The destination's progress was written by another log, or by a copy of this one."""

    exit_code = 2


class StateInUse(UserError):
    """Another process runs on this state folder."""


class ModelBroken(HeadraceError):
    """The model called `model` cannot run: it is suspended, everything else goes on."""

    def __init__(self, model: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.model = model


class BreakerTripped(ModelBroken):
    """So many changes of a model fail that it is taken for broken."""


class QuarantineFull(ModelBroken):
    """The model's records would be more than the quarantine may hold: it waits, and none is dropped."""


_BY_NAME = {
    # DuckDB
    "OutOfMemoryException": Verdict.RETRY,
    "IOException": Verdict.RETRY,
    "FatalException": Verdict.RETRY,
    "TransactionException": Verdict.RETRY,
    "InterruptException": Verdict.RETRY,
    "ConversionException": Verdict.QUARANTINE,
    "OutOfRangeException": Verdict.QUARANTINE,
    "ConstraintException": Verdict.QUARANTINE,
    # SQLite
    "FullError": Verdict.RETRY,
    "IOError": Verdict.RETRY,
    "BusyError": Verdict.RETRY,
    "LockedError": Verdict.RETRY,
    "NoMemError": Verdict.RETRY,
    "CantOpenError": Verdict.RETRY,
    # Delta
    "CommitFailedError": Verdict.RETRY,
    "SchemaMismatchError": Verdict.SUSPEND,
    "DeltaProtocolError": Verdict.SUSPEND,
    "DeltaError": Verdict.RETRY,
    # Postgres drivers, where a broken connection has no SQLSTATE
    "OperationalError": Verdict.RETRY,
    "InterfaceError": Verdict.RETRY,
}
"""Verdicts of other libraries' errors by class name, so that judging one imports none of them."""
RETRY_SQLSTATES = ("08", "40", "53", "57", "58", "25006", "25P03", "25P04", "55006", "55P03")
"""Classes of faults that pass: connection, serialization, resources, operator, system; and by themselves a
server that only reads now, a transaction that took too long, what is in use, a lock waited for too long."""
_QUARANTINE_SQLSTATES = ("22", "23")


def verdict_of(error: BaseException) -> Verdict:
    """Judge any error.

    Those of `RETRY_SQLSTATES` and operating-system errors are infrastructure; classes 22 and 23 are the
    record's fault; other libraries' errors go by their class; what is unknown suspends.
    """
    if isinstance(error, HeadraceError):
        return error.verdict
    state = getattr(error, "sqlstate", None) or ""
    if state.startswith(RETRY_SQLSTATES) or isinstance(error, OSError | MemoryError):
        return Verdict.RETRY
    if state[:2] in _QUARANTINE_SQLSTATES:
        return Verdict.QUARANTINE
    if state:
        return Verdict.SUSPEND
    known = (_BY_NAME.get(kind.__name__) for kind in type(error).__mro__)
    return next((verdict for verdict in known if verdict is not None), Verdict.SUSPEND)
