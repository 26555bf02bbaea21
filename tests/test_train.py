"""The training step against a reference, and runs that survive: exact resume, however samples are spread."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from finetune import build, distributed, loop, rng
from finetune.checkpoint import Checkpoints
from finetune.config import Config, compose, is_free_form
from finetune.data.loader import Data, readers
from finetune.distributed import World
from finetune.distributed.watch import Watch
from finetune.loop import Parts
from finetune.runs import changed_settings
from finetune.step import optimizer_step
from finetune.tracking import Tracker
from tests.conftest import environment, launch, launch_command, metrics, write_latents

ALONE = World(0, 1, 0, torch.device("cpu"))


def parts_of(overrides: list[str], *more: str) -> tuple[Config, Parts]:
    config, _ = compose("train", [*overrides, *more], Config)
    build.check(config)
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    return config, build.build(config, ALONE, run)


def step_of(config: Config, parts: Parts, loader_settings: dict[str, int] | None = None) -> float:
    """One optimizer step; the sum of losses."""
    settings = {"rank": 0, "world_size": 1} | (loader_settings or {})
    loader = parts.data.loader(seed=config.seed, micro_batch=parts.micro_batch, **settings)
    batches = iter(loader)
    result = optimizer_step(
        parts.strategy,
        parts.model.conditioner,
        batches,
        micro_batches=parts.accumulation,
        global_batch=config.train.global_batch,
        lr=1e-3,
        dropout=config.task.dropout,
        seed=config.seed,
        averages=[],
        images_seen=config.train.global_batch,
    )
    batches.close()
    loader.close()
    return float(result.loss_sum)


def gradients_of(config: Config, parts: Parts) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, as the optimizer is given them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(lr: float) -> object:
        seen.update({name: p.grad.clone() for name, p in parts.strategy.parameters.items()})
        return type("Stats", (), {"grad_norm": torch.zeros(())})

    parts.strategy.step = keep
    return step_of(config, parts) / config.train.global_batch, seen


def test_one_step_equals_a_reference_on_public_apis(pipeline, overrides):
    """Loss and every gradient, against diffusers' scheduler and U-Net and torch's mse_loss and autograd."""
    config, parts = parts_of(
        overrides,
        f"model.pretrained={pipeline}",
        "model.unet={}",
        "model.train_text_encoder=true",
        "train.micro_batch=4",
        "task.dropout=0.5",
    )
    loss, gradients = gradients_of(config, parts)

    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    text = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    data: Data = parts.data
    clock = torch.arange(8)
    rows = data.order.batch(0).rows
    ids = data.sources[0].training_ids(0, rows)
    samples = [data.sources[0].shards.read(int(i)) for i in ids]
    moments = torch.stack([torch.from_numpy(load_npy(sample["latent.npy"])).float() for sample in samples])
    mean, std = moments.chunk(2, dim=1)
    z = (mean + std * rng.normal(0, "posterior", clock, (4, 8, 8))) * 0.5  # the fixture's scaling factor
    noise = rng.normal(0, "noise", clock, (4, 8, 8))
    timesteps = rng.integers(0, "timestep", clock, 1000)
    which = rng.uniform(0, "caption", clock)
    dropped = rng.uniform(0, "caption-dropout", clock) < 0.5
    assert 0 < dropped.sum() < 8
    captions = [
        "" if drop else json.loads(data.sources[0].shards.read(int(i))["json"])["captions"][int(u * 2)]
        for i, u, drop in zip(ids, which, dropped, strict=True)
    ]
    tokens = tokenizer(captions, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    context = text(tokens.input_ids)[0]
    predicted = unet(scheduler.add_noise(z, noise, timesteps), timesteps, context).sample
    reference = torch.nn.functional.mse_loss(predicted, noise)
    reference.backward()

    assert loss == pytest.approx(reference.item(), rel=1e-5)
    named = {f"unet.{n}": p for n, p in unet.named_parameters()}
    named |= {f"text_encoder.{n}": p for n, p in text.named_parameters()}
    assert named.keys() == gradients.keys()
    for name, parameter in named.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5 * reference.item())


def load_npy(data: bytes):
    import io

    import numpy as np

    return np.load(io.BytesIO(data))


def test_accumulation_and_ranks_do_not_change_order_or_gradients(overrides):
    """1x8 equals 4x2 equals 8x1, and eight ranks of one sample together equal one rank of eight."""
    reference = None
    for micro in (8, 4, 2, 1):
        config, parts = parts_of(overrides, f"train.micro_batch={micro}", f"run.dir={overrides[2][8:]}{micro}")
        loss, gradients = gradients_of(config, parts)
        if reference is None:
            reference = loss, gradients
        assert loss == pytest.approx(reference[0], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, reference[1][name], rtol=1e-4, atol=1e-6)

    whole = [next(iter(parts.data.loader(seed=0, micro_batch=8)))]
    for world, micro in ((2, 4), (4, 1), (8, 1)):
        pieces = []
        for rank in range(world):
            loader = parts.data.loader(seed=0, rank=rank, world_size=world, micro_batch=micro)
            batches = iter(loader)
            pieces += [next(batches) for _ in range(8 // world // micro)]
            loader.close()
        assert torch.equal(torch.cat([b.sample_ids for b in pieces]), whole[0].sample_ids)
        assert torch.equal(torch.cat([b.clock for b in pieces]), whole[0].clock)
        assert [caption for b in pieces for caption in b.captions] == whole[0].captions


@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_gradients_over_real_ranks_equal_those_of_one(overrides, tmp_path, command, processes):
    """After one step AdamW's first moment is (1 - beta1) times the clipped gradient."""
    settings = [*overrides, "train.steps=1", "checkpoint.every=1"]
    assert command("train", *settings, f"run.dir={tmp_path / 'one'}")[0] == 0
    done = launch(processes, [*settings, f"run.dir={tmp_path / 'many'}"])
    assert done.returncode == 0, done.stderr[-4000:]
    file = "checkpoints/step-00000001/optimizer/exp_avg.safetensors"
    one, many = load_file(tmp_path / "one" / file), load_file(tmp_path / "many" / file)
    assert one.keys() == many.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, rtol=1e-5, atol=1e-7)
    assert metrics(tmp_path / "many")[0]["loss"] == pytest.approx(metrics(tmp_path / "one")[0]["loss"], rel=1e-6)


