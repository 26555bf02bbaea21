"""U-Nets made fast: outputs, all gradients and names are those of diffusers' eager model."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from finetune.models import fast as fast_package
from finetune.models.adapters import UNET_TARGETS, add_lora
from finetune.models.fast import available, blocks, lora, make_fast, missing
from finetune.models.layout import store_channels_last, stored_channels_last
from finetune.models.unet import build_unet, enable_gradient_checkpointing
from tests import fakes

SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 12}
SD15 = fakes.UNET | SMALL | {"attention_head_dim": 2}
SD21 = SD15 | {"attention_head_dim": (2, 4), "use_linear_projection": True, "layers_per_block": 2}
XL = fakes.UNET_XL | SMALL | {"transformer_layers_per_block": (1, 1), "attention_head_dim": (2, 4)}
SDXL = fakes.UNET_XL | SMALL | {"block_out_channels": (16, 16, 32)}
SDXL |= {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
}
SHAPES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
ONE_LEVEL = SD21 | {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
WITHOUT_CONTEXT = {"cross_attention_dim": (None, None), "attention_head_dim": 8}
CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "ff.net.0.proj")


@pytest.fixture
def steady_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout by position: torch draws along memory, which channels-last maps lay out otherwise."""

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])) >= self.p
        return x * kept / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", forward)


# --- what is compared -----------------------------------------------------------------------------


def stirred(unet: UNet2DConditionModel, seed: int = 1) -> UNet2DConditionModel:
    """Every bias, every norm's weight and every adapter's B away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() == 1 or ".lora_B." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet.train()


def make(config: dict[str, Any], adapt: Callable[[nn.Module], Any] | None = None) -> UNet2DConditionModel:
    unet = build_unet(config, seed=3)
    if adapt is not None:
        adapt(unet)
    return stirred(unet)


def inputs(config: dict[str, Any], size: tuple[int, int] = (8, 8), batch: int = 2, seed: int = 5) -> dict[str, Any]:
    """Arguments of a call."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = config["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": draw(batch, config["in_channels"], *size),
        "timestep": torch.tensor([5, 900])[:batch],
        "encoder_hidden_states": draw(batch, 5, width) if isinstance(width, int) else None,
    }
    if config.get("addition_embed_type"):
        given["added_cond_kwargs"] = {"text_embeds": draw(batch, 24), "time_ids": draw(batch, 6) * 100}
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.tensor([1, 2])[:batch]
    return given


