"""What tests of several packages share: a corpus of a few synthetic subjects, small enough to be built in seconds; a browser."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN

CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu-sandbox --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Folder of a corpus: 12 subjects, 4 of them held out, about 60 points each on 600 faces, four images of 56 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = {"image_size": 56, "num_points": 60, "views": 2, "timesteps": 2, "placement": "regular"} | PLAIN
    synthesize(folder / "avatars", num_subjects=12, **settings)
    settings = BuildSettings(n_bins=64, image_size=56, num_validation=4)
    build(folder / "avatars", build_procedural_head(600), folder / "corpus", settings, progress=False)
    return folder / "corpus"


@pytest.fixture(scope="module")
def browser():
    """A real Chromium that draws WebGL by software; it ends with the module, for its event loop would stay in others' way."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def width_on_a_phone(browser):
    """Call it with an HTML file: how wide a phone of 390 pixels finds it, with all that is folded opened."""

    def width(path: Path) -> int:
        phone = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
        page = phone.new_page()
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
        found = page.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)")
        phone.close()
        return found

    return width


@pytest.fixture(scope="session")
def image_pairs():
    """Call it with a seed and a size."""

    def make(seed: int, size: tuple[int, int] = (40, 32)) -> tuple[torch.Tensor, torch.Tensor]:
        """Two pairs of smooth images (2, H, W, 3) with noise of different strength."""
        random = np.random.default_rng(seed)
        y, x = np.mgrid[: size[0], : size[1]] / 10
        truth = np.stack(
            [0.5 + 0.4 * np.sin(x[..., None] + y[..., None] * np.arange(1, 4) + phase) for phase in (0, 1)]
        )
        noise = np.array([0.02, 0.2])[:, None, None, None] * random.standard_normal(truth.shape)
        return torch.from_numpy(np.clip(truth + noise, 0, 1)).float(), torch.from_numpy(truth).float()

    return make
