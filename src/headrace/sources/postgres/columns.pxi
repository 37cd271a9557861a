# Arrow columns in the making: the part of pgoutput.pyx that knows Arrow's layout and not the protocol.
# A value is copied once, from the message into memory that Arrow adopts when the batch is closed.

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import pyarrow as pa

include "block.pxi"

OPS = pa.string()
NAMES = pa.list_(pa.string())
BEFORE = pa.map_(pa.string(), pa.string())
BEFORE_ENTRY = pa.struct([BEFORE.key_field, BEFORE.item_field])


cdef struct Cell:
    const uint8_t* text
    int32_t length  # 0 unless kind is 't'
    char kind


cdef inline Py_ssize_t weigh(const Cell* cells, Py_ssize_t width) noexcept:
    """What cells take up in Arrow: their text, and an offset each."""
    cdef Py_ssize_t i, weight = width * sizeof(int32_t)
    for i in range(width):
        weight += cells[i].length
    return weight


@cython.final
cdef class Spans:
    """Validity and offsets: what string, list and map arrays have in common.

    A row is written under its number, so one that memory ran out for is simply not counted.
    """

    cdef Block validity
    cdef Block offsets
    cdef Py_ssize_t rows

    def __cinit__(self):
        self.validity, self.offsets = Block(), Block()

    cdef inline int32_t start(self, Py_ssize_t row) except -1:
        """Where the content of `row` begins; rows before it that were never written become null."""
        while self.rows < row:
            self.put(self.rows, (<int32_t*> self.offsets.at)[self.rows], False)
        return (<int32_t*> self.offsets.at)[row]

    cdef inline int put(self, Py_ssize_t row, int32_t end, bint valid) except -1:
        self.offsets.fit((row + 2) * sizeof(int32_t))
        self.validity.fit((row >> 3) + 1)
        (<int32_t*> self.offsets.at)[row + 1] = end
        cdef uint8_t* bits = <uint8_t*> self.validity.at + (row >> 3)
        if row & 7 == 0:
            bits[0] = 0
        bits[0] |= valid << (row & 7)
        self.rows = row + 1
        return 0

    cdef list seal(self, Py_ssize_t rows):
        return [self.validity.seal((rows + 7) >> 3), self.offsets.seal((rows + 1) * sizeof(int32_t))]


@cython.final
cdef class Strings:
    """A string column in the making."""

    cdef Spans spans
    cdef Block text

    def __cinit__(self):
        self.spans, self.text = Spans(), Block()

    cdef inline int put(self, Py_ssize_t row, const Cell* cell) except -1:
        cdef int32_t start = self.spans.start(row)
        self.text.fit(<Py_ssize_t> start + cell.length)
        if cell.length:
            memcpy(self.text.at + start, cell.text, cell.length)
        return self.spans.put(row, start + cell.length, cell.kind == c"t")

    cdef object seal(self, Py_ssize_t rows):
        cdef object text = self.text.seal(self.spans.start(rows))
        return pa.Array.from_buffers(pa.string(), rows, [*self.spans.seal(rows), text])


@cython.final
cdef class Entries:
    """A column of names, or of names with values, in the making: what `_unchanged` and `_before` hold."""

    cdef Spans spans
    cdef Strings names
    cdef Strings values

    def __cinit__(self):
        self.spans, self.names, self.values = Spans(), Strings(), Strings()

    cdef object seal_names(self, Py_ssize_t rows):
        cdef int32_t count = self.spans.start(rows)
        return pa.Array.from_buffers(NAMES, rows, self.spans.seal(rows), children=[self.names.seal(count)])

    cdef object seal_map(self, Py_ssize_t rows):
        cdef int32_t count = self.spans.start(rows)
        children = [self.names.seal(count), self.values.seal(count)]
        entries = pa.Array.from_buffers(BEFORE_ENTRY, count, [None], children=children)
        return pa.Array.from_buffers(BEFORE, rows, self.spans.seal(rows), children=[entries])


