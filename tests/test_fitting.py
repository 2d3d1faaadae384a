"""`zipfneg fit`: a law for the counts of a file."""

import gzip
import importlib.util
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from zipfneg import LogUniform, ZipfMandelbrot, fitting
from zipfneg.data import read_counts

LAW = ZipfMandelbrot(500, 1.3, 4.0)


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """`zipfneg fit` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: run("fit", *args)


@pytest.fixture(scope="module")
def counts():
    """Draws from LAW, by ids that are not ranks."""
    shuffled = np.random.default_rng(0).permutation(500)
    return np.bincount(shuffled[LAW.draw(200_000, seed=0)], minlength=500)


def _file(folder, content, name="counts.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _figures(text):
    """Exponent and shift with their errors; KL and KS by law; the law of the line of Python."""
    number = r"(-?\d[\d.e+-]*)"
    parameters = {
        name: (float(value), float(error))
        for name, value, error in re.findall(rf"(exponent|shift) +{number} ± {number}", text)
    }
    table = re.findall(rf"^([\w-]+) +{number} +{number}$", text, re.MULTILINE)
    (line,) = re.findall(r"^law = (ZipfMandelbrot\(.*\))  #", text, re.MULTILINE)
    return (
        parameters,
        {name: (float(kl), float(ks)) for name, kl, ks in table},
        eval(line, {"ZipfMandelbrot": ZipfMandelbrot}),
    )


# What is fitted


def test_by_hand():
    found = fitting.fit(np.array([1, 0, 4, 2]))
    assert found.counts.tolist() == [4, 2, 1, 0]
    assert list(found.laws) == ["Zipf-Mandelbrot", "log-uniform", "uniform"]
    shares = np.array([4, 2, 1]) / 7
    entropy = -(shares * np.log(shares)).sum()
    assert found.kl["uniform"] == pytest.approx(math.log(4) - entropy)
    assert found.ks["uniform"] == pytest.approx(6 / 7 - 1 / 2)
    log_uniform = np.log([2, 3 / 2, 4 / 3]) / math.log(5)
    assert found.kl["log-uniform"] == pytest.approx(-(shares * np.log(log_uniform)).sum() - entropy)
    assert found.ks["log-uniform"] == pytest.approx(6 / 7 - math.log(3) / math.log(5))
    assert found.kl["Zipf-Mandelbrot"] == pytest.approx(found.law.fitted.kl)
    assert found.ks["Zipf-Mandelbrot"] == pytest.approx(found.law.fitted.ks)


def test_residuals_by_hand():
    residual, first, last = fitting.binned_residuals(np.array([4.0, 2, 0]), LogUniform(3))
    assert first.tolist() == last.tolist() == [1, 2, 3]
    expected = np.log(np.array([4, 2]) / 6 / (np.log([2, 3 / 2]) / math.log(4)))
    assert residual[:2] == pytest.approx(expected)
    assert np.isnan(residual[2])


@pytest.mark.parametrize("size", [1, 2, 47, 48, 49, 1000])
def test_bins_hold_every_rank_once(size):
    law = LogUniform(size)
    counts = 10 * np.exp(law.log_prob(np.arange(size)))
    residual, first, last = fitting.binned_residuals(counts, law)
    assert first[0] == 1
    assert last[-1] == size
    assert (first[1:] == last[:-1] + 1).all()
    assert residual == pytest.approx(np.zeros(len(first)), abs=1e-12)


def _lines(header, rows):
    return "".join(f"{line}\n" for line in [*header, *rows])


@pytest.mark.parametrize("kind", ["counts", "csv", "gz", "parquet", "txt", "txt.gz"])
def test_end_to_end(run, tmp_path, counts, kind):
    path, options, source = tmp_path / f"data.{kind}", [], "occurrences of 'item'"
    ids = np.repeat(np.arange(500), counts)
    if kind == "counts":
        path.write_text(_lines(["id,n"], (f"x{k},{n}" for k, n in enumerate(counts))))
        options, source = ["--counts", "n"], "counts from 'n'"
    elif kind == "csv":
        path.write_text(_lines(["user;item"], (f"ann;{k}" for k in ids)))
        options = ["--item", "item"]
    elif kind == "gz":
        path = path.with_suffix(".tsv.gz")
        path.write_bytes(gzip.compress(_lines(["item\tuser"], (f"{k}\tann" for k in ids)).encode()))
    elif kind == "parquet":
        pa.parquet.write_table(pa.table({"item": ids, "user": ids % 7}), path)
    else:
        text, source = _lines([], (f"w{k}" for k in ids)).encode(), "one id a line"
        path.write_bytes(gzip.compress(text) if kind == "txt.gz" else text)
    status, text, err = run(path, *options)
    assert (status, err) == (0, "")

    # An id without a draw is known only where its count stands in the file.
    kept = counts if kind == "counts" else counts[counts > 0]
    assert text.startswith(f"{path}: {source}\n{len(kept)} ids, 200,000 occurrences\n")
    parameters, table, law = _figures(text)
    fitted = ZipfMandelbrot.fit(kept)
    for name, true in (("exponent", LAW.exponent), ("shift", LAW.shift)):
        value, error = parameters[name]
        assert value == pytest.approx(getattr(fitted, name), abs=1e-4)
        assert abs(value - true) < 5 * error < 0.5
    assert law.num_items == len(kept)
    assert (law.exponent, law.shift) == pytest.approx((fitted.exponent, fitted.shift), rel=1e-7)
    assert table["Zipf-Mandelbrot"] == pytest.approx(fitted.fitted[2:4], abs=1e-4)
    share = np.sort(kept)[::-1] / kept.sum()
    seen = share[share > 0]
    uniform_kl = np.log(len(kept)) + (seen * np.log(seen)).sum()
    uniform_ks = (np.cumsum(share) - np.arange(1, len(kept) + 1) / len(kept)).max()
    assert table["uniform"] == pytest.approx((uniform_kl, uniform_ks), abs=1e-4)
    assert table["Zipf-Mandelbrot"][0] < 0.01 < table["log-uniform"][0] < table["uniform"][0]
    assert "Empirical(counts) where the counts are at hand, for it is exact;" in text
    assert re.search(r"\n +else Zipf-Mandelbrot, 0\.\d+ nats per draw closer than log-", text)

    assert text.endswith("picture: zipfneg-fit/fit.png\n")
    picture = (tmp_path / "zipfneg-fit" / "fit.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_log_uniform_counts_need_no_fit(run, tmp_path):
    counts = np.exp(LogUniform(300).log_prob(np.arange(300)))
    path = _file(tmp_path, _lines(["n"], counts))
    status, text, _ = run(path, "--counts", "n", "--out", tmp_path / "a" / "b")
    assert status == 0
    assert "300 ids, 1 occurrences" in text
    assert re.search(r"else log-uniform: fitting gains only -?\d\S* nats per draw\n", text)
    assert (tmp_path / "a" / "b" / "fit.png").exists()


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ([5, 5, 5, 5], False),
        ([1, 1, 1], False),
        ([1e200, 1e199, 1, 0], True),
        (0.5 ** np.arange(60), True),
        (np.exp(-0.5 * np.arange(30.0) ** 2), True),
    ],
    ids=["equal", "three", "steep", "geometric", "normal"],
)
def test_counts_of_no_such_law(run, tmp_path, counts, note):
    path = _file(tmp_path, _lines(["n"], counts))
    status, text, err = run(path, "--counts", "n")
    assert (status, err) == (0, "")
    assert ("the counts fall faster than any power of the rank" in text) == note
    assert "nan" not in text
    assert (tmp_path / "zipfneg-fit" / "fit.png").exists()


# What is read


@pytest.mark.parametrize(
    ("name", "content", "columns", "source", "counts"),
    [
        ("a.csv", "u,i\n1,a\n1,b\n2,a\n3,c\n", {}, "occurrences of 'u'", [2, 1, 1]),
        ("a.csv", "u\n7\n007\n7\n8\n", {}, "occurrences of 'u'", [2, 1, 1]),
        ("a.csv", "u,n\na,1\na,2.5\nb,0\n", {"count_column": "n"}, "counts from 'n'", None),
        (
            "a.csv",
            "n,u\n1,a\n2.5,b\n4,c\n1e1,a\n0,d\n",
            {"count_column": "n", "item_column": "u"},
            "counts from 'n' by 'u'",
            [11, 2.5, 4, 0],
        ),
        ("a.txt", "b c\r\nb c\r\n\r\n a\r\nd", {}, "one id a line", [2, 1, 1]),
        ("A.TXT", "u\nü\nu\nw\n", {}, "one id a line", [2, 1, 1]),
        ("a.txt", "i,u\na,1\nb,1\nc,2\n", {}, "occurrences of 'i'", [1, 1, 1]),
        ("a.txt", "i\na\nb\nc\n", {"item_column": "i"}, "occurrences of 'i'", [1, 1, 1]),
        ("a.dat", "i n\na 3\nb 2\nc 2\n", {"delimiter": " "}, "occurrences of 'i'", [1, 1, 1]),
    ],
)
def test_read_counts(tmp_path, name, content, columns, source, counts):
    path = _file(tmp_path, content, name)
    if counts is None:
        with pytest.raises(
            ValueError, match=r"a\.csv: expected three different ids or more, got 2"
        ):
            read_counts(path, **columns)
    else:
        found = read_counts(path, **columns)
        assert found[0] == source
        assert found[1].tolist() == counts


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float32(), pa.decimal128(21, 2)])
def test_counts_of_parquet(tmp_path, kind):
    path = tmp_path / "counts.parquet"
    pa.parquet.write_table(pa.table({"n": pa.array([3, 1, 2]).cast(kind)}), path)
    assert read_counts(path, count_column="n")[1].tolist() == [3, 1, 2]


# What is refused


@pytest.mark.parametrize(
    ("content", "options", "match"),
    [
        ("n\n3\n-1\n2\n", ["--counts", "n"], "column 'n': expected counts ≥ 0, got -1 in line 3"),
        ("n\n\n3\n\nnan\n2\n", ["--counts", "n"], "expected counts ≥ 0, got nan in line 5"),
        ("n,i\n1,a\ninf,b\n", ["--counts", "n"], "expected counts ≥ 0, got inf in line 3"),
        ("n,i\n1,a\nmany,b\n", ["--counts", "n"], "column 'n': expected numbers: .*'many'"),
        ("n,i\n1,a\n,b\n", ["--counts", "n"], "column 'n' is empty in line 3"),
        ("n,i\n1,a\n2,b\n0,c\n", ["--counts", "n"], "expected three different ids or more, got 2"),
        ("n\n0\n0\n0\n", ["--counts", "n"], "expected three different ids or more, got 0"),
        ("i\na\nb\nb\n", [], "expected three different ids or more, got 2"),
        ("i\n", [], "expected at least one row of data, got none"),
        ("", [], "expected a header line, got an empty one"),
        ("i\na\nb,c\n", [], "line 3: Expected 1 columns, got 2"),
        ("i,n\na,1\n", ["--counts", "count"], "no column 'count'; the file has i, n"),
        ("i,n\na,1\n", ["--item", "movie"], "no column 'movie'; the file has i, n"),
        ("i,n\na,1\n", ["--item", "n", "--counts", "n"], "expected different columns, got 'n' twi"),
        (",\na,1\n", [], "expected a column with a name, got"),
        ("i,n\na,1\n", ["--delimiter", "ab"], "delimiter: expected one ASCII character, got 'ab'"),
    ],
)
def test_bad_files(run, tmp_path, content, options, match):
    path = _file(tmp_path, content)
    _refused(run(path, *options), match)
    assert not (tmp_path / "zipfneg-fit").exists()


def _refused(result, match):
    status, out, err = result
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.fullmatch(rf"error: .*{match}.*\n", err), err


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "expected three different ids or more, got 0"),
        ("a.txt", b"\n \n", "expected three different ids or more, got 0"),
        ("a.txt", b"a\nb\n\xff\n", "expected UTF-8 text"),
        ("a.txt", "a\nb\nc\n".encode("utf-16"), "expected UTF-8 text"),
        ("a.txt.gz", b"a\nb\nc\n", r"a\.txt\.gz: "),
        ("a.parquet", b"a\nb\nc\n", r"a\.parquet: "),
    ],
)
def test_bad_texts(run, tmp_path, name, content, match):
    _refused(run(_file(tmp_path, content, name)), match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (pa.array([1, -2, 3]), "column 'n': expected counts ≥ 0, got -2 in row 2"),
        (pa.array([1, None, 3]), "column 'n' is empty in row 2"),
        (pa.array(["1", "b", "3"]), "column 'n': expected numbers: .*'b'"),
        (pa.array([1, 2, 3], pa.timestamp("s")), "column 'n': expected numbers: .*timestamp"),
        (pa.array([[1], [2], [3]]), "column 'n': expected plain values"),
    ],
    ids=["negative", "empty", "text", "times", "lists"],
)
def test_bad_parquet(run, tmp_path, values, match):
    path = tmp_path / "counts.parquet"
    pa.parquet.write_table(pa.table({"n": values}), path)
    _refused(run(path, "--counts", "n"), match)


def test_no_file(run, tmp_path):
    for name in ("none.csv", "none.txt", "none.parquet"):
        _refused(run(tmp_path / name), rf"{name}: no such file")
    _refused(run(tmp_path), "expected a file")


def test_output_that_is_a_file(run, tmp_path):
    path = _file(tmp_path, "i\na\nb\nc\n")
    _refused(run(path, "--out", path), r"counts\.csv: File exists")


def test_missing_packages(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name in ("pyarrow", "matplotlib") else found(name, *args),
    )
    _refused(
        run("any.csv"),
        r"this command needs matplotlib, pyarrow; install with: pip install 'zipfneg\[demo\]'",
    )


def test_help(run):
    status, out, _ = run("--help")
    assert status == 0
    for text in ("Zipf-Mandelbrot", "--item", "--counts", "--out", "fit.png", "Example", ".txt"):
        assert text in out
    for undone in ("**", "``", "[bold]"):
        assert undone not in out