def passes(unet: nn.Module, given: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradient of the sample, and gradients of all parameters that need one, by name."""
    unet.zero_grad()
    torch.manual_seed(7)  # dropout's
    sample = given["sample"].clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = unet(**given | {"sample": sample}).sample
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(8))
    (output * dy).sum().backward()
    found = {"output": output.detach(), "sample": sample.grad}
    found |= {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)
    return {name: tensor.detach().double() for name, tensor in found.items()}


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    def double(one: Any) -> Any:
        if isinstance(one, dict):
            return in_float64(one)
        return one.double() if isinstance(one, Tensor) and one.is_floating_point() else one

    return {key: double(value) for key, value in given.items()}


def assert_same(fast: nn.Module, eager: nn.Module, given: dict[str, Any], tolerance: float = 1e-4) -> None:
    found, wanted = passes(fast, given), passes(eager, given)
    assert found.keys() == wanted.keys()
    permuted = {name for name, parameter in fast.named_parameters() if stored_channels_last(parameter)}
    # Some are zero but for rounding (such as that of a bias before a norm of one group): they are held to the rest.
    floor = 1e-6 * max(float(tensor.norm()) for name, tensor in wanted.items() if name != "output")
    for name, tensor in wanted.items():
        one = found[name].permute(0, 3, 1, 2) if name in permuted else found[name]
        assert float((one - tensor).norm()) <= tolerance * float(tensor.norm()) + floor, name


def pair(config: dict[str, Any], adapt: Callable[[nn.Module], Any] | None = None) -> tuple[Any, Any]:
    """(made fast, eager) with the same weights."""
    fast, eager = make(config, adapt), make(config, adapt)
    make_fast(fast)
    return fast, eager


# --- full fine-tuning -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (12, 10), (9, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_by_torch(shape, size, on_torch):
    assert_same(*pair(SHAPES[shape]), inputs(SHAPES[shape], size))


@pytest.mark.parametrize(
    ("shape", "size", "stored"),
    [
        ("sd15", (5, 3), True),
        ("xl", (4, 4), False),
        *(
            pytest.param(shape, size, stored, marks=pytest.mark.slow)
            for shape, stored in (("sd15", False), ("sd21", True), ("sdxl", False))
            for size in ((9, 7), (16, 12))
        ),
    ],
)
def test_outputs_and_gradients_by_kernels(shape, size, stored, on_kernels, monkeypatch):
    called = []
    for name in ("group_norm", "geglu"):
        original = getattr(blocks.kernels, name)
        counted = lambda *args, name=name, original=original: called.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(blocks.kernels, name, counted)
    config = SHAPES.get(shape, XL) | {"norm_num_groups": 2, "layers_per_block": 1}
    fast, eager = make(config), make(config)
    if stored:
        store_channels_last(fast)
    make_fast(fast)
    assert_same(fast, eager, inputs(config, size, batch=1 if max(size) < 8 else 2))
    norms = sum(isinstance(module, nn.GroupNorm) for module in eager.modules())
    gates = sum(isinstance(module, BasicTransformerBlock) for module in eager.modules())
    assert (called.count("group_norm"), called.count("geglu")) == (norms, gates)


def test_self_attention_of_40_features_by_kernels(on_kernels, monkeypatch):
    """Stable Diffusion 1.x's first level, with fewer maps."""
    monkeypatch.setattr(sys.modules["finetune.models.fast.kernels.self_attention"], "_LEAST", 0)
    counts: Counter[tuple[int, ...]] = Counter()
    original = blocks.kernels.self_attention

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        counts[tuple(q.shape)] += 1
        return original(q, k, v)

    monkeypatch.setattr(blocks.kernels, "self_attention", counted)
    config = ONE_LEVEL | {"block_out_channels": (40,), "attention_head_dim": 1}
    fast, eager = make(config), make(config)
    make_fast(fast)
    assert_same(fast, eager, inputs(config, (10, 9), batch=1))
    assert counts == {(1, 90, 1, 40): 4}


def test_every_block_of_stable_diffusion_is_exchanged():
    for config in SHAPES.values():
        unet = make(config)
        make_fast(unet)
        for module in unet.modules():
            for theirs, ours in (
                (ResnetBlock2D, blocks.Resnet),
                (Transformer2DModel, blocks.Transformer),
                (BasicTransformerBlock, blocks.TransformerBlock),
                (Upsample2D, blocks.Upsample),
                (Downsample2D, blocks.Downsample),
            ):
                assert not isinstance(module, theirs) or type(module) is ours
        attentions = [m for m in unet.modules() if hasattr(m, "to_q")]
        assert attentions and all(isinstance(m.processor, blocks.Attend) for m in attentions)
        up = {type(block) for block in unet.up_blocks}
        assert up == {blocks.Up, blocks.CrossAttnUp}
        assert isinstance(unet.conv_norm_out, blocks.NormSiLU)


def test_gradients_between_blocks_are_whole_maps(on_kernels):
    """Channels-last and dense, also where a block joins a skip connection: slices would be copied on their way."""
    config = SD15 | {"layers_per_block": 1, "norm_num_groups": 2}
    unet = make(config).to(memory_format=torch.channels_last)
    make_fast(unet)
    layouts = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        for map_ in args:
            if isinstance(map_, Tensor) and map_.requires_grad and map_.dim() == 4:
                map_.register_hook(lambda dy: layouts.append(dy.is_contiguous(memory_format=torch.channels_last)))

    for module in unet.modules():
        if isinstance(module, blocks.Resnet):
            module.register_forward_pre_hook(watch)
    unet(**inputs(config, (4, 4), batch=1)).sample.sum().backward()
    assert len(layouts) > 5 and all(layouts)


def test_names_and_weights_stay_and_the_file_loads_anywhere(tmp_path, on_torch):
    fast, eager = pair(SD15)
    state = fast.state_dict()
    assert list(state) == list(eager.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in eager.state_dict().items())
    assert list(dict(fast.named_parameters())) == list(dict(eager.named_parameters()))
    fast.save_pretrained(tmp_path)
    loaded, given = UNet2DConditionModel.from_pretrained(tmp_path), inputs(SD15)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).sample, eager.eval()(**given).sample)


def test_twice_is_once(on_torch):
    fast, eager = pair(SD15)
    make_fast(fast)
    assert_same(fast, eager, inputs(SD15))


