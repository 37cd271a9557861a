from collections.abc import Container
from typing import Self, final

import numpy as np
import pyarrow as pa
from _typeshed import ReadableBuffer

from headrace.sources.postgres.events import Event as Event
from headrace.sources.postgres.events import Message as Message
from headrace.sources.postgres.events import Relation as Relation
from headrace.sources.postgres.events import RelationColumn as RelationColumn
from headrace.sources.postgres.events import RelationSeen as RelationSeen
from headrace.sources.postgres.events import Rows as Rows
from headrace.sources.postgres.events import Transaction as Transaction
from headrace.sources.postgres.events import Truncate as Truncate
from headrace.sources.postgres.spool import StreamedTransactions

@final
class Decoder:
    def __new__(
        cls,
        max_batch_rows: int = 65536,
        max_batch_bytes: int = 16 << 20,
        spool: StreamedTransactions | None = None,
    ) -> Self: ...
    @property
    def in_transaction(self) -> bool: ...
    @property
    def pending_rows(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    def push(self, message: ReadableBuffer, lsn: int = 0) -> bool: ...
    def push_data(self, data: ReadableBuffer) -> bool: ...
    def replay(self, frames: bytes, start: int, aborted: Container[int], max_bytes: int) -> int: ...
    def push_many(
        self, messages: pa.BinaryArray, lsns: np.ndarray, start: int = 0, max_pending_bytes: int = ...
    ) -> int: ...
    def take(self) -> tuple[list[Transaction], list[Event]]: ...
