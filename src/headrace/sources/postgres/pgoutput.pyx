# cython: boundscheck=False, wraparound=False, cdivision=True
"""pgoutput, the protocol of Postgres' logical replication, decoded into Arrow columns of text.

Versions 1 to 4 of the protocol, text format; see "Logical Replication Message Formats" in the Postgres
manual. Integers are big-endian, `name:4` is a field of four bytes, `s` a string that ends with NUL:

    B begin     commit_lsn:8 committed_at:8 xid:4
    C commit    flags:1 commit_lsn:8 end_lsn:8 committed_at:8
    O origin    lsn:8 name:s
    R relation  id:4 schema:s name:s replica_identity:1 n:2 (flags:1 name:s type:4 modifier:4) * n
    Y type      id:4 schema:s name:s
    I insert    id:4 'N' tuple
    U update    id:4 ['K' tuple | 'O' tuple] 'N' tuple
    D delete    id:4 ('K' tuple | 'O' tuple)
    T truncate  n:4 options:1 (id:4) * n
    M message   flags:1 lsn:8 prefix:s length:4 byte * length
    tuple       n:2 ('n' | 'u' | 't' length:4 byte * length) * n

From version 2 on a large transaction comes in blocks, before it commits and between others:

    S start     xid:4 first:1, whether it is the transaction's first block
    E stop
    c commit    xid:4 flags:1 commit_lsn:8 end_lsn:8 committed_at:8
    A abort     xid:4 subxid:4 [lsn:8 aborted_at:8], of a subtransaction if the two differ

In a block R, Y, I, U, D, T and M have the (sub)transaction's xid:4 behind their kind. What a block
holds is not decoded but kept, framed `lsn:8 xid:4 length:4 message` in the machine's byte order, until
`replay` brings it back. `b`, `P`, `K`, `r` and `p` belong to `two_phase`, which is never asked for.

What a message does not hold is where in the WAL its change stands: the server says that beside it. In a
stream it stands in what wraps the message, XLogData:

    w XLogData  start:8 end:8 sent_at:8 message

A message is read to its last byte before anything of it is kept, and every read is checked against
its end. So one that is malformed can be put aside as it came, and what follows it be decoded: see
`Decoder`. No Python object is made for a row: its text goes from the message into the memory that
Arrow later adopts.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from libc.stdint cimport INT32_MAX, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from copy import copy

from headrace.errors import MalformedMessage
from headrace.sources.postgres.events import (
    MALFORMED, Event, Malformed, Message, Relation, RelationColumn, RelationSeen, Rows, Transaction,
    Truncate,
)

include "columns.pxi"

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

OP_OF = {"I": "c", "U": "u", "D": "d", "T": "t"}
POSTGRES_EPOCH = 946_684_800_000_000  # 2000-01-01 in microseconds since 1970
REMEDY = "Restart the source; if it happens again, check what stands between Headrace and the server."

cdef enum:
    RECENT_TABLES = 1024  # slots that find a table by its id without making a Python int
    ROW_BYTES = 32  # what operation, serial, ordinal and LSN of a row weigh
    EVENT_BYTES = 128  # what an event without rows, or a transaction, weighs; so that all is counted
    FRAME_HEAD = 16  # bytes before a kept message: its LSN, its xid, its length
    WRAPPED = 25  # bytes before the message in an XLogData
    NOWHERE = -1  # the LSN of a message before its XLogData is read
    TAIL_BYTES = 1 << 20  # what is kept of one streamed transaction before the spool takes it over


cdef struct Wire:
    const uint8_t* start
    const uint8_t* at
    const uint8_t* end


cdef int fault(Wire* wire, str what) except -1:
    """Raise MalformedMessage: names the message's kind and the byte that reading had reached."""
    kind = ascii(chr(wire.start[0])) if wire.end > wire.start else "of no length"
    raise MalformedMessage(
        f"pgoutput message {kind} is malformed at byte {wire.at - wire.start}: {what}.", REMEDY, what
    )


