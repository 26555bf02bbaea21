"""What the emoji base draws, judged by small classifiers of real pictures; and what its autoencoder keeps.

MODEL is the base (a folder, or `emoji-base` for the one in the box), --train and --held-out are the image shards
that `data-tools ingest iconify --hold-out` made (its model card has the commands). Two judges are trained on real
pictures: of styles (the two sets, and Fluent Emoji from the box), on known names alone; of names, on the two sets'
pictures of all names. Each one's own accuracy is on pictures that it was not trained on. Then the model draws known
and held-out names, and the judges say how many have the style and the name that was asked for.

examples:
  python -m benchmarks.base_model emoji-base --train work/pictures --held-out work/held-out --out measures.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import context
from finetune import run_cli
from finetune.autoencoder.measure import psnr, reconstruct, ssim
from finetune.autoencoder.pictures import decode
from finetune.data.shards import ShardSet
from finetune.evaluation.judge import Judge, top, train_judge
from finetune.terminal import quiet_libraries

FLUENT = "fluent emoji"
_UNSEEN = "-draw4"  # the end of keys of the draws that the judge of names is not trained on
_SEED = 0


@dataclass
class Pictures:
    """Real pictures, uint8 [N, H, W, 3], with key, name, style, and whether the ground is coloured."""

    pixels: np.ndarray
    keys: list[str]
    names: list[str]
    styles: list[str]
    grounds: np.ndarray

    @classmethod
    def read(cls, root: Path, style: str | None = None) -> Pictures:
        """From image shards; captions are "NAME, STYLE style[, on GROUND]", or names, of pictures in `style`."""
        shards = ShardSet.open(str(root), "images")
        (member,) = [name for name in shards.manifest.members if name in ("webp", "png", "jpg")]
        pixels, keys, names, styles, grounds = [], [], [], [], []
        for index in range(len(shards)):
            name, *rest = shards.read_json(index)["captions"][0].split(", ")
            pixels.append(decode(shards.read_member(index, member), None))
            keys.append(shards.key(index))
            names.append(name)
            styles.append(rest[0].removesuffix(" style") if style is None else style)
            grounds.append(len(rest) > 1)
        shards.close()
        return cls(np.stack(pixels), keys, names, styles, np.array(grounds))

    def some(self, which: Sequence[bool] | np.ndarray) -> Pictures:
        """Those for which `which` is true."""
        index = np.flatnonzero(which)
        keys, names, styles = ([values[i] for i in index] for values in (self.keys, self.names, self.styles))
        return Pictures(self.pixels[index], keys, names, styles, self.grounds[index])

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(
            np.concatenate([self.pixels, other.pixels]),
            self.keys + other.keys,
            self.names + other.names,
            self.styles + other.styles,
            np.concatenate([self.grounds, other.grounds]),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON."""
    args = _parser().parse_args(argv)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known, held_out = Pictures.read(args.train), Pictures.read(args.held_out)
    hidden = set(held_out.names)
    fluent = Pictures.read(args.fluent, FLUENT)

    style_judge, measures_of_styles = judge_of_styles(known, held_out, fluent, args.style_epochs, device)
    if args.style_judge is not None:
        args.style_judge.parent.mkdir(parents=True, exist_ok=True)
        style_judge.save(args.style_judge)
    name_judge, measures_of_names = judge_of_names(known, held_out, fluent, args.name_epochs, device)
    judges = {"styles": measures_of_styles, "names": measures_of_names}
    if args.name_judge is not None:
        all_sets, judges["names_in_all_styles"] = judge_of_names(
            known, held_out, fluent, args.name_epochs, device, all_styles=True, width=16, places=2
        )
        args.name_judge.parent.mkdir(parents=True, exist_ok=True)
        all_sets.save(args.name_judge)
    print(json.dumps(judges), flush=True)

    from finetune.components import load_components

    parts = load_components(args.model, device=device)
    rebuilt = np.concatenate([reconstruct(parts.vae, part, device) for part in np.array_split(held_out.pixels, 8)])
    autoencoder = {
        "pictures": len(rebuilt),
        "psnr": round(float(psnr(held_out.pixels, rebuilt).mean()), 2),
        "ssim": round(float(ssim(held_out.pixels, rebuilt).mean()), 4),
    }
    # What the judges say of pictures that went through the autoencoder: no sample can do better.
    limit = _judged(rebuilt, held_out.names, held_out.styles, style_judge, name_judge)
    print(json.dumps({"autoencoder": autoencoder, "reconstructions": limit}), flush=True)

    styles = sorted(set(known.styles))
    groups = {"known": set(known.names) - hidden, "held_out": hidden}
    samples: dict[str, Any] = {}
    for guidance in args.guidance:
        for group, names in groups.items():
            asked = [(name, style) for name in chosen(names, args.names) for style in styles]
            drawn = draw(parts, [f"{name}, {style} style" for name, style in asked], args.steps, guidance)
            wanted, in_style = [name for name, _ in asked], [style for _, style in asked]
            found = _judged(drawn, wanted, in_style, style_judge, name_judge)
            samples.setdefault(f"guidance {guidance:g}", {})[group] = found
            print(json.dumps({"guidance": guidance, "names": group, **found}), flush=True)
    result = {
        "model": str(args.model),
        "steps": args.steps,
        "names": args.names,
        "judges": judges,
        "autoencoder": autoencoder,
        "reconstructions": limit,
        "samples": samples,
        **context(),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def judge_of_styles(
    known: Pictures, held_out: Pictures, fluent: Pictures, epochs: int, device: torch.device
) -> tuple[Judge, dict[str, Any]]:
    """A judge of the three styles, and its accuracy on names that it has not seen in any of them.

    It is trained on white grounds alone: Fluent Emoji has no others.
    """
    hidden = set(held_out.names)
    seen = known.some(~known.grounds) + fluent.some([name not in hidden for name in fluent.names])
    unseen = held_out + fluent.some([name in hidden for name in fluent.names])
    judge = _trained(Judge(sorted(set(seen.styles)), width=16), seen.pixels, seen.styles, epochs, device, "styles")
    logits, labels = judge.logits(unseen.pixels), [judge.classes.index(style) for style in unseen.styles]
    each = {}
    for number, style in enumerate(judge.classes):
        own = [label == number for label in labels]
        if any(own):
            each[style] = round(top(logits[own], [number] * sum(own)), 4)
    measures = {"trained_on": len(seen.names), "pictures": len(labels), "accuracy": round(top(logits, labels), 4)}
    return judge, {**measures, "each": each}


def judge_of_names(
    known: Pictures,
    held_out: Pictures,
    fluent: Pictures,
    epochs: int,
    device: torch.device,
    *,
    all_styles: bool = False,
    width: int = 32,
    places: int = 4,
) -> tuple[Judge, dict[str, Any]]:
    """A judge of all names, and its accuracy on unseen draws of the two sets and on Fluent Emoji's pictures.

    Of those it has seen none, or with `all_styles` all but the unseen draws.
    """
    names = {*known.names, *held_out.names}
    fluent = fluent.some([name in names for name in fluent.names])
    seen, draws = _seen_and_unseen(known)
    seen += held_out
    if all_styles:
        more, fluent = _seen_and_unseen(fluent)
        seen += more
    judge = _trained(
        Judge(sorted(names), width=width, places=places), seen.pixels, seen.names, epochs, device, "names"
    )
    where = {name: number for number, name in enumerate(judge.classes)}
    measures: dict[str, Any] = {"classes": len(where), "trained_on": len(seen.names)}
    for title, pictures in (("unseen_draws", draws), (FLUENT, fluent)):
        if not pictures.names:
            continue
        logits, labels = judge.logits(pictures.pixels), [where[name] for name in pictures.names]
        measures[title] = {
            "pictures": len(labels),
            "top1": round(top(logits, labels), 4),
            "top5": round(top(logits, labels, 5), 4),
        }
    return judge, measures


def _seen_and_unseen(pictures: Pictures) -> tuple[Pictures, Pictures]:
    unseen = np.array([key.endswith(_UNSEEN) for key in pictures.keys])
    return pictures.some(~unseen), pictures.some(unseen)


def _trained(
    judge: Judge, pixels: np.ndarray, classes: list[str], epochs: int, device: torch.device, what: str
) -> Judge:
    where = {name: number for number, name in enumerate(judge.classes)}
    steps = epochs * -(-len(classes) // 64)
    with tqdm(total=steps, desc=f"judge of {what}", unit="step", leave=False) as bar:
        labels = [where[name] for name in classes]
        return train_judge(judge.to(device), pixels, labels, epochs=epochs, seed=_SEED, progress=bar.update)


def chosen(names: set[str], count: int) -> list[str]:
    """At most `count` of the names, by a hash of each."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]


def draw(parts: Any, prompts: list[str], steps: int, guidance: float) -> np.ndarray:
    """Pictures of the prompts, uint8 [N, H, W, 3]; picture i from seed i."""
    from finetune import asking, sampling
    from finetune.models.autoencoder import to_uint8

    wanted = asking.samples(parts, asking.Asked(prompt=prompts), parts.default_size)
    batch = 256 if next(parts.unet.parameters()).is_cuda else 16
    total = len(sampling.batches([sample.bucket for sample in wanted], batch)) * steps
    with tqdm(total=total, desc=f"drawing {len(prompts)}", unit="step", leave=False) as bar:
        drawn = sampling.generate(
            parts.unet,
            parts.vae,
            parts.conditioner,
            sampling.make_scheduler(None, parts.scheduler),
            parts.latents,
            wanted,
            range(len(wanted)),
            steps=steps,
            guidance=guidance,
            guidance_rescale=parts.guidance_rescale,
            batch_size=batch,
            progress=bar.update,
        )
    return np.concatenate([to_uint8(picture[None]) for picture in drawn])


def _judged(
    pixels: np.ndarray, names: list[str], styles: list[str], style_judge: Judge, name_judge: Judge
) -> dict[str, Any]:
    by_style = style_judge.logits(pixels)
    by_name = name_judge.logits(pixels)
    labels = [name_judge.classes.index(name) for name in names]
    return {
        "pictures": len(pixels),
        "style": round(top(by_style, [style_judge.classes.index(style) for style in styles]), 4),
        "name_top1": round(top(by_name, labels), 4),
        "name_top5": round(top(by_name, labels, 5), 4),
    }


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.base_model",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the base: a folder in diffusers' layout, or emoji-base")
    parser.add_argument("--train", type=Path, required=True, metavar="SHARDS", help="image shards of known names")
    parser.add_argument("--held-out", type=Path, required=True, metavar="SHARDS", help="those of held-out names")
    parser.add_argument(
        "--fluent", type=Path, default="fluent-emoji", metavar="SHARDS", help="Fluent Emoji (default: in the box)"
    )
    parser.add_argument("--names", type=int, default=84, help="known and held-out names each, in each style")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default: 25)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="guidance scales (default: 3)")
    parser.add_argument("--style-epochs", type=int, default=6)
    parser.add_argument("--name-epochs", type=int, default=20)
    parser.add_argument("--style-judge", type=Path, metavar="FILE", help="keep the judge of styles here")
    parser.add_argument(
        "--name-judge",
        type=Path,
        metavar="FILE",
        help="train a small judge of names in all three styles, and keep it here",
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the measures here")
    return parser


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
