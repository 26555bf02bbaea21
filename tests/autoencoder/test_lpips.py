"""LPIPS against the paper's equation 1 in float64 numpy, and the files that it is read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune import UserError, rng
from finetune.autoencoder.lpips import Lpips, layer_distance, read_lpips
from tests.autoencoder.vgg import LAYOUT, heads, vgg16

STATE, HEADS = vgg16(), heads()


def pictures(count: int, size: int, purpose: str) -> torch.Tensor:
    return rng.uniform(7, purpose, torch.arange(count), (3, size, size)) * 2 - 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "all.safetensors"
    save_file(STATE | HEADS, path)
    return path


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """One pair of pictures [3, H, W] in [-1, 1], in float64: the straight way, from uint-like pixels in [0, 1]."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    state = {name: tensor.double().numpy() for name, tensor in (STATE | HEADS).items()}
    x = [((picture + 1) / 2 - mean[:, None, None]) / std[:, None, None] for picture in (a, b)]
    total, index, stage = 0.0, 0, 0
    for width in LAYOUT:
        if width != "M":
            weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            for i in range(2):
                padded = np.pad(x[i], ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
                out = np.tensordot(weight, windows, axes=([1, 2, 3], [0, 3, 4])) + bias[:, None, None]
                x[i] = np.maximum(out, 0)
            index += 2
            continue
        unit = [y / (np.sqrt((y**2).sum(axis=0)) + 1e-10) for y in x]
        head = state[f"lin{stage}.model.1.weight"].reshape(-1)
        total += np.einsum("chw,c->hw", (unit[0] - unit[1]) ** 2, head).mean()
        if stage == 4:
            break
        x = [y.reshape(y.shape[0], y.shape[1] // 2, 2, y.shape[2] // 2, 2).max(axis=(2, 4)) for y in x]
        index, stage = index + 1, stage + 1
    return float(total)


def test_it_is_the_papers_distance(file: Path) -> None:
    a, b = pictures(2, 32, "a")[:, :, :16], pictures(2, 32, "b")[:, :, :16]  # 16 x 32
    got = Lpips(read_lpips(str(file)))(a, b)
    expected = [by_hand(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    assert got.shape == (2,)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_equal_pictures_are_at_distance_zero_and_the_distance_has_no_direction(file: Path) -> None:
    lpips, a, b = Lpips(read_lpips(str(file))), pictures(2, 16, "a"), pictures(2, 16, "b")
    assert lpips(a, a).tolist() == [0.0, 0.0]
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    near = lpips(a, a + 0.05 * b)
    assert (near > 0).all()
    assert (near < lpips(a, b)).all()


def test_gradients_reach_the_reconstruction_alone(file: Path) -> None:
    lpips = Lpips(read_lpips(str(file)))
    a, b = pictures(1, 16, "a").requires_grad_(), pictures(1, 16, "b").requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lpips.parameters())
    along = b.grad / b.grad.norm()
    with torch.no_grad():
        slope = (lpips(a, b + 1e-2 * along) - lpips(a, b - 1e-2 * along)).item() / 2e-2
    assert slope == pytest.approx(b.grad.norm().item(), rel=0.02)


def test_cells_where_nothing_fires_have_finite_gradients() -> None:
    a = torch.ones(1, 4, 2, 2)
    b = torch.zeros(1, 4, 2, 2, requires_grad=True)
    distance = layer_distance(a, b, torch.ones(4))
    distance.sum().backward()
    assert distance.item() == pytest.approx(1.0)  # of a unit vector and none
    assert torch.isfinite(b.grad).all()


def test_bf16_is_near(file: Path) -> None:
    lpips, a, b = Lpips(read_lpips(str(file))), pictures(2, 16, "a"), pictures(2, 16, "b")
    torch.testing.assert_close(lpips(a, b, bf16=True), lpips(a, b), rtol=0.02, atol=0.0)


def test_every_form_of_the_weights_is_the_same(file: Path, tmp_path: Path) -> None:
    torch.save(STATE | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    torch.save(HEADS, tmp_path / "heads.pth")
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    whole = {f"net.slice{slices[int(name.split('.')[1])]}.{name[9:]}": tensor for name, tensor in STATE.items()}
    torch.save(whole | HEADS | {"scaling_layer.shift": torch.zeros(1)}, tmp_path / "whole.pth")
    expected = read_lpips(str(file))
    for got in (
        read_lpips(str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.pth")),
        read_lpips(str(tmp_path / "whole.pth")),
    ):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_wrong_files_are_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    def saved(name: str, tensors: object) -> str:
        torch.save(tensors, tmp_path / name)
        return str(tmp_path / name)

    alone = saved("vgg16.pth", STATE)
    other = {"features.16.weight" if name == "features.17.weight" else name: t for name, t in STATE.items()}
    alex = HEADS | {"lin1.model.1.weight": torch.rand(1, 192, 1, 1)}
    (tmp_path / "text.safetensors").write_text("no weights")
    cases = [
        (
            (alone, None),
            "has no lin0.model.1.weight: give the heads of LPIPS 0.1 for VGG16 as loss.lpips_heads=FILE",
        ),
        ((saved("heads.pth", HEADS), None), "has no features.0.weight: give torchvision's VGG16"),
        ((saved("vgg19.pth", other), None), "has no features.17.weight: give torchvision's VGG16"),
        ((alone, saved("alex.pth", alex)), "lin1.model.1.weight is [1, 192, 1, 1] and should be [1, 128, 1, 1]"),
        ((saved("gray.pth", STATE | {"features.0.weight": torch.zeros(64, 1, 3, 3)}), None), "is [64, 1, 3, 3]"),
        ((saved("code.pth", {"features.0.weight": _Code()}), None), "holds more than weights"),
        ((str(tmp_path / "text.safetensors"), None), "cannot be read as safetensors"),
        ((str(tmp_path / "absent.pth"), None), "cannot be read"),
        ((str(file), str(tmp_path / "absent.safetensors")), "cannot be read"),
    ]
    for arguments, line in cases:
        with pytest.raises(UserError) as caught:
            read_lpips(*arguments)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
