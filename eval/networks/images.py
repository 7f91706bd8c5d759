"""Networks of torch that look at whole images: LPIPS, FID's Inception, CLIP.

Architecture and preprocessing are those of the packages `lpips`, `torch-fidelity` and `transformers`; only the weights are
loaded here, as plain tensors, and compared with the network before use.
"""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.networks.weights import (
    Missing,
    batches,
    cached_checkpoint,
    check_state_dict,
    find_weights,
    read_state_dict,
    source_of,
)

LPIPS_FILES = {
    "alex": ("AlexNet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("VGG16", "vgg16-397923af.pth"),
}
LPIPS_MIN_SIZE = 32  # pixels; a side below leaves nothing after AlexNet's poolings
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Tells it from torchvision's Inception, which has the same names and 1,000 classes.
INCEPTION_SHAPES = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, 2048)}


def open_lpips(net: str, weights: str | None, device: str) -> "Lpips | Missing":
    """LPIPS v0.1 with backbone `net` ("alex" or "vgg"); its weights are torchvision's, given or in torch.hub's cache."""
    if net not in LPIPS_FILES:
        raise ValueError(f"--lpips_net {net!r}: expected one of {', '.join(LPIPS_FILES)}")
    name, file = LPIPS_FILES[net]
    path = Path(weights) if weights else cached_checkpoint(file)
    packages = {"lpips": "lpips", "torchvision": "torchvision"}
    found = find_weights(f"LPIPS v0.1, {name}", packages, path, "--lpips_weights", file)
    return found if isinstance(found, Missing) else Lpips(net, found, device)


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018): smaller is more alike, 0 for equal images."""

    def __init__(self, net: str, weights: Path, device: str):
        import lpips

        name, file = LPIPS_FILES[net]
        flag, expected = f"--lpips_net {net} --lpips_weights", f"torchvision's {name} ({file})"
        state = read_state_dict(weights, flag, expected)
        # The backbone starts random, whatever is loaded into it; the package calls torchvision in an old way.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        own = self.network.net.state_dict()
        names = {
            key: f"features.{key.split('.', 1)[1]}" for key in own
        }  # slice1.0.weight is torchvision's features.0.weight
        check_state_dict(state, {names[key]: own[key].shape for key in own}, weights, flag, expected)
        self.network.net.load_state_dict({key: state[names[key]] for key in own})
        self.network.eval().requires_grad_(False).to(device)
        self.device, self.source = device, source_of(f"LPIPS v0.1, {name}", "lpips", weights)

    def describe(self) -> dict[str, str]:
        """What the numbers were computed with."""
        return asdict(self.source)

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N,) distances of images (N, H, W, 3) uint8."""
        if min(a.shape[1:3]) < LPIPS_MIN_SIZE:
            raise ValueError(
                f"LPIPS needs images of at least {LPIPS_MIN_SIZE} pixels a side, found {a.shape[2]}x{a.shape[1]}"
            )
        values = [
            self.network(*(part.to(self.device).float() / 255 for part in pair), normalize=True).flatten()
            for pair in batches(a, b)
        ]
        return torch.cat(values).double().cpu().numpy() if values else np.zeros(0)


def open_inception(weights: str | None, device: str) -> "Inception | Missing":
    """FID's InceptionV3; its weights are those of torch-fidelity or pytorch-fid, given or in torch.hub's cache."""
    path = Path(weights) if weights else cached_checkpoint(INCEPTION_FILE)
    packages = {"torch_fidelity": "torch-fidelity", "torchvision": "torchvision"}
    found = find_weights("InceptionV3 of FID", packages, path, "--inception_weights", INCEPTION_FILE)
    return found if isinstance(found, Missing) else Inception(found, device)


