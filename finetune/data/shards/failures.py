"""What a failed try to fetch a file means: whether to ask again, and how to say it."""

from __future__ import annotations

import re

from finetune import first_line

_LATER = (408, 416, 425, 429)  # the client errors of HTTP that a later request may not meet


class HopelessError(Exception):
    """A failure that asking again can't mend."""


def _is_garbled(error: Exception) -> bool:
    """Whether what came could not be parsed: aiohttp says 400 of that, and no server has."""
    return any(type(each).__module__ == "aiohttp.http_exceptions" for each in (error, error.__cause__))


def http_status(error: Exception) -> int | None:
    """The HTTP status that an exception of aiohttp (`status`) or gcsfs (`code`) carries."""
    if _is_garbled(error):
        return None
    for field in ("status", "code"):
        value = getattr(error, field, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def is_forbidden(error: Exception) -> bool:
    """Whether the store knows us and refuses, or can't know who asks."""
    return http_status(error) in (401, 403) or isinstance(error, PermissionError) or _is_credential(error)


def _is_credential(error: Exception) -> bool:
    """botocore's and google-auth's complaints about credentials; both libraries may be absent."""
    return re.search(r"Credential|TokenRetrieval|SSOToken|ProfileNotFound", type(error).__name__) is not None


def is_hopeless(error: Exception) -> bool:
    """Whether asking again can't mend it."""
    status = http_status(error)
    if status is not None and 400 <= status < 500:
        return status not in _LATER
    kinds = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, HopelessError)
    return isinstance(error, kinds) or _is_credential(error)


def in_one_line(error: Exception) -> str:
    """An error as it may be shown: without the address, whose query may hold a key."""
    if _is_garbled(error):
        return "an answer that is no HTTP"
    status, reason = http_status(error), getattr(error, "message", None)
    if status is not None and isinstance(reason, str):  # aiohttp's own text repeats the URL, query and all
        return f"HTTP {status} {reason}".strip()
    return first_line(error)
