"""Single-file checkpoints: what one holds, told by the names and shapes of its tensors, and its parts as modules.

Stable Diffusion 1.x, 2.x and XL, their inpainting models and the x4 upscaler were published so (`ldm_keys` has the
names). Widths, depths and channels are in the shapes. What is not, is in the metadata of files that we wrote, or
follows from the kind of model: heads, the latents' scale, the noise schedule. That a model predicts v is in no
tensor: the file's metadata may say so, or a `.yaml` of the same name beside it, as the published files have.

Weights of an average (`model_ema.`) are left alone: fine-tuning goes on from the weights that were trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import UserError, first_line
from finetune.models import ldm_keys
from finetune.models.weight_files import Renamed, read_weights, shape_of

CONFIG = "ldm_finetune.config"  # in the metadata of files that we wrote: the parts' configurations, as JSON
SCALES = {"sd1": 0.18215, "sd2": 0.18215, "xl": 0.13025, "upscaler": 0.08333}
_SIZES = {"sd1": 64, "sd2": 64, "xl": 128, "upscaler": 128}  # latent cells along a side
_HEAD = 64  # channels of an attention head wherever their number depends on the width
_TEXT_KINDS = {
    "text_encoder": {"sd1": "clip", "sd2": "openclip", "upscaler": "openclip", "xl": "xl_clip"},
    "text_encoder_2": {"xl": "xl_openclip"},
}
# Of OpenCLIP's layers Stable Diffusion 2.x leaves out the last; some files hold it, some don't.
_VIT_H_LAYERS = 24

Module = TypeVar("Module", bound=nn.Module)


class SingleFile:
    """The tensors of a file, and what they make of it; `open_file` opens one."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path, self.tensors, self.metadata = path, tensors, metadata
        # Names that some tools write become those that were published.
        names = {key: key for key in tensors}
        clip = ldm_keys.TEXT["clip"]
        if f"{clip}embeddings.token_embedding.weight" in names:
            names = {k.replace(clip, f"{clip}text_model.") if k.startswith(clip) else k: k for k in names}
        if "encoder.conv_in.weight" in names and "decoder.conv_in.weight" in names:  # an autoencoder by itself
            names = {ldm_keys.VAE + key: key for key in names if not key.startswith(("loss.", "model_ema."))}
        if any(key != own for key, own in names.items()):
            self.tensors = Renamed(tensors, names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor.

        Raises:
            UserError: there is none of this name.
        """
        try:
            return shape_of(self.tensors, key)
        except KeyError:
            raise UserError(f"{self.path} holds no {key}: {self._instead()}") from None

    def count(self, pattern: str) -> int:
        """How many numbers there are from 0 on that `pattern` makes a tensor's name of, at its `{}`."""
        number = 0
        while pattern.format(number) in self.tensors:
            number += 1
        return number

    @cached_property
    def kind(self) -> str:
        """`sd1`, `sd2`, `xl` or `upscaler`; of an autoencoder by itself: `sd1`."""
        if f"{ldm_keys.UNET}label_emb.weight" in self.tensors:
            return "upscaler"
        for kind, prefix in (("xl", "xl_openclip"), ("sd2", "openclip")):
            if any(key.startswith(ldm_keys.TEXT[prefix]) for key in self.tensors):
                return kind
        return "sd1"

    def has(self, part: str) -> bool:
        """Whether `unet`, `vae`, `text_encoder` or `text_encoder_2` is in the file."""
        if part == "unet":
            return f"{ldm_keys.UNET}input_blocks.0.0.weight" in self.tensors
        if part == "vae":
            return f"{ldm_keys.VAE}decoder.conv_in.weight" in self.tensors
        kind = _TEXT_KINDS.get(part, {}).get(self.kind)
        return kind is not None and any(key.startswith(ldm_keys.TEXT[kind]) for key in self.tensors)

    @cached_property
    def written(self) -> dict[str, dict[str, Any]]:
        """The configurations that a file of ours carries, by part."""
        try:
            found = json.loads(self.metadata.get(CONFIG, "{}"))
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: its {CONFIG} is no JSON") from error
        found = found if isinstance(found, dict) else {}
        return {part: config for part, config in found.items() if isinstance(config, dict)}

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """`model.params` of the `.yaml` of the same name beside the file, in the terms of latent diffusion's code.

        Raises:
            UserError: it can't be read.
        """
        path = self.path.with_suffix(".yaml")
        if not path.is_file():
            return {}
        try:
            read = yaml.safe_load(path.read_text())
            params = read["model"]["params"]
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no configuration of latent diffusion: {first_line(error)}") from error
        return params if isinstance(params, dict) else {}

    @cached_property
    def prediction(self) -> str | None:
        """What the U-Net predicts, in diffusers' terms; None where the file does not say, as most don't."""
        told = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
        if "parameterization" in self.sidecar:
            return told.get(str(self.sidecar["parameterization"]))
        if "v_pred" in self.tensors or self.kind == "upscaler":  # the first: a mark that ComfyUI looks for
            return "v_prediction"
        named = (self.metadata.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key"))
        said = next((told[name] for name in named if name in told), None)  # the second name is ComfyUI's
        if said is None and self.sidecar and self.kind != "xl":
            return "epsilon"  # what that code takes it for: the published configurations don't say it
        return said

    @property
    def says_scale(self) -> bool:
        """Whether the latents' scale is known: a file of an autoencoder by itself mostly does not say it."""
        return self.has("unet") or "vae" in self.written or "scale_factor" in self.sidecar

    def scheduler(self) -> dict[str, Any]:
        """The noise schedule, in diffusers' terms: the sidecar's, else what the kind of model was trained with.

        Without `prediction_type` where the file does not say it.
        """
        if "scheduler" in self.written:
            return dict(self.written["scheduler"])
        start, end = (0.0001, 0.02) if self.kind == "upscaler" else (0.00085, 0.012)
        made: dict[str, Any] = {
            "num_train_timesteps": int(self.sidecar.get("timesteps", 1000)),
            "beta_start": float(self.sidecar.get("linear_start", start)),
            "beta_end": float(self.sidecar.get("linear_end", end)),
            "beta_schedule": "scaled_linear",
        }
        if self.prediction is not None:
            made["prediction_type"] = self.prediction
        if "ztsnr" in self.tensors:
            made |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return made

    def unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The U-Net on the CPU, in eval mode.

        Raises:
            UserError: there is none, or of a kind that is not known.
        """
        if mark := next((key for key in self.tensors if key.startswith(("edm_vpred.", "edm_mean"))), None):
            raise UserError(
                f"{self.path} holds a U-Net of EDM's noise levels, which are not known here: it has {mark}"
            )
        config = self.written.get("unet") or unet_config(self)
        module = _on_meta(lambda: UNet2DConditionModel.from_config(config), self.path, "U-Net")
        self._require_all(
            ldm_keys.UNET, {ldm_keys.unet_key(name, module.config) for name in module.state_dict()}, "U-Net"
        )
        return self._fill(module, lambda name: ldm_keys.unet_from_ldm(self.tensors, [name], module.config), dtype)

    def autoencoder(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """The first stage, likewise."""
        config = self.written.get("vae") or vae_config(self)
        module = _on_meta(lambda: AutoencoderKL.from_config(config), self.path, "autoencoder")
        return self._fill(module, lambda name: ldm_keys.vae_from_ldm(self.tensors, [name], module.config), dtype)

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
        """The text encoder, the first of XL's, likewise."""
        return self._text(CLIPTextModel, "text_encoder", dtype)

    def text_encoder_2(self, dtype: torch.dtype = torch.float32) -> CLIPTextModelWithProjection:
        """XL's second text encoder, likewise."""
        return self._text(CLIPTextModelWithProjection, "text_encoder_2", dtype)

    def text_kind(self, part: str) -> str:
        """Of a text encoder: a key of `ldm_keys.TEXT`.

        Raises:
            UserError: the file holds no such part.
        """
        if not self.has(part):
            raise UserError(f"{self.path} holds no {part.replace('_', ' ')}: {self._instead()}")
        return _TEXT_KINDS[part][self.kind]

    def _text(self, made: type[Module], part: str, dtype: torch.dtype) -> Module:
        kind = self.text_kind(part)
        config = self.written.get(part) or text_config(self, kind)
        module = _on_meta(lambda: made(CLIPTextConfig(**config)), self.path, part.replace("_", " "))
        filled = self._fill(module, lambda name: ldm_keys.text_from_ldm(self.tensors, [name], kind), dtype)
        for name, buffer in list(filled.named_buffers()):
            # Numbers of the places, which no file needs to hold.
            assert name.endswith("position_ids"), name
            owner = filled.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1]).expand((1, -1)), persistent=False)
        return filled

    def _fill(self, module: Module, convert: Callable[[str], dict[str, Tensor]], dtype: torch.dtype) -> Module:
        names = [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
        try:
            # Copied: a file that is replaced while it is mapped would end the process.
            state = {name: convert(name)[name].to(dtype, copy=True).contiguous() for name in names}
            module.load_state_dict(state, assign=True, strict=False)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (RuntimeError, SafetensorError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(f"{self.path} is damaged or of another kind: {lines[-1]}") from error
        return module.eval()

    def _require_all(self, prefix: str, known: set[str], what: str) -> None:
        """Refuse a file that holds more than was recognised."""
        more = sorted(key for key in self.tensors if key.startswith(prefix) and key[len(prefix) :] not in known)
        if more:
            raise UserError(f"{self.path} holds a {what} of a kind that is not known here: it has {more[0]}")

    def _instead(self) -> str:
        """What a file is that lacks what is looked for."""
        keys = list(self.tensors)
        if any(key.startswith(("lora_unet_", "lora_te")) or ".lora_" in key for key in keys):
            return "it is an adapter; give the model that it adapts"
        if any(key.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.")) for key in keys):
            return "its names are diffusers'; give the folder that it is in"
        if any(".joint_blocks." in key or "double_blocks." in key for key in keys):
            return "it is a diffusion transformer; U-Nets are trained here"
        if any(key.startswith("model_ema.") for key in keys):
            return "it holds averaged weights (model_ema.) alone"
        return "it is no such checkpoint of latent diffusion"


def open_file(path: Path) -> SingleFile:
    """Open a `.safetensors`, or a pickle of torch's.

    Raises:
        UserError: it can't be read, or it is a pickle of more than weights.
    """
    return SingleFile(path, *read_weights(path))


def unet_config(file: SingleFile) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`, from the shapes.

    Raises:
        UserError: there is no U-Net, or of a kind that is not known.
    """
    prefix = ldm_keys.UNET
    in_channels = file.shape(f"{prefix}input_blocks.0.0.weight")[1]
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, transformer blocks) of each residual block
    number = 1
    while True:
        block = f"{prefix}input_blocks.{number}"
        if f"{block}.0.op.weight" in file.tensors:
            levels.append([])
        elif f"{block}.0.out_layers.3.weight" in file.tensors:
            depth = file.count(block + ".1.transformer_blocks.{}.norm1.weight")
            levels[-1].append((file.shape(f"{block}.0.out_layers.3.weight")[0], depth))
        else:
            break
        number += 1
    widths = [level[0][0] for level in levels if level]
    depths = [level[0][1] for level in levels if level]
    context = next(
        (key for key in file.tensors if key.startswith(prefix) and key.endswith("attn2.to_k.weight")), None
    )
    if context is None or any(level != level[:1] * len(levels[0]) for level in levels):
        raise UserError(f"{file.path} holds a U-Net of a kind that is not known here: only text-to-image ones are")
    # The middle block has the depth of the last level; levels without attention have none of their own.
    middle = file.count(prefix + "middle_block.1.transformer_blocks.{}.norm1.weight")
    layers = [depth or 1 for depth in depths[:-1]] + [middle]
    linear = len(file.shape(f"{prefix}middle_block.1.proj_in.weight")) == 2
    upscaler = file.kind == "upscaler"
    made: dict[str, Any] = {
        "sample_size": 96 if file.kind == "sd2" and file.prediction == "v_prediction" else _SIZES[file.kind],
        "in_channels": in_channels,
        "out_channels": file.shape(f"{prefix}out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": file.shape(context)[1],
        "use_linear_projection": linear,
        # Stable Diffusion 1.x and the upscaler have 8 heads everywhere, 2.x and XL heads of 64 channels.
        "attention_head_dim": [heads(file, width) for width in widths] if linear and not upscaler else 8,
    }
    if upscaler:
        made["num_class_embeds"] = file.shape(f"{prefix}label_emb.weight")[0]
        made["only_cross_attention"] = [
            bool(depth) and _attends_to_context_alone(file, level, made) for level, depth in enumerate(depths)
        ]
    if f"{prefix}label_emb.0.0.weight" in file.tensors:
        told = file.shape(f"{prefix}label_emb.0.0.weight")[1]
        if not file.has("text_encoder_2") or told != 6 * 256 + pooled_width(file):
            raise UserError(
                f"{file.path} is told {told} features beside the time: of XL's models only the base's kind, with "
                "both text encoders in the file, is known here"
            )
        made |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": told,
        }
    return made


def _attends_to_context_alone(file: SingleFile, level: int, config: Mapping[str, Any]) -> bool:
    block = 1 + level * (config["layers_per_block"] + 1)
    key = f"{ldm_keys.UNET}input_blocks.{block}.1.transformer_blocks.0.attn1.to_k.weight"
    return file.shape(key)[1] != config["block_out_channels"][level]


def vae_config(file: SingleFile) -> dict[str, Any]:
    """Arguments of `AutoencoderKL`, from the shapes; an autoencoder by itself is scaled as Stable Diffusion 1.x's.

    Raises:
        UserError: there is none, or one that quantizes.
    """
    prefix = ldm_keys.VAE
    if f"{prefix}quantize.embedding.weight" in file.tensors:
        raise UserError(f"{file.path} holds an autoencoder that quantizes (VQ); only those of KL kind are read")
    latents = file.shape(f"{prefix}decoder.conv_in.weight")[1]
    levels = file.count(prefix + "encoder.down.{}.block.0.conv1.weight")
    widths = [file.shape(f"{prefix}encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if any(".attn." in key for key in file.tensors if key.startswith(f"{prefix}encoder.down.")):
        raise UserError(f"{file.path} holds an autoencoder with attention between its levels, which is not known")
    default = SCALES[file.kind if file.has("unet") else "sd1"]
    return {
        "in_channels": file.shape(f"{prefix}encoder.conv_in.weight")[1],
        "out_channels": file.shape(f"{prefix}decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": file.count(prefix + "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": latents,
        "sample_size": _SIZES[file.kind] * 2 ** (levels - 1),
        "mid_block_add_attention": f"{prefix}encoder.mid.attn_1.q.weight" in file.tensors,
        "use_quant_conv": f"{prefix}quant_conv.weight" in file.tensors,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in file.tensors,
        "scaling_factor": float(file.sidecar.get("scale_factor", default)),
    }


def text_config(file: SingleFile, kind: str) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig`, from the shapes.

    Args:
        kind: a key of `ldm_keys.TEXT`.

    Raises:
        UserError: the file does not hold such an encoder.
    """
    prefix = ldm_keys.TEXT[kind]
    if kind.endswith("openclip"):
        words, places, mlp = "token_embedding.weight", "positional_embedding", "mlp.c_fc.weight"
        layer = "transformer.resblocks.{}."
    else:
        words, places = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
        layer, mlp = "text_model.encoder.layers.{}.", "mlp.fc1.weight"
    vocabulary, width = file.shape(prefix + words)
    layers = file.count(prefix + layer + mlp)
    if kind == "openclip" and layers == _VIT_H_LAYERS:
        layers -= 1
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": file.shape(prefix + layer.format(0) + mlp)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads(file, width),
        "max_position_embeddings": file.shape(prefix + places)[0],
        "hidden_act": "gelu" if kind.endswith("openclip") else "quick_gelu",
        "projection_dim": pooled_width(file) if kind == "xl_openclip" else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if kind.endswith("openclip") else vocabulary - 1,
    }


def pooled_width(file: SingleFile) -> int:
    """Features of the pooled text of XL's second encoder."""
    return file.shape(f"{ldm_keys.TEXT['xl_openclip']}text_projection")[1]


def heads(file: SingleFile, width: int) -> int:
    """How many heads of 64 channels a width has.

    Raises:
        UserError: it is no multiple.
    """
    if width % _HEAD:
        raise UserError(f"{file.path}: how many heads attention has at a width of {width} can't be told by shapes")
    return width // _HEAD


def _on_meta(build: Callable[[], Module], path: Path, what: str) -> Module:
    """A module without memory; its weights are still to come."""
    try:
        with torch.device("meta"):
            return build()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its configuration gives no {what}: {first_line(error)}") from error