class Inception:
    """InceptionV3 of 2015-12-05 (TensorFlow's, in torch), its last pooling: what FID is defined with.

    Images are resized to 299 pixels as TensorFlow 1 did: bilinear, without anti-aliasing.
    """

    def __init__(self, weights: Path, device: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        flag, expected = "--inception_weights", f"FID's InceptionV3 with 1,008 classes ({INCEPTION_FILE})"
        state = read_state_dict(weights, flag, expected)
        check_state_dict(state, INCEPTION_SHAPES, weights, flag, expected)
        # The package would run code that a file brings along. It gets the checked tensors, not the file.
        checked = io.BytesIO()
        torch.save(dict(state), checked)
        checked.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):
                self.network = FeatureExtractorInceptionV3(
                    "inception", ["2048"], feature_extractor_weights_path=checked
                )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{flag} {weights}: {reason}; expected {expected}") from None
        self.network.eval().to(device)
        self.device, self.source = device, source_of("InceptionV3 of FID, pool3", "torch-fidelity", weights)

    def describe(self) -> dict[str, str]:
        """What the numbers were computed with."""
        return asdict(self.source)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 2048) features of images (N, H, W, 3) uint8."""
        values = [self.network(part.to(self.device))[0] for (part,) in batches(images)]
        return torch.cat(values).double().cpu().numpy() if values else np.zeros((0, 2048))


def open_clip(model: str | None, device: str) -> "Clip | Missing":
    """A CLIP model of transformers: a folder, or the id of one that is in the Hub's cache."""
    if model is None:
        remedy = "hf download openai/clip-vit-base-patch32 --local-dir DIR; --clip_model DIR"
        return Missing("CLIP, transformers", "no model given", remedy)
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise FileNotFoundError(
                f"--clip_model {model}: neither a folder nor a model in the Hub's cache; expected a CLIP model of "
                f"transformers (hf download openai/clip-vit-base-patch32 --local-dir DIR)"
            ) from None
    return Clip(folder, model, device)


class Clip:
    """Image features of CLIP (Radford et al. 2021), as they are compared by their cosine.

    Images are prepared by the model's processor on PIL, also where torchvision is installed: the same numbers everywhere.
    """

    def __init__(self, folder: Path, label: str, device: str):
        from transformers import AutoImageProcessor, CLIPModel

        flag, expected = "--clip_model", "a CLIP model of transformers, with its preprocessor_config.json"
        kind = _model_type(folder)
        if kind != "clip":
            raise ValueError(f"{flag} {label}: config.json says model_type {kind!r}, not 'clip'; expected {expected}")
        weights = next(
            (folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None
        )
        if weights is None or not (folder / "preprocessor_config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise ValueError(f"{flag} {label}: holds {found}; expected {expected}, and its weights in one file")
        try:
            with _quiet_transformers():
                loaded: Any = CLIPModel.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
                )
        except Exception as error:  # each format of weights has its own kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{flag} {label}: {weights.name} does not fit config.json ({reason}); expected {expected}"
            ) from None
        self.network, lacking = loaded[0], sorted(loaded[1]["missing_keys"])
        if lacking:
            raise ValueError(
                f"{flag} {label}: {weights.name} lacks {len(lacking)} tensors of the model, {lacking[0]} for one; "
                f"expected {expected}"
            )
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        self.network.eval().requires_grad_(False).to(device)
        self.device, self.source = device, source_of(f"CLIP, {Path(label).name}", "transformers", weights)

    def describe(self) -> dict[str, str]:
        """What the numbers were computed with."""
        return asdict(self.source)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, D) features of images (N, H, W, 3) uint8, not normalized."""
        values = []
        for (part,) in batches(images):
            pixels = self.processor(images=list(part.numpy()), input_data_format="channels_first", return_tensors="pt")
            values.append(self.network.get_image_features(pixels["pixel_values"].to(self.device)).pooler_output)
        return torch.cat(values).double().cpu().numpy() if values else np.zeros((0, self.network.config.projection_dim))


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise ValueError(f"--clip_model {folder}: config.json is no JSON object") from None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its table of wrong weights and its progress bar: one error says it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
