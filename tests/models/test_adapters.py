"""LoRA: nothing changes at first, names map both ways, and diffusers computes the same from the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from finetune import UserError
from finetune.models import adapters
from finetune.models.kohya import to_kohya
from finetune.models.text import build_text_encoder, train_tokenizer
from finetune.models.unet import build_unet
from tests import fakes
from tests.fakes import UNET as TINY


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red apple"] * 2, 520, max_length=8)


CONVOLUTIONS = (
    "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv"
)  # fmt: skip


def trained(module, prefix, targets, seed, rank=4, alpha=6.0, dora=False):
    """Attach an adapter and move its B away from zero, and its magnitudes; parameters by component name."""
    names = adapters.add_lora(module, rank, alpha, target_modules=targets, dora=dora, seed=seed)
    parameters = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        if "lora_B" in name:
            parameters[name].data = 0.1 * torch.randn(parameters[name].shape, generator=generator)
        if "lora_magnitude" in name:
            parameters[name].data *= 0.5 + torch.rand(parameters[name].shape, generator=generator)
    return {f"{prefix}.{name}": parameters[name].detach() for name in names}


@torch.no_grad()
def predict(unet, width=32):
    generator = torch.Generator().manual_seed(0)
    z, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, width, generator=generator)
    return unet.eval()(z, torch.tensor([10, 900]), context).sample


def test_a_fresh_adapter_is_neutral_deterministic_and_alone_trainable():
    unet = build_unet(TINY)
    before, state = predict(unet), torch.random.get_rng_state()
    names = adapters.add_lora(unet, 4, 8.0, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(predict(unet), before)
    assert names == [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * sum(
        name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) for name, _ in build_unet(TINY).named_modules()
    )
    torch.manual_seed(123)
    again, other = build_unet(TINY), build_unet(TINY)
    adapters.add_lora(again, 4, 8.0, seed=5)
    adapters.add_lora(other, 4, 8.0, seed=6)
    first = names[0]
    parameters = [dict(model.named_parameters()) for model in (unet, again, other)]
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in names)
    assert not torch.equal(parameters[0][first], parameters[2][first])
    # Kaiming's uniform with a = sqrt(5): |A| < 1 / sqrt(fan in), as peft draws it.
    bound = parameters[0][first].shape[1] ** -0.5
    assert 0.8 * bound < parameters[0][first].abs().max() <= bound


def test_the_adapter_of_a_half_precision_model_is_float32():
    unet = build_unet(TINY).to(torch.bfloat16)
    names = adapters.add_lora(unet, 2, 2.0)
    parameters = dict(unet.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}


def test_each_parameter_has_a_name_of_its_own_in_the_file(tokenizer):
    named = trained(build_unet(TINY), "unet", adapters.UNET_TARGETS, 0)
    named |= trained(build_text_encoder(tokenizer, 32, 1, 2), "text_encoder", adapters.TEXT_TARGETS, 1)
    state = fakes.lora_file(named)
    assert len(state) == len(named)
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.")) for key in state)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    assert all(adapters.lora_key(key) == key for key in state)
    with pytest.raises(ValueError, match="no LoRA parameter"):
        adapters.lora_key("unet.conv_in.weight")


@torch.no_grad()
@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_diffusers_loads_the_file_to_the_same_outputs(tmp_path, tokenizer, alpha):
    unet, encoder = build_unet(TINY), build_text_encoder(tokenizer, 32, 1, 2).eval()
    named = trained(unet, "unet", adapters.UNET_TARGETS, 0, rank=4, alpha=alpha)
    named |= trained(encoder, "text_encoder", adapters.TEXT_TARGETS, 1, rank=2, alpha=3.0)
    state = fakes.lora_file(named)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")]
    alphas = {name: alpha if name.startswith("unet.") else 3.0 for name in names}
    adapters.save_lora(tmp_path, state, alphas)
    assert adapters.read_lora(tmp_path).alphas == alphas

    plain_unet, plain_encoder = build_unet(TINY), build_text_encoder(tokenizer, 32, 1, 2).eval()
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=plain_encoder, tokenizer=tokenizer, unet=plain_unet, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    ids = torch.tensor([[3, 5, 7, 9]])
    base = predict(plain_unet), plain_encoder(ids)[0]
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=0, atol=1e-6)
    torch.testing.assert_close(pipe.text_encoder(ids)[0], encoder(ids)[0], rtol=0, atol=1e-6)

    # And so does our own merge, into modules that know nothing of adapters.
    merged = {"unet": build_unet(TINY), "text_encoder": build_text_encoder(tokenizer, 32, 1, 2).eval()}
    adapters.merge_lora(merged, adapters.read_lora(tmp_path))
    torch.testing.assert_close(predict(merged["unet"]), predict(unet), rtol=0, atol=2e-6)
    torch.testing.assert_close(merged["text_encoder"](ids)[0], encoder(ids)[0], rtol=0, atol=2e-6)
    assert (predict(unet) - base[0]).abs().max() > 1e-3
    assert (encoder(ids)[0] - base[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_linears_and_convolutions_merge_as_peft_computes_them(tmp_path, tokenizer, dora):
    """From the file that diffusers loads to the same outputs, DoRA's magnitudes with it."""
    unet, encoder = build_unet(TINY), build_text_encoder(tokenizer, 32, 1, 2).eval()
    plain, before = build_unet(TINY), predict(build_unet(TINY))
    named = trained(unet, "unet", (*adapters.UNET_TARGETS, *CONVOLUTIONS), 0, dora=dora)
    named |= trained(encoder, "text_encoder", adapters.TEXT_TARGETS, 1, dora=dora)
    state = fakes.lora_file(named)
    assert len(state) == len(named)
    magnitudes = {key: tensor for key, tensor in state.items() if ".lora_magnitude_vector." in key}
    assert len(magnitudes) == dora * sum(key.endswith("lora_A.weight") for key in state)
    adapters.save_lora(
        tmp_path, state, adapters.lora_alphas("unet", unet) | adapters.lora_alphas("text_encoder", encoder)
    )
    merged = {"unet": plain, "text_encoder": build_text_encoder(tokenizer, 32, 1, 2).eval()}
    adapters.merge_lora(merged, adapters.read_lora(tmp_path))
    torch.testing.assert_close(predict(plain), predict(unet), rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[3, 5, 7, 9]])
    torch.testing.assert_close(merged["text_encoder"](ids)[0], encoder(ids)[0], rtol=1e-4, atol=1e-5)
    assert (predict(unet) - before).abs().max() > 1e-2
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=build_text_encoder(tokenizer, 32, 1, 2).eval(), tokenizer=tokenizer,
        unet=build_unet(TINY), scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pipe.text_encoder(ids)[0], encoder(ids)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_fresh_dora_is_neutral_and_its_magnitudes_are_norms_in_float32():
    unet, plain = build_unet(TINY).to(torch.bfloat16), build_unet(TINY)
    names = adapters.add_lora(unet, 4, 8.0, target_modules=("to_q", "conv1"), dora=True)
    parameters = dict(unet.named_parameters())
    assert {parameters[name].dtype for name in names} == {torch.float32}
    other = build_unet(TINY)
    before = predict(other)
    adapters.add_lora(other, 4, 8.0, target_modules=("to_q", "conv1"), dora=True)
    torch.testing.assert_close(predict(other), before, rtol=0, atol=1e-6)
    for name, parameter in other.named_parameters():
        if "lora_magnitude" in name:
            weight = plain.get_submodule(name.split(".lora_magnitude")[0]).weight
            torch.testing.assert_close(parameter.flatten(), weight.flatten(1).norm(dim=1))


