"""CLIP's text transformer and its byte-level BPE tokenizer (Radford et al. 2021, arXiv 2103.00020, section
2.4).

The tokenizer's files are OpenAI's: `vocab.json`, `merges.txt`. Words are lower case, split by CLIP's pattern,
and written in the 256 byte symbols of GPT-2; a word's last symbol carries `</w>`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune import UserError, first_line
from finetune.data.shards import TextInfo, write_atomic
from finetune.models.single_file import open_file
from finetune.models.sources import download, fetch, fetch_file, local_folder, relative_source, weights_sha256
from finetune.models.weight_files import load_folder, read_weights, write_weights

CLIP = "openai/clip-vit-large-patch14"
CLIP_EMBEDDING_STD = 0.02
_TOKENIZER_FILES = ("vocab.json", "tokenizer.json")
Encoder = TypeVar("Encoder", CLIPTextModel, CLIPTextModelWithProjection)

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# Every byte, alone and as the last of a word: so that any text can be written, whatever the captions held.
_BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
_FIXED = (*_BYTES, *(symbol + WORD_END for symbol in _BYTES))
MIN_VOCAB_SIZE = len(_FIXED) + 2
# CLIP's pattern.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_text(
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    words: str | Path | None = None,
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Load tokenizer and text encoder of a Stable Diffusion 1.x or 2.x model, on the CPU in eval mode.

    Args:
        source: a diffusers pipeline's folder with `tokenizer/` and `text_encoder/`, a hub id, or a single file.
        words: where the tokenizer is, instead (see `load_tokenizer`).

    Raises:
        UserError: the source is absent, one of the two is missing or broken, or they don't fit each other.
    """
    encoder = load_text_encoder(source, revision, dtype)
    return fitting(load_tokenizer(source, revision, words=words), encoder, source), encoder


def load_text_2(
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    words: str | Path | None = None,
) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Load the second tokenizer and text encoder of a Stable Diffusion XL model, as `load_text`."""
    encoder = load_text_encoder_2(source, revision, dtype)
    return fitting(load_tokenizer(source, revision, "tokenizer_2", words=words), encoder, source), encoder


def load_tokenizer(
    source: str | Path,
    revision: str | None = None,
    subfolder: str = "tokenizer",
    *,
    words: str | Path | None = None,
) -> CLIPTokenizer:
    """Load the tokenizer of a pipeline's folder or hub id, of a tokenizer's own folder, or of a single file.

    A single file holds none: CLIP's is taken, which all of Stable Diffusion's models have, from the hub or its
    cache.

    Args:
        subfolder: `tokenizer_2` is XL's second.
        words: a folder or hub id, as `source`, whose tokenizer is taken instead of the model's own.
    """
    file = fetch_file(source, revision)
    place: str | Path
    if words is not None:
        try:
            place = _locate(words, subfolder, _TOKENIZER_FILES, None)
        except UserError:
            place = _locate(words, "tokenizer", _TOKENIZER_FILES, None)
    elif file is None:
        place = _locate(source, subfolder, _TOKENIZER_FILES, revision)
    else:
        try:
            place = download(CLIP, ["*.json", "merges.txt"])
        except UserError as error:
            raise UserError(
                f"{file} holds no tokenizer, and that of {CLIP} is out of reach: give model.tokenizer=FOLDER "
                "(or --tokenizer FOLDER) with its vocab.json and merges.txt"
            ) from error
    # OpenCLIP fills captions up with "!", CLIP with the end token; a folder made for the model says so itself.
    part = subfolder.replace("tokenizer", "text_encoder")
    opened = open_file(file) if file is not None else None
    fills = {"pad_token": "!"} if opened is not None and opened.text_kind(part).endswith("openclip") else {}
    try:
        return CLIPTokenizer.from_pretrained(place, **fills)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"no tokenizer can be loaded from {place}: {first_line(error)}") from error


def load_text_encoder(
    source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> CLIPTextModel:
    """Load the text encoder of a pipeline's folder or hub id, of its own folder, or of a single file."""
    if (file := fetch_file(source, revision)) is not None:
        return open_file(file).text_encoder(dtype)
    return _load(CLIPTextModel, _locate(source, "text_encoder", ("config.json",), revision), dtype)


