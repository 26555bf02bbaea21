"""A file of weights is whole or not there, and as private as any other; a folder of them lacks none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import UserError
from finetune.models import weight_files
from finetune.models.autoencoder import load_autoencoder
from finetune.models.text import load_text_encoder, load_text_encoder_2
from finetune.models.unet import load_unet
from finetune.models.weight_files import read_weights, write_weights
from tests import fakes

LOADERS = {
    "unet": load_unet,
    "vae": load_autoencoder,
    "text_encoder": load_text_encoder,
    "text_encoder_2": load_text_encoder_2,
}


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return fakes.tiny_sdxl(tmp_path_factory.mktemp("xl") / "model")


def test_what_is_written_is_read(tmp_path):
    file, weight = tmp_path / "weights.safetensors", torch.arange(6.0).view(2, 3).requires_grad_()
    write_weights(file, {"weight": weight.t()}, {"made": "here"})
    tensors, metadata = read_weights(file)
    assert torch.equal(tensors["weight"], weight.t()) and list(tensors) == ["weight"]
    assert dict(metadata) == {"format": "pt", "made": "here"}


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    write_weights(tmp_path / "weights.safetensors", {"weight": torch.ones(2)})
    (tmp_path / "any").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    write_weights(file, {"weight": torch.ones(2)})

    def refused(tensors: object, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save_file", refused)
    with pytest.raises(OSError, match="No space left"):
        write_weights(file, {"weight": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert torch.equal(load_file(file)["weight"], torch.ones(2))


@pytest.mark.parametrize("part", LOADERS)
def test_a_weight_that_is_missing_is_named(xl, tmp_path, part):
    shutil.copytree(xl / part, tmp_path / part)
    (file,) = (tmp_path / part).glob("*.safetensors")
    tensors = load_file(file)
    matrices = [name for name in tensors if tensors[name].ndim > 1]
    for left_out, more in (([matrices[3]], ""), (matrices[:2], " and 1 more")):
        save_file(
            {name: tensor for name, tensor in tensors.items() if name not in left_out}, file, {"format": "pt"}
        )
        first = min(left_out).removeprefix("text_model.")  # as transformers 5 calls it
        with pytest.raises(
            UserError, match=f"holds no (text_model.)?{first}{more}: the files are not whole"
        ) as caught:
            LOADERS[part](tmp_path / part)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "smaller", "first"),
    [
        ("unet", {"transformer_layers_per_block": 1}, "down_blocks.1.attentions.0.transformer_blocks.1"),
        ("vae", {"mid_block_add_attention": False}, "decoder.mid_block.attentions.0"),
    ],
)
def test_weights_that_the_configuration_has_no_place_for_are_named(xl, tmp_path, part, smaller, first):
    """They were left out without a word: a smaller model than the one that was trained."""
    shutil.copytree(xl / part, tmp_path / part)
    config = tmp_path / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | smaller))
    with pytest.raises(UserError, match=rf"holds {first}\S+ and \d+ more, which its config.json has no place for"):
        LOADERS[part](tmp_path / part)


@pytest.mark.parametrize("part", LOADERS)
def test_files_in_float16_are_taken_where_there_are_no_others(xl, tmp_path, part):
    shutil.copytree(xl / part, tmp_path / part)
    (file,) = (tmp_path / part).glob("*.safetensors")
    half = file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, half, {"format": "pt"})
    wanted = LOADERS[part](xl / part).state_dict()
    both = LOADERS[part](tmp_path / part).state_dict()
    assert all(torch.equal(both[name], wanted[name]) for name in wanted)
    file.unlink()
    found = LOADERS[part](tmp_path / part)
    assert found.dtype == torch.float32
    assert all(torch.equal(found.state_dict()[name], wanted[name].half().float()) for name in wanted)
