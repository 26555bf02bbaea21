"""Training from what the data plane offers: cached states of captions, several sources, remote shards."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.cli import main as data_tools
from finetune import UserError, build, is_by_all
from finetune.conditioning import dropped
from finetune.config import Config, compose
from finetune.data.shards import Manifest, ShardSet, write_classes
from finetune.distributed import World
from finetune.loop import Parts
from finetune.models.text import load_tokenizer, save_tokenizer
from tests.conftest import CAPTIONS, launch, metrics
from tests.data.servers import Server

ALONE = World(0, 1, 0, torch.device("cpu"))
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def with_states(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 32 px with one or two captions each (one with none), encoded with states of the captions."""
    root = tmp_path_factory.mktemp("states")
    pictures = root / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(24):
        Image.new("RGB", (32, 32), (10 * index, 255 - 10 * index, 90)).save(pictures / f"{index}.png")
        captions = [CAPTIONS[index % 12], f"{CAPTIONS[index % 12]} on a table"][: index % 3]
        rows.append(json.dumps({"file_name": f"{index}.png", "captions": captions}))
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    assert data_tools(["ingest", "folder", str(pictures), "--out", str(root / "shards")]) == 0
    encode = ["encode", str(root / "shards"), "--vae", str(pipeline), "--text-encoder", str(pipeline)]
    assert data_tools([*encode, "--out", str(root / "latents"), "--workers", "0"]) == 0
    return root / "latents"


def parts_of(overrides: list[str], *more: str) -> tuple[Config, Parts]:
    config, _ = compose("train", [*overrides, *more], Config)
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    return config, build.build(config, ALONE, run)


def contexts(config: Config, parts: Parts, batches: int) -> torch.Tensor:
    loader = parts.data.loader(seed=config.seed, micro_batch=4)
    taken = iter(loader)
    model = parts.model
    found = []
    for batch in itertools.islice(taken, batches):
        inputs = model.conditioner.inputs(batch, dropped(batch.clock, 0.3, config.seed))
        found.append(model("condition", inputs)["context"])
    taken.close()
    loader.close()
    return torch.cat(found).detach().float()


def test_cached_states_are_what_the_encoder_says(pipeline: Path, with_states: Path, overrides: list[str]) -> None:
    """Several captions, none, and dropped ones: the same context, to half precision, at every visit."""
    settings = [*overrides, f"data.shards={with_states}", f"model.pretrained={pipeline}", "train.global_batch=4"]
    settings += ["validation.samples=0", "model.unet={}"]
    config, cached = parts_of(settings)
    _, plain = parts_of(settings, "data.text_states=false")
    assert cached.data.wanted.text_states and not plain.data.wanted.text_states
    ours, reference = contexts(config, cached, 12), contexts(config, plain, 12)
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(ours[0], ours[1], atol=0.1) or not torch.allclose(ours[0], ours[2], atol=0.1)


def test_a_trained_or_another_encoder_makes_its_own_states(
    pipeline: Path, with_states: Path, overrides: list[str]
) -> None:
    settings = [*overrides, f"data.shards={with_states}", "train.global_batch=4", "validation.samples=0"]
    pretrained = [f"model.pretrained={pipeline}", "model.unet={}"]
    trained = parts_of(settings, *pretrained, "model.train_text_encoder=true")[1]
    assert not trained.data.wanted.text_states
    scratch = parts_of(settings, f"model.vae={pipeline}")[1]
    assert not scratch.data.wanted.text_states