@cython.final
cdef class Table:
    """A relation, the tuples of the row being read, and the open batch."""

    cdef object relation
    cdef object schema
    cdef uint32_t id
    cdef Py_ssize_t width
    cdef Py_ssize_t names_weight
    cdef list spelled  # the names' UTF-8, which `names` points into
    cdef Cell* names
    cdef Cell* old
    cdef Cell* new
    cdef uint8_t* is_key
    cdef bint told  # whether an event has told of the relation
    cdef Py_ssize_t rows
    cdef Py_ssize_t bytes
    cdef Strings ops
    cdef Block serials
    cdef Block ordinals
    cdef Block lsns
    cdef list columns  # of Strings
    cdef Entries unchanged  # None until a row needs it, like `before`
    cdef Entries before

    def __cinit__(self, relation):
        cdef Py_ssize_t i, width = len(relation.columns)
        self.relation, self.id, self.width = relation, relation.id, width
        self.names = <Cell*> calloc(3 * width + 1, sizeof(Cell))  # one more, since 0 may give NULL
        self.is_key = <uint8_t*> calloc(width + 1, 1)
        if self.names == NULL or self.is_key == NULL:
            raise MemoryError
        self.old = self.names + width
        self.new = self.old + width
        self.spelled = [column.name.encode() for column in relation.columns]
        for i in range(width):
            self.names[i] = Cell(<const uint8_t*> <bytes> self.spelled[i], len(self.spelled[i]), c"t")
            self.is_key[i] = relation.columns[i].is_key
        self.names_weight = weigh(self.names, width)
        strings = [(column.name, pa.string()) for column in relation.columns]
        numbers = [(name, pa.int64()) for name in ("_serial", "_ordinal", "_lsn")]
        self.schema = pa.schema([("_op", OPS), *numbers, *strings])

    def __dealloc__(self):
        free(self.names)
        free(self.is_key)

    cdef int begin_batch(self) except -1:
        self.ops, self.serials, self.ordinals, self.lsns = Strings(), Block(), Block(), Block()
        self.columns = [Strings() for _ in range(self.width)]
        return 0

    cdef int end_batch(self) except -1:
        """Let go of the batch's memory: from here on it is Arrow's alone."""
        self.ops = self.serials = self.ordinals = self.lsns = self.columns = None
        self.unchanged = self.before = None
        self.rows = self.bytes = 0
        return 0

    cdef bint fill(self, char old) noexcept:
        """Take unchanged cells of the new tuple from the old one; whether some are still unchanged."""
        cdef Py_ssize_t i
        cdef bint unchanged = False
        for i in range(self.width):
            if self.new[i].kind == c"u":
                if old == c"O" or (old == c"K" and self.is_key[i]):
                    self.new[i] = self.old[i]
                unchanged |= self.new[i].kind == c"u"
        return unchanged

    cdef int put(self, char op, int64_t serial, int64_t ordinal, int64_t lsn, const Cell* cells) except -1:
        cdef Cell letter = Cell(<const uint8_t*> &op, 1, c"t")
        cdef Py_ssize_t i
        self.ops.put(self.rows, &letter)
        self.serials.put(self.rows, serial)
        self.ordinals.put(self.rows, ordinal)
        self.lsns.put(self.rows, lsn)
        for i in range(self.width):
            (<Strings> self.columns[i]).put(self.rows, &cells[i])
        return 0

    cdef int put_unchanged(self, const Cell* cells) except -1:
        if self.unchanged is None:
            self.unchanged = Entries()
        cdef int32_t end = self.unchanged.spans.start(self.rows)
        cdef Py_ssize_t i
        for i in range(self.width):
            if cells[i].kind == c"u":
                self.unchanged.names.put(end, &self.names[i])
                end += 1
        return self.unchanged.spans.put(self.rows, end, True)

    cdef int put_before(self, char old) except -1:
        """A cell that even the old tuple has as unchanged is left out: it is not known, which is not null."""
        if self.before is None:
            self.before = Entries()
        cdef int32_t end = self.before.spans.start(self.rows)
        cdef Py_ssize_t i
        for i in range(self.width):
            if self.old[i].kind != c"u" and (old == c"O" or self.is_key[i]):
                self.before.names.put(end, &self.names[i])
                self.before.values.put(end, &self.old[i])
                end += 1
        return self.before.spans.put(self.rows, end, True)

    cdef object batch(self):
        """The open batch as Arrow; no row may be put into it any more."""
        cdef Block block
        cdef Strings column
        schema = self.schema
        size = self.rows * sizeof(int64_t)
        arrays = [self.ops.seal(self.rows)]
        for block in (self.serials, self.ordinals, self.lsns):
            arrays.append(pa.Array.from_buffers(pa.int64(), self.rows, [None, block.seal(size)]))
        for column in self.columns:
            arrays.append(column.seal(self.rows))
        if self.unchanged is not None:
            schema = schema.append(pa.field("_unchanged", NAMES))
            arrays.append(self.unchanged.seal_names(self.rows))
        if self.before is not None:
            schema = schema.append(pa.field("_before", BEFORE))
            arrays.append(self.before.seal_map(self.rows))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
