"""The tokenizer writes any text and is the same each time; encoders are read by transformers 4 and 5."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from finetune import UserError
from finetune.models import text
from tests import fakes

CAPTIONS = [
    "a red apple",
    "a green apple",
    "a smiling face with heart eyes",
    "grinning face",
    "a red heart",
    "flag of a country",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(CAPTIONS, 600, max_length=24)


def test_vocabulary_is_laid_out_as_clips(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert 514 < len(tokenizer) <= 600
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "apple</w>" in vocabulary  # a frequent word became one token


def test_training_is_deterministic(tokenizer):
    again = text.train_tokenizer(iter(CAPTIONS), 600, max_length=24)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_vocabulary_size_is_kept():
    words = [f"{a}{b}{c} {b}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuv"]
    assert len(text.train_tokenizer(words, 560)) == 560


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Zs", "Zl", "Zp", "Cc", "Cs")), max_size=8))
def test_any_word_is_encoded_without_loss(tokenizer, word):
    ids = tokenizer(word).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    wanted = unicodedata.normalize("NFC", word).lower()
    if unicodedata.normalize("NFC", wanted) == wanted:  # the tokenizer normalises before it lowers
        assert "".join(tokenizer.decode(ids[1:-1]).split()) == "".join(wanted.split())


def test_tokenize_pads_and_cuts(tokenizer):
    ids = text.tokenize(tokenizer, ["a red apple", "", "apple " * 40])
    assert ids.shape == (3, 24) and ids.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.eos_token_id).all()
    assert (ids[1, 1:] == tokenizer.eos_token_id).all()


def test_case_and_spaces_do_not_matter(tokenizer):
    one, other = text.tokenize(tokenizer, ["A  Red\tAPPLE ", "a red apple"])
    assert torch.equal(one, other)


@pytest.mark.parametrize("kept", [{"tokenizer.json"}, {"vocab.json", "merges.txt"}])
def test_either_set_of_files_gives_the_tokenizer_back(tokenizer, tmp_path, kept):
    text.save_tokenizer(tokenizer, tmp_path)
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - kept:
        (tmp_path / name).unlink()
    back = text.load_tokenizer(tmp_path)
    prompts = ["a red apple, 25% off!", "ünïcode ❤️ 苹果", ""]
    assert torch.equal(text.tokenize(back, prompts), text.tokenize(tokenizer, prompts))
    assert back.model_max_length == 24
    assert type(back).__name__ == "CLIPTokenizer"


@pytest.mark.parametrize(("size", "length"), [(513, 77), (600, 2)])
def test_impossible_vocabularies_are_refused(size, length):
    with pytest.raises(UserError, match=r"too small|holds no word"):
        text.train_tokenizer(CAPTIONS, size, length)


def test_built_encoder_fits_its_tokenizer_and_leaves_the_global_generator_alone(tokenizer):
    state = torch.random.get_rng_state()
    one = text.build_text_encoder(tokenizer, 32, 1, 2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    same = text.build_text_encoder(tokenizer, 32, 1, 2, seed=3)
    other = text.build_text_encoder(tokenizer, 32, 1, 2, seed=4)
    name = next(name for name in one.state_dict() if name.endswith("token_embedding.weight"))
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    config = one.config
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 24)
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="no multiple of 3 heads"):
        text.build_text_encoder(tokenizer, 32, 1, 3)


@torch.no_grad()
def test_large_embeddings_keep_each_word_at_its_place(tokenizer):
    """States of captions that differ in one word differ there, and hardly after it; with CLIP's they don't so."""

    def differ(embedding_std):
        encoder = text.build_text_encoder(tokenizer, 64, 2, 4, embedding_std=embedding_std)
        ids_BL = torch.full((8, 6), tokenizer.eos_token_id)
        ids_BL[:, :3] = torch.tensor([tokenizer.bos_token_id, 5, 6])
        ids_BL[:, 2] += torch.arange(8)
        return text.encode_text(encoder, ids_BL).std(dim=0).mean(dim=-1)

    clip_L, large_L = differ(text.CLIP_EMBEDDING_STD), differ(4.0)
    assert large_L[2] > 0.7 and (large_L[3:] < 0.1).all()
    assert clip_L[2] < 0.5 and (clip_L[3:] > 0.1).all()
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="embedding_std=.* must be greater than 0 and finite"):
            text.build_text_encoder(tokenizer, 64, 2, 4, embedding_std=std)


def test_embeddings_keep_clips_scale_unless_told_otherwise(tokenizer):
    def stds(**options):
        encoder = text.build_text_encoder(tokenizer, 64, 2, 4, **options)
        named = {name.rsplit(".", 2)[-2]: weight.std().item() for name, weight in encoder.named_parameters()}
        return named["token_embedding"], named["position_embedding"]

    assert stds() == pytest.approx((0.02, 0.02), rel=0.05)
    assert stds(embedding_std=4.0) == pytest.approx((4.0, 2.0), rel=1e-4)


@torch.no_grad()
def test_both_encoders_of_xl_as_in_diffusers_pipeline(tmp_path):
    """To the bit: the context, the pooled text, and two tokenizers that pad differently."""
    pipe = StableDiffusionXLPipeline.from_pretrained(fakes.tiny_sdxl(tmp_path))
    captions = ["a red apple", "", "apple " * 40]
    context, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    first, encoder = text.load_text(tmp_path)
    second, encoder_2 = text.load_text_2(tmp_path)
    ids, ids_2 = text.tokenize(first, captions), text.tokenize(second, captions)
    assert not torch.equal(ids, ids_2)
    ours = text.encode_text_xl(encoder, encoder_2, ids, ids_2)
    assert (ours[0].shape, ours[1].shape) == ((3, 12, 80), (3, 24))
    assert torch.equal(ours[0], context) and torch.equal(ours[1], pooled)
    # Saved by us, it is the same again.
    text.save_text_encoder(encoder_2, tmp_path / "text_encoder_2")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path).encode_prompt(captions, device="cpu")
    assert torch.equal(again[2], pooled)
    with safe_open(tmp_path / "text_encoder_2" / "model.safetensors", "pt") as file:
        assert "text_projection.weight" in file.keys()  # noqa: SIM118


@torch.no_grad()
def test_saved_encoder_has_the_names_of_stable_diffusion_and_comes_back(tokenizer, tmp_path):
    encoder = text.build_text_encoder(tokenizer, 32, 1, 2).eval()
    text.save_text_encoder(encoder, tmp_path / "text_encoder")
    text.save_tokenizer(tokenizer, tmp_path / "tokenizer")
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    loaded_tokenizer, loaded = text.load_text(tmp_path)
    ids = text.tokenize(loaded_tokenizer, ["a red apple", ""])
    states = text.encode_text(loaded, ids)
    assert states.shape == (2, 24, 32)
    assert torch.equal(states, encoder(ids).last_hidden_state)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no text encoder"):
        text.load_text(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        text.load_text_encoder(tmp_path / "absent")
