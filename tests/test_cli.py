"""The command line, from files to files."""

import csv
import errno
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from zipfneg import demo, training

SMALL = ("--num-sampled", 16, "--dim", 8, "--batch-size", 64)
COMMAND = (sys.executable, "-c", "from zipfneg.cli import main; main()")
SLOW_TO_SAVE = (
    *COMMAND[:2],
    f"import os, time; os.fsync = lambda file: time.sleep(0.05); {COMMAND[2]}",
)
TABLES = ("queries", "items", "query_squares", "item_squares", "steps_done")


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """A CSV file of 1,500 pairs of 80 users and about 50 movies, popular ones first."""
    rng = np.random.default_rng(0)
    user, movie = rng.integers(0, 80, 1500), np.minimum(rng.zipf(1.4, 1500), 50)
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    rows = [f"{t},u{u:03},{100 - m}" for t, (u, m) in enumerate(zip(user, movie, strict=True))]
    path.write_text("time,user,movie\n" + "".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def train(ratings):
    """The arguments that train on it."""
    return ("train", ratings, "--query", "user", "--item", "movie", *SMALL)


def _ok(result):
    assert result[0] == 0, result
    return result[1]


def _error(result, status=1):
    """The one line that says what is wrong; what stood above it is progress."""
    assert result[0] == status, result
    *above, line = result[2].strip().split("\n")
    assert line.startswith("error: ")
    assert all("\r" in other for other in above), above
    return line.removeprefix("error: ")


def _model(out):
    """Everything that a run should give, bit for bit."""
    with np.load(out / "checkpoint.npz") as saved:
        tables = {name: saved[name].tobytes() for name in TABLES}
    return tables, *((out / f"{name}.parquet").read_bytes() for name in ("queries", "items"))


def _names(out):
    return sorted(path.name for path in out.iterdir())


FILES = ["checkpoint.npz", "items.parquet", "queries.parquet", "report.json"]


# Help


def test_no_arguments_show_the_help(run):
    _, out, err = run()
    for text in ("zipfneg demo", "zipfneg train", "info", "logQ"):
        assert text in out + err


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("demo", ["286,358", "entropy floor", "--steps", "--out", "minute"]),
        ("train", ["HR@10", "held out", "items.parquet", "--sampler", "--resume", "Example"]),
        ("info", ["devices", "install"]),
    ],
)
def test_help(run, command, texts):
    out = _ok(run(command, "--help"))
    for text in texts:
        assert text in out
    for undone in ("**", "``", "[bold]"):
        assert undone not in out
    options = re.findall(r"^│ \*? *(--?[a-z-]+.*?)│$", out, re.MULTILINE)
    assert all(len(line.split("  ", 1)[1].strip()) > 10 for line in options)


def test_help_fills_lines_of_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    for command in ("train", "demo"):
        text = _ok(run(command, "--help")).split("╭")[0]
        paragraphs = [p.strip().split("\n") for p in re.split(r"\n *\n", text)]
        assert all(len(line.strip()) > 40 for p in paragraphs for line in p[:-1])


