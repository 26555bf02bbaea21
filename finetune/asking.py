"""What a user asks to be drawn, made into samples as shards hold them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune import UserError, first_line
from finetune.batch import Sample
from finetune.components import Components
from finetune.data.shards import HOLE, LOWRES, MAP, MASKED
from finetune.data.shards.files import npy_bytes
from finetune.data.shards.images import PictureError, decode_rgb
from finetune.models.autoencoder import encode_moments
from finetune.tasks.super_resolution import lowres

_NOISE_LEVEL = 20  # as Stable Diffusion's upscaler is used

OPTIONS = {
    "prompt": "--prompt TEXT",
    "label": "--label NAME",
    "layout": "--layout FILE.json",
    "map": "--map FILE.png",
    "image": "--image FILE",
    "mask": "--mask FILE.png",
}
"""How `finetune sample` takes each of a conditioner's `asks`."""


@dataclass(frozen=True)
class Asked:
    """What is given for one option or another: prompts, labels, files; empty where nothing is."""

    prompt: Sequence[str] = ()
    label: Sequence[str] = ()
    layout: Sequence[str] = ()
    map: Sequence[str] = ()
    image: Sequence[str] = ()
    mask: Sequence[str] = ()
    noise_level: int | None = None


def samples(parts: Components, asked: Asked, size: tuple[int, int]) -> list[Sample]:
    """One sample for each thing that is asked for; where one option is given once, it goes with all of another's.

    Args:
        size: height and width in pixels, where the condition has none of its own.

    Raises:
        UserError: an option that the task does not have, or one that it needs is missing; files that can't be read.
    """
    asks = parts.conditioner.asks
    given = {name: list(values) for name in OPTIONS if (values := getattr(asked, name))}
    task = f"{parts.source} draws task={parts.task.name}"
    for name in given:
        if name not in asks:
            takes = ", ".join(OPTIONS[ask] for ask in asks) or "no condition"
            raise UserError(f"--{name} is not for this model: {task}, which takes {takes}")
    for ask in asks:
        if asks == ("prompt",) and not given:
            raise UserError("no prompts; give --prompt TEXT or --prompts FILE")
        if ask not in given and ask != "prompt":
            raise UserError(f"{OPTIONS[ask]} is missing: {task}")
    if asked.noise_level is not None and ("image" not in asks or "mask" in asks):
        raise UserError(f"--noise-level is not for this model: {task}, which enlarges no picture")
    enlarges = lowres(parts.conditioner)
    if asked.noise_level is not None and enlarges is not None and not enlarges.noise_levels:
        raise UserError(f"--noise-level has no effect: {parts.source} was trained without noise; leave it out")
    count = max(map(len, given.values()), default=1)
    for name, values in given.items():
        if len(values) not in (1, count):
            raise UserError(
                f"--{name} is given {len(values)} times and another option {count} times: give it once, or as often"
            )
    rows = [{name: values[row % len(values)] for name, values in given.items()} for row in range(count)]
    return [_sample(parts, row, size, asked.noise_level) for row in rows]


def _sample(parts: Components, given: Mapping[str, str], size: tuple[int, int], noise_level: int | None) -> Sample:
    record: dict[str, Any] = {"captions": [given.get("prompt", "")]}
    enlarges = lowres(parts.conditioner)
    if enlarges is not None and enlarges.noise_levels:
        usual = min(_NOISE_LEVEL, enlarges.noise_levels - 1)
        record["noise_level"] = usual if noise_level is None else noise_level
    members: dict[str, bytes] = {}
    if "label" in given:
        record["class"] = _class(parts, given["label"], "--label")
    if "layout" in given:
        record["boxes"] = _boxes(parts, given["layout"])
    if "map" in given:
        members[MAP] = _bytes(given["map"], "--map")
    if "mask" in given:
        size = _hole(parts, given["image"], given["mask"], members)
    elif "image" in given:
        members[LOWRES] = _png(_picture(given["image"], "--image"))
    made = Sample(record, size, members)
    own = parts.conditioner.size(made)
    return made if own is None else Sample(record, own, members)


def _class(parts: Components, label: str, option: str) -> int:
    """A class by name or number."""
    names = list(parts.task.classes)
    if label in names:
        return names.index(label)
    if label.isdecimal():
        return int(label)
    known = (
        f"choose one of {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "give a number"
    )
    raise UserError(f"{option} {label}: no such class; {known}")


def _boxes(parts: Components, path: str) -> list[list[float]]:
    form = 'a list such as [["dog", 0.1, 0.2, 0.5, 0.9]]: class, left, top, right, bottom as shares of the picture'
    try:
        read = json.loads(_bytes(path, "--layout"))
        boxes = [[_class(parts, str(box[0]), "--layout"), *map(float, box[1:])] for box in read]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UserError(f"--layout {path} is not {form}") from error
    for box in boxes:
        if len(box) != 5 or not (0 <= box[1] < box[3] <= 1 and 0 <= box[2] < box[4] <= 1):
            raise UserError(f"--layout {path}: box {box} is not {form}")
    return boxes


def _hole(parts: Components, image: str, mask: str, members: dict[str, bytes]) -> tuple[int, int]:
    """Add the picture with the mask's white part painted grey, encoded; returns its (height, width)."""
    picture = np.array(_picture(image, "--image"))
    height, width = picture.shape[:2]
    hole = _picture(mask, "--mask", (0, 0, 0)).convert("L")
    if hole.size != (width, height):
        raise UserError(
            f"--mask {mask} is {hole.width}x{hole.height}, --image {width}x{height}: they must be equal"
        )
    cells = parts.downsample
    if height % cells or width % cells:
        raise UserError(f"--image {image} is {width}x{height}: its sides must be multiples of {cells}")
    inside_HW = np.asarray(hole) >= 128
    pixels_3HW = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    pixels_3HW[:, torch.from_numpy(inside_HW)] = 0.0
    moments = encode_moments(parts.vae, pixels_3HW[None].to(parts.vae.device)).cpu().numpy().astype(np.float16)
    members[MASKED] = npy_bytes(moments)
    # The nearest pixel to each cell's corner, as torch's interpolation and Stable Diffusion's inpainting take it.
    members[HOLE] = npy_bytes(inside_HW[None, ::cells, ::cells].astype(np.uint8))
    return height, width


def _picture(path: str, option: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Upright and RGB, as pictures get into shards."""
    try:
        return decode_rgb(_bytes(path, option), background)
    except PictureError as error:
        raise UserError(f"{option} {path} cannot be read as a picture: {first_line(error)}") from error


def _bytes(path: str, option: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error.strerror}") from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
