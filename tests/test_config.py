"""The schema and `conf/`: every choice composes, every mistake gets one line that says what to do."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from finetune import UserError, build, tasks
from finetune.autoencoder import config as autoencoder
from finetune.config import Config, compose, conf_dir, groups, parse_override, quoted

CHOICES = [f"{group}={choice}" for group, choices in groups().items() for choice in choices]
FIRST_STAGE = sorted((conf_dir() / "autoencoder").glob("*/*.yaml"))  # it has groups of its own


@cache  # composing takes a quarter of a second
def composed(*overrides: str) -> Config:
    return compose("train", ["data.shards=x", *overrides], Config)[0]


# --- choices --------------------------------------------------------------------------------------


def test_the_groups_are_those_that_scripts_rely_on() -> None:
    assert groups().keys() == {
        "model", "adapter", "task", "objective", "optim", "ema", "data", "strategy", "tracker", "experiment",
    }  # fmt: skip
    assert groups()["adapter"] == ["dora", "full", "lora", "lora_conv"]
    assert groups()["strategy"] == ["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    assert "smoke" in groups()["experiment"]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_is_in_range(choice: str) -> None:
    made = composed(choice)
    if choice.startswith("adapter=") and choice != "adapter=full":  # it needs a pretrained model
        made = composed(choice, "model.pretrained=somewhere")
    build.check(made)


def test_every_file_is_a_choice_that_some_test_composes() -> None:
    files = {path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")}
    ours = {Path(*choice.split("=")).with_suffix(".yaml") for choice in CHOICES}
    roots = {Path("train.yaml"), Path("autoencoder", "autoencoder.yaml")}
    assert files - roots == ours | {path.relative_to(conf_dir()) for path in FIRST_STAGE}


@pytest.mark.parametrize("path", FIRST_STAGE, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_the_first_stages_choices_compose_by_its_own_load(path: Path) -> None:
    assert autoencoder.load([f"{path.parent.name}={path.stem}", "data.shards=x"])[0].data.shards == "x"


def test_choices_hold_no_defaults() -> None:
    """A group's choice says what it changes; a value equal to the schema's default belongs to the schema."""
    schema = OmegaConf.structured(Config)
    for group in groups():
        if group in ("experiment", "model"):
            continue
        for path in (conf_dir() / group).glob("*.yaml"):
            is_global = path.read_text().startswith("# @package _global_")
            section = OmegaConf.to_container(schema if is_global else schema[group])
            chosen = OmegaConf.load(path)
            assert set(chosen) <= set(section), path


def test_strategies_are_what_they_are_called() -> None:
    for stage in (1, 2, 3):
        made = composed(f"strategy=zero{stage}").strategy
        assert (made.kind, made.stage, made.offload) == ("zero", stage, "none")
    made = composed("strategy=zero3_offload").strategy
    assert (made.stage, made.offload) == (3, "cpu")
    assert composed().strategy.kind == "ddp"


def test_any_argument_of_the_unet_may_be_given() -> None:
    made = composed("experiment=smoke", "model.unet.dropout=0.1", "model.unet.layers_per_block=2")
    assert made.model.unet["dropout"] == 0.1 and made.model.unet["layers_per_block"] == 2


def test_the_command_line_wins_over_an_experiment_and_that_over_the_schema() -> None:
    assert composed().train.steps == 1000
    assert composed("experiment=smoke").train.steps == 20
    assert composed("experiment=smoke", "train.steps=7").train.steps == 7
    assert composed("experiment=sd15_lora", "adapter=full").adapter.kind == "full"


def test_keys_that_scripts_rely_on() -> None:
    schema = OmegaConf.structured(Config)
    for key in (
        "run.dir", "data.shards", "train.steps", "train.global_batch", "train.micro_batch",
        "checkpoint.every", "checkpoint.resume", "sample.every", "sample.prompts",
    ):  # fmt: skip
        section, name = key.split(".")
        assert name in list(schema[section]), key
    assert composed().seed == 0
    assert composed().checkpoint.resume == "auto"


def test_runs_of_a_name_live_in_its_folder() -> None:
    assert composed("run.name=mine").run.dir == "runs/mine"
    assert composed("experiment=smoke").run.dir == "runs/smoke"
    assert composed("run.name=mine", "run.dir=/elsewhere").run.dir == "/elsewhere"


def test_the_smoke_experiment_is_twenty_steps_of_a_tiny_model() -> None:
    made = composed("experiment=smoke")
    assert made.train.steps == 20 and made.model.pretrained is None
    assert made.model.unet["sample_size"] == 8 and "in_channels" not in made.model.unet


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.unet=tiny", "model.unet"),
        ("trian.steps=3", "unknown override 'trian.steps': did you mean 'train.steps'?"),
        ("steps=3", "unknown override 'steps': did you mean 'train.steps'?"),
        ("+train.stepz=3", "did you mean 'train.steps'?"),
        ("stratgy=ddp", "unknown override 'stratgy': did you mean 'strategy'?"),
        ("zzz=1", "unknown override 'zzz': `finetune train --help` lists the keys"),
        ("strategy=zero4", "strategy=zero4 is not known: did you mean zero3? choose one of ddp, zero1,"),
        ("experiment=smok", "did you mean smoke?"),
        ("adapter=loha", "adapter=loha is not known: did you mean lora? choose one of dora, full, lora, lora_conv"),
        ("train.steps=many", "train.steps=many must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5 must be a whole number"),
        ("train.steps=null", "train.steps=null must have a value: leave it out for its default"),
        ("optim.lr=fast", "optim.lr=fast must be a number"),
        ("ema.enabled=maybe", "ema.enabled=maybe must be true or false"),
        ("sample.prompts=cat", "sample.prompts=cat must be a list: 'sample.prompts=[\"cat\"]'"),
        ("adapter.targets=to_q", "adapter.targets=to_q must be a list"),
        ("ema.sigma_rels=0.1", "ema.sigma_rels=0.1 must be a list: 'ema.sigma_rels=[0.1]'"),
        ("adapter.ranks=32", "adapter.ranks holds values by name: give adapter.ranks.NAME=VALUE"),
        ("data.sources=[a]", "data.sources holds values by name: give data.sources.NAME=VALUE"),
        ("data.shards=[a,b]", "data.shards takes one value, no list"),
        ("~ema", "'~ema' has no effect, what is left out has its defaults: give ema=... another value"),
        ("~train.steps", "'~train.steps' has no effect"),
        ("run.dir=", "run.dir is empty (a shell variable that is not set?)"),
        ("data.shards=", "data.shards is empty"),
        ("model.pretrained=' '", "model.pretrained is empty"),
        ("checkpoint.resume=''", "checkpoint.resume is empty"),
        ("train=3", "key train"),
        ("train.steps=1,2", "'train.steps=1,2' names several values: a run takes one"),
        ("train.steps=range(1,4)", "names several values"),
        ("optim.lr=choice(1,2)", "names several values"),
        ("sample.prompts=[a", "cannot read the override 'sample.prompts=[a'"),
        ("this is none", "cannot read the override 'this is none'"),
        ("run.dir=${nowhere}", "Interpolation key 'nowhere' not found; key run.dir"),
        ("~train.steps", "train.steps"),
    ],
)
def test_a_mistake_gets_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        composed(override)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("override", "prompts"),
    [
        ("sample.prompts=[\u65e5\u672c\u8a9e]", ["\u65e5\u672c\u8a9e"]),
        ('sample.prompts=[it\'s, a "x"]', ["it's", 'a "x"']),
        ("sample.prompts=[a: b, {c}]", ["a: b", "{c}"]),
        ("sample.prompts=[a\nb\u00e4]", ["a b\u00e4"]),  # an error is one line
        ("sample.prompts=a red c\u00e4t", ["a red c\u00e4t"]),
    ],
)
def test_what_is_proposed_for_a_list_is_read_as_it_was_meant(override: str, prompts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        composed(override)
    line = " ".join(str(caught.value).split())
    (proposed,) = shlex.split("'sample.prompts=" + line.rpartition("'sample.prompts=")[2])
    assert composed(proposed).sample.prompts == prompts


def test_a_missing_value_is_named() -> None:
    with pytest.raises(UserError, match=r"^no value for data.shards: give data.shards=\.\.\.$"):
        compose("autoencoder", [], autoencoder.Config, "autoencoder")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.steps", 0, "train.steps=0 must be greater than 0"),
        ("train.micro_batch", -1, "train.micro_batch=-1"),
        ("optim.lr", float("nan"), "optim.lr=nan must be greater than 0"),
        ("checkpoint.every", 0, "checkpoint.every=0"),
        ("validation.samples", -1, "validation.samples=-1 must not be negative"),
        ("watch.lost_s", 0.5, "watch.lost_s=0.5 is in seconds: 1 to 2592000 (30 days), or 0 for never"),
        ("watch.stalled_s", math.inf, "or 0 for never"),
        ("watch.start_s", 1e300, "watch.start_s=1e+300 must be greater than 0, and 2592000 at most"),
        ("optim.lr", math.inf, "optim.lr=inf must be at most 1e+15"),
        ("optim.weight_decay", 1e300, "optim.weight_decay=1e+300 must be at most 1e+15"),
        ("objective.logit_mean", math.nan, "objective.logit_mean=nan must be a finite number"),
        ("objective.logit_mean", -math.inf, "objective.logit_mean=-inf must be a finite number"),
        ("adapter.alpha", math.nan, "adapter.alpha=nan"),
        ("adapter.alpha", math.inf, "adapter.alpha=inf"),
        ("adapter.rank", -1, "adapter.rank=-1 must be a whole number of at least 1"),
        ("adapter.rank", 10**18, "adapter.rank=1000000000000000000 must be at most 4096"),
        ("adapter.ranks", {"up_blocks": "abc"}, "adapter.ranks.up_blocks=abc is no number"),
        ("adapter.dropout", 1.0, "adapter.dropout=1.0 is a probability"),
        ("ema.halflives_images", {"short": "abc"}, "ema.halflives_images.short=abc is no number"),
        ("optim.lr_ratios", {"mid_block": math.inf}, "optim.lr_ratios.mid_block=inf must be at most"),
        ("sample.guidance", 0.0, "sample.guidance=0.0 must be at least 1, which is no guidance"),
        ("sample.guidance", math.nan, "sample.guidance=nan must be at least 1"),
        ("sample.height", 0, "sample.height=0 must be a whole number of at least 1"),
        ("sample.width", 10**21, "must be at most 16384"),
        ("train.global_batch", 10**21, "must be at most 1e+15"),
        ("train.threads", 10**6, "train.threads=1000000 must be at most 1024"),
        ("validation.timesteps", 10**21, "must be at most 1e+15"),
        ("validation.timesteps", 2000, "validation.timesteps=2000 is more than the noise schedule's 1000"),
        ("model.tokenizer", "nope", "model.tokenizer=nope is of a pretrained model"),
        (
            "model.unet",
            {"layers_per_block": 0},
            "model.unet.layers_per_block=0 must be a whole number of at least 1",
        ),
        ("model.unet", {"block_out_channels": [32, 10**21]}, "must be at most 1000000"),
        ("model.unet", {"transformer_layers_per_block": [[1, -1]]}, "per_block=-1 must be a whole number"),
        ("model.unet", {"dropout": math.nan}, "model.unet.dropout=nan is a probability"),
        ("watch.start_s", 0, "watch.start_s=0 must be greater than 0"),
        ("task.dropout", 1.5, "0 to 1"),
        ("adapter.rank", 3, "adapter.rank=3 has no effect here: choose adapter=lora, or leave it out"),
        ("adapter.targets", ["conv1"], "adapter.targets=['conv1'] has no effect here: choose adapter=lora"),
        ("adapter.ranks", {"up_blocks": 4}, "adapter.ranks={'up_blocks': 4} has no effect here"),
        ("objective.logit_mean", 2.0, "choose objective.timesteps=logit_normal, or leave it out"),
        ("optim.final_lr_ratio", 0.5, "choose optim.schedule=cosine, or leave it out"),
        ("objective.p2_k", 0.0, "objective.p2_k=0.0 must be greater than 0"),
        ("model", {"pretrained": ".", "revision": "abc"}, "model.revision=abc: . is here, and only models"),
        ("sample.steps", 1000, "sample.steps=1000 is more than the noise schedule's 999"),
        ("objective.gamma", 3.0, "choose objective.weighting=min_snr, soft_min_snr or p2"),
        ("objective.huber_delta", 0.2, "choose objective.loss=huber"),
        ("optim.d0", 1e-3, "optim.d0=0.001 has no effect here: choose optim=prodigy"),
        ("data", {"shuffle": False, "lanes": 8}, "data.lanes=8 has no effect here: choose data.shuffle=true"),
        ("data", {"shuffle": False, "shuffle_window": 1000}, "data.shuffle_window=1000 has no effect here"),
        ("optim.schedule", "linear", "choose one of constant, cosine"),
        ("objective.prediction", "noise", "objective.prediction=noise is not known"),
        ("sample.prompts", [], "sample.prompts is empty"),
        ("adapter.kind", "lora", "adapter=lora adapts a pretrained model"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_read(key: str, value: Any, says: str) -> None:
    made = deepcopy(composed())
    section, _, name = key.partition(".")
    for each, wanted in {name: value}.items() if name else value.items():
        setattr(getattr(made, section), each, wanted)
    with pytest.raises(UserError) as caught:
        build.check(made)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.cache_dir=/cache"], "no effect of data.cache_dir: all shards are on this machine"),
        (["data.cache_dir=/cache", "data.shards=https://example.org/set"], None),
        (["ema=none", "ema.halflife_images=5"], "no effect of ema.halflife_images: ema.enabled=false"),
        (["ema=none", "ema.halflives_images.long=5"], "ema.halflives_images.long: ema.enabled=false"),
        (["ema=power", "ema.halflife_images=5", "ema.rampup_ratio=0"], "ema.rampup_ratio: ema.kind=power"),
        (["ema=power", "ema.halflives_images.long=5", "ema.rampup_ratio=0.1"], None),
        (["model.pad_input=true"], "no effect of model.pad_input: the U-Net is built anew"),
        (["model.train_text_encoder=false"], "a text encoder that is built anew is always trained"),
        (["model.pretrained=x", "model.pad_input=true", "model.train_text_encoder=true"], None),
        (["model.fast=false", "model.graphs=true"], "no effect of model.graphs: model.fast=false"),
        (
            ["sample.every=0", "sample.prompts=[x]", "sample.steps=9"],
            "of sample.prompts, sample.steps: sample.every=0",
        ),
        (["sample.every=0", "sample.guidance=2"], None),  # `finetune sample` takes it
        (["validation.every=0", "validation.timesteps=7"], "of validation.timesteps: validation.every=0"),
        (["tracker=none", "tracker.project=mine"], "no effect of tracker.project: tracker=none"),
        (
            ["data.shards=null", "data.sources.a.shards=x", "data.sources.a.weight=4"],
            "weight: it is the only source",
        ),
        (["experiment=smoke", "sample.every=0", "validation.every=0", "ema=none", "tracker=none"], None),
        (["experiment=smoke", "sample.steps=9", "validation.timesteps=7", "tracker.project=mine"], None),
    ],
)
def test_settings_of_what_is_turned_off_are_told_of(overrides: list[str], says: str | None) -> None:
    """Not refused: a command for many runs may say them. Not told of what an experiment says."""
    made = composed(*overrides)
    build.check(made)
    notices = build.unused(made, {word.partition("=")[0] for word in overrides})
    assert len(notices) == (says is not None)
    assert all(notice.startswith("no effect of ") and str(says) in notice for notice in notices)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.threads", 0),  # RuntimeError: set_num_threads expects a positive integer
        ("optim.beta1", 2.0),  # ValueError: Invalid beta parameter
        ("optim.eps", -1.0),
        ("optim.text_encoder_lr", -1.0),
        ("optim.final_lr_ratio", -3.0),
        ("sample.steps", 2000),  # refused at the first grid, before that step's checkpoint
        ("sample.seed", 10**30),
        ("model.scheduler.num_train_timesteps", 0),  # IndexError at the first step
        ("model.scheduler.beta_end", 4.0),
        ("model.text_encoder.embedding_std", 0.0),
        ("model.text_encoder.embedding_std", 1e300),
        *(
            (f"model.text_encoder.{name}", 0)
            for name in ("hidden_size", "heads", "layers", "vocab_size", "max_length")
        ),
        *((f"model.text_encoder.{name}", 10**21) for name in ("hidden_size", "heads", "layers", "vocab_size")),
        ("model.text_encoder.max_length", 10**6),
        ("model.scheduler.num_train_timesteps", 10**21),
        ("ema.halflife_images", -5),
    ],
)
def test_values_that_fail_later_are_refused_at_once(key: str, value: Any) -> None:
    made: Any = deepcopy(composed())
    *sections, name = key.split(".")
    target = made
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)
    with pytest.raises(UserError, match=re.escape(f"{key}=")):
        build.check(made)


def test_paths_need_no_quotes_of_hydras() -> None:
    """Hydra's grammar takes few signs bare; its own message is `LexerNoViableAltException('~')`."""
    for path in ("/home/j\u00fcrgen/x", "runs/lr=1e-4", "runs/(old)/x", 'a "b" c\\d', "C:\\x"):
        assert compose("train", [f"data.shards={path}"], Config)[0].data.shards == path
    typed, saved = compose("train", ["data.shards=~/latents"], Config)
    assert typed.data.shards == saved.data.shards == str(Path.home() / "latents")


