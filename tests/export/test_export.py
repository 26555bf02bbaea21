"""An export gives diffusers what `finetune sample` draws, and is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from finetune import UserError, cli, export, sample
from finetune.components import load_components
from finetune.conditioning.text import TextXL
from finetune.export import folder, pipeline
from finetune.models.adapters import LORA_FILE, read_lora, save_lora
from finetune.models.unet import build_unet
from finetune.tasks import Task
from tests import fakes

PROMPT = ["--prompt", "a red apple", "--prompt", "a blue heart"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fakes.base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return fakes.full_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base):
    return fakes.lora_run(tmp_path_factory.mktemp("lora") / "run", base)


def sampled(run, out, *options):
    """What the command draws, [B, H, W, 3] in 0..255."""
    settings = ["--seed", "8", "--steps", "5", "--guidance", "4", "--device", "cpu"]
    sample.main([str(run), *PROMPT, *settings, "--out", str(out), *options])
    paths = sorted(path for path in out.iterdir() if path.name != "grid.png")
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)


def drawn(pipe, height=32, width=32):
    """What diffusers draws from the same noise and steps, unrounded in 0..255."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack(
        [torch.randn(4, height // 4, width // 4, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)]
    )
    return (
        255
        * pipe(
            PROMPT[1::2],
            height=height,
            width=width,
            latents=noise,
            num_inference_steps=5,
            guidance_scale=4.0,
            output_type="np",
        ).images
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_diffusers_draws_what_sample_draws(kind, request, tmp_path, capsys):
    run, out = request.getfixturevalue(kind), tmp_path / "model"
    capsys.readouterr()  # what libraries say while the run is made
    assert cli.main(["export", str(run), "--format", "diffusers", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker
    ours = sampled(run, tmp_path / "pictures")
    assert np.abs(ours - drawn(pipe)).max() < 0.51  # rounding to 8 bits alone
    large = sampled(run, tmp_path / "large", "--height", "40", "--width", "56")
    assert np.abs(large - drawn(pipe, 40, 56)).max() < 0.51
    # The export is a model itself, and an export of it is the same model.
    assert np.array_equal(sampled(out, tmp_path / "again"), ours)


def test_load_lora_weights_draws_what_sample_draws(lora, base, tmp_path):
    out = tmp_path / "lora"
    assert export.main([str(lora), "--format", "lora", "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == [LORA_FILE]
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    without = drawn(pipe)
    pipe.load_lora_weights(out)
    ours = sampled(lora, tmp_path / "pictures")
    assert np.abs(ours - drawn(pipe)).max() < 0.51
    assert np.abs(without - ours).max() > 2
    # `--lora` on the base model is the run.
    assert np.abs(sampled(base, tmp_path / "added", "--lora", str(out)) - ours).max() <= 1


def test_diffusers_draws_the_same_from_kohyas_format(lora, base, tmp_path):
    out = tmp_path / "style.safetensors"
    assert export.main([str(lora), "--format", "kohya", "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        told, keys = file.metadata(), set(file.keys())
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha" in keys
    assert (told["ss_network_dim"], told["ss_network_alpha"], alphas) == ("4", "10", {10.0})
    assert (told["ss_base_model_version"], told["ss_v2"]) == ("sd_v1", "False")
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name=out.name)
    ours = sampled(lora, tmp_path / "pictures")
    assert np.abs(ours - drawn(pipe)).max() < 0.51
    assert np.abs(sampled(base, tmp_path / "added", "--lora", str(out)) - ours).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_diffusers_draws_parts_of_other_alphas_from_kohyas_format(lora, base, tmp_path, dtype):
    """As `adapter.ranks` makes them. diffusers takes one alpha for the whole of such a file."""
    run, out = shutil.copytree(lora, tmp_path / "run"), tmp_path / "style.safetensors"
    for weights in run.glob("checkpoints/*/*/"):
        adapter = read_lora(weights)
        alphas = {name: alpha * (3 if "up_blocks" in name else 1) for name, alpha in adapter.alphas.items()}
        save_lora(weights, adapter.state, alphas)
    assert export.main([str(run), "--format", "kohya", "--out", str(out), "--dtype", dtype]) == 0
    written = load_file(out)
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert {tensor.item() for key, tensor in written.items() if key.endswith(".alpha")} == {10.0}
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name=out.name)
    ours = sampled(run, tmp_path / "pictures")
    assert np.abs(ours - drawn(pipe)).max() < (0.51 if dtype == "float32" else 2)
    assert np.abs(sampled(base, tmp_path / "added", "--lora", str(out)) - ours).max() <= 1


def test_the_adapter_is_exported_exactly(lora, tmp_path):
    export.main([str(lora), "--format", "lora", "--out", str(tmp_path / "out")])
    trained = lora / "checkpoints" / f"step-{fakes.STEP:08d}" / "ema" / LORA_FILE
    one, other = load_file(trained), load_file(tmp_path / "out" / LORA_FILE)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with safe_open(trained, "pt") as first, safe_open(tmp_path / "out" / LORA_FILE, "pt") as second:
        assert first.metadata() == second.metadata()
    export.main([str(lora), "--format", "lora", "--out", str(tmp_path / "half"), "--dtype", "float16"])
    half = load_file(tmp_path / "half" / LORA_FILE)
    assert all(torch.equal(half[key], one[key].half()) for key in one)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_weight_is_written_in_the_dtype(full, tmp_path, name, dtype):
    out = tmp_path / "model"
    export.main([str(full), "--format", "diffusers", "--out", str(out), "--dtype", name, "--weights", "raw"])
    weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = fakes.unet(fakes.STEP).state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key].to(dtype)) for key in wanted)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {tensor.dtype for tensor in load_file(out / f"{part}.safetensors").values()} == {dtype}


@pytest.mark.parametrize("kind", ["full", "lora", "base"])
def test_no_export_says_where_its_parts_lay(kind, request, tmp_path):
    source, out = request.getfixturevalue(kind), tmp_path / "model"
    assert export.main([str(source), "--format", "diffusers", "--out", str(out)]) == 0
    written = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.json")}
    assert {"vae/config.json", "unet/config.json", "text_encoder/config.json"} <= set(written)
    places = (str(source), str(tmp_path.parent))
    assert [name for name, text in written.items() if any(place in text for place in places)] == []


def test_an_export_is_drawn_with_the_guidance_of_its_run(full, tmp_path):
    run = shutil.copytree(full, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sample"] = {"guidance": 2.5, "guidance_rescale": 0.3}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out, again = tmp_path / "model", tmp_path / "again"
    export.main([str(run), "--format", "diffusers", "--out", str(out)])
    parts = load_components(out)
    assert (parts.guidance, parts.guidance_rescale) == (2.5, 0.3)
    export.main([str(out), "--format", "diffusers", "--out", str(again)])
    assert (again / "sampling.json").read_bytes() == (out / "sampling.json").read_bytes()
    StableDiffusionPipeline.from_pretrained(out)  # does not mind the file
    (out / "sampling.json").write_text('{"guidance": "much"}')
    with pytest.raises(UserError, match=r"model/sampling\.json cannot be read .*; mend or delete it"):
        load_components(out)
    (out / "sampling.json").unlink()
    assert load_components(out).guidance is None


def test_older_readers_find_their_files(full, tmp_path):
    export.main([str(full), "--format", "diffusers", "--out", str(tmp_path / "model")])
    assert (tmp_path / "model" / "tokenizer" / "vocab.json").is_file()
    assert (tmp_path / "model" / "tokenizer" / "merges.txt").is_file()
    with safe_open(tmp_path / "model" / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_the_pipeline_scales_latents_and_sizes_pictures_as_the_run_was_trained(full, tmp_path, monkeypatch):
    def scaled(*arguments, **settings):
        parts = load_components(*arguments, **settings)
        parts.latents = type(parts.latents)(scale=0.125, shift=scaled.shift)
        parts.size = (40, 64)
        return parts

    monkeypatch.setattr(pipeline, "load_components", scaled)
    scaled.shift = 0.0
    export.main([str(full), "--format", "diffusers", "--out", str(tmp_path / "model")])
    assert json.loads((tmp_path / "model" / "vae" / "config.json").read_text())["scaling_factor"] == 0.125
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple", num_inference_steps=1).images[0].size == (64, 40)
    scaled.shift = 0.5
    with pytest.raises(UserError, match="shifts latents by 0.5"):
        export.main([str(full), "--format", "diffusers", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_lora_that_its_base_models_pipelines_cannot_sample_says_so(lora, tmp_path, capsys):
    run = shutil.copytree(lora, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"objective": {"prediction": "flow"}}))
    assert export.main([str(run), "--format", "lora", "--out", str(tmp_path / "out")]) == 0
    assert "it predicts the flow, which no pipeline of its base model samples" in capsys.readouterr().out


TAKEN = "pipelines of its base model may take it to predict"
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("format", ["lora", "kohya"])
@pytest.mark.parametrize(
    ("prediction", "of_run", "of_base", "says"),
    [
        ("epsilon", {}, {}, None),
        ("v", ZERO_SNR, {"prediction_type": "v_prediction", **ZERO_SNR}, None),
        ("v", {}, {}, f'predicts v, and {TAKEN} the noise: set it, in diffusers by .*="v_prediction", in ComfyUI'),
        (
            "v",
            ZERO_SNR,
            {"prediction_type": "v_prediction"},
            f"predicts v at zero terminal SNR, and {TAKEN} v: .*rescale_betas_zero_snr=True",
        ),
        ("epsilon", {}, {"prediction_type": "v_prediction"}, f"predicts the noise, and {TAKEN} v: "),
        ("x0", {}, {}, f'predicts x0, and {TAKEN} the noise: set it, .*prediction_type="sample"'),
        ("v", {}, None, f"predicts v, and {TAKEN} the noise: "),
    ],
)
def test_an_adapter_that_is_sampled_unlike_its_base_says_so(
    lora, base, tmp_path, capsys, format, prediction, of_run, of_base, says
):
    run, model = shutil.copytree(lora, tmp_path / "run"), tmp_path / "model"
    if of_base is not None:  # else it is gone
        path = shutil.copytree(base, model) / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | of_base))
    config = fakes.config(model={"pretrained": str(model), "scheduler": fakes.SCHEDULE | of_run})
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"objective": {"prediction": prediction}}))
    out = tmp_path / ("out" if format == "lora" else "out.safetensors")
    capsys.readouterr()
    assert export.main([str(run), "--format", format, "--out", str(out)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (says is not None)
    assert says is None or re.search(says, notes[0])


def test_kohyas_format_names_the_base_that_tools_list_it_under(lora, base, tmp_path):
    """As WebUI reads it: XL by a version that begins with sdxl_, 2.x by ss_v2, else 1.x if there is anything."""
    openclip, single = shutil.copytree(base, tmp_path / "openclip"), tmp_path / "single.safetensors"
    path = openclip / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    xl = fakes.tiny_sdxl(tmp_path / "xl")
    vae = xl / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.13025}))
    export.main([str(xl), "--format", "single-file", "--out", str(single)])
    told = {}
    for model in (base, openclip, xl, single, tmp_path / "gone"):
        run, out = shutil.copytree(lora, tmp_path / f"of-{model.stem}"), tmp_path / f"{model.stem}-lora.safetensors"
        (run / "config.yaml").write_text(yaml.safe_dump(fakes.config(model={"pretrained": str(model)})))
        export.main([str(run), "--format", "kohya", "--out", str(out)])
        with safe_open(out, "pt") as file:
            said = file.metadata()
        told[model] = said.get("ss_base_model_version"), said.get("ss_v2")
    assert told == {
        base: ("sd_v1", "False"),
        openclip: ("sd_v2", "True"),
        xl: ("sdxl_base_v1-0", "False"),
        single: ("sdxl_base_v1-0", "False"),
        tmp_path / "gone": (None, None),
    }


