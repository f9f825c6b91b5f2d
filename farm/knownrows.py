"""Which rows of a keyed prompt source earlier runs of the job have already, by 64-bit hashes.

Costs 16 bytes a row of those runs. A chance collision can make a row look changed, which is refused, never lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from farm.rowhash import Hashes, column_hashes, row_hashes

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class KnownRows:
    """Rows of earlier runs by hashes of key and content, ordered by key."""

    keys: Hashes
    rows: Hashes

    @classmethod
    def of(cls, tables: Iterable[pa.Table], *, total: int) -> Self:
        """Take in tables of `total` rows together."""
        keys, rows = np.zeros(total, np.uint64), np.zeros(total, np.uint64)
        at = 0
        for table in tables:
            keys[at : at + table.num_rows] = column_hashes(table["key"].combine_chunks())
            rows[at : at + table.num_rows] = row_hashes(_content(table))
            at += table.num_rows
        order = np.argsort(keys)
        return cls(keys=keys[order], rows=rows[order])

    def match(self, table: pa.Table) -> tuple[Mask, Mask]:
        """Return which rows have a known key, and which of those also the known content."""
        keys = column_hashes(table["key"].combine_chunks())
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        present = self.keys[places] == keys
        return present, present & (self.rows[places] == row_hashes(_content(table)))

    def without(self, table: pa.Table) -> pa.Table:
        """Return the table's rows whose keys are not known."""
        return table.filter(pa.array(~self.match(table)[0]))


def _content(table: pa.Table) -> list[pa.Array]:
    return [table[name].combine_chunks() for name in sorted(table.column_names) if name != "key"]
