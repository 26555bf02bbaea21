"""What makes a run the same run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from finetune.config import Config
from finetune.loop import Parts
from finetune.models.parts import flat


def depends_on(config: Config, parts: Parts) -> dict[str, Any]:
    """What a run must keep to be the same run when it goes on, by config key.

    Shards and a pretrained model are known by what is in them, not by where they lie.
    """
    data = parts.data
    adapter = (
        {
            "rank": config.adapter.rank,
            "alpha": config.adapter.alpha,
            "targets": sorted(config.adapter.targets),
            "ranks": flat(config.adapter.ranks),
            "rank_stabilized": config.adapter.rank_stabilized,
            "dora": config.adapter.dora,
        }
        if config.adapter.kind == "lora"
        else {}
    )
    # With what was left to defaults.
    made: Any = {} if config.model.pretrained is not None else parts.model.unet.config
    unet = {name: value for name, value in made.items() if not name.startswith("_")}
    text_encoder = {} if config.model.pretrained is not None else asdict(config.model.text_encoder)
    identity = {
        "seed": config.seed,
        "train.global_batch": config.train.global_batch,
        "validation.samples": config.validation.samples,
        "data.shuffle": config.data.shuffle,
        "data.shuffle_window": config.data.shuffle_window,
        "data.lanes": config.data.lanes,
        "data.sources (manifests' sha256)": [source.shards.manifest.sha256 for source in data.sources],
        "data.sources (weights)": data.order.weights.tolist(),
        "data.sources (loss weights)": list(data.wanted.loss_weights),
        "data.loss_masks": config.data.loss_masks,
        "adapter.kind": config.adapter.kind,
        "optim.kind": config.optim.kind,
        **{f"adapter.{name}": value for name, value in adapter.items()},
        "model.pretrained (its weights)": parts.pretrained,
        "model.tokenizer": config.model.tokenizer,
        **{f"model.unet.{name}": value for name, value in unet.items()},
        **{f"model.text_encoder.{name}": value for name, value in text_encoder.items()},
        "model.train_text_encoder": config.model.train_text_encoder,
        "task.name": config.task.name,
        **{f"task.options.{name}": value for name, value in parts.task.options.items()},
        **{f"model.scheduler.{name}": value for name, value in asdict(config.model.scheduler).items()},
        **{f"objective.{name}": value for name, value in asdict(config.objective).items()},
        "objective.gamma": parts.model.objective.used_gamma,
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return] # as a checkpoint has it
