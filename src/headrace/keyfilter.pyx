# cython: boundscheck=False, wraparound=False
"""Key filters: which keys the rows of an entry may have, in a byte and a half a row.

A split block Bloom filter (Putze, Sanders, Singler 2007; the layout and the multipliers are those of
Apache Parquet's): blocks of 256 bits, in each of whose eight words a key sets one bit. At 12 bits a key
about one filter in 150 says yes to a key that its rows do not have; none ever says no to one that they have.

A key's hash is FNV-1a over the UTF-8 of its cells in key order, each ended by a byte that UTF-8 does not
have, with the last mixing step of MurmurHash3.
"""

from functools import lru_cache

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

cdef enum:
    BITS_PER_KEY = 12
    BLOCK_BYTES = 32

cdef uint64_t BASIS = 0xcbf29ce484222325ULL
cdef uint64_t PRIME = 0x100000001b3ULL
cdef uint32_t[8] SALT = [
    0x47b6137bU, 0x44974d91U, 0x8824ad5bU, 0xa2b7289dU,
    0x705495c7U, 0x2df1424bU, 0x9efc4947U, 0x5c6bfb31U,
]


def key_filter(batch, key):
    """Return the filter of the keys of a batch's rows, and of those that they had before; b'' without a key.

    `key` names the key's columns, all strings; the keys before are in `_before`, if there is such a column.
    """
    if not key or not batch.num_rows:
        return b""
    parts = [_hashes([batch.column(name) for name in key])]
    if "_before" in batch.schema.names:
        before = batch.column("_before")
        if before.null_count < len(before):
            before = before.drop_null()
            parts.append(_hashes([pc.map_lookup(before, name, "first") for name in key]))
    hashes = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return _filter(hashes)


@lru_cache(maxsize=64)
def _hash_of(key):
    return int(_hashes([pa.array([cell], pa.string()) for cell in key])[0])


def may_hold(bytes held, key):
    """Whether rows with this filter may have a key (its cells as texts, in key order).

    True of an empty filter, which tells nothing.
    """
    if not held:
        return True
    cdef uint64_t h = _hash_of(tuple(key))
    cdef const uint8_t[::1] data = held
    cdef uint64_t blocks = len(held) // BLOCK_BYTES
    cdef uint64_t at = (((h >> 32) * blocks) >> 32) * BLOCK_BYTES
    cdef uint32_t low = <uint32_t>h
    cdef uint32_t bit
    cdef int i
    for i in range(8):
        bit = (low * SALT[i]) >> 27
        if not data[at + 4 * i + (bit >> 3)] & (1 << (bit & 7)):
            return False
    return True


cdef _filter(uint64_t[::1] hashes):
    cdef uint64_t blocks = max(1, (hashes.shape[0] * BITS_PER_KEY + 255) // 256)
    bits = np.zeros(blocks * BLOCK_BYTES, np.uint8)
    cdef uint8_t[::1] data = bits
    cdef uint64_t h, at
    cdef uint32_t low, bit
    cdef Py_ssize_t n
    cdef int i
    with nogil:
        for n in range(hashes.shape[0]):
            h = hashes[n]
            at = (((h >> 32) * blocks) >> 32) * BLOCK_BYTES
            low = <uint32_t>h
            for i in range(8):
                bit = (low * SALT[i]) >> 27
                data[at + 4 * i + (bit >> 3)] |= 1 << (bit & 7)
    return bits.tobytes()


cdef _hashes(columns):
    """Hash rows over their cells; a null is a cell of its own kind."""
    cdef Py_ssize_t rows = len(columns[0])
    found = np.full(rows, BASIS, np.uint64)
    cdef uint64_t[::1] hashes = found
    cdef const int32_t[::1] offsets
    cdef const uint8_t[::1] data
    cdef const uint8_t[::1] valid
    cdef Py_ssize_t n, i
    cdef uint64_t h
    for column in columns:
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if column.type != pa.string():
            column = column.cast(pa.string())
        _, places, text = column.buffers()
        if rows == 0:
            break
        offsets = np.frombuffer(places, np.int32)[column.offset : column.offset + rows + 1]
        data = np.frombuffer(text, np.uint8) if text is not None and text.size else np.zeros(1, np.uint8)
        valid = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), np.uint8)
        with nogil:
            for n in range(rows):
                h = hashes[n]
                if valid[n]:
                    for i in range(offsets[n], offsets[n + 1]):
                        h = (h ^ data[i]) * PRIME
                    h = (h ^ 0xFF) * PRIME
                else:
                    h = (h ^ 0xFE) * PRIME
                hashes[n] = h
    with nogil:
        for n in range(rows):
            h = hashes[n]
            h = (h ^ (h >> 33)) * <uint64_t>0xff51afd7ed558ccdULL
            h = (h ^ (h >> 33)) * <uint64_t>0xc4ceb9fe1a85ec53ULL
            hashes[n] = h ^ (h >> 33)
    return found
