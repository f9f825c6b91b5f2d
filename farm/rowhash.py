"""64-bit hashes of the rows of a prompt table, without a Python step for each row.

A text's hash is a polynomial over its bytes modulo 2**64, mixed: equal texts have equal hashes everywhere, unequal ones
nearly always unequal ones. Enough to look for doubled and changed rows; what decides a pixel is under sha256.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Hashes = npt.NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_SLICE_ROWS = 8192
_NULL = np.uint64(0x5851F42D4C957F2D)


def column_hashes(column: pa.Array) -> Hashes:
    """Return a hash per value of a column of texts, numbers or booleans."""
    slices = [_slice_hashes(column.slice(at, _SLICE_ROWS)) for at in range(0, len(column), _SLICE_ROWS)]
    return np.concatenate(slices) if slices else np.zeros(0, np.uint64)


def row_hashes(columns: list[pa.Array]) -> Hashes:
    """Return a hash per row over all the columns; their order counts."""
    result = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        result = _mixed(result * _BASE + column_hashes(column))
    return result


def _slice_hashes(column: pa.Array) -> Hashes:
    if pa.types.is_string(column.type):
        hashes = _text_hashes(column)
    elif pa.types.is_null(column.type):
        return np.full(len(column), _NULL)
    elif pa.types.is_floating(column.type):
        hashes = np.asarray(column.fill_null(0.0).cast(pa.float64())).view(np.uint64)
    else:
        numbers = (
            column.cast(pa.int64()) if not pa.types.is_boolean(column.type) else column.cast(pa.int8()).cast(pa.int64())
        )
        hashes = np.asarray(numbers.fill_null(0)).view(np.uint64)
    return np.where(np.asarray(pc.is_null(column)), _NULL, _mixed(hashes))


def _text_hashes(column: pa.Array) -> Hashes:
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1].astype(
        np.int64
    )
    first, last = int(offsets[0]), int(offsets[-1])
    lengths = np.diff(offsets).astype(np.uint64)
    if first == last:
        return _mixed(lengths)
    data = np.frombuffer(column.buffers()[2], np.uint8)[first:last]
    powers = _powers(_BASE, len(data) + 1)
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    places = offsets - first
    shift_back = _powers(_INVERSE, len(data) + 1)[places[:-1]]
    return _mixed((sums[places[1:]] - sums[places[:-1]]) * shift_back + lengths)


_tables: dict[int, Hashes] = {}


def _powers(base: np.uint64, count: int) -> Hashes:
    """Return base**0, base**1, ... modulo 2**64; the longest table asked for is kept."""
    table = _tables.get(int(base))
    if table is None or len(table) < count:
        factors = np.full(max(count, 2**16), base, np.uint64)
        factors[0] = 1
        table = _tables[int(base)] = np.cumprod(factors)
    return table[:count]


def _mixed(values: Hashes) -> Hashes:
    """Return values whose every bit depends on every bit (the finaliser of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
