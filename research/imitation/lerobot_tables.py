"""The tables of LeRobot data sets, parquet and JSON lines; whatever is wrong with one is a `UserError`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from research.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    import pyarrow


class Table:
    """Rows of a parquet file.

    Args:
        path: the file, for messages.
        content: its rows.
    """

    def __init__(self, path: Path, content: pyarrow.Table):
        self.path, self._content = path, content

    def __len__(self) -> int:
        return self._content.num_rows

    @property
    def names(self) -> list[str]:
        """The columns."""
        return self._content.column_names

    def values(self, column: str) -> list:
        """A column as Python values."""
        if column not in self.names:
            hint = did_you_mean(column, self.names)
            raise UserError(f"demonstrations: {self.path} has no column {column!r}{hint}")
        return self._content.column(column).to_pylist()

    def numbers(self, column: str, shape: Sequence[int]) -> np.ndarray:
        """A column as float32 `[rows, *shape]`.

        Raises:
            UserError: it has another shape, or no finite numbers.
        """
        values = self.values(column)
        try:
            array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._odd(column, shape, "is of uneven length, or holds what is no number") from error
        # A feature of one number may be stored without a dimension of its own.
        if array.shape == (len(values),) and tuple(shape) == (1,):
            array = array[:, None]
        if array.shape != (len(values), *shape):
            raise self._odd(column, shape, f"has the shape {list(array.shape[1:])}")
        if not np.isfinite(array).all():
            raise self._odd(column, shape, "holds what is no finite number")
        return array

    def _odd(self, column: str, shape: Sequence[int], what: str) -> UserError:
        return UserError(
            f"demonstrations: {self.path}: {column!r} {what}; meta/info.json says that its shape is {list(shape)}"
        )

    def where(self, column: str, value: int) -> Table:
        """The rows in which a column has a value."""
        self.values(column)
        mask = np.array(self._content.column(column).to_numpy()) == value
        return Table(self.path, self._content.filter(mask))


@lru_cache(maxsize=2)  # a file of several episodes is asked for once for each of them
def read_table(path: Path, columns: tuple[str, ...] | None = None) -> Table:
    """Read a parquet file.

    Args:
        path: the file.
        columns: those to read; None: all.
    Raises:
        UserError: it is missing or damaged, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"demonstrations: {path} does not exist; the data set is not complete")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        return Table(path, file.read(columns=wanted))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"demonstrations: {path} cannot be read: {one_line(error)[:200]}") from error


def read_json_lines(path: Path, number: str, text: str | None = None) -> list[dict[str, Any]]:
    """Read a file that has one JSON object on each line.

    Args:
        path: the file.
        number: a key that each of them has, with a whole number.
        text: another, with text.
    Raises:
        UserError: it cannot be read, or a line is another thing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"demonstrations: {path} cannot be read; the data set is not complete") from error
    rows = []
    for at, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            fits = isinstance(row[number], int) and (text is None or isinstance(row[text], str))
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            what = number if text is None else f"{number} and {text}"
            raise UserError(f"demonstrations: {path}, line {at}: expected a JSON object with {what}")
        rows.append(row)
    return rows
