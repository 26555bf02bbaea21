"""What a checkpoint holds: a place for each tensor, and the tensors, in one order.

Weights come first, then each average of them, the moments of each weight, and what an optimizer keeps of a
parameter in a shape of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from finetune.checkpoint.layout import Layout
from finetune.checkpoint.plan import Member
from finetune.distributed import Strategy
from finetune.ema import Average


def moment_file(kind: str) -> str:
    """The file of an optimizer's moments of one kind."""
    return f"optimizer/{kind}.safetensors"


def members(
    strategy: Strategy, averages: Sequence[Average], layout: Layout
) -> tuple[list[Member], list[int | None]]:
    """The place of each tensor, and the rank that alone has it, where it is not on all of them."""
    shards, settings = strategy.shards, strategy.settings
    weights = [(f"weights/{file}", key) for file, key in map(layout.locate, (shard.name for shard in shards))]
    places = [weights]
    for average in averages:
        places.append([(f"{average.name}/{file.removeprefix('weights/')}", key) for file, key in weights])
    places += [[(moment_file(kind), shard.name) for shard in shards] for kind in settings.of_a_weight]
    found = [
        Member(kind, index, file, key, tuple(shard.file_shape))
        for kind, of_kind in enumerate(places)
        for index, (shard, (file, key)) in enumerate(zip(shards, of_kind, strict=True))
    ]
    holders = strategy.holders() * len(places)
    own_state = strategy.own_state()
    for kind, name in enumerate(settings.of_a_parameter, len(places)):
        of_kind = [(index, own[name]) for index, own in enumerate(own_state) if name in own]
        found += [Member(kind, i, moment_file(name), shards[i].name, tuple(t.shape), t.dtype) for i, t in of_kind]
        holders += [None] * len(of_kind)
    return found, holders


def tensors_of(strategy: Strategy, averages: Sequence[Average]) -> list[Sequence[Tensor | None]]:
    """The tensors as they are now, by `kind` and `index` of `members`."""
    settings, own_state = strategy.settings, strategy.own_state()
    return [
        strategy.weights(),
        *(average.tensors for average in averages),
        *(strategy.moments(kind) for kind in settings.of_a_weight),
        *([own.get(name) for own in own_state] for name in settings.of_a_parameter),
    ]


def metadata_of(tensors: Sequence[Member], layout: Layout) -> dict[str, dict[str, str]]:
    """What the header of each file says beside its tensors."""
    metadata: dict[str, dict[str, str]] = {}
    for file in {tensor.file for tensor in tensors}:
        shapes = {tensor.key: tensor.shape for tensor in tensors if tensor.file == file}
        metadata[file] = {"format": "pt"} if file.startswith("optimizer/") else layout.metadata(file, shapes)
    return metadata
