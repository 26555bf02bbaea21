"""What is gathered from a run: the right checkpoint, the right weights, the right latent space."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from finetune import UserError, components
from finetune.components import load_components
from finetune.data.shards import EncoderInfo, Manifest, ShardInfo
from finetune.models.adapters import LORA_FILE, read_lora, save_lora
from finetune.models.autoencoder import encoder_sha256
from finetune.models.schedulers import scheduler_config
from finetune.models.text import load_text_encoder, save_tokenizer, tokenize
from finetune.models.unet import build_unet, load_unet
from finetune.runs import complete_checkpoints, latest_checkpoint
from tests import fakes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fakes.full_run(tmp_path_factory.mktemp("full") / "run", steps=(fakes.STEP, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fakes.base_model(tmp_path_factory.mktemp("base") / "model")


def same(one, other):
    names = one.state_dict().keys()
    return all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in names)


def test_the_latest_complete_checkpoint_is_taken(run, tmp_path):
    half = run / "checkpoints" / "step-00000060"
    (half / "weights").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / ".tmp-step-00000080").mkdir(exist_ok=True)
    assert list(complete_checkpoints(run)) == [fakes.STEP, 40]
    assert latest_checkpoint(run).name == "step-00000040"
    assert load_components(run).step == 40


@pytest.mark.parametrize(("weights", "step", "seed"), [("raw", 20, 20), ("ema", 20, 21), ("ema", None, 41)])
def test_weights_and_step_are_chosen(run, weights, step, seed):
    parts = load_components(run, weights=weights, step=step)
    assert same(parts.unet, fakes.unet(seed))
    assert same(parts.text_encoder, fakes.text_encoder(seed))
    assert parts.vae.config.scaling_factor == parts.latents.scale == fakes.SCALE
    assert parts.downsample == 4 and parts.default_size == (32, 32)
    assert parts.guidance == 3.0 and parts.notices == ()
    for module in (parts.unet, parts.text_encoder, parts.vae):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_without_an_average_the_raw_weights_come_with_a_notice(tmp_path):
    parts = load_components(fakes.full_run(tmp_path / "run", ema=False))
    assert same(parts.unet, fakes.unet(fakes.STEP))
    assert "no averaged weights" in parts.notices[0]


def test_a_run_of_the_first_stage_is_told_as_one(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}")
    (tmp_path / "checkpoints/step-00000002/ema/vae").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000002/trainer.json").write_text("{}")
    with pytest.raises(UserError, match=f"is a run of finetune autoencoder, .* its result is {tmp_path}/vae"):
        load_components(tmp_path)


@pytest.mark.parametrize("step", [None, fakes.STEP])
def test_parts_are_of_one_checkpoint_though_it_is_removed(tmp_path, base, monkeypatch, step):
    """Training goes on: the text encoder, which is read after the U-Net, was the base's then."""
    run = fakes.full_run(tmp_path / "run", steps=(fakes.STEP, fakes.STEP + 1))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["pretrained"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    first, later = complete_checkpoints(run).values()
    later.rename(tmp_path / "later")
    read = components.load_unet

    def load_unet(*given, **named):
        unet = read(*given, **named)
        if first.exists():
            shutil.rmtree(first)
            (tmp_path / "later").rename(later)
        return unet

    monkeypatch.setattr(components, "load_unet", load_unet)
    if step is None:
        parts = load_components(run)
        assert parts.step == fakes.STEP + 1
        assert same(parts.unet, fakes.unet(fakes.STEP + 2)) and same(
            parts.text_encoder, fakes.text_encoder(fakes.STEP + 2)
        )
    else:
        with pytest.raises(UserError, match="was removed while it was read"):
            load_components(run, step=step)


@torch.no_grad()
def test_a_lora_run_is_its_base_with_the_adapter(tmp_path, base):
    parts = load_components(fakes.lora_run(tmp_path / "run", base))
    adapted, _ = fakes.adapted_unet()
    z, context = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 32)
    wanted = adapted(z, 10, context).sample
    torch.testing.assert_close(parts.unet(z, 10, context).sample, wanted, rtol=0, atol=5e-6)
    assert (fakes.unet()(z, 10, context).sample - wanted).abs().max() > 1e-3
    assert same(parts.text_encoder, fakes.text_encoder())
    assert parts.lora is not None and set(parts.lora.alphas.values()) == {10.0}
    # The same by hand: the base model and the adapter's file.
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert same(load_components(base, loras=[(checkpoint / "weights" / LORA_FILE, 1.0)]).unet, parts.unet)