@pytest.mark.parametrize("layout", ["channels-last", "stored", "NCHW"])
@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_layouts_of_weights(shape, layout, on_torch):
    """As under ddp on a GPU, as under ZeRO, and as built."""
    fast, eager = make(SHAPES[shape]), make(SHAPES[shape])
    if layout == "channels-last":
        fast.to(memory_format=torch.channels_last)
    elif layout == "stored":
        store_channels_last(fast)
    make_fast(fast)
    assert_same(fast, eager, inputs(SHAPES[shape], (6, 10)))


def test_maps_stay_channels_last(on_torch):
    """What a block returns never has to be copied for the next one."""
    fast = make(SD15)
    fast.to(memory_format=torch.channels_last)
    make_fast(fast)
    seen = []
    for module in fast.modules():
        if isinstance(module, blocks.Resnet):
            module.register_forward_hook(
                lambda _, __, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    fast(**inputs(SD15))
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("changes", "exchanged"),
    [
        ({"in_channels": 9}, True),  # inpainting
        ({"in_channels": 7, "num_class_embeds": 10}, True),  # the x4 upscaler
        (WITHOUT_CONTEXT | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                            "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, True),
        (WITHOUT_CONTEXT | {"down_block_types": ("DownBlock2D", "DownBlock2D"),
                            "up_block_types": ("UpBlock2D", "UpBlock2D")}, True),
        ({"dropout": 0.3}, True),
        ({"resnet_out_scale_factor": 1.5}, True),
        ({"resnet_skip_time_act": True}, True),
        ({"only_cross_attention": True}, True),
        ({"upcast_attention": True}, True),
        ({"mid_block_type": None}, True),
        ({"norm_num_groups": 16}, True),  # groups of one channel
        ({"resnet_time_scale_shift": "scale_shift"}, False),
        ({"act_fn": "gelu"}, False),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")}, True),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")}, True),
    ],
    ids=lambda value: "" if isinstance(value, bool) else "-".join(value),
)  # fmt: skip
def test_other_unets(changes, exchanged, on_torch, steady_dropout):
    """What tasks train, and what a block of diffusers may have that ours don't know."""
    config = SD15 | changes
    fast, eager = pair(config)
    assert any(isinstance(module, blocks.Resnet) for module in fast.modules()) == exchanged
    assert_same(fast, eager, inputs(config))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"in_channels": 9}, WITHOUT_CONTEXT, {"norm_num_groups": 1}], ids=str)
def test_other_unets_by_kernels(changes, on_kernels):
    config = SD15 | changes
    if changes is WITHOUT_CONTEXT:
        config |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        config |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    assert_same(*pair(config), inputs(config))


