"""Where things are kept between runs, as each operating system has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled kernels are kept; KEELBACK_CACHE names another place.

    Raises OSError for a user without a home.
    """
    if named := os.environ.get("KEELBACK_CACHE"):
        return Path(named)
    if base := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(base) / "keelback"
    try:
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder") from None
    inside = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return home / inside / "keelback"


def models_folder() -> Path:
    """Where pulled models are kept; KEELBACK_MODELS names another place.

    Raises OSError for a user without a home.
    """
    named = os.environ.get("KEELBACK_MODELS")
    return Path(named) if named else cache_folder() / "models"