def test_a_dora_names_the_tools_that_compute_it_otherwise(lora, tmp_path, capsys):
    run, out = shutil.copytree(lora, tmp_path / "run"), tmp_path / "out.safetensors"
    for weights in run.glob("checkpoints/*/*/"):
        adapter = read_lora(weights)
        sizes = {name: len(adapter.state[f"{name}.lora_B.weight"]) for name in adapter.scales}
        magnitudes = {f"{name}.lora_magnitude_vector.weight": torch.ones(size) for name, size in sizes.items()}
        save_lora(weights, adapter.state | magnitudes, adapter.alphas)
    export.main([str(run), "--format", "kohya", "--out", str(out)])
    said = capsys.readouterr().out
    assert "this DoRA is of no use in WebUI" in said and "ComfyUI computes them its own way" in said
    assert "a merged model has them as they were trained: --format single-file" in said


def test_others_may_read_what_the_umask_lets_them(full, lora, tmp_path):
    export.main([str(full), "--format", "diffusers", "--out", str(tmp_path / "pipeline")])
    export.main([str(lora), "--format", "lora", "--out", str(tmp_path / "lora")])
    export.main([str(lora), "--format", "kohya", "--out", str(tmp_path / "kohya.safetensors")])
    (tmp_path / "any").touch()
    modes = {path: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes[tmp_path / "any"]}
    assert sum(path.suffix == ".safetensors" for path in modes) >= 4


