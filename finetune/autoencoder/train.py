"""`finetune autoencoder`: train the first stage on image shards.

A run is a pure function of (config, clock): data order, mirroring and posterior noise are drawn by images seen, so
the same command after a kill goes on as if nothing had happened, and on however many processes: torchrun's, say.
Each takes its share of every batch and keeps all of model and optimizer, as data parallelism does: models of this
size need no sharding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import UserError, by_all

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import VQModel
    from torch import Tensor

    from finetune.autoencoder.bottleneck import PenaltyWeights
    from finetune.autoencoder.config import AutoencoderConfig, Config
    from finetune.autoencoder.discriminator import Adversary
    from finetune.autoencoder.features import FeatureNetwork
    from finetune.autoencoder.lpips import Lpips
    from finetune.autoencoder.pictures import Pictures
    from finetune.data.order import Order
    from finetune.distributed import World
    from finetune.models.autoencoder import FirstStage

# What a run may change when it goes on: none of these moves a weight that is already trained.
MAY_CHANGE = ("run", "checkpoint", "sample", "tracker", "scale", "eval")
# Pictures and weights are known by their checksums, not by where they lie.
MAY_CHANGE_KEYS = (
    *("train.steps", "train.threads", "train.device", "data.cache_gib", "data.readers", "data.shards"),
    *("model.pretrained", "loss.lpips", "loss.lpips_heads"),
)

USAGE = """\
usage: finetune autoencoder [KEY=VALUE ...]

Train an autoencoder (the first stage) on image shards; the result is RUN/vae, in the diffusers layout.
The same command goes on where an earlier one stopped.

