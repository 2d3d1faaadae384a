"""Files that are whole or not there."""

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place once it is complete and on disk; never a torn one.

    What a killed process left of its own attempt is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for killed in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        killed.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:  # tempfile's would be readable by their owner alone
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "the earlier file is unharmed" if path.exists() else "nothing was written"
            reason = error.strerror or error
            raise OSError(error.errno, f"could not save ({reason}); {kept}", str(path)) from error
        raise


def save_arrays(path: Path, **arrays: Any) -> None:
    """NumPy's .npz."""
    with replacing(path) as file:
        np.savez(file, **arrays)
