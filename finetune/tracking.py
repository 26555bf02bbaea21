"""Metrics and pictures of a run: `metrics.jsonl`, `samples/`, Weights & Biases.

Losses stay on the device until a line is due: the host waits for it once per logging interval. Rank 0 alone
writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finetune import UserError, by_all, first_line
from finetune.data.shards import is_remote, shown, write_atomic
from finetune.distributed import LONG, World
from finetune.pictures import save_png

MODES = ("auto", "online", "offline")
PATIENCE_STEPS = 10
PATIENCE_GRADIENTS = 40  # steps: fp16's search for a loss scale takes up to 20
_NO_PROJECT = "/\\#?%:"  # signs that W&B takes in no project's name
_LONGEST_PROJECT = 128
_FORMER_HOSTS = {"api.forge.coreweave.com": "api.wandb.ai"}  # W&B's own server; logins are under either name
FINISH_SECONDS = 30.0  # W&B takes one bound, at its start: what Slurm gives a job that is to end, by default


class Tracker:
    """Collects steps and writes them.

    Args:
        run: the run's folder.
        world: only rank 0 writes; all ranks call, since losses are summed over ranks.
        config: what W&B shows as the run's configuration.
        open_losses: of steps up to `first_step` that have no line yet.
        first_step, total_steps: of the progress bar; lines of steps after `first_step` that an earlier process
            left (it was killed after its last checkpoint) are dropped, since those steps are run again.
        wandb_mode: `online`, `offline` or None for no W&B.
    """

    def __init__(
        self,
        run: str | Path,
        world: World,
        *,
        config: dict[str, Any],
        name: str,
        project: str,
        wandb_mode: str | None,
        first_step: int,
        total_steps: int,
        global_batch: int,
        open_losses: Sequence[float] = (),
    ) -> None:
        self.run, self.world, self.global_batch = Path(run), world, global_batch
        self.losses: list[Tensor] = []  # on the device: sums over this rank's samples
        self.open_losses = list(open_losses)  # means over the step's samples
        self.grad_norms: list[Tensor] = []  # on the device, one a step
        self.grad_norm: float | None = None  # of the last step that was settled since the last line
        self.data_seconds = 0.0
        self.steps_since = 0
        # In a row, up to the last line: steps without a finite loss, or gradients. They move no weights.
        self.steps_not_finite = 0
        self.steps_skipped = 0
        self.since = time.perf_counter()
        self.goes_on = False  # see `close`; set inside `closing`
        self.unwritten: list[str] = []  # lines that the disk has not taken yet
        self.wandb: Any = None
        self.bar: tqdm[Any] | None = None
        if not world.is_main:
            return
        self.metrics = self.run / "metrics.jsonl"
        self._rewind(first_step)
        if wandb_mode is not None:  # before the bar, which an error would stand behind
            self._start_wandb(config, name, project, wandb_mode)
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1, desc=name
        )

    def _rewind(self, step: int) -> None:
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a kill cut it short, or a machine that lost its power left anything there
        write_atomic(self.metrics, "".join(kept).encode())

    def _start_wandb(self, config: dict[str, Any], name: str, project: str, mode: str) -> None:
        """Start or go on with this run's W&B run, whose id is kept in `wandb-id` from its first start.

        W&B's trouble is told before any work is lost: it ends a first start. Later it costs a warning, and the
        run is recorded offline if that can be done.

        Raises:
            UserError: W&B has not run for this run before, and can't.
        """
        import wandb

        # A service that was inherited (from a notebook, a sweep's agent) dies with its owner, may be another
        # machine's, and keeps a killed run's id "in use". A process that uses none yet starts its own.
        os.environ.pop("WANDB_SERVICE", None)
        path = self.run / "wandb-id"
        again = path.exists()
        identity = path.read_text().strip() if again else secrets.token_hex(4)
        told, words = without_secrets(config), sys.argv

        def start(mode: str) -> None:
            self.wandb = wandb.init(
                project=project,
                name=name,
                id=identity,
                resume="allow" if mode == "online" else None,  # offline it is ignored; `wandb sync` appends
                mode=mode,  # type: ignore[arg-type]
                dir=str(self.run),
                config=told,
                settings=wandb.Settings(
                    silent=True, console="off", finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
                ),
            )
            self.wandb.define_metric("step")
            self.wandb.define_metric("*", step_metric="step")

        if told != config:
            sys.argv = words[:1]  # W&B records the command line, which has what the config is told without
        try:
            start(mode)
        except Exception as error:
            if not again:
                remedy = "tracker=none" if mode == "offline" else "tracker.mode=offline or tracker=none"
                raise UserError(f"W&B cannot start ({first_line(error)}); use {remedy}") from None
            self._start_offline(start, first_line(error))
        finally:
            sys.argv = words
        if not again:
            write_atomic(path, f"{identity}\n".encode())

    def _start_offline(self, start: Callable[[str], None], trouble: str) -> None:
        import wandb

        try:
            wandb.teardown()  # the id of a start that failed stays in use by the service
            start("offline")
            remedy = f"recorded offline: `wandb sync {self.run}/wandb/offline-run-*`"
        except Exception:
            self.wandb = None
            remedy = f"until a restart, see {self.metrics}"
        self.say(f"warning: W&B cannot start ({trouble}); {remedy}")

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """Call `send` with W&B's run, if there is one.

        W&B's own process may be gone: Slurm's SIGTERM, which asks a run to stop, reaches every process of a job.
        The run has to save all the same.
        """
        if self.wandb is None:
            return
        try:
            send(self.wandb)
        except Exception as error:
            self.wandb = None
            self.say(f"warning: W&B has ended ({first_line(error)}); until a restart, see {self.metrics}")

    def step(self, loss_sum: Tensor, grad_norm: Tensor, data_seconds: float) -> None:
        """Take in one optimizer step (scalars on the device), without waiting for the device."""
        self.losses.append(loss_sum)
        self.grad_norms.append(grad_norm)
        self.data_seconds += data_seconds
        self.advance()

    def advance(self) -> None:
        """Count a step whose numbers come in a line of the caller's own (`write`)."""
        self.steps_since += 1
        if self.bar is not None:
            self.bar.update()

    def rate(self) -> float:
        """Images a second, all ranks together, since the last call."""
        now = time.perf_counter()
        rate = self.steps_since * self.global_batch / (now - self.since)
        self.steps_since, self.since = 0, now
        return rate

    def show(self, loss: float, rate: float) -> None:
        """Put both beside the progress bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")

    def settle(self) -> None:
        """Bring the numbers of all steps so far to the host; collective, and waits for the device."""
        if not self.losses:
            return
        losses = (self.world.sum_(torch.stack(self.losses).double()) / self.global_batch).tolist()
        self.losses = []
        self.open_losses += losses
        norms = torch.stack(self.grad_norms).tolist()
        self.grad_norms, self.grad_norm = [], norms[-1]
        for loss, norm in zip(losses, norms, strict=True):
            self.steps_not_finite = 0 if math.isfinite(loss) else self.steps_not_finite + 1
            self.steps_skipped = 0 if math.isfinite(norm) else self.steps_skipped + 1

    def log(self, step: int, lr: float) -> None:
        """Write one line for the steps since the last; collective, and waits for the device.

        Raises:
            UserError: the loss has not been finite for `PATIENCE_STEPS` steps in a row, or gradients for
                `PATIENCE_GRADIENTS`.
        """
        self.settle()
        if self.grad_norm is None:
            return
        losses = self.open_losses
        data_wait_s = self.data_seconds / self.steps_since
        line = {
            "step": step,
            "images_seen": step * self.global_batch,
            "loss": sum(losses) / len(losses),
            "grad_norm": self.grad_norm,
            "lr": lr,
            "images_per_s": self.rate(),
            "data_wait_s": data_wait_s,
        }
        if self.world.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.open_losses, self.grad_norm, self.data_seconds = [], None, 0.0
        self.write(line)
        self.show(line["loss"], line["images_per_s"])
        if self.steps_not_finite >= PATIENCE_STEPS:
            raise by_all(
                UserError(
                    f"the loss has not been a finite number for {self.steps_not_finite} steps, at step {step}: "
                    "lower optim.lr or use train.precision=fp32; the last checkpoint is from before"
                )
            )
        if self.steps_skipped >= PATIENCE_GRADIENTS:
            raise by_all(
                UserError(
                    f"gradients have not been finite numbers for {self.steps_skipped} steps, at step {step}, which "
                    "have changed nothing: use train.precision=fp32 or bf16, or model.fast=false"
                )
            )

    def write(self, values: dict[str, Any]) -> None:
        """Write one line of numbers, which has a "step", to metrics.jsonl and W&B."""
        if not self.world.is_main:
            return
        self.unwritten.append(json.dumps({k: _finite(v) for k, v in values.items()}) + "\n")
        try:
            self._append()
        except OSError as error:
            if len(self.unwritten) == 1:  # said once, not at each line
                self.say(
                    f"warning: {self.metrics} cannot be written ({error.strerror}): its lines wait for the disk"
                )
        self._to_wandb(lambda run: run.log(values))

    def _append(self) -> None:
        """Append the lines that wait, all or none."""
        with self.metrics.open("ab", buffering=0) as file:  # a buffer would be flushed once more when it is closed
            size, data = file.tell(), memoryview("".join(self.unwritten).encode())
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
        self.unwritten.clear()

    def image(self, step: int, picture: Image.Image, caption: str) -> Path | None:
        """Keep a picture as samples/step-00001000.png and send it to W&B; returns its file, if this rank has it."""
        if not self.world.is_main:
            return None
        folder = self.run / "samples"
        path = folder / f"step-{step:08d}.png"
        try:
            folder.mkdir(exist_ok=True)
            save_png(picture, path)
        except OSError as error:
            self.say(f"warning: {path} cannot be written ({error.strerror or error})")
        else:
            self._to_wandb(lambda run: self._send(run, step, path, caption))
        return path

    def _send(self, run: Any, step: int, path: Path, caption: str) -> None:
        import wandb

        try:
            # The file, not the picture: W&B would put that into the system's temporary folder first.
            run.log({"samples": wandb.Image(str(path), caption=caption), "step": step})
        except ConnectionError:  # its process has ended
            raise
        except OSError as error:  # it keeps a copy, and lines go on where there is no room for one
            self.say(f"warning: W&B lacks {path} ({error.strerror or error})")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work inside is not counted in images/s."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - started

    def say(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.world.is_main:
            tqdm.write(line)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close at the end; of an error inside, which ends the run, the other ranks are told first."""
        failed = True
        try:
            yield
            failed = False
        except BaseException as error:
            self.world.watch.judge(error)
            raise
        finally:
            self.world.watch.at("closing the tracker", LONG)
            self.close(failed=failed, goes_on=self.goes_on)

    def close(self, *, failed: bool = False, goes_on: bool = False) -> None:
        """`goes_on`: the run was asked to stop and will be started again."""
        if self.unwritten:
            try:
                self._append()
            except OSError:
                self.say(f"warning: {self.metrics} lacks its last {len(self.unwritten)} lines")
        if self.bar is not None:
            self.bar.close()
        if goes_on:
            self._to_wandb(lambda run: run.mark_preempting())
        self._to_wandb(lambda run: self._finish(run, exit_code=int(failed or goes_on)))

    def _finish(self, run: Any, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            remedy = f"`wandb sync --include-online {Path(run.dir).parent}` sends the rest"
            self.say(f"warning: W&B has not taken all within {FINISH_SECONDS:g} s; {remedy}")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as others may see it: addresses of data without user, password and query, and no commands."""

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hide(each) for name, each in value.items()}
        if not isinstance(value, str) or not is_remote(value):
            return value
        return "pipe:..." if value.startswith("pipe:") else shown(value)

    return {name: hide(value) if name == "data" else value for name, value in config.items()}


def require_project(project: str) -> None:
    """Refuse a name that W&B takes for no project.

    Raises:
        UserError: says why.
    """
    bad = [sign for sign in project if sign in _NO_PROJECT]
    if bad or len(project) > _LONGEST_PROJECT:
        why = f"a '{bad[0]}' in it" if bad else f"more than {_LONGEST_PROJECT} letters"
        raise UserError(f"tracker.project={project} has {why}, which W&B does not take: choose another name")


def wandb_mode(wanted: str) -> str:
    """`auto` becomes what WANDB_MODE says, else `online` when the user is logged in, else `offline`."""
    assert wanted in MODES, wanted
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import netrc

    try:
        logins, host = netrc.netrc(os.environ.get("NETRC")), wandb_host()
        known = logins.authenticators(host) or logins.authenticators(_FORMER_HOSTS.get(host, host))
        return "online" if known else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def wandb_host() -> str:
    """HOST or HOST:PORT of W&B's server: the environment's, or the one that `wandb login --host` has kept."""
    import wandb

    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = wandb.Settings(silent=True, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    url: str = os.environ.get("WANDB_BASE_URL") or settings.base_url
    return url.split("//")[-1].split("/")[0]