@pytest.mark.parametrize("which", ["attention_mask", "encoder_attention_mask"])
def test_masks(which, on_torch):
    fast, eager = pair(SD15 | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")})  # fmt: skip
    given = inputs(SD15, (4, 4))
    # Self-attention's are of one resolution: that of the blocks with attention, 2x2 cells.
    given[which] = torch.tensor(
        [[1, 1, 0, 0, 1][: 5 if which.startswith("enc") else 4], [1] * 4 + [1] * which.startswith("enc")]
    )
    assert_same(fast, eager, given)
    plain = {key: value for key, value in given.items() if key != which}
    with torch.no_grad():
        assert not torch.allclose(fast(**given).sample, fast(**plain).sample)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_no_further_from_float64_than_eager_bf16(shape, on_torch, monkeypatch):
    """Over several inputs, of each kind of gradient; a convolution rounds before its bias, as on a GPU."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    fast, eager = pair(SHAPES[shape])
    exact = copy.deepcopy(eager).double()
    errors = {"fast": {}, "eager": {}}
    for seed in range(6):
        given = inputs(SHAPES[shape], (12, 10), seed=seed)
        wanted = passes(exact, in_float64(given))
        for name, unet in (("fast", fast), ("eager", eager)):
            found = passes(unet, given, torch.bfloat16)
            for key, tensor in wanted.items():
                apart = float((found[key] - tensor).norm() / (tensor.norm() + 1e-12))
                errors[name].setdefault(key, []).append(apart)
    means = {name: {key: sum(each) / len(each) for key, each in errors[name].items()} for name in errors}
    assert means["fast"]["output"] <= 1.1 * means["eager"]["output"]
    assert means["fast"]["sample"] <= 1.1 * means["eager"]["sample"]
    # Of single gradients either may be luckier; not of all together.
    together = {name: sum(each.values()) / len(each) for name, each in means.items()}
    assert together["fast"] <= 1.05 * together["eager"]
    assert 1e-3 < together["fast"] < 0.1


def as_under_zero(config: dict[str, Any]) -> None:
    """Weights and inputs in bf16, convolutions stored channels-last, no autocast."""
    fast, eager = make(config), make(config)
    exact = copy.deepcopy(eager).double()
    store_channels_last(fast)
    make_fast(fast)
    permuted = {name for name, parameter in fast.named_parameters() if stored_channels_last(parameter)}
    rounded = {name: tensor.bfloat16() for name, tensor in inputs(config, (4, 4)).items() if name != "timestep"}
    rounded["timestep"] = inputs(config)["timestep"]
    exact.load_state_dict({name: tensor.bfloat16().double() for name, tensor in exact.state_dict().items()})
    wanted = passes(exact, in_float64(rounded))
    apart = {"fast": [], "eager": []}
    for kind, unet in (("fast", fast.bfloat16()), ("eager", eager.bfloat16())):
        found = passes(unet, rounded)
        for name, tensor in wanted.items():
            one = found[name].permute(0, 3, 1, 2) if kind == "fast" and name in permuted else found[name]
            apart[kind].append(float((one - tensor).norm() / (tensor.norm() + 1e-12)))
    means = {kind: sum(each) / len(each) for kind, each in apart.items()}
    # Of one input either may be luckier by a tenth.
    assert 1e-3 < means["fast"] <= 1.2 * means["eager"]


def test_weights_in_bf16_by_torch(on_torch):
    as_under_zero(SD15)


def test_weights_in_bf16_by_kernels(on_kernels):
    as_under_zero(ONE_LEVEL)


# --- adapters -------------------------------------------------------------------------------------


def adapted_linears(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if isinstance(module, peft_lora.Linear)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (UNET_TARGETS, {}),
        ((*UNET_TARGETS, *CONVOLUTIONS), {"ranks": {"mid": 3, "up": 1}}),
        (("to_q", "ff.net.2", "time_emb_proj"), {"rank_stabilized": True}),
    ],
    ids=["attention", "convolutions", "time"],
)
def test_lora(shape, targets, settings, on_torch):
    def adapt(unet: nn.Module) -> None:
        add_lora(unet, 4, 6.0, target_modules=targets, **settings)

    fast, eager = pair(SHAPES[shape], adapt)
    layers = adapted_linears(fast)
    assert layers and all(type(layer) is lora.Linear for layer in layers)
    given = inputs(SHAPES[shape], (6, 10))
    assert_same(fast, eager, given)
    with torch.no_grad():  # the adapter does something
        assert not torch.allclose(fast(**given).sample, make(SHAPES[shape])(**given).sample, atol=1e-2)


def test_lora_by_kernels(on_kernels):
    targets = ("to_q", "to_out.0", "proj_in", "proj_out", "conv1", "conv_shortcut", "ff.net.0.proj")
    adapt = lambda unet: add_lora(unet, 4, 6.0, target_modules=targets)  # noqa: E731
    assert_same(*pair(ONE_LEVEL, adapt), inputs(ONE_LEVEL, (6, 3), batch=1))


@pytest.mark.parametrize("stored", [False, True])
def test_lora_of_convolutions_with_weights_channels_last(stored, on_torch):
    adapt = lambda unet: add_lora(unet, 2, 6.0, target_modules=("to_v", *CONVOLUTIONS))  # noqa: E731
    fast, eager = make(SD15, adapt), make(SD15, adapt)
    if stored:
        store_channels_last(fast)
    else:
        fast.to(memory_format=torch.channels_last)
    make_fast(fast)
    assert_same(fast, eager, inputs(SD15))


@pytest.mark.parametrize("settings", [{"dropout": 0.4}, {"dora": True}], ids=["dropout", "dora"])
def test_what_our_lora_cannot_compute_is_left_to_peft(settings, on_torch, steady_dropout):
    adapt = lambda unet: add_lora(unet, 4, 6.0, target_modules=("to_q", "to_out.0", "conv1"), **settings)  # noqa: E731
    fast, eager = pair(SD15, adapt)
    assert all(type(layer) is peft_lora.Linear for layer in adapted_linears(fast))
    assert_same(fast, eager, inputs(SD15))


def test_an_adapter_that_is_switched_off_or_merged(on_torch):
    adapt = lambda unet: add_lora(unet, 4, 6.0)  # noqa: E731
    fast, eager = pair(SD15, adapt)
    given = inputs(SD15)
    with torch.no_grad():
        with_it = eager(**given).sample
        for unet in (fast, eager):
            unet.disable_adapters()
        torch.testing.assert_close(fast(**given).sample, eager(**given).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(**given).sample, with_it, atol=1e-2)
        for unet in (fast, eager):
            unet.enable_adapters()
        for layer in adapted_linears(fast):
            layer.merge()
        torch.testing.assert_close(fast(**given).sample, with_it, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_lora_in_bf16_is_no_further_from_float64_than_peft(shape, on_torch):
    """What an adapter changes, and its gradients: by a base in float32 under autocast."""
    adapt = lambda unet: add_lora(unet, 4, 6.0, target_modules=(*UNET_TARGETS, "ff.net.0.proj"))  # noqa: E731
    fast, eager = pair(SHAPES[shape], adapt)
    exact = copy.deepcopy(eager).double()
    given = inputs(SHAPES[shape], (12, 10))
    wanted = passes(exact, in_float64(given))
    means = []
    for unet in (fast, eager):
        found = passes(unet, given, torch.bfloat16)
        each = [float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in wanted.items()]
        means.append(sum(each) / len(each))
    assert 1e-3 < means[0] <= 1.1 * means[1]


@pytest.mark.parametrize("base", ["float32", "bf16's values", "bf16"])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_small_update_acts_in_bf16_as_much_as_by_peft(base, size):
    """Beside the weight that it is added to an update is small: no more of it may be lost than in peft's sum."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 128, bias=False))
    weight = torch.randn(128, 128, generator=generator) / 128**0.5
    layer[0].weight.data = weight if base == "float32" else weight.bfloat16().float()
    layer = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["0"]), layer)
    (adapted,) = adapted_linears(layer)
    down, up = (getattr(adapted, name)["default"].weight.requires_grad_(False) for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        down.copy_(torch.randn(down.shape, generator=generator) / 128**0.5)
        up.copy_(torch.randn(up.shape, generator=generator) * size)
    exact = adapted.get_base_layer().weight.double()
    x = torch.randn(4096, 128, generator=generator).bfloat16()
    update = x.double() @ (up.double() @ down.double()).T
    if base == "bf16":  # as under ZeRO
        adapted.get_base_layer().bfloat16()
    shares = []
    for kind in (peft_lora.Linear, lora.Linear):
        adapted.__class__ = kind
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            change = layer(x).double() - x.double() @ exact.T
        shares.append(float((change * update).sum() / update.square().sum()))
    theirs, ours = shares
    assert abs(ours - 1) <= abs(theirs - 1) + 0.15


# --- gradient checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing(shape, on_torch):
    """Of dropout too, which is drawn again as it was."""
    config = SHAPES[shape] | {"dropout": 0.2}
    fast, plain, eager = pair(config)[0], *pair(config)
    calls: dict[nn.Module, Counter[str]] = {fast: Counter(), eager: Counter()}
    for unet, count in calls.items():
        enable_gradient_checkpointing(unet)
        for name, module in unet.named_modules():
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
                module.register_forward_pre_hook(lambda *_, count=count, name=name: count.update([name]))
    assert_same(fast, plain, inputs(config))
    passes(eager, inputs(config))
    assert calls[fast] == calls[eager]  # once more in the backward pass, and no less is spared than diffusers does
    assert max(calls[fast].values()) == 2


# --- where it is used -------------------------------------------------------------------------------


def test_it_is_for_gpus_from_ampere_on(monkeypatch):
    assert not available(torch.device("cpu"))
    for capability, is_for in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert available(torch.device("cuda")) is is_for


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "kernels", object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing() == "a C compiler"
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert missing() == "a C compiler"
    monkeypatch.setenv("CC", "mycc")
    assert missing() is None
    monkeypatch.delenv("CC")
    compiler.rename(tmp_path / "gcc")
    assert missing() is None
    monkeypatch.setattr(blocks, "kernels", None)
    assert missing() == "Triton"


def test_without_triton_blocks_import_and_compute(monkeypatch):
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == "triton" or name.startswith(f"{fast_package.__name__}.k")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr(fast_package, "kernels", raising=False)
    spec = importlib.util.spec_from_file_location("blocks_without_triton", blocks.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert without.kernels is None
    unet = make(SD15)
    without.exchange(unet)
    assert any(isinstance(module, without.Resnet) for module in unet.modules())
    assert_same(unet, make(SD15), inputs(SD15))
