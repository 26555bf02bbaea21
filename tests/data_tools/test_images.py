"""How pictures are written, and the names of colours."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.images import encode_image, parse_colour
from finetune import UserError
from finetune.data.shards.images import decode_rgb, picture_format
from tests.data_tools.conftest import smooth_picture

PICTURE = smooth_picture(0, 24, 40)


def test_png_is_lossless_and_unknown_colours_are_refused() -> None:
    np.testing.assert_array_equal(np.asarray(decode_rgb(encode_image(PICTURE, "png"))), np.asarray(PICTURE))
    for member in ("webp", "jpg"):
        data = encode_image(PICTURE, member)
        assert picture_format(data) == (member, (24, 40))
        assert np.abs(np.asarray(decode_rgb(data)).astype(int) - np.asarray(PICTURE)).mean() < 3
    assert parse_colour("#ff8000") == (255, 128, 0)
    with pytest.raises(UserError, match="no colour 'whitish'"):
        parse_colour("whitish")