examples:
  data-tools ingest folder pictures/ --out shards/
  finetune autoencoder data.shards=shards run.dir=runs/vae
  finetune autoencoder data.shards=shards run.dir=runs/vae model=kl_f4 data.size=256 train.steps=50000
  finetune autoencoder data.shards=shards run.dir=runs/vq model=vq_f4 data.size=256
  finetune autoencoder data.shards=shards loss.discriminator_weight=0.5 loss.discriminator_start=5000
  finetune autoencoder data.shards=shards model.pretrained=runs/vae/vae train.decoder_only=true run.dir=runs/decoder
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards train.global_batch=64 run.dir=runs/vae
  finetune autoencoder experiment=emoji data.shards=data_tools/emoji/fluent-emoji run.dir=runs/emoji-vae
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with Hydra overrides; returns the exit code.

    Raises:
        UserError: a mistake in the overrides, the shards or the run folder.
    """
    from finetune.autoencoder import config as schema
    from finetune.config import describe
    from finetune.terminal import speak_in_turn

    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{USAGE}\n{describe(schema.NAME, schema.Config, schema.FOLDER)}")
        return 0
    if options := [argument for argument in argv if argument.startswith("-")]:
        raise UserError(f"unknown option {options[0]}: settings are given as KEY=VALUE, without dashes")
    if wanted := [argument for argument in argv if argument.startswith("strategy=")]:
        raise UserError(
            f"{wanted[0]}: models of this size are trained by data parallelism alone, which torchrun starts; "
            "leave it out"
        )
    return speak_in_turn(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from finetune.autoencoder import config as schema
    from finetune.terminal import quiet_libraries

    config, composed = schema.load(argv)
    quiet_libraries()
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    train(config, {str(key): value for key, value in settings.items()}, OmegaConf.to_yaml(composed))
    return 0


def build(model: AutoencoderConfig, seed: int) -> FirstStage:
    """An `AutoencoderKL`, or with `codebook_size` a `VQModel`, with initial weights drawn from `seed` alone.

    Convolutions keep the variance of what comes in (std = 1 / sqrt(fan-in); LeCun et al. 1998, "Efficient
    BackProp", section 4.6) and residual branches start at zero (Goyal et al. 2017, arXiv 1706.02677, section
    5.1). From torch's and diffusers' own initial weights a short run ends several dB of PSNR lower.
    """
    import torch
    from diffusers import AutoencoderKL, VQModel
    from diffusers.models.resnet import ResnetBlock2D

    from finetune import rng

    levels = len(model.block_out_channels)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # layers draw from torch's global generator
        torch.manual_seed(rng.fold(seed, "first stage weights"))
        shape: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": tuple(model.block_out_channels),
            "layers_per_block": model.layers_per_block,
            "latent_channels": model.latent_channels,
            "norm_num_groups": model.norm_num_groups,
            "mid_block_add_attention": model.mid_block_add_attention,
            "force_upcast": False,
        }
        vae: FirstStage
        if model.codebook_size is None:
            vae = AutoencoderKL(**shape)
        else:
            vae = VQModel(**shape, vq_embed_dim=model.latent_channels, num_vq_embeddings=model.codebook_size)
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
        if isinstance(vae, AutoencoderKL):
            vae.quant_conv.bias[model.latent_channels :] = model.initial_logvar
    return vae


def load_given(model: AutoencoderConfig) -> tuple[FirstStage, str]:
    """The autoencoder `model.pretrained` in float32, all of it to be trained, and the sha256 of its weights.

    Raises:
        UserError: it can't be loaded, or `model` asks for another shape than it has.
    """
    from finetune.autoencoder.config import AutoencoderConfig
    from finetune.models.autoencoder import Pixels, load_autoencoder
    from finetune.models.sources import weights_sha256

    assert model.pretrained is not None
    vae, default = load_autoencoder(model.pretrained), AutoencoderConfig()
    if isinstance(vae, Pixels):
        raise UserError(f"model.pretrained={model.pretrained} are pixels without an autoencoder: none to train")
    has = {**vae.config, "codebook_size": vae.config.get("num_vq_embeddings")}
    for name, value in vars(model).items():
        if name in has and value not in (getattr(default, name), (given := _plain(has[name]))):
            raise UserError(
                f"model.{name}={value}, but {model.pretrained} has {given}: leave it out, the given shape is kept"
            )
    vae.register_to_config(_name_or_path="")  # diffusers would write where it lay into RUN/vae
    return vae.requires_grad_(True), weights_sha256(vae.state_dict())


def keep_latents(vae: FirstStage) -> None:
    """Freeze what latents come from, the encoder and `quant_conv`; decoder and codebook stay to be trained."""
    vae.encoder.requires_grad_(False)
    if vae.quant_conv is not None:
        vae.quant_conv.requires_grad_(False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _trained(vae: FirstStage) -> list[Tensor]:
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


def step_once(
    vae: FirstStage,
    optimizer: torch.optim.Optimizer,
    image_B3HW: Tensor,
    eps_BCHW: Tensor | None,
    *,
    penalty: PenaltyWeights,
    max_grad_norm: float,
    bf16: bool,
    lpips: Lpips | None = None,
    lpips_weight: float = 1.0,
    adversary: Adversary | None = None,
    world: World | None = None,
) -> dict[str, Tensor]:
    """One step of the autoencoder, and then one of the discriminator on the same reconstructions, if there is one.

    Returns:
        Detached scalars: loss (what was minimised), l1, the penalty's terms, lpips (batch means), gradient norm;
        with a discriminator its loss, the loss that it gives to the autoencoder, and that one's weight. With a
        codebook `uses_K` too, [K]: how often each entry was used. Of several processes (`world`) each returns its
        share, which `_of_all` sums.
    """
    import torch

    from finetune.autoencoder import bottleneck
    from finetune.autoencoder.loss import adaptive_weight, first_stage_loss, generator_loss
    from finetune.autoencoder.together import sum_gradients

    with torch.autocast(image_B3HW.device.type, torch.bfloat16, enabled=bf16):
        passed = bottleneck.run(vae, image_B3HW, eps_BCHW, penalty)
    recon_B3HW = passed.recon.float()
    processes = 1 if world is None else world.size
    distance_B = None if lpips is None else lpips(image_B3HW, recon_B3HW, bf16)
    loss = first_stage_loss(image_B3HW, recon_B3HW, passed.penalty, distance_B, lpips_weight)
    total = loss.total.mean() / processes
    judged: dict[str, Tensor] = {} if distance_B is None else {"lpips": distance_B.detach().mean() / processes}
    if adversary is not None:
        adversarial = generator_loss(adversary.judge(recon_B3HW, bf16)) / processes
        weight = adversary.weight * adaptive_weight(
            loss.reconstruction.mean() / processes,
            adversarial,
            vae.decoder.conv_out.weight,
            whole=(lambda gradient: gradient) if world is None else world.sum_,
        )
        total = total + weight * adversarial
        judged |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
    optimizer.zero_grad(set_to_none=True)
    total.backward(inputs=_trained(vae))  # not the discriminator's: this step is not its own
    if world is not None:
        sum_gradients(_trained(vae), world)
    grad_norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), max_grad_norm or math.inf)
    optimizer.step()
    if adversary is not None:
        judged["discriminator"] = adversary.learn(image_B3HW, recon_B3HW, max_grad_norm=max_grad_norm, bf16=bf16)
    parts = {"l1": loss.l1.detach().mean() / processes}
    parts |= {name: term_B.mean() / processes for name, term_B in passed.terms.items()}
    if passed.uses is not None:
        parts["uses_K"] = passed.uses
    return {"loss": total.detach(), **parts, **judged, "grad_norm": grad_norm.detach()}


def _of_all(values: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What `step_once` returned, of the global batch: shares are summed over processes."""
    from finetune.autoencoder.together import sum_tensors

    sum_tensors([value for name, value in values.items() if name not in ("grad_norm", "adversarial_weight")], world)
    return values


