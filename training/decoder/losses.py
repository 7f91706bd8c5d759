"""The paper's losses between rendered and true images, (B, H, W, 3) in 0..1.

loss = 1.0 L1 + 0.5 (1 - SSIM) + 0.1 LPIPS + 0.1 mean |offset / max_offset|^2        (weights: notes on the paper)
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn


def offset_regularizer(offsets: Tensor, mask: Tensor, max_offset: float) -> Tensor:
    """Mean over the Gaussians of real points of the squared length of their offsets (B, N, 3), in units of the allowed range."""
    return ((offsets / max_offset).square().sum(-1) * mask).sum() / mask.sum().clamp(min=1)


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) of the `lpips` package with the VGG backbone, frozen; (B, H, W, 3) twice -> (B,).

    `weights` is torchvision's `vgg16-397923af.pth`, or another state dict of its VGG16: nothing is downloaded.
    """

    def __init__(self, weights: str | Path | None):
        super().__init__()
        path = Path(weights or "")
        if not path.is_file():
            raise FileNotFoundError(
                f"--lpips_weights {weights}: no such file; give torchvision's VGG16 (vgg16-397923af.pth), downloaded once "
                "while online. To train without the perceptual loss say --lpips_weight 0"
            )
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # torchvision of another torch fails with a RuntimeError
            raise ImportError(
                f'LPIPS needs lpips and torchvision: pip install "avatar-pointillist[lpips]" ({error}). '
                "To train without the perceptual loss say --lpips_weight 0"
            ) from None
        self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
        state = torch.load(path, map_location="cpu", weights_only=True)
        # slice1.0.weight is torchvision's features.0.weight.
        renamed = {name: f"features.{name.split('.', 1)[1]}" for name in self.network.net.state_dict()}
        missing = [name for name in renamed.values() if name not in state]
        if missing:
            raise ValueError(f"{path}: lacks {missing[0]}; expected the state dict of torchvision's VGG16")
        self.network.net.load_state_dict({name: state[source] for name, source in renamed.items()})
        self.requires_grad_(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        first, second = (rearrange(x, "b h w c -> b c h w") for x in (images, truth))
        return self.network(first, second, normalize=True).reshape(len(images))
