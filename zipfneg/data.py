"""Files of pairs or counts in, tables of embeddings out, for the command line."""

import contextlib
import csv
import io
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from .checks import NDArray
from .files import replacing
from .training import Pairs

DELIMITERS = ",\t;|"


class Interactions(NamedTuple):
    """Pairs as row numbers, and the ids that the file gave them.

    Items are numbered by their frequency in the training pairs, the most frequent first.
    """

    columns: list[str]  # of queries, items and times as chosen
    train: Pairs
    held_out: Pairs
    query_ids: pa.Array  # (Q,) the file's ids, in order of row number
    item_ids: pa.Array  # (N,)
    item_counts: NDArray  # (N,) in the training pairs


def read_interactions(
    path: Path,
    query_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    delimiter: str | None = None,
) -> Interactions:
    """Read pairs, hold out the last of each query that has two or more, and number the ids.

    Columns not named are the file's first others. "Last" is by `time_column`, or else by the order
    of the file. Ids keep the file's type; those of CSV are int64 if all are written as integers.

    Raises
    ------
    ValueError
        For a malformed file (with its line), an empty one, a missing column, a missing id.
    """
    columns = [query_column, item_column] + ([time_column] if time_column else [])
    table = _read_columns(path, columns, delimiter)
    query, query_ids = codes(table[0])
    item, item_ids = codes(table[1])
    if time_column:
        order = _time_order(path, time_column, table[2])
        query, item = query[order], item[order]

    _, from_end = np.unique(query[::-1], return_index=True)
    last = len(query) - 1 - from_end  # (Q,) the last pair of each query
    held_out = np.zeros(len(query), np.bool_)
    held_out[last[np.bincount(query) > 1]] = True

    counts = np.bincount(item[~held_out], minlength=len(item_ids))
    rank, order = by_frequency(counts)
    item = rank[item]
    return Interactions(
        table.column_names,
        Pairs(query[~held_out], item[~held_out]),
        Pairs(query[held_out], item[held_out]),
        query_ids,
        item_ids.take(pa.array(order)),
        counts[order],
    )


def read_counts(
    path: Path,
    item_column: str | None = None,
    count_column: str | None = None,
    delimiter: str | None = None,
) -> tuple[str, NDArray]:
    """How often each id occurs, and in words where that was found.

    Without `count_column` every row is an occurrence of its item. With it each row brings its
    count: to its item if that column is named too, else to an id of its own. Text (.txt) whose
    first line has no delimiter is a list without a header, one id a line.

    Raises
    ------
    ValueError
        As `read_interactions`, and for counts that are none, and for fewer than three ids.
    """
    _expect_file(path)
    named = [name for name in (item_column, count_column) if name is not None]
    listed = None if named or delimiter else _listed_ids(path)
    counts: NDArray
    if listed is not None:
        source, counts = "one id a line", np.array(list(listed.values()), np.float64)
    else:
        table = _read_columns(path, [*named] or [None], delimiter)
        source = f"occurrences of {table.column_names[0]!r}"
        weights = None
        if count_column is not None:
            source = f"counts from {count_column!r}"
            weights = counts = _count_values(path, count_column, table[-1], delimiter)
        if count_column is None or item_column is not None:
            number, ids = codes(table[0])
            counts = np.bincount(number, weights, minlength=len(ids))
            if weights is not None:
                source += f" by {item_column!r}"
    if np.count_nonzero(counts) < 3:
        raise ValueError(
            f"{path}: expected three different ids or more, got {np.count_nonzero(counts)}"
        )
    return source, counts


def _listed_ids(path: Path) -> Counter[str] | None:
    """The ids of a list, one a line, with their number; None if the file is no list."""
    if not re.search(r"\.txt(\.\w+)?$", path.name.lower()):
        return None
    try:
        with _open_text(path, "strict") as lines:
            first = lines.readline()
            if any(by in first for by in DELIMITERS):
                return None
            ids = Counter(line.strip() for line in itertools.chain([first], lines))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    del ids[""]
    return ids


def _count_values(path: Path, name: str, column: pa.ChunkedArray, delimiter: str | None) -> NDArray:
    try:
        counts = pc.cast(column, pa.float64(), safe=False).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: column {name!r}: expected numbers: {error}") from error
    bad = ~((counts >= 0) & np.isfinite(counts))
    if bad.any():
        row = int(np.argmax(bad))
        if path.suffix.lower() != ".parquet":
            delimiter = _header(path, delimiter, 1)[1]
        raise ValueError(
            f"{path}: column {name!r}: expected counts ≥ 0, got {counts[row]:g} in "
            f"{_place(path, delimiter, row)}"
        )
    return counts


def _expect_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: {'expected a file' if path.exists() else 'no such file'}")


