"""Label maps become shares of latent cells, or the paper's learned channels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Conditioner, Given, batch_of
from finetune.latents import LatentSpace
from finetune.tasks.semantic_synthesis import LabelMap, shares

SPACE = LatentSpace(0.5)


def given(**more: object) -> Given:
    values: dict[str, object] = {"width": None, "latent_channels": 4, "downsample": 4, "classes": ["a", "b", "c"]}
    return Given(**{"space": SPACE, **values, **more})  # type: ignore[arg-type]


def sample(map_HW: np.ndarray | None, bucket: tuple[int, int] = (16, 24), mode: str | None = None) -> Sample:
    if map_HW is None:
        return Sample({}, bucket)
    buffer = io.BytesIO()
    image = Image.fromarray(map_HW)
    (image.convert(mode) if mode else image).save(buffer, format="PNG")
    return Sample({}, bucket, {"map.png": buffer.getvalue()})


def some_map(seed: int = 0, shape: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Labels 0 to 2 and some unlabelled pixels."""
    labels = np.random.default_rng(seed).integers(4, size=shape).astype(np.uint8)
    return np.where(labels == 3, 255, labels).astype(np.uint8)


def one_hot(map_HW: np.ndarray, labels: int) -> torch.Tensor:
    """Float32 [1, labels, H, W], all zeros at unlabelled pixels."""
    return torch.stack([torch.from_numpy(map_HW == label).float() for label in range(labels)])[None]


def conditioned(conditioner: Conditioner, *samples: Sample) -> torch.Tensor:
    batch = batch_of(conditioner, samples)
    return conditioner(conditioner.inputs(batch, torch.zeros(len(samples), dtype=torch.bool)))["channels"]


def test_shares_are_the_mean_of_the_one_hot_map() -> None:
    maps = [some_map(seed) for seed in range(3)]
    expected = torch.cat([F.avg_pool2d(one_hot(each, 3), 4) for each in maps])
    conditioner = tasks.make("semantic_synthesis", {}, given())
    found = conditioned(conditioner, *map(sample, maps))
    assert found.shape == (3, 3, 4, 6) and conditioner.channels == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_unlabelled_pixels_are_no_label() -> None:
    map_HW = np.full((16, 24), 255, np.uint8)
    map_HW[:4, :2] = 1  # half of the first cell
    channels = conditioned(LabelMap(3, 4), sample(map_HW))
    assert channels[0, 1, 0, 0] == 0.5 and channels.sum() == 0.5


def test_learned_channels_are_those_of_the_papers_rescaler() -> None:
    """Halved bilinearly as often as the autoencoder halves, then mapped by a 1x1 convolution without bias."""
    conditioner = tasks.make("semantic_synthesis", {"channels": 2}, given(seed=3))
    (mapper,) = conditioner.parts().values()
    map_HW = some_map()
    halved = one_hot(map_HW, 3)
    for _ in range(2):
        halved = F.interpolate(halved, scale_factor=0.5, mode="bilinear")
    found = conditioned(conditioner, sample(map_HW))
    assert conditioner.channels == 2 and found.shape == (1, 2, 4, 6)
    torch.testing.assert_close(found, F.conv2d(halved, mapper.weight))  # type: ignore[arg-type]
    found.square().sum().backward()
    assert mapper.weight.grad.abs().min() > 0  # type: ignore[union-attr, operator]


def test_learned_channels_start_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (LabelMap(3, 4, channels=2, seed=seed).mapper for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert torch.equal(before, torch.get_rng_state())
    assert LabelMap(3, 4).parts() == {}


def test_a_larger_map_is_told_as_its_parts_are() -> None:
    """What lets a model sample beyond its training size: no cell knows how large the map is."""
    large = torch.from_numpy(some_map(shape=(32, 48)))[None]
    part = large[:, 16:, 24:]
    assert torch.equal(shares(large, 3, 4)[:, :, 4:, 6:], shares(part, 3, 4))


def test_palette_maps_are_read_by_index_and_give_the_size() -> None:
    map_HW = some_map()
    palette = Image.fromarray(map_HW, mode="P")
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG")
    asked = Sample({}, (16, 24), {"map.png": buffer.getvalue()})
    conditioner = LabelMap(3, 4)
    assert torch.equal(conditioned(conditioner, asked), conditioned(conditioner, sample(map_HW)))
    assert conditioner.size(asked) == (16, 24)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (sample(None), "a sample has no map.png: ingest the pictures with --maps DIR"),
        (sample(some_map(), bucket=(16, 32)), "map.png has 24x16 pixels and its picture 32x16"),
        (sample(np.full((16, 24), 3, np.uint8)), "map.png holds the label 3, and the model knows 0 to 2"),
        (sample(some_map(), mode="RGB"), "map.png has the mode RGB"),
        (Sample({}, (16, 24), {"map.png": b"no picture"}), "map.png cannot be read as a picture"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(asked: Sample, error: str) -> None:
    with pytest.raises(UserError) as raised:
        LabelMap(3, 4).read(asked)
    assert error in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "what", "error"),
    [
        ({}, {"classes": []}, "there is no classes.json beside the shards: set task.options.labels"),
        ({"labels": 256}, {}, "task.options.labels=256 must be between 1 and 255"),
        ({"channels": -1}, {}, "task.options.channels=-1"),
        ({"label": 3}, {}, "unknown key task.options.label: did you mean labels?"),
        ({}, {"width": 32}, "attends to 32 features without a text encoder"),
    ],
)
def test_settings_that_contradict_model_or_data_are_refused(
    settings: dict[str, object], what: dict[str, object], error: str
) -> None:
    with pytest.raises(UserError) as raised:
        tasks.make("semantic_synthesis", settings, given(**what))
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_captions_come_with_it_where_the_model_reads_them() -> None:
    class Captions(Conditioner):
        asks = ("prompt",)

        def forward(self, inputs: object) -> dict[str, torch.Tensor]:
            return {"context": torch.zeros(1, 2, 8)}

    conditioner = tasks.make("semantic_synthesis", {"labels": 5}, given(width=8, text=Captions))
    assert conditioner.guided and conditioner.asks == ("prompt", "map") and conditioner.channels == 5
    batch = batch_of(conditioner, [sample(some_map())])
    condition = conditioner(conditioner.inputs(batch, torch.tensor([True])))
    assert condition["context"].shape == (1, 2, 8)
    assert condition["channels"].sum() > 0, "the map is not left out for guidance"
    assert not tasks.make("semantic_synthesis", {}, given()).guided
