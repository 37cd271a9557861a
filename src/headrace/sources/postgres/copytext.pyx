# cython: boundscheck=False, wraparound=False, cdivision=True
"""COPY … TO STDOUT in text format, read into Arrow columns of text.

A row is a line of fields between tabs, as "Text Format" in the manual's page of COPY has it. A field is what
its type's output function gives, but for null, which is `\\N`, and for these characters, which come
behind a backslash: backspace `b`, form feed `f`, newline `n`, carriage return `r`, tab `t`, vertical
tab `v`, and the backslash itself. Any other character behind a backslash stands for itself; the server
writes no octal and no hexadecimal digits.

libpq hands out one row at a time. No Python object is made for one, and the interpreter's lock is not held:
its text goes from libpq's memory into that which Arrow later adopts. Every read is checked against the
row's end, and a row counts once all its fields are in.
"""

from libc.stdint cimport INT32_MAX, int32_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from headrace.errors import MalformedMessage

include "block.pxi"

cdef extern from *:
    """
    /* The first byte of eight is the lowest of the word, on any machine. */
    static inline uint64_t word_at(const uint8_t* at) {
        uint64_t word;
        memcpy(&word, at, 8);
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
    #endif
        return word;
    }
    static inline int lowest_byte(uint64_t bits) { return __builtin_ctzll(bits) >> 3; }
    """
    uint64_t word_at(const uint8_t* at) noexcept nogil
    int lowest_byte(uint64_t bits) noexcept nogil

ctypedef int (*GetCopyData)(void* connection, char** row, int at_once) noexcept nogil
ctypedef void (*FreeMemory)(void* memory) noexcept nogil

MAX_BATCH_BYTES = 1 << 30
"""With a row of the longest that Postgres sends, 1 GiB, a column's offsets stay within 31 bits."""
REMEDY = "Copy the table again; if it happens again, check what stands between Headrace and the server."

cdef enum:
    SHORT = 16  # bytes of a field that are copied at once, whatever its length; text has as many to spare

cdef enum Fault:
    FINE
    NO_MEMORY
    NO_NEWLINE
    EARLY_NEWLINE
    TOO_FEW
    TOO_MANY
    TOO_LONG

FAULTS = {
    NO_NEWLINE: "it has no newline at its end",
    EARLY_NEWLINE: "it has a newline before its end",
    TOO_FEW: "it has too few fields",
    TOO_MANY: "it has too many fields",
    TOO_LONG: "with it a column of one batch is longer than 2 GiB - 1",
}


cdef struct Column:
    uint8_t* text
    Py_ssize_t text_capacity
    int32_t* offsets
    Py_ssize_t offsets_capacity  # bytes, as all of them
    uint8_t* validity  # without a null there is none
    Py_ssize_t validity_capacity
    Py_ssize_t validity_size
    Py_ssize_t nulls


cdef inline const uint8_t* find_special(const uint8_t* at, const uint8_t* end) noexcept nogil:
    """Return where the next tab, newline or backslash is, or `end`."""
    cdef uint64_t ones = 0x0101010101010101, highs = 0x8080808080808080
    cdef uint64_t word, tab, newline, backslash, found
    while end - at >= 8:
        word = word_at(at)
        # A byte of zero, and of the bytes above it only ones that do not matter, gets its highest bit.
        tab = word ^ (ones * 0x09)
        newline = word ^ (ones * 0x0A)
        backslash = word ^ (ones * 0x5C)
        found = (
            ((tab - ones) & ~tab) | ((newline - ones) & ~newline) | ((backslash - ones) & ~backslash)
        ) & highs
        if found:
            return at + lowest_byte(found)
        at += 8
    while at < end and at[0] != c"\t" and at[0] != c"\n" and at[0] != c"\\":
        at += 1
    return at


cdef inline uint8_t meant(uint8_t letter) noexcept nogil:
    """Return the character that a letter behind a backslash stands for."""
    if letter == c"n":
        return c"\n"
    if letter == c"t":
        return c"\t"
    if letter == c"r":
        return c"\r"
    if letter == c"b":
        return c"\b"
    if letter == c"f":
        return c"\f"
    if letter == c"v":
        return c"\v"
    return letter


