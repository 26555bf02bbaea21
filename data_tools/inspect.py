"""Show what is in a set of shards: kind, shards, buckets, encoder, latent statistics, captions.

examples:
  data-tools inspect latents/photos
  data-tools inspect latents/photos --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.shards import ShardError, ShardSet

_READ_AT_MOST = 20_000  # records; of a larger set, evenly spaced ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools inspect`."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument("--captions", type=int, default=5, metavar="N", help="captions to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Run `data-tools inspect`."""
    facts = describe(args.shards, max(args.captions, 0))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        rows = list(_rows(facts))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
    return 0


def describe(root: str | Path, captions: int = 5) -> dict[str, Any]:
    """What `inspect` prints, as plain values.

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
    facts["captions"] = _caption_facts(shards, captions)
    return facts


def _caption_facts(shards: ShardSet, show: int) -> dict[str, Any]:
    count = min(len(shards), _READ_AT_MOST)
    lengths: list[int] = []
    missing = 0
    first: list[str] = []
    for sample_id in np.linspace(0, len(shards) - 1, count).round().astype(int).tolist():
        texts = captions_of(shards, sample_id)
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
    return facts


def captions_of(shards: ShardSet, sample_id: int) -> list[str]:
    """A sample's captions, from its record or its `txt` member; none when it has neither."""
    if shards.has_member(sample_id, "json"):
        captions = shards.read_json(sample_id).get("captions", [])
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
    for name, bucket in facts["buckets"].items():
        rows.append(("bucket " + name, f"{bucket['samples']:,} samples in {bucket['shards']:,} shards"))
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
    of = "" if read == facts["samples"] else f" of {read:,} evenly spaced samples"
    rows.append(("no caption", f"{captions['missing']:,} samples{of}"))
    if words := captions["words"]:
        spread = ", ".join(f"{name} {value:g}" for name, value in words.items())
        rows.append(("words a caption", f"{spread}; {captions['per_sample']:.3g} captions a sample"))
    rows += [("caption", text) for text in captions["first"]]
    return rows
