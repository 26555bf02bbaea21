"""rFID: the distance against closed forms, and a network of features given as a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import UserError
from finetune.autoencoder.features import FeatureNetwork, frechet
from finetune.autoencoder.train import main
from tests.autoencoder.runs import arguments


class Means(torch.nn.Module):
    """Of each channel, and of their squares: six features of a picture of any size."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures.float() / 255
        return torch.cat([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1)


class Maps(torch.nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


def gaussian(count: int, mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """A set whose mean and covariance (root @ root.T) are exact."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + x @ root.T


def test_distance_of_gaussians_that_share_axes() -> None:
    """|m - n|^2 + sum (s - t)^2."""
    s, t = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1e-4])
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    one = gaussian(50, np.array([1.0, 0.0, 2.0]), turn @ np.diag(s), seed=1)
    two = gaussian(70, np.array([0.0, 0.0, 4.0]), turn @ np.diag(t), seed=2)
    assert frechet(one, two) == pytest.approx(5 + ((s - t) ** 2).sum(), rel=1e-9)
    assert frechet(two, one) == pytest.approx(frechet(one, two), rel=1e-9)


def test_distance_of_gaussians_that_share_none() -> None:
    """tr (C K)^(1/2) is the sum of the roots of the eigenvalues of C K, which is not symmetric."""
    generator = np.random.default_rng(0)
    roots = generator.normal(size=(2, 5, 5))
    one, two = (gaussian(40, np.zeros(5), root, seed) for seed, root in enumerate(roots))
    c, k = (root @ root.T for root in roots)
    expected = np.trace(c) + np.trace(k) - 2 * np.sqrt(np.linalg.eigvals(c @ k).real).sum()
    assert frechet(one, two) == pytest.approx(expected, rel=1e-7)


def test_fewer_pictures_than_features_give_a_finite_distance() -> None:
    generator = np.random.default_rng(0)
    one, two = generator.normal(size=(2, 8, 40))
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-5)
    assert frechet(one, one + 2.0) == pytest.approx(4 * 40, rel=1e-6)
    assert 0 < frechet(one, two) < 1e3


def test_what_has_no_distance_is_refused() -> None:
    good = np.zeros((4, 3))
    for bad in (np.zeros((1, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)):
        with pytest.raises(ValueError):
            frechet(good, bad)


def test_a_run_ends_with_its_rfid(
    shards: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over held-out pictures of all buckets; moved later, it is measured again without the network."""
    from finetune.autoencoder.measure import reconstruct
    from finetune.autoencoder.pictures import Pictures
    from finetune.models.autoencoder import load_autoencoder

    run = tmp_path / "run"
    main(arguments(shards, run, "train.steps=2", f"eval.features={network}"))
    output = capsys.readouterr()
    assert "held-out rFID: " in output.out
    assert "rFID of 3 pictures in 6 features" in output.err
    result = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    vae = load_autoencoder(run / "vae")
    held = Pictures(str(shards), size=None, held_out=64, seed=0, multiple=2, cache_bytes=0, readers=1)
    model = FeatureNetwork(str(network), torch.device("cpu"), (16, 16))
    real, made = [], []
    for bucket, ids in enumerate(held.held_out_ids):
        if len(ids):
            real.append(model(held.read(bucket, ids)))
            made.append(model(reconstruct(vae, held.read(bucket, ids))))
    assert result["rfid"] == pytest.approx(frechet(np.concatenate(real), np.concatenate(made)), rel=1e-4)
    assert result["rfid_pictures"] == 3
    main(arguments(shards, run, "train.steps=2"))  # what is measured is no part of the run
    assert capsys.readouterr().out.count("rFID is off: with eval.features=FILE") == 1


@pytest.mark.parametrize(
    ("make", "more", "line"),
    [
        (None, [], "network.pt is no TorchScript: finetune/autoencoder/features.py says"),
        (Maps, [], r"should make features [2, D] of two pictures, not [2, 3, 8, 24]"),
        (Means, ["data.held_out=1"], "eval.features needs two held-out pictures or more, and there is 1"),
    ],
)
def test_a_network_that_cannot_serve_is_refused_before_training(
    shards: Path, tmp_path: Path, make: type[torch.nn.Module] | None, more: list[str], line: str
) -> None:
    path = tmp_path / "network.pt"
    if make is None:
        path.write_bytes(b"no network")
    else:
        torch.jit.script(make()).save(str(path))
    with pytest.raises(UserError) as caught:
        main(arguments(shards, tmp_path / "run", f"eval.features={path}", *more))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
