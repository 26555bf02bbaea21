"""rFID: how far reconstructions are from pictures in the features of a given network.

The network is a TorchScript file that takes pictures, uint8 [B, 3, H, W] of any size, and gives features, floats
[B, D]. That of the usual FID (Heusel et al. 2017, arXiv 1706.08500), Inception-v3 with the weights of 2015-12-05,
is made with the package `pytorch-fid`:

    import torch
    from pytorch_fid.inception import InceptionV3

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = InceptionV3([3]).eval()

        def forward(self, pictures):
            return self.network(pictures.float() / 255)[0].flatten(1)

    some = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    torch.jit.trace(Features(), some).save("inception.pt")
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import torch
from torch import Tensor

from finetune import UserError, first_line


class FeatureNetwork:
    """A network from a TorchScript file, and the number of its features.

    Args:
        path: the file.
        size: height and width of some pictures that it will be given; it is tried on blank ones.

    Raises:
        UserError: no such file, no TorchScript, or it does not make features of pictures.
    """

    def __init__(self, path: str, device: torch.device, size: tuple[int, int]) -> None:
        if not os.path.isfile(path):
            raise UserError(f"eval.features={path}: there is no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError, ValueError):
            raise UserError(
                f"eval.features={path} is no TorchScript: finetune/autoencoder/features.py says how to make it"
            ) from None
        self._device = device
        try:
            tried = self._run(torch.zeros(2, 3, *size, dtype=torch.uint8))
        except (RuntimeError, TypeError, ValueError) as error:
            what = first_line(error)
            raise UserError(f"eval.features={path} cannot take uint8 pictures [B, 3, H, W]: {what}") from None
        if not isinstance(tried, Tensor) or tried.dim() != 2 or len(tried) != 2:
            found = list(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            raise UserError(f"eval.features={path} should make features [2, D] of two pictures, not {found}")
        self.width = tried.shape[1]

    def __call__(self, pixels_BHW3: np.ndarray) -> np.ndarray:
        """Features of uint8 pictures: float64 [B, D]."""
        features_BD = self._run(torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).contiguous())
        return np.asarray(features_BD.double().cpu().numpy())

    @torch.no_grad()
    def _run(self, pixels_B3HW: Tensor) -> Tensor:
        features_BD: Tensor = self._network(pixels_B3HW.to(self._device))
        return features_BD


def frechet(some_ND: np.ndarray, others_MD: np.ndarray) -> float:
    """Squared Frechet distance of two sets of features, each taken as Gaussian, in float64.

    Heusel et al. 2017 (arXiv 1706.08500), equation 6: |m - n|^2 + tr(C + K - 2 (C K)^(1/2)). The root's trace
    is that of (C^(1/2) K C^(1/2))^(1/2): of symmetric matrices, whose roots are real even if C or K is singular.

    Raises:
        ValueError: a set has fewer than two members, or the features differ in number or are not finite.
    """
    if min(len(some_ND), len(others_MD)) < 2 or some_ND.shape[1:] != others_MD.shape[1:]:
        raise ValueError(f"no Frechet distance between features {some_ND.shape} and {others_MD.shape}")
    if not (np.isfinite(some_ND).all() and np.isfinite(others_MD).all()):
        raise ValueError("features are not finite")
    one, two = (torch.from_numpy(np.asarray(features, np.float64)) for features in (some_ND, others_MD))
    some_DD, others_DD = (torch.cov(features.T).reshape(features.shape[1], -1) for features in (one, two))
    values_D, vectors_DD = torch.linalg.eigh(some_DD)
    root_DD = vectors_DD @ torch.diag(values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    cross_D = torch.linalg.eigvalsh(root_DD @ others_DD @ root_DD).clamp(min=0).sqrt()
    means = (one.mean(0) - two.mean(0)).square().sum()
    spread = some_DD.trace() + others_DD.trace() - 2 * cross_D.sum()
    return max(0.0, float(means + spread))
