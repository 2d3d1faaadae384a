"""The adapters and their pages are collected where their framework is installed."""

from importlib.util import find_spec

collect_ignore = [
    f"{folder}/{framework}.{suffix}"
    for framework in ("torch", "jax", "tensorflow")
    if find_spec(framework) is None
    for folder, suffix in (("zipfneg", "py"), ("docs", "md"))
]
