"""Overrides of `finetune autoencoder`: what they set, and the one line that a mistake gets."""

from __future__ import annotations

import pytest
import torch

from finetune import UserError
from finetune.autoencoder import config as schema
from finetune.autoencoder.build import build
from finetune.autoencoder.train import main
from finetune.config import groups
from finetune.help import defaults

CHOICES = groups(schema.NAME, schema.FOLDER)


def test_defaults_are_stable_diffusions_first_stage() -> None:
    config, _ = schema.load(["data.shards=x"])
    assert config.model.block_out_channels == [128, 256, 512, 512]
    assert config.model.latent_channels == 4
    assert config.loss.kl_weight == 1e-6


def test_the_command_line_wins_over_the_experiment_and_that_over_the_model() -> None:
    config, composed = schema.load(["experiment=emoji", "train.steps=7", "model.norm_num_groups=4"])
    assert config.train.steps == composed.train.steps == 7
    assert config.model.block_out_channels == [16, 16, 32]
    assert config.model.norm_num_groups == 4
    assert config.data.shards == "fluent-emoji"


@pytest.mark.parametrize(("factor", "channels"), [(2, 2), (4, 3), (8, 4), (16, 16), (32, 64)])
def test_models_have_the_latents_of_the_paper(factor: int, channels: int) -> None:
    """Rombach et al. 2022, table 8, the rows of KL kind: the best for each factor."""
    config, _ = schema.load(["data.shards=x", f"model=kl_f{factor}"])
    with torch.device("meta"):
        vae = build(config.model, seed=0)
        posterior = vae.encode(torch.empty(1, 3, 64, 96)).latent_dist
        decoded = vae.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, channels, 64 // factor, 96 // factor)
    assert decoded.shape == (1, 3, 64, 96)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "no value for data.shards: give data.shards=..."),
        (["data.shards=x", "trian.steps=3"], "unknown override 'trian.steps': did you mean 'train.steps'?"),
        (["data.shards=x", "model=kl_f3"], "model=kl_f3 is not known: did you mean kl_f32?"),
        (["data.shards=x", "train.steps=many"], "train.steps"),
        (["data.shards=x", "train.steps=0"], "train.steps=0 must be greater than 0"),
        (["data.shards=x", "train.steps=1,2"], "several values"),
        (["data.shards=x", "data.size=0"], "data.size=0 must be greater than 0"),
        (["data.shards=x", "data.cache_gib=-1"], "data.cache_gib=-1.0 must be a number of GiB"),
        (["data.shards=x", "data.cache_gib=inf"], "data.cache_gib=inf must be a number of GiB"),
        (["data.shards=x", "strategy=zero1", "strategy.offload=nvme"], "choose one of none, cpu"),
        (["data.shards=x", "train.device=tpu"], "train.device=tpu is not known: choose auto, cpu or cuda"),
        (["data.shards=x", "train.precision=fp16"], "choose one of fp32, bf16"),
        (["data.shards=x", "model.norm_num_groups=24"], "block_out_channels has 128"),
        (["data.shards=x", "loss.kl_weight=-1e-6"], "must not be negative"),
        (["data.shards=x", "loss.discriminator_weight=-1"], "discriminator_weight=-1.0 must not be negative"),
        (["data.shards=x", "loss.discriminator_start=9"], "discriminator_start=9, but there is no discriminator"),
        (
            ["data.shards=x", "loss.discriminator_weight=1", "loss.discriminator_start=9", "train.steps=9"],
            "discriminator_start=9 is not before train.steps=9",
        ),
        (["data.shards=x", "loss.discriminator_weight=1", "loss.discriminator_layers=0"], "must be greater than 0"),
        (["data.shards=x", "loss.discriminator_weight=1", "loss.discriminator_lr=0"], "must be greater than 0"),
        (["data.shards=x", "loss.discriminator_weight=1", "loss.discriminator_beta2=1"], "below 1"),
        (["data.shards=x", "loss.lpips_heads=y.pth"], "loss.lpips_heads=y.pth, but there is no LPIPS"),
        (["data.shards=x", "loss.lpips_weight=2"], "loss.lpips_weight=2.0, but there is no LPIPS"),
        (
            ["data.shards=x", "loss.lpips=y.pth", "loss.lpips_weight=0"],
            "loss.lpips_weight=0.0 must be greater than 0",
        ),
        (["data.shards=x", "train.decoder_only=true"], "train.decoder_only=true needs an encoder to keep"),
        (["data.shards=x", "checkpoint.memory_gib=1"], "unknown override 'checkpoint.memory_gib'"),
        (["data.shards=x", "this is no override"], "cannot read the override"),
        (["--steps", "3"], "unknown option --steps"),
        (["data.shards=x", "strategy=zero4"], "strategy=zero4 is not known: did you mean zero3?"),
        (
            ["data.shards=x", "strategy.reduce_dtype=bf16"],
            "strategy.reduce_dtype=bf16: gradients of a first stage",
        ),
        (
            ["data.shards=x", "strategy=zero3", "strategy.offload_path=/tmp"],
            "strategy.offload_path=/tmp: a first stage is not",
        ),
        (["data.shards=nowhere", "run.dir=unused"], "nowhere"),
    ],
)
def test_a_mistake_gets_one_line(
    overrides: list[str], line: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UserError) as caught:
        main(overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_names_every_key_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key, _ in defaults(schema.Config))
    assert all(choice in text for names in CHOICES.values() for choice in names)
