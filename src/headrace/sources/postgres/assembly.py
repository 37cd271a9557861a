"""From the stream's messages to groups that the log can take, however large a transaction is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import psycopg

from headrace.change import Entry
from headrace.config import SourceConfig
from headrace.sources.postgres.connection import broke_off
from headrace.sources.postgres.events import Dated
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.spool import SpoolSpace, StreamedTransactions
from headrace.sources.postgres.stream import Stream

_PIECES = 4  # of a group that is made while it is taken: what is decoded is copied more than once


class Assembler:
    """Decoder and spools of one stream, and the rule of when a group is complete.

    Ordinary transactions gather to a group until they hold `max_bytes`, or for `linger` seconds while
    more comes. One that the server streamed joins them if it is small; else it is a group of its own,
    whose entries are made while the log takes them: never more than about `max_bytes` at a time.
    """

    def __init__(
        self,
        config: SourceConfig,
        builder: GroupBuilder,
        space: SpoolSpace,
        max_bytes: int,
        linger: float,
        after: int,
        check: Callable[[Sequence[Dated]], None],
    ) -> None:
        """Transactions with a commit up to the LSN `after` are in the log already; `check` looks at each
        before anything of it is given out."""
        self._url = config.url.reveal()
        self._builder = builder
        self._max_bytes = max_bytes
        self._linger = linger
        self._after = after
        self._check = check
        self._streamed = StreamedTransactions(space)
        self._decoder = Decoder(max_batch_bytes=max_bytes, spool=self._streamed)
        self._gathering_since: float | None = None

    def pump(self, stream: Stream) -> tuple[bool, bool]:
        """Take in what has arrived, see `Stream.pump`; to be followed by `groups`."""
        return stream.pump(self._decoder, self._max_bytes)

    def groups(self) -> Iterator[Iterable[Entry]]:
        """Yield the groups that are complete now, each to be taken to its end before the next is asked for.

        Raises MalformedMessage, SourceGap, and SourceUnavailable where a spool is full.
        """
        committed = self._streamed.take_committed()
        if committed and self._decoder.pending_bytes + committed.size <= self._max_bytes:
            committed.replay_whole(self._decoder)
            committed = None
        if committed or self._due():
            self._gathering_since = None
            transactions, events = self._decoder.take()
            self._check(transactions)
            yield from whole(self._url, self._builder.build(transactions, events, self._after))
        if committed:
            self._check([committed])
            pieces = committed.replay(self._decoder, self._max_bytes // _PIECES)
            yield from whole(self._url, self._builder.replay(committed, pieces, self._after))

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand that is to become a group."""
        return not self._decoder.pending_bytes and not self._decoder.in_transaction

    def pause(self, longest: float) -> float:
        """Return how many seconds, at most `longest`, nothing is due, if nothing arrives."""
        if self._gathering_since is None or self._decoder.in_transaction:
            return longest
        return min(longest, max(0.0, self._gathering_since + self._linger - time.monotonic()))

    def _due(self) -> bool:
        if not self._decoder.pending_bytes:
            return False
        now = time.monotonic()
        if self._gathering_since is None:
            self._gathering_since = now
        too_big = self._decoder.pending_bytes >= self._max_bytes
        return too_big or (now - self._gathering_since >= self._linger and not self._decoder.in_transaction)


def whole(url: str, entries: Iterable[Entry]) -> Iterator[Iterable[Entry]]:
    """Yield a group unless it is known to be empty; it is to be taken to its end.

    Its entries may be made as they are taken, far from here, which asks the source behind `url` for the
    names of types: then SourceUnavailable says that the connection broke.
    """
    if not entries:
        return
    group = _guarded(url, entries)
    yield group
    if next(group, None) is not None:
        raise RuntimeError("a group was not taken to its end")


def _guarded(url: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    try:
        yield from entries
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise broke_off(url, error) from error