def test_states_of_another_encoder_are_left_alone_with_a_note(
    pipeline: Path, with_states: Path, overrides: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(with_states, other)
    manifest = Manifest.load(other)
    assert manifest.text is not None
    replace(manifest, text=replace(manifest.text, sha256="0" * 64)).save(other)
    settings = [*overrides, f"data.shards={other}", "train.global_batch=4", f"model.pretrained={pipeline}"]
    parts = parts_of(settings, "model.unet={}", "validation.samples=0")[1]
    assert not parts.data.wanted.text_states
    assert any("cached states of captions are not used" in notice for notice in parts.notices)


@pytest.mark.parametrize("other", ["padding", "words"])
def test_states_of_other_tokens_are_left_alone_with_a_note(
    pipeline: Path, with_states: Path, overrides: list[str], tmp_path: Path, other: str
) -> None:
    """Training saw states of the model's own tokenizer, and pictures were drawn by that of model.tokenizer."""
    save_tokenizer(load_tokenizer(pipeline), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # which would be read instead of the others
    if other == "padding":
        path = tmp_path / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    else:
        path = tmp_path / "tokenizer" / "merges.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    settings = [*overrides, f"data.shards={with_states}", "train.global_batch=4", f"model.pretrained={pipeline}"]
    settings += ["model.unet={}", "validation.samples=0"]
    same = parts_of(settings, f"model.tokenizer={pipeline / 'tokenizer'}")[1]
    assert same.data.wanted.text_states
    parts = parts_of(settings, f"model.tokenizer={tmp_path / 'tokenizer'}")[1]
    assert not parts.data.wanted.text_states
    assert any("has those of other tokens than this model's" in notice for notice in parts.notices)


def test_a_mixture_trains_and_goes_on_exactly(
    latents: Path, with_states: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """Two sources by weight; a stop in the middle can't be seen; another weight is refused; it is drawn from."""
    settings = [word for word in overrides if not word.startswith("data.shards")]
    settings += [f"data.sources.a.shards={latents}", f"data.sources.b.shards={with_states}"]
    settings += ["data.sources.b.weight=0.5", "train.steps=4"]
    assert command("train", *settings, f"run.dir={tmp_path / 'calm'}")[0] == 0
    assert command("train", *settings, f"run.dir={tmp_path / 'two'}", "train.steps=2")[0] == 0
    code, line = command("train", *settings, f"run.dir={tmp_path / 'two'}", "data.sources.b.weight=0.7")
    assert (code, "data.sources (weights) was [1.0, 0.5] and is [1.0, 0.7] now" in line) == (2, True), line
    assert command("train", *settings, f"run.dir={tmp_path / 'two'}")[0] == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "calm")
    drawn = ["--prompt", "a red cat", "--steps", "1", "--out", str(tmp_path / "cat.png")]
    assert command("sample", str(tmp_path / "two"), *drawn)[0] == 0
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (32, 32)  # the shards'


def test_names_of_classes_may_differ_where_the_task_reads_none(
    latents: Path, overrides: list[str], tmp_path: Path
) -> None:
    """As where pictures from folders of classes go along with others, all with captions."""
    shutil.copytree(latents, tmp_path / "named")
    manifest = Manifest.load(latents)
    replace(manifest, classes=write_classes(tmp_path / "named", ["a", "b"])).save(tmp_path / "named")
    settings = [word for word in overrides if not word.startswith("data.shards")]
    settings += [f"data.sources.a.shards={latents}", f"data.sources.b.shards={tmp_path / 'named'}"]
    assert len(parts_of(settings)[1].data.sources) == 2
    with pytest.raises(UserError, match="name their classes differently"):
        parts_of(settings, "task=class_to_image")


def test_what_is_never_trained_on_is_said(with_states: Path, overrides: list[str]) -> None:
    parts = parts_of([*overrides, f"data.shards={with_states}", "train.global_batch=5", "validation.samples=0"])[1]
    assert any("each epoch leaves out 4 of 24 samples, others each time" in notice for notice in parts.notices)
    more = ["train.global_batch=4", "validation.every=1", "validation.samples=9"]
    parts = parts_of([*overrides, f"data.shards={with_states}", *more])[1]
    assert "2 samples are held out, not 9: a tenth of each bucket at most" in parts.notices
    parts = parts_of([*overrides, f"data.shards={with_states}", *more, "validation.every=0"])[1]
    assert any("2 samples are held out though validation.every=0" in notice for notice in parts.notices)
    assert parts.data.order.sizes.sum() == 22


def test_data_of_one_process_alone_is_refused_by_all(overrides: list[str]) -> None:
    class Odd(World):
        def is_same(self, text: str) -> bool:
            return text != manifests

    config, parts = parts_of(overrides)
    manifests = repr([source.shards.manifest.sha256 for source in parts.data.sources])
    with pytest.raises(UserError, match="the processes read different data: .*; make them the same") as caught:
        build.build(config, Odd(0, 1, 0, torch.device("cpu")), Path(config.run.dir))
    assert is_by_all(caught.value)


@pytest.mark.slow
def test_two_processes_with_different_data_are_refused(latents: Path, overrides: list[str], tmp_path: Path) -> None:
    """As where a machine has an older copy on its own disk: the last shard is not there yet."""
    shutil.copytree(latents, tmp_path / "0")
    shutil.copytree(latents, tmp_path / "1")
    manifest = Manifest.load(latents)
    replace(manifest, shards=manifest.shards[:-1]).save(tmp_path / "1")
    done = launch(2, [*overrides, f"data.shards={tmp_path}/${{oc.env:RANK}}", f"run.dir={tmp_path / 'run'}"])
    assert done.returncode != 0
    assert done.stderr.count("error: the processes read different data: a machine has another set") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def server(latents: Path) -> Iterator[Server]:
    """The latents over HTTP."""
    with contextlib.closing(Server(latents)) as running:
        yield running


@pytest.mark.slow
def test_two_ranks_train_from_a_server_as_from_a_folder(
    server: Server, latents: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """The same losses, and each shard is fetched once for both ranks."""
    assert command("train", *overrides, f"run.dir={tmp_path / 'local'}")[0] == 0
    remote = [f"data.shards={server.url}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gib=0.1"]
    done = launch(2, [*overrides, *remote, f"run.dir={tmp_path / 'remote'}"])
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("local", "remote")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for shard in ShardSet.open(latents).manifest.shards:
        # By a range comes what is held out.
        assert sum(r.path.endswith(f"/{shard.name}") and r.range is None for r in server.requests) == 1


def test_a_cache_that_would_fetch_again_and_again_is_said(
    server: Server, overrides: list[str], tmp_path: Path
) -> None:
    remote = [f"data.shards={server.url}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gib=0.1"]
    _, parts = parts_of(overrides, *remote)
    said = [notice for notice in parts.notices if "fetched many times an epoch" in notice]
    assert not said
    cache = parts.data.sources[0].shards.cache
    assert cache is not None
    cache.max_bytes = parts.data.sources[0].shards.manifest.bytes // 2
    assert "raise data.cache_gib, or lower data.lanes=" in build.fetched_again(parts.data, 1)[0]


def test_a_server_that_is_away_is_one_line(overrides: list[str], command: Command, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as gone:
        url = f"http://127.0.0.1:{gone.server_address[1]}"
    code, line = command("train", *overrides, f"data.shards={url}/none", f"data.cache_dir={tmp_path}")
    assert (code, url in line) == (74, True), line  # may help later


def test_a_cache_without_room_is_refused(overrides: list[str]) -> None:
    config = compose("train", [*overrides, "data.cache_gib=0"], Config)[0]
    with pytest.raises(UserError, match="data.cache_gib=0"):
        build.check(config)


def test_states_are_read_by_caption(with_states: Path) -> None:
    shards = ShardSet.open(with_states)
    assert shards.manifest.text is not None
    out = np.empty((shards.manifest.text.length, shards.manifest.text.width), np.float16)
    sample = next(i for i in range(len(shards)) if len(shards.read_json(i)["captions"]) == 2)
    shards.read_row(sample, "text.npy", 0, 2, out)
    first = out.copy()
    shards.read_row(sample, "text.npy", 1, 2, out)
    assert not np.array_equal(first, out)
    with pytest.raises(UserError, match=r"has a text.npy that is no float16 \[3, "):
        shards.read_row(sample, "text.npy", 0, 3, out)