@torch.no_grad()
def test_magnitudes_are_read_as_peft_writes_them(tmp_path):
    unet, merged = build_unet(TINY), build_unet(TINY)
    trained(unet, "unet", adapters.UNET_TARGETS, 0, alpha=4.0, dora=True)
    unet.save_lora_adapter(tmp_path, weight_name="theirs.safetensors")
    theirs = {f"unet.{key}": tensor for key, tensor in load_file(tmp_path / "theirs.safetensors").items()}
    assert any(key.endswith(".lora_magnitude_vector") for key in theirs)
    save_file(theirs, tmp_path / adapters.LORA_FILE)
    adapters.merge_lora({"unet": merged}, adapters.read_lora(tmp_path))
    torch.testing.assert_close(predict(merged), predict(unet), rtol=1e-4, atol=1e-5)


def test_metadata_holds_rank_alpha_and_odd_ranks():
    state = {
        "unet.a.to_q.lora_A.weight": torch.zeros(4, 8),
        "unet.a.to_q.lora_B.weight": torch.zeros(8, 4),
        "unet.a.to_k.lora_A.weight": torch.zeros(4, 8),
        "unet.a.to_v.lora_A.weight": torch.zeros(2, 8),
    }
    alphas = {"unet.a.to_q": 6.0, "unet.a.to_k": 6.0, "unet.a.to_v": 3.0}
    metadata = json.loads(adapters.lora_metadata(state, alphas)["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4 and metadata["unet.lora_alpha"] == 6.0
    assert metadata["unet.target_modules"] == ["a.to_k", "a.to_q", "a.to_v"]
    assert metadata["unet.rank_pattern"] == {"a.to_v": 2}
    assert metadata["unet.alpha_pattern"] == {"a.to_v": 3.0}


def test_older_names_are_read_and_alpha_is_then_the_rank(tmp_path):
    path = tmp_path / "old.safetensors"
    save_file(
        {
            "unet.mid.to_q.lora.down.weight": torch.ones(2, 8),
            "unet.mid.to_q.lora.up.weight": torch.ones(8, 2),
            "text_encoder.text_model.x.q_proj.lora_linear_layer.down.weight": torch.ones(2, 8),
            "text_encoder.text_model.x.q_proj.lora_linear_layer.up.weight": torch.ones(8, 2),
        },
        path,
    )
    lora = adapters.read_lora(path)
    assert lora.scales == {"unet.mid.to_q": 1.0, "text_encoder.text_model.x.q_proj": 1.0}


def test_a_rank_stabilized_file_of_diffusers_is_merged_as_diffusers_does(tmp_path):
    """Its metadata says so; alpha is divided by the rank's root."""
    down, up = torch.ones(4, 8), torch.ones(8, 4)
    state = {"unet.mid.to_q.lora_A.weight": down, "unet.mid.to_q.lora_B.weight": up}
    for is_stabilized, scale in ((False, 1.5), (True, 3.0)):
        said = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": is_stabilized}
        save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(said)})
        assert adapters.read_lora(tmp_path / "x.safetensors").scales == {"unet.mid.to_q": scale}


