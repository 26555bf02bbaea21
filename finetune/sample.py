"""`finetune sample`: pictures of what is asked for, by a run, a diffusers folder or a hub id."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import UserError, first_line, memory
from finetune.export.arguments import (
    add_source_arguments,
    add_weights_arguments,
    require_path,
    torch_dtype,
)
from finetune.models import SCHEDULERS
from finetune.terminal import Parser, positive, quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from finetune.batch import Sample
    from finetune.components import Components

GUIDANCE = 7.5  # usual for Stable Diffusion; a run's own `sample.guidance` comes first
_MOST_TIMES = 100
_CONDITIONS = ("label", "layout", "map", "image", "mask")

_EXAMPLES = """examples:
  finetune sample runs/first --prompt "a red apple" --seed 1 --out apple.png
  finetune sample runs/first --prompt "a red apple" --prompt "a green apple" --count 4 --out apples.png
  finetune sample runs/first --prompts captions.txt --out pictures/
  finetune sample runs/classes --label dog --label cat --count 4 --out animals.png
  finetune sample runs/inpainting --image photo.png --mask hole.png --out filled.png
  finetune sample emoji-base --lora loras/style --lora other.safetensors --lora-scale 0.8 --lora-scale 0.5 \\
      --prompt "a house" --out house.png
  finetune sample stable-diffusion-v1-5/stable-diffusion-v1-5 --lora loras/style --prompt "a house" \\
      --scheduler dpm++ --steps 25 --height 512 --width 768 --device cuda --dtype float16 --out house.png

What is asked for depends on the run's task: captions (--prompt), classes (--label), boxes with classes (--layout),
label maps (--map), a picture and what of it is to be painted (--image, --mask), a picture to be enlarged (--image).

