"""Files of pairs in, tables of embeddings out, and files that are whole or not there."""

import datetime
import errno
import gzip
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from zipfneg import data
from zipfneg.data import read_interactions, save_embeddings
from zipfneg.files import replacing, save_arrays


def _file(folder, content, name="pairs.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _parquet(folder, *, row_group_size=None, **columns):
    path = folder / "pairs.parquet"
    pa.parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def _named(pairs, found):
    """Pairs by the file's own ids."""
    queries, items = found.query_ids.to_pylist(), found.item_ids.to_pylist()
    return [(queries[q], items[i]) for q, i in zip(pairs.query_ids, pairs.item_ids, strict=True)]


def _all_pairs(found):
    return sorted(_named(found.train, found) + _named(found.held_out, found))


# What is read


def test_by_hand(tmp_path):
    path = _file(
        tmp_path, "user,movie\nann,up\nbob,jaws\nann,jaws\ncat,jaws\nbob,big\nann,rio\ncat,up\n"
    )
    found = read_interactions(path)
    assert found.columns == ["user", "movie"]
    assert found.query_ids.to_pylist() == ["ann", "bob", "cat"]
    assert _named(found.train, found) == [
        ("ann", "up"),
        ("bob", "jaws"),
        ("ann", "jaws"),
        ("cat", "jaws"),
    ]
    assert _named(found.held_out, found) == [("bob", "big"), ("ann", "rio"), ("cat", "up")]
    # By frequency in training, ties as they first came; last what is only held out.
    assert found.item_ids.to_pylist() == ["jaws", "up", "big", "rio"]
    assert found.item_counts.tolist() == [3, 1, 0, 0]


def test_invariants(tmp_path):
    rng = np.random.default_rng(0)
    q, i = rng.integers(0, 90, 400), rng.integers(0, 60, 400)
    lines = [f"{a},{b}" for a, b in zip(q, i, strict=True)]
    found = read_interactions(_file(tmp_path, "\n".join(["q,i", *lines, ""])))
    assert _all_pairs(found) == sorted(zip(q.tolist(), i.tolist(), strict=True))
    last = dict(zip(q.tolist(), i.tolist(), strict=True))
    often = {a for a in q.tolist() if (q == a).sum() > 1}
    assert 0 < len(often) < len(last)
    assert dict(_named(found.held_out, found)) == {a: last[a] for a in often}
    assert len(found.held_out.query_ids) == len(often)
    counts = np.bincount(found.train.item_ids, minlength=len(found.item_ids))
    assert (found.item_counts == counts).all()
    assert (np.diff(counts) <= 0).all()
    assert len(found.item_ids) == len(set(found.item_ids.to_pylist())) == len(np.unique(i))


@pytest.mark.parametrize("by", [",", "\t", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_separators_are_told_from_the_header(tmp_path, by, end, bom):
    rows = [["user id", "item"], ["ann", "1"], ["bob", "2"]]
    path = _file(tmp_path, bom + end.join(by.join(row) for row in rows) + end)
    found = read_interactions(path, "user id")
    assert _all_pairs(found) == [("ann", 1), ("bob", 2)]


def test_header_with_several_separators(tmp_path):
    path = _file(tmp_path, '"user, or who";"item"\n1;a\n')
    assert _all_pairs(read_interactions(path, "user, or who")) == [(1, "a")]
    path = _file(tmp_path, "user|item,what\n1|a,b\n")
    found = read_interactions(path, delimiter="|")
    assert (found.columns, _all_pairs(found)) == (["user", "item,what"], [(1, "a,b")])
    path = _file(tmp_path, "user\titem,what\n1\ta,b\n")
    assert _all_pairs(read_interactions(path, delimiter="\\t")) == [(1, "a,b")]
    path = _file(tmp_path, "user:item\n1:a\n")
    assert _all_pairs(read_interactions(path, delimiter=":")) == [(1, "a")]


def test_quoted_fields(tmp_path):
    text = 'u,i\n"a,b","say ""x"""\n"two\nlines",NA\n null ,é\n'
    found = read_interactions(_file(tmp_path, text))
    assert _all_pairs(found) == sorted([("a,b", 'say "x"'), ("two\nlines", "NA"), (" null ", "é")])


def test_quoted_line_ends_in_a_file_of_many_blocks(tmp_path):
    path = _file(tmp_path, "u,i\n" + '"two\nlines",1\nb,"3\n3"\n' * 100_000)
    found = read_interactions(path)
    assert found.query_ids.to_pylist() == ["two\nlines", "b"]
    assert found.item_counts.tolist() == [99_999] * 2


def test_compressed(tmp_path):
    path = _file(tmp_path, gzip.compress(b"\xef\xbb\xbfu;i\n1;a\n1;b\n"), "pairs.csv.gz")
    assert _all_pairs(read_interactions(path, "u")) == [(1, "a"), (1, "b")]


def test_ids_of_csv(tmp_path):
    def ids(*values):
        path = _file(tmp_path, "q,i\n" + "".join(f"{value},x\n" for value in values))
        return read_interactions(path).query_ids

    assert ids(3, -7, 3, 2**63 - 1) == pa.array([3, -7, 2**63 - 1])
    assert ids("7", "007") == pa.array(["7", "007"])
    for text in ("+7", " 7", "7.0", "1e3", "-0", str(2**63), "seven"):
        assert ids("7", text) == pa.array(["7", text])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([5, 3, 5], pa.int32()), pa.array([5, 3], pa.int32())),
        (pa.array([5, 3, 5], pa.uint64()), pa.array([5, 3], pa.uint64())),
        (pa.array(["7", "8", "7"]), pa.array(["7", "8"])),
        (pa.array(["a", "b", "a"], pa.large_string()), pa.array(["a", "b"], pa.large_string())),
        (pa.array([b"a", b"\xff", b"a"]), pa.array([b"a", b"\xff"])),
        (pa.array([True, False, True]), pa.array([True, False])),
        (
            pa.array([datetime.date(2024, 1, 2), datetime.date(1960, 1, 1)] * 2)[:3],
            pa.array([datetime.date(2024, 1, 2), datetime.date(1960, 1, 1)]),
        ),
        (
            # The dictionary has values of no row, and one twice.
            pa.DictionaryArray.from_arrays([3, 1, 0], ["b", "a", "x", "b"]),
            pa.array(["b", "a"]),
        ),
    ],
    ids=lambda value: str(value.type),
)
def test_parquet_ids_keep_their_type(tmp_path, ids, expected):
    found = read_interactions(_parquet(tmp_path, q=ids, i=pa.array(["x", "y", "z"])))
    assert found.query_ids == expected
    assert found.train.query_ids.tolist() == [0, 1]
    found = read_interactions(_parquet(tmp_path, q=pa.array([1, 1, 1]), i=ids), "q", "i")
    assert found.item_ids.type == expected.type


