"""The command line: demo, train, fit, info."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help=(
        "Train retrieval models with Zipf-distributed negatives and the exact logQ correction."
        "\n\nStart with **zipfneg demo**, then train on your own pairs with "
        "**zipfneg train FILE**."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _positive(value: float) -> float:
    if not 1e-9 <= value <= 1e9:  # also for NaN
        raise typer.BadParameter(f"expected 1e-9 to 1e9, got {value}")
    return value


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


COLUMNS, NEGATIVES, TRAINING, OUTPUT = "Columns", "Negatives", "Training", "Output"

Dim = Annotated[int, _option(TRAINING, "Dimensions of the embeddings.", min=1)]
Batch = Annotated[int, _option(TRAINING, "Pairs in a step.", min=1)]
Rate = Annotated[float, _option(TRAINING, "The optimizer's learning rate.", callback=_positive)]
Seed = Annotated[int, _option(TRAINING, "Seed of everything random.", min=0)]
Sampled = Annotated[int, _option(NEGATIVES, "Negatives in a step, shared by the batch.", min=1)]

SAMPLERS = ("log-uniform", "uniform", "empirical", "in-batch")


def main() -> None:
    """Errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, NotImplementedError, MemoryError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        typer.secho(f"error: {text}", fg="red", err=True)
        sys.exit(1)