def test_mistakes_are_named(tmp_path):
    unet = build_unet(TINY)
    with pytest.raises(UserError, match="'to_z' is no module"):
        adapters.add_lora(unet, 4, 4.0, target_modules=("to_q", "to_z"))
    with pytest.raises(
        UserError, match=r"target \S+attn1 is no linear .*, but Attention: .* such as to_q, to_k, to_v"
    ):
        adapters.add_lora(unet, 4, 4.0, target_modules=("attn1",))
    with pytest.raises(UserError, match=r"target \S+norm1 is no linear layer or convolution, but LayerNorm$"):
        adapters.add_lora(unet, 4, 4.0, target_modules=("norm1",))
    with pytest.raises(UserError, match="rank >= 1"):
        adapters.add_lora(unet, 0, 4.0)
    with pytest.raises(UserError, match="no LoRA at"):
        adapters.read_lora(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is no LoRA in safetensors"):
        adapters.read_lora(tmp_path / "x.safetensors")
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "kohya.safetensors")
    with pytest.raises(UserError, match="only LoRAs in diffusers' layout"):
        adapters.read_lora(tmp_path / "kohya.safetensors")
    wrong = {"unet.conv_in.lora_A.weight": torch.zeros(2, 3), "unet.conv_in.lora_B.weight": torch.zeros(3, 2)}
    with pytest.raises(UserError, match=r"for another model: unet\.conv_in has"):
        adapters.merge_lora({"unet": unet}, adapters.Lora(wrong, {"unet.conv_in": 1.0}))
    alone = adapters.Lora({"unet.a.lora_A.weight": torch.zeros(2, 3)}, {"unet.a": 1.0})
    with pytest.raises(UserError, match="no lora_B for unet"):
        adapters.merge_lora({"unet": unet}, alone)
    for rest in ("lora_B", "lora_magnitude_vector"):  # was left out without a word
        half = adapters.Lora({f"unet.conv_out.{rest}.weight": torch.zeros(4, 2)}, {})
        with pytest.raises(UserError, match="this LoRA is not whole: there is no lora_A for unet.conv_out$"):
            adapters.merge_lora({"unet": unet}, half)
    ranks = {
        "unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(32, 3),
    }
    with pytest.raises(UserError, match=r"for another model: unet\.conv_in has"):
        adapters.merge_lora({"unet": unet}, adapters.Lora(ranks, {"unet.conv_in": 1.0}))


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_ranks_of_parts_and_the_stabilized_factor_are_in_the_file(tmp_path, rank_stabilized):
    """What peft computes with them is what merging the file computes, and what peft makes of its metadata."""
    ranks = {"up_blocks": 8, "down_blocks.0": 0, "mid_block.attentions.0": 2}
    unet = build_unet(TINY)
    names = adapters.add_lora(unet, 4, 6.0, ranks=ranks, rank_stabilized=rank_stabilized, seed=1)
    parameters = dict(unet.named_parameters())
    for name in names:
        if "lora_B" in name:
            parameters[name].data = 0.1 * torch.randn(parameters[name].shape)
    state = fakes.lora_file({f"unet.{name}": parameters[name].detach() for name in names})
    widths = {key: len(tensor) for key, tensor in state.items() if ".lora_A." in key}
    assert {rank for key, rank in widths.items() if ".up_blocks." in key} == {8}
    assert {rank for key, rank in widths.items() if ".mid_block." in key} == {2}
    assert not any(".down_blocks.0." in key for key in widths)
    adapters.save_lora(tmp_path, state, adapters.lora_alphas("unet", unet))
    read = adapters.read_lora(tmp_path)
    for name, scale in read.scales.items():
        rank = len(read.state[f"{name}.lora_A.weight"])
        assert scale == pytest.approx(6.0 / 4 * (rank**0.5 if rank_stabilized else 1))
    merged = build_unet(TINY)
    adapters.merge_lora({"unet": merged}, read)
    torch.testing.assert_close(predict(merged), predict(unet), rtol=1e-4, atol=1e-5)
    loaded = build_unet(TINY)
    loaded.load_lora_adapter(tmp_path, prefix="unet", weight_name=adapters.LORA_FILE, use_safetensors=True)
    torch.testing.assert_close(predict(loaded), predict(unet), rtol=1e-4, atol=1e-5)