def build_lpips(
    config: Config, device: torch.device, say: Callable[[str], None] = print
) -> tuple[Lpips | None, str | None]:
    """LPIPS with the weights that `config.loss` names, and their sha256; without any a line says that it is off."""
    from finetune.autoencoder.lpips import Lpips, read_lpips
    from finetune.models.sources import weights_sha256

    if config.loss.lpips is None:
        say("LPIPS is off: with loss.lpips=FILE (VGG16 and LPIPS's heads) reconstructions get sharper")
        return None, None
    weights = read_lpips(config.loss.lpips, config.loss.lpips_heads)
    return Lpips(weights).to(device), weights_sha256(weights)


def build_features(config: Config, pictures: Pictures, device: torch.device) -> FeatureNetwork | None:
    """The network whose features rFID compares; without one a line says that it is off.

    Raises:
        UserError: it can't be used, or too few pictures are held out for any distance.
    """
    from finetune.autoencoder.features import FeatureNetwork

    if config.eval.features is None:
        print("rFID is off: with eval.features=FILE (TorchScript: pictures to features) it is measured at the end")
        return None
    network = FeatureNetwork(config.eval.features, device, pictures.buckets[0])
    count = sum(map(len, pictures.held_out_ids))
    if count < 2:
        raise UserError(
            f"eval.features needs two held-out pictures or more, and there is {count}: raise data.held_out (a "
            "tenth of the set at most)"
        )
    if count <= network.width:  # below it covariances are singular, and the distance grows as pictures get fewer
        print(
            f"warning: rFID of {count} pictures in {network.width} features can only be compared with that of as "
            "many: raise data.held_out",
            file=sys.stderr,
        )
    return network


