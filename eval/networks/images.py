"""Networks that read whole images: LPIPS, FID's Inception, CLIP. Weights are checked before they are loaded."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.networks.weights import Missing, find_weights, in_batches, provenance, read_state_dict, wrong_file
from gaussian_tokenizer.utils.hub import one_line
from gaussian_tokenizer.utils.json_files import read_json

LPIPS_FILES = {"alex": ("AlexNet", "alexnet-owt-7be5be79.pth"), "vgg": ("VGG16", "vgg16-397923af.pth")}
LPIPS_MIN_SIZE = 32  # pixels; AlexNet's poolings leave nothing of a smaller side
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# These tell it from torchvision's Inception, which has the same names but 1,000 classes.
INCEPTION_SHAPES = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, 2048)}
CLIP_DOWNLOAD = "hf download openai/clip-vit-base-patch32 --local-dir DIR"


def open_lpips(net: str, weights: str | None, device: str) -> "Lpips | Missing":
    """LPIPS v0.1 with backbone `net` ("alex" or "vgg") and torchvision's weights, given or in torch.hub's cache."""
    if net not in LPIPS_FILES:
        raise ValueError(f"--lpips_net {net!r}: expected one of {', '.join(LPIPS_FILES)}")
    name, file = LPIPS_FILES[net]
    packages = {"lpips": "lpips", "torchvision": "torchvision"}
    found = find_weights(f"LPIPS v0.1, {name}", packages, weights, "--lpips_weights", file)
    return found if isinstance(found, Missing) else Lpips(net, found, device)


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018): smaller is more similar, 0 for equal images."""

    def __init__(self, net: str, weights: Path, device: str):
        import lpips

        name, file = LPIPS_FILES[net]
        flag, expected = f"--lpips_net {net} --lpips_weights", f"torchvision's {name} ({file})"
        # The package initializes the backbone at random, and calls torchvision in a deprecated way.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        own = self.network.net.state_dict()
        names = {key: f"features.{key.split('.', 1)[1]}" for key in own}  # slice1.0.weight -> features.0.weight
        state = read_state_dict(weights, flag, expected, {names[key]: own[key].shape for key in own})
        self.network.net.load_state_dict({key: state[names[key]] for key in own})
        self.network.eval().requires_grad_(False).to(device)
        self.device, self.about = device, provenance(f"LPIPS v0.1, {name}", "lpips", weights)

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N,) distances of images (N, H, W, 3) uint8."""
        if min(a.shape[1:3]) < LPIPS_MIN_SIZE:
            found = f"found {a.shape[2]}x{a.shape[1]}"
            raise ValueError(f"LPIPS needs images of at least {LPIPS_MIN_SIZE} pixels a side, {found}")

        def distances(*pair: Tensor) -> Tensor:
            return self.network(*(part.to(self.device).float() / 255 for part in pair), normalize=True).flatten()

        return in_batches(distances, a, b)


def open_inception(weights: str | None, device: str) -> "Inception | Missing":
    """FID's InceptionV3 with the weights of torch-fidelity or pytorch-fid, given or in torch.hub's cache."""
    packages = {"torch_fidelity": "torch-fidelity", "torchvision": "torchvision"}
    found = find_weights("InceptionV3 of FID", packages, weights, "--inception_weights", INCEPTION_FILE)
    return found if isinstance(found, Missing) else Inception(found, device)


class Inception:
    """TensorFlow's InceptionV3 of 2015-12-05 ported to torch, with features from its last pooling: FID's network.

    Images are resized to 299 pixels as TensorFlow 1 did: bilinear, without anti-aliasing.
    """

    def __init__(self, weights: Path, device: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        flag, expected = "--inception_weights", f"FID's InceptionV3 with 1,008 classes ({INCEPTION_FILE})"
        # The package would run code in a pickled file, so it gets the checked tensors instead of the file.
        checked = io.BytesIO()
        torch.save(dict(read_state_dict(weights, flag, expected, INCEPTION_SHAPES)), checked)
        checked.seek(0)
        options: dict[str, Any] = {"feature_extractor_weights_path": checked}
        try:
            with torch.random.fork_rng(devices=[]):
                self.network = FeatureExtractorInceptionV3("inception", ["2048"], **options)
        except RuntimeError as error:
            raise wrong_file(flag, weights, one_line(error)[:200], expected) from None
        self.network.eval().to(device)
        self.device, self.about = device, provenance("InceptionV3 of FID, pool3", "torch-fidelity", weights)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 2048) features of images (N, H, W, 3) uint8."""
        return in_batches(lambda batch: self.network(batch.to(self.device))[0], images)


def open_clip(model: str | None, device: str) -> "ClipImageEncoder | Missing":
    """A CLIP model of transformers: a folder, or the id of one in the Hub's cache."""
    if model is None:
        return Missing("CLIP, transformers", "no model given", f"{CLIP_DOWNLOAD}; --clip_model DIR")
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            problem = "neither a folder nor a model in the Hub's cache; expected a CLIP model of transformers"
            raise FileNotFoundError(f"--clip_model {model}: {problem} ({CLIP_DOWNLOAD})") from None
    return ClipImageEncoder(folder, model, device)


class ClipImageEncoder:
    """Image features of CLIP (Radford et al. 2021), compared by their cosine.

    The model's processor always runs on PIL, even where torchvision is installed: the numbers are the same everywhere.
    """

    def __init__(self, folder: Path, label: str, device: str):
        from transformers import AutoImageProcessor, CLIPModel

        flag, expected = "--clip_model", "a CLIP model of transformers, with its preprocessor_config.json"
        config = folder / "config.json"
        kind = read_json(config).get("model_type") if config.is_file() else None
        if kind != "clip":
            raise wrong_file(flag, label, f"config.json says model_type {kind!r}, not 'clip'", expected)
        files = sorted(path.name for path in folder.iterdir())
        weights = next((name for name in ("model.safetensors", "pytorch_model.bin") if name in files), None)
        if weights is None or "preprocessor_config.json" not in files:
            raise wrong_file(flag, label, f"holds {', '.join(files)}", f"{expected}, and its weights in one file")
        try:
            with _quiet_transformers():
                loaded: Any = CLIPModel.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
                )
        except Exception as error:  # each weights format raises its own kinds
            problem = f"{weights} does not fit config.json ({one_line(error)[:200]})"
            raise wrong_file(flag, label, problem, expected) from None
        self.network, lacking = loaded[0], sorted(loaded[1]["missing_keys"])
        if lacking:
            problem = f"{weights} lacks {len(lacking)} tensors of the model, e.g. {lacking[0]}"
            raise wrong_file(flag, label, problem, expected)
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        self.network.eval().requires_grad_(False).to(device)
        self.device, self.about = device, provenance(f"CLIP, {Path(label).name}", "transformers", folder / weights)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, D) features of images (N, H, W, 3) uint8, not normalized."""

        def features(batch: Tensor) -> Tensor:
            pixels = self.processor(images=list(batch.numpy()), input_data_format="channels_first", return_tensors="pt")
            return self.network.get_image_features(pixels["pixel_values"].to(self.device)).pooler_output

        return in_batches(features, images)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the table of mismatched weights and the progress bar; our error message covers both."""
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
