"""Being told to stop: all processes agree on a step, save and exit with a code; the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from finetune import PEER_LOST, STOPPED, UserError
from finetune.autoencoder import loop
from finetune.autoencoder.train import main
from tests.autoencoder.runs import arguments, assert_same_run
from tests.survival.runs import AUTOENCODER, Run, steps_of

INTERRUPTED = 128 + signal.SIGINT
SETTINGS = ["train.steps=7", "checkpoint.every=5", "tracker.every=2", "loss.discriminator_weight=0.5"]
SETTINGS += ["loss.discriminator_layers=1", "loss.discriminator_width=8", "loss.discriminator_start=2"]


@pytest.fixture(scope="module")
def calm(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("calm") / "run"
    assert main(arguments(shards, run, *SETTINGS)) == 0
    return run


@pytest.mark.parametrize(
    ("number", "code", "at"),
    [(signal.SIGTERM, STOPPED, 1), (signal.SIGUSR1, STOPPED, 3), (signal.SIGINT, INTERRUPTED, 7)],
)
def test_a_signal_saves_and_the_same_command_ends_in_the_same_bits(
    shards: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, at: int
) -> None:
    """Before the discriminator joins, after it, and in the last step, where the measures are left for later."""
    step = loop._step

    def signalled(config, parts, pixels, made, world):
        if made + 1 == at:
            os.kill(os.getpid(), number)
        return step(config, parts, pixels, made, world)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", signalled)
        assert main(arguments(shards, run, *SETTINGS)) == code
    assert steps_of(run)[-1] == at
    assert not (run / "vae").exists()
    assert main(arguments(shards, run, *SETTINGS)) == 0
    assert_same_run(run, calm, 7, discriminator=True)


def test_a_named_checkpoint_is_gone_on_from(shards: Path, calm: Path, tmp_path: Path) -> None:
    """In another run's folder, and in its own, whose later ones are made anew."""
    start = f"checkpoint.resume={calm / 'checkpoints/step-00000005'}"
    other = tmp_path / "other"
    assert main(arguments(shards, other, *SETTINGS, start, "tracker.every=1")) == 0
    weights = "checkpoints/step-00000007/weights/vae/diffusion_pytorch_model.safetensors"
    assert (other / weights).read_bytes() == (calm / weights).read_bytes()
    own = tmp_path / "own"
    shutil.copytree(calm, own)
    (own / weights).unlink()
    assert main(arguments(shards, own, *SETTINGS, f"checkpoint.resume={own / 'checkpoints/step-00000005'}")) == 0
    assert_same_run(own, calm, 7, discriminator=True)


def test_what_is_no_checkpoint_of_this_command_gets_one_line(shards: Path, calm: Path, tmp_path: Path) -> None:
    broken, foreign = tmp_path / "broken", tmp_path / "foreign"
    shutil.copytree(calm / "checkpoints/step-00000005", broken)
    (broken / "optimizer/exp_avg.safetensors").unlink()
    foreign.mkdir()
    (foreign / "trainer.json").write_text('{"format": 1, "files": {}}')
    for path, line in [
        (tmp_path / "none", "is no whole checkpoint: there is no such folder"),
        (broken, "is no whole checkpoint: optimizer/exp_avg.safetensors is missing"),
        (foreign, "is no checkpoint of finetune autoencoder: it has no weights/vae; choose another folder"),
    ]:
        with pytest.raises(UserError) as caught:
            main(arguments(shards, tmp_path / "run", *SETTINGS, f"checkpoint.resume={path}"))
        assert f"checkpoint.resume={path} {line}" in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_stopped_and_killed_end_in_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """One is told to stop, and both save; one is killed, and the other names it; then to the end."""
    long = ["train.steps=60", "checkpoint.every=10", "watch.lost_s=4", "data.size=16", *SETTINGS[3:]]
    calm, run = tmp_path / "calm", tmp_path / "run"
    with Run(calm, arguments(shards, calm, *long), train=AUTOENCODER) as undisturbed:
        assert undisturbed.end() == 0, undisturbed.output[-4000:]
    with Run(run, arguments(shards, run, *long), train=AUTOENCODER) as told:
        told.until_line(5).kill(signal.SIGUSR1, 1)
        assert told.end() == STOPPED, told.output[-4000:]
        assert "stopped: the same command goes on" in told.output and told.errors == []
    (first,) = steps_of(run)
    with Run(run, arguments(shards, run, *long), train=AUTOENCODER) as hit:
        hit.until_line(first + 12).kill(signal.SIGKILL, 1)
        assert hit.end() in (PEER_LOST, 128 + signal.SIGKILL), hit.output[-4000:]
        (line,) = hit.errors
        assert f"rank 1 on {socket.gethostname()} has given no sign of life" in line and "at step " in line
    with Run(run, arguments(shards, run, *long), train=AUTOENCODER) as last:
        assert last.end() == 0, last.output[-4000:]
    assert_same_run(run, calm, 60, discriminator=True)