def _progress(steps: range, text: str) -> Any:
    from tqdm import tqdm

    total = max(steps.start, steps.stop)
    return tqdm(steps, desc=text, unit="batch", total=total, initial=steps.start)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Signals to stop, noted: a KeyboardInterrupt could tear a step in two.

    A second one acts at once.
    """
    noted: list[int] = []
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(number, earlier[signal.Signals(number)])

    for number in earlier:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise OSError(
            f"this command needs {', '.join(missing)}; install with: pip install 'zipfneg[demo]'"
        )


@app.command()
def demo(
    steps: Annotated[int, _option(TRAINING, "Batches to train on.", min=1)] = 3000,
    num_sampled: Sampled = 512,
    dim: Dim = 64,
    batch_size: Batch = 2048,
    learning_rate: Rate = 0.2,
    seed: Seed = 0,
    out: Annotated[Path, _option(OUTPUT, "Folder for the picture.")] = Path("zipfneg-demo"),
) -> None:
    """Learn which word follows which, with and without logQ, from real data.

    Trains two tables of embeddings on 286,358 counts of English word pairs, each batch against
    the same few hundred Zipf-distributed negatives: once with the logQ correction, once without.
    Prints the exact log loss of both over all 19,252 words, beside the loss of knowing only how
    frequent each word is (unigram) and the least that any model can reach (entropy floor), and
    draws the loss curves. Takes a minute or two on two cores.
    """
    _need("matplotlib", "pyarrow", "wordsegment")
    from . import demo as demonstration

    out.mkdir(parents=True, exist_ok=True)
    picture = out / "demo.png"
    bigrams = demonstration.load_bigrams()
    typer.echo(
        f"{len(bigrams.pairs.query_ids):,} word pairs, {len(bigrams.left):,} left and "
        f"{len(bigrams.right):,} right words; {steps} batches of {batch_size}, "
        f"{num_sampled} negatives"
    )
    runs = [
        demonstration.train(
            bigrams,
            correction=correction,
            steps=steps,
            num_sampled=num_sampled,
            dim=dim,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            progress=_progress,
        )
        for correction in ("both", "none")
    ]
    typer.echo("\nover all right words, each pair weighted by its count:")
    typer.echo(f"{'':16}{'log loss':>10}{'recall@10':>11}")
    typer.echo(f"{'entropy floor':16}{bigrams.entropy_floor():10.3f}")
    for run in runs:
        typer.echo(f"{run.name:16}{run.report.log_loss:10.3f}{run.report.hit_rate:11.3f}")
    typer.echo(f"{'unigram':16}{bigrams.unigram_loss():10.3f}")

    tables = runs[0].tables
    for title, found in (
        (
            "most probable next words",
            demonstration.next_words(bigrams, tables, ["san", "high", "more", "happy"], 5),
        ),
        (
            "nearest words by embedding",
            demonstration.similar_words(bigrams, tables, ["seven", "red", "his", "london"], 5),
        ),
    ):
        typer.echo(f"\n{title} (with logQ):")
        for word, neighbours in found.items():
            typer.echo(f"  {word:8} {', '.join(neighbours)}")
    demonstration.draw_picture(picture, bigrams, runs)
    typer.echo(f"\npicture: {picture}")


@app.command()
def train(
    file: Annotated[
        Path, typer.Argument(help="Pairs: CSV or TSV with a header line (also .gz), or Parquet.")
    ],
    query: Annotated[
        str | None,
        _option(COLUMNS, "Query ids, for instance users.", show_default="the first column"),
    ] = None,
    item: Annotated[
        str | None, _option(COLUMNS, "Item ids.", show_default="the first column left")
    ] = None,
    time: Annotated[
        str | None,
        _option(
            COLUMNS,
            "Numbers or ISO times that order a query's pairs.",
            show_default="the order of the file",
        ),
    ] = None,
    delimiter: Annotated[
        str | None,
        _option(COLUMNS, "What stands between columns of CSV.", show_default="as in the header"),
    ] = None,
    sampler: Annotated[
        str,
        _option(
            NEGATIVES,
            "log-uniform (Zipf over the frequency ranks), uniform, empirical (by the items' "
            "counts), or in-batch (the other pairs of the step).",
        ),
    ] = "log-uniform",
    num_sampled: Sampled = 256,
    unique: Annotated[
        bool, _option(NEGATIVES, "Each negative once, or repeats.", "--unique/--with-replacement")
    ] = True,
    power: Annotated[
        float, _option(NEGATIVES, "Exponent of empirical's counts; word2vec has 0.75.", min=0)
    ] = 1.0,
    correction: Annotated[
        str,
        _option(
            NEGATIVES,
            "Whose scores lose log q: both (positives' and negatives'), negatives, or none.",
        ),
    ] = "both",
    dim: Dim = 64,
    temperature: Annotated[
        float, _option(TRAINING, "Divides the scores.", callback=_positive)
    ] = 1.0,
    epochs: Annotated[int, _option(TRAINING, "Times to go through the pairs.", min=1)] = 10,
    batch_size: Batch = 1024,
    learning_rate: Rate = 0.05,
    optimizer: Annotated[
        str,
        _option(
            TRAINING,
            "adagrad, rowwise-adagrad (one number a row in place of one an element), or adam.",
        ),
    ] = "adagrad",
    seed: Seed = 0,
    out: Annotated[Path, _option(OUTPUT, "Folder for the model.")] = Path("zipfneg-model"),
    checkpoint_every: Annotated[int, _option(OUTPUT, "Steps between checkpoints.", min=1)] = 1000,
    resume: Annotated[
        bool, _option(OUTPUT, "Go on from the checkpoint in --out, bit for bit.", "--resume")
    ] = False,
    overwrite: Annotated[
        bool, _option(OUTPUT, "Start anew, over the model in --out.", "--overwrite")
    ] = False,
) -> None:
    """Train a two-tower model on your own (query, item) pairs.

    Items are ranked by frequency; the last pair of each query that has two or more is held out.
    After training the held-out items are ranked among all items but those the query already has,
    and these are printed: HR@10 (share within the first ten), NDCG@10, the exact log loss over
    the catalog, and the coverage (share of the catalog within anyone's first ten).

    The folder --out receives queries.parquet and items.parquet (your ids, an embedding each, the
    items' counts), report.json, and checkpoint.npz.

    Example: **zipfneg train ratings.csv --query user --item movie --time timestamp**
    """
    _need("pyarrow")
    from . import checks, popularity, sampling
    from .contrastive import ContrastiveOutput
    from .data import read_interactions, save_embeddings
    from .files import replacing
    from .loss import CORRECTIONS
    from .training import OPTIMIZERS, Trainer, evaluate, initial_tables

    checks.one_of("--sampler", sampler, SAMPLERS)
    checks.one_of("--correction", correction, CORRECTIONS)
    checks.one_of("--optimizer", optimizer, OPTIMIZERS)
    settings = {
        "sampler": sampler,
        "num_sampled": num_sampled,
        "unique": unique,
        "power": power,
        "correction": correction,
        "dim": dim,
        "temperature": temperature,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "seed": seed,
    }
    checkpoint = out / "checkpoint.npz"
    if resume and overwrite:
        raise ValueError("--resume, --overwrite: expected one of them")
    if checkpoint.exists() and not (resume or overwrite):
        raise ValueError(
            f"{checkpoint} exists: pass --resume to go on from it, --overwrite to start anew, or "
            f"another --out"
        )
    if resume and not checkpoint.exists():
        raise ValueError(f"{checkpoint}: nothing to resume from")
    data = read_interactions(file, query, item, time, delimiter)
    num_queries, num_items = len(data.query_ids), len(data.item_ids)
    named = zip(("queries", "items", "times"), data.columns, strict=False)
    typer.echo(f"{file}: " + ", ".join(f"{what} from {name!r}" for what, name in named))
    typer.echo(
        f"{len(data.train.query_ids):,} pairs to train on, {len(data.held_out.query_ids):,} held "
        f"out; {num_queries:,} queries, {num_items:,} items"
    )
    source: Any
    if sampler == "in-batch":
        source = sampling.InBatchSampler(data.item_counts)
    else:
        if unique and num_sampled > num_items:
            raise ValueError(
                f"--num-sampled: expected at most {num_items}, the number of items, got "
                f"{num_sampled}; or pass --with-replacement"
            )
        law: popularity.Law = popularity.LogUniform(num_items)
        if sampler == "uniform":
            law = popularity.Uniform(num_items)
        elif sampler == "empirical":
            law = popularity.Empirical(data.item_counts, power=power)
        source = sampling.PopularitySampler(law, num_sampled, unique=unique, seed=seed)
    head = ContrastiveOutput(
        source,
        temperature=temperature,
        correction=correction,
        # Draws with replacement are exact with their hits kept (Ma & Collins 2018).
        mask_accidental_hits=unique or sampler == "in-batch",
        top_ks=(),
    )
    tables = initial_tables(num_queries, num_items, dim, seed, optimizer)
    out.mkdir(parents=True, exist_ok=True)  # now, not after hours of training
    trainer = Trainer(tables, data.train, head, batch_size, learning_rate, seed)
    if resume:
        trainer.load(checkpoint, settings)
        typer.echo(f"resumed after step {trainer.steps_done}")
    steps = epochs * trainer.steps_per_epoch
    with _stop_signals() as noted:
        for done in _reporting(trainer, steps):
            if noted:
                break
            if done % checkpoint_every == 0:
                trainer.save(checkpoint, settings)
        trainer.save(checkpoint, settings)
    if noted:
        typer.echo(f"\nstopped after step {trainer.steps_done}; go on with --resume", err=True)
        sys.exit(128 + noted[0])

    save_embeddings(out / "queries.parquet", data.query_ids, tables.queries)
    save_embeddings(out / "items.parquet", data.item_ids, tables.items, count=data.item_counts)
    report: dict[str, Any] = {"settings": settings, "steps": trainer.steps_done}
    if len(data.held_out.query_ids):
        typer.echo("ranking the held-out items among all items", err=True)
        found = evaluate(
            tables,
            data.held_out,
            temperature=temperature,
            seen=data.train,
        )
        typer.echo(
            f"held out: HR@10 {found.hit_rate:.4f}   NDCG@10 {found.ndcg:.4f}   "
            f"log loss {found.log_loss:.4f}   coverage {found.coverage:.4f}"
        )
        report["held_out"] = found._asdict()
    else:
        typer.echo("no query has two pairs: nothing was held out, so there is nothing to report")
    with replacing(out / "report.json") as stream:
        stream.write(json.dumps(report, indent=2).encode())
    typer.echo(f"model: {out}")


def _reporting(trainer: Any, steps: int) -> Iterator[int]:
    """Train up to `steps`, with the recent loss beside the bar; yields the steps done."""
    bar = _progress(range(trainer.steps_done, steps), "training")
    recent = None
    for _ in bar:
        loss = trainer.step()
        recent = loss if recent is None else 0.98 * recent + 0.02 * loss
        bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
        yield trainer.steps_done


@app.command()
def fit(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV or TSV with a header line, Parquet, or text with one id a line (.txt); all "
            "but Parquet also as .gz."
        ),
    ],
    item: Annotated[
        str | None,
        _option(COLUMNS, "Item ids, one occurrence a row.", show_default="the first column"),
    ] = None,
    counts: Annotated[
        str | None,
        _option(
            COLUMNS,
            "Counts, one id a row; with --item too, an item's counts are summed.",
            show_default="none: occurrences are counted",
        ),
    ] = None,
    delimiter: Annotated[
        str | None,
        _option(COLUMNS, "What stands between columns of CSV.", show_default="as in the header"),
    ] = None,
    out: Annotated[Path, _option(OUTPUT, "Folder for the picture.")] = Path("zipfneg-fit"),
) -> None:
    """Fit a Zipf-Mandelbrot law to counts and show how well it fits.

    Counts the ids of the file, or reads their counts, and ranks them by frequency. Prints the law
    of maximum likelihood, P(k) ∝ (k + 1 + shift)^−exponent for k = 0, 1, ..., with standard errors;
    what it, the log-uniform and the uniform law lose in nats per draw (KL); their
    Kolmogorov-Smirnov distances; and which law to take.

    The folder --out receives fit.png: the counts by rank with the laws, and what the laws miss.

    Example: **zipfneg fit ratings.csv --item movie**
    """
    _need("matplotlib", "pyarrow")
    from . import fitting
    from .data import read_counts

    source, values = read_counts(file, item, counts, delimiter)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "fit.png"
    found = fitting.fit(values)
    typer.echo(f"{file}: {source}")
    for line in fitting.report(found):
        typer.echo(line)
    fitting.draw_picture(picture, found)
    typer.echo(f"\npicture: {picture}")


# What each optional package is for, and the extra that brings it.
_OPTIONAL = {
    "matplotlib": ("pictures", "demo"),
    "pyarrow": ("CSV and Parquet files", "demo"),
    "wordsegment": ("the demo's data", "demo"),
    "cupy": ("CUDA arrays", "cu13"),
    "numba_cuda": ("CUDA kernels", "cu13"),
    "torch": ("PyTorch tensors", "torch"),
    "jax": ("JAX arrays", "jax"),
    "tensorflow": ("TensorFlow tensors", "tensorflow"),
    "mpi4py": ("several processes*", "mpi"),
}


@app.command()
def info() -> None:
    """Show versions and devices, what works here, and how to install what is missing."""
    from .cpu.threads import num_threads

    typer.echo(f"zipfneg {importlib.metadata.version('zipfneg')}")
    typer.echo(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "numba", "ml_dtypes"):
        typer.echo(f"{name} {importlib.metadata.version(name)}")
    typer.echo(
        f"\nCPU: samplers, losses, retrieval, training; {num_threads()} of {os.cpu_count()} "
        f"cores (set ZIPFNEG_NUM_THREADS to change)"
    )
    typer.echo(f"CUDA: {_cuda()}\n")
    distributions = importlib.metadata.packages_distributions()
    for module, (purpose, extra) in _OPTIONAL.items():
        names = distributions.get(module, [])
        if names:
            state = f"{names[0]} {importlib.metadata.version(names[0])}"
        else:
            state = f"missing; pip install 'zipfneg[{extra}]'"
        typer.echo(f"{purpose:24}{module:14}{state}")
    typer.echo("* planned: this version does not use it")


def _cuda() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "samplers alone; cupy is not installed"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"samplers alone; no device: {error}"
    names = [cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count)]
    return f"samplers alone; devices: {', '.join(names)}"