def load_text_encoder_2(
    source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> CLIPTextModelWithProjection:
    """Load XL's second text encoder, as `load_text_encoder`."""
    if (file := fetch_file(source, revision)) is not None:
        return open_file(file).text_encoder_2(dtype)
    folder = _locate(source, "text_encoder_2", ("config.json",), revision)
    return _load(CLIPTextModelWithProjection, folder, dtype)


def take_trained(text_encoder: nn.Module, folder: Path) -> None:
    """Load what a run trained of a text encoder, which may not be all of it.

    Raises:
        UserError: the file is broken or of another encoder.
    """
    file = folder / "model.safetensors"
    names = {name.removeprefix("text_model."): name for name in text_encoder.state_dict()}
    tensors, _ = read_weights(file)
    try:
        trained = {names[key.removeprefix("text_model.")]: tensor for key, tensor in tensors.items()}
        text_encoder.load_state_dict(trained, strict=False)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} does not fit the text encoder that was trained: {first_line(error)}") from error


def zeroes_null_caption(source: str | Path, revision: str | None = None) -> bool:
    """Whether an XL model takes zeros for the caption that is left out, not the empty caption's states.

    `force_zeros_for_empty_prompt` of its `model_index.json`; true, as of the base model, where that says nothing.
    """
    if fetch_file(source, revision) is not None:
        return True
    folder = local_folder(source) or download(str(source), ["model_index.json"], revision)
    try:
        return bool(json.loads((folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'model_index.json'} cannot be read: {first_line(error)}") from error


def fitting(tokenizer: CLIPTokenizer, encoder: Any, source: str | Path) -> CLIPTokenizer:
    """The tokenizer, if the encoder knows all of its words; its captions are no longer than the encoder takes.

    Raises:
        UserError: it does not.
    """
    words, known = len(tokenizer), encoder.config.vocab_size
    if words > known:
        raise UserError(
            f"the text encoder of {source} knows {known} tokens and the tokenizer has {words}: give the one that "
            "it was trained with as model.tokenizer=FOLDER or --tokenizer FOLDER"
        )
    # Files may say another length than the encoder has places.
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return tokenizer


def _load(kind: type[Encoder], folder: Path, dtype: torch.dtype) -> Encoder:
    try:
        # Files of the whole CLIP hold the encoder of pictures as well, some of OpenCLIP layers that are not used.
        text_encoder = load_folder(kind, folder, may_hold_more=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no text encoder can be loaded from {folder}: {first_line(error)}") from error
    # transformers 4 loads float32, 5 what the files hold: say it here, for both.
    return text_encoder.to(dtype).eval()


def build_text_encoder(
    tokenizer: CLIPTokenizer,
    hidden_size: int,
    layers: int,
    heads: int,
    *,
    intermediate_size: int | None = None,
    embedding_std: float = CLIP_EMBEDDING_STD,
    seed: int = 0,
) -> CLIPTextModel:
    """Build a CLIP text transformer with random weights that depend on `seed` alone.

    Vocabulary, length and the ids of begin, end and padding are the tokenizer's.

    At CLIP's `embedding_std` what the layers add, 0.5 and more, drowns the words: trained with a U-Net alone, the
    layers soon tell of little but the word that most of the loss hangs on, and the last norm shrinks the others.
    Embeddings that are larger than what is added keep each word in the state at its place.

    Args:
        hidden_size: width, which is the U-Net's `cross_attention_dim`.
        intermediate_size: of the MLP; four times the width by default.
        embedding_std: of the words' embeddings; those of the places have half of it where it is not CLIP's.

    Raises:
        UserError: `hidden_size` is no multiple of `heads`, or `embedding_std` is not positive.
    """
    if hidden_size % heads:
        raise UserError(f"text encoder: hidden size {hidden_size} is no multiple of {heads} heads")
    if not 0 < embedding_std < math.inf:
        raise UserError(
            f"text encoder: embedding_std={embedding_std:g} must be greater than 0 and finite (CLIP's is 0.02)"
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config)
    if embedding_std != CLIP_EMBEDDING_STD:
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Embedding):
                std = embedding_std if name.endswith("token_embedding") else embedding_std / 2
                with torch.no_grad():  # as drawn, but for the scale
                    module.weight.mul_(std / module.weight.std())
    return encoder


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int = 77) -> CLIPTokenizer:
    """Learn a byte-pair encoding from captions; the same captions give the same tokenizer.

    The vocabulary is laid out as CLIP's: 256 byte symbols, the same with `</w>`, one entry a merge, then
    begin and end of text, so that the end token has the highest id. Few captions may give fewer merges than
    asked for.

    Args:
        vocab_size: at most so many tokens, 514 at least.
        max_length: tokens of a caption, with begin and end.

    Raises:
        UserError: `vocab_size` or `max_length` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} is too small: all bytes need {MIN_VOCAB_SIZE} tokens")
    if max_length < 3:
        raise UserError(f"a caption length of {max_length} holds no word: give at least 3 tokens")
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        # Named beforehand, the symbols have fixed ids; found on the way, they would be numbered in the order
        # of a hash map, and equally frequent pairs are taken in the order of their ids.
        special_tokens=[BEGIN, END, *_FIXED],
        end_of_word_suffix=WORD_END,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*_FIXED, *(left + right for left, right in merges), BEGIN, END])
    with tempfile.TemporaryDirectory() as folder:
        _write_vocabulary(Path(folder), {token: index for index, token in enumerate(tokens)}, merges)
        special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids int64 [B, L] of captions, cut or padded to the tokenizer's length L."""
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=False,
    ).input_ids
    # By numpy: a hundredth of a second less for 512 captions than `return_tensors`, which looks at every id.
    return torch.from_numpy(np.array(ids, dtype=np.int64).reshape(len(ids), tokenizer.model_max_length))