def test_latents_seen_have_the_mean_and_std_of_the_manifest(overrides, monkeypatch):
    from finetune import objective

    seen = []
    original = objective.sample_latents
    monkeypatch.setattr(objective, "sample_latents", lambda *args: seen.append(original(*args)) or seen[-1])
    config, parts = parts_of(overrides, "train.global_batch=80")
    step_of(config, parts)
    z = torch.cat(seen).double()
    stats = parts.data.sources[0].shards.manifest.latents
    assert len(z) == 80
    assert z.std().item() == pytest.approx(stats.std, rel=0.05)
    assert z.mean().item() == pytest.approx(stats.mean, abs=0.1 * stats.std)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(overrides, command, precision):
    losses = {}
    for kind in ("fp32", precision):
        run = f"{overrides[2]}-{kind}"
        assert command("train", *overrides, run, f"train.precision={kind}", "train.steps=6") == (0, "")
        losses[kind] = [line["loss"] for line in metrics(Path(run[8:]))]
    assert losses[precision] != losses["fp32"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.03)


def test_gradient_checkpointing_changes_memory_not_gradients(overrides):
    plain = gradients_of(*parts_of(overrides))
    config, parts = parts_of(overrides, "model.gradient_checkpointing=true")
    assert any(getattr(m, "gradient_checkpointing", False) for m in parts.model.unet.modules())
    loss, gradients = gradients_of(config, parts)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_skipped(overrides):
    config, parts = parts_of(overrides)
    before = [shard.master.clone() for shard in parts.strategy.shards]
    first = next(iter(parts.strategy.parameters.values()))
    first.register_hook(lambda gradient: gradient * float("nan"))
    step_of(config, parts)
    assert all(torch.equal(a, s.master) for a, s in zip(before, parts.strategy.shards, strict=True))
    assert parts.strategy.steps_taken == 0


