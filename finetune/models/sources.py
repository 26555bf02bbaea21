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

from finetune import UserError, first_line

_PROBE_SECONDS = 5.0


def fetch(source: str | Path, part: str, revision: str | None = None) -> Path:
    """A local folder that holds `part` (`unet`, `vae`, ...) in a subfolder, or is it.

    A hub id is downloaded, that part and its safetensors alone, or taken from the cache where the hub is out
    of reach.

    Raises:
        UserError: no such folder, no such model on the hub, or the hub is out of reach and the cache has
        nothing.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder
    name = str(source)
    kinds = ("*.json", "*.txt", "*.safetensors")
    patterns = [*(f"{part}/{kind}" for kind in kinds), "config.json", "diffusion_pytorch_model*.safetensors"]
    reachable = _on_the_hub(name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.non_ema*"],
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
    """The folder that `source` names, or None where it can only be a hub id.

    Raises:
        UserError: it looks like a path and there is no such folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.is_file():
        raise UserError(f"{text} is a file; a model is a folder in the diffusers layout or a hub id")
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
