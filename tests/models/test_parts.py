"""Parts of a model by name."""

from __future__ import annotations

import pytest

from finetune import UserError
from finetune.models.parts import flat, part_of, require_parts


def test_nested_settings_are_dotted_parts() -> None:
    assert flat({"down_blocks": {"1": 8, "0": {"attn2": 4.5}}, "to_k": 2}) == {
        "down_blocks.1": 8, "down_blocks.0.attn2": 4.5, "to_k": 2,
    }  # fmt: skip
    for value in ("four", True, None):
        with pytest.raises(UserError, match=r"a\.b=.* is no number"):
            flat({"a": {"b": value}})


def test_a_part_is_whole_words_and_the_longest_wins() -> None:
    name = "unet.down_blocks.1.attentions.0.attn2.to_k.weight"
    assert part_of(name, ["down_blocks", "down_blocks.1", "up_blocks"]) == "down_blocks.1"
    assert part_of(name, ["attn2.to_k", "unet"]) == "attn2.to_k"
    assert part_of(name, ["down_blocks.10", "blocks", "attn", "to_k.w"]) is None
    assert part_of("unet.down_blocks.10.x", ["down_blocks.1"]) is None


def test_a_part_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.lr_ratios\.upblocks: .* such a name is a\.b$"):
        require_parts("optim.lr_ratios", ["upblocks"], ["", "c", "a.b"])
