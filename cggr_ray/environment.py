"""What ran where: versions and the commit, for run.json, race.json and benchmark rows."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "datasets", "ray", "numpy", "math-verify", "cggr-ray")


def version(package: str) -> str:
    """Installed version, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of the checkout that this code runs from, with a + where it has changes; empty outside one.

    CGGR_RAY_COMMIT says it where git cannot: in an image, in a copy.
    """
    if told := os.environ.get("CGGR_RAY_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    head = _git(root, "rev-parse", "--short=10", "HEAD")
    return head + ("+" if head and _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def fingerprint() -> dict[str, str]:
    """Versions of what decides a result."""
    return {"commit": commit(), **versions()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
