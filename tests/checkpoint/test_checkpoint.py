"""Checkpoints: where things lie, that damage is seen, and that others read the files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetune import UserError, build
from finetune.checkpoint import Checkpoints, Layout, RunFolder, find_fault, followed, record, require_same
from finetune.config import Config, compose
from finetune.loop import Parts
from finetune.models.adapters import LORA_FILE
from tests.checkpoint.conftest import Command, disturb, parts_of, progress_at

# --- names ----------------------------------------------------------------------------------------


def test_full_weights_lie_in_the_diffusers_layout() -> None:
    layout = Layout({})
    unet, text = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    assert layout.locate("unet.conv_in.weight") == (unet, "conv_in.weight")
    assert layout.locate("text_encoder.final_layer_norm.bias") == (text, "text_model.final_layer_norm.bias")
    assert layout.locate("text_encoder.text_model.final_layer_norm.bias") == (
        text,
        "text_model.final_layer_norm.bias",
    )


def test_adapters_lie_in_the_file_that_diffusers_loads() -> None:
    layout = Layout({}, lora_alphas={})
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert layout.locate(f"unet.{name}.lora_A.default.weight") == (LORA_FILE, f"unet.{name}.lora_A.weight")
    assert layout.locate("text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.default.weight") == (
        LORA_FILE,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
    )


def test_a_checkpoint_holds_what_the_contract_says(saved: tuple[Parts, Path]) -> None:
    _, path = saved
    models = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {
        "trainer.json",
        *(f"{kind}/{model}/config.json" for kind in ("weights", "ema") for model in models),
        *(f"{kind}/{model}/{file}" for kind in ("weights", "ema") for model, file in models.items()),
        "optimizer/exp_avg.safetensors",
        "optimizer/exp_avg_sq.safetensors",
    }
    for file in path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


# --- others read it -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_diffusers_and_transformers_load_the_weights(saved: tuple[Parts, Path]) -> None:
    parts, path = saved
    assert parts.average is not None
    by_name = dict(zip([shard.name for shard in parts.strategy.shards], parts.average.tensors, strict=True))
    live = dict(zip(by_name, [shard.master for shard in parts.strategy.shards], strict=True))
    for kind, wanted in (("weights", live), ("ema", by_name)):
        unet, info = UNet2DConditionModel.from_pretrained(path / kind / "unet", output_loading_info=True)
        assert not any(info.values()), info
        text, info = CLIPTextModel.from_pretrained(path / kind / "text_encoder", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        found = {f"unet.{n}": p for n, p in unet.named_parameters()}
        found |= {f"text_encoder.{n}": p for n, p in text.named_parameters()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert dict(unet.config)["block_out_channels"] == [16, 32]


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_an_adapter_with_its_scale(pipeline: Path, overrides: list[str]) -> None:
    from diffusers import StableDiffusionPipeline

    base = [f"model.pretrained={pipeline}", "model.unet={}", "adapter=lora", "adapter.rank=2", "adapter.alpha=6"]
    parts = parts_of(overrides, *base)
    disturb(parts)
    parts.checkpoints.save(progress_at(1), parts.strategy, parts.averages)
    folder = parts.checkpoints.folder / "step-00000001" / "weights"
    reference = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    reference.load_lora_weights(folder, weight_name=LORA_FILE)
    z, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        wanted = parts.model.unet.eval()(z, 10, context).sample
        found = reference.unet(z, 10, context).sample
        plain = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")(z, 10, context).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2)


# --- saving and restoring -------------------------------------------------------------------------


def test_restoring_puts_everything_back(saved: tuple[Parts, Path], overrides: list[str]) -> None:
    parts, path = saved
    fresh = parts_of(overrides)
    assert fresh.average is not None and parts.average is not None
    fresh.checkpoints.restore(path, fresh.strategy, fresh.averages)
    for one, other in zip(parts.strategy.shards, fresh.strategy.shards, strict=True):
        assert one.name == other.name and torch.equal(one.master, other.master)
    pairs = [(parts.average.tensors, fresh.average.tensors)]
    pairs += [(parts.strategy.moments(kind), fresh.strategy.moments(kind)) for kind in ("exp_avg", "exp_avg_sq")]
    for left, right in pairs:
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert fresh.strategy.steps_taken == 4  # what the record says
    live = dict(fresh.model.named_parameters())
    for shard in fresh.strategy.shards:  # the restored tensors are the ones that a forward pass uses
        name = shard.name.replace("text_encoder.", "conditioner.encoder.", 1)
        assert torch.equal(live[name], shard.master)


def test_an_average_that_is_switched_on_later_starts_at_the_weights(
    saved: tuple[Parts, Path], overrides: list[str]
) -> None:
    parts, path = saved
    parts.checkpoints.save(progress_at(6), parts.strategy, [])
    path = path.with_name("step-00000006")
    assert not (path / "ema").exists()
    fresh = parts_of(overrides)
    assert fresh.average is not None
    fresh.checkpoints.restore(path, fresh.strategy, fresh.averages)
    for shard, tensor in zip(fresh.strategy.shards, fresh.average.tensors, strict=True):
        assert torch.equal(shard.master, tensor) and shard.master.data_ptr() != tensor.data_ptr()


def test_what_a_checkpoint_says_of_its_run(saved: tuple[Parts, Path]) -> None:
    parts, _ = saved
    said = progress_at(5, loss_scale={"scale": 512.0}, depends_on={"seed": 3, "adapter.targets": ["to_q"]})
    parts.checkpoints.save(said, parts.strategy, [])
    assert parts.checkpoints.read(parts.checkpoints.folder / "step-00000005") == said


def test_the_newest_whole_checkpoint_is_chosen(saved: tuple[Parts, Path]) -> None:
    parts, first = saved
    assert parts.checkpoints.latest() == first
    for step in (10, 9):
        shutil.copytree(first, first.with_name(f"step-{step:08d}"))
    shutil.copytree(first, first.with_name(".tmp-step-00000011"))
    (first.with_name("step-00000012") / "weights").mkdir(parents=True)  # no trainer.json
    assert parts.checkpoints.latest() == first.with_name("step-00000010")
    (first.with_name("step-00000010") / "optimizer" / "exp_avg.safetensors").unlink()
    with pytest.warns(UserWarning, match="step-00000010: optimizer/exp_avg.safetensors is missing"):
        assert parts.checkpoints.latest() == first.with_name("step-00000009")


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, Layout({}), keep=1).latest() is None


def test_saving_again_replaces(saved: tuple[Parts, Path]) -> None:
    parts, path = saved
    (path / "trainer.json").write_text("broken")
    parts.checkpoints.save(progress_at(4), parts.strategy, parts.averages)
    assert find_fault(path) is None
    assert os.listdir(path.parent) == [path.name]


def broken_at(step: int, whole: Path) -> None:
    """A damaged copy of a checkpoint, as one of another step."""
    shutil.copytree(whole, whole.with_name(f"step-{step:08d}"))
    flip(whole.with_name(f"step-{step:08d}") / "optimizer/exp_avg.safetensors")


def test_a_new_checkpoint_outlives_the_broken_one_that_it_follows(saved: tuple[Parts, Path]) -> None:
    """With keep=1 a broken checkpoint of a later step counts as the newest, and the new whole one is pruned."""
    parts, path = saved
    broken_at(9, path)
    checkpoints = Checkpoints(parts.checkpoints.run, parts.checkpoints.layout, keep=1)
    checkpoints.save(progress_at(6), parts.strategy, parts.averages)
    assert find_fault(path.with_name("step-00000006")) is None


@pytest.mark.parametrize("step", [12, 9], ids=["later", "in-its-place"])
def test_a_broken_checkpoint_does_not_push_out_a_whole_one(saved: tuple[Parts, Path], step: int) -> None:
    """A run that passed it over comes to the same step again, too."""
    parts, path = saved
    broken_at(9, path)
    checkpoints = Checkpoints(parts.checkpoints.run, parts.checkpoints.layout, keep=2)
    with pytest.warns(UserWarning, match="passing over"):
        assert checkpoints.latest() == path
    checkpoints.save(progress_at(step), parts.strategy, parts.averages)
    new = path.with_name(f"step-{step:08d}")
    assert sorted(os.listdir(path.parent)) == [path.name, new.name]
    assert find_fault(new) is None


def test_what_came_of_a_named_checkpoint_is_gone_on_from(saved: tuple[Parts, Path], tmp_path: Path) -> None:
    parts, here = saved
    named = shutil.copytree(here, tmp_path / "elsewhere" / here.name)
    run = parts.checkpoints.run
    with pytest.raises(UserError, match="has checkpoints that did not come of .* choose another run.dir"):
        followed(run, str(named))  # `here` is another line of the run's
    first, second = (here.with_name(f"step-{step:08d}") for step in (6, 8))
    for path in (first, second):
        shutil.copytree(here, path)
        rewrite(path / "trainer.json", lambda record: record.update(begun_from=str(named)))
    assert followed(run, str(named)) == (second, str(named))
    assert followed(run, str(here))[0] == here
    flip(second / "optimizer/exp_avg.safetensors")
    with pytest.warns(UserWarning, match="passing over"):
        assert followed(run, str(named)) == (first, str(named))
    flip(first / "optimizer/exp_avg.safetensors")
    with pytest.warns(UserWarning, match="passing over"):
        assert followed(run, str(named)) == (named, str(named))


# --- damage ---------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


UNET = "weights/unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: None, None),
        (lambda path: flip(path / UNET), f"{UNET} does not have its checksum"),
        (lambda path: os.truncate(path / UNET, 100), f"{UNET} does not have its checksum"),
        (lambda path: (path / UNET).unlink(), f"{UNET} is missing"),
        (lambda path: flip(path / "weights/unet/config.json"), "weights/unet/config.json does not have"),
        (lambda path: shutil.rmtree(path / "ema"), "ema/text_encoder/config.json is missing"),
        (lambda path: os.truncate(path / "trainer.json", 50), "trainer.json cannot be read"),
        (lambda path: (path / "trainer.json").unlink(), "trainer.json cannot be read"),
        (lambda path: (path / "trainer.json").write_text("[]"), "trainer.json cannot be read"),
        (lambda path: rewrite(path / "trainer.json", lambda r: r.pop("files")), "trainer.json cannot be read"),
        (lambda path: shutil.rmtree(path), "there is no such folder"),
    ],
)  # fmt: skip
def test_damage_is_found(intact: Path, tmp_path: Path, damage: Callable[[Path], object], says: str | None) -> None:
    path = tmp_path / "checkpoints" / intact.name
    shutil.copytree(intact, path)
    damage(path)
    fault = find_fault(path)
    assert (fault is None) if says is None else (fault is not None and says in fault)
    checkpoints = Checkpoints(tmp_path, Layout({}), keep=1)
    if says is None:
        assert checkpoints.followed(str(path))[0] == checkpoints.latest() == path
    else:
        with pytest.raises(UserError, match=f"checkpoint.resume=.*{path.name} is no whole checkpoint"):
            checkpoints.followed(str(path))


@pytest.mark.filterwarnings("ignore:passing over")
def test_a_run_of_damaged_checkpoints_does_not_begin_anew(
    overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """It would empty the metrics, and remove later checkpoints with its first save."""
    words = [*overrides, "train.steps=2", "checkpoint.every=1", "checkpoint.keep=2"]
    assert command("train", *words)[0] == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for step in (1, 2):
        flip(run / f"checkpoints/step-0000000{step}" / UNET)
    for resume in ("auto", "never"):
        code, said = command("train", *words, "train.steps=3", f"checkpoint.resume={resume}")
        assert code == 2 and f"no checkpoint in {run}/checkpoints is whole (step-00000001: {UNET} does not" in said
    for step in (1, 2):
        flip(run / f"checkpoints/step-0000000{step}" / UNET)
    assert {path: path.read_bytes() for path in before} == before


def test_what_is_no_damage_is_not_passed_over(saved: tuple[Parts, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save would prune a checkpoint of another version, or one that the disk did not give for a moment."""
    parts, path = saved
    newer = path.with_name("step-00000009")
    shutil.copytree(path, newer)
    rewrite(newer / "trainer.json", lambda record: record.update(format=99))
    for read in (parts.checkpoints.latest, lambda: parts.checkpoints.followed(str(newer))):
        with pytest.raises(UserError, match=f"{newer} has format 99 and this version reads 1: go on with the"):
            read()
    shutil.rmtree(newer)

    def away(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(record, "_sum", away)
    with pytest.raises(OSError, match="Stale file handle") as caught:
        parts.checkpoints.latest()
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_no_empty_one(
    saved: tuple[Parts, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The run would begin anew: it would empty the metrics, and remove later checkpoints with its first save."""
    parts, path = saved
    original = {name: getattr(os, name) for name in ("listdir", "scandir")}

    def refused(name: str) -> Callable[[Any], Any]:
        def call(folder: Any) -> Any:
            if Path(folder) == path.parent:
                raise OSError(number, os.strerror(number), str(folder))
            return original[name](folder)

        return call

    for name in original:
        monkeypatch.setattr(os, name, refused(name))
    with pytest.raises(OSError, match=os.strerror(number)):
        parts.checkpoints.latest()


def test_a_link_to_a_disk_that_is_not_there_is_no_empty_folder(saved: tuple[Parts, Path]) -> None:
    parts, path = saved
    shutil.rmtree(path.parent)
    path.parent.symlink_to("/not/mounted")
    with pytest.raises(UserError, match="checkpoints is a link to /not/mounted, which is not there"):
        parts.checkpoints.latest()


# --- what a run depends on ------------------------------------------------------------------------


def test_a_change_is_named_with_both_values() -> None:
    path = Path("run/checkpoints/step-00000004")
    require_same({"seed": 1, "gone": 2}, {"seed": 1, "new": 3}, path)
    with pytest.raises(UserError) as caught:
        require_same({"seed": 1, "train.global_batch": 8}, {"seed": 2, "train.global_batch": 4}, path)
    assert str(caught.value) == (
        "cannot go on from run/checkpoints/step-00000004: seed was 1 and is 2 now; "
        "put it back or choose another run.dir"
    )


def test_what_depends_on_compares_survives_json(pipeline: Path, overrides: list[str]) -> None:
    """Tuples or numpy numbers would differ from what the file gives back, and no run would go on."""
    more = ["adapter=lora", f"model.pretrained={pipeline}", "model.unet={}"]
    now = build.depends_on(compose("train", [*overrides, *more], Config)[0], parts_of(overrides, *more))
    assert json.loads(json.dumps(now)) == now


def test_a_pretrained_model_may_move_and_must_not_change(
    pipeline: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """A LoRA run's checkpoints hold nothing of what it adapts."""
    words = [*overrides, "model.unet={}", "adapter=lora", "train.steps=2"]
    assert command("train", *words, f"model.pretrained={pipeline}")[0] == 0
    moved = tmp_path / "moved"
    shutil.copytree(pipeline, moved)
    assert command("train", *words, f"model.pretrained={moved}", "train.steps=3")[0] == 0
    weights = load_file(moved / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1e-3
    save_file(weights, moved / "unet/diffusion_pytorch_model.safetensors")
    code, line = command("train", *words, f"model.pretrained={moved}", "train.steps=4")
    assert code == 2
    assert "model.pretrained (its weights) is another now; give what the run's config.yaml names" in line


def test_a_run_goes_on_only_as_itself(overrides: list[str], command: Command) -> None:
    assert command("train", *overrides, "train.steps=2")[0] == 0
    for change, says in (
        ("seed=1", "seed was 0 and is 1 now"),
        ("validation.samples=3", "validation.samples was 8 and is 3 now"),
        ("data.shuffle=false", "data.shuffle was True and is False now"),
        ("model.unet.layers_per_block=2", "model.unet.layers_per_block was 1 and is 2 now"),
    ):
        code, line = command("train", *overrides, change)
        assert (code, says in line) == (2, True), line


def test_another_adapter_is_refused(pipeline: Path, overrides: list[str], command: Command) -> None:
    base = [*overrides, f"model.pretrained={pipeline}", "model.unet={}", "train.steps=2"]
    lora = [*base, "adapter=lora", "adapter.rank=2"]
    assert command("train", *lora)[0] == 0
    for change, says in (
        (base, "adapter.kind was 'lora' and is 'full' now"),
        ([*lora, "adapter.rank=4"], "adapter.rank was 2 and is 4 now"),
        ([*lora, "adapter.targets=[to_q]"], "adapter.targets was"),
        ([*lora, "model.train_text_encoder=true"], "model.train_text_encoder was False and is True now"),
    ):
        code, line = command("train", *change, "train.steps=4")
        assert (code, says in line) == (2, True), line


def test_restoring_another_model_says_what_is_missing(saved: tuple[Parts, Path], overrides: list[str]) -> None:
    _, path = saved
    other = parts_of(overrides, "model.unet.layers_per_block=2")
    with pytest.raises(UserError, match=r"holds no .*: it is of another adapter or model$"):
        other.checkpoints.restore(path, other.strategy, other.averages)


@pytest.mark.parametrize(
    "change",
    [
        "model.unet.block_out_channels=[16,48]",  # RuntimeError: The size of tensor a (48) must match ...
        "model.unet.attention_head_dim=4",  # goes on in silence with another network
        "model.scheduler.beta_end=0.02",  # goes on in silence with other noise
    ],
)
def test_another_network_or_schedule_is_refused(overrides: list[str], command: Command, change: str) -> None:
    assert command("train", *overrides, "train.steps=2")[0] == 0
    code, line = command("train", *overrides, change)
    assert code == 2 and line


def test_a_trained_text_encoder_is_not_dropped_in_silence(
    pipeline: Path, overrides: list[str], command: Command
) -> None:
    base = [*overrides, f"model.pretrained={pipeline}", "model.unet={}"]
    assert command("train", *base, "model.train_text_encoder=true", "train.steps=2")[0] == 0
    assert command("train", *base, "model.train_text_encoder=false")[0] == 2


def test_the_folder_of_another_commands_run_is_refused(
    saved: tuple[Parts, Path], overrides: list[str], command: Command
) -> None:
    """`finetune autoencoder` writes the same format, without what this command needs."""
    _, path = saved
    rewrite(path / "trainer.json", lambda record: (record.pop("steps_taken"), record.pop("loss_scale")))
    code, line = command("train", *overrides)
    assert code == 2 and "run.dir" in line


# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    held = RunFolder(tmp_path / "a" / "run")
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*choose another run.dir"):
        RunFolder(tmp_path / "a" / "run")
    held.close()
    RunFolder(tmp_path / "a" / "run").close()


def test_a_folder_that_nothing_came_of_goes_again(tmp_path: Path) -> None:
    """After a refused start `runs/default/.lock` stayed where the user was."""
    RunFolder(tmp_path / "a" / "run").close()
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    RunFolder(tmp_path / "mine").close()
    assert (tmp_path / "mine").exists()
    used = RunFolder(tmp_path / "b" / "run")
    (tmp_path / "b" / "run" / "config.yaml").write_text("")
    used.close()
    assert (tmp_path / "b" / "run" / "config.yaml").exists()


def test_a_folder_without_locks_is_not_called_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"can't be locked there \(Function not implemented\); mount .* with locks"):
        RunFolder(tmp_path / "run")


def test_a_folder_that_cannot_be_made_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"run\.dir=.*file"):
            RunFolder(path)
