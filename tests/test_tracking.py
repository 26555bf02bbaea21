"""Lines of metrics that survive kills, W&B that stays one run, and a loss that is no number."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune import UserError
from finetune.distributed import World
from finetune.tracking import Tracker, wandb_host, wandb_mode
from tests.conftest import ROOT, environment
from tests.wandb_server import WandbServer

ALONE = World(0, 1, 0, torch.device("cpu"))


def tracker_of(
    run: Path, first_step: int = 0, global_batch: int = 4, world: World = ALONE, wandb_mode: str | None = None
) -> Tracker:
    return Tracker(
        run, world, config={}, name="test", project="test", wandb_mode=wandb_mode,
        first_step=first_step, total_steps=10, global_batch=global_batch,
    )  # fmt: skip


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def in_a_process(program: str, *arguments: object, **variables: str) -> tuple[int, str]:
    """Exit code and output of a Python program. W&B's service is shared by all runs of a process."""
    words = [sys.executable, "-c", f"from tests.test_tracking import *\n{program}", *map(str, arguments)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout + done.stderr


def prepared(run: Path) -> Path:
    """A run that W&B knows from an earlier start."""
    (run / "wandb-id").write_text("0a1b2c3d\n")
    return run


# --- lines ----------------------------------------------------------------------------------------


def test_a_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    for loss_sum, norm, wait in ((4.0, 1.0, 0.25), (8.0, 2.0, 0.5), (0.0, 3.0, 0.75)):
        tracker.step(scalar(loss_sum), scalar(norm), wait)
    tracker.log(3, 1e-3)
    tracker.step(scalar(2.0), scalar(5.0), 1.0)
    tracker.log(4, 2e-3)
    tracker.close()
    first, second = lines_of(tmp_path)
    assert first["loss"] == pytest.approx((1 + 2 + 0) / 3)
    assert (first["step"], first["images_seen"], first["lr"], first["grad_norm"]) == (3, 12, 1e-3, 3.0)
    assert first["data_wait_s"] == pytest.approx(0.5)
    assert first["images_per_s"] > 0
    assert (second["step"], second["loss"], second["grad_norm"], second["data_wait_s"]) == (4, 0.5, 5.0, 1.0)


def test_no_steps_make_no_line(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    tracker.log(0, 1e-3)
    tracker.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_losses_are_summed_over_ranks_and_rank_0_writes(tmp_path: Path) -> None:
    class Two(World):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mul_(2)  # the other rank has the same

    for rank in (0, 1):
        run = tmp_path / str(rank)
        run.mkdir()
        tracker = tracker_of(run, world=Two(rank, 2, rank, torch.device("cpu")))
        tracker.step(scalar(3.0), scalar(1.0), 0.0)
        tracker.log(1, 1e-3)
        tracker.image(1, Image.new("RGB", (4, 4)), "x")
        tracker.close()
    assert lines_of(tmp_path / "0")[0]["loss"] == pytest.approx(2 * 3.0 / 4)
    assert list((tmp_path / "1").iterdir()) == []


def test_work_that_is_no_training_is_not_in_images_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("finetune.tracking.time.perf_counter", lambda: now[0])
    tracker = tracker_of(tmp_path)
    tracker.step(scalar(1.0), scalar(1.0), 0.0)
    now[0] += 2
    with tracker.paused():
        now[0] += 50
    tracker.step(scalar(1.0), scalar(1.0), 0.0)
    now[0] += 2
    tracker.log(2, 1e-3)
    tracker.close()
    assert lines_of(tmp_path)[0]["images_per_s"] == pytest.approx(2 * 4 / 4)


def test_lines_past_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    kept = [json.dumps({"step": n, "loss": 0.5}) for n in (1, 2, 3, 4)]
    torn = kept[3][:9]
    validation = json.dumps({"step": 2, "validation/loss": 0.5})
    left = "\n".join([*kept[:2], validation, *kept[2:], "[]", "7", torn])
    (tmp_path / "metrics.jsonl").write_bytes(left.encode() + b"\n\0\0\xff")
    tracker = tracker_of(tmp_path, first_step=2)
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join([*kept[:2], validation, ""])
    tracker_of(tmp_path, first_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_wait_for_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None is lost, half written or said twice."""
    tracker = tracker_of(tmp_path)
    tracker.write({"step": 1, "loss": 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 7, hard))
    try:
        tracker.write({"step": 2, "loss": 0.25})
        tracker.write({"step": 3, "loss": 0.125})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines_of(tmp_path) == [{"step": 1, "loss": 0.5}]
    tracker.write({"step": 4, "loss": 0.0625})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    tracker.close()
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1


def test_bytes_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    """What a machine that lost its power may leave at the end of a file."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bytes(512))
    tracker_of(tmp_path, first_step=5).close()
    assert lines_of(tmp_path) == [{"step": 1}]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    tracker.write({"step": 1, "a": math.nan, "b": math.inf, "c": 1.5, "d": 2})
    tracker.step(scalar(1.0), scalar(math.inf), 0.0)
    tracker.step(scalar(math.nan), scalar(math.nan), 0.0)
    tracker.log(2, 1e-3)  # one loss is finite: the step that was not is skipped
    tracker.close()
    first, second = lines_of(tmp_path)
    assert first == {"step": 1, "a": None, "b": None, "c": 1.5, "d": 2}
    assert (second["loss"], second["grad_norm"]) == (None, None)


def test_a_loss_that_is_no_number_any_more_ends_the_run(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    for value in [1.0, *[math.nan, math.inf] * 4]:
        tracker.step(scalar(value), scalar(math.nan), 0.0)
    tracker.log(9, 1e-3)  # eight in a row may pass: such steps are skipped
    assert tracker.steps_not_finite == 8
    for value in (math.nan, math.inf):
        tracker.step(scalar(value), scalar(math.nan), 0.0)
    with pytest.raises(UserError, match=r"for 10 steps, at step 11: lower optim.lr or use .*fp32") as caught:
        tracker.log(11, 1e-3)
    tracker.close()
    assert "\n" not in str(caught.value)
    assert lines_of(tmp_path)[0]["loss"] is None


def test_gradients_that_are_never_finite_end_the_run(tmp_path: Path) -> None:
    """Such steps change nothing, though losses look well; fp16 has some while it searches for its loss scale."""
    tracker = tracker_of(tmp_path)
    for _ in range(39):
        tracker.step(scalar(1.0), scalar(math.inf), 0.0)
    tracker.log(39, 1e-3)
    tracker.step(scalar(1.0), scalar(2.0), 0.0)
    tracker.settle()  # at a save
    assert tracker.steps_skipped == 0
    for _ in range(40):
        tracker.step(scalar(1.0), scalar(math.nan), 0.0)
        tracker.settle()
    with pytest.raises(
        UserError, match=r"have not been finite numbers for 40 steps, at step 80, .* train.precision"
    ):
        tracker.log(80, 1e-3)
    tracker.close()
    assert [line["grad_norm"] for line in lines_of(tmp_path)] == [None, None]


def test_pictures_are_whole_files_named_by_step(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    for step in (20, 1000):
        tracker.image(step, Image.new("RGB", (5, 3), "red"), "caption")
    tracker.close()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000020.png",
        "step-00001000.png",
    ]
    assert Image.open(tmp_path / "samples" / "step-00000020.png").getpixel((4, 2)) == (255, 0, 0)


# --- in a run -------------------------------------------------------------------------------------


def test_a_run_whose_loss_explodes_says_so_in_one_line(
    overrides: list[str], tmp_path: Path, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import diffusion

    calls = [0]
    original = diffusion.per_sample

    def explode(*args: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(*args) * (math.nan if calls[0] > 3 else 1.0)

    monkeypatch.setattr(diffusion, "per_sample", explode)
    code, line = command("train", *overrides, "train.steps=20")
    assert code == 2
    assert "the loss has not been a finite number for 10 steps, at step 13" in line
    assert [entry["loss"] is None for entry in lines_of(tmp_path / "run")] == [False] * 3 + [True] * 10
    # The first such step, 4, may be a broken sample's, and moved no weights: it is saved, and none after it.
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


def test_a_run_goes_on_when_wandbs_process_has_ended(tmp_path: Path) -> None:
    """As after Slurm's SIGTERM, which reaches all processes of a job. In a process of its own: W&B's is shared."""
    code, said = in_a_process(
        "import psutil, time\n"
        "tracker = tracker_of(Path(sys.argv[1]), wandb_mode='offline')\n"
        "for child in psutil.Process().children(recursive=True):\n"
        "    child.kill()\n"
        "for step in range(1, 6):\n"
        "    tracker.step(scalar(1.0), scalar(1.0), 0.0)\n"
        "    tracker.log(step, 1e-3)\n"
        "    time.sleep(0.2)\n"
        "tracker.close(goes_on=True)\n"
        "print('closed', flush=True)\n",
        tmp_path,
    )
    assert code == 0, said
    assert "closed" in said and said.count("warning: W&B has ended") == 1
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_picture_that_wandb_cannot_keep_costs_that_picture_alone(tmp_path: Path) -> None:
    """The system's temporary folder is swept in long runs; the run's disk is full for a moment."""
    code, said = in_a_process(
        "import shutil\n"
        "from wandb.sdk.data_types._private import MEDIA_TMP\n"
        "tracker = tracker_of(Path(sys.argv[1]), wandb_mode='offline')\n"
        "shutil.rmtree(MEDIA_TMP.name)\n"
        "for step in (1, 2):\n"
        "    tracker.image(step, Image.new('RGB', (5, 3)), 'caption')\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))\n"
        "tracker.wandb.log = lambda values: (_ for _ in ()).throw(OSError(28, 'No space left on device'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "tracker.image(3, Image.new('RGB', (5, 3)), 'caption')\n"
        "assert tracker.wandb is not None\n"
        "del tracker.wandb.log\n"
        "tracker.close()\n",
        tmp_path,
    )
    assert code == 0 and "W&B has ended" not in said, said
    pictures = [f"{tmp_path}/samples/step-0000000{step}.png" for step in (2, 3)]
    assert f"warning: {pictures[0]} cannot be written (File too large)" in said
    assert f"warning: W&B lacks {pictures[1]} (No space left on device)" in said
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 1


def test_a_killed_run_goes_on_in_wandb_though_an_inherited_service_holds_its_id(tmp_path: Path) -> None:
    """A notebook, or an agent of W&B's, starts runs: its service outlives a killed one, and keeps the id."""
    import wandb

    wandb.teardown()  # a service that earlier tests left in this process would not be told of in the environment
    quiet = wandb.Settings(silent=True, console="off")
    held = wandb.init(id="0a1b2c3d", mode="offline", dir=tmp_path / "held", settings=quiet)
    service = os.environ["WANDB_SERVICE"]
    code, said = in_a_process(
        "assert os.environ['WANDB_SERVICE']\ntracker_of(Path(sys.argv[1]), wandb_mode='offline').close()\n",
        prepared(tmp_path),
        WANDB_SERVICE=service,
    )
    held.finish()
    assert code == 0 and "warning" not in said, said
    assert len(list(tmp_path.glob("wandb/offline-run-*-0a1b2c3d/run-0a1b2c3d.wandb"))) == 1


def test_wandbs_trouble_ends_a_first_start_and_no_later_one(tmp_path: Path) -> None:
    """No answer from W&B's host: an error at first; recorded offline, under the same id, in a run that has one."""
    code, said = in_a_process(
        "run = Path(sys.argv[1])\n"
        "with pytest.raises(UserError) as caught:\n"
        "    tracker_of(run, wandb_mode='online')\n"
        "print('error:', caught.value)\n"
        "assert not (run / 'wandb-id').exists()\n"
        "tracker_of(prepared(run), wandb_mode='online').close()\n",
        tmp_path,
        WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="k" * 40, WANDB_INIT_TIMEOUT="1",
    )  # fmt: skip
    assert code == 0, said
    assert "error: W&B cannot start (" in said and "use tracker.mode=offline or tracker=none" in said
    assert "%|" not in said.partition("error: ")[0]  # no bar that the line would stand behind
    assert said.count("warning: W&B cannot start (") == 1
    assert f"recorded offline: `wandb sync {tmp_path}/wandb/offline-run-*`" in said
    assert len(list(tmp_path.glob("wandb/offline-run-*-0a1b2c3d/run-0a1b2c3d.wandb"))) == 1


def test_a_run_goes_on_without_wandb_when_it_cannot_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wandb.init", init)
    tracker = tracker_of(prepared(tmp_path), wandb_mode="offline")
    assert capsys.readouterr().out.count("warning: W&B cannot start ([Errno 28] No space left on device)") == 1
    tracker.step(scalar(1.0), scalar(1.0), 0.0)
    tracker.log(1, 1e-3)
    tracker.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


@pytest.mark.usefixtures("logged_out")
def test_wandb_offline_is_one_run_over_a_restart(
    overrides: list[str], tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    """Real W&B, no network: lines, pictures, and the same run id after a restart."""
    run = tmp_path / "run"
    settings = [*overrides, "tracker=wandb", "tracker.every=1", "sample.every=2", "sample.steps=2", "train.steps=2"]
    assert command("train", *settings) == (0, "")
    identity = (run / "wandb-id").read_text().strip()
    assert command("train", *settings, "train.steps=4") == (0, "")
    assert (run / "wandb-id").read_text().strip() == identity
    runs = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(name.endswith(f"-{identity}") for name in runs)
    files = [next((run / "wandb" / name).glob("run-*.wandb")) for name in runs]
    assert all(path.stat().st_size > 0 for path in files)
    keys = ("loss", "grad_norm", "lr", "images_per_s", "data_wait_s")
    wanted = {key.encode() for key in (*keys, "step", "samples")}
    ends = time.monotonic() + 20
    while any(key not in path.read_bytes() for path in files for key in wanted):
        assert time.monotonic() < ends  # W&B's process writes on for a moment
        time.sleep(0.05)
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(isinstance(line[key], float) for line in lines for key in keys)
    media = [path.name for path in run.glob("wandb/offline-run-*/files/media/images/*.png")]
    assert len(media) == 2


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    with WandbServer(gone=tmp_path / "gone").running() as server:
        yield server


def test_offline_parts_of_a_run_are_synced_as_one_history(wandb_server: WandbServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for first_step in (0, 3):
        code, said = in_a_process(
            "first = int(sys.argv[2])\n"
            "tracker = tracker_of(Path(sys.argv[1]), first, wandb_mode='offline')\n"
            "for step in range(first + 1, first + 4):\n"
            "    tracker.write({'step': step})\n"
            "tracker.close(goes_on=first == 0)\n",
            run, first_step,
        )  # fmt: skip
        assert code == 0, said
    parts = map(str, sorted(run.glob("wandb/offline-run-*")))
    sync = [str(Path(sys.executable).with_name("wandb")), "sync", *parts]
    done = subprocess.run(
        sync, env=environment() | wandb_server.variables, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    (lines,) = wandb_server.lines.values()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_ends_though_wandbs_server_has_gone(wandb_server: WandbServer, tmp_path: Path) -> None:
    code, said = in_a_process(
        "from finetune import tracking\n"
        "run, gone = map(Path, sys.argv[1:])\n"
        "tracking.FINISH_SECONDS = 2.0\n"
        "tracker = tracker_of(run, wandb_mode='online')\n"
        "gone.touch()\n"
        "tracker.write({'step': 1})\n"
        "tracker.close(goes_on=True)\n"
        "print('closed', flush=True)\n",
        tmp_path, wandb_server.gone,
        **wandb_server.variables,
    )  # fmt: skip
    assert code == 0 and "closed" in said, said
    (folder,) = tmp_path.glob("wandb/run-*")
    remedy = f"`wandb sync --include-online {folder}` sends the rest"
    assert f"warning: W&B has not taken all within 2 s; {remedy}" in said
    assert "W&B has ended" not in said
    assert wandb_server.lines == {}


def test_wandb_is_not_told_how_data_is_let_in_to(tmp_path: Path) -> None:
    """Not in the config, nor in the command line that W&B records by itself."""
    data = {
        "shards": "https://me:open-sesame@host.example.org/set?sig=open-sesame",
        "sources": {"a": {"shards": "pipe:curl -H 'X-Key: open-sesame' https://host.example.org/{}"}},
    }
    code, said = in_a_process(
        "run, data = Path(sys.argv[1]), json.loads(sys.argv[2])\n"
        "words = list(sys.argv)\n"
        "Tracker(run, ALONE, config={'data': data}, name='test', project='test', wandb_mode='offline',\n"
        "    first_step=0, total_steps=1, global_batch=1).close()\n"
        "assert sys.argv == words\n",
        tmp_path, json.dumps(data),
    )  # fmt: skip
    assert code == 0, said
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"open-sesame" not in content
    assert b"https://host.example.org/set" in content and b"pipe:..." in content


# --- where W&B goes -------------------------------------------------------------------------------


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("logged_out")
def test_offline_unless_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("online") == "online"
    assert wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode("auto") == "online"
    assert wandb_mode("offline") == "offline"


def test_a_netrc_entry_is_a_login(logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = logged_out / ".netrc"
    netrc.touch(0o600)
    for host in (wandb_host(), "api.wandb.ai"):  # W&B's server has had two names
        netrc.write_text(f"machine {host} login user password k\n")
        assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert wandb_mode("auto") == "offline"  # logged in elsewhere
    netrc.write_text("machine wandb.example.org login user password k\n")
    assert wandb_mode("auto") == "online"
    netrc.write_text("this is no netrc file\n")
    assert wandb_mode("auto") == "offline"


def test_a_login_to_another_host_is_found_where_wandb_keeps_it(
    logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `wandb login --host https://wandb.example.org` leaves it."""
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(logged_out / "config"))
    (logged_out / "config").mkdir()
    (logged_out / "config" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert wandb_mode("auto") == "offline"
    (logged_out / ".netrc").write_text("machine wandb.example.org login user password k\n")
    (logged_out / ".netrc").chmod(0o600)
    assert wandb_mode("auto") == "online"
    monkeypatch.delenv("WANDB_CONFIG_DIR")
    assert wandb_mode("auto") == "offline"


@pytest.mark.usefixtures("logged_out")
def test_the_environment_decides_for_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_mode("auto") == mode


def test_an_unknown_mode_is_refused(command: Callable[..., tuple[int, str]]) -> None:
    code, line = command("train", "data.shards=x", "tracker.mode=onlin")
    assert code == 2
    assert "tracker.mode=onlin is not known: choose one of auto, online, offline" in line