def test_an_earlier_export_is_replaced_only_when_asked(lora, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    argv = [str(lora), "--format", "lora", "--out", str(out)]
    export.main(argv)  # an empty folder is as good as none
    (out / "unet").mkdir()
    (out / "unet" / "config.json").write_text("of an export in another format")
    with pytest.raises(UserError, match="is not empty; choose another folder or add --overwrite"):
        export.main(argv)
    export.main([*argv, "--overwrite"])
    assert [path.name for path in out.iterdir()] == [LORA_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["thesis.txt"], "is not empty and holds no earlier export"),
        ([LORA_FILE, "README.md"], "holds README.md, which no export has written"),
        (["model_index.json", ".git/config"], "holds .git, which no export has written"),
        (["task.json", "checkpoints/step-00000004/trainer.json"], "holds checkpoints, which no export"),
        (["model_index.json", "unet/config.json", "unet/mine/notes.txt"], "holds unet, which no export"),
    ],
)
def test_what_no_export_wrote_is_never_replaced(lora, tmp_path, names, says):
    for name in names:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=says if more else "is not empty"):
            export.main([str(lora), "--format", "lora", "--out", str(tmp_path / "home"), *more])
    assert all((tmp_path / "home" / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("place", ["", "checkpoints", ".."])
def test_a_run_is_not_exported_onto_itself(full, place):
    """A run has a task.json, as some exports have: it was deleted with all its checkpoints."""
    before = sorted(full.rglob("*"))
    with pytest.raises(UserError, match=f"is where {full} lies; choose another folder"):
        export.main([str(full), "--format", "diffusers", "--out", str(full / place), "--overwrite"])
    assert sorted(full.rglob("*")) == before


def test_a_failed_export_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")

    def fail():
        with folder.whole_folder(tmp_path / "out") as temporary:
            (temporary / "new").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def written_over(out):
    """The names that are in a folder, once it is made and once in place of an earlier export."""
    for names in (["model_index.json", "unet"], ["model_index.json", "vae"]):
        with folder.whole_folder(out) as temporary:
            (temporary / names[0]).write_text("{}")
            (temporary / names[1]).mkdir()
        yield sorted(path.name for path in out.iterdir()), names


def test_a_link_to_a_folder_stays(tmp_path):
    """As to a larger disk: the link was replaced, and removing it was a traceback."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for found, names in written_over(tmp_path / "out"):
        assert found == names and (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("why", ["mounted", "closed"])
def test_a_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch, why):
    """A mounted disk, as in a container: renaming it is refused."""
    out = tmp_path / "out"
    out.mkdir()
    renamed, access = os.replace, os.access
    if why == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))

    def rename(source, target):
        assert Path(source) != out and Path(target) != out, "Device or resource busy"
        renamed(source, target)

    monkeypatch.setattr(os, "replace", rename)
    for found, names in written_over(out):
        assert found == names
    assert list(tmp_path.iterdir()) == [out]


def test_mistakes_are_named(full, lora, base, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "file").write_text("")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.yaml").write_text(yaml.safe_dump(fakes.config()))
    for line, argv in {
        "has no LoRA; use": [str(full), "--format", "kohya", "--out", str(tmp_path / "out.safetensors")],
        "--format onnx: unknown": [str(full), "--format", "onnx", *out],
        "required: --format": [str(full), *out],
        "trained all weights and has no LoRA": [str(full), "--format", "lora", *out],
        "no such run": [str(tmp_path / "none"), "--format", "lora", *out],
        "no such folder": [str(tmp_path / "none"), "--format", "diffusers", *out],
        "is no run folder": [str(base), "--format", "lora", *out],
        "--tokenizer has no effect on --format lora": [
            str(lora), "--format", "lora", *out, "--tokenizer", str(tmp_path / "none"),
        ],
        "--revision has no effect on --format kohya": [
            str(lora), "--format", "kohya", "--out", str(tmp_path / "out.safetensors"), "--revision", "main",
        ],
        "has no complete checkpoint yet": [str(empty), "--format", "diffusers", *out],
        "no complete checkpoint of step 3; there are 20": [
            str(lora), "--format", "lora", *out, "--checkpoint", "step-00000003",
        ],
        "--out s3://bucket/x is an address": [str(full), "--format", "diffusers", "--out", "s3://bucket/x"],
        "is a file's name, and this format is a folder": [
            str(full), "--format", "lora", "--out", str(tmp_path / "mine.safetensors"),
        ],
        "is a file; give a folder": [str(full), "--format", "lora", "--out", str(tmp_path / "file")],
    }.items():  # fmt: skip
        with pytest.raises(UserError) as caught:
            export.main(argv)
        assert line in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """safetensors wraps it; `run_cli` knows the system's number."""

    def fill():
        with folder.whole_folder(tmp_path / "out"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_xl_is_a_pipeline_of_xl(tmp_path):
    """With both text encoders and tokenizers, and what it takes for an empty caption."""
    model = fakes.tiny_sdxl(tmp_path / "xl", force_zeros=False)
    out = tmp_path / "out"
    export.main([str(model), "--format", "diffusers", "--out", str(out)])
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is StableDiffusionXLPipeline and not pipe.config.force_zeros_for_empty_prompt
    before = StableDiffusionXLPipeline.from_pretrained(model)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state, wanted = getattr(pipe, name).state_dict(), getattr(before, name).state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted), name
    assert (pipe.tokenizer.pad_token, pipe.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    # What is exported can be exported, drawn from and trained on.
    assert isinstance(load_components(out).conditioner, TextXL)
    before.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    np.testing.assert_array_equal(drawn(pipe), drawn(before))


@pytest.mark.parametrize(("size", "side"), [((40, 64), 48), ((64, 64), 64)])
def test_a_pipeline_of_xl_draws_squares(tmp_path, monkeypatch, size, side):
    """It knows one side alone: that of as many pixels as the run's pictures have."""

    def sized(*arguments, **settings):
        return replace(load_components(*arguments, **settings), size=size)

    monkeypatch.setattr(pipeline, "load_components", sized)
    model, out = fakes.tiny_sdxl(tmp_path / "xl"), tmp_path / "out"
    export.main([str(model), "--format", "diffusers", "--out", str(out)])
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple", num_inference_steps=1).images[0].size == (side, side)


def test_a_model_that_no_pipeline_knows_is_laid_out_for_sample(tmp_path):
    settings = {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        "cross_attention_dim": [None, None],
    }  # fmt: skip
    run = fakes.full_run(tmp_path / "run")
    Task("unconditional").save(run)
    for place in run.glob("checkpoints/*/*/unet"):
        build_unet(fakes.UNET | settings, seed=5).save_pretrained(place)
    out, picture = tmp_path / "out", tmp_path / "a.png"
    argv = [str(run), "--format", "diffusers", "--out", str(out)]
    export.main(argv)
    export.main([*argv, "--overwrite"])
    assert {path.name for path in out.iterdir()} == {"unet", "vae", "scheduler", "task.json", "sampling.json"}
    parts, wanted = load_components(out), load_components(run)
    assert parts.task == wanted.task and parts.latents == wanted.latents
    assert parts.scheduler["prediction_type"] == "epsilon"
    assert sample.main([str(out), "--steps", "1", "--out", str(picture), "--dtype", "float32"]) == 0
    assert picture.is_file()
    with pytest.raises(UserError, match="has no place in a single file"):
        export.main([str(run), "--format", "single-file", "--out", str(tmp_path / "a.safetensors")])
