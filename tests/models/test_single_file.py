"""Single files: the configurations of the published models follow from shapes; what is read is what was written."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import UserError
from finetune.components import load_components
from finetune.models import ldm_keys, single_file, text
from finetune.models.autoencoder import load_autoencoder
from finetune.models.single_file import SingleFile, open_file, text_config, unet_config, vae_config
from finetune.models.unet import load_unet
from tests import fakes

HERE = Path("model.safetensors")
CROSS, PLAIN = "CrossAttn", ""
# As the models' own config.json say, where they differ from diffusers' defaults.
SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD2 = SD1 | {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]}
XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
UNETS = {
    "sd1": ("clip", SD1),
    "sd1 inpainting": ("clip", SD1 | {"in_channels": 9}),
    "sd2": ("openclip", SD2),
    "sd2 inpainting": ("openclip", SD2 | {"in_channels": 9}),
    "xl": ("xl_openclip", XL),
    "xl inpainting": ("xl_openclip", XL | {"in_channels": 9}),
    "upscaler": ("openclip", UPSCALER),
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXTS = {
    "clip": CLIP_L | {"hidden_act": "quick_gelu"},
    "openclip": VIT_H | {"hidden_act": "gelu"},
    "xl_clip": CLIP_L | {"hidden_act": "quick_gelu"},
    "xl_openclip": BIG_G | {"hidden_act": "gelu", "projection_dim": 1280},
}


def marks(kind: str) -> dict[str, Tensor]:
    """What tells the kind of text encoder, and the width of XL's pooled text."""
    with torch.device("meta"):
        second = {f"{ldm_keys.TEXT[kind]}text_projection": torch.empty(1280, 1280)} if kind[0] == "x" else {}
        return {f"{ldm_keys.TEXT[kind]}x": torch.empty(1)} | second


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def text_model(kind: str, settings: dict[str, Any]) -> Any:
    made = CLIPTextModelWithProjection if kind == "xl_openclip" else CLIPTextModel
    return made(CLIPTextConfig(**settings)).eval()


@pytest.mark.parametrize("name", UNETS)
def test_the_published_unets_follow_from_shapes(name: str) -> None:
    kind, settings = UNETS[name]
    with torch.device("meta"):
        wanted = UNet2DConditionModel(**settings)
        state = ldm_keys.unet_to_ldm(wanted.state_dict(), wanted.config)
        found = UNet2DConditionModel(**unet_config(SingleFile(HERE, state | marks(kind), {})))
    assert shapes(found) == shapes(wanted)
    # What no shape shows: heads, in the middle too; and whether a block looks at the context alone.
    for one, other in zip(found.modules(), wanted.modules(), strict=True):
        if isinstance(one, Attention):
            assert isinstance(other, Attention)
            assert (one.heads, one.scale, one.is_cross_attention) == (
                other.heads,
                other.scale,
                other.is_cross_attention,
            )
    fixed = {"attention_head_dim", "transformer_layers_per_block", "only_cross_attention"}  # several ways to say it
    for key in {key for key in found.config if key[0] != "_"} - fixed:
        same = (list(v) if isinstance(v, tuple) else v for v in (found.config[key], wanted.config[key]))
        assert next(same) == next(same), key


@pytest.mark.parametrize("kind", TEXTS)
def test_the_published_text_encoders_follow_from_shapes(kind: str) -> None:
    with torch.device("meta"):
        wanted = text_model(kind, TEXTS[kind] | {"vocab_size": 49408})
        state = ldm_keys.text_to_ldm(dict(wanted.state_dict()), kind)
        if kind == "openclip":  # as published: with the layer that is not used
            state |= {k.replace(".22.", ".23."): tensor for k, tensor in state.items() if ".22." in k}
        found = text_config(SingleFile(HERE, state, {}), kind)
        made = text_model(kind, found)
    assert shapes(made) == shapes(wanted)
    assert {key: found[key] for key in TEXTS[kind]} == TEXTS[kind]
    assert (found["bos_token_id"], found["eos_token_id"], found["max_position_embeddings"]) == (49406, 49407, 77)


