"""Whether a destination belongs to a log: what it holds must be what the log says."""

from __future__ import annotations

from headrace.errors import ForeignDestination
from headrace.lane import Lane


def check_destination(lane: Lane) -> None:
    """Refuse a destination whose progress is not of this log.

    Raises ForeignDestination with the remedy, DestinationBusy while another process holds it.
    """
    progress = lane.destination.progress(lane.config.name)
    if progress is None:
        return
    if progress.log_id != lane.log.id:
        raise lane.destination.foreign(lane.config.name)
    mark = lane.log.mark(progress.offset)
    begin = lane.log.begin().offset
    if mark is None and progress.offset < begin:
        raise ForeignDestination(
            f"{lane.destination.name} holds offset {progress.offset} of this log, which begins behind "
            f"offset {begin} by now: it is an older copy, and what it holds cannot be compared any more.",
            f"To have it built from staging, {lane.destination.fresh}.",
        )
    if mark is None or mark.hash != progress.hash:
        raise ForeignDestination(
            f"{lane.destination.name} holds offset {progress.offset} of this log, but the log here ends "
            f"at {lane.log.end().offset} or differs there: the state folder is an older copy.",
            f"Restore the newest state folder, or {lane.destination.fresh}.",
        )
