"""Saves that are killed: SIGKILL to all ranks at random moments of writing, and a look at what is left.

    python tests/checkpoint/kills.py FOLDER ROUNDS

With one rank, then with two. One process imports and forks the ranks of each round: importing takes longer than a
round. In the checkpoint of step n every number is n, and so it must be in whatever a kill leaves; the ranks of the
next round go on from there.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from finetune.checkpoint import Checkpoints, Layout, Progress
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, World
from finetune.ema import Average, HalfLife


def checkpoints_of(run: Path, unet: nn.Module) -> Checkpoints:
    return Checkpoints(run, Layout({"unet": unet}), keep=2)


def rank_main(run: Path, unet: nn.Module, rank: int, size: int, store: Path, seed: int) -> None:
    """Save without end, from the newest checkpoint on."""
    if size > 1:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    world, chance, original = World(rank, size, 0, torch.device("cpu")), random.Random(seed + rank), os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(chance.random() * 3e-4)
        if chance.random() < 0.1:
            data = data[: chance.randint(1, len(data))]  # a disk may take less
        return original(descriptor, data, offset)

    os.pwrite = slow
    module = nn.ModuleDict({"unet": unet})
    group = ParamGroup("unet", dict(module.named_parameters()))
    optimizer = OptimizerSettings()
    strategy = DataParallel(world, module, [group], optimizer=optimizer, max_grad_norm=1.0, precision="fp32")
    average = Average.starting_at([shard.master for shard in strategy.shards], HalfLife(1.0, 0.0))
    checkpoints = checkpoints_of(run, unet)
    path = world.on_main(checkpoints.latest)
    step = 0
    tensors = [shard.master for shard in strategy.shards] + average.tensors
    tensors += strategy.moments("exp_avg") + strategy.moments("exp_avg_sq")
    if path is not None:
        checkpoints.restore(path, strategy, [average])
        step = checkpoints.read(path).step
        assert all((tensor == step).all() for tensor in tensors), f"restored {path} is not of step {step}"
    while True:
        step += 1
        for tensor in tensors:
            tensor.fill_(float(step))
        checkpoints.begin(Progress(step=step, images_seen=step, steps_taken=step), strategy, [average])


def look(run: Path, unet: nn.Module) -> int:
    """The step of the newest checkpoint, 0 for none; what has a good name must be whole and of its step."""
    found = 0
    for path in sorted((run / "checkpoints").glob("step-*")):
        step = int(path.name.removeprefix("step-"))
        for file in path.rglob("*.safetensors"):
            read = load_file(file).values()
            assert all((tensor == step).all() for tensor in read), f"{file} is not of step {step}"
        assert (path / "trainer.json").is_file(), f"{path} has no record"
        found = step
    latest = checkpoints_of(run, unet).latest()
    assert (latest is None) == (found == 0) and (latest is None or latest.name == f"step-{found:08d}"), latest
    return found


def main(folder: Path, size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
    )
    folder.mkdir()
    run, chance, before, kills_while_writing = folder / "run", random.Random(size), 0, 0
    for number in range(rounds):
        ranks = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                try:
                    rank_main(run, unet, rank, size, folder / f"store-{number}", 100 * number)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(9)
            ranks.append(pid)
        ends = time.monotonic() + 60
        # After some whole ones, while the next is being written: a slow start is no part of the chance.
        wanted = before + 1 + number % 3
        while not list((run / "checkpoints").glob(f".tmp-step-{wanted:08d}-*")):
            assert time.monotonic() < ends, "nothing is written"
            time.sleep(0.002)
        time.sleep(chance.random() * 0.3)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        assert codes == [-signal.SIGKILL] * size, f"ranks ended by themselves: {codes}"
        kills_while_writing += bool(list((run / "checkpoints").glob(".tmp-*")))
        now = look(run, unet)
        assert now >= before, f"step {before} was lost, {now} is the newest"
        before = now
    print(f"{kills_while_writing} of {rounds} kills while writing, step {before}")
    assert before > 0 and kills_while_writing > 0


if __name__ == "__main__":
    for ranks in (1, 2):
        main(Path(sys.argv[1]) / str(ranks), ranks, int(sys.argv[2]))
