"""Write docs/benchmarks.md from the result lines in bench/results.

python bench/tables.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Benchmarks

Written by `bench/tables.py` from the lines in `bench/results`; the commands are in the scripts. All
competitors of a case run in one process on the same machine, zipfneg's result is checked before it
is timed, and figures are medians. Machines differ and are noisy: trust the ratios.
"""


def newest(name: str) -> list[dict]:
    """The last line of each case, competitor and number of threads."""
    path = ROOT / "bench" / "results" / f"{name}.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return list({(line["case"], line["who"], line["threads"]): line for line in lines}.values())


def where(line: dict) -> str:
    """The machine and the versions of a line."""
    versions = ", ".join(
        f"{name} {line[name]}"
        for name in ("numpy", "numba", "tensorflow-cpu", "torch", "jax")
        if name in line
    )
    return f"{line['cpu']}, {line['cpus']} CPUs; {versions}"


def sampling() -> str:
    lines = newest("sampling")
    rows = [
        "\n## Sampling\n",
        f"`bench/sampling.py`, {where(lines[-1])}. Threads are those of zipfneg, which draws "
        "unique ids on one; the others use those they choose. zipfneg fills a given array, the "
        "others make theirs.\n",
        "| case | | threads of zipfneg | million ids/s | time, relative |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        ratio = "1" if line["ratio"] is None else f"{line['ratio']:.1f}"
        rows.append(
            f"| {line['case']} | {line['who']} | {line['threads']} | "
            f"{line['million_ids_per_s']:.3g} | {ratio} |"
        )
    return "\n".join(rows) + "\n"


def loss() -> str:
    lines = newest("loss")
    rows = [
        "\n## The loss and its gradients\n",
        f"`bench/loss.py`, {where(lines[-1])}. All may use as many CPUs as there are threads. "
        "The time is relative within rounds; the share is of NumPy's float32 matrix product in the "
        "same run, counting three products; memory is beyond the inputs and gradients; the error "
        "is the largest of the loss and the gradients, relative to float64. linear_cross_entropy "
        "takes targets among the columns in the place of positives.\n",
        "| case | threads | | ms | spread | time, relative | share of sgemm | MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        memory = "" if line["extra_bytes"] is None else f"{line['extra_bytes'] / 2**20:.0f}"
        error = f"{max(line['errors'].values()):.0e}" if line["errors"] else ""
        rows.append(
            f"| {line['case']} | {line['threads']} | {line['who']} | {1e3 * line['seconds']:.3g} | "
            f"{1e3 * line['spread']:.2g} | {line['ratio']:.2f} | {line['share_of_sgemm']:.0%} | "
            f"{memory} | {error} |"
        )
    return "\n".join(rows) + "\n"


def step() -> str:
    lines = newest("step")
    rows = [
        "\n## Whole steps, and work that is skipped\n",
        f"`bench/step.py`, {where(lines[-1])}. A step samples negatives from 19,252 items, gathers "
        "rows, takes the loss and its gradients, and updates the rows by AdaGrad. The time is "
        "relative within rounds.\n",
        "| case | threads | | ms | spread | time, relative |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        rows.append(
            f"| {line['case']} | {line['threads']} | {line['who']} | {1e3 * line['seconds']:.3g} | "
            f"{1e3 * line['spread']:.2g} | {line['ratio']:.2f} |"
        )
    return "\n".join(rows) + "\n"


def picture() -> str:
    """Time and memory of the loss against S, and draws a second against N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    time, memory, draws = figure.subplots(1, 3)
    shared = re.compile(r"shared negatives, 2048 × (\d+) × 64")
    for axes, name, scale in ((time, "seconds", 1e3), (memory, "extra_bytes", 2.0**-20)):
        points: dict[str, list[tuple[int, float]]] = {}
        for line in newest("loss"):
            found = shared.fullmatch(line["case"])
            if found and line["threads"] == 2 and line[name]:
                point = int(found[1]), scale * line[name]
                points.setdefault(line["who"], []).append(point)
        for who, curve in points.items():
            style = {"color": "black", "linewidth": 2.5} if who == "zipfneg" else {}
            axes.loglog(*zip(*sorted(curve), strict=True), "o-", label=who, **style)
    points = {}
    for line in newest("sampling"):
        found = re.fullmatch(r"log-uniform, N = (.*)", line["case"])
        if found and line["threads"] == 1:
            point = int(float(found[1])), line["million_ids_per_s"]
            points.setdefault(line["who"], []).append(point)
    for who, curve in points.items():
        style = {"color": "black", "linewidth": 2.5} if who == "zipfneg" else {}
        draws.loglog(*zip(*sorted(curve), strict=True), "o-", label=who, **style)
    time.set(
        xlabel="negatives", ylabel="ms", title="Loss and gradients, 2048 × S × 64, two threads"
    )
    memory.set(xlabel="negatives", ylabel="MiB", title="Memory beyond inputs and gradients")
    draws.set(xlabel="items", ylabel="million ids/s", title="Draws with replacement, one thread")
    memory.legend(fontsize=7, loc="upper left")
    draws.legend(fontsize=7, loc="lower right")
    figure.savefig(ROOT / "docs" / "benchmarks.png", dpi=110)
    return (
        "\n![Time and memory against the number of negatives, draws a second against the number of "
        "items](benchmarks.png)\n"
    )


if __name__ == "__main__":
    text = INTRODUCTION + picture() + sampling() + loss() + step()
    (ROOT / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
