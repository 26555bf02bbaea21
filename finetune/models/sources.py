"""Where a model comes from, a local folder or the Hugging Face Hub, and how a manifest names it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor

from finetune import BUNDLED, UserError, first_line
from finetune.models.single_file import open_file
from finetune.models.weight_files import whole_weights
from finetune.runs import is_run

FILES = (".safetensors", ".ckpt", ".pt")  # of single-file checkpoints
_PROBE_SECONDS = 5.0
_HALF, _NON_EMA = "*.fp16[.-]*", "*.non_ema*"  # other files of the same weights


def fetch(source: str | Path, part: str, revision: str | None = None) -> Path:
    """A local folder that holds `part` (`unet`, `vae`, ...) in a subfolder, or is it.

    A hub id is downloaded, that part and its safetensors alone, or taken from the cache where the hub is out
    of reach. Those in float16 are where a model has no others.

    Raises:
        UserError: no such folder, no such model on the hub, or the hub is out of reach and the cache has
        nothing.
    """
    folder = local_folder(source)
    if folder is not None:
        if not (folder / part).is_dir():
            _refuse_run(source, folder)
        return folder
    if fetch_file(source, revision) is not None:
        raise UserError(f"{source} is a single file: it holds no {part}")
    kinds = ("*.json", "*.txt", "*.safetensors")
    patterns = [*(f"{part}/{kind}" for kind in kinds), "config.json", "diffusion_pytorch_model*.safetensors"]
    found = download(str(source), patterns, revision, ignore=[_HALF, _NON_EMA])
    places = [place for place in (found / part, found) if (place / "config.json").is_file()]
    if places and not whole_weights(places[0]):
        return download(str(source), patterns, revision, ignore=[_NON_EMA])
    return found


def _refuse_run(source: str | Path, folder: Path) -> None:
    """Refuse a run, or a checkpoint of one, where a model is wanted."""
    run, checkpoint = folder, ""
    if (folder / "trainer.json").is_file() and is_run(folder.absolute().parent.parent):
        run, checkpoint = folder.parent.parent, f" --checkpoint {folder.name}"
    if is_run(run):
        what = f"a checkpoint of the run {run}" if checkpoint else "a run"
        raise UserError(
            f"{source}: this is {what}, not a model: `finetune export {run}{checkpoint} --format diffusers --out "
            f"MODEL` makes one of it, and `finetune sample {run}{checkpoint}` draws from it"
        )


def fetch_file(source: str | Path, revision: str | None = None) -> Path | None:
    """The single-file checkpoint that `source` names, or None where it names a folder or a hub id.

    `owner/name/path/to/file.safetensors` is a file in a model of the hub.

    Raises:
        UserError: there is no such file, or it is of another type.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        if path.suffix not in FILES:
            raise UserError(f"{text} is a file; a model is a folder, a hub id or a file {' or '.join(FILES)}")
        return path
    if path.suffix not in FILES or path.is_dir():
        return None
    inside = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+)", text)
    if inside is None or isinstance(source, Path) or path.parent.is_dir():
        raise UserError(f"no such file: {text}")
    found = download(inside[1], [inside[2]], revision) / inside[2]
    if not found.is_file():
        raise UserError(f"{text}: {inside[1]} on the Hugging Face Hub holds no {inside[2]}")
    return found


def download(
    name: str, patterns: list[str], revision: str | None = None, *, ignore: list[str] | None = None
) -> Path:
    """The folder in the cache of what a hub id holds by these patterns, downloaded where the hub can be reached.

    Raises:
        UserError: no such model on the hub, or the hub is out of reach and the cache has nothing.
    """
    reachable = _on_the_hub(name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                local_files_only=not reachable,
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        if reachable:
            raise UserError(f"{name} cannot be downloaded: {first_line(error)}") from error
        raise UserError(
            f"{name}: no such folder; were it a model on the Hugging Face Hub, that is out of reach and the cache "
            "has no copy"
        ) from error


def has_part(source: str | Path, part: str, revision: str | None = None) -> bool:
    """Whether a model has `part` in a subfolder, or in its single file.

    Raises:
        UserError: there is no such model.
    """
    if (file := fetch_file(source, revision)) is not None:
        return open_file(file).has(part)
    return (fetch(source, part, revision) / part / "config.json").is_file()


@functools.cache
def _on_the_hub(name: str, revision: str | None) -> bool:
    """Whether the hub can be reached and has the model: asked once, since the libraries retry for minutes."""
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_PROBE_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"{name} at revision {revision}" if revision else name
        raise UserError(f"{what}: no such folder, and no such model on the Hugging Face Hub") from error
    except Exception:  # whatever keeps the hub out of reach, offline mode too; the cache may still do
        return False
    return True


def local_folder(source: str | Path) -> Path | None:
    """The folder that `source` names, or None where it can only be a hub id or a single-file checkpoint.

    A bare name such as `emoji-base` is a folder here, else a model in the box.

    Raises:
        UserError: it looks like a path and there is no such folder; or it is empty.
    """
    if not str(source).strip():
        raise UserError("the name of the model is empty (a shell variable that is not set?)")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if re.fullmatch(r"[a-z0-9-]+", text) and (BUNDLED / text / "model_index.json").is_file():
        return BUNDLED / text
    if path.suffix in FILES:
        return None
    if path.is_file():
        raise UserError(f"{text} is a file; a model is a folder, a hub id or a file {' or '.join(FILES)}")
    # `runs/first` has the form of a hub id: an existing parent says that a folder was meant.
    hub_form = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None
    if isinstance(source, Path) or not hub_form or path.parent.is_dir():
        raise UserError(f"no such folder: {text}")
    return None


def relative_source(source: str | os.PathLike[str], root: str | os.PathLike[str]) -> str:
    """How a file in `root` names `source`: an existing path relative to `root`, starting with a dot; else as it is.

    So a folder of model and shards can be moved or mounted elsewhere.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    relative = Path(os.path.relpath(path.resolve(), Path(root).resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """sha256 over sorted names, shapes and float16 values, so that a float32 and a float16 copy have one sum."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Tells weights from others at the speed of memory: sha256 over sorted names, shapes, and sums of 8-byte words.

    `weights_sha256` takes seconds a gigabyte. Words of 4 bytes would have to be widened one by one, at a twentieth
    of this speed.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        data = weight.detach().contiguous().view(-1).view(torch.uint8).numpy()
        words = data[: len(data) // 8 * 8].view("<u8")
        total = (int(words.sum()) + int(data[words.nbytes :].sum())) % 2**64
        digest.update(f"{name} {list(weight.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]
