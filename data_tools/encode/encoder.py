"""Pictures to moments, captions to states: the part of `encode` that runs on the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.encode.prepare import Prepared
from finetune import UserError
from finetune.data.shards import Bucket, TextInfo
from finetune.data.shards.files import npy_bytes

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    from finetune.models.autoencoder import Autoencoder

_CAPTIONS_AT_A_TIME = 64


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket; on a machine with a GPU the pixels and holes are in pinned memory."""

    bucket: Bucket
    samples: list[Prepared]
    pixels: torch.Tensor  # uint8 [B, H, W, 3]
    holes: torch.Tensor | None  # bool [B, K, H, W]


def stack(bucket: Bucket, samples: list[Prepared], pin: bool) -> Batch:
    """Prepared pictures as a batch."""
    import torch

    pixels_BHW3 = torch.empty((len(samples), *bucket, 3), dtype=torch.uint8, pin_memory=pin)
    np.stack([sample.pixels for sample in samples], out=pixels_BHW3.numpy())
    holes_BKHW = None
    if packed := [sample.holes for sample in samples if sample.holes is not None]:
        holes = np.unpackbits(np.stack(packed), axis=-1, count=bucket[1]).view(np.bool_)
        holes_BKHW = torch.from_numpy(holes)
        holes_BKHW = holes_BKHW.pin_memory() if pin else holes_BKHW
    return Batch(bucket, samples, pixels_BHW3, holes_BKHW)


@dataclass(frozen=True)
class Running:
    """A batch under way; its results are there when `ready` is."""

    batch: Batch
    moments: torch.Tensor  # float16 [B, 2C, h, w]
    masked: list[torch.Tensor]  # K times the same: of the pictures with their holes filled
    states: torch.Tensor | None  # float16 [captions, L, D]
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class Encoded:
    """One picture's results.

    `moments` are float16 [2C, h, w], None if they, or those with holes, are not finite; `masked` are those of the
    picture with its holes, float16 [K, 2C, h, w]; `states` are the captions' bytes; `redone`: in float32.
    """

    sample: Prepared
    moments: np.ndarray | None
    states: bytes | None
    masked: np.ndarray | None = None
    redone: bool = False


class TextCache:
    """A text encoder whose states, float16 [captions, L, D], are kept with the latents.

    They are those that training computes: the same functions, in float32.
    """

    def __init__(self, source: str, device: torch.device, root: Any) -> None:
        from finetune.models.sources import has_part
        from finetune.models.text import load_text, text_info

        if has_part(source, "text_encoder_2"):
            raise UserError(
                f"--text-encoder {source} is of Stable Diffusion XL, which has two: states are kept of one; "
                "leave it out, captions are then encoded in training"
            )
        self.tokenizer: CLIPTokenizer
        self.model: CLIPTextModel
        self.tokenizer, model = load_text(source)
        self.info: TextInfo = text_info(self.tokenizer, model, source, root)
        self.model = model.to(device).requires_grad_(False)

    def states(self, captions: Sequence[str]) -> torch.Tensor:
        """Float16 [captions, L, D] on the device."""
        import torch

        from finetune.models.text import encode_text, tokenize

        parts = []
        with torch.no_grad():
            for start in range(0, len(captions), _CAPTIONS_AT_A_TIME):
                ids_BL = tokenize(self.tokenizer, captions[start : start + _CAPTIONS_AT_A_TIME])
                ids_BL = ids_BL.to(self.model.device)
                parts.append(encode_text(self.model, ids_BL, self.tokenizer.pad_token_id).half())
        return torch.cat(parts)

    def empty(self) -> bytes:
        """The states of the empty caption, [L, D], as a .npy file.

        Raises:
            UserError: they are not finite in float16.
        """
        states_LD = self.states([""])[0].cpu().numpy()
        if not np.isfinite(states_LD).all():
            raise UserError(f"the states of {self.info.source} are not finite in float16; don't cache them")
        return npy_bytes(states_LD)


def make_fast(vae: Autoencoder) -> str | None:
    """Let the encoder run on kernels of our own where they run; gives what they lack on this GPU, if anything."""
    from finetune.models import fast

    if not fast.available(vae.device):
        return None
    if (missing := fast.missing()) is None:
        fast.make_encoder_fast(vae)
    return missing