@pytest.mark.parametrize(("levels", "kind"), [([128, 256, 512, 512], "sd1"), ([128, 256, 512], "upscaler")])
def test_the_published_autoencoders_follow_from_shapes(levels: list[int], kind: str) -> None:
    settings = {
        "block_out_channels": levels,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    with torch.device("meta"):
        wanted = AutoencoderKL(**settings)
        state = ldm_keys.vae_to_ldm(wanted.state_dict(), wanted.config)
        mark = {f"{ldm_keys.UNET}input_blocks.0.0.weight": torch.empty(4, 4, 3, 3)}
        mark |= {f"{ldm_keys.UNET}label_emb.weight": torch.empty(1000, 4)} if kind == "upscaler" else {}
        config = vae_config(SingleFile(HERE, state | mark, {}))
        found = AutoencoderKL(**config)
    assert shapes(found) == shapes(wanted)
    assert config["scaling_factor"] == (0.18215 if kind == "sd1" else 0.08333)


# --- real weights, small ---------------------------------------------------------------------------

NARROW = {"block_out_channels": [64, 128], "layers_per_block": 1, "sample_size": 8}
LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL: dict[str, dict[str, Any]] = {
    "sd1": NARROW | LEVELS | {"cross_attention_dim": 64},
    "sd2": NARROW | LEVELS | {"cross_attention_dim": 64, "attention_head_dim": [1, 2]},
    "xl": NARROW
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 192,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}
for _kind in ("sd2", "xl"):
    SMALL[_kind]["use_linear_projection"] = True


def small(kind: str) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The parts of a tiny model, and the tensors of its single file."""
    torch.manual_seed(0)
    settings = {"vocab_size": 600, "max_position_embeddings": 12, "intermediate_size": 96, "num_hidden_layers": 2}
    unet = UNet2DConditionModel(**SMALL[kind]).eval()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[32, 64], layers_per_block=1, **blocks).eval()
    parts: dict[str, nn.Module] = {"unet": unet, "vae": vae}
    tensors = ldm_keys.unet_to_ldm(unet.state_dict(), unet.config) | ldm_keys.vae_to_ldm(
        vae.state_dict(), vae.config
    )
    named = {"sd1": {"": "clip"}, "sd2": {"": "openclip"}, "xl": {"": "xl_clip", "_2": "xl_openclip"}}
    for number, name in named[kind].items():
        width = 128 if number else 64
        act = "gelu" if "openclip" in name else "quick_gelu"
        own = {"hidden_size": width, "num_attention_heads": width // 64, "hidden_act": act, "projection_dim": 64}
        parts[f"text_encoder{number}"] = encoder = text_model(name, settings | own | {"eos_token_id": 599})
        floats = {key: value for key, value in encoder.state_dict().items() if value.is_floating_point()}
        tensors |= ldm_keys.text_to_ldm(floats, name)
    return parts, {key: tensor.contiguous() for key, tensor in tensors.items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    states = [{k: v for k, v in each.state_dict().items() if v.is_floating_point()} for each in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@torch.no_grad()
@pytest.mark.parametrize("kind", SMALL)
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path) -> None:
    parts, tensors = small(kind)
    path = tmp_path / "model.safetensors"
    save_file(tensors | {"model_ema.decay": torch.ones(1)}, path)
    unet = load_unet(path)
    assert same(unet, parts["unet"]) and same(load_autoencoder(path), parts["vae"])
    ids = torch.tensor([[598, 5, 7, 599] + 8 * [599], [598, 9, 599] + 9 * [0]])
    encoder = text.load_text_encoder(path)
    assert same(encoder, parts["text_encoder"])
    assert torch.equal(text.encode_text(encoder, ids), text.encode_text(parts["text_encoder"], ids))  # type: ignore[arg-type]
    noise, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, unet.config.cross_attention_dim)
    more = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)} if kind == "xl" else None
    outs = [u(noise, 7, context, added_cond_kwargs=more).sample for u in (unet, parts["unet"])]
    assert torch.equal(*outs)
    assert open_file(path).has("text_encoder_2") == (kind == "xl")
    if kind == "xl":
        encoder_2 = open_file(path).text_encoder_2()
        assert same(encoder_2, parts["text_encoder_2"])
        assert torch.equal(encoder_2(ids).text_embeds, parts["text_encoder_2"](ids).text_embeds)


def test_weights_have_the_dtype_and_outlive_the_file(tmp_path: Path) -> None:
    parts, tensors = small("sd1")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {key: tensor.half() for key, tensor in tensors.items()}, "global_step": 3}, path)
    unet = load_unet(path)
    path.write_bytes(b"")
    wanted = parts["unet"].half().float()
    assert unet.dtype == torch.float32 and same(unet, wanted)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for the trainer whose names are in the published files."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    made = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = made  # type: ignore[attr-defined]
    return made


def test_a_checkpoint_as_it_was_published(lightning: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a class of the trainer as a key, numpy's numbers, and another tool's names of the text encoder."""
    numpy = pytest.importorskip("numpy")
    parts, tensors = small("sd1")
    tensors = {k.replace("transformer.text_model.", "transformer."): tensor for k, tensor in tensors.items()}
    path = tmp_path / "model.ckpt"
    state = {"best_model_score": numpy.float64(0.5), "best_model_path": "x"}
    torch.save({"epoch": 1, "callbacks": {lightning: state}, "state_dict": tensors}, path)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert same(load_unet(path), parts["unet"]) and same(text.load_text_encoder(path), parts["text_encoder"])
    # Files of before torch 1.6 are no zip.
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    assert same(load_unet(path), parts["unet"])


class Payload:
    """Runs when it is unpickled."""

    ran: list[str] = []

    def __reduce__(self) -> Any:
        return Payload.ran.append, ("ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    for zipped in (True, False):
        torch.save(
            {"state_dict": {"a": torch.ones(1)}, "x": Payload()}, path, _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(UserError, match=r"model\.ckpt holds more than weights.*take a \.safetensors"):
            load_unet(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(UserError, match=r"model\.ckpt"):
        load_unet(path)
    assert Payload.ran == []


def test_an_autoencoder_by_itself(tmp_path: Path) -> None:
    parts, tensors = small("sd1")
    alone = {k.removeprefix(ldm_keys.VAE): t.clone() for k, t in tensors.items() if k.startswith(ldm_keys.VAE)}
    path = tmp_path / "vae.safetensors"
    save_file(alone | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)}, path)
    vae = load_autoencoder(str(path))
    assert same(vae, parts["vae"]) and vae.config["scaling_factor"] == 0.18215
    path.with_suffix(".yaml").write_text("model: {params: {scale_factor: 0.13025}}")
    assert load_autoencoder(str(path)).config["scaling_factor"] == 0.13025
    with pytest.raises(UserError, match=r"vae\.safetensors holds no model\.diffusion_model"):
        load_unet(path)
    with pytest.raises(UserError, match=r"vae\.safetensors holds no text encoder"):
        text.load_text_encoder(path)


def test_the_schedule_is_the_kinds_or_the_sidecars(tmp_path: Path) -> None:
    _, tensors = small("sd2")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    sd = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    assert open_file(path).scheduler() == sd
    save_file(tensors, path, metadata={"modelspec.prediction_type": "v"})
    assert open_file(path).scheduler()["prediction_type"] == "v_prediction"
    params = "{parameterization: v, linear_start: 0.001, linear_end: 0.01, timesteps: 500}"
    path.with_suffix(".yaml").write_text(f"model: {{params: {params}}}")
    told = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction"}
    assert open_file(path).scheduler() == sd | told
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    assert open_file(path).scheduler() == sd | {"prediction_type": "epsilon"}  # over what the metadata say
    save_file(tensors, path, metadata={"modelspec.predict_key": "v"})  # as ComfyUI names it
    path.with_suffix(".yaml").write_text("model: {params: {scale_factor: 0.18215}}")
    assert open_file(path).prediction == "v_prediction"
    save_file(tensors, path)
    assert open_file(path).prediction == "epsilon"  # the published v2-inference.yaml does not say it
    path.with_suffix(".yaml").write_text("[")
    with pytest.raises(UserError, match=r"model\.yaml is no configuration"):
        open_file(path).scheduler()
    path.with_suffix(".yaml").unlink()
    save_file(tensors | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, path)
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert open_file(path).scheduler() == sd | told


def test_a_model_of_other_noise_levels_is_refused(tmp_path: Path) -> None:
    """CosXL and Playground 2.5 were taken for models that predict the noise of Stable Diffusion's levels."""
    path = tmp_path / "model.safetensors"
    for mark in ("edm_vpred.sigma_max", "edm_mean"):
        save_file(small("xl")[1] | {mark: torch.ones(1)}, path)
        with pytest.raises(UserError, match=f"of EDM's noise levels, which are not known here: it has {mark}"):
            load_unet(path)


def test_a_file_of_2_that_does_not_say_what_it_predicts_is_pointed_out(tmp_path: Path) -> None:
    text.save_tokenizer(fakes.tokenizer(), tmp_path / "words")
    path = tmp_path / "model.safetensors"
    for kind, told in (("sd1", 0), ("sd2", 1)):
        save_file(small(kind)[1], path)
        parts = load_components(path, tokenizer=tmp_path / "words")
        assert len(parts.notices) == told and parts.scheduler["prediction_type"] == "epsilon"
    assert "put its configuration beside it as model.yaml" in parts.notices[0]
    path.with_suffix(".yaml").write_text("model: {params: {linear_start: 0.00085}}")  # a model that predicts noise
    assert load_components(path, tokenizer=tmp_path / "words").notices == ()
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    parts = load_components(path, tokenizer=tmp_path / "words")
    assert parts.notices == () and parts.scheduler["prediction_type"] == "v_prediction"


def test_what_is_no_such_file_is_one_line(tmp_path: Path) -> None:
    _, tensors = small("sd1")
    path = tmp_path / "model.safetensors"

    def refused(changed: dict[str, Tensor], line: str) -> None:
        save_file(changed, path)
        with pytest.raises(UserError, match=line) as caught:
            load_unet(path)
        assert "\n" not in str(caught.value)

    one = torch.ones(1)
    refused({"lora_unet_x.lora_down.weight": one}, "it is an adapter")
    refused({"down_blocks.0.resnets.0.conv1.weight": one}, "its names are diffusers'")
    refused({"model.diffusion_model.joint_blocks.0.x": one}, "it is a diffusion transformer")
    refused({"model_ema.decay": one}, "averaged weights")
    key = f"{ldm_keys.UNET}middle_block.0.in_layers.0.weight"
    refused({k: t for k, t in tensors.items() if k != key}, "the single file holds no .*middle_block.0.in_layers.0")
    refused(tensors | {key: torch.ones(7)}, "damaged or of another kind: size mismatch")
    refused(tensors | {f"{ldm_keys.UNET}control.weight": one}, "of a kind that is not known here: it has .*control")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_unet(path)
    for missing in (tmp_path / "none.ckpt", "none.safetensors", str(tmp_path / "a.safetensors")):
        with pytest.raises(UserError, match="no such file"):
            load_unet(missing)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"model\.onnx is a file; a model is a folder"):
        load_unet(tmp_path / "model.onnx")


def test_the_tokenizer_is_clips_or_a_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = fakes.tokenizer()
    text.save_tokenizer(words, tmp_path / "words")
    path = tmp_path / "model.safetensors"
    for kind, fill in (("sd1", "<|endoftext|>"), ("sd2", "!")):
        save_file(small(kind)[1], path)
        assert text.load_tokenizer(path, words=tmp_path / "words").pad_token == fill
    save_file(small("xl")[1], path)
    tokenizers = [
        text.load_text(path, words=tmp_path / "words")[0],
        text.load_text_2(path, words=tmp_path / "words")[0],
    ]
    assert [tokenizer.pad_token for tokenizer in tokenizers] == ["<|endoftext|>", "!"]

    asked = []

    def download(name: str, patterns: list[str]) -> Path:
        asked.append(name)
        return tmp_path / "words"

    monkeypatch.setattr(text, "download", download)
    assert len(text.load_text(path)[0]) == len(words) and asked == ["openai/clip-vit-large-patch14"]

    def fail(name: str, patterns: list[str]) -> Path:
        raise UserError("out of reach")

    monkeypatch.setattr(text, "download", fail)
    with pytest.raises(UserError, match=r"holds no tokenizer.*give model\.tokenizer=FOLDER"):
        text.load_text(path)
    many = text.train_tokenizer([f"{a}{b} {b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrs"] * 4, 650)
    text.save_tokenizer(many, tmp_path / "many")
    with pytest.raises(UserError, match=r"knows 600 tokens and the tokenizer has 6"):
        text.load_text(path, words=tmp_path / "many")


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.models import sources

    asked = []

    def download(name: str, patterns: list[str], revision: str | None) -> Path:
        asked.append((name, patterns, revision))
        return tmp_path

    monkeypatch.setattr(sources, "download", download)
    save_file({"a": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    found = sources.fetch_file("someone/models/model.fp16.safetensors", "v2")
    assert found == tmp_path / "model.fp16.safetensors"
    assert asked == [("someone/models", ["model.fp16.safetensors"], "v2")]
    with pytest.raises(UserError, match=r"someone/models on the Hugging Face Hub holds no sub/none\.ckpt"):
        sources.fetch_file("someone/models/sub/none.ckpt")
    assert sources.fetch_file("someone/models") is None and single_file.SCALES["xl"] == 0.13025
