"""Make image shards from an Iconify icon set: named SVGs, drawn at any size; the names are the captions.

PACKAGE is an npm package of the set (`npm pack @iconify-json/noto`) or its icons.json. Each icon is drawn
in the middle of a square on the background; its caption is its name with spaces for hyphens. Hidden icons
and aliases are left out. The set's name, version, licence and author are written to SHARDS/SOURCE.json.
Icons that can't be drawn are listed in SHARDS/rejects.jsonl.

examples:
  data-tools ingest iconify iconify-json-noto-1.2.9.tgz --out shards/noto --size 64
  data-tools ingest iconify fluent.tgz --common-with noto.tgz twemoji.tgz --limit 1000 --out shards/fluent
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from data_tools.arguments import add_workers_argument, positive
from data_tools.filters import Filters
from data_tools.images import MAX_PIXELS, PictureError, encode_image, parse_colour
from data_tools.ingest.common import (
    Found,
    Options,
    SetAside,
    add_output_arguments,
    check_quality,
    ingest,
)
from finetune import UserError

Colour = tuple[int, int, int]

_OVERSAMPLING = 2  # the edges of SVG filters and masks come out jagged at the final size
_DEFAULT_SIDE = 16  # Iconify's, where neither the icon nor the set gives a width or height


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest iconify`."""
    parser.add_argument(
        "package", type=Path, metavar="PACKAGE", help=".tgz of an @iconify-json package, or icons.json"
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
    parser.add_argument(
        "--style-caption", action="store_true", help='add the set to captions: "cat, noto emoji style"'
    )
    add_output_arguments(parser, ("webp", "png", "jpg"), "default: webp")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest iconify`."""
    check_quality(args.quality)
    background = parse_colour(args.background)
    options = Options(args.format or "webp", None, args.quality, background, MAX_PIXELS, Filters())
    icons = IconSet.load(args.package)
    names = _choose(icons, args)
    origin = (json.dumps(icons.source(), indent=2, ensure_ascii=False) + "\n").encode()
    items = (_drawn(icons, name, args, background) for name in names)
    code = ingest(
        args, options, items, source=str(args.package), paths=[args.package], total=len(names), origin=origin
    )
    licence = icons.info.get("license", {}).get("title", "not stated")
    print(f"icons of {icons.title}, licence: {licence}")
    return code


def _drawn(icons: IconSet, name: str, args: argparse.Namespace, background: Colour) -> Found | SetAside:
    caption = name.replace("-", " ")
    if args.style_caption:
        caption += f", {icons.title.lower()} style"
    try:
        image = draw(icons.svg(name, args.size), args.size, background)
    except PictureError as error:
        return SetAside(name, str(error))
    return Found(name, name, encode_image(image, "png"), {"captions": [caption]})


def _choose(icons: IconSet, args: argparse.Namespace) -> list[str]:
    names = set(icons.visible)
    if args.names is not None:
        try:
            wanted = {line.strip() for line in args.names.read_text(encoding="utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the names in {args.names}: {error}") from None
        if unknown := sorted(wanted - icons.icons.keys()):
            raise UserError(
                f"{args.names}: {len(unknown)} names are not in {args.package}, the first is {unknown[0]}"
            )
        names = wanted
    for other in args.common_with or ():
        names &= set(IconSet.load(other).visible)
    if not names:
        raise UserError(f"no icon of {args.package} is left; check --names and --common-with")
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
        try:
            if path.suffix == ".json":
                files = {}
                for name in ("package.json", "info.json"):
                    if (path.parent / name).is_file():
                        files[name] = (path.parent / name).read_bytes()
                files["icons.json"] = path.read_bytes()
            else:
                files = _read_package(path)
            data = json.loads(files["icons.json"])
            info, package = (json.loads(files.get(name, b"{}")) for name in ("info.json", "package.json"))
            icons = {str(name): dict(icon) for name, icon in data["icons"].items()}
        except FileNotFoundError:
            raise UserError(f"no file {path}; get it with `npm pack @iconify-json/NAME`") from None
        except (
            OSError,
            tarfile.TarError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(f"{path} is no Iconify set ({type(error).__name__}: {error})") from None
        defaults = {key: data[key] for key in ("left", "top", "width", "height") if key in data}
        return cls(icons, defaults, info or data.get("info") or {"prefix": data.get("prefix")}, package)

    @property
    def visible(self) -> list[str]:
        """Names of the icons that the set shows; hidden ones are old names kept for compatibility."""
        return [name for name, icon in self.icons.items() if not icon.get("hidden")]

    @property
    def title(self) -> str:
        """The name of the set, for people."""
        return str(self.info.get("name") or self.info.get("prefix") or "icons")

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
        except (TypeError, ValueError):
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


def draw(svg: str, size: int, background: Colour) -> Image.Image:
    """Draw an SVG, size by size pixels, over a colour.

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
    alpha = rgba.getchannel("A")
    if cast(tuple[int, int], alpha.getextrema())[1] == 0:
        raise PictureError("draws nothing")
    flat = Image.composite(rgba.convert("RGB"), Image.new("RGB", rgba.size, background), alpha)
    return flat.reduce(_OVERSAMPLING)


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