# --- resume ---------------------------------------------------------------------------------------


def same_files(one: Path, other: Path) -> None:
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*.safetensors"))
    assert names
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*.safetensors"))
    for name in names:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            assert torch.equal(tensor, right[key]), (name, key)


def kill_at(line: int, processes: int, run: Path, overrides: list[str], log: Path) -> None:
    """Start a run and SIGKILL all of its processes once its log has `line` lines."""
    with log.open("a") as out:
        child = subprocess.Popen(launch_command(processes, overrides), env=environment(), stdout=out, stderr=out)
    file = run / "metrics.jsonl"
    while child.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= line:
            break
        time.sleep(0.005)
    assert child.poll() is None, log.read_text()
    # torchrun gives its workers sessions of their own: a launcher's death alone would leave them running.
    for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    child.wait()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_restarted_ends_bit_identical(overrides, tmp_path, processes):
    """SIGKILL at random steps, then the same command: weights, EMA, moments and log of the undisturbed run."""
    settings = [*overrides, "train.steps=12", "checkpoint.every=5", "checkpoint.keep=9", "train.micro_batch=2"]
    settings += ["validation.every=6", "sample.every=12", "sample.steps=2"]
    settings += ["ema.sigma_rels=[0.1]", "ema.snapshot_every=3"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    done = launch(processes, [*settings, f"run.dir={calm}"])
    assert done.returncode == 0, done.stderr
    chance = random.Random(processes)
    for line in sorted(chance.sample(range(1, 11), 2)):
        kill_at(line, processes, rough, [*settings, f"run.dir={rough}"], tmp_path / "log")
    done = launch(processes, [*settings, f"run.dir={rough}"])
    assert done.returncode == 0, done.stderr
    assert metrics(rough) == metrics(calm)
    assert len([line for line in metrics(calm) if "loss" in line]) == 12
    for step in (5, 10, 12):
        name = Path("checkpoints") / f"step-{step:08d}"
        same_files(calm / name, rough / name)
    assert sorted(os.listdir(rough / "snapshots")) == [f"step-{step:08d}" for step in (3, 6, 9, 12)]
    for name in os.listdir(calm / "snapshots"):
        same_files(calm / "snapshots" / name, rough / "snapshots" / name)
    picture = Path("samples") / "step-00000012.png"
    assert (calm / picture).read_bytes() == (rough / picture).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_thirty_kills_lose_nothing_and_repeat_nothing(overrides, tmp_path):
    """Two ranks on three uneven shards, SIGKILLed while they start, train and save: the undisturbed run's bits."""
    settings = [*overrides, "train.steps=120", "checkpoint.every=2", "validation.samples=8"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert launch(2, [*settings, f"run.dir={calm}"]).returncode == 0
    chance = random.Random(7)
    for _ in range(30):
        log = rough / "metrics.jsonl"
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        kill_at(min(lines + chance.randint(0, 6), 118), 2, rough, [*settings, f"run.dir={rough}"], tmp_path / "log")
    done = launch(2, [*settings, f"run.dir={rough}"])
    assert done.returncode == 0, done.stderr
    assert metrics(rough) == metrics(calm)
    same_files(calm / "checkpoints/step-00000120", rough / "checkpoints/step-00000120")


def test_a_broken_checkpoint_is_passed_over_and_the_run_still_ends_the_same(overrides, tmp_path, command):
    settings = [*overrides, "train.steps=6", "checkpoint.every=2", "checkpoint.keep=9"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command("train", *settings, f"run.dir={calm}")[0] == 0
    shutil.copytree(calm, rough)
    shutil.rmtree(rough / "checkpoints/step-00000006")
    victim = rough / "checkpoints/step-00000004/ema/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match="passing over the broken checkpoint .*step-00000004.*checksum"):
        assert command("train", *settings, f"run.dir={rough}")[0] == 0
    same_files(calm / "checkpoints/step-00000006", rough / "checkpoints/step-00000006")
    assert metrics(calm) == metrics(rough)


def test_checkpoints_are_pruned_and_leave_nothing_half_written(overrides, tmp_path, command):
    assert command("train", *overrides, "train.steps=5", "checkpoint.every=1", "checkpoint.keep=2")[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000005"]


def test_a_save_under_way_knows_of_no_later_losses(overrides, command: Command, monkeypatch) -> None:
    begin, saves = Checkpoints.begin, []
    monkeypatch.setattr(
        Checkpoints,
        "begin",
        lambda self, progress, *a, **k: (saves.append(progress), begin(self, progress, *a, **k)),
    )
    assert command("train", *overrides, "train.steps=5", "checkpoint.every=1", "tracker.every=4")[0] == 0
    assert [len(save.open_losses) for save in saves] == [1, 2, 3, 0]


def test_a_kill_while_saving_leaves_the_checkpoints_before(overrides, tmp_path, command, monkeypatch):
    from finetune.checkpoint import checkpoints

    class KilledError(Exception):
        pass

    def die(*args: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sum_files", die)
        with pytest.raises(KilledError):
            command("train", *overrides, "checkpoint.every=2")
    folder = tmp_path / "run" / "checkpoints"
    (left,) = os.listdir(folder)
    assert left.startswith(".tmp-step-00000002")
    assert command("train", *overrides)[0] == 0
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000004"]


def test_lora_resumes_exactly_and_trains_the_adapter_alone(pipeline, overrides, tmp_path, command):
    settings = [*overrides, f"model.pretrained={pipeline}", "model.unet={}", "adapter=lora", "adapter.rank=2"]
    settings += ["adapter.dropout=0.1", "model.train_text_encoder=true", "adapter.alpha=3", "train.steps=6"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command("train", *settings, f"run.dir={calm}")[0] == 0
    assert command("train", *settings, f"run.dir={rough}", "train.steps=4")[0] == 0
    assert command("train", *settings, f"run.dir={rough}")[0] == 0
    same_files(calm / "checkpoints/step-00000006", rough / "checkpoints/step-00000006")
    weights = load_file(calm / "checkpoints/step-00000006/weights/pytorch_lora_weights.safetensors")
    assert all(".lora_" in key for key in weights)
    assert {key.split(".")[0] for key in weights} == {"unet", "text_encoder"}
    assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if ".lora_B." in key)


@pytest.mark.parametrize("place", ["pipe", "/dev/full"])
def test_a_run_outlives_who_reads_its_output(overrides, tmp_path, place):
    """`finetune train ... 2>&1 | head` ended with exit code 0, and nothing was trained."""
    with Path(os.devnull if place == "pipe" else place).open("w") as full:
        where = subprocess.PIPE if place == "pipe" else full
        words = launch_command(1, [*overrides, "train.steps=2"])
        started = subprocess.Popen(words, env=environment(), stdout=where, stderr=where)
    for pipe in filter(None, (started.stdout, started.stderr)):
        pipe.close()
    assert started.wait(timeout=120) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/checkpoints/step-00000002/trainer.json").is_file()


def test_an_end_that_cannot_be_saved_is_no_success(overrides, tmp_path, command: Command, monkeypatch):
    """Weights are not finite numbers after the first step."""

    def step_and_spoil(strategy, *args, **named):
        result = optimizer_step(strategy, *args, **named)
        strategy.shards[0].master.data.fill_(float("nan"))
        return result

    monkeypatch.setattr(loop, "optimizer_step", step_and_spoil)
    code, line = command("train", *overrides, "train.steps=3", "checkpoint.every=2")
    assert code == 2 and "the run's end is not saved, its weights are not finite numbers at step 3" in line, line
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_end_after_steps_without_a_loss_is_saved_and_no_success(overrides, tmp_path, command: Command):
    """Weights are finite, and of no use after the first step."""
    code, line = command("train", *overrides, "train.steps=3", "checkpoint.every=1", "optim.lr=1e14")
    assert code == 2 and "is saved, but the loss of its last 2 steps is not a finite number" in line, line
    names = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert names == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_whose_gradients_are_never_finite_is_no_success(overrides, tmp_path, command, monkeypatch, precision):
    """It ended with exit code 0, and fp16's loss scale fell to 0, with which the next start ruined all weights."""
    start = distributed.DataParallel.__init__

    def start_broken(strategy, *args, **named):
        start(strategy, *args, **named)
        next(iter(strategy.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(distributed.DataParallel, "__init__", start_broken)
    code, line = command("train", *overrides, "train.steps=20", f"train.precision={precision}")
    assert code == 2 and "no step has changed a weight, since gradients were never finite numbers" in line, line
    saved = json.loads((tmp_path / "run/checkpoints/step-00000020/trainer.json").read_text())
    assert saved["loss_scale"].get("scale", 1.0) == 1.0


def test_lack_of_memory_is_told_to_the_other_ranks(overrides, command, monkeypatch):
    """They took this rank for killed or cut off."""
    told: list[BaseException] = []

    def fill(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(build, "build", fill)
    monkeypatch.setattr(Watch, "judge", lambda self, error: told.append(error))
    code, line = command("train", *overrides)
    assert code == 2 and "the device's memory is full" in line, line
    assert isinstance(told[0], torch.OutOfMemoryError)


def test_a_broken_sample_in_the_last_step_costs_that_step_alone(overrides, tmp_path, command, monkeypatch):
    """The same command would come to it again and again."""
    original = readers.read_batch

    def read_batch(*args, **named):
        batch = original(*args, **named)
        if int(batch.clock.max()) >= 3 * 8:  # of the fourth step
            batch.moments[0] = float("inf")
        return batch

    settings = [*overrides, "train.global_batch=8", "train.steps=4", "validation.every=0", "sample.every=0"]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command("train", *settings, f"run.dir={calm}", "checkpoint.every=3")[0] == 0
    monkeypatch.setattr(readers, "read_batch", read_batch)
    assert command("train", *settings, f"run.dir={rough}", "checkpoint.every=4")[0] == 0
    assert metrics(rough)[-1]["loss"] is None
    ends = calm / "checkpoints/step-00000003", rough / "checkpoints/step-00000004"
    one, other = (load_file(end / "optimizer/exp_avg.safetensors") for end in ends)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_says_so_and_more_steps_go_on(overrides, tmp_path, command, capsys):
    assert command("train", *overrides)[0] == 0
    before = metrics(tmp_path / "run")
    assert command("train", *overrides)[0] == 0
    assert metrics(tmp_path / "run") == before
    assert command("train", *overrides, "train.steps=6")[0] == 0
    assert metrics(tmp_path / "run")[: len(before)] == before
    assert metrics(tmp_path / "run")[-1]["step"] == 6


# --- mistakes -------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["trian.steps=3"], "unknown override 'trian.steps': did you mean 'train.steps'?"),
        (["strategy=zero4"], "choose one of ddp, zero1, zero2, zero3, zero3_offload"),
        (["train.steps=many"], "train.steps"),
        (["train.steps=0"], "train.steps=0 must be greater than 0"),
        (["data.shards=/nowhere"], "no folder of shards at /nowhere"),
        (["train.global_batch=500"], "no bucket holds one global batch"),
        (["train.micro_batch=3"], "train.micro_batch=3 does not divide"),
        (["sample.every=1", "sample.prompts=[]"], "sample.prompts is empty"),
        (["sample.every=1", "sample.height=30"], "height 30 is no multiple of 8"),
        (["adapter=lora"], "adapter=lora adapts a pretrained model"),
        (["train.precision=int8"], "train.precision=int8 is not known: choose one of auto, fp32, bf16, fp16"),
        (["model.pretrained=/nowhere/at/all"], "/nowhere/at/all"),
        (["model.unet.in_channels=9"], "takes 9 channels, the shards hold latents of 4"),
        (["model.unet.num_class_embeds=10"], "the U-Net has num_class_embeds=10: it must be told more"),
        (
            ["model.unet.class_embed_type=timestep"],
            "class_embed_type=timestep: it must be told more than task=text",
        ),
        (
            [
                "model.unet.addition_embed_type=text_time",
                "model.unet.addition_time_embed_dim=8",
                "model.unet.projection_class_embeddings_input_dim=64",
            ],
            "addition_embed_type=text_time: it must be told more",
        ),
        (["train.device=cuda"], "torch sees no GPU"),
        (["--stpes", "3"], "unknown option --stpes"),
    ],
)
def test_mistakes_get_one_line(overrides, command: Command, more, says):
    code, line = command("train", *overrides, *more)
    assert code == 2
    assert says in line


def test_shards_are_mandatory(command: Command):
    code, line = command("train", "experiment=smoke")
    assert (code, "give data.shards=" in line) == (2, True)


def test_a_model_that_is_not_there_is_named_as_it_was_given(overrides, command: Command):
    code, line = command("train", *overrides, "model.pretrained=/nope")
    assert code == 2
    assert "model.pretrained=/nope: no autoencoder there (no such folder: /nope): give a diffusers pipeline" in line


def test_another_autoencoder_than_the_shards_is_refused(pipeline, overrides, tmp_path, command: Command):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    with torch.no_grad():
        next(vae.encoder.parameters()).mul_(2)
    vae.save_pretrained(tmp_path / "other")
    code, line = command("train", *overrides, f"model.vae={tmp_path / 'other'}")
    assert code == 2
    assert "wrong VAE" in line


def test_a_run_folder_in_use_is_refused(overrides, tmp_path, command: Command):
    from finetune.checkpoint import RunFolder

    folder = RunFolder(tmp_path / "run")
    code, line = command("train", *overrides)
    assert code == 2
    assert f"in use by process {os.getpid()}" in line
    folder.close()
    assert command("train", *overrides)[0] == 0


def test_a_run_that_would_not_be_the_same_is_refused(overrides, command: Command):
    assert command("train", *overrides)[0] == 0
    code, line = command("train", *overrides, "train.global_batch=4")
    assert code == 2
    assert "train.global_batch was 8 and is 4 now" in line
    code, line = command("train", *overrides, "checkpoint.resume=never")
    assert code == 2
    assert "choose another run.dir" in line


def test_a_set_without_captions_is_no_surprise(overrides, pipeline, tmp_path, command: Command, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Tracker, "say", lambda self, line: said.append(line))
    latents = write_latents(tmp_path / "latents", pipeline, texts=())
    assert command("train", *overrides, "train.steps=1", f"data.shards={latents}")[0] == 0
    assert any("none of the 8 held-out samples has a caption" in line for line in said), said


def test_settings_that_have_changed_are_named(overrides, command: Command, monkeypatch):
    """A slip in the second command was taken without a word."""
    said: list[str] = []
    monkeypatch.setattr(Tracker, "say", lambda self, line: said.append(line))
    assert command("train", *overrides, "train.steps=2")[0] == 0
    for steps in (4, 6):
        told = len(said)
        assert command("train", *overrides, f"train.steps={steps}", "optim.lr=3e-4", "data.prefetch=2")[0] == 0
        notes = [line for line in said[told:] if "settings since" in line]
        wanted = "note: settings since the last start: optim.lr was 0.001, is 0.0003; data.prefetch was 8, is 2"
        assert notes == ([wanted] if steps == 4 else [])


def test_settings_that_a_user_made_or_that_end_a_schedule_are_named(tmp_path):
    def composed(*overrides):
        return compose("train", ["model=tiny", "data.shards=x", *overrides], Config)[1]

    def changed(now):
        return changed_settings(tmp_path, now, partial(is_free_form, schema=Config))

    ratios = composed("optim.lr_ratios.up_blocks=0.5", "optim.lr_ratios.mid_block=0.1")
    OmegaConf.save(ratios, tmp_path / "config.yaml")
    assert changed(ratios) == changed(composed("optim.lr_ratios={mid_block: 0.1, up_blocks: 0.5}")) == []
    assert changed(composed("optim.lr_ratios.up_blocks=0.5")) == ["optim.lr_ratios.mid_block was 0.1, is not set"]
    OmegaConf.save(composed("optim.schedule=cosine", "train.steps=20"), tmp_path / "config.yaml")
    assert changed(composed("optim.schedule=cosine", "train.steps=40")) == ["train.steps was 20, is 40"]
    assert changed(composed("train.steps=40")) == ["optim.schedule was cosine, is constant"]
    more = composed("optim.schedule=cosine", "train.steps=20", "ema.halflives_images.long=9")
    assert changed(more) == ["ema.halflives_images.long was not set, is 9"]


@pytest.mark.parametrize("is_own", [False, True], ids=["of another run", "of this run"])
def test_the_same_command_goes_on_from_what_came_of_a_named_checkpoint(
    overrides, tmp_path, command: Command, monkeypatch, is_own
):
    """Else a job that is requeued would begin at the named one each time, and remove what it had done."""
    assert command("train", *overrides, "train.steps=4", "checkpoint.every=2")[0] == 0
    named = tmp_path / "run/checkpoints/step-00000002"
    again = [*overrides, f"checkpoint.resume={named}", "checkpoint.keep=1"]
    restored: list[Path] = []
    said: list[str] = []
    monkeypatch.setattr(Tracker, "say", lambda self, line: said.append(line))
    real = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, path, *more: restored.append(path) or real(self, path, *more)
    )
    run = tmp_path / "run" if is_own else tmp_path / "new"
    for steps, begins in (5, named), (7, run / "checkpoints/step-00000005"):
        assert command("train", *again, f"run.dir={run}", f"train.steps={steps}")[0] == 0
        assert restored.pop() == begins
    assert [line for line in said if "after it" in line] == is_own * [
        "note: the checkpoints after it (step 4) are removed at the next save: move away what is to be kept"
    ]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 7


def test_a_named_checkpoint_does_not_begin_in_the_folder_of_another_run(overrides, tmp_path, command: Command):
    """Its checkpoints were removed at the first save: a run.dir that was left as it was lost all of them."""
    for name in ("mine", "other"):
        assert command("train", *overrides, f"run.dir={tmp_path / name}", "train.steps=2")[0] == 0
    mine = tmp_path / "mine/checkpoints/step-00000002"
    again = [f"run.dir={tmp_path / 'other'}", f"checkpoint.resume={mine}", "train.steps=3"]
    code, line = command("train", *overrides, *again)
    assert code == 2 and f"has checkpoints that did not come of checkpoint.resume={mine} (up to step 2)" in line
    assert [path.name for path in (tmp_path / "other/checkpoints").iterdir()] == ["step-00000002"]


def test_a_full_device_ends_in_one_line(overrides, command: Command, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(loop, "optimizer_step", full)
    code, line = command("train", *overrides)
    assert code == 2
    assert "memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.): lower train.micro_batch" in line


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(
    overrides, tmp_path, command: Command, monkeypatch
):
    original = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if "step-00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    code, line = command("train", *overrides)
    assert code == 2
    assert "cannot save" in line
    assert "No space left on device" in line
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000002"]


def test_a_run_says_which_settings_have_no_effect(overrides, command, monkeypatch):
    said = []
    monkeypatch.setattr(Tracker, "say", lambda self, line: said.append(line))
    assert command("train", *overrides, "train.steps=1", "data.cache_gib=5") == (0, "")
    assert [line for line in said if "no effect" in line] == [
        "note: no effect of data.cache_gib: all shards are on this machine"
    ]
