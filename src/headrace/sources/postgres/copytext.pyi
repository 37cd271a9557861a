from collections.abc import Iterable
from typing import Self, final

import pyarrow as pa
from _typeshed import ReadableBuffer

MAX_BATCH_BYTES: int

@final
class TextReader:
    def __new__(cls, names: Iterable[str], max_bytes: int = ...) -> Self: ...
    def read(self, connection: int, get_copy_data: int, free_memory: int) -> tuple[bool, int]: ...
    def push(self, row: ReadableBuffer) -> bool: ...
    def take(self) -> pa.RecordBatch | None: ...
