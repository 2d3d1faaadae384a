"""Value and gradients of the sampled softmax, against what else there is, in one process.

    python bench/loss.py [--threads 2] [--shape 2048,8192,64] [--per-query 2048,512,64]
                         [--out bench/results/loss.jsonl]

Every result is checked against float64 before it is timed. Competitors run where they are
installed, at the settings that serve them best, on the same CPUs; each round runs all of them, and
ratios are taken within the rounds. One JSON line a case and competitor.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from measure import alternating, extra_memory, machine
from threadpoolctl import threadpool_limits

from zipfneg import Candidates, LogUniform, sampled_softmax_value_and_grad
from zipfneg.cpu import softmax

SHAPES = [
    "1024,1024,64",
    "2048,1024,64",
    "2048,8192,64",
    "2048,65536,64",
    "4096,8192,128",
    "8192,8192,128",
    "8192,65536,128",
]
PER_QUERY = ["2048,512,64"]
CEILING = "sgemm"

NDArray = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[], Any]


class Inputs(NamedTuple):
    """A batch; `targets` are the negatives that the positives are copies of."""

    u: NDArray  # (B, D)
    p: NDArray  # (B, D)
    v: NDArray  # (S, D) or (B, S, D)
    log_q_0: NDArray  # (B,)
    log_q: NDArray  # (S,) or (B, S)


def inputs(B: int, S: int, D: int, per_query: bool) -> Inputs:
    rng = np.random.default_rng(0)
    law = LogUniform(10**6)

    def normal(*shape: int) -> NDArray:
        return rng.standard_normal((*shape, D), np.float32) * np.float32(D**-0.25)

    columns = (B, S) if per_query else (S,)
    log_q_0, log_q = (
        (np.log(S) + law.log_prob(law.draw(shape, seed=1))).astype(np.float32)
        for shape in ((B,), columns)
    )
    return Inputs(normal(B), normal(B), normal(*columns), log_q_0, log_q)


def errors(x: Inputs, result: tuple[Any, ...]) -> dict[str, float]:
    """Largest distance of (loss, dU, dP, dV) from float64, relative to the largest element."""
    loss, *gradients = (np.asarray(r, np.float64) for r in result)
    B, shared, rows = len(x.u), x.v.ndim == 2, 64
    exact_loss, exact = 0.0, [np.empty(x.u.shape), np.empty(x.p.shape)]
    d_v = np.zeros(x.v.shape if shared else (rows, *x.v.shape[1:]))
    error_v = largest_v = 0.0
    for lo in range(0, B, rows):
        part = slice(lo, lo + rows)
        u, p, log_q_0 = (y[part].astype(np.float64) for y in (x.u, x.p, x.log_q_0))
        v, log_q = (y if shared else y[part] for y in (x.v, x.log_q))
        z = (
            u @ v.T.astype(np.float64)
            if shared
            else np.einsum("bd,bsd->bs", u, v, dtype=np.float64)
        )
        z = np.column_stack([(u * p).sum(axis=1) - log_q_0, z - log_q])
        e = np.exp(z - z.max(axis=1, keepdims=True))
        g = e / e.sum(axis=1, keepdims=True)
        exact_loss -= np.log(g[:, 0]).sum() / B
        g[:, 0] -= 1
        g /= B
        d_u = g[:, 1:] @ v if shared else np.einsum("bs,bsd->bd", g[:, 1:], v)
        exact[0][part] = d_u + g[:, :1] * p
        exact[1][part] = g[:, :1] * u
        if shared:
            d_v += g[:, 1:].T @ u
        else:
            d_v = g[:, 1:, None] * u[:, None]
            error_v = max(error_v, np.abs(gradients[2][part] - d_v).max())
            largest_v = max(largest_v, np.abs(d_v).max())
    if shared:
        error_v, largest_v = np.abs(gradients[2] - d_v).max(), np.abs(d_v).max()
    return {
        "loss": float(abs(loss - exact_loss) / exact_loss),
        **{
            name: float(np.abs(got - right).max() / np.abs(right).max())
            for name, got, right in zip(("queries", "positives"), gradients, exact, strict=False)
        },
        "negatives": float(error_v / largest_v),
    }


def zipfneg(x: Inputs) -> Run:
    positives = Candidates(None, x.p, x.log_q_0)
    negatives = Candidates(None, x.v, x.log_q)

    def run() -> tuple[Any, ...]:
        loss, grads = sampled_softmax_value_and_grad(x.u, positives, negatives)
        return loss, grads.queries, grads.positives.embeddings, grads.negatives.embeddings

    return run


def with_torch(x: Inputs, threads: int) -> dict[str, Run]:
    try:
        import torch
    except ImportError:
        return {}
    functional = torch.nn.functional
    torch._dynamo.reset()  # else the cases before count against its limit of compilations
    torch.set_num_threads(threads)
    u, p, v = (torch.from_numpy(y).requires_grad_() for y in (x.u, x.p, x.v))
    log_q_0, log_q = torch.from_numpy(x.log_q_0), torch.from_numpy(x.log_q)
    shared = x.v.ndim == 2

    def loss_of(u: Any, p: Any, v: Any) -> Any:
        z_0 = (u * p).sum(dim=1) - log_q_0
        z = u @ v.T if shared else (v @ u[:, :, None])[:, :, 0]
        # softplus(logsumexp z − z_0): no copy of the logits with the positive's beside them.
        return functional.softplus(torch.logsumexp(z - log_q, dim=1) - z_0).mean()

    compiled = torch.compile(loss_of)

    def run(function: Callable[..., Any]) -> Run:
        def once() -> tuple[Any, ...]:
            loss = function(u, p, v)
            grads = torch.autograd.grad(loss, (u, p, v))
            return loss.detach().numpy(), *(g.numpy() for g in grads)

        return once

    def in_bfloat16(u: Any, p: Any, v: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(u, p, v)

    found = {
        "torch eager": run(loss_of),
        "torch.compile": run(compiled),
        "torch.compile, bfloat16": run(in_bfloat16),
    }
    if shared and hasattr(functional, "linear_cross_entropy"):
        # The nearest that it can do: targets among the columns, in the place of positives.
        targets = torch.arange(len(u)) % len(v)

        def linear_cross_entropy() -> Any:
            loss = functional.linear_cross_entropy(u, v, targets, linear_bias=-log_q)
            return torch.autograd.grad(loss, (u, v))

        found["torch linear_cross_entropy"] = linear_cross_entropy
    return found


def with_jax(x: Inputs) -> dict[str, Run]:
    try:
        import jax
    except ImportError:
        return {}
    numpy = jax.numpy
    arrays = [numpy.asarray(y) for y in x]

    def loss_of(u: Any, p: Any, v: Any, log_q_0: Any, log_q: Any) -> Any:
        z_0 = (u * p).sum(axis=1) - log_q_0
        z = u @ v.T if v.ndim == 2 else numpy.einsum("bd,bsd->bs", u, v)
        return jax.nn.softplus(jax.nn.logsumexp(z - log_q, axis=1) - z_0).mean()

    compiled = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1, 2)))

    def run() -> tuple[Any, ...]:
        loss, grads = jax.block_until_ready(compiled(*arrays))
        return loss, *grads

    return {"jax.jit": run}


def with_tensorflow(x: Inputs, threads: int) -> dict[str, Run]:
    try:
        import tensorflow as tf
    except ImportError:
        return {}
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    u, p, v, log_q_0, log_q = (tf.constant(y) for y in x)

    def value_and_grad(u: Any, p: Any, v: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([u, p, v])
            z_0 = tf.reduce_sum(u * p, axis=1) - log_q_0
            z = tf.matmul(u, v, transpose_b=True) if len(v.shape) == 2 else tf.linalg.matvec(v, u)
            excess = tf.reduce_logsumexp(z - log_q, axis=1) - z_0
            loss = tf.reduce_mean(tf.nn.softplus(excess))
        return loss, *tape.gradient(loss, [u, p, v])

    def run(function: Any) -> Run:
        return lambda: tuple(y.numpy() for y in function(u, p, v))

    found = {
        "tf.function": run(tf.function(value_and_grad)),
        "tf.function, XLA": run(tf.function(value_and_grad, jit_compile=True)),
    }
    if len(v.shape) == 2:
        # Its own sampled softmax, which takes positives and negatives from one table.
        table = tf.concat([p, v], axis=0)
        B, S = len(x.u), len(x.v)
        labels = tf.range(B, dtype=tf.int64)[:, None]
        sampled = tf.range(B, B + S, dtype=tf.int64), tf.exp(log_q_0)[:, None], tf.exp(log_q)
        bias = tf.zeros(B + S)

        @tf.function
        def sampled_softmax_loss(u: Any, table: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([u, table])
                loss = tf.reduce_mean(
                    tf.nn.sampled_softmax_loss(table, bias, labels, u, S, B + S, 1, sampled)
                )
            d_u, d_table = tape.gradient(loss, [u, table])
            return loss, d_u, tf.convert_to_tensor(d_table)

        def run_sampled() -> tuple[Any, ...]:
            loss, d_u, d_table = (y.numpy() for y in sampled_softmax_loss(u, table))
            return loss, d_u, d_table[:B], d_table[B:]

        found["tf.nn.sampled_softmax_loss"] = run_sampled
    return found


def ceiling() -> tuple[Run, float]:
    """NumPy's matrix product at its best, and its operations."""
    a = np.random.default_rng(0).random((2048, 2048), np.float32)
    b = a.copy()
    return lambda: np.matmul(a, b, out=b), 2.0 * 2048**3


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPUs that all of them may use.")] = 2,
    shape: Annotated[list[str], typer.Option(help="B,S,D of shared negatives.")] = SHAPES,
    per_query: Annotated[list[str], typer.Option(help="B,S,D of own negatives.")] = PER_QUERY,
    budget: Annotated[float, typer.Option(help="Seconds for each competitor.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
) -> None:
    os.environ["ZIPFNEG_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    about = {**machine(), "threads": threads}
    for text, own in [*((s, False) for s in shape), *((s, True) for s in per_query)]:
        B, S, D = map(int, text.split(","))
        case = f"{'own' if own else 'shared'} negatives, {B} × {S} × {D}"
        x = inputs(B, S, D, own)
        runs = {
            "zipfneg": zipfneg(x),
            **with_torch(x, threads),
            **with_jax(x),
            **with_tensorflow(x, threads),
        }
        with threadpool_limits(threads, user_api="blas"):
            measured = {}
            for who, run in list(runs.items()):
                result = run()
                checked = len(result) == 4
                found = errors(x, result) if checked else {}
                if checked and not max(found.values()) < (0.1 if "bfloat16" in who else 1e-4):
                    typer.echo(f"{case:40}{who:30} wrong: {found}")
                    del runs[who]
                    continue
                softmax._spare.clear()  # what it keeps from call to call counts as its memory
                grown = extra_memory(run)
                given = sum(np.asarray(r).nbytes for r in result)
                measured[who] = {
                    "errors": found,
                    "extra_bytes": None if grown is None else max(0, grown - given),
                }
                del result
            product, operations = ceiling()
            times = alternating({**runs, CEILING: product}, budget)
        rate = operations / np.median(times[CEILING])
        lines = []
        for who in runs:
            low, median, high = np.percentile(times[who], [25, 50, 75])
            share = 6 * B * S * D / median / rate
            line = {
                "case": case,
                "who": who,
                "seconds": median,
                "spread": high - low,
                "ratio": float(np.median(times[who] / times["zipfneg"])),
                "gflops": 6e-9 * B * S * D / median,
                "share_of_sgemm": share,
                **measured[who],
                **about,
            }
            lines.append(line)
            extra = line["extra_bytes"]
            typer.echo(
                f"{case:40}{who:30}{1e3 * median:10.2f} ms ±{1e3 * (high - low):8.2f}"
                f"{line['ratio']:8.2f}x{share:8.0%} of sgemm"
                f"{'' if extra is None else f'{extra / 2**20:10.0f} MiB'}"
                f"   error {max(line['errors'].values(), default=np.nan):.1e}"
            )
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