def test_parquet_of_several_row_groups(tmp_path):
    for kind in (pa.string(), pa.dictionary(pa.int32(), pa.string())):
        q = pa.array([f"q{k % 7}" for k in range(50)]).cast(kind)
        found = read_interactions(
            _parquet(tmp_path, row_group_size=6, q=q, i=pa.array(np.arange(50)))
        )
        assert _all_pairs(found) == sorted((f"q{k % 7}", k) for k in range(50))


def test_columns_by_name_and_by_default(tmp_path):
    path = _file(tmp_path, "a,b,c,d\n1,2,3,4\n")

    def columns(*args):
        found = read_interactions(path, *args)
        return found.columns, _all_pairs(found)

    assert columns() == (["a", "b"], [(1, 2)])
    assert columns("c") == (["c", "a"], [(3, 1)])
    assert columns(None, "a") == (["b", "a"], [(2, 1)])
    assert columns("d", "b") == (["d", "b"], [(4, 2)])
    assert columns(None, None, "a") == (["b", "c", "a"], [(2, 3)])
    whole = _parquet(tmp_path, a=[1], b=[2], c=[3], d=[4])
    assert _all_pairs(read_interactions(whole, "d", None, "a")) == [(4, 2)]


def test_column_without_a_name_is_no_default(tmp_path):
    found = read_interactions(_file(tmp_path, ",user,item\n0,ann,up\n1,ann,big\n"))
    assert _all_pairs(found) == [("ann", "big"), ("ann", "up")]


# Which pair is the last


def _last(path, time="t"):
    found = read_interactions(path, "q", "i", time)
    return dict(_named(found.held_out, found))


def test_time_orders_the_pairs(tmp_path):
    path = _file(tmp_path, "q,i,t\n1,a,10\n1,b,9\n1,c,-2.5\n2,d,1e3\n2,e,1e2\n")
    assert _last(path) == {1: "a", 2: "d"}
    assert _last(path, None) == {1: "c", 2: "e"}


