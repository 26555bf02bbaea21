"""Pictures of a class: cross-attention to one token, which is learned for each label.

Rombach et al. 2022 (arXiv 2112.10752), section 4.4 and appendix E.2.1: for the class-conditional model a single
learnable embedding layer of 512 features stands in the place of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune import UserError
from finetune.batch import Batch, Sample
from finetune.conditioning import Condition, Conditioner, Given
from finetune.conditioning.labels import attended_width, known_label, number_of_classes

LABELS = True


@dataclass
class Options:
    classes: int | None = None  # how many labels there are; null: as many as classes.json beside the shards names


class Label(Conditioner):
    """A label to context [B, 1, D]. The embedding's last row is the null class, for guidance.

    Args:
        classes: labels are 0 to classes - 1.
        width: D, features of the U-Net's cross-attention.
        seed: of the rows.
    """

    asks = ("label",)

    def __init__(self, classes: int, width: int, seed: int) -> None:
        super().__init__()
        self.classes = classes
        with torch.random.fork_rng(devices=[]):  # modules draw from torch's global generator: borrow it
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(classes + 1, width)

    def parts(self) -> dict[str, nn.Module]:
        return {"conditioner": self.embedding}

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`label`: int64, a scalar.

        Raises:
            UserError: the record has no class, or one that is no label.
        """
        if sample.record.get("class") is None:
            raise UserError(
                "a sample has no class: task=class_to_image needs shards whose records have one, as "
                "`data-tools ingest folder --classes` makes them"
            )
        return {
            "label": np.asarray(known_label(sample.record["class"], self.classes, "a sample's class"), np.int64)
        }

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """`label`: int64 [B], the null class where the condition is left out."""
        return {"label": batch.condition["label"].masked_fill(drop_B, self.classes)}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        return {"context": self.embedding(inputs["label"]).unsqueeze(1)}


def make(options: Options, given: Given) -> Conditioner:
    classes = number_of_classes("class_to_image", options.classes, given)
    return Label(classes, attended_width("class_to_image", given), given.seed)
