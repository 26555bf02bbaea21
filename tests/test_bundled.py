"""The models in the box stay small, in float16, and say nothing of the machine that made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from finetune import BUNDLED

MODELS = sorted(path.parent for path in BUNDLED.glob("*/model_index.json"))


@pytest.fixture(params=MODELS, ids=lambda path: path.name)
def model(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


def test_a_model_is_small_and_float16(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 48 * 2**20
    dtypes = {}
    for path in model.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes |= {(path.parent.name, name): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {component for component, _ in dtypes} >= {"unet", "vae", "text_encoder"}
    assert {key: dtype for key, dtype in dtypes.items() if dtype != "F16"} == {}


def test_no_setting_names_a_place(model: Path) -> None:
    def texts(value: Any) -> Iterator[str]:
        match value:
            case str():
                yield value
            case dict():
                yield from (text for each in value.values() for text in texts(each))
            case list():
                yield from (text for each in value for text in texts(each))

    settings = [path for path in model.rglob("*.json") if "tokenizer" not in path.parent.name]
    found = {path.name: [t for t in texts(json.loads(path.read_text())) if "/" in t] for path in settings}
    assert settings and {name: places for name, places in found.items() if places} == {}