def build_adversary(config: Config, world: World) -> Adversary | None:
    """The discriminator that `config.loss` asks for, or None."""
    import torch

    from finetune.autoencoder.discriminator import Adversary, PatchDiscriminator

    loss, optim = config.loss, config.optim
    if loss.discriminator_weight == 0:
        return None
    shape = loss.discriminator_layers, loss.discriminator_width
    model = PatchDiscriminator(*shape, seed=config.seed, world=world).to(world.device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=loss.discriminator_lr or optim.lr,
        betas=(loss.discriminator_beta1, loss.discriminator_beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    return Adversary(model, optimizer, loss.discriminator_weight, world)


def require_room(config: Config, shortest: int) -> None:
    """Refuse pictures whose shortest side, in pixels, is too short for what the loss asks for.

    Raises:
        UserError: LPIPS or the discriminator needs larger ones.
    """
    from finetune.autoencoder.discriminator import smallest_side
    from finetune.autoencoder.lpips import SMALLEST_SIDE

    loss = config.loss
    if loss.lpips is not None and shortest < SMALLEST_SIDE:
        raise UserError(
            f"loss.lpips needs sides of {SMALLEST_SIDE} pixels at least, and the shortest of these pictures "
            f"has {shortest}; leave it out or give larger ones"
        )
    needed = smallest_side(loss.discriminator_layers)
    if loss.discriminator_weight and shortest < needed:
        raise UserError(
            f"loss.discriminator_layers={loss.discriminator_layers} needs sides of {needed} pixels "
            f"at least, and the shortest of these pictures has {shortest}; lower it or give larger ones"
        )


def train(config: Config, settings: Mapping[str, Any], yaml: str) -> Path:
    """Join the other processes, if there are any, and train together; see `_train`."""
    from finetune import distributed, is_by_all

    world = distributed.start(config.train.device, uses_deepspeed=False)
    try:
        if config.train.global_batch % world.size:
            raise by_all(
                UserError(
                    f"train.global_batch={config.train.global_batch} cannot be shared equally by {world.size} "
                    "processes; give a multiple"
                )
            )
        return _train(config, settings, yaml, world)
    except BaseException as error:
        if is_by_all(error):  # leaving a group whose members are gone may take forever
            distributed.stop()
        raise


def _train(config: Config, settings: Mapping[str, Any], yaml: str, world: World) -> Path:
    """Train as `config` says, from the last checkpoint of its run folder if there is one; returns RUN/vae.

    Args:
        settings: the same config as nested plain values; checkpoints keep what the run depends on.
        yaml: the same config as text, for RUN/config.yaml.
    """
    import torch
    from diffusers import VQModel

    from finetune import distributed
    from finetune.autoencoder import checkpoint
    from finetune.autoencoder.config import require_penalty
    from finetune.autoencoder.pictures import Pictures
    from finetune.checkpoint import RunFolder, require_same, require_shared
    from finetune.data.order import Order, Source
    from finetune.data.shards import write_atomic
    from finetune.models.autoencoder import downsample_factor

    run = Path(config.run.dir)
    device = world.device
    say: Callable[[str], None] = print if world.is_main else lambda line: None
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    batch = config.train.global_batch
    pretrained_sha256 = None
    if config.model.pretrained is None:
        vae = build(config.model, config.seed)
    else:
        vae, pretrained_sha256 = load_given(config.model)
    require_penalty(config.loss, isinstance(vae, VQModel), f"the {type(vae).__name__} that is trained")
    if config.train.decoder_only:
        keep_latents(vae)
    pictures = Pictures(
        config.data.shards,
        size=config.data.size,
        held_out=config.data.held_out,
        seed=config.seed,
        multiple=downsample_factor(vae),
        cache_bytes=int(config.data.cache_gib * 2**30),
        readers=config.data.readers,
    )
    with closing(pictures), contextlib.ExitStack() as stack:
        require_room(config, min(map(min, pictures.buckets)))
        # What is measured is measured by rank 0, which writes too: its folder's lock stays with it.
        of_main: list[FeatureNetwork | None] = []
        world.on_main(lambda: of_main.append(build_features(config, pictures, device)))
        folders: list[RunFolder] = []
        world.on_main(lambda: folders.append(RunFolder(run)))
        for held in folders:
            stack.enter_context(closing(held))
        require_shared(world, run)
        order = Order([Source(pictures.shard_sizes)], seed=config.seed, global_batch=batch)
        for name in ("samples", "checkpoints") if world.is_main else ():
            (run / name).mkdir(exist_ok=True)

        vae = vae.to(device)
        if config.train.channels_last:
            vae = vae.to(memory_format=torch.channels_last)
        if config.model.pretrained is None:
            vae.register_to_config(sample_size=max(pictures.buckets[0]))
        average = {n: p.detach().clone() for n, p in vae.named_parameters()} if config.ema.enabled else None
        optimizer = torch.optim.AdamW(
            _trained(vae),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        lpips, lpips_sha256 = build_lpips(config, device, say)
        adversary = build_adversary(config, world)
        depends_on = _depends_on(settings) | {
            "data.shards (manifest's sha256)": pictures.sha256,
            "loss.lpips (weights' sha256)": lpips_sha256,
            "model.pretrained (weights' sha256)": pretrained_sha256,
        }
        step = 0
        found = world.on_main(lambda: checkpoint.latest(run)) if config.checkpoint.resume == "auto" else None
        if found is not None:
            folder, record = found
            require_same(record["depends_on"], depends_on, folder)
            step = int(record["step"])
            judged = step - config.loss.discriminator_start
            checkpoint.restore(folder, step, vae, average, optimizer, adversary, judged)
            say(f"resuming from {folder}")
        elif config.checkpoint.resume == "never" and any((run / "checkpoints").glob("step-*")):
            raise UserError(f"{run} holds another run and checkpoint.resume=never; choose another run.dir")
        if step > config.train.steps:
            raise UserError(
                f"{run} is at step {step}, beyond train.steps={config.train.steps}; choose another run.dir"
            )
        if step == 0 and isinstance(vae, VQModel) and config.model.pretrained is None:
            if world.is_main:
                _spread_codebook(config, pictures, vae, device)
            codebook = vae.quantize.embedding.weight
            codebook.data.copy_(world.broadcast(codebook.detach().cpu()))
            if average is not None:
                average["quantize.embedding.weight"].copy_(vae.quantize.embedding.weight.detach())
        if world.is_main:
            write_atomic(run / "config.yaml", yaml.encode())
            _keep_metrics(run / "metrics.jsonl", step)
        processes = f", {world.size} processes" if world.size > 1 else ""
        say(
            f"{len(pictures)} pictures, {sum(map(len, pictures.held_out_ids))} held out; autoencoder of "
            f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters on {device.type}{processes}"
            + (", of which the decoder is trained" if config.train.decoder_only else "")
        )
        _loop(config, run, pictures, order, vae, average, optimizer, lpips, adversary, world, step, depends_on)
        distributed.stop()  # the others need not wait for what rank 0 measures
        if world.is_main:
            _finish(config, run, pictures, vae, average, of_main[0], device)
        return run / "vae"


def _loop(
    config: Config,
    run: Path,
    pictures: Pictures,
    order: Order,
    vae: FirstStage,
    average: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    lpips: Lpips | None,
    adversary: Adversary | None,
    world: World,
    step: int,
    depends_on: Mapping[str, Any],
) -> None:
    import torch
    from diffusers import AutoencoderKL
    from tqdm import tqdm

    from finetune import ema, rng
    from finetune.autoencoder import checkpoint
    from finetune.autoencoder.bottleneck import PenaltyWeights, perplexity
    from finetune.autoencoder.measure import to_signed
    from finetune.lr import learning_rate
    from finetune.models.autoencoder import downsample_factor, latent_channels

    steps, batch, device = config.train.steps, config.train.global_batch, world.device
    begin, end = (rank * batch // world.size for rank in (world.rank, world.rank + 1))  # our share of a batch
    penalty = PenaltyWeights(config.loss.kl_weight, config.loss.codebook_weight, config.loss.commitment)
    downsample = downsample_factor(vae)
    weights = list(vae.parameters())
    if step < steps:
        with tqdm(
            total=len(pictures), desc="reading", unit="img", disable=not (pictures.cached and world.is_main)
        ) as bar:
            pictures.fill_cache(lambda: bar.update())
    vae.train()
    bar = tqdm(
        total=steps * batch,
        initial=step * batch,
        desc="training",
        unit="img",
        mininterval=0.5,
        disable=not world.is_main,
    )
    path = run / "metrics.jsonl" if world.is_main else Path(os.devnull)
    with bar, path.open("a", encoding="utf-8") as log:
        last_time, last_step = time.perf_counter(), step
        for pixels_BHW3 in _batches(pictures, order, step, steps, begin, end):
            seen = step * batch  # images before this step: the clock of its draws
            ids_B = torch.arange(seen + begin, seen + end, device=device)
            image = to_signed(pixels_BHW3, device)
            if config.data.flip:
                mirrored = rng.integers(config.seed, "mirror", ids_B, 2).bool().view(-1, 1, 1, 1)
                image = torch.where(mirrored, image.flip(3), image)
            height, width = (side // downsample for side in image.shape[2:])
            eps = None
            if isinstance(vae, AutoencoderKL):
                eps = rng.normal(config.seed, "posterior", ids_B, (latent_channels(vae), height, width))
            step, seen = step + 1, seen + batch
            lr = learning_rate(
                seen,
                peak=config.optim.lr,
                schedule=config.optim.schedule,
                warmup_images=config.optim.warmup_images,
                total_images=steps * batch,
                final_ratio=config.optim.final_lr_ratio,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            judging = adversary if step > config.loss.discriminator_start else None
            if judging is not None:
                for group in judging.optimizer.param_groups:
                    group["lr"] = lr * (config.loss.discriminator_lr or config.optim.lr) / config.optim.lr
            values = step_once(
                vae,
                optimizer,
                image.contiguous(memory_format=torch.channels_last) if config.train.channels_last else image,
                eps,
                penalty=penalty,
                max_grad_norm=config.optim.max_grad_norm,
                bf16=config.train.precision == "bf16",
                lpips=lpips,
                lpips_weight=config.loss.lpips_weight,
                adversary=judging,
                world=world,
            )
            if average is not None:
                keep = ema.decay(seen, batch, config.ema.halflife_images, config.ema.rampup_ratio)
                ema.update_(list(average.values()), [weight.detach() for weight in weights], keep)

            saving = step % config.checkpoint.every == 0 or step == steps
            if step % config.tracker.every == 0 or saving:
                values = _of_all(values, world)
                uses_K = values.pop("uses_K", None)
                scalars = {name: value.item() for name, value in values.items()}  # the only wait for the device
                if not math.isfinite(sum(scalars.values())):
                    raise by_all(
                        UserError(
                            f"the loss is not finite at step {step}; lower optim.lr={config.optim.lr} or set "
                            "train.precision=fp32, and start again from the last checkpoint"
                        )
                    )
                if uses_K is not None:
                    scalars["perplexity"] = perplexity(uses_K)
                now = time.perf_counter()
                rate = (step - last_step) * batch / (now - last_time)
                last_time, last_step = now, step
                line = {"step": step, "images_seen": seen, **scalars, "lr": lr, "images_per_second": rate}
                log.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
            bar.update(batch)
            if saving:
                log.flush()
                world.on_main(
                    functools.partial(
                        checkpoint.save,
                        run,
                        vae,
                        average,
                        optimizer,
                        judging,
                        step=step,
                        images_seen=seen,
                        depends_on=depends_on,
                        keep=config.checkpoint.keep,
                    )
                )
            if world.is_main and config.sample.every and step % config.sample.every == 0 and step < steps:
                with _averaged(vae, average):
                    _save_grid(config, run, pictures, vae, device, step)


def _batches(pictures: Pictures, order: Order, first: int, last: int, begin: int, end: int) -> Iterator[np.ndarray]:
    """uint8 [B, H, W, 3]: pictures begin..end-1 of the batch of each of the steps first..last-1.

    The next batch is read while one is trained on.
    """

    def read(step: int) -> np.ndarray:
        rows = order.batch(step, begin, end)
        return pictures.read(rows.bucket, pictures.train_ids[rows.bucket][rows.rows])

    with ThreadPoolExecutor(1, thread_name_prefix="batch") as ahead:
        waiting: Future[np.ndarray] | None = ahead.submit(read, first) if first < last else None
        for step in range(first, last):
            assert waiting is not None
            ready = waiting.result()
            waiting = ahead.submit(read, step + 1) if step + 1 < last else None
            yield ready


def _finish(
    config: Config,
    run: Path,
    pictures: Pictures,
    vae: FirstStage,
    average: dict[str, Tensor] | None,
    network: FeatureNetwork | None,
    device: torch.device,
) -> Path:
    """Measure the latents' scale and held-out PSNR, SSIM and rFID, write RUN/vae and the last grid."""
    import numpy as np

    from finetune.autoencoder import checkpoint
    from finetune.autoencoder.bottleneck import perplexity
    from finetune.autoencoder.features import frechet
    from finetune.autoencoder.measure import SSIM_WINDOW, psnr, reconstruct, ssim
    from finetune.checkpoint import publish

    size = config.train.global_batch
    result: dict[str, Any] = {"step": config.train.steps}
    with _averaged(vae, average):
        if not config.train.decoder_only:
            std, uses_K = _measure_latents(config, pictures, vae, device)
            vae.register_to_config(scaling_factor=1.0 / std)
            result |= {"latent_std": std, "scaling_factor": 1.0 / std}
            if uses_K is not None:
                used = int((uses_K > 0).sum())
                result |= {"codebook_used": used / len(uses_K), "codebook_perplexity": perplexity(uses_K)}
                print(
                    f"codebook: {used} of {len(uses_K)} entries used, "
                    f"perplexity {result['codebook_perplexity']:.0f}"
                )
        temporary = run / ".tmp-vae"
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.write_vae(temporary, vae, dict(vae.named_parameters()))
        publish(temporary, run / "vae")
        decibels: list[float] = []
        similarities: list[float] = []
        features: list[tuple[np.ndarray, np.ndarray]] = []
        for pixels_BHW3 in _read_all(pictures, pictures.held_out_ids, size):
            recon_BHW3 = reconstruct(vae, pixels_BHW3, device)
            decibels += psnr(pixels_BHW3, recon_BHW3).tolist()
            if min(pixels_BHW3.shape[1:3]) >= SSIM_WINDOW:
                similarities += ssim(pixels_BHW3, recon_BHW3).tolist()
            if network is not None:
                features.append((network(pixels_BHW3), network(recon_BHW3)))
        grid = _save_grid(config, run, pictures, vae, device, config.train.steps)
    if decibels:
        result["held_out_psnr_db"] = sum(decibels) / len(decibels)
        print(f"held-out PSNR: {result['held_out_psnr_db']:.2f} dB over {len(decibels)} pictures")
    if similarities:
        result["held_out_ssim"] = sum(similarities) / len(similarities)
        print(f"held-out SSIM: {result['held_out_ssim']:.4f} over {len(similarities)} pictures")
    if features:
        real_ND, made_ND = (np.concatenate(each) for each in zip(*features, strict=True))
        result |= {"rfid": frechet(real_ND, made_ND), "rfid_pictures": len(real_ND)}
        print(f"held-out rFID: {result['rfid']:.3f} over {len(real_ND)} pictures")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(result) + "\n")
    of_latents = f"std {result['latent_std']:.4f}" if "latent_std" in result else "as they were"
    print(f"latents: {of_latents}, scaling_factor {vae.config['scaling_factor']:.5f}")
    if grid is not None:
        print(f"pictures and their reconstructions: {grid}")
    print(f"autoencoder: {run / 'vae'}")
    return run / "vae"


def _measure_latents(
    config: Config, pictures: Pictures, vae: FirstStage, device: torch.device
) -> tuple[float, Tensor | None]:
    """What `measure_latents` says of `config.scale.pictures` of the training pictures."""
    from tqdm import tqdm

    from finetune.autoencoder.measure import measure_latents

    share = min(1.0, config.scale.pictures / sum(map(len, pictures.train_ids)))
    measured = [_spread(ids, math.ceil(share * len(ids))) for ids in pictures.train_ids]
    with tqdm(total=sum(map(len, measured)), desc="latent scale", unit="img") as bar:

        def batches() -> Iterator[np.ndarray]:
            for pixels_BHW3 in _read_all(pictures, measured, config.train.global_batch):
                yield pixels_BHW3
                bar.update(len(pixels_BHW3))

        return measure_latents(vae, batches(), device)


def _spread_codebook(config: Config, pictures: Pictures, vae: VQModel, device: torch.device) -> None:
    """Make the codebook of what the encoder gives to training pictures, taken from all over the set."""
    from finetune.autoencoder.bottleneck import spread_codebook
    from finetune.autoencoder.measure import to_signed
    from finetune.models.autoencoder import downsample_factor

    entries = len(vae.quantize.embedding.weight)
    cells = min(height * width for height, width in pictures.buckets) // downsample_factor(vae) ** 2
    share = min(1.0, 8 * entries / cells / sum(map(len, pictures.train_ids)))
    chosen = [_spread(ids, math.ceil(share * len(ids))) for ids in pictures.train_ids]
    batches = (to_signed(pixels, device) for pixels in _read_all(pictures, chosen, config.train.global_batch))
    spread_codebook(vae, batches, config.seed)


def _spread(ids: np.ndarray, count: int) -> np.ndarray:
    """`count` of `ids`, evenly spaced: neighbours in a set of shards are often alike."""
    return ids[[round(i * len(ids) / count) for i in range(count)]] if count < len(ids) else ids


def _read_all(pictures: Pictures, ids_by_bucket: Sequence[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Batches of at most `size` pictures, each of one bucket: uint8 [B, H, W, 3]."""
    for bucket, ids in enumerate(ids_by_bucket):
        for start in range(0, len(ids), size):
            yield pictures.read(bucket, ids[start : start + size])


@contextmanager
def _averaged(vae: FirstStage, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the block the model has the averaged weights (when there are any) and is in eval mode."""

    def put(weights: Mapping[str, Tensor]) -> None:
        for name, parameter in vae.named_parameters():
            parameter.data.copy_(weights[name])

    own = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    vae.eval()
    if average is not None:
        put(average)
    try:
        yield
    finally:
        put(own)
        vae.train()


def _save_grid(
    config: Config, run: Path, pictures: Pictures, vae: FirstStage, device: torch.device, step: int
) -> Path | None:
    """RUN/samples/step-N.png: held-out pictures (or training ones, when none are) over reconstructions."""
    from finetune.autoencoder.measure import comparison, reconstruct
    from finetune.pictures import save_png

    tops: list[np.ndarray] = []
    bottoms: list[np.ndarray] = []
    chosen = pictures.held_out_ids if any(map(len, pictures.held_out_ids)) else pictures.train_ids
    for bucket, ids in enumerate(chosen):
        some = ids[: config.sample.pictures - len(tops)]
        if len(some):
            pixels = pictures.read(bucket, some)
            tops += list(pixels)
            bottoms += list(reconstruct(vae, pixels, device))
    if not tops:
        return None
    path = run / "samples" / f"step-{step:08d}.png"
    save_png(comparison(tops, bottoms), path)
    return path


def _depends_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the trained weights depend on, flat, by config key."""

    def flatten(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    flat = flatten({key: value for key, value in settings.items() if key not in MAY_CHANGE}, "")
    return {key: value for key, value in flat if key not in MAY_CHANGE_KEYS}


def _keep_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that the run goes on from: it will be logged again."""
    from finetune.data.shards import write_atomic

    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the run was killed
        if record.get("step", 0) <= step and "loss" in record:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())