cdef int grow(void** at, Py_ssize_t* capacity, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t larger = max(size, 2 * capacity[0])
    cdef void* moved = realloc(at[0], larger)
    if moved == NULL:
        return NO_MEMORY
    at[0], capacity[0] = moved, larger
    return FINE


cdef inline int fit_text(Column* column, Py_ssize_t size) noexcept nogil:
    """Make room for `size` bytes of text in all."""
    if size > INT32_MAX:
        return TOO_LONG
    if size + SHORT <= column.text_capacity:
        return FINE
    return grow(<void**> &column.text, &column.text_capacity, size + SHORT)


cdef int put_null(Column* column, Py_ssize_t row) noexcept nogil:
    if put_valid(column, row + 1):
        return NO_MEMORY
    column.validity[row >> 3] &= <uint8_t> ~(1 << (row & 7))
    column.nulls += 1
    return FINE


cdef int put_valid(Column* column, Py_ssize_t rows) noexcept nogil:
    """Have bits for that many rows; those that it had not are of rows without null."""
    cdef Py_ssize_t size = (rows + 7) >> 3
    if size > column.validity_capacity and grow(
        <void**> &column.validity, &column.validity_capacity, max(size, FIRST_CAPACITY)
    ):
        return NO_MEMORY
    if size > column.validity_size:
        memset(column.validity + column.validity_size, 0xFF, size - column.validity_size)
        column.validity_size = size
    return FINE


cdef int put_escaped(
    Column* column, int32_t* size, const uint8_t** at, const uint8_t* special, const uint8_t* end
) noexcept nogil:
    """Append a field that begins at `at` and whose first special byte is a backslash at `special`; leave
    `at` behind it, at its tab, its newline or `end`."""
    cdef Py_ssize_t plain
    cdef int fault
    while True:
        plain = special - at[0]
        fault = fit_text(column, <Py_ssize_t> size[0] + plain + 1)
        if fault:
            return fault
        memcpy(column.text + size[0], at[0], plain)
        size[0] += <int32_t> plain
        if special == end or special[0] != c"\\":
            at[0] = special
            return FINE
        if end - special < 2:
            return NO_NEWLINE
        column.text[size[0]] = meant(special[1])
        size[0] += 1
        at[0] = special + 2
        special = find_special(at[0], end)


cdef inline int put_field(
    Column* column, Py_ssize_t row, const uint8_t** at, const uint8_t* end
) noexcept nogil:
    """Append the field that begins at `at`, and leave `at` at its tab, its newline or `end`."""
    cdef const uint8_t* begin = at[0]
    cdef const uint8_t* special = find_special(begin, end)
    cdef Py_ssize_t length = special - begin
    cdef int32_t size = column.offsets[row]
    cdef int fault
    if special < end and special[0] == c"\\":
        if length == 0 and end - begin > 2 and begin[1] == c"N" and (begin[2] == c"\t" or begin[2] == c"\n"):
            at[0] = begin + 2
            fault = put_null(column, row)
        else:
            fault = put_escaped(column, &size, at, special, end)
    else:
        at[0] = special
        fault = fit_text(column, size + length)
        if not fault:
            if length <= SHORT and end - begin >= SHORT:
                memcpy(column.text + size, begin, SHORT)
            else:
                memcpy(column.text + size, begin, length)
            size += <int32_t> length
    if fault:
        return fault
    if (row + 2) * <Py_ssize_t> sizeof(int32_t) > column.offsets_capacity and grow(
        <void**> &column.offsets, &column.offsets_capacity, (row + 2) * sizeof(int32_t)
    ):
        return NO_MEMORY
    column.offsets[row + 1] = size
    return FINE


cdef int put_row(
    Column* columns, Py_ssize_t width, Py_ssize_t row, const uint8_t* at, const uint8_t* end
) noexcept nogil:
    """Append a row, which ends before `end` with its newline."""
    cdef Py_ssize_t i
    cdef int fault
    if at == end or (end - 1)[0] != c"\n":
        return NO_NEWLINE
    for i in range(width):
        fault = put_field(&columns[i], row, &at, end)
        if fault:
            return fault
        if at == end:
            return NO_NEWLINE
        if at[0] == c"\t":
            if i + 1 == width:
                return TOO_MANY
            at += 1
        elif at + 1 != end:
            return EARLY_NEWLINE
        elif i + 1 < width:
            return TOO_FEW
    if width == 0 and end - at > 1:
        return TOO_MANY
    return FINE


@cython.final
cdef class TextReader:
    """Rows of the columns `names` in the making.

    `max_bytes`, at most MAX_BATCH_BYTES, is the size at which a batch is full: of its rows as they came,
    and an offset for each field. A batch has the row that fills it, however long, as its last.
    """

    cdef object schema
    cdef Py_ssize_t width
    cdef Py_ssize_t max_bytes
    cdef Py_ssize_t rows
    cdef Py_ssize_t bytes
    cdef int fault  # that of the row that was refused; nothing can be read any more then
    cdef Column* columns

    def __cinit__(self, names, Py_ssize_t max_bytes=4 << 20):
        if not 0 < max_bytes <= MAX_BATCH_BYTES:
            raise ValueError(f"max_bytes is {max_bytes}, not from 1 to {MAX_BATCH_BYTES}")
        self.schema = pa.schema([(name, pa.string()) for name in names])
        self.width, self.max_bytes = len(self.schema), max_bytes
        self.columns = <Column*> calloc(self.width + 1, sizeof(Column))  # one more, since 0 may give NULL
        if self.columns == NULL:
            raise MemoryError
        self.begin()

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.columns == NULL:
            return
        for i in range(self.width):
            free(self.columns[i].text)
            free(self.columns[i].offsets)
            free(self.columns[i].validity)
        free(self.columns)

    def read(self, uintptr_t connection, uintptr_t get_copy_data, uintptr_t free_memory):
        """Read rows until the batch is full or no more come; wait for each, without holding the
        interpreter's lock.

        `connection` is a PGconn in the midst of a COPY, the others are the addresses of libpq's
        PQgetCopyData and PQfreemem. Return whether the batch is full, and else what libpq said last:
        -1 after the last row, where PQgetResult tells how the COPY ended, -2 for an error. Nothing else may use
        the connection meanwhile. Raises MalformedMessage and MemoryError, and from then on nothing else.
        """
        cdef void* of = <void*> connection
        cdef GetCopyData next_row = <GetCopyData> get_copy_data
        cdef FreeMemory release = <FreeMemory> free_memory
        cdef char* row = NULL
        cdef int size = 0
        self.check()
        with nogil:
            while self.fault == FINE and self.bytes < self.max_bytes:
                size = next_row(of, &row, 0)
                if size < 0:
                    break
                self.put(<const uint8_t*> row, size)
                release(row)
        self.check()
        return self.bytes >= self.max_bytes, size

    def push(self, const uint8_t[::1] row):
        """Append one row with its newline; return whether the batch is full. Raises what `read` raises."""
        self.check()
        self.put(&row[0] if row.shape[0] else NULL, row.shape[0])
        self.check()
        return self.bytes >= self.max_bytes

    def take(self):
        """Return the rows since the last take as an Arrow batch of strings, which need not be UTF-8, or
        None if there are none. Raises what `read` raises."""
        cdef Py_ssize_t i, rows = self.rows
        cdef Column* column
        self.check()
        if rows == 0:
            return None
        arrays = []
        for i in range(self.width):
            column = &self.columns[i]
            buffers = [None, None, None]
            if column.nulls:
                if put_valid(column, rows):
                    raise MemoryError
                buffers[0] = adopted(<void**> &column.validity, (rows + 7) >> 3)
            size = column.offsets[rows]
            buffers[1] = adopted(<void**> &column.offsets, (rows + 1) * sizeof(int32_t))
            buffers[2] = adopted(<void**> &column.text, size)
            arrays.append(pa.Array.from_buffers(pa.string(), rows, buffers, column.nulls))
        self.begin()
        if not arrays:
            return pa.RecordBatch.from_struct_array(pa.Array.from_buffers(pa.struct([]), rows, [None]))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    cdef int begin(self) except -1:
        """Begin an empty batch."""
        cdef Py_ssize_t i
        cdef Column* column
        self.rows = self.bytes = 0
        for i in range(self.width):
            column = &self.columns[i]
            free(column.text)
            free(column.offsets)
            free(column.validity)
            memset(column, 0, sizeof(Column))
        for i in range(self.width):
            column = &self.columns[i]
            if fit_text(column, FIRST_CAPACITY) or grow(
                <void**> &column.offsets, &column.offsets_capacity, FIRST_CAPACITY
            ):
                raise MemoryError
            column.offsets[0] = 0
        return 0

    cdef void put(self, const uint8_t* row, Py_ssize_t size) noexcept nogil:
        self.fault = put_row(self.columns, self.width, self.rows, row, row + size)
        if self.fault == FINE:
            self.rows += 1
            self.bytes += size + self.width * sizeof(int32_t)

    cdef int check(self) except -1:
        if self.fault == NO_MEMORY:
            raise MemoryError
        if self.fault:
            what = FAULTS[self.fault]
            raise MalformedMessage(f"Row {self.rows} of a batch that COPY sent is malformed: {what}.", REMEDY)
        return 0


cdef object adopted(void** at, Py_ssize_t size):
    """Return memory from malloc as an Arrow buffer of `size` bytes, which frees it; `at` lets go of it."""
    cdef Block block = Block()
    cdef void* fitting = realloc(at[0], max(size, 1))  # what it has to spare would live as long as the array
    free(block.at)
    block.at, block.capacity = <char*> (at[0] if fitting == NULL else fitting), size
    at[0] = NULL
    return block.seal(size)
