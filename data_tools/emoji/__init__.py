"""The pictures in the box: 1,200 emoji at 64 pixels as image shards, so that a demo needs no download."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the image shards: Microsoft's Fluent Emoji, MIT licence."""
    return Path(__file__).resolve().parent / "fluent-emoji"
