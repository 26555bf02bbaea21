"""The names that weights have in single-file checkpoints of the latent diffusion code base, and back.

Stable Diffusion 1.x, 2.x and XL were published as one file each, whose keys follow the original modules:
`model.diffusion_model.` (U-Net), `first_stage_model.` (autoencoder), `cond_stage_model.` or `conditioner.` (text
encoders). diffusers and transformers name the same tensors otherwise. Here one set of rules says what each of their
names becomes; the way back is the same rules, looked up. Tensors keep their bits: some are reshaped, joined or
transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from finetune import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "clip": "cond_stage_model.transformer.",  # Stable Diffusion 1.x
    "openclip": "cond_stage_model.model.",  # 2.x
    "xl_clip": "conditioner.embedders.0.transformer.",
    "xl_openclip": "conditioner.embedders.1.model.",
}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # XL's pooled text and sizes
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",  # the x4 upscaler's noise level
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_QKV = re.compile(r"(text_model\.encoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")


# --- names ----------------------------------------------------------------------------------------


def unet_key(name: str, config: Mapping[str, Any]) -> str:
    """What a diffusers U-Net parameter is called in a single file, without its prefix.

    Args:
        config: of the `UNet2DConditionModel`.

    Raises:
        UserError: the U-Net has a part that those files do not know.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise UserError(f"layers_per_block={layers}: single files hold U-Nets with as many layers in each block")
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", name):
        return f"middle_block.{2 * int(found[1])}.{_of_resnet(found[2])}"
    if found := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ):
        side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        if kind == "upsamplers":
            has_attention = "CrossAttn" in config["up_block_types"][block]
            return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{2 if has_attention else 1}.{rest}"
        number = block * (layers + 1) + layer
        where = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{where}.0.{_of_resnet(rest)}" if kind == "resnets" else f"{where}.1.{rest}"
    raise UserError(f"single files of latent diffusion know nothing like the U-Net's {name}")


def _of_resnet(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{_RESNET[part]}.{rest}"


def vae_key(name: str, config: Mapping[str, Any]) -> str:
    """What an `AutoencoderKL`'s parameter is called in a single file, without its prefix."""
    blocks = len(config["block_out_channels"])
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    for ours, theirs in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(f"mid.attn_1.{ours}.", f"mid.attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    # The decoder counts from the smallest size in one code base, from the largest in the other.
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def openclip_key(name: str) -> str:
    """What a transformers CLIP text encoder's parameter is called in OpenCLIP; `q`, `k` and `v` share one."""
    if name in _CLIP_ENDS:
        return _CLIP_ENDS[name]
    if found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer = f"transformer.resblocks.{found[1]}"
        if found[2] in _CLIP_LAYER:
            return f"{layer}.{_CLIP_LAYER[found[2]]}.{found[3]}"
        if found[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return f"{layer}.attn.in_proj_{found[3]}"
    raise UserError(f"OpenCLIP knows nothing like the text encoder's {name}")


# --- tensors --------------------------------------------------------------------------------------


def unet_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A U-Net's weights under `UNET` names."""
    return {UNET + unet_key(name, config): tensor for name, tensor in state.items()}


def unet_from_ldm(
    state: Mapping[str, Tensor], names: Iterable[str], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The way back, for a U-Net whose parameters are `names`.

    Raises:
        UserError: the file lacks one of them.
    """
    return {name: _take(state, UNET + unet_key(name, config)) for name in names}


def vae_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An autoencoder's weights under `VAE` names; its attention's matrices are 1x1 convolutions there."""
    return {
        VAE + vae_key(name, config): tensor[:, :, None, None] if _is_vae_matrix(name, tensor) else tensor
        for name, tensor in state.items()
    }


def vae_from_ldm(state: Mapping[str, Tensor], names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The way back, for an autoencoder whose parameters are `names`.

    Raises:
        UserError: the file lacks one of them.
    """
    found = {name: _take(state, VAE + vae_key(name, config)) for name in names}
    return {
        name: tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in found.items()
    }


def _is_vae_matrix(name: str, tensor: Tensor) -> bool:
    return ".attentions." in name and tensor.ndim == 2


def text_to_ldm(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under the names of `TEXT[kind]`.

    Args:
        state: by the names of transformers, with or without their `text_model.`.
    """
    prefix = TEXT[kind]
    state = {_with_model(name): tensor for name, tensor in state.items()}
    if not kind.endswith("openclip"):
        return {prefix + name: tensor for name, tensor in state.items()}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := _QKV.fullmatch(name):
            if found[2] == "q":
                parts = [state[f"{found[1]}{which}_proj.{found[3]}"] for which in "qkv"]
                made[prefix + openclip_key(name)] = torch.cat(parts)
        else:
            made[prefix + openclip_key(name)] = (
                tensor.t().contiguous() if name == "text_projection.weight" else tensor
            )
    return made


def text_from_ldm(state: Mapping[str, Tensor], names: Iterable[str], kind: str) -> dict[str, Tensor]:
    """The way back, for a text encoder whose parameters are `names`.

    OpenCLIP's files may hold layers after the last that is used: they are left out.

    Raises:
        UserError: the file lacks one of them.
    """
    prefix = TEXT[kind]
    made: dict[str, Tensor] = {}
    for name in names:
        full = _with_model(name)
        if not kind.endswith("openclip"):
            made[name] = _take(state, prefix + full)
            continue
        tensor = _take(state, prefix + openclip_key(full))
        if found := _QKV.fullmatch(full):
            tensor = tensor.chunk(3)["qkv".index(found[2])]
        made[name] = tensor.t().contiguous() if full == "text_projection.weight" else tensor
    return made


def _with_model(name: str) -> str:
    """transformers 4 says `text_model.encoder...`, 5 `encoder...`."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _take(state: Mapping[str, Tensor], key: str) -> Tensor:
    try:
        return state[key]
    except KeyError:
        raise UserError(f"the single file holds no {key}: it is of another kind of model") from None
