"""What does not survive a fork is made anew in the child."""

from __future__ import annotations

import os
import weakref
from typing import Any

_forked: weakref.WeakSet[Any] = weakref.WeakSet()


def reset_after_fork(thing: Any) -> None:
    """Have `thing._reset()` called in forked children: locks, threads and connections don't survive a fork."""
    _forked.add(thing)


def _reset_all() -> None:
    for thing in list(_forked):
        thing._reset()


os.register_at_fork(after_in_child=_reset_all)
