"""What `--help` says of settings comes from the schema."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from finetune import help as help_text
from finetune.autoencoder import config as autoencoder
from finetune.config import Config


@dataclass
class Inner:
    """A section
    of two lines."""

    # Above it,
    # in two lines.
    both: int = 1  # and behind it
    plain: str = "# is no comment"


@dataclass
class Outer(Inner):
    own: list[int] = field(
        default_factory=list  # inside
    )

    # Of nothing.

    inner: Inner = field(default_factory=Inner)


def test_comments_are_of_their_fields():
    said = help_text.meanings(Outer)
    both = "Above it, in two lines. and behind it"
    assert said == {"both": both, "own": "inside", "inner": "A section of two lines.", "inner.both": both}


@pytest.mark.parametrize("schema", [Config, autoencoder.Config])
def test_every_key_has_a_meaning(schema):
    said = help_text.meanings(schema)
    assert [key for key, _ in help_text.defaults(schema) if not said.get(key)] == []


def test_help_has_every_key_with_its_default_and_meaning():
    lines = help_text.describe("train", Config).splitlines()
    assert "  optim.lr=0.0001  # learning rate, at its peak" in lines
    assert "  train.precision=auto  # auto: bf16 on a GPU that has it, else fp32 | fp32 | bf16 | fp16" in lines
    at = lines.index("  model.unet={}")
    assert lines[at + 1].startswith("      # Arguments of diffusers' UNet2DConditionModel;")
    assert max(map(len, lines)) <= 116
