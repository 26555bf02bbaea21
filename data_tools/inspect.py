"""Show what is in a set of shards: kind, shards, buckets, encoder, latent statistics, captions, classes, boxes.

Records are read of at most 20,000 samples, evenly spaced over the set; the table says so. --plot draws the
samples in each bucket and the words in each caption.

examples:
  data-tools inspect latents/photos
  data-tools inspect latents/photos --json
  data-tools inspect latents/photos --plot photos.png
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.output import whole_file
from data_tools.texts import printable
from finetune import UserError
from finetune.data.shards import HOLE, LOWRES, MAP, MASK, ShardError, ShardSet, parse_boxes, set_folder

_READ_AT_MOST = 20_000  # records; of a larger set, evenly spaced ones
_NAMES_AT_MOST = 12  # classes in a row of the table
_ROWS_AT_MOST = 40  # buckets in the table and the plot; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools inspect`."""
    parser.add_argument("shards", type=set_folder, metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument("--captions", type=int, default=5, metavar="N", help="captions to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw histograms of buckets and caption lengths")


def run(args: argparse.Namespace) -> int:
    """Run `data-tools inspect`."""
    if args.plot is not None:
        if args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {args.plot} should end in .png, .pdf or .svg")
        _require_matplotlib()
    lengths: list[int] = []
    facts = describe(args.shards, max(args.captions, 0), lengths)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        rows = list(_rows(facts))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
    if args.plot is not None:
        draw(args.plot, facts, lengths)
    return 0


def describe(root: str | Path, captions: int = 5, lengths: list[int] | None = None) -> dict[str, Any]:
    """What `inspect` prints, as plain values; appends to `lengths` the words of each caption that was read.

    Raises:
        ShardError: no finished set at `root`.
    """
    shards = ShardSet.open(root)
    manifest = shards.manifest
    buckets: dict[str, dict[str, int]] = {}
    for shard in manifest.shards:
        name = "mixed" if shard.bucket is None else f"{shard.bucket[0]}x{shard.bucket[1]}"
        row = buckets.setdefault(name, {"samples": 0, "shards": 0})
        row["samples"] += shard.samples
        row["shards"] += 1
    facts: dict[str, Any] = {
        "path": str(root),
        "kind": manifest.kind,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "members": manifest.members,
        "buckets": dict(sorted(buckets.items(), key=lambda item: -item[1]["samples"])),
        "encoder": None if manifest.encoder is None else vars(manifest.encoder),
        "latents": None if manifest.latents is None else vars(manifest.latents),
    }
    names = shards.classes()
    if names:
        facts["classes"] = names
    captions_found, labels = _sample_facts(shards, captions, [] if lengths is None else lengths, names)
    facts["captions"] = captions_found
    if labels:
        facts["labels"] = labels
    return facts


def _sample_facts(
    shards: ShardSet, show: int, lengths: list[int], names: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of captions, and of labels: samples that have each kind, and each class and boxes of it."""
    count = min(len(shards), _READ_AT_MOST)
    missing = 0
    first: list[str] = []
    has: Counter[str] = Counter()
    of_class: Counter[int] = Counter()
    of_box: Counter[int] = Counter()
    optional = [name for name in (MAP, MASK, LOWRES, HOLE) if name in shards.manifest.members]
    for sample_id in np.linspace(0, len(shards) - 1, count).round().astype(int).tolist():
        record = record_of(shards, sample_id)
        texts = captions_of(shards, sample_id, record)
        has.update(name for name in optional if shards.has_member(sample_id, name))
        if type(record.get("class")) is int:
            has["class"] += 1
            of_class[record["class"]] += 1
        if (boxes := parse_boxes(record.get("boxes"))) is not None:
            has["boxes"] += 1
            of_box.update(box[0] for box in boxes)
        missing += not texts
        lengths += [len(text.split()) for text in texts]
        if texts and len(first) < show:
            first.append(texts[0])
    facts: dict[str, Any] = {"samples_read": count, "missing": missing, "per_sample": None, "words": None}
    if lengths:
        facts["per_sample"] = len(lengths) / max(count - missing, 1)
        marks = np.percentile(lengths, [0, 50, 95, 100]).tolist()
        facts["words"] = dict(zip(("min", "median", "p95", "max"), marks, strict=True))
    facts["first"] = first
    labels: dict[str, Any] = {"samples_read": count, "samples": dict(sorted(has.items()))} if has else {}
    for name, counts in (("class", of_class), ("boxes", of_box)):
        if counts:
            labels[name] = {_name(names, number): counts[number] for number in sorted(counts)}
    return facts, labels


def _name(names: list[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


def record_of(shards: ShardSet, sample_id: int) -> dict[str, Any]:
    """A sample's record; an empty one when it has none."""
    return shards.read_json(sample_id) if shards.has_member(sample_id, "json") else {}


def captions_of(shards: ShardSet, sample_id: int, record: dict[str, Any]) -> list[str]:
    """A sample's captions, from its record or its `txt` member; none when it has neither."""
    if shards.has_member(sample_id, "json"):
        captions = record.get("captions", [])
        if not isinstance(captions, list):
            raise ShardError(f"{shards.root}: sample {sample_id}: captions is no list; run `data-tools verify`")
        return [str(caption) for caption in captions]
    if shards.has_member(sample_id, "txt"):
        return [shards.read_member(sample_id, "txt").decode("utf-8", "replace").strip()]
    return []


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("set", facts["path"]),
        ("kind", facts["kind"]),
        ("samples", f"{facts['samples']:,}"),
        ("shards", f"{facts['shards']:,} ({facts['bytes']:,} bytes)"),
        ("members", ", ".join(facts["members"])),
    ]
    buckets = list(facts["buckets"].items())
    for name, bucket in buckets[:_ROWS_AT_MOST]:
        rows.append(("bucket " + name, f"{bucket['samples']:,} samples in {bucket['shards']:,} shards"))
    if rest := buckets[_ROWS_AT_MOST:]:
        samples = sum(bucket["samples"] for _, bucket in rest)
        rows.append((f"{len(rest)} more buckets", f"{samples:,} samples; --json lists them"))
    if encoder := facts["encoder"]:
        rows.append(("encoder", f"{encoder['source']} (sha256 {encoder['sha256'][:12]}..., {encoder['dtype']})"))
        space = f"{encoder['channels']} channels, 1/{encoder['downsample']} size"
        rows.append(("latent space", f"{space}, scale {encoder['scale']:g}, shift {encoder['shift']:g}"))
    if latents := facts["latents"]:
        rows.append(("model latents", f"mean {latents['mean']:+.4f}, std {latents['std']:.4f}"))
        pairs = zip(latents["channel_mean"], latents["channel_std"], strict=True)
        rows.append(("  by channel", "  ".join(f"{mean:+.3f} ± {std:.3f}" for mean, std in pairs)))
    captions = facts["captions"]
    read = captions["samples_read"]
    of = "" if read == facts["samples"] else f" (of {read:,} evenly spaced samples of {facts['samples']:,})"
    rows.append(("no caption", f"{captions['missing']:,} samples{of}"))
    if words := captions["words"]:
        spread = ", ".join(f"{name} {value:g}" for name, value in words.items())
        rows.append(("words a caption", f"{spread}; {captions['per_sample']:.3g} captions a sample{of}"))
    rows += [("caption", printable(text)) for text in captions["first"]]
    rows += _label_rows(facts)
    return rows


def _label_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if names := facts.get("classes"):
        more = f", ... ({len(names)} in all)" if len(names) > _NAMES_AT_MOST else ""
        yield "classes", printable(", ".join(names[:_NAMES_AT_MOST]), 1000) + more
    if (labels := facts.get("labels")) is None:
        return
    read = labels["samples_read"]
    of = "" if read == facts["samples"] else f" of {read:,} evenly spaced ones"
    for name, samples in labels["samples"].items():
        counts = labels.get(name, {})
        common = sorted(counts, key=lambda label: -counts[label])
        what = ", ".join(f"{counts[label]:,} {printable(label)}" for label in common[:_NAMES_AT_MOST])
        rest = f", {len(common) - _NAMES_AT_MOST} more" if len(common) > _NAMES_AT_MOST else ""
        yield f"with {name}", f"{samples:,} samples{of}" + (f": {what}{rest}" if what else "")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib; run `pip install matplotlib`") from None


def draw(out: Path, facts: dict[str, Any], lengths: list[int]) -> None:
    """Draw samples by bucket and words by caption; the same facts give the same bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, counts = bars(facts["buckets"])
    figure = Figure(figsize=(11, max(4.0, 1.5 + 0.22 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{Path(facts['path']).name}: {facts['samples']:,} {facts['kind']}"
    figure.suptitle(title, parse_math=False)  # a folder's name may have dollars
    left, right = figure.subplots(1, 2)
    left.barh(names, counts, color="tab:blue")
    left.invert_yaxis()
    left.set(xlabel="samples", title="buckets, height x width")
    if counts and max(counts) > 200 * min(counts):
        left.set(xscale="log", xlabel="samples (log scale)")
    captions = facts["captions"]
    title = f"captions of {captions['samples_read']:,} of {facts['samples']:,} samples"
    right.set(xlabel="words in a caption", ylabel="captions", title=title)
    if lengths:
        edges, heights, cut = caption_bins(lengths)
        right.stairs(heights, edges, fill=True, color="tab:blue")
        if cut:
            right.set(xlabel=f"words in a caption (the last bar: and more, up to {max(lengths):,})")
    else:
        right.text(0.5, 0.5, "no captions", ha="center", va="center", transform=right.transAxes)
    suffix = out.suffix.lower()[1:]
    dated = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}[suffix]  # left out: the same bytes each time
    with whole_file(out) as temporary:
        figure.savefig(temporary, format=suffix, dpi=120, metadata={dated: None})


def bars(buckets: dict[str, dict[str, int]]) -> tuple[list[str], list[int]]:
    """Names and samples of the largest buckets; the others, if there are more than fit, in one bar."""
    rows = [(name, bucket["samples"]) for name, bucket in buckets.items()]
    if len(rows) > _ROWS_AT_MOST:
        rest = rows[_ROWS_AT_MOST - 1 :]
        rows = [*rows[: _ROWS_AT_MOST - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    return [name for name, _ in rows], [count for _, count in rows]


def caption_bins(lengths: list[int], most: int = 60) -> tuple[list[int], list[int], bool]:
    """(edges, counts, does the last bar hold longer ones too?) of a histogram of whole numbers.

    All bars are as many words wide, at most `most` of them up to the 99.5th percentile: one huge caption
    doesn't press the others into a corner.
    """
    longest = max(lengths)
    end = int(np.ceil(np.percentile(lengths, 99.5)))
    width = -(-(end + 1) // most)
    edges = list(range(0, end + width + 1, width))
    counts, _ = np.histogram(np.minimum(lengths, edges[-1] - 1), edges)
    return edges, counts.tolist(), longest >= edges[-1]