@torch.no_grad()
def test_several_loras_count_as_much_as_diffusers_lets_them(tmp_path, base):
    folders = [tmp_path / "one", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        fakes.lora_run(folder, base)
        [file] = [path for path in folder.rglob(LORA_FILE) if path.parent.name == "weights"]
        read = read_lora(file)
        generator = torch.Generator().manual_seed(seed)
        state = {key: torch.randn(tensor.shape, generator=generator) * 0.1 for key, tensor in read.state.items()}
        save_lora(folder, state, read.alphas)
    parts = load_components(base, loras=[(folders[0], 0.5), (folders[1], -1.5)])
    unet = fakes.unet()
    for name, folder in zip(("one", "other"), folders, strict=True):
        unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE, adapter_name=name)
    unet.set_adapters(["one", "other"], [0.5, -1.5])
    z, context = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 32)
    wanted = unet(z, 10, context).sample
    torch.testing.assert_close(parts.unet(z, 10, context).sample, wanted, rtol=1e-4, atol=1e-5)
    for fewer in ([(folders[0], 0.5)], [(folders[0], 1.0), (folders[1], -1.5)]):
        apart = load_components(base, loras=fewer).unet(z, 10, context).sample - wanted
        assert apart.abs().max() > 1e-3


def test_a_diffusers_folder_is_loaded(base):
    parts = load_components(base, dtype=torch.bfloat16)
    assert parts.step is None
    assert (parts.unet.dtype, parts.text_encoder.dtype, parts.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert parts.scheduler["prediction_type"] == "epsilon" and parts.scheduler["beta_end"] == 0.012


def test_the_latent_space_and_decoder_are_the_shards(run, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    fakes.vae().save_pretrained(tmp_path / "vae")
    encoder = EncoderInfo("../vae", "0" * 64, 0.25, 0.1, "float32", (-1.0, 1.0), 4, 4)
    sizes = [((32, 32), 2), ((40, 64), 2), ((48, 48), 3), ((40, 64), 2)]
    infos = [ShardInfo(f"{i}.tar", size, samples, 1, "0" * 64) for i, (size, samples) in enumerate(sizes)]
    Manifest("latents", ["latent.npy"], infos, encoder).save(shards)
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("checkpoints", "tokenizer"):
        (copied / name).symlink_to(run / name)
    (copied / "config.yaml").write_text(yaml.safe_dump(fakes.config(data={"shards": str(shards)})))
    parts = load_components(copied)
    assert (parts.latents.scale, parts.latents.shift) == (0.25, 0.1)
    assert same(parts.vae, fakes.vae())
    assert parts.default_size == (40, 64)  # the bucket with most samples
    made = fakes.config(data={"shards": str(shards)}, sample={"height": 48})
    (copied / "config.yaml").write_text(yaml.safe_dump(made))
    assert load_components(copied).default_size == (48, 64)
    (copied / "config.yaml").write_text(yaml.safe_dump(fakes.config()))
    with pytest.raises(UserError, match="no autoencoder: model.vae is null"):
        load_components(copied)

    # Of several sources the first names the decoder, and all of them count for the size.
    others = tmp_path / "far" / "shards"
    others.mkdir(parents=True)
    more = [ShardInfo("0.tar", (48, 48), 2, 1, "0" * 64)]
    Manifest("latents", ["latent.npy"], more, replace(encoder, source="./elsewhere")).save(others)
    sources = {"b": {"shards": str(shards)}, "a": {"shards": str(others), "weight": 0.5}}
    made = yaml.safe_dump(fakes.config(data={"shards": None, "sources": sources}), sort_keys=False)
    (copied / "config.yaml").write_text(made)
    parts = load_components(copied)
    assert (parts.latents.scale, parts.latents.shift) == (0.25, 0.1)
    assert same(parts.vae, fakes.vae())
    assert parts.default_size == (48, 48)
    (others / "manifest.json").unlink()
    assert load_components(copied).default_size == (40, 64)
    (shards / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"the shards at {shards} are gone"):
        load_components(copied)


def test_the_latent_space_of_the_checkpoint_comes_before_the_shards(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    path = latest_checkpoint(copied) / "trainer.json"
    made_by = {"scale": 0.25, "shift": 0.1, "encoder_sha256": encoder_sha256(fakes.vae())}
    path.write_text(json.dumps({"format": 1, "step": 40, "latents": made_by}))
    parts = load_components(copied)
    assert (parts.latents.scale, parts.latents.shift) == (0.25, 0.1)
    assert same(parts.vae, fakes.vae())

    # A decoder trained further is the run's own; another encoder is not.
    decoder = fakes.vae(1)
    decoder.encoder, decoder.quant_conv = fakes.vae().encoder, fakes.vae().quant_conv
    decoder.save_pretrained(tmp_path / "decoder")
    (copied / "config.yaml").write_text(yaml.safe_dump(fakes.config(model={"vae": str(tmp_path / "decoder")})))
    assert same(load_components(copied).vae, decoder)
    fakes.vae(1).save_pretrained(tmp_path / "other")
    (copied / "config.yaml").write_text(yaml.safe_dump(fakes.config(model={"vae": str(tmp_path / "other")})))
    with pytest.raises(UserError, match=r"wrong VAE: .* latents of another encoder .*other") as caught:
        load_components(copied)
    assert "\n" not in str(caught.value)

    path.write_text("{")
    with pytest.raises(UserError, match=r"trainer.json cannot be read"):
        load_components(copied)


def test_scheduler_config():
    made = scheduler_config(fakes.SCHEDULE, "v")
    assert made == {
        **fakes.SCHEDULE,
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def test_mistakes_are_named(run, base, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_components(tmp_path / "absent")
    with pytest.raises(
        UserError, match=f"a checkpoint of the run {run}, .* sample {run} --checkpoint step-00000020"
    ):
        load_components(run / "checkpoints" / "step-00000020")
    for load in (load_unet, load_text_encoder):
        with pytest.raises(UserError, match=f"{run}: this is a run, not a model: `finetune export {run} --format"):
            load(run)
    with pytest.raises(UserError, match="--revision v2: .* is here, and only models on the hub have revisions"):
        load_components(base, revision="v2")
    with pytest.raises(UserError, match="the name of the model is empty"):
        load_components("")
    with pytest.raises(UserError, match="no complete checkpoint of step 30; there are 20, 40"):
        load_components(run, step=30)
    with pytest.raises(UserError, match="is no run folder: it has no checkpoint of step 3"):
        load_components(base, step=3)
    with pytest.raises(UserError, match="is no run folder: it has no average ema:short"):
        load_components(base, weights="ema:short")
    with pytest.raises(UserError, match="step-00000040 has no average ema:short: choose ema or raw"):
        load_components(run, weights="ema:short")
    with pytest.raises(UserError, match="holds no U-Net"):
        load_components(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load_components(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(UserError, match="is no YAML"):
        load_components(tmp_path / "run")
    other = {"unet.x.lora_A.weight": torch.zeros(2, 3), "unet.x.lora_B.weight": torch.zeros(3, 2)}
    save_lora(tmp_path / "other", other, {"unet.x": 2.0})
    with pytest.raises(UserError, match="for another model"):
        load_components(base, loras=[(tmp_path / "other", 1.0)])


def test_what_is_missing_of_a_run_without_its_tokenizer_is_the_tokenizer(tmp_path):
    run = fakes.full_run(tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match="run has no tokenizer/ .*: put that folder back"):
        load_components(run)


@pytest.mark.parametrize("is_xl", [False, True])
def test_words_without_a_length_have_that_of_the_text_encoder(base, tmp_path, is_xl):
    """vocab.json and merges.txt say none: transformers takes 10^30, which the places of no encoder are."""
    model = fakes.tiny_sdxl(tmp_path / "xl") if is_xl else base
    save_tokenizer(fakes.tokenizer(), tmp_path / "words")
    for path in (tmp_path / "words").iterdir():
        if path.name not in ("vocab.json", "merges.txt"):
            path.unlink()
    made = fakes.config(model={"pretrained": str(model), "tokenizer": str(tmp_path / "words")})
    run = tmp_path / "run"
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (model / part).is_dir():
            shutil.copytree(model / part, run / "checkpoints" / "step-00000020" / "weights" / part)
    (run / "config.yaml").write_text(yaml.safe_dump(made))
    (run / "checkpoints" / "step-00000020" / "trainer.json").write_text(json.dumps({"format": 1, "step": 20}))
    text = load_components(run).text
    tokenizers = [text.tokenizer, *([text.tokenizer_2] if is_xl else [])]
    assert [tokenizer.model_max_length for tokenizer in tokenizers] == [12] * len(tokenizers)
    assert tokenize(tokenizers[-1], ["a red apple"]).shape == (1, 12)


@pytest.mark.parametrize(
    "more",
    [
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 8},  # diffusers' pipelines tell it the guidance (Meng et al. 2023, arXiv 2210.03142)
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
    ],
)
def test_a_unet_that_must_be_told_more_is_refused(base, tmp_path, more):
    shutil.copytree(base, tmp_path / "model")
    build_unet(fakes.UNET | more).save_pretrained(tmp_path / "model" / "unet")
    key, value = next(iter(more.items()))
    with pytest.raises(UserError, match=f"model: the U-Net has {key}={value}: it must be told more") as caught:
        load_components(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["models/tiny", "tiny"])
def test_a_run_that_names_a_relative_path_says_where_that_begins(base, tmp_path, monkeypatch, name):
    there, here = tmp_path / "there", tmp_path / "here"
    here.mkdir()
    shutil.copytree(base, there / name)
    fakes.lora_run(there / "run", base)
    (there / "run" / "config.yaml").write_text(
        yaml.safe_dump(fakes.config(model={"pretrained": name}, adapter={"kind": "lora"}))
    )
    monkeypatch.chdir(there)
    assert load_components(there / "run").lora is not None
    monkeypatch.chdir(here)
    says = f"{name} in {there}/run/config.yaml begins where the run was started"
    with pytest.raises(UserError, match=rf"no such folder.*; as a path, {says}"):
        load_components(there / "run")
