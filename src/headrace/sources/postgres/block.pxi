# Memory in the making, which Arrow takes over without a copy.

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, realloc

import pyarrow as pa

cdef enum:
    FIRST_CAPACITY = 64  # bytes; memory grows from here by doubling


@cython.final
cdef class Block:
    """Memory that grows, until Arrow adopts it through the buffer protocol and frees it with the array."""

    cdef char* at
    cdef Py_ssize_t capacity
    cdef Py_ssize_t size

    def __cinit__(self):
        self.at = <char*> calloc(1, FIRST_CAPACITY)  # zeros: offsets begin with one
        if self.at == NULL:
            raise MemoryError
        self.capacity = FIRST_CAPACITY

    def __dealloc__(self):
        free(self.at)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.size, 1, flags)

    cdef inline int fit(self, Py_ssize_t size) except -1:
        return 0 if size <= self.capacity else self.grow(size)

    cdef int grow(self, Py_ssize_t size) except -1:
        cdef Py_ssize_t capacity = max(size, 2 * self.capacity)
        cdef char* at = <char*> realloc(self.at, capacity)
        if at == NULL:
            raise MemoryError
        self.at, self.capacity = at, capacity
        return 0

    cdef inline int put(self, Py_ssize_t row, int64_t value) except -1:
        self.fit((row + 1) * sizeof(int64_t))
        (<int64_t*> self.at)[row] = value
        return 0

    cdef object seal(self, Py_ssize_t size):
        """Its first `size` bytes as an Arrow buffer; from here on it must not grow."""
        self.size = size
        return pa.py_buffer(self)
