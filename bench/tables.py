"""Write docs/benchmarks.md from the result lines in bench/results.

python bench/tables.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Benchmarks

Written by `bench/tables.py` from the lines in `bench/results`; the commands are in the scripts. All
competitors of a case run in one process on the same machine, zipfneg's result is checked before it
is timed, and figures are medians. Machines differ and are noisy: trust the ratios.
"""


def newest(lines: list[dict]) -> list[dict]:
    """The last line of each case, competitor and number of threads."""
    found = {(line["case"], line["who"], line["threads"]): line for line in lines}
    return list(found.values())


def sampling() -> str:
    path = ROOT / "bench" / "results" / "sampling.jsonl"
    lines = newest([json.loads(text) for text in path.read_text().splitlines()])
    about = lines[-1]
    versions = ", ".join(
        f"{name} {about[name]}"
        for name in ("numpy", "numba", "tensorflow-cpu", "torch")
        if name in about
    )
    rows = [
        "\n## Sampling\n",
        f"`bench/sampling.py`, {about['cpu']}, {about['cpus']} CPUs; {versions}. Threads are those "
        "of zipfneg, which draws unique ids on one; the others use those they choose. zipfneg "
        "fills a given array, the others make theirs.\n",
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


if __name__ == "__main__":
    (ROOT / "docs" / "benchmarks.md").write_text(INTRODUCTION + sampling(), encoding="utf-8")