def captions_of(sample: Prepared) -> list[str]:
    """The captions whose states are kept, one row each; the empty one for a sample without."""
    return sample.record.get("captions") or [""]


class Encoder:
    """Batches to results. What overflows (SDXL's VAE in float16, say) is redone alone in float32.

    `start` returns while a GPU still works; `finish` waits for it. So the next batch is on its way before the
    last one is looked at.
    """

    def __init__(self, vae: Autoencoder, source: str, text: TextCache | None) -> None:
        import torch

        self.vae, self.source, self.text = vae, source, text
        self.device = vae.device
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            self.vae.to(memory_format=torch.channels_last)
        self.exact: Autoencoder | None = None

    def start(self, batch: Batch) -> Running:
        """Begin with a batch."""
        import torch

        moments_B2Chw = self._to_host(self._moments(self.vae, batch.pixels))
        # A hole at a time: then a batch needs the same memory, however many holes there are.
        masked = [
            self._to_host(self._moments(self.vae, batch.pixels, hole_BHW))
            for hole_BHW in (batch.holes.unbind(1) if batch.holes is not None else ())
        ]
        states_NLD = None
        if self.text is not None:
            captions = [caption for sample in batch.samples for caption in captions_of(sample)]
            states_NLD = self._to_host(self.text.states(captions))
        ready = None
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        return Running(batch, moments_B2Chw, masked, states_NLD, ready)

    def finish(self, running: Running) -> list[Encoded]:
        """The results of a batch, one for each picture."""
        import torch

        if running.ready is not None:
            running.ready.synchronize()
        states_NLD = None if running.states is None else running.states.numpy()
        results = []
        first = 0
        for row, sample in enumerate(running.batch.samples):
            # One after another: the picture, then the picture with each of its holes.
            arrays = [moments[row].numpy() for moments in (running.moments, *running.masked)]
            broken = [number for number, array in enumerate(arrays) if not np.isfinite(array).all()]
            again = bool(broken) and self.vae.dtype != torch.float32
            if again:
                for number in broken:
                    arrays[number] = self._again(running.batch, row, number - 1)
                broken = [number for number in broken if not np.isfinite(arrays[number]).all()]
            states = None
            if states_NLD is not None:
                count = len(captions_of(sample))
                states = npy_bytes(states_NLD[first : first + count])
                first += count
            masked = np.stack(arrays[1:]) if running.masked else None
            results.append(Encoded(sample, None if broken else arrays[0], states, masked, again and not broken))
        return results

    def _again(self, batch: Batch, row: int, hole: int) -> np.ndarray:
        """A picture's moments in float32, with one of its holes, or whole for hole -1."""
        from finetune.models.autoencoder import load_autoencoder

        if self.exact is None:
            self.exact = load_autoencoder(self.source, device=self.device)
        some = slice(row, row + 1)
        hole_1HW = batch.holes[some, hole] if batch.holes is not None and hole >= 0 else None
        again: np.ndarray = self._moments(self.exact, batch.pixels[some], hole_1HW)[0].cpu().numpy()
        return again

    def _moments(
        self, vae: Autoencoder, pixels_BHW3: torch.Tensor, hole_BHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        import torch

        from finetune.models.autoencoder import encode_moments

        try:
            images_B3HW = pixels_BHW3.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            if hole_BHW is not None:  # mid-grey, which no 8-bit colour is
                images_B3HW.masked_fill_(hole_BHW.to(self.device, non_blocking=True)[:, None], 0.0)
            if not self.on_gpu:  # there, channels last is what the weights have
                images_B3HW = images_B3HW.contiguous()
            return encode_moments(vae, images_B3HW).half()  # an overflow becomes inf, which `finish` looks for
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory on {self.device} with --batch {len(pixels_BHW3)}; take a smaller one"
            ) from None

    def _to_host(self, array: torch.Tensor) -> torch.Tensor:
        import torch

        if not self.on_gpu:
            return array.cpu()
        host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
        return host.copy_(array, non_blocking=True)