cdef inline int need(Wire* wire, Py_ssize_t count) except -1:
    if wire.end - wire.at < count:
        fault(wire, "it ends too early")
    return 0


cdef inline int finish(Wire* wire) except -1:
    if wire.at != wire.end:
        fault(wire, "bytes follow its end")
    return 0


cdef inline uint64_t integer(Wire* wire, int width) except? 0xFFFF_FFFF_FFFF_FFFF:
    """Read an integer of `width` bytes; the caller's cast to the width's type gives it its sign."""
    cdef uint64_t value = 0
    cdef int i
    need(wire, width)
    for i in range(width):
        value = value << 8 | wire.at[i]
    wire.at += width
    return value


cdef inline int32_t length(Wire* wire) except -1:
    """Read a number of bytes, all of which follow."""
    cdef int32_t count = <int32_t> integer(wire, 4)
    if count < 0:
        fault(wire, "a length is negative")
    need(wire, count)
    return count


cdef str string(Wire* wire):
    """Read text up to its NUL."""
    cdef const uint8_t* text = wire.at
    cdef const uint8_t* nul = <const uint8_t*> memchr(text, 0, wire.end - text)
    if nul == NULL:
        fault(wire, "a string has no end")
    try:
        decoded = text[:nul - text].decode("utf-8")
    except UnicodeDecodeError:
        decoded = None
    if decoded is None:  # raised out here: the other error would show the bytes
        fault(wire, "a string is not UTF-8")
    wire.at = nul + 1
    return decoded


cdef int read_tuple(Wire* wire, Cell* cells, Py_ssize_t width) except -1:
    """Point `width` cells into the message; whether one of them is unchanged."""
    cdef int16_t count = <int16_t> integer(wire, 2)
    cdef Py_ssize_t i
    cdef Cell* cell
    cdef bint unchanged = False
    if count != width:
        fault(wire, f"a tuple of {count} columns, where the relation has {width}")
    for i in range(width):
        cell = &cells[i]
        cell.kind = <char> integer(wire, 1)
        cell.length = 0
        if cell.kind == c"t":
            cell.length = length(wire)
            cell.text = wire.at
            wire.at += cell.length
        elif cell.kind == c"u":
            unchanged = True
        elif cell.kind != c"n":
            fault(wire, "a cell is neither text nor null nor unchanged")
    return unchanged


cdef int append_frame(
    bytearray tail, int64_t lsn, uint32_t xid, char kind, const uint8_t* body, Py_ssize_t size
) except -1:
    """Add a message to `tail` as `Decoder.replay` reads it."""
    cdef Py_ssize_t at = PyByteArray_GET_SIZE(tail)
    cdef uint32_t length = <uint32_t> size + 1
    cdef char* frame
    PyByteArray_Resize(tail, at + FRAME_HEAD + length)
    frame = PyByteArray_AS_STRING(tail) + at
    memcpy(frame, &lsn, 8)
    memcpy(frame + 8, &xid, 4)
    memcpy(frame + 12, &length, 4)
    frame[FRAME_HEAD] = kind
    memcpy(frame + FRAME_HEAD + 1, body, size)
    return 0


cdef object batch_of(list aside):
    """Return what was put aside as Arrow."""
    columns = zip(MALFORMED, zip(*aside))
    return pa.RecordBatch.from_arrays(
        [pa.array(cells, field.type) for field, cells in columns], schema=MALFORMED
    )