def test_installed_command():
    command = Path(sys.executable).with_name("zipfneg")
    if not command.exists():
        pytest.skip("zipfneg is not installed")
    done = subprocess.run([command, "train", "none.csv"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: none.csv: no such file\n")


# Train: what it gives


def _pairs_of(path):
    """{user: movies in order}, read by other means."""
    users = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            users.setdefault(row["user"], []).append(int(row["movie"]))
    return users


@pytest.mark.parametrize("kind", ["csv", "parquet", "by time"])
def test_end_to_end(run, train, ratings, tmp_path, kind):
    out, file, more = tmp_path / "model", ratings, []
    if kind == "parquet":
        file = tmp_path / "ratings.parquet"
        pa.parquet.write_table(pa.csv.read_csv(ratings), file)
    if kind == "by time":
        header, *rows = ratings.read_text().splitlines()
        rows = np.random.default_rng(1).permutation(rows).tolist()
        file, more = tmp_path / "shuffled.csv", ["--time", "time"]
        file.write_text("\n".join([header, *rows, ""]))
    status, text, progress = run(train[0], file, *train[2:], *more, "--epochs", 8, "--out", out)
    assert status == 0
    assert _names(out) == FILES
    users = _pairs_of(ratings)
    items = {movie for movies in users.values() for movie in movies}
    held_out = {user: movies[-1] for user, movies in users.items() if len(movies) > 1}

    assert "queries from 'user', items from 'movie'" in text
    assert (
        f"{1500 - len(held_out):,} pairs to train on, {len(held_out)} held out; "
        f"{len(users)} queries, {len(items)} items"
    ) in text
    # How far, how fast, how long still.
    assert re.search(r"100%.*\[\d\d:\d\d<\d\d:\d\d, +[\d.]+batch/s, loss=\d+\.\d+\]", progress)

    tables = {}
    for name, ids, count in (("queries", users, False), ("items", items, True)):
        table = pa.parquet.read_table(out / f"{name}.parquet")
        assert table.column_names == ["id", "count", "embedding"][:: 1 if count else 2]
        assert sorted(table["id"].to_pylist()) == sorted(ids)
        tables[name] = dict(
            zip(table["id"].to_pylist(), np.array(table["embedding"].to_pylist()), strict=True)
        )
        assert {v.shape for v in tables[name].values()} == {(8,)}
    counts = table["count"].to_pylist()
    assert counts == sorted(counts, reverse=True)
    trained = [movie for movies in users.values() for movie in movies[: max(1, len(movies) - 1)]]
    assert dict(zip(table["id"].to_pylist(), counts, strict=True)) == {
        movie: trained.count(movie) for movie in items
    }

    # The report, from the files alone.
    losses, hits, gains, shown = [], [], [], set()
    for user, target in held_out.items():
        scores = {m: float(tables["queries"][user] @ v) for m, v in tables["items"].items()}
        losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[target])
        known = set(users[user][:-1])
        place = sum(s > scores[target] for m, s in scores.items() if m not in known | {target})
        hits.append(place < 10)
        gains.append((place < 10) / math.log2(place + 2))
        shown.update(sorted(set(scores) - known, key=lambda m, s=scores: -s[m])[:10])
    expected = {
        "log_loss": np.mean(losses),
        "hit_rate": np.mean(hits),
        "ndcg": np.mean(gains),
        "coverage": len(shown) / len(items),
    }
    report = json.loads((out / "report.json").read_text())
    assert report["held_out"] == pytest.approx(expected, rel=1e-5)
    assert report["steps"] == 8 * ((1500 - len(held_out)) // 64)
    assert report["settings"]["num_sampled"] == 16
    assert expected["log_loss"] < math.log(len(items))
    line = next(line for line in text.splitlines() if line.startswith("held out: "))
    assert [float(x) for x in re.findall(r" (\d\.\d{4})", line)] == pytest.approx(
        [expected[name] for name in ("hit_rate", "ndcg", "log_loss", "coverage")], abs=1e-4
    )


@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
@pytest.mark.parametrize("sampler", ["log-uniform", "uniform", "empirical", "in-batch"])
def test_every_sampler_and_correction(run, train, tmp_path, sampler, correction):
    for number, more in enumerate([[], ["--with-replacement", "--power", 0.75]]):
        out = tmp_path / str(number)
        text = _ok(
            run(*train, "--sampler", sampler, "--correction", correction, "--out", out, *more)
        )
        assert "held out: HR@10" in text
        report = json.loads((out / "report.json").read_text())
        assert all(math.isfinite(value) for value in report["held_out"].values())
        if correction == "both":
            assert report["held_out"]["log_loss"] < math.log(50)


def test_seed_decides(run, train, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        _ok(run(*train, "--epochs", 1, "--seed", seed, "--out", tmp_path / out))
    assert _model(tmp_path / "a") == _model(tmp_path / "b")
    assert _model(tmp_path / "a") != _model(tmp_path / "c")


def test_no_query_of_two_pairs(run, tmp_path):
    (tmp_path / "pairs.tsv").write_text("q\ti\n" + "".join(f"{k}\t{k % 20}\n" for k in range(99)))
    out = tmp_path / "model"
    text = _ok(run("train", tmp_path / "pairs.tsv", *SMALL, "--out", out))
    assert "99 pairs to train on, 0 held out" in text
    assert "nothing was held out" in text
    assert _names(out) == FILES
    assert "held_out" not in json.loads((out / "report.json").read_text())


@pytest.mark.parametrize(
    "options",
    [("--num-sampled", 1), ("--with-replacement",), ("--sampler", "in-batch")],
    ids=lambda options: options[0],
)
def test_one_pair(run, tmp_path, options):
    (tmp_path / "pairs.csv").write_text("q,i\nann,7\n")
    text = _ok(run("train", tmp_path / "pairs.csv", *options, "--out", tmp_path / "model"))
    assert "1 pairs to train on, 0 held out; 1 queries, 1 items" in text
    items = pa.parquet.read_table(tmp_path / "model" / "items.parquet")
    assert items["id"].to_pylist() == [7]
    assert np.isfinite(items["embedding"].to_pylist()).all()


def test_batch_larger_than_the_data(run, train, tmp_path):
    _ok(run(*train, "--batch-size", 10**6, "--epochs", 3, "--out", tmp_path))
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 3


# Train: stopped and resumed


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """The model of 40 epochs, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [*COMMAND, *map(str, train), "--epochs", "40", "--out", out],
        check=True,
        capture_output=True,
    )
    return out


def _run_until_checkpoint(train, out, stop):
    """Send the signal to a process that has saved its first checkpoint."""
    process = subprocess.Popen(
        [
            *SLOW_TO_SAVE,
            *map(str, train),
            "--out",
            out,
            "--epochs",
            "40",
            "--checkpoint-every",
            "7",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (out / "checkpoint.npz").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(stop)
        return *process.communicate(timeout=60), process.returncode
    finally:
        process.kill()


def test_killed_and_resumed_is_the_same_bit_for_bit(run, train, uninterrupted, tmp_path):
    out = tmp_path / "model"
    *_, status = _run_until_checkpoint(train, out, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert "queries.parquet" not in _names(out)
    text = _ok(run(*train, "--epochs", 40, "--out", out, "--resume"))
    done = int(re.search(r"resumed after step (\d+)\n", text)[1])
    assert done % 7 == 0
    assert 0 < done < 40 * 22
    assert _model(out) == _model(uninterrupted)
    assert _names(out) == FILES  # nothing of a save that was cut off


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(run, train, uninterrupted, tmp_path, stop):
    out = tmp_path / "model"
    _, progress, status = _run_until_checkpoint(train, out, stop)
    assert status == 128 + stop
    assert _names(out) == ["checkpoint.npz"]
    done = re.search(r"stopped after step (\d+); go on with --resume\n$", progress)[1]
    text = _ok(run(*train, "--epochs", 40, "--out", out, "--resume"))
    assert f"resumed after step {done}\n" in text
    assert _model(out) == _model(uninterrupted)


@pytest.mark.parametrize("optimizer", ["rowwise-adagrad", "adam"])
def test_other_optimizers(run, train, tmp_path, optimizer):
    options = ("--epochs", 1, "--learning-rate", 0.01, "--optimizer", optimizer)
    text = _ok(run(*train, *options, "--out", tmp_path / "a"))
    assert "held out: HR@10" in text
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["settings"]["optimizer"] == optimizer


@pytest.mark.parametrize("call", [1, 2, 5, 6])
def test_interrupt_does_not_tear_a_step(run, train, tmp_path, monkeypatch, call):
    """Between the updates of queries and items, and right after them."""
    calls, update = [], training.kernels.adagrad

    def update_and_interrupt(*args):
        update(*args)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training.kernels, "adagrad", update_and_interrupt)
    status, _, progress = run(*train, "--epochs", 1, "--out", tmp_path / "a")
    assert status == 130
    assert f"stopped after step {(call + 1) // 2}; go on with --resume" in progress
    assert signal.getsignal(signal.SIGINT) == before
    _ok(run(*train, "--epochs", 1, "--out", tmp_path / "a", "--resume"))
    _ok(run(*train, "--epochs", 1, "--out", tmp_path / "b"))
    assert _model(tmp_path / "a") == _model(tmp_path / "b")


def test_second_interrupt_acts_at_once(run, train, tmp_path, monkeypatch):
    def step(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(training.Trainer, "step", step)
    status, *_ = run(*train, "--out", tmp_path)
    assert status != 0
    assert _names(tmp_path) == []


def test_resume_of_a_finished_run_evaluates(run, train, tmp_path):
    first = _ok(run(*train, "--epochs", 2, "--out", tmp_path))
    model = _model(tmp_path)
    for epochs in (2, 1):
        _, text, progress = run(*train, "--epochs", epochs, "--out", tmp_path, "--resume")
        assert text.splitlines()[-2:] == first.splitlines()[-2:]
        assert "44/44" in progress
        assert _model(tmp_path) == model


def test_resume_with_more_epochs_goes_on(run, train, tmp_path):
    _ok(run(*train, "--epochs", 1, "--out", tmp_path / "a"))
    _ok(run(*train, "--epochs", 3, "--out", tmp_path / "a", "--resume"))
    _ok(run(*train, "--epochs", 3, "--out", tmp_path / "b"))
    assert _model(tmp_path / "a") == _model(tmp_path / "b")


def test_checkpoint_is_not_overwritten_unasked(run, train, tmp_path):
    out = tmp_path / "model"
    assert _error(run(*train, "--out", out, "--resume")) == (
        f"{out}/checkpoint.npz: nothing to resume from"
    )
    _ok(run(*train, "--epochs", 1, "--out", out))
    model = _model(out)
    text = _error(run(*train, "--epochs", 1, "--seed", 1, "--out", out))
    assert text.startswith(f"{out}/checkpoint.npz exists: pass --resume to go on from it, --over")
    both = run(*train, "--out", out, "--resume", "--overwrite")
    assert _error(both) == "--resume, --overwrite: expected one of them"
    assert _model(out) == model
    _ok(run(*train, "--epochs", 1, "--seed", 1, "--out", out, "--overwrite"))
    assert _model(out) != model


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (("--seed", 1), "seed", "1"),
        (("--sampler", "uniform"), "sampler", "uniform"),
        (("--correction", "none"), "correction", "none"),
        (("--num-sampled", 17), "num_sampled", "17"),
        (("--with-replacement",), "unique", "False"),
        (("--power", 0.5), "power", "0.5"),
        (("--dim", 4), "dim", "4"),
        (("--temperature", 0.5), "temperature", "0.5"),
        (("--batch-size", 32), "batch_size", "32"),
        (("--learning-rate", 0.1), "learning_rate", "0.1"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_resume_refuses_changed_settings(run, train, uninterrupted, option, name, value):
    text = _error(run(*train, *option, "--out", uninterrupted, "--resume"))
    assert re.search(rf"checkpoint.npz: expected the run's own {name}, .*, got {value}; ", text)


def test_resume_refuses_other_pairs(run, train, ratings, uninterrupted, tmp_path):
    other = tmp_path / "ratings.csv"
    other.write_text(ratings.read_text() + "9999,new,50\n")
    again = ("--out", uninterrupted, "--resume")
    for args in ((train[0], other, *train[2:]), ("train", ratings, "--query", "movie", *SMALL)):
        assert "checkpoint.npz: the run had other pairs" in _error(run(*args, *again))


def test_resume_refuses_what_is_no_checkpoint(run, train, uninterrupted, tmp_path):
    whole = (uninterrupted / "checkpoint.npz").read_bytes()
    for content in (b"", b"hello", whole[:1000], whole[:-1]):
        (tmp_path / "checkpoint.npz").write_bytes(content)
        text = _error(run(*train, "--out", tmp_path, "--resume"))
        assert text.startswith(f"{tmp_path}/checkpoint.npz: not a checkpoint of zipfneg train: ")


def test_disk_full(run, train, tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _ok(run(*train, "--epochs", 1, "--out", tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        text = _error(run(*train, "--epochs", 2, "--out", tmp_path, "--resume"))
        assert text == (
            f"{tmp_path}/checkpoint.npz: could not save (No space left on device); "
            f"the earlier file is unharmed"
        )
        text = _error(run(*train, "--epochs", 1, "--out", tmp_path / "new"))
        assert text.endswith("could not save (No space left on device); nothing was written")
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    assert _names(tmp_path) == sorted([*FILES, "new"])
    assert _names(tmp_path / "new") == []
    _ok(run(*train, "--epochs", 2, "--out", tmp_path, "--resume"))
    _ok(run(*train, "--epochs", 2, "--out", tmp_path / "new"))
    assert _model(tmp_path) == _model(tmp_path / "new")


# Train: what it refuses


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--sampler", "zipf"), "--sampler: expected one of .*'log-uniform'.*, got 'zipf'"),
        (("--correction", "half"), "--correction: expected one of .*'both'.*, got 'half'"),
        (
            ("--num-sampled", 51),
            r"--num-sampled: expected at most \d\d, the number of items, got 51; or pass "
            r"--with-replacement",
        ),
        (("--sampler", "empirical", "--power", "inf"), "power: expected a number"),
        (("--seed", 2**64), "seed: expected an integer from 0"),
        (("--dim", 10**12), "Unable to allocate"),
        (("--query", "person"), r"ratings\.csv: no column 'person'; the file has time, user, mo"),
        (("--item", "user"), "expected different columns, got 'user' twice"),
        (("--time", "clock"), "no column 'clock'"),
        (("--delimiter", ",,"), "delimiter: expected one ASCII character, got ',,'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options(run, train, tmp_path, options, match):
    out = tmp_path / "model"
    assert re.search(match, _error(run(*train, "--out", out, *options)))
    assert not out.exists() or _names(out) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--learning-rate", "inf"),
        ("--learning-rate", "fast"),
        ("--num-sampled", "0"),
        ("--epochs", "0"),
        ("--dim", "2.5"),
        ("--power", "nan"),
        ("--seed", "-1"),
    ],
)
def test_values_out_of_range(run, train, tmp_path, option, value):
    status, _, err = run(*train, "--out", tmp_path, option, value)
    assert status == 2
    (line,) = [line for line in err.splitlines() if "Invalid value" in line]
    assert option in line
    assert "Traceback" not in err


def test_misspelt_option(run, train):
    status, _, err = run(*train, "--epoch", 3)
    assert status == 2
    assert "--epochs" in err


def test_bad_files(run, tmp_path):
    path = tmp_path / "pairs.csv"
    for content, match in (
        (None, "no such file"),
        ("", "expected a header line, got an empty one"),
        ("q,i\n", "expected at least one row of data"),
        ("q,i\n1,2\n1,2,3\n", "line 3: Expected 2 columns, got 3"),
        ("q,i\n1,2\n1,\n", "column 'i' is empty in line 3"),
        ("q,i\n1,2\n3,4\n", "--num-sampled: expected at most 2, the number of items, got 256"),
    ):
        if content is not None:
            path.write_text(content)
        assert match in _error(run("train", path, "--out", tmp_path / "model"))
    assert "expected a file" in _error(run("train", tmp_path))


def test_output_that_is_a_file(run, train, tmp_path):
    (tmp_path / "taken").write_text("")
    for args in ((*train, "--out"), ("demo", "--out")):
        status, _, err = run(*args, tmp_path / "taken")
        assert status == 1
        assert err == f"error: {tmp_path}/taken: File exists\n"  # before any training


def test_missing_packages(run, train, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name in ("pyarrow", "matplotlib") else found(name, *args),
    )
    install = "; install with: pip install 'zipfneg[demo]'"
    assert _error(run(*train)) == f"this command needs pyarrow{install}"
    assert _error(run("demo")) == f"this command needs matplotlib, pyarrow{install}"


# Info


def test_info(run, monkeypatch):
    installed = {"torch": ["torch"], "matplotlib": ["matplotlib"]}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: installed)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.8.7" if name == "torch" else version(name)
    )
    out = _ok(run("info"))
    assert out.startswith(f"zipfneg {version('zipfneg')}\nPython {sys.version.split()[0]} on ")
    for name in ("numpy", "numba", "ml_dtypes"):
        assert f"\n{name} {version(name)}\n" in out
    assert re.search(rf"CPU: .* of {os.cpu_count()} cores \(set ZIPFNEG_NUM_THREADS", out)
    assert "\nCUDA: " in out
    assert re.search(r"torch +torch 9\.8\.7\n", out)
    assert re.search(rf"matplotlib +matplotlib {version('matplotlib')}\n", out)
    for module, extra in (("jax", "jax"), ("cupy", "cu13"), ("pyarrow", "demo"), ("mpi4py", "mpi")):
        assert re.search(rf"{module} +missing; pip install 'zipfneg\[{extra}\]'\n", out)


@pytest.mark.parametrize(("count", "match"), [(2, "A fast one, A fast one"), (None, "no driver")])
def test_info_on_devices(run, monkeypatch, count, match):
    class CUDARuntimeError(RuntimeError):
        pass

    def get_count():
        if count is None:
            raise CUDARuntimeError("no driver")
        return count

    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=get_count,
        getDeviceProperties=lambda index: {"name": b"A fast one"},
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    cupy.__spec__ = importlib.util.spec_from_loader("cupy", None)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert match in _ok(run("info"))


# Demo


@pytest.fixture(scope="module")
def bigrams():
    return demo.load_bigrams()


def test_bigrams_by_other_means(bigrams):
    wordsegment = importlib.util.find_spec("wordsegment")
    joint, left, right = {}, {}, {}
    with open(Path(wordsegment.origin).with_name("bigrams.txt"), encoding="utf-8") as file:
        for line in file:
            words, count = line.rstrip("\n").split("\t")
            first, second = words.split(" ")
            joint[first, second] = joint.get((first, second), 0) + float(count)
            left[first] = left.get(first, 0) + float(count)
            right[second] = right.get(second, 0) + float(count)
    assert (len(joint), len(left), len(right)) == (258_437, 18_336, 19_252)
    total = sum(joint.values())
    unigram = -sum(c * math.log(right[b] / total) for (_, b), c in joint.items()) / total
    floor = -sum(c * math.log(c / left[a]) for (a, _), c in joint.items()) / total
    assert bigrams.unigram_loss() == pytest.approx(unigram, rel=1e-12)
    assert bigrams.entropy_floor() == pytest.approx(floor, rel=1e-12)
    assert (round(floor, 3), round(unigram, 3)) == (4.331, 6.365)

    assert len(bigrams.pairs.counts) == 286_358
    for query, item, count in zip(*(x.tolist() for x in bigrams.pairs), strict=True):
        joint[bigrams.left[query], bigrams.right[item]] -= count
    assert set(joint.values()) == {0}
    for words, counts in ((bigrams.left, left), (bigrams.right, right)):
        assert (np.diff([counts[word] for word in words]) <= 0).all()


def test_unigram_and_floor_by_hand():
    # The first pair stands twice.
    pairs = training.Pairs(np.array([0, 0, 1, 0]), np.array([0, 1, 0, 0]), np.ones(4))
    bigrams = demo.Bigrams(pairs, ["a", "b"], ["x", "y"])
    assert bigrams.unigram_loss() == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4)
    assert bigrams.entropy_floor() == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 4)


@pytest.mark.slow
def test_demo(run, tmp_path):
    out = tmp_path / "picture"
    args = ("--steps", 20, "--num-sampled", 32, "--dim", 8, "--batch-size", 256, "--out", out)
    status, text, progress = run("demo", *args)
    assert status == 0
    assert "286,358 word pairs, 18,336 left and 19,252 right words; 20 batches of 256" in text
    figures = {
        name: float(value)
        for name, value in re.findall(r"^([a-z][\w ]+?) +(\d+\.\d{3})", text, re.M)
    }
    assert figures["entropy floor"] == 4.331
    assert figures["unigram"] == 6.365
    assert figures["entropy floor"] < figures["with logQ"] < math.log(19_252)
    for name in ("with", "without"):
        bar = rf"training {name} logQ: 100%.*20/20 \[\d\d:\d\d<00:00, +[\d.]+batch/s\]"
        assert re.search(bar, progress)
    for word in ("san", "happy", "seven", "london"):
        assert len(re.search(rf"^  {word} +(.*)$", text, re.M)[1].split(", ")) == 5
    assert f"picture: {out}/demo.png" in text
    assert _names(out) == ["demo.png"]
    content = (out / "demo.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[k : k + 4], "big") for k in (16, 20))
    assert width > 1000
    assert height > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "num_sampled", "learning_rate", "reached"),
    [(600, 256, 0.3, 5.05), (3000, 512, 0.2, 4.70)],
    ids=["short", "defaults"],
)
def test_log_q_makes_the_difference(bigrams, steps, num_sampled, learning_rate, reached):
    def train(correction):
        return demo.train(
            bigrams,
            correction=correction,
            steps=steps,
            num_sampled=num_sampled,
            dim=64,
            batch_size=2048,
            learning_rate=learning_rate,
            seed=0,
            progress=lambda steps, text: steps,
        )

    run = train("both")
    assert run.name == "with logQ"
    assert run.steps[-1] == steps
    assert len(run.steps) == 7
    assert run.log_losses == sorted(run.log_losses, reverse=True)
    assert run.log_losses[-1] == pytest.approx(run.report.log_loss, rel=1e-6)
    assert bigrams.entropy_floor() < run.report.log_loss <= reached
    assert train("none").report.log_loss > 6.4 > bigrams.unigram_loss()
