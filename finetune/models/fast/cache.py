"""Where compiled code lies between starts."""

from __future__ import annotations

import os
from pathlib import Path


def compiled_code() -> Path:
    """A folder of the user's: torch's own is a temporary one, which a node may have forgotten by the next job."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm-finetune" / "compiled"