@cython.final
cdef class Decoder:
    """Turns pgoutput messages into transactions and events.

    A transaction has a serial (0, 1, 2, … for the decoder's life), an event inside it an ordinal
    (from 1: each row, truncate message and logical message). The columns of `Rows.batch`:

        _op         string                'c', 'u' or 'd'
        _serial     int64
        _ordinal    int64
        _lsn        int64                 where its change stands in the WAL, as the server said it
        …           string                the relation's columns in its order; found by position, since
                                          a source column may have any name. Null is also what is
                                          unchanged, or absent from the key that a delete carries
        _unchanged  list<string>          columns whose value the row does not tell, as they did not
                                          change; null if none; there only if some row has any
        _before     map<string, string>   an update's old tuple, its key ('K') or the whole ('O'); null
                                          without one; there only if some row has one

    A cell that is unchanged in the new tuple has its value from the old tuple, if that tells it.

    Rows of one relation stay in order; its open batch is closed when it reaches `max_batch_rows` rows
    or `max_batch_bytes` bytes of Arrow data (before it would pass 2 GiB - 1), when the relation is
    truncated, changes or loses its name to another, and by `take`. Batches of different relations
    interleave in the order of their closing.

    Streamed transactions go to `spool` (see `spool.StreamedTransactions`); without one their messages
    are malformed. When one has committed, `push` says so and takes nothing before it is replayed.

    A relation is told when it is described; one that only an aborted subtransaction described, with
    its first row: the server takes it for known, but what it says may never have been.

    `pending_rows` and `pending_bytes` count all that `take` would hand over: text, offsets and names,
    and 128 bytes for a transaction or an event without rows.

    A message of a transaction (R, Y, O, I, U, D, T, M) that the protocol does not allow is put aside: it
    takes an ordinal, and `take` gives it with others in `Malformed.batch`:

        _op         string   what it would have been: 'c', 'u', 'd' or 't'; null for what is no change
        _serial     int64
        _ordinal    int64
        _lsn        int64
        kind        string   its first byte
        relation    int64    the id of the relation that it names, 0 if none can be told
        schema      string   that of the relation, where its name is known from before or can be read
        name        string
        why         string   what is wrong with it, without its content
        message     binary   the message, in a stream block without its xid

    A relation whose description is malformed is known no longer: until it is described well, what it
    changes is put aside, too, and is wrong for the same reason.

    Any other bytes that the protocol does not allow raise MalformedMessage, without their content: where
    in the source what follows them stands would not be known. After any failure to decode each further
    `push` raises it again; `take` still gives what came before.
    """

    cdef readonly Py_ssize_t pending_rows
    cdef readonly Py_ssize_t pending_bytes
    cdef Py_ssize_t max_batch_rows
    cdef Py_ssize_t max_batch_bytes
    cdef object failure
    cdef int64_t serials
    cdef int64_t serial  # -1 outside of a transaction
    cdef int64_t ordinal
    cdef int64_t lsn  # of the message that is decoded
    cdef uint64_t commit_lsn
    cdef uint32_t xid
    cdef str origin  # of the open transaction
    cdef object spool
    cdef bytearray block  # the tail of the streamed transaction whose block is open
    cdef bint waiting  # a streamed transaction has committed and is not replayed yet
    cdef bint replaying
    cdef bint aborted  # what is replayed now is of an aborted subtransaction
    cdef dict tables  # by id
    cdef dict named  # by (schema, name): the table that bears it now
    cdef list recent  # by id % RECENT_TABLES, so that a row needs no Python int
    cdef list building  # tables with an open batch, in the order of their first rows
    cdef list transactions
    cdef list events
    cdef list aside  # the rows of `Malformed.batch`
    cdef dict unreadable  # by relation id: schema and name (None if not known), and why
    cdef uint32_t block_xid  # of the streamed transaction whose block is open
    cdef bint repeated  # what is replayed now was decoded outside of the transaction, too

    def __cinit__(self, Py_ssize_t max_batch_rows=65536, Py_ssize_t max_batch_bytes=16 << 20, spool=None):
        if max_batch_rows < 1 or max_batch_bytes < 1:
            raise ValueError("a batch holds at least one row and one byte")
        self.max_batch_rows, self.max_batch_bytes = max_batch_rows, max_batch_bytes
        self.pending_rows = self.pending_bytes = 0
        self.serials, self.serial, self.ordinal, self.lsn = 0, -1, 0, 0
        self.origin, self.spool, self.block = "", spool, None
        self.waiting = self.replaying = self.aborted = False
        self.tables, self.named, self.recent = {}, {}, [None] * RECENT_TABLES
        self.building, self.transactions, self.events = [], [], []
        self.aside, self.unreadable = [], {}
        self.block_xid, self.repeated = 0, False

    @property
    def in_transaction(self):
        """Whether a Begin still waits for its Commit."""
        return self.serial >= 0

    def push(self, message, int64_t lsn=0):
        """Decode one pgoutput message, which stands at `lsn`; it may be changed afterwards.

        Returns whether a streamed transaction has committed: it is to be replayed before the next push.
        Raises MalformedMessage, what the spool raises, and ValueError for a replay that was left out.
        """
        return self.receive(message, lsn, False)

    def push_data(self, data):
        """Decode the message in one XLogData, see `push`."""
        return self.receive(data, NOWHERE, True)

    cdef bint receive(self, message, int64_t lsn, bint wrapped) except *:
        cdef Py_buffer view
        cdef Wire wire
        if self.failure is not None:
            raise copy(self.failure)
        PyObject_GetBuffer(message, &view, PyBUF_SIMPLE)
        try:
            if self.waiting:
                raise ValueError("a streamed transaction that has committed is to be replayed first")
            wire.start = wire.at = <const uint8_t*> view.buf
            wire.end = wire.start + view.len
            self.lsn = lsn
            self.decode(&wire, wrapped)
        finally:
            PyBuffer_Release(&view)
        return self.waiting

    def replay(self, bytes frames, Py_ssize_t start, aborted, Py_ssize_t max_bytes):
        """Decode kept messages from `frames[start:]` until `max_bytes` are pending; returns where to go on.

        What the subtransactions in `aborted` changed is left out, by their own xid. Raises
        MalformedMessage.
        """
        cdef const uint8_t* data = frames
        cdef Py_ssize_t size = len(frames)
        cdef uint32_t xid, length, last = 0
        cdef Wire wire
        if self.failure is not None:
            raise copy(self.failure)
        self.replaying = self.repeated = True
        try:
            while start < size and self.pending_bytes < max_bytes:
                memcpy(&self.lsn, data + start, 8)
                memcpy(&xid, data + start + 8, 4)
                memcpy(&length, data + start + 12, 4)
                wire.start = wire.at = data + start + FRAME_HEAD
                wire.end = wire.start + length
                start += FRAME_HEAD + length
                if xid != last:
                    last, self.aborted, self.repeated = xid, xid in aborted, xid == 0
                # Later changes of the transaction rely on what an aborted part of it described.
                if not self.aborted or wire.start[0] == c"R":
                    self.decode(&wire)
        finally:
            self.replaying = self.aborted = self.repeated = False
        return start

    def push_many(self, messages, lsns, Py_ssize_t start=0, Py_ssize_t max_pending_bytes=PY_SSIZE_T_MAX):
        """Decode the messages of a pyarrow.BinaryArray, one to a value, from index `start` on.

        `lsns` says where each stands: a numpy array of as many int64.

        Stops behind the message with which `pending_bytes` reaches `max_pending_bytes`, at the latest
        at the array's end; returns the index of the first message that it left.

        Raises MalformedMessage, for a null too; TypeError for another array, and ValueError for a
        `start` outside of it or another number of LSNs.
        """
        cdef const int64_t[::1] places = lsns
        cdef const int32_t[::1] offsets
        cdef const uint8_t[::1] text
        cdef const uint8_t* data = NULL
        cdef Wire wire
        cdef Py_ssize_t at
        if not isinstance(messages, pa.BinaryArray):
            raise TypeError(f"messages come as an array of type binary, not as {type(messages).__name__}")
        cdef Py_ssize_t first = messages.offset, count = len(messages)
        if start < 0 or start > count:
            raise ValueError(f"start {start} is outside of an array of {count} messages")
        if places.shape[0] != count:
            raise ValueError(f"{places.shape[0]} LSNs for {count} messages")
        if self.failure is not None:
            raise copy(self.failure)
        if start == count:
            return count
        if messages.null_count:
            wire.start = wire.at = wire.end = NULL
            fault(&wire, "it is null")
        _, offset_buffer, text_buffer = messages.buffers()
        offsets = memoryview(offset_buffer).cast("B").cast("i")
        if text_buffer is not None and text_buffer.size:
            text = memoryview(text_buffer).cast("B")
            data = &text[0]
        for at in range(first + start, first + count):
            wire.start = wire.at = data + offsets[at]
            wire.end = data + offsets[at + 1]
            self.lsn = places[at - first]
            self.decode(&wire)
            if self.pending_bytes >= max_pending_bytes:
                return at + 1 - first
        return count

    def take(self):
        """Hand over the transactions completed since the last take, and all events held.

        Rows of a transaction that is still open are among them, under its serial.
        """
        for table in list(self.building):
            self.close(<Table> table)
        if self.aside:
            self.events.append(Malformed(batch_of(self.aside)))
        taken = self.transactions, self.events
        self.transactions, self.events, self.aside = [], [], []
        self.pending_rows = self.pending_bytes = 0
        return taken

    cdef int unwrap(self, Wire* wire) except -1:
        """Go on to the message in an XLogData, and note where its change stands."""
        need(wire, WRAPPED)
        if <char> integer(wire, 1) != c"w":
            fault(wire, "it is no XLogData")
        self.lsn = <int64_t> integer(wire, 8)
        wire.start = wire.at = wire.start + WRAPPED
        return 0

    cdef int decode(self, Wire* wire, bint wrapped=False) except -1:
        try:
            if wrapped:
                self.unwrap(wire)
            if wire.end - wire.start > INT32_MAX:
                fault(wire, "it is longer than 2 GiB - 1")
            if self.block is not None:
                return self.keep_streamed(wire)
            kind = <char> integer(wire, 1)
            if kind == c"I" or kind == c"U" or kind == c"D":
                self.row(wire, kind)
            elif kind == c"B":
                self.begin(wire)
            elif kind == c"C":
                self.commit(wire)
            elif kind == c"R":
                self.describe(wire)
            elif kind == c"T":
                self.truncate(wire)
            elif kind == c"M":
                self.message(wire)
            elif kind == c"O" or kind == c"Y":
                self.skip(wire, kind)
            elif kind == c"S" or kind == c"E" or kind == c"c" or kind == c"A":
                self.streamed(wire, kind)
            elif kind == c"b" or kind == c"P" or kind == c"K" or kind == c"r" or kind == c"p":
                fault(wire, "prepared transactions were not asked for")
            else:
                fault(wire, "there is no such kind")
        except Exception as error:
            if isinstance(error, MalformedMessage) and self.put_aside(wire, error.what):
                return 0
            self.failure = copy(error)  # without its traceback, which would keep the caller's frames
            raise
        return 0

    cdef bint put_aside(self, Wire* wire, str why) except *:
        """Keep a malformed message as it came; False where what follows it would have no known place."""
        cdef const uint8_t* start = wire.start
        cdef char kind = start[0] if wire.end > start else 0
        cdef uint32_t id = 0
        if self.lsn == NOWHERE or wire.end - start > INT32_MAX:
            return False
        if self.block is not None or kind not in (c"I", c"U", c"D", c"R", c"T", c"M", c"O", c"Y"):
            return False
        if self.serial < 0 and (kind != c"M" or wire.end - start < 2 or start[1] & 1):
            return False
        if kind in (c"I", c"U", c"D", c"R"):
            wire.at = start + 1
            if wire.end - wire.at >= 4:
                id = <uint32_t> integer(wire, 4)
            elif kind == c"R":
                return False  # any relation may be another now
        if kind == c"R":
            self.forget(wire, id, why)
            if self.aborted or self.repeated:
                return True
        names, why = self.unreadable.get(id, (None, why))
        if id in self.tables:
            relation = (<Table> self.tables[id]).relation
            names = (relation.schema, relation.name)
        self.keep_aside(kind, id, names, why, start[:wire.end - start])
        return True

    cdef int keep_aside(self, char kind, uint32_t id, names, why, bytes message) except -1:
        schema, name = names or (None, None)
        if self.serial >= 0:
            self.ordinal += 1
        letter = chr(<uint8_t> kind)
        place = (OP_OF.get(letter), self.serial, self.ordinal, self.lsn)
        self.aside.append((*place, letter, id, schema, name, why, message))
        self.pending_bytes += EVENT_BYTES + len(message)
        return 0

    cdef int forget(self, Wire* wire, uint32_t id, why) except -1:
        """Take a relation for unknown, since what it is now cannot be read; `wire` is behind its id.

        It keeps the name that it had, which is sure; else the one that the message says counts.
        """
        names = None
        known = self.tables.pop(id, None)
        if known is not None:
            relation = (<Table> known).relation
            names = (relation.schema, relation.name)
            self.close(<Table> known)
            self.recent[id % RECENT_TABLES] = None
            if self.named.get(names) is known:
                del self.named[names]
        elif id in self.unreadable:
            names = self.unreadable[id][0]
        else:
            try:
                names = (string(wire) or "pg_catalog", string(wire))
            except MalformedMessage:
                pass
        self.unreadable[id] = (names, why)
        self.repeat_in_blocks(wire.start + 1, wire.end)
        return 0

    cdef int repeat_in_blocks(self, const uint8_t* body, const uint8_t* end) except -1:
        """Have the replay of each open streamed transaction end with a description that is newer than what it
        has said so far."""
        if self.spool is not None and not self.replaying:
            for tail in self.spool.tails():
                append_frame(tail, self.lsn, 0, c"R", body, end - body)
        return 0

    cdef int keep_streamed(self, Wire* wire) except -1:
        """Keep a message of the open block under its own (sub)transaction, or end the block."""
        cdef char kind = <char> integer(wire, 1)
        cdef uint32_t xid = 0
        if kind == c"E":
            finish(wire)
            self.block = None
            self.spool.stop()
            return 0
        if kind in (c"I", c"U", c"D", c"R", c"Y", c"T", c"M"):
            # One that ends before is kept all the same: its replay puts it aside.
            xid = <uint32_t> integer(wire, 4) if wire.end - wire.at >= 4 else self.block_xid
        elif kind != c"O":  # comes without an xid: it is the transaction's
            fault(wire, "it has no place in a stream block")
        append_frame(self.block, self.lsn, xid, kind, wire.at, wire.end - wire.at)
        if PyByteArray_GET_SIZE(self.block) >= TAIL_BYTES:
            self.spool.flush()
        return 0

    cdef int streamed(self, Wire* wire, char kind) except -1:
        """Begin a block, or learn how a streamed transaction ended."""
        if self.spool is None:
            fault(wire, "streamed transactions were not asked for")
        if kind == c"E":
            fault(wire, "a block ends that has not begun")
        if self.serial >= 0:
            fault(wire, "a stream message within a transaction")
        xid = <uint32_t> integer(wire, 4)
        if kind == c"S":
            first = integer(wire, 1) != 0
            finish(wire)
            if first == self.spool.holds(xid):
                fault(wire, "a first block of a transaction known, or a later one of a transaction unknown")
            self.block, self.block_xid = self.spool.start(xid), xid
            return 0
        if kind == c"A":
            subxid = <uint32_t> integer(wire, 4)
            if wire.at != wire.end:  # only where parallel streaming is asked for
                integer(wire, 8)
                integer(wire, 8)
            finish(wire)
            self.spool.abort(xid, subxid)
            return 0
        integer(wire, 1)
        commit_lsn = integer(wire, 8)
        end_lsn = integer(wire, 8)
        committed_at = <int64_t> integer(wire, 8)
        finish(wire)
        if not self.spool.holds(xid):
            fault(wire, "a commit of a transaction unknown")
        self.spool.commit(xid, self.serials, commit_lsn, end_lsn, committed_at)
        self.waiting = True
        return 0

    cdef int row(self, Wire* wire, char kind) except -1:
        cdef char old = 0
        cdef bint unchanged = False
        if self.serial < 0:
            fault(wire, "a row outside of a transaction")
        cdef Table table = self.table(wire)
        cdef char tag = <char> integer(wire, 1)
        if kind != c"I" and (tag == c"K" or tag == c"O"):
            old = tag
            unchanged = read_tuple(wire, table.old, table.width)
            if kind == c"U":
                tag = <char> integer(wire, 1)
        if kind == c"D":
            if not old:
                fault(wire, "a delete without its old tuple")
            finish(wire)
            return self.keep(table, c"d", table.old, unchanged, 0)
        if tag != c"N":
            fault(wire, "a row without its new tuple")
        unchanged = read_tuple(wire, table.new, table.width)
        finish(wire)
        if unchanged:
            unchanged = table.fill(old)
        return self.keep(table, c"c" if kind == c"I" else c"u", table.new, unchanged, old)

    cdef int keep(self, Table table, char op, const Cell* cells, bint unchanged, char old) except -1:
        """Add a row to the open batch; `old` is the kind of an update's old tuple, or 0."""
        cdef Py_ssize_t weight = ROW_BYTES + weigh(cells, table.width)
        if unchanged:
            weight += table.names_weight
        if old:
            weight += table.names_weight + weigh(table.old, table.width)
        if table.bytes + weight > INT32_MAX:
            self.close(table)
        if table.rows == 0:
            if not table.told:
                self.tell(table)
            table.begin_batch()
        table.put(op, self.serial, self.ordinal + 1, self.lsn, cells)
        if unchanged:
            table.put_unchanged(cells)
        if old:
            table.put_before(old)
        if table.rows == 0:
            self.building.append(table)
        table.rows += 1
        table.bytes += weight
        self.ordinal += 1
        self.pending_rows += 1
        self.pending_bytes += weight
        if table.rows >= self.max_batch_rows or table.bytes >= self.max_batch_bytes:
            self.close(table)
        return 0

    cdef Table table(self, Wire* wire):
        cdef uint32_t id = <uint32_t> integer(wire, 4)
        table = self.recent[id % RECENT_TABLES]
        if table is None or (<Table> table).id != id:
            table = self.tables.get(id)
            if table is None:
                fault(wire, f"relation {id} was never described")
            self.recent[id % RECENT_TABLES] = table
        return <Table> table

    cdef int close(self, Table table) except -1:
        if table.rows:
            self.events.append(Rows(table.relation, table.batch()))
            table.end_batch()
            self.building.remove(table)
        return 0

    cdef int append(self, event) except -1:
        self.events.append(event)
        self.pending_bytes += EVENT_BYTES
        return 0

    cdef int begin(self, Wire* wire) except -1:
        commit_lsn = integer(wire, 8)
        integer(wire, 8)
        xid = <uint32_t> integer(wire, 4)
        finish(wire)
        if self.serial >= 0:
            fault(wire, "a transaction within a transaction")
        self.commit_lsn, self.xid = commit_lsn, xid
        self.serial, self.ordinal, self.origin = self.serials, 0, ""
        self.serials += 1
        return 0

    cdef int commit(self, Wire* wire) except -1:
        integer(wire, 1)
        commit_lsn = integer(wire, 8)
        end_lsn = integer(wire, 8)
        committed_at = <int64_t> integer(wire, 8) + POSTGRES_EPOCH
        finish(wire)
        if self.serial < 0:
            fault(wire, "a commit without a begin")
        if commit_lsn != self.commit_lsn:
            fault(wire, "a commit at another place than its begin said")
        self.transactions.append(
            Transaction(self.serial, end_lsn, self.xid, committed_at, self.ordinal, self.origin)
        )
        self.pending_bytes += EVENT_BYTES
        self.serial, self.ordinal, self.waiting = -1, 0, False
        return 0

    cdef int skip(self, Wire* wire, char kind) except -1:
        """Note an origin, where the transaction was first made; what a type is called nobody asks."""
        if kind == c"Y":
            integer(wire, 4)
            string(wire)
            string(wire)
            return finish(wire)
        integer(wire, 8)
        origin = string(wire)
        finish(wire)
        self.origin = origin
        return 0

    cdef int describe(self, Wire* wire) except -1:
        columns = []
        cdef const uint8_t* body = wire.at
        id = <uint32_t> integer(wire, 4)
        schema = string(wire) or "pg_catalog"
        name = string(wire)
        replica_identity = chr(<uint8_t> integer(wire, 1))
        if replica_identity not in "dnfi":
            fault(wire, "there is no such replica identity")
        cdef int16_t count = <int16_t> integer(wire, 2)
        if count < 0:
            fault(wire, "a number of columns is negative")
        for _ in range(count):
            is_key = integer(wire, 1) & 1 != 0
            column = string(wire)
            type_oid = <uint32_t> integer(wire, 4)
            columns.append(RelationColumn(column, type_oid, <int32_t> integer(wire, 4), is_key))
        finish(wire)
        self.unreadable.pop(id, None)
        self.repeat_in_blocks(body, wire.end)
        return self.learn(Relation(id, schema, name, replica_identity, tuple(columns)))

    cdef int learn(self, relation) except -1:
        """Note a new or changed relation, after the rows of the one it replaces."""
        key = (relation.schema, relation.name)
        known, namesake = self.tables.get(relation.id), self.named.get(key)
        if known is not None and known is namesake and (<Table> known).relation == relation:
            return 0
        for table in (known, namesake):
            if table is not None:
                self.close(<Table> table)
        if known is not None:
            former = (<Table> known).relation
            if self.named.get((former.schema, former.name)) is known:
                del self.named[former.schema, former.name]
        table = Table(relation)
        self.tables[relation.id] = self.named[key] = self.recent[relation.id % RECENT_TABLES] = table
        return 0 if self.aborted else self.tell(table)

    cdef int tell(self, Table table) except -1:
        table.told = True
        return self.append(RelationSeen(table.relation, self.serial, self.ordinal))

    cdef int truncate(self, Wire* wire) except -1:
        cdef int32_t count = <int32_t> integer(wire, 4)
        options = integer(wire, 1)
        if self.serial < 0:
            fault(wire, "a truncate outside of a transaction")
        if count < 0:
            fault(wire, "a number of relations is negative")
        tables = []
        unknown = []
        for _ in range(count):
            id = <uint32_t> integer(wire, 4)
            table = self.tables.get(id)
            (unknown if table is None else tables).append(id if table is None else table)
        finish(wire)
        for id in unknown:
            names, why = self.unreadable.get(id, (None, f"relation {id} was never described"))
            self.keep_aside(c"T", id, names, why, wire.start[:wire.end - wire.start])
        if not tables:
            return 0
        for table in tables:
            self.close(<Table> table)
            if not (<Table> table).told:
                self.tell(<Table> table)
        self.ordinal += 1
        relations = tuple([(<Table> table).relation for table in tables])
        cascade, restart_identity = options & 1 != 0, options & 2 != 0
        return self.append(
            Truncate(relations, self.serial, self.ordinal, cascade, restart_identity, self.lsn)
        )

    cdef int message(self, Wire* wire) except -1:
        transactional = integer(wire, 1) & 1 != 0
        lsn = integer(wire, 8)
        prefix = string(wire)
        cdef int32_t size = length(wire)
        content = wire.at[:size]
        wire.at += size
        finish(wire)
        if self.serial >= 0:
            self.ordinal += 1
        elif transactional:
            fault(wire, "a transactional message outside of a transaction")
        self.pending_bytes += len(prefix) + size
        return self.append(Message(self.serial, self.ordinal, prefix, content, transactional, lsn))