@given(st.text() | st.text("\\\"' a=${}~\n", max_size=9))
def test_any_text_quoted_is_read_back(text: str) -> None:
    """Hydra takes a backslash for an escape before a quote alone."""
    assert OverridesParser.create().parse_override(f"run.name={quoted(text)}").value() == text


@pytest.mark.parametrize("path", [r"~/a\b", r'~/a "b"', r"~/a\"b", "~/a\\", "it's = a,b"])
def test_a_path_is_taken_as_it_stands(path: str) -> None:
    override, text = parse_override(f"data.shards={path}")
    assert override.value() == path
    assert OverridesParser.create().parse_override(text).value() == path


def test_a_list_that_needs_quotes_is_told_so() -> None:
    with pytest.raises(UserError) as caught:
        compose("train", ["data.shards=x", "sample.prompts=[pizza!]"], Config)
    assert "quote" in str(caught.value)
    assert "Lexer" not in str(caught.value)


def test_composing_leaves_nothing_behind() -> None:
    once = compose("train", ["data.shards=x", "experiment=smoke", "seed=5"], Config)[0]
    assert autoencoder.load(["data.shards=x"])[0].seed == 0
    assert compose("train", ["data.shards=x"], Config)[0] == composed()
    assert compose("train", ["data.shards=x", "experiment=smoke", "seed=5"], Config)[0] == once