def test_rank_0_everywhere_is_refused():
    with pytest.raises(UserError, match="trains nothing"):
        adapters.add_lora(build_unet(TINY), 4, 6.0, ranks={"up_blocks": 0, "down_blocks": 0, "mid_block": 0})


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(["adapter=lora_conv"], marks=pytest.mark.slow),
        ["adapter=dora", "adapter.targets=[to_q,conv1,conv_shortcut,proj_in]", "model.train_text_encoder=true"],
    ],
    ids=["lora_conv", "dora"],
)
def test_a_run_trains_goes_on_and_is_exported(
    pipeline: Path, overrides: list[str], command: Callable[..., tuple[int, str]], tmp_path: Path, choice: list[str]
) -> None:
    """To the same bits after a stop; the merged model is the base with the exported adapter."""
    settings = [
        *overrides,
        f"model.pretrained={pipeline}",
        "model.unet={}",
        *choice,
        "adapter.rank=2",
        "optim.lr=1e-2",
    ]
    assert command("train", *settings)[0] == 0
    half = [*settings, f"run.dir={tmp_path / 'half'}"]
    assert command("train", *half, "train.steps=2")[0] == 0
    assert command("train", *half)[0] == 0
    folder = Path("checkpoints/step-00000004")
    for part in ("weights", "ema"):
        one, other = (load_file(tmp_path / run / folder / part / adapters.LORA_FILE) for run in ("run", "half"))
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    dora = choice[0] == "adapter=dora"
    assert any(".conv1.lora_A." in key for key in one)
    assert {".lora_magnitude_vector." in key for key in one} == ({True, False} if dora else {False})
    if dora:
        code, line = command("train", *half, "adapter.dora=false")
        assert (code, "adapter.dora was True and is False now" in line) == (2, True), line
    made = {name: str(tmp_path / name) for name in ("lora", "diffusers", "kohya.safetensors")}
    for name, out in made.items():
        assert command("export", str(tmp_path / "run"), "--format", name.split(".")[0], "--out", out)[0] == 0
    assert any(key.endswith(".dora_scale") for key in load_file(made["kohya.safetensors"])) == dora
    merged = UNet2DConditionModel.from_pretrained(made["diffusers"], subfolder="unet")
    adapted = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    base = predict(adapted.unet, 16)
    adapted.load_lora_weights(made["lora"])
    torch.testing.assert_close(predict(merged, 16), predict(adapted.unet, 16), rtol=1e-4, atol=1e-5)
    assert (predict(merged, 16) - base).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_two_text_encoders_of_xl(tmp_path, form):
    """diffusers loads an adapter of both, and computes what the adapted and the merged encoders do."""
    pipes = [StableDiffusionXLPipeline.from_pretrained(fakes.tiny_sdxl(tmp_path / "xl")) for _ in range(3)]
    adapted, loaded, merged = ({n: getattr(pipe, n) for n in ("text_encoder", "text_encoder_2")} for pipe in pipes)
    ids = torch.tensor([[3, 5, 7, 9]])
    before = {name: encoder(ids, output_hidden_states=True).hidden_states[-2] for name, encoder in adapted.items()}
    named, alphas = {}, {}
    for seed, (name, encoder) in enumerate(adapted.items()):
        named |= trained(encoder, name, adapters.TEXT_TARGETS, seed, alpha=2.0 + seed)
        alphas |= adapters.lora_alphas(name, encoder)
    adapters.save_lora(tmp_path / "lora", fakes.lora_file(named), alphas)
    read = adapters.read_lora(tmp_path / "lora")
    adapters.merge_lora(merged, read)
    if form == "kohya":
        made = to_kohya(read)
        assert {key.split("_text_model")[0] for key in made} == {"lora_te1", "lora_te2"}
        save_file(made, tmp_path / "lora" / adapters.LORA_FILE)
    pipes[1].load_lora_weights(tmp_path / "lora")
    for name, encoder in adapted.items():
        wanted = encoder(ids, output_hidden_states=True).hidden_states[-2]
        assert (wanted - before[name]).abs().max() > 1e-3
        for other in (loaded, merged):
            found = other[name](ids, output_hidden_states=True).hidden_states[-2]
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
