"""A whole training step, and the work that can be skipped in it, in one process.

    python bench/step.py [--threads 2] [--out bench/results/step.jsonl]

A step samples negatives, gathers rows of two tables, takes the loss and its gradients, and updates
the rows that it touched by AdaGrad; PyTorch does the same with sparse and with dense gradients. The
tables after a step are compared before anything is timed.
"""

import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from measure import alternating, machine

from zipfneg import (
    Candidates,
    ContrastiveOutput,
    LogUniform,
    PopularitySampler,
    merge_repeats,
    sampled_softmax_value_and_grad,
)
from zipfneg.training import Pairs, Trainer, initial_tables

NUM_QUERIES, NUM_ITEMS, DIM, BATCH, RATE = 18_336, 19_252, 64, 2048, 0.3
# Enough that no step has learned its batch: gradients of nothing are slow to compute with.
NUM_BATCHES = 64


def trainer(num_sampled: int) -> Trainer:
    size = NUM_BATCHES * BATCH
    pairs = Pairs(
        LogUniform(NUM_QUERIES).draw(size, seed=1), LogUniform(NUM_ITEMS).draw(size, seed=2)
    )
    sampler = PopularitySampler(LogUniform(NUM_ITEMS), num_sampled, unique=False)
    head = ContrastiveOutput(sampler, mask_accidental_hits=False, top_ks=())
    tables = initial_tables(NUM_QUERIES, NUM_ITEMS, DIM, seed=0)
    return Trainer(tables, pairs, head, BATCH, RATE)


def torch_step(start: Trainer, num_sampled: int, threads: int, sparse: bool) -> Any:
    """The step in PyTorch on copies of the tables: called with ids it takes these negatives."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.sparse.check_sparse_tensor_invariants.disable()
    all_query_ids, all_item_ids = (torch.from_numpy(x) for x in start.pairs[:2])
    batches = [torch.from_numpy(start.batch(step)) for step in range(NUM_BATCHES)]
    steps = itertools.count()
    queries, items = (torch.nn.Parameter(torch.from_numpy(x.copy())) for x in start.tables[:2])
    optimizer = torch.optim.Adagrad([queries, items], lr=RATE, initial_accumulator_value=0.1)
    log_total = float(np.log1p(NUM_ITEMS))
    first = torch.zeros(BATCH, dtype=torch.int64)

    def log_q(ids: Any) -> Any:
        return torch.log(num_sampled * torch.log1p(1 / (ids + 1)) / log_total)

    def step(ids: Any = None) -> Any:
        batch = batches[next(steps) % NUM_BATCHES]
        query_ids, item_ids = all_query_ids[batch], all_item_ids[batch]
        if ids is None:
            u = torch.rand(num_sampled, dtype=torch.float64)
            ids = (torch.exp(u * log_total).long() - 1).clamp_(max=NUM_ITEMS - 1)
        u, rows = (
            functional.embedding(i, table, sparse=sparse)
            for i, table in ((query_ids, queries), (torch.cat([item_ids, ids]), items))
        )
        positive = (u * rows[:BATCH]).sum(1, keepdim=True) - log_q(item_ids)[:, None]
        logits = torch.cat([positive, u @ rows[BATCH:].T - log_q(ids)], dim=1)
        # AdaGrad's initial squares are meant for a gradient summed over the batch.
        loss = functional.cross_entropy(logits, first, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return queries.detach().numpy(), items.detach().numpy()

    return step


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPUs that all may use.")] = 2,
    budget: Annotated[float, typer.Option(help="Seconds for each competitor.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
) -> None:
    os.environ["ZIPFNEG_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    about = {**machine(), "threads": threads}
    lines: list[dict[str, Any]] = []

    def report(case: str, runs: dict[str, Callable[[], Any]]) -> None:
        times = alternating(runs, budget)
        ours = times[next(iter(runs))]
        for who, found in times.items():
            low, median, high = np.percentile(found, [25, 50, 75])
            ratio = float(np.median(found / ours))
            lines.append({"case": case, "who": who, "seconds": median, "spread": high - low,
                          "ratio": ratio, **about})  # fmt: skip
            typer.echo(f"{case:48}{who:24}{1e3 * median:9.2f} ms{ratio:8.2f}x")

    for num_sampled in (512, 8192):
        ours = trainer(num_sampled)
        runs: dict[str, Callable[[], Any]] = {"zipfneg": ours.step}
        if importlib.util.find_spec("torch"):
            import torch

            ids = torch.from_numpy(ours.head.sampler.sample(step=0).negatives.ids)
            theirs = {kind: torch_step(ours, num_sampled, threads, kind == "sparse")
                      for kind in ("sparse", "dense")}  # fmt: skip
            ours.step()
            for kind, run in theirs.items():
                for mine, found in zip(ours.tables, run(ids), strict=False):
                    assert np.abs(mine - found).max() < 1e-3 * np.abs(found).max()
                runs[f"torch, {kind} gradients"] = run
        report(f"step, {BATCH} × {num_sampled} × {DIM}", runs)

    rng = np.random.default_rng(0)
    for num_sampled in (8192, 65_536):
        B, law = 4096, LogUniform(10**6)
        u, p = rng.standard_normal((2, B, DIM), np.float32) / np.float32(DIM**0.5)
        table = rng.standard_normal((10**6, DIM), np.float32) / np.float32(DIM**0.5)
        draw = PopularitySampler(law, num_sampled, unique=False).sample(law.draw(B, seed=3))
        assert draw.positives is not None
        positives = Candidates(None, p, draw.positives.log_q)

        def loss_of(
            negatives: Candidates, u: Any = u, positives: Any = positives, table: Any = table
        ) -> Any:
            rows = negatives._replace(ids=None, embeddings=table[negatives.ids])
            return sampled_softmax_value_and_grad(u, positives, rows)[0]

        def merged(draw: Any = draw, loss_of: Any = loss_of) -> Any:
            return loss_of(merge_repeats(draw.negatives))

        def repeated(draw: Any = draw, loss_of: Any = loss_of) -> Any:
            return loss_of(draw.negatives)

        assert abs(merged() - repeated()) < 1e-5 * repeated()
        distinct = len(np.unique(draw.negatives.ids))
        case = f"{num_sampled} draws of a million, {distinct} distinct"
        report(case, {"repeats merged": merged, "repeats kept": repeated})

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
