"""A name is a folder or a hub id; which one is decided without waiting for the hub."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from finetune import UserError
from finetune.models import sources


def test_paths_are_told_from_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert sources.local_folder("runs") is not None
    assert sources.local_folder("someone/model-1.5") is None
    for path in ("runs/none", "./someone/model", "/someone", "a/b/c", tmp_path / "x"):
        with pytest.raises(UserError, match="no such folder"):
            sources.local_folder(path)


def test_a_bare_name_is_a_folder_here_or_a_model_in_the_box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.local_folder("emoji-base") == sources.BUNDLED / "emoji-base"
    assert sources.relative_source("emoji-base", tmp_path) == "emoji-base"  # so a run may move
    (tmp_path / "emoji-base").mkdir()
    assert sources.local_folder("emoji-base").resolve() == (tmp_path / "emoji-base").resolve()
    with pytest.raises(UserError, match="no such folder: emoji-bas$"):
        sources.local_folder("emoji-bas")


class Hub:
    def __init__(self, error=None):
        self.error = error

    def __call__(self):
        return self

    def model_info(self, name, revision, timeout):
        assert timeout < 30
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    def replace(error=None, download=None):
        sources._on_the_hub.cache_clear()
        monkeypatch.setattr(sources.huggingface_hub, "HfApi", Hub(error))
        monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", download)

    yield replace
    sources._on_the_hub.cache_clear()


def test_only_the_part_is_downloaded(hub, tmp_path):
    calls = []

    def download(name, **arguments):
        calls.append((name, arguments))
        return str(tmp_path)

    hub(download=download)
    assert sources.fetch("someone/model", "unet", "v2") == tmp_path
    ((name, arguments),) = calls
    assert (name, arguments["revision"], arguments["local_files_only"]) == ("someone/model", "v2", False)
    assert "unet/*.safetensors" in arguments["allow_patterns"]
    assert not any("bin" in pattern or "ckpt" in pattern for pattern in arguments["allow_patterns"])


def test_files_in_float16_are_downloaded_where_a_model_has_no_others(hub, tmp_path):
    held = [
        "config.json",
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.non_ema.safetensors",
    ]
    calls = []

    def download(name, allow_patterns, ignore_patterns, **_):
        calls.append(ignore_patterns)
        for file in [f"unet/{each}" for each in held]:
            if not any(fnmatch(file, pattern) for pattern in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    hub(download=download)
    assert sources.fetch("someone/model", "unet") == tmp_path
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == sorted(held[:3])
    held.append("model.safetensors")
    shutil.rmtree(tmp_path / "unet")
    calls.clear()
    sources.fetch("someone/model", "unet")
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == ["config.json", "model.safetensors"]
    assert len(calls) == 1


def test_out_of_reach_the_cache_is_asked(hub, tmp_path):
    hub(ConnectionError("no network"), lambda name, local_files_only, **_: str(tmp_path / str(local_files_only)))
    assert sources.fetch("someone/model", "unet") == tmp_path / "True"

    def nothing(name, **_):
        raise FileNotFoundError("nothing cached")

    hub(ConnectionError("no network"), nothing)
    with pytest.raises(UserError, match="out of reach and the cache has no copy"):
        sources.fetch("someone/model", "unet")


def test_a_model_that_the_hub_does_not_know(hub):
    class MissingError(RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    hub(MissingError())
    with pytest.raises(UserError, match="no such folder, and no such model"):
        sources.fetch("someone/model", "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 3, 3)])
def test_a_digest_is_of_names_shapes_and_every_value(shape, dtype):
    """Whatever the layout, and where the bytes are no whole words."""
    numbers = torch.arange(1, 1 + torch.Size(shape).numel())
    weight = numbers.view(shape).to(dtype)
    digest = sources.weights_digest({"a": weight})
    assert sources.weights_digest({"a": torch.cat([numbers[:1], numbers])[1:].view(shape).to(dtype)}) == digest
    if len(shape) == 4:
        assert sources.weights_digest({"a": weight.to(memory_format=torch.channels_last)}) == digest
    for place in range(len(numbers)):
        other = weight.clone()
        other.view(-1)[place] += 1
        assert sources.weights_digest({"a": other}) != digest
    assert len({digest, sources.weights_digest({"b": weight}), sources.weights_digest({"a": weight[None]})}) == 3