def test_times_that_tie_keep_the_order_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    q, t = rng.integers(0, 40, 2000), rng.integers(0, 3, 2000)
    rows = [f"{a},{k},{b}" for k, (a, b) in enumerate(zip(q, t, strict=True))]
    found = _last(_file(tmp_path, "\n".join(["q,i,t", *rows, ""])))
    order = np.lexsort((np.arange(2000), t))
    assert found == {int(q[k]): int(k) for k in order}


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-02", "2024-01-10", "2023-12-31"],
        ["2024-01-02 10:00:00", "2024-01-02 10:00:01.5", "2024-01-02 09:59:59"],
        ["2024-01-02T10:00:00Z", "2024-01-02T10:00:00-01:00", "2024-01-02T10:00:00+01:00"],
        [1_700_000_000_000_000_001, 1_700_000_000_000_000_002, 1_700_000_000_000_000_000],
        [0.5, "1e1", 3],
    ],
    ids=str,
)
def test_times_of_csv(tmp_path, times):
    rows = [f"1,{item},{time}\n" for item, time in zip("abc", times, strict=True)]
    assert _last(_file(tmp_path, "q,i,t\n" + "".join(rows))) == {1: "b"}


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint64(),
        pa.float32(),
        pa.date32(),
        pa.timestamp("ns"),
        pa.timestamp("us", "UTC"),
        pa.time32("s"),
        pa.string(),
        pa.large_string(),
    ],
    ids=str,
)
def test_times_of_parquet(tmp_path, kind):
    times = pa.array([9, 10, 8], pa.int32()).cast(pa.int64() if kind != pa.date32() else pa.int32())
    if kind == pa.time32("s"):
        times = times.cast(pa.int32())
    times = times.cast(kind)
    assert _last(_parquet(tmp_path, q=[1, 1, 1], i=["a", "b", "c"], t=times)) == {1: "b"}