One picture goes to FILE; several go there as a grid, a row for each prompt when --count is more than one.
In a DIR, each picture gets its own file and several also make grid.png. PNG files tell prompt, seed and
settings in their text chunks. The noise of picture i comes from seed + i, whatever the batch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Sample pictures and write them.

    Raises:
        UserError: a mistake in the arguments, or a model that cannot be loaded or sampled so.
    """
    arguments = _parser().parse_args(argv)
    from finetune.config import LARGEST, LARGEST_SIDE, require_sizes

    prompts = _prompts(arguments)
    most = arguments.count * max(1, *(len(getattr(arguments, name)) for name in _CONDITIONS), len(prompts))
    if not 0 <= arguments.seed < 2**63 - most:
        raise UserError(f"--seed {arguments.seed}: must be at least 0 and fit in 63 bits")
    if arguments.guidance is not None and not 1 <= arguments.guidance <= LARGEST:
        raise UserError(f"--guidance {arguments.guidance:g}: must be at least 1, which is no guidance, and finite")
    require_sizes({"--height": arguments.height, "--width": arguments.width}, LARGEST_SIDE)
    require_sizes(
        {"--count": arguments.count, "--columns": arguments.columns, "--batch-size": arguments.batch_size}
    )
    loras = _loras(arguments)
    out = _out(arguments.out)

    quiet_libraries()
    import torch

    try:
        with memory.shortage_told():
            return _sample(arguments, loras, prompts, out)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of --device {arguments.device} is full ({first_line(error)}): give a smaller --height and "
            "--width, --batch-size 1, or --dtype bfloat16"
        ) from error


def _sample(arguments: argparse.Namespace, loras: list[tuple[str, float]], prompts: list[str], out: Path) -> int:
    from tqdm import tqdm

    from finetune import pictures, sampling
    from finetune.components import load_components

    device = _device(arguments.device)
    parts = load_components(
        arguments.source,
        weights=arguments.weights,
        step=arguments.checkpoint,
        loras=loras,
        device=device,
        dtype=torch_dtype(arguments.dtype),
        revision=arguments.revision,
        tokenizer=arguments.tokenizer,
    )
    for notice in parts.notices:
        print(f"note: {notice}", file=sys.stderr)
    wanted = _wanted(arguments, parts, prompts)
    guidance, rescale = _guidance(arguments, parts)
    if parts.text is not None and (cut := _cut(parts.text.tokenizer, [*prompts, arguments.negative])):
        print(f"note: {cut}", file=sys.stderr)
    seeds = range(arguments.seed, arguments.seed + len(wanted))
    steps = len(sampling.batches([sample.bucket for sample in wanted], arguments.batch_size)) * arguments.steps
    with tqdm(total=steps, desc=f"sampling {len(wanted)}", unit="step", leave=False) as bar:
        drawn = sampling.generate(
            parts.unet,
            parts.vae,
            parts.conditioner,
            sampling.make_scheduler(arguments.scheduler, parts.scheduler),
            parts.latents,
            wanted,
            seeds,
            steps=arguments.steps,
            guidance=guidance,
            guidance_rescale=rescale,
            negative=arguments.negative,
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    images = [image for picture in drawn for image in sampling.to_pil(picture[None])]
    told = _told(arguments, parts, guidance, rescale)
    if loras:
        told["lora"] = " + ".join(map(_lora_text, loras))
    columns = arguments.columns or (arguments.count if arguments.count > 1 else _square(len(images)))
    sheet = images[0] if len(images) == 1 else pictures.grid(images, columns)
    of_sheet = {"prompt": "\n".join(prompts), "seed": str(arguments.seed), **told, **_size(images[0])}
    if not out.is_dir():  # `_out` has made what is one; its name may have a dot
        pictures.save_png(sheet, out, of_sheet)
        print(out)
        return 0
    captions = [sample.captions[0] for sample in wanted]
    for index, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True)):
        path = out / f"{index:04d}{_slug(caption)}.png"
        pictures.save_png(image, path, {"prompt": caption, "seed": str(seed), **told, **_size(image)})
    if len(images) > 1:
        pictures.save_png(sheet, out / "grid.png", of_sheet)
    print(f"{out}: {len(images) + (len(images) > 1)} files")
    return 0


def _wanted(arguments: argparse.Namespace, parts: Components, prompts: list[str]) -> list[Sample]:
    """What each picture is drawn of.

    Raises:
        UserError: an option that the model has no use for, or lacks.
    """
    from finetune import asking

    if arguments.negative and parts.text is None:
        raise UserError(f"--negative has no effect: task={parts.task.name} takes no text; leave it out")
    asked = asking.Asked(
        prompt=prompts,
        **{name: getattr(arguments, name) for name in _CONDITIONS},
        noise_level=arguments.noise_level,
    )
    height, width = parts.default_size
    each = asking.samples(parts, asked, (arguments.height or height, arguments.width or width))
    sizes = next((f"--{name}" for name in ("map", "image") if getattr(arguments, name)), None)
    if sizes is not None and (arguments.height or arguments.width):
        raise UserError(f"--height and --width have no effect: {sizes} says how large pictures are; leave them out")
    return [sample for sample in each for _ in range(arguments.count)]


def _guidance(arguments: argparse.Namespace, parts: Components) -> tuple[float, float]:
    """Scale and rescaling of classifier-free guidance: as asked for, else the run's or model's own.

    Raises:
        UserError: a negative prompt without guidance; a rescaling that is no share.
    """
    guidance = arguments.guidance
    if guidance is None:
        guidance = GUIDANCE if parts.guidance is None else max(1.0, float(parts.guidance))
    if arguments.negative and guidance <= 1:
        raise UserError("--negative has no effect at guidance 1, which is none: give a greater --guidance")
    rescale = arguments.guidance_rescale
    if rescale is None:
        rescale = parts.guidance_rescale
    if not 0 <= rescale <= 1:
        raise UserError(f"--guidance-rescale {rescale:g} is a share: 0 to 1")
    return guidance, rescale


def _told(arguments: argparse.Namespace, parts: Components, guidance: float, rescale: float) -> dict[str, str]:
    """What PNG files tell of how they were drawn, beside prompt, seed and size."""
    return {
        "negative prompt": arguments.negative,
        "steps": str(arguments.steps),
        "guidance": f"{guidance:g}",
        **({"guidance rescale": f"{rescale:g}"} if rescale else {}),
        "scheduler": arguments.scheduler or ("euler" if parts.is_flow else "ddim"),
        "source": parts.source if parts.step is None else f"{parts.source} step {parts.step} {arguments.weights}",
        **{name: " ".join(getattr(arguments, name)) for name in _CONDITIONS if getattr(arguments, name)},
    }


def _loras(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """The adapters, and how many times each counts.

    Raises:
        UserError: one that counts is not told which, or is no number.
    """
    files, scales = arguments.lora, arguments.lora_scale or [1.0]
    for scale in scales:
        if not abs(scale) <= _MOST_TIMES:
            raise UserError(
                f"--lora-scale {scale:g}: must be a number of {_MOST_TIMES} at most; 1 is the LoRA itself"
            )
    if arguments.lora_scale and not files:
        raise UserError(f"--lora-scale {scales[0]:g} has no effect without --lora: leave it out")
    if len(scales) not in (1, len(files)) and files:
        raise UserError(
            f"--lora-scale is given {len(scales)} times and --lora {len(files)} times: give it once, or as often"
        )
    return list(zip(files, scales * len(files) if len(scales) == 1 else scales, strict=True))


def _lora_text(lora: tuple[str, float]) -> str:
    file, scale = lora
    return file if scale == 1 else f"{file} x {scale:g}"


def _size(image: Image.Image) -> dict[str, str]:
    return {"size": f"{image.width}x{image.height}"}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune sample", description="Draw pictures of captions and other conditions.", epilog=_EXAMPLES
    )
    add_source_arguments(
        parser, "RUN_OR_MODEL", "a run's folder, a diffusers pipeline's folder, a hub id, or a file"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a caption on each line")
    parser.add_argument("--label", action="append", default=[], metavar="NAME", help="a class, by name or number")
    parser.add_argument("--layout", action="append", default=[], metavar="FILE.json", help="boxes with classes")
    parser.add_argument("--map", action="append", default=[], metavar="FILE.png", help="a label map, 8-bit gray")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="to be painted in, or enlarged"
    )
    parser.add_argument("--mask", action="append", default=[], metavar="FILE.png", help="white where to paint")
    parser.add_argument(
        "--noise-level",
        type=int,
        metavar="N",
        help="of the noise on what is enlarged (default: 20, or the highest that was trained)",
    )
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to lead away from")
    parser.add_argument("--out", required=True, metavar="FILE.png|DIR", help="where the pictures go")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture (default: 0)")
    parser.add_argument("--count", type=positive, default=1, metavar="N", help="pictures a prompt (default: 1)")
    parser.add_argument("--columns", type=positive, metavar="N", help="of the grid")
    parser.add_argument("--height", type=positive, metavar="PX", help="default: as trained")
    parser.add_argument("--width", type=positive, metavar="PX", help="default: as trained")
    parser.add_argument("--steps", type=positive, default=50, metavar="N", help="of the sampler (default: 50)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help=f"classifier-free guidance, 1 is none (default: the run's or model's own, else {GUIDANCE})",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="SHARE",
        help="0 to 1 (default: the run's or model's own, else 0, which is none)",
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="the sampler (default: ddim, or euler for flows)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="a LoRA to add, in diffusers' layout or kohya's; may be repeated",
    )
    parser.add_argument(
        "--lora-scale",
        action="append",
        default=[],
        type=float,
        metavar="TIMES",
        help="how much a LoRA counts, for all or once for each --lora (default: 1)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="pictures drawn at once (default: by size)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_weights_arguments(parser)
    return parser


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        path = Path(arguments.prompts).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise UserError(f"--prompts {path} cannot be read: {reason}") from error
        listed = [line.strip() for line in lines if line.strip()]
        if not listed:
            raise UserError(f"--prompts {path} holds no prompt; write one caption on each line")
        prompts += listed
    return prompts


def _cut(tokenizer: Any, prompts: Sequence[str]) -> str:
    """Says what of prompts the text encoder is not told; empty where that is nothing."""
    most = tokenizer.model_max_length
    tokens = (tokenizer(prompt, verbose=False).input_ids for prompt in dict.fromkeys(prompts))
    lost = [tokenizer.decode(ids[most - 1 : -1]) for ids in tokens if len(ids) > most]
    if not lost:
        return ""
    more = f" and the ends of {len(lost) - 3} more" if len(lost) > 3 else ""
    return f"the text encoder takes {most} tokens of a prompt, not: {'; '.join(lost[:3])}{more}"


def _out(text: str) -> Path:
    """The PNG file or the folder to write, with its parents made."""
    if not text.strip():
        raise UserError("--out is empty (a shell variable that is not set?): give a file or a folder")
    require_path("--out", text)
    out = Path(text).expanduser()
    folder = out.is_dir() or not out.suffix or text.endswith(("/", os.sep))
    if not folder and out.suffix.lower() != ".png":
        raise UserError(f"--out {text}: pictures are written as PNG; give a name that ends in .png, or a folder")
    try:
        (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {text} cannot be made: {error.strerror}") from error
    if not os.access(out if folder else out.parent, os.W_OK):  # said before an hour of drawing
        raise UserError(f"--out {text} cannot be written: its folder is read-only; give another place")
    return out


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown; take auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices for torch")
    return device


def _square(number: int) -> int:
    columns = 1
    while columns * columns < number:
        columns += 1
    return columns


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.ASCII).strip("-")[:40].strip("-")
    return f"-{words}" if words else ""
