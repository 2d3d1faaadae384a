"""Numba's cache does not see changes in other files: tests compile anew for every source tree."""

import hashlib
import os
import tempfile
from pathlib import Path

digest = hashlib.sha256()
for path in sorted((Path(__file__).parents[1] / "zipfneg").rglob("*.py")):
    digest.update(path.read_bytes())
os.environ.setdefault(
    "NUMBA_CACHE_DIR", f"{tempfile.gettempdir()}/zipfneg-numba-{digest.hexdigest()[:16]}"
)
