"""Make image shards from an Iconify icon set: named SVGs, drawn at any size; the names are the captions.

A PACKAGE is an npm package of the set (`npm pack @iconify-json/noto`) or its icons.json. Each icon is drawn
in the middle of a square on the background; its caption is its name with spaces for hyphens. Hidden icons
and aliases are left out. The set's name, version, licence and author are written to SHARDS/SOURCE.json, for several
sets as a list. Icons that can't be drawn are listed in SHARDS/rejects.jsonl. Of several sets, keys begin with the
set's short name.

--hold-out keeps a share of the names for measurement, by a hash that is the same for all sets. Names that differ in
skin tone, in man, woman or person, or in the way they face stay together: a held-out one is not seen in disguise.
--draws draws each icon several times: first as it is, then smaller and moved, every second time on a coloured
ground, which the caption then names ("cat, on light blue").

examples:
  data-tools ingest iconify iconify-json-noto-1.2.9.tgz --out shards/noto --size 64
  data-tools ingest iconify fluent.tgz --common-with noto.tgz twemoji.tgz --limit 1000 --out shards/fluent
  data-tools ingest iconify noto.tgz twemoji.tgz --hold-out 0.1 --draws 4 --style-caption --out shards/train
  data-tools ingest iconify noto.tgz twemoji.tgz --hold-out 0.1 --held-out --style-caption --out shards/test
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from data_tools.arguments import add_workers_argument, probability
from data_tools.filters import Filters
from data_tools.images import encode_image, parse_colour
from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options, add_output_arguments, check_quality
from data_tools.ingest.shards import ingest
from data_tools.texts import sound_json
from finetune import UserError, first_line
from finetune.data.shards.images import MAX_PIXELS, PictureError
from finetune.terminal import positive

Colour = tuple[int, int, int]

_GET_ONE = "give the .tgz of `npm pack @iconify-json/NAME`, or its icons.json"

_OVERSAMPLING = 2  # the edges of SVG filters and masks come out jagged at the final size
_DEFAULT_SIDE = 16  # Iconify's, where neither the icon nor the set gives a width or height
_SMALLEST = 0.84  # of the drawn sizes, as a share of the picture: what is left is room to move
_SKIN_TONE = re.compile(r"-(medium-)?(light|medium|dark)-skin-tone\b")
# What may differ between pictures that show the same: tones, people, which way they face.
_VARIANT_WORDS = frozenset(
    ["light", "medium", "dark", "skin", "tone", "man", "woman", "men", "women", "mans", "womans", "mens", "womens"]
    + ["boy", "girl", "person", "people", "adult", "child", "male", "female", "facing", "right", "and"]
)
GROUNDS: dict[str, Colour] = {
    "light blue": (176, 214, 240),
    "light green": (190, 226, 184),
    "light yellow": (250, 236, 170),
    "pink": (247, 201, 214),
    "lavender": (212, 202, 238),
    "orange": (248, 190, 120),
    "grey": (190, 194, 200),
    "dark blue": (44, 62, 100),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest iconify`."""
    parser.add_argument(
        "packages",
        type=Path,
        nargs="+",
        metavar="PACKAGE",
        help=".tgz of an @iconify-json package, or icons.json; several go into the same shards",
    )
    parser.add_argument("--size", type=positive, default=64, metavar="N", help="height and width (default: 64)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--names", type=Path, metavar="FILE", help="draw only these, one name a line")
    choice.add_argument(
        "--common-with",
        type=Path,
        nargs="+",
        metavar="PACKAGE",
        help="draw only names that these sets have too",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="draw at most N, chosen by a fixed hash of their names"
    )
    parser.add_argument("--no-skin-tones", action="store_true", help="leave out names that say a skin tone")
    parser.add_argument(
        "--hold-out",
        type=probability,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of the names, for measurement: chosen by a hash, the same for all sets",
    )
    parser.add_argument("--held-out", action="store_true", help="draw what --hold-out leaves out, no others")
    parser.add_argument(
        "--style-caption", action="store_true", help='add the set to captions: "cat, noto emoji style"'
    )
    parser.add_argument(
        "--draws",
        type=positive,
        default=1,
        metavar="N",
        help="pictures of each icon, all but one varied (default: 1)",
    )
    add_output_arguments(parser, ("webp", "png", "jpg"), "default: webp")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest iconify`."""
    check_quality(args.quality)
    if (most := math.isqrt(MAX_PIXELS) // _OVERSAMPLING) < args.size:
        raise UserError(f"--size {args.size} is too large a side; {most} is the most")
    background = parse_colour(args.background)
    options = Options(args.format or "webp", None, args.quality, background, MAX_PIXELS, Filters())
    sets = [IconSet.load(path) for path in args.packages]
    if len({icons.prefix for icons in sets}) < len(sets):
        raise UserError(f"the same set twice: {', '.join(map(str, args.packages))}")
    others = [IconSet.load(path) for path in args.common_with or ()]
    chosen = [_choose(icons, path, others, args) for icons, path in zip(sets, args.packages, strict=True)]
    sources = [icons.source() for icons in sets]
    origin = json.dumps(sources if len(sets) > 1 else sources[0], indent=2, ensure_ascii=False) + "\n"
    code = ingest(
        args,
        options,
        _once(
            item
            for icons, names in zip(sets, chosen, strict=True)
            for name in names
            for item in _drawn(icons, name, f"{icons.prefix}-{name}" if len(sets) > 1 else name, args, background)
        ),
        source=", ".join(map(str, args.packages)),
        paths=args.packages,
        total=sum(map(len, chosen)) * args.draws,
        origin=origin.encode(),
    )
    for icons in sets:
        print(f"icons of {icons.title}, licence: {icons.licence}")
    return code


def _once(items: Iterable[Found | SetAside]) -> Iterator[Found | SetAside]:
    """Each key once: `b-c` of the set `a` and `c` of the set `a-b` have the same."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Found):
            if item.key in seen:
                item = SetAside(item.file, f"another icon has its key, {item.key}; draw the sets one by one")
            else:
                seen.add(item.key)
        yield item


def _drawn(
    icons: IconSet, name: str, first_key: str, args: argparse.Namespace, background: Colour
) -> Iterator[Found | SetAside]:
    caption = name.replace("-", " ")
    if args.style_caption:
        caption += f", {icons.title.lower()} style"
    try:
        icon = render(icons.svg(name, args.size), args.size)
    except PictureError as error:
        yield SetAside(name, str(error))
        return
    for draw in range(args.draws):
        key, said, picture, ground = first_key, caption, icon, background
        if draw:
            key = f"{first_key}-draw{draw + 1}"
            generator = np.random.Generator(np.random.Philox(_hash(key)))
            picture = _moved(icon, generator)
            if draw % 2 == 0:
                ground_name = list(GROUNDS)[generator.integers(len(GROUNDS))]
                said, ground = f"{caption}, on {ground_name}", GROUNDS[ground_name]
        yield Found(key, name, encode_image(flatten(picture, ground), "png"), {"captions": [said]})


def _moved(icon: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The icon smaller, somewhere in its square; nothing of it is cut off."""
    side = round(icon.width * generator.uniform(_SMALLEST, 1.0))
    left, top = (int(place) for place in generator.integers(icon.width - side + 1, size=2))
    # Premultiplied: else the colour of what is transparent comes into the edges.
    small = icon.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", icon.size)
    square.paste(small, (left, top))
    return square


def base_name(name: str) -> str:
    """The name without skin tone, sex, age and direction: equal for icons that show the same otherwise."""
    words = [word for word in name.split("-") if word not in _VARIANT_WORDS]
    return "-".join(words) or "person"


def is_held_out(name: str, share: float) -> bool:
    """Whether `--hold-out SHARE` leaves a name out: by a hash of its base name alone."""
    return _hash(base_name(name)) < share * 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _choose(icons: IconSet, path: Path, others: Sequence[IconSet], args: argparse.Namespace) -> list[str]:
    names = set(icons.visible)
    if args.names is not None:
        try:
            wanted = {line.strip() for line in args.names.read_text(encoding="utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the names in {args.names}: {error}") from None
        if unknown := sorted(wanted - icons.icons.keys()):
            raise UserError(f"{args.names}: {len(unknown)} names are not in {path}, the first is {unknown[0]}")
        names = wanted
    for other in others:
        names &= set(other.visible)
    if args.no_skin_tones:
        names = {name for name in names if not _SKIN_TONE.search(name)}
    if args.held_out and not args.hold_out:
        raise UserError("--held-out draws what --hold-out leaves out: say how much, --hold-out 0.1")
    names = {name for name in names if is_held_out(name, args.hold_out) == args.held_out}
    if not names:
        raise UserError(f"no icon of {path} is left; check --names, --common-with, --no-skin-tones and --hold-out")
    if args.limit is not None:
        names = set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[: args.limit])
    return sorted(names)


@dataclass(frozen=True)
class IconSet:
    """An Iconify set: its icons by name, and what its package says of it.

    Format: https://iconify.design/docs/types/iconify-json.html
    """

    icons: dict[str, dict[str, Any]]
    defaults: dict[str, Any]  # left, top, width, height of icons that don't give their own
    info: dict[str, Any]
    package: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> IconSet:
        """Read an npm package (.tgz) or an icons.json; package.json and info.json beside it are optional.

        Raises:
            UserError: absent, or no Iconify set.
        """
        files = {}
        try:
            if path.suffix == ".json":
                for name in ("package.json", "info.json"):
                    if (path.parent / name).is_file():
                        files[name] = (path.parent / name).read_bytes()
                files["icons.json"] = path.read_bytes()
            else:
                files = _read_package(path)
        except FileNotFoundError:
            raise UserError(f"no file {path}; get it with `npm pack @iconify-json/NAME`") from None
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            what = "it is no tar" if isinstance(error, tarfile.ReadError) else first_line(error)
            raise UserError(f"{path} is no Iconify set ({what}); {_GET_ONE}") from None
        if "icons.json" not in files:
            raise UserError(f"{path} is no Iconify set (it has no icons.json); {_GET_ONE}")
        data, info, package = (_parse(path, name, files) for name in ("icons.json", "info.json", "package.json"))
        if not isinstance(data.get("icons"), dict):
            raise UserError(f"{path} is no Iconify set (it has no object `icons`); {_GET_ONE}")
        # What is no object has no body, and is set aside when its turn comes.
        icons = {name: icon if isinstance(icon, dict) else {} for name, icon in data["icons"].items()}
        defaults: dict[str, Any] = {key: data[key] for key in ("left", "top", "width", "height") if key in data}
        own = data.get("info") if isinstance(data.get("info"), dict) else None
        return cls(icons, defaults, {"prefix": data.get("prefix"), **(info or own or {})}, package)

    @property
    def visible(self) -> list[str]:
        """Names of the icons that the set shows; hidden ones are old names kept for compatibility."""
        return [name for name, icon in self.icons.items() if not icon.get("hidden")]

    @property
    def prefix(self) -> str:
        """The short name of the set, as npm has it."""
        return str(self.info.get("prefix") or str(self.package.get("name") or "icons").rpartition("/")[2])

    @property
    def title(self) -> str:
        """The name of the set, for people."""
        return str(self.info.get("name") or self.info.get("prefix") or "icons")

    @property
    def licence(self) -> str:
        """The name of its licence, for people."""
        licence = self.info.get("license") or self.package.get("license")
        return str((licence.get("title") if isinstance(licence, dict) else licence) or "not stated")

    def source(self) -> dict[str, Any]:
        """Where the pictures come from, and under which licence."""
        return {
            "package": self.package.get("name"),
            "version": self.package.get("version") or self.info.get("version"),
            "set": self.title,
            "license": self.info.get("license") or self.package.get("license"),
            "author": self.info.get("author") or self.package.get("author"),
        }

    def svg(self, name: str, size: int) -> str:
        """The icon as an SVG of size by size pixels; one that isn't square keeps its aspect, in the middle.

        Raises:
            PictureError: no body, or numbers that aren't numbers.
        """
        icon = {**self.defaults, **self.icons[name]}
        body = icon.get("body")
        try:
            left, top = float(icon.get("left", 0)), float(icon.get("top", 0))
            width, height = (float(icon.get(side, _DEFAULT_SIDE)) for side in ("width", "height"))
        except (TypeError, ValueError, OverflowError):
            raise PictureError("left, top, width or height is not a number") from None
        if not isinstance(body, str) or not body or min(width, height) <= 0:
            raise PictureError("no body, or no area")
        turns = icon.get("rotate", 0)
        turns = int(turns) % 4 if isinstance(turns, int | float) else 0
        middle_x, middle_y = left + width / 2, top + height / 2
        moves = []
        if turns:
            moves.append(f"rotate({90 * turns} {middle_x:g} {middle_y:g})")
        if icon.get("hFlip") or icon.get("vFlip"):
            x, y = (-1 if icon.get("hFlip") else 1), (-1 if icon.get("vFlip") else 1)
            moves.append(
                f"translate({middle_x:g} {middle_y:g}) scale({x} {y}) translate({-middle_x:g} {-middle_y:g})"
            )
        if moves:
            body = f'<g transform="{" ".join(moves)}">{body}</g>'
        if turns % 2:  # the picture turns about its middle, and so does its frame
            left, top, width, height = middle_x - height / 2, middle_y - width / 2, height, width
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="{left:g} {top:g} {width:g} {height:g}">{body}</svg>'
        )


def render(svg: str, size: int) -> Image.Image:
    """Draw an SVG on nothing, at twice size by size pixels (see `flatten`): RGBA.

    Raises:
        PictureError: the SVG is broken, or draws nothing.
    """
    import resvg_py

    drawn = size * _OVERSAMPLING
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=drawn, height=drawn, skip_system_fonts=True))
    except (ValueError, RuntimeError) as error:
        raise PictureError(str(error)) from None
    with Image.open(io.BytesIO(png)) as image:
        rgba = image.convert("RGBA")
    if rgba.size != (drawn, drawn):
        raise PictureError(f"drawn as {rgba.width}x{rgba.height} instead of {drawn}x{drawn}")
    if cast(tuple[int, int], rgba.getchannel("A").getextrema())[1] == 0:
        raise PictureError("draws nothing")
    return rgba


def flatten(rgba: Image.Image, background: Colour) -> Image.Image:
    """What `render` drew, over a colour and at its final size."""
    ground = Image.new("RGB", rgba.size, background)
    return Image.composite(rgba.convert("RGB"), ground, rgba.getchannel("A")).reduce(_OVERSAMPLING)


def _parse(path: Path, name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """One of the files of a set as JSON; an empty object where it isn't there.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        content = sound_json(json.loads(files.get(name, b"{}")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no Iconify set ({name} is not JSON: {error}); {_GET_ONE}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no Iconify set ({name} is no JSON object); {_GET_ONE}")
    return content


def _read_package(path: Path) -> dict[str, bytes]:
    """icons.json, info.json and package.json out of an npm package; nothing is unpacked to disk."""
    files = {}
    with tarfile.open(path, "r:*") as tar:
        for info in tar:
            folder, _, name = info.name.removeprefix("./").rpartition("/")
            if info.isreg() and folder.count("/") == 0 and name in ("icons.json", "info.json", "package.json"):
                file = tar.extractfile(info)
                assert file is not None, "a regular member has content"
                files[name] = file.read()
    return files
