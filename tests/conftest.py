"""What all tests share: a kernel cache for each state of the sources, and the command line.

Numba's own cache does not see changes in imported files.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

digest = hashlib.sha256()
for path in sorted((Path(__file__).parents[1] / "zipfneg").rglob("*.py")):
    digest.update(path.read_bytes())
os.environ.setdefault(
    "NUMBA_CACHE_DIR", f"{tempfile.gettempdir()}/zipfneg-numba-{digest.hexdigest()[:16]}"
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: its exit status, output and errors."""
    from zipfneg import cli  # not before the cache is set

    monkeypatch.setenv("COLUMNS", "160")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["zipfneg", *map(str, args)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run