def encode_text(text_encoder: CLIPTextModel, ids_BL: Tensor, pad_id: int | None = None) -> Tensor:
    """The last layer's normalised states [B, L, D]: what U-Nets of SD 1.x and 2.x attend to.

    Padding is attended to, as Stable Diffusion was trained; an encoder whose config has `use_attention_mask`
    gets a mask, for which `pad_id` must be given and differ from the end token's.
    """
    mask_BL = None
    if getattr(text_encoder.config, "use_attention_mask", False) and pad_id is not None:
        mask_BL = (ids_BL != pad_id).long()
    return text_encoder(ids_BL, attention_mask=mask_BL)[0]


def encode_text_xl(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    ids_BL: Tensor,
    ids_2_BL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Context [B, L, D1 + D2] and pooled text [B, P], as Stable Diffusion XL has them.

    The context is the states of both encoders before their last layer, not normalised, side by side; the pooled
    text is the second's at the end token, projected (Podell et al. 2023, arXiv 2307.01952, section 2.1).

    Args:
        ids_BL, ids_2_BL: the captions' ids by the first and the second tokenizer, which pad differently.
    """
    first = text_encoder(ids_BL, output_hidden_states=True)
    second = text_encoder_2(ids_2_BL, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def text_encoder_sha256(text_encoder: CLIPTextModel) -> str:
    """`weights_sha256` by names without `text_model.`: one sum, whichever version of transformers loaded them."""
    return weights_sha256(
        {
            name.removeprefix("text_model."): weight
            for name, weight in text_encoder.state_dict().items()
            if not name.endswith("position_ids")
        }
    )


def text_info(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, source: str | Path, root: str | Path
) -> TextInfo:
    """What a manifest in `root` says of the text encoder that was loaded from `source`."""
    return TextInfo(
        source=relative_source(source, root),
        sha256=text_encoder_sha256(text_encoder),
        length=int(tokenizer.model_max_length),
        width=int(text_encoder.config.hidden_size),
        dtype=str(text_encoder.dtype).removeprefix("torch."),
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Save a tokenizer with `tokenizer.json`, `vocab.json` and `merges.txt`, for old and new readers."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / "vocab.json").is_file() and (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        _write_vocabulary(folder, model["vocab"], [(left, right) for left, right in pairs])


def save_text_encoder(text_encoder: CLIPTextModel | CLIPTextModelWithProjection, folder: str | Path) -> None:
    """Save a text encoder with the tensor names of transformers 4 (`text_model.…`), which 5 reads as well.

    transformers 5 writes names without that prefix; version 4 would load such a file as random weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text_encoder.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Loading by dtype "auto" follows these entries.
    architecture = "CLIPTextModel" if isinstance(text_encoder, CLIPTextModel) else "CLIPTextModelWithProjection"
    config |= {"architectures": [architecture], "dtype": str(text_encoder.dtype).removeprefix("torch.")}
    write_atomic(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    tensors = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    write_weights(folder / "model.safetensors", tensors)


def _locate(source: str | Path, subfolder: str, files: tuple[str, ...], revision: str | None) -> Path:
    folder = fetch(source, subfolder, revision)
    for candidate in (folder / subfolder, folder):
        if any((candidate / name).is_file() for name in files):
            return candidate
    what = subfolder.replace("_", " ")
    raise UserError(f"{source} holds no {what}: there is no {subfolder}/{files[0]}")


def _write_vocabulary(folder: Path, vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]]) -> None:
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]
    write_atomic(folder / "vocab.json", json.dumps(ordered, ensure_ascii=False).encode())
    write_atomic(folder / "merges.txt", "".join(lines).encode())
