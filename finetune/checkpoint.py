"""Everything that a run is, on disk: its folder, the lock on it, and atomic checkpoints.

    RUN/checkpoints/step-00001000/
        weights/    ema/        what was trained, float32, in the diffusers layout
        optimizer/              exp_avg.safetensors, exp_avg_sq.safetensors: whole moments by parameter name
        trainer.json            clock, what the run depends on, latent space, sha256 of each file; written last

Files hold whole float32 tensors by name and know nothing of ranks or strategies: any strategy can read them. A
checkpoint is written under a temporary name and renamed; one that fails its checksums is passed over on resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune import UserError
from finetune.distributed import MOMENTS, Strategy
from finetune.ema import Average
from finetune.models.adapters import LORA_FILE, lora_key, lora_to_diffusers, save_lora
from finetune.models.components import complete_checkpoints

FORMAT = 1
_TEMPORARY = ".tmp-"
_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@dataclass
class Progress:
    """Where a run stands.

    `depends_on`: what must not change when it goes on, by the name of its config key. `latents`: `scale`, `shift`
    and `encoder_sha256` of the latent space that it is trained in. `open_losses`: mean losses of the steps
    since the last line of metrics, so that lines are the same wherever a run was stopped.
    """

    step: int
    images_seen: int
    steps_taken: int
    loss_scale: dict[str, float] = field(default_factory=dict)
    depends_on: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    open_losses: list[float] = field(default_factory=list)


class RunFolder:
    """A run's folder, held by one process at a time.

    The lock is the kernel's: it goes with the process, however that ends.

    Raises:
        UserError: another process holds it, or no folder can be made there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")  # held as long as the run
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be a run's folder ({error.strerror}); choose another run.dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"run.dir={self.path} is in use by {holder}; stop that run or choose another run.dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def close(self) -> None:
        self._lock.close()


@dataclass(frozen=True)
class Layout:
    """How trained parameters are named in files.

    `components` maps `unet` and `text_encoder` to the modules whose configuration stands beside their weights;
    `lora_alpha` is None for full fine-tuning, else the adapter's alpha.
    """

    components: Mapping[str, nn.Module]
    lora_alpha: float | None = None

    def locate(self, name: str) -> tuple[str, str]:
        """(file, key) of a parameter, as `unet.conv_in.weight`, inside `weights/` or `ema/`."""
        if self.lora_alpha is not None:
            return LORA_FILE, lora_key(name)
        component, _, key = name.partition(".")
        if component == "text_encoder" and not key.startswith("text_model."):
            key = f"text_model.{key}"  # the names of transformers 4, which 5 reads as well
        return f"{component}/{_WEIGHTS[component]}", key

    def write(self, folder: Path, whole: Mapping[str, Tensor]) -> None:
        """Write whole parameters under `folder`, with the configuration of their models."""
        if self.lora_alpha is not None:
            save_lora(folder / LORA_FILE, lora_to_diffusers(whole), self.lora_alpha)
            return
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in whole.items():
            file, key = self.locate(name)
            files.setdefault(file, {})[key] = tensor
        for file, tensors in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_config(self.components[path.parent.name], path.parent)
            save_file(tensors, path, metadata={"format": "pt"})


def _write_config(module: Any, folder: Path) -> None:
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(folder)
    else:
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)