def _read_columns(path: Path, columns: list[str | None], delimiter: str | None) -> pa.Table:
    """The columns of a Parquet or CSV file in the given order; those of CSV as int64 or text."""
    _expect_file(path)
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        if is_parquet:
            names = _chosen(path, pa.parquet.read_schema(path).names, columns)
            table = pa.parquet.read_table(path, columns=names).select(names)
        else:
            header, delimiter = _header(path, delimiter, min(2, len(columns)))
            names = _chosen(path, header, columns)
            table = pa.csv.read_csv(
                path,
                pa.csv.ReadOptions(use_threads=False),  # threads would lose the row of an error
                pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                pa.csv.ConvertOptions(
                    include_columns=names,
                    # Inference would make one id of "7" and "007".
                    column_types=dict.fromkeys(names, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
    except (pa.ArrowInvalid, pa.ArrowTypeError, csv.Error, OSError) as error:
        at_row = re.compile(r"Row #(\d+)")  # Arrow counts records, the header among them
        text = at_row.sub(lambda found: f"line {_line(path, delimiter, int(found[1]))}", str(error))
        raise ValueError(f"{path}: {text}") from error
    if not table.num_rows:
        raise ValueError(f"{path}: expected at least one row of data, got none")
    return pa.table(
        [
            _plain(path, name, table[name], None if is_parquet else delimiter)
            for name in table.column_names
        ],
        names,
    )


def _plain(
    path: Path, name: str, column: pa.ChunkedArray, delimiter: str | None
) -> pa.ChunkedArray:
    """The column checked, without Parquet's dictionaries; text of CSV as int64 if that is exact."""
    if pa.types.is_nested(column.type):
        raise ValueError(f"{path}: column {name!r}: expected plain values, got {column.type}")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = pc.is_null(column, nan_is_null=True)
    if pc.any(missing).as_py():
        row = pc.index(missing, True).as_py()
        raise ValueError(f"{path}: column {name!r} is empty in {_place(path, delimiter, row)}")
    if delimiter:
        with contextlib.suppress(pa.ArrowInvalid):
            numbers = pc.cast(column, pa.int64())
            # "007" is a name, not a number.
            if pc.all(pc.equal(pc.cast(numbers, pa.string()), column)).as_py():
                return numbers
    return column


def _place(path: Path, delimiter: str | None, row: int) -> str:
    """Row `row` of the data as a reader of the file counts; Parquet has no delimiter."""
    return f"line {_line(path, delimiter, row + 2)}" if delimiter else f"row {row + 1}"


def _open_text(path: Path, errors: str = "replace") -> io.TextIOWrapper:
    # Arrow's stream unpacks .gz and the like by the file's name.
    stream = pa.input_stream(str(path))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")


def _header(path: Path, delimiter: str | None, least: int) -> tuple[list[str], str]:
    with _open_text(path) as lines:
        header = lines.readline()
    if not header.strip():
        raise ValueError(f"{path}: expected a header line, got an empty one")
    if "\ufffd" in header:
        raise ValueError(f"{path}: expected UTF-8 text")

    def split(by: str) -> list[str]:
        return next(csv.reader([header], delimiter=by))

    if delimiter is None:
        delimiter = max(DELIMITERS, key=lambda by: len(split(by)))
        if len(split(delimiter)) < least:
            raise ValueError(
                f"{path}: expected a header of two columns or more, separated by comma, tab, "
                f"semicolon or bar, got {header.strip()[:80]!r}"
            )
    delimiter = {"\\t": "\t"}.get(delimiter, delimiter)  # as a shell passes it on
    if len(delimiter) != 1 or not delimiter.isascii():
        raise ValueError(f"delimiter: expected one ASCII character, got {delimiter!r}")
    return split(delimiter), delimiter


def _line(path: Path, delimiter: str | None, record: int) -> int:
    """The line in which a CSV file's record ends, the header being record 1.

    Blank lines are no records, and quoted fields may hold line ends.
    """
    with _open_text(path) as lines, contextlib.suppress(csv.Error):
        reader = csv.reader(lines, delimiter=delimiter or ",")
        return next(itertools.islice((reader.line_num for row in reader if row), record - 1, None))
    return record


def _chosen(path: Path, names: list[str], columns: list[str | None]) -> list[str]:
    for name in columns:
        if name is not None and name not in names:
            raise ValueError(f"{path}: no column {name!r}; the file has {', '.join(names)}")
    # A column without a name is an index that pandas wrote.
    free = [name for name in names if name and name not in columns]
    if len(free) < columns.count(None):
        least = "two columns or more" if len(columns) > 1 else "a column with a name"
        raise ValueError(f"{path}: expected {least}, got {', '.join(names)}")
    chosen = [name if name is not None else free.pop(0) for name in columns]
    for name in chosen:
        if chosen.count(name) > 1 or names.count(name) > 1:
            raise ValueError(f"{path}: expected different columns, got {name!r} twice")
    return chosen


def _time_order(path: Path, name: str, times: pa.ChunkedArray) -> NDArray:
    """What sorts the times, numbers or ISO 8601; ties keep the file's order."""
    if pa.types.is_string(times.type) or pa.types.is_large_string(times.type):
        for kind in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            with contextlib.suppress(pa.ArrowInvalid):
                times = pc.cast(times, kind)
                break
        else:
            raise ValueError(
                f"{path}: column {name!r}: expected numbers, or times as 2024-12-31 23:59:59, "
                f"got text such as {times[0].as_py()!r}"
            )
    return pc.sort_indices(times).to_numpy()  # stable


def codes(column: pa.ChunkedArray) -> tuple[NDArray, pa.Array]:
    """Row numbers in order of first appearance, and the ids they stand for."""
    encoded = column.dictionary_encode().combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def by_frequency(counts: NDArray) -> tuple[NDArray, NDArray]:
    """The frequency rank of each, and the order that it puts them in; ties as they stand."""
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank, order


def save_embeddings(path: Path, ids: pa.Array, embeddings: NDArray, **columns: NDArray) -> None:
    """A Parquet table of the file's own ids, further columns, and an embedding in each row."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    extra = {name: pa.array(values) for name, values in columns.items()}
    with replacing(path) as file:
        pa.parquet.write_table(pa.table({"id": ids, **extra, "embedding": rows}), file)
