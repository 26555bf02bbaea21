"""Adapters under kohya's names: what is written is read again, under the original code base's names too."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from finetune import UserError
from finetune.models import adapters
from finetune.models.kohya import is_kohya, read_kohya, to_kohya
from finetune.models.ldm_keys import unet_key
from finetune.models.unet import build_unet
from tests import fakes
from tests.fakes import UNET as TINY
from tests.models.test_adapters import CONVOLUTIONS, predict, trained


def saved(folder, *, dora):
    """A U-Net with an adapter of linears and convolutions, which is in a file in `folder`."""
    unet = build_unet(TINY)
    state = fakes.lora_file(trained(unet, "unet", (*adapters.UNET_TARGETS, *CONVOLUTIONS), 0, dora=dora))
    adapters.save_lora(folder, state, adapters.lora_alphas("unet", unet))
    return unet


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_kohyas_names_of_convolutions_and_magnitudes(tmp_path, dora):
    """diffusers reads them back to the same update; magnitudes are of rows of V, as LyCORIS has them on outputs."""
    unet = saved(tmp_path, dora=dora)
    made = to_kohya(adapters.read_lora(tmp_path))
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert made[f"{key}.lora_down.weight"].shape == (4, 32, 3, 3) and made[f"{key}.lora_up.weight"].shape == (
        32,
        4,
        1,
        1,
    )
    assert made[f"{key}.alpha"] == 6
    names = {name.rsplit(".", 1)[0] for name in made if name.endswith(".alpha")}
    assert {f"{name}.dora_scale" in made for name in names} == {dora}
    if dora:
        assert made[f"{key}.dora_scale"].shape == (32, 1, 1, 1)
        linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        assert made[f"{linear}.dora_scale"].shape == (32, 1)
        plain, target = build_unet(TINY), build_unet(TINY)
        adapters.merge_lora({"unet": target}, adapters.read_lora(tmp_path))
        paths = {
            path.removeprefix("unet.").replace(".", "_"): path.removeprefix("unet.")
            for path in adapters.read_lora(tmp_path).scales
        }
        for name in names:
            path = paths[name.removeprefix("lora_unet_")]
            weight = plain.get_submodule(path).weight
            up, down = made[f"{name}.lora_up.weight"], made[f"{name}.lora_down.weight"]
            v = weight + (6.0 / 4 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            wanted = made[f"{name}.dora_scale"] * v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
            torch.testing.assert_close(target.get_submodule(path).weight, wanted)
    else:
        save_file(made, tmp_path / "kohya.safetensors")
        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=build_unet(TINY), scheduler=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
        torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_merges_as_the_adapter_that_it_is_of(tmp_path, dora):
    saved(tmp_path, dora=dora)
    lora = adapters.read_lora(tmp_path)
    file = tmp_path / "kohya.safetensors"
    save_file(to_kohya(lora), file)
    assert is_kohya(file) and not is_kohya(tmp_path / adapters.LORA_FILE) and not is_kohya(tmp_path)
    first, second = build_unet(TINY), build_unet(TINY)
    before = first.conv_in.weight.clone()
    adapters.merge_lora({"unet": first}, lora)
    adapters.merge_lora({"unet": second}, read_kohya(file, {"unet": second}))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before, first.conv_in.weight)  # not among the targets
    assert not torch.equal(first.state_dict()[ATTENTION], build_unet(TINY).state_dict()[ATTENTION])


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@torch.no_grad()
@pytest.mark.parametrize("names", ["diffusers", "latent diffusion"])
def test_adapters_of_xl_under_both_kinds_of_names(tmp_path, names):
    """kohya's own scripts name XL's U-Net as the single file does."""
    pipe = StableDiffusionXLPipeline.from_pretrained(fakes.tiny_sdxl(tmp_path / "xl"))
    modules = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    named, alphas = {}, {}
    for seed, (name, module) in enumerate(modules.items()):
        targets = (*adapters.UNET_TARGETS, "conv1") if name == "unet" else adapters.TEXT_TARGETS
        named |= trained(module, name, targets, seed, alpha=2.0 + seed)
        alphas |= adapters.lora_alphas(name, module)
    adapters.save_lora(tmp_path / "lora", fakes.lora_file(named), alphas)
    lora = adapters.read_lora(tmp_path / "lora")
    made = to_kohya(lora)
    if names != "diffusers":
        for name in lora.scales:
            if name.startswith("unet."):
                path = name.removeprefix("unet.")
                ldm = unet_key(f"{path}.weight", pipe.unet.config).removesuffix(".weight").replace(".", "_")
                old = "lora_unet_" + path.replace(".", "_")
                for end in ("lora_down.weight", "lora_up.weight", "alpha"):
                    made[f"lora_unet_{ldm}.{end}"] = made.pop(f"{old}.{end}")
        assert any(key.startswith("lora_unet_input_blocks_") for key in made)
    save_file(made, tmp_path / "kohya.safetensors")
    plain = StableDiffusionXLPipeline.from_pretrained(fakes.tiny_sdxl(tmp_path / "xl"))
    read = read_kohya(tmp_path / "kohya.safetensors", {name: getattr(plain, name) for name in modules})
    assert read.scales == pytest.approx(lora.scales)
    assert read.state.keys() == lora.state.keys()
    assert all(torch.equal(read.state[key], tensor) for key, tensor in lora.state.items())


def test_mistakes_are_named(tmp_path):
    modules = {"unet": build_unet(TINY)}
    layer = "lora_unet_" + ATTENTION.removesuffix(".weight").replace(".", "_")
    down, up = torch.zeros(2, 32), torch.zeros(32, 2)
    whole = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    save_file(whole, tmp_path / "a.safetensors")
    assert read_kohya(tmp_path / "a.safetensors", modules).scales == {
        f"unet.{ATTENTION.removesuffix('.weight')}": 1.0
    }
    for tensors, told in (
        ({"lora_unet_other.lora_down.weight": down}, "for another model: this one has no layer lora_unet_other"),
        ({f"{layer}.hada_w1_a": down}, "of kohya's adapters LoRA and DoRA can be read"),
        (whole | {f"{layer}.dora_scale": torch.ones(1, 32)}, "are of columns"),
        ({f"{layer}.alpha": torch.tensor(1.0)}, "has no lora_down"),
    ):
        save_file(tensors, tmp_path / "b.safetensors")
        with pytest.raises(UserError, match=told):
            read_kohya(tmp_path / "b.safetensors", modules)
    (tmp_path / "c.safetensors").write_bytes(b"lora_unet_")
    assert not is_kohya(tmp_path / "c.safetensors")