class Checkpoints:
    """Saves and restores a run under `RUN/checkpoints`, keeping the last `keep` checkpoints."""

    def __init__(self, run: str | Path, layout: Layout, keep: int) -> None:
        self.run, self.layout, self.keep = Path(run), layout, keep
        self.folder = self.run / "checkpoints"

    def save(self, progress: Progress, strategy: Strategy, average: Average | None) -> None:
        """Write a checkpoint; collective. Until it is whole, the ones before it stay.

        Raises:
            UserError, on every rank: the disk is full or refuses; what was half written is removed.
        """
        world = strategy.world
        final = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"

        def write(action: Callable[[], None]) -> None:
            try:
                world.on_main(action)
            except OSError as error:
                world.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
                raise UserError(
                    f"cannot save {final}: {error.strerror or error}; the checkpoints before it are untouched: "
                    "make room and start the same command again"
                ) from None

        def begin() -> None:
            for stale in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(stale)
            (temporary / "optimizer").mkdir(parents=True)

        write(begin)
        weights = [shard.master for shard in strategy.shards]
        parts = [(weights, partial(self.layout.write, temporary / "weights"))]
        if average is not None:
            parts.append((average.tensors, partial(self.layout.write, temporary / "ema")))
        for kind in MOMENTS:
            path = temporary / "optimizer" / f"{kind}.safetensors"
            parts.append((strategy.moments(kind), partial(_save, path)))
        for tensors, put in parts:  # one at a time: host memory holds one float32 copy of what is trained
            whole = strategy.gather(tensors)
            write(partial(_naming_disk_errors, put, whole))
            del whole

        def finish() -> None:
            write_record(temporary, asdict(progress))
            publish(temporary, final)
            prune(self.run, self.keep, progress.step)

        write(finish)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are whole; broken ones are named in a warning and passed over."""
        for path in reversed(complete_checkpoints(self.run).values()):
            fault = find_fault(path)
            if fault is None:
                return path
            warnings.warn(f"passing over the broken checkpoint {path}: {fault}", stacklevel=2)
        return None

    def named(self, path: str) -> Path:
        """The checkpoint folder `path`.

        Raises:
            UserError: it is not whole.
        """
        fault = find_fault(Path(path))
        if fault is not None:
            raise UserError(f"checkpoint.resume={path} is no whole checkpoint: {fault}")
        return Path(path)

    def read(self, path: Path) -> Progress:
        """What a checkpoint says of its run."""
        record = json.loads((path / "trainer.json").read_text())
        if missing := {"step", "images_seen", "steps_taken"} - record.keys():
            raise UserError(
                f"{path} is no checkpoint of finetune train: it lacks {sorted(missing)[0]}; choose another run.dir"
            )
        return Progress(**{name: record[name] for name in Progress.__dataclass_fields__ if name in record})

    def restore(self, path: Path, strategy: Strategy, average: Average | None) -> None:
        """Put everything back, under any strategy and number of ranks; collective.

        Raises:
            UserError: the checkpoint is of another model or adapter.
        """
        progress = self.read(path)
        with contextlib.ExitStack() as stack:
            reader = _Reader(path, stack)
            masters = [shard.master for shard in strategy.shards]
            strategy.scatter_(masters, lambda name: reader(f"weights/{self._file(name)}", self._key(name)))
            if average is not None:
                folder = "ema" if (path / "ema").is_dir() else "weights"  # the average was switched on later
                strategy.scatter_(
                    average.tensors, lambda name: reader(f"{folder}/{self._file(name)}", self._key(name))
                )
            for kind in MOMENTS:
                strategy.scatter_(strategy.moments(kind), partial(reader, f"optimizer/{kind}.safetensors"))
        strategy.refresh()
        strategy.set_steps_taken(progress.steps_taken)
        strategy.load_scaler_state(progress.loss_scale)

    def _file(self, name: str) -> str:
        return self.layout.locate(name)[0]

    def _key(self, name: str) -> str:
        return self.layout.locate(name)[1]


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the trainer.json that completes a checkpoint: `record` and the checksum of every other file."""
    whole = {"format": FORMAT, **record, "files": _checksums(folder)}
    (folder / "trainer.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Put a finished folder in place of `final`, which may exist; its bytes reach the disk before its name.

    A kill between the two renames leaves no folder at `final`, never half of one.
    """
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    aside = final.with_name(f"{_TEMPORARY}old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(run: Path, keep: int, step: int) -> None:
    """Remove all but the last `keep` of a run's checkpoints up to `step`, the one just saved.

    Later ones go as well: the run went on from before them, because they were broken or by the user's wish, and is
    on its way to make them anew.
    """
    complete = complete_checkpoints(run)
    kept = [at for at in complete if at <= step][-keep:]
    for old in (path for at, path in complete.items() if at not in kept):
        # Renamed first: a kill in the middle of the removal leaves no half checkpoint under a good name.
        doomed = old.with_name(f"{_TEMPORARY}{old.name}")
        os.replace(old, doomed)
        shutil.rmtree(doomed)


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        record = json.loads((path / "trainer.json").read_text())
        if record["format"] != FORMAT:
            return f"format {record['format']}, this version reads {FORMAT}"
        for name, digest in record["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != digest:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"trainer.json cannot be read ({error})"
    return None


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on when what a run depends on has changed since its checkpoint.

    Raises:
        UserError: names the first such key, with both values.
    """
    for key in sorted(saved.keys() & now.keys()):
        if saved[key] != now[key]:
            raise UserError(
                f"cannot go on from {path}: {key} was {saved[key]!r} and is {now[key]!r} now; "
                "put it back or choose another run.dir"
            )


class _Reader:
    """Reads single tensors from a checkpoint's files, each opened once."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self.root, self.stack, self.files = root, stack, dict[str, Any]()

    def __call__(self, file: str, key: str) -> Tensor:
        if file not in self.files:
            if not (self.root / file).is_file():
                raise UserError(f"{self.root} holds no {file}: it is of another adapter or model")
            self.files[file] = self.stack.enter_context(safe_open(self.root / file, framework="pt"))
        try:
            return self.files[file].get_tensor(key)
        except Exception:
            raise UserError(f"{self.root / file} holds no {key}: it is of another adapter or model") from None


def _save(path: Path, whole: Mapping[str, Tensor]) -> None:
    save_file(dict(whole), path)


def _naming_disk_errors(put: Callable[[Mapping[str, Tensor]], None], whole: Mapping[str, Tensor]) -> None:
    try:
        put(whole)
    except Exception as error:
        # safetensors wraps the system's error in its own and leaves the number in the text.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(28, "no space left on device") from None
        raise


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