# --- the command ----------------------------------------------------------------------------------


def test_print_is_yaml_that_round_trips(capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.train import main

    settings = ["experiment=smoke", "data.shards='some where/ü'", "sample.prompts=['a, b: c', 'it\\'s']", "seed=3"]
    assert main([*settings, "--print"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    typed, resolved = compose("train", settings, Config)
    assert OmegaConf.to_container(printed) == OmegaConf.to_container(resolved)
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), printed))
    assert again == typed
    assert typed.sample.prompts == ["a, b: c", "it's"]


def leaves(section: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in section:
        node = None if OmegaConf.is_missing(section, name) else section[name]
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict:
            yield from leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_help_names_groups_and_keys_without_importing_torch() -> None:
    script = (
        "import sys; from finetune.cli import main; code = main(['train', '--help']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'deepspeed', 'wandb'} & sys.modules.keys(); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    unwrapped = re.sub(r"\n {14}(?=\S)", " ", done.stdout)
    for group, choices in groups().items():
        assert re.search(rf"^  {group} +{', '.join(choices)}$", unwrapped, re.MULTILINE), group
    for name in tasks.names():
        assert re.search(rf"^  {name}: [A-Z].+\.$", done.stdout, re.MULTILINE), name
    keys = list(leaves(OmegaConf.structured(Config)))
    assert len(keys) > 50
    for key in keys:
        assert re.search(rf"^  {re.escape(key)}=", done.stdout, re.MULTILINE), key
    for line in ("train.global_batch=16", "data.shards=null", "checkpoint.resume=auto", "seed=0", "--print"):
        assert re.search(rf"^  {re.escape(line)}( |$)", done.stdout, re.MULTILINE), line
    assert "examples:" in done.stdout