# What is refused


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "expected a header line, got an empty one"),
        ("\nu,i\n1,2\n", "expected a header line, got an empty one"),
        ("u,i\n", "expected at least one row of data, got none"),
        ("u,i\n\n\n", "expected at least one row of data, got none"),
        ("u,i", "[Ee]mpty|expected at least one row"),
        ("user\n1\n2\n", "expected a header of two columns or more, separated by .* got 'user'"),
        ("u,i\n1,2\n1,2,3\n", "line 3: Expected 2 columns, got 3: 1,2,3"),
        ("u,i\n1,2\n\n1\n", "line 4: Expected 2 columns, got 1"),
        ('u,i\n"a\nb",2\n1\n', "line 4: Expected 2 columns, got 1"),
        ("u,i\n" + "1,2\n" * 600_000 + "1\n", "line 600002: Expected 2 columns"),
        ("u,i\n1,2\n1,\n", "column 'i' is empty in line 3"),
        ('u,i\n1,2\n"",3\n', "column 'u' is empty in line 3"),
        ('u,i\n"a\nb",2\n\n,3\n', "column 'u' is empty in line 5"),
        (b"u,i\n1,2\nx,\xff\n", "line 3: .*invalid UTF8"),
        (b"u,\xff\n1,2\n", "expected UTF-8"),
        ("u,i\n1,2\n".encode("utf-16"), "expected UTF-8"),
        ("u,u\n1,2\n", "expected different columns, got 'u' twice"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_refused_csv(tmp_path, content, match):
    with pytest.raises(ValueError, match=rf"pairs\.csv: .*{match}"):
        read_interactions(_file(tmp_path, content))


def test_refused_columns(tmp_path):
    path = _file(tmp_path, "user,item,t\n1,2,3\n")
    for file in (path, _parquet(tmp_path, user=[1], item=[2], t=[3])):
        where = rf"{file.name}: "
        for columns in (("movie",), (None, "movie"), (None, None, "movie")):
            with pytest.raises(
                ValueError, match=where + "no column 'movie'; the file has user, item, t"
            ):
                read_interactions(file, *columns)
        for columns in (("item", "item"), (None, "t", "t")):
            with pytest.raises(ValueError, match=where + "expected different columns, got '.*' tw"):
                read_interactions(file, *columns)
    with pytest.raises(ValueError, match="expected two columns or more, got user"):
        read_interactions(_parquet(tmp_path, user=[1]))
    with pytest.raises(ValueError, match="expected two columns or more, got user,item,t"):
        read_interactions(path, delimiter=";")
    for delimiter in ("", ",,", "é"):
        with pytest.raises(ValueError, match="delimiter: expected one ASCII character, got"):
            read_interactions(path, delimiter=delimiter)


@pytest.mark.parametrize("time", ["soon", "3 o'clock", "2024-99-99"])
def test_refused_times(tmp_path, time):
    path = _file(tmp_path, f"q,i,t\n1,2,{time}\n")
    with pytest.raises(ValueError, match=r"pairs\.csv: column 't': expected numbers, or times"):
        read_interactions(path, time_column="t")
    path = _file(tmp_path, "q,i,t\n1,2,3\n1,2,\n")
    with pytest.raises(ValueError, match="column 't' is empty in line 3"):
        read_interactions(path, time_column="t")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (pa.array([], pa.int64()), "expected at least one row of data, got none"),
        (pa.array([1, None]), "column 'q' is empty in row 2"),
        (pa.array([np.nan, 1.0]), "column 'q' is empty in row 1"),
        (pa.array(["a", None]).dictionary_encode(), "column 'q' is empty in row 2"),
        (pa.array([[1], [2]]), "column 'q': expected plain values, got list"),
        (pa.array([{"a": 1}] * 2), "column 'q': expected plain values, got struct"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_refused_parquet(tmp_path, ids, match):
    path = _parquet(tmp_path, q=ids, i=pa.array(range(len(ids)), pa.int64()))
    with pytest.raises(ValueError, match=rf"pairs\.parquet: {match}"):
        read_interactions(path)


def test_refused_files(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_interactions(tmp_path / "none.csv")
    for name in ("folder.csv", "folder.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"{name}: expected a file"):
            read_interactions(tmp_path / name)
    for content in (b"", b"u,i\n1,2\n", b"PAR1" + bytes(50) + b"PAR1"):
        with pytest.raises(ValueError, match=r"no\.parquet: .*Parquet|no\.parquet: .*[Tt]hrift"):
            read_interactions(_file(tmp_path, content, "no.parquet"))
    whole = gzip.compress(b"u,i\n" + b"".join(b"%d,2\n" % k for k in range(9999)))
    for content in (b"u,i\n1,2\n", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match=r"no\.csv\.gz: "):
            read_interactions(_file(tmp_path, content, "no.csv.gz"))


# What is written


def _only(folder, name):
    return [path.name for path in folder.iterdir()] == [name]


def test_saved_embeddings(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    path = tmp_path / "new" / "items.parquet"
    for ids in (pa.array(["a", "007", "é"]), pa.array([5, -1, 2**40])):
        save_embeddings(path, ids, rows, count=np.array([4, 2, 0]))
        table = pa.parquet.read_table(path)
        assert table.column_names == ["id", "count", "embedding"]
        assert table["id"].combine_chunks() == ids
        assert table["count"].to_pylist() == [4, 2, 0]
        assert (np.array(table["embedding"].to_pylist(), np.float32) == rows).all()
        assert table["embedding"].type == pa.list_(pa.float32(), 2)
        assert _only(path.parent, path.name)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_saved_files_have_the_usual_permissions(tmp_path, umask, mode):
    earlier = os.umask(umask)
    try:
        save_arrays(tmp_path / "a.npz", x=np.zeros(3))
    finally:
        os.umask(earlier)
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == mode


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_what_raises_while_writing_leaves_no_trace(tmp_path, error, earlier):
    path = tmp_path / "a.bin"
    if earlier:
        path.write_bytes(earlier)

    def write():
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            assert len(list(tmp_path.iterdir())) == 1 + bool(earlier)
            raise error

    with pytest.raises(error):
        write()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([earlier] if earlier else [])


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_full_disk(tmp_path, monkeypatch, call, earlier):
    path = tmp_path / "a.npz"
    if earlier:
        path.write_bytes(earlier)

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="could not save") as caught:
        save_arrays(path, x=np.zeros(3))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    kept = "the earlier file is unharmed" if earlier else "nothing was written"
    assert caught.value.strerror == f"could not save (No space left on device); {kept}"
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([earlier] if earlier else [])


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from zipfneg.data import save_embeddings
from zipfneg.files import replacing, save_arrays
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
rows = np.random.default_rng(0).normal(size=(5000, 8))
for save in (
    lambda: save_arrays(folder / "a.npz", x=rows, y=rows),
    lambda: save_embeddings(folder / "a.parquet", pa.array(range(5000)), rows),
):
    try:
        save()
    except OSError as error:
        print(error.strerror)
with replacing(folder / "small") as file:
    file.write(b"fits")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on file sizes")
def test_file_that_the_system_refuses_to_let_grow(tmp_path):
    pytest.importorskip("resource")
    for name in ("a.npz", "a.parquet"):
        (tmp_path / name).write_bytes(b"earlier")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout == 2 * "could not save (File too large); the earlier file is unharmed\n"
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {"a.npz": b"earlier", "a.parquet": b"earlier", "small": b"fits"}


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    program = """
import os, sys
from pathlib import Path
from zipfneg.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(bytes(9))
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "[a].bin"
    path.write_bytes(b"earlier")
    (tmp_path / ".[a].bin.mine").write_bytes(b"")
    done = subprocess.run([sys.executable, "-c", program, path])
    assert done.returncode == -9
    assert path.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 3
    with replacing(path) as file:
        file.write(b"later")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".[a].bin.mine", "[a].bin"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        save_arrays(tmp_path / "file" / "a.npz", x=np.zeros(3))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OSError, match="could not save"):
        save_arrays(tmp_path / "folder.npz", x=np.zeros(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz"]


def test_by_frequency():
    rank, order = data.by_frequency(np.array([1, 5, 0, 5]))
    assert order.tolist() == [1, 3, 0, 2]
    assert rank.tolist() == [2, 0, 3, 1]
