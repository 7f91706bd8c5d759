"""Random cameras as photographs have them: turned, near or far, the head larger or smaller, seldom exactly in the middle."""

import numpy as np
import torch

from gaussian_tokenizer.rendering.cameras import Cameras

AZIMUTH, ELEVATION, ROLL = 35.0, 15.0, 6.0  # degrees, largest to either side
DISTANCES = (0.5, 2.5)  # meters, from a selfie to a telephoto lens; their logarithm is uniform
FILLS = (0.55, 0.9)  # the longer side of the head without its neck, relative to the image
OFF_CENTER = 0.6  # largest shift, relative to the margin


def random_cameras(skulls: torch.Tensor, size: int, rng: np.random.Generator) -> Cameras:
    """A square camera for each of the posed heads `skulls` (C, V, 3) meters, hair and neck left out, which fills 55 to 90 %."""
    viewmats, Ks = [], []
    for skull in skulls.cpu().double().numpy():
        azimuth, elevation, roll = np.deg2rad(rng.uniform(-1, 1, 3) * (AZIMUTH, ELEVATION, ROLL))
        fill, distance = rng.uniform(*FILLS), np.exp(rng.uniform(*np.log(DISTANCES)))
        low, high = skull.min(0), skull.max(0)
        # The axes of a camera that looks at the middle, x right, y down; then turned about its axis.
        back = np.array((np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)))
        right = np.array((np.cos(azimuth), 0, -np.sin(azimuth)))
        down = np.cross(-back, right)
        turned = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
        rotation = np.stack((*turned, -back))
        shift = rng.uniform(-1, 1, 2) * OFF_CENTER * (1 - fill) / 2 / fill * np.linalg.norm(high[:2] - low[:2]) / 1.5
        eye = (low + high) / 2 + distance * back + shift @ np.stack(turned)
        seen = (skull - eye) @ rotation.T
        extent = np.ptp(seen[:, :2] / seen[:, 2:], axis=0).max()
        focal = fill * size / extent
        viewmat = np.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ eye
        viewmats.append(viewmat)
        Ks.append([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    # The precision of the other cameras.
    return Cameras(
        torch.tensor(np.array(viewmats), dtype=torch.float32), torch.tensor(Ks, dtype=torch.float32), size, size
    )
