"""Draw `docs/images/viewer.png`: two synthetic avatars in the viewer, as Gaussians and as points, in headless Chromium.

python docs/make_viewer_image.py --output docs/images/viewer.png      # a minute or two without a graphics card
"""

import argparse
import io
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from gaussian_tokenizer import load_head
from gaussian_tokenizer.synthetic import synthesize_subject

FLAGS = (
    "--no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --disable-background-networking"
)
WIDTH, HEIGHT = 1360, 560


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="procedural", help="head model of the avatars")
    parser.add_argument("--output", type=Path, default=Path("docs/images/viewer.png"))
    options = parser.parse_args()
    head = load_head(options.head)
    with TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"synthetic-0-{seed:06d}" for seed in (1, 0)]
        for seed, folder in zip((1, 0), folders):
            synthesize_subject(head, (0, seed)).avatar.save(folder)
        command = [sys.executable, "-m", "eval.viewer", "--avatar", folders[0], "--compare", folders[1], "--port", "0"]
        with subprocess.Popen(map(str, command), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            try:
                photographs(address).save(options.output, optimize=True)
            finally:
                server.terminate()


def photographs(address: str) -> Image.Image:
    """The page with Gaussians above the page with points."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"{address}?fixedDpr=1")
        page.get_by_text("jaw open", exact=True).wait_for(timeout=60_000)
        page.wait_for_timeout(20_000)  # the page decides how to render, and notices about slow rendering close
        for notice in page.locator(".mantine-Notification-closeButton").all():
            notice.click()
        set_slider(page, "jaw open", 20)  # steps of half a degree
        set_slider(page, "neck turn", -30)
        page.get_by_role("button", name="reset view").click()  # viser rotates the camera by the same keys
        choose(page, "render as", "Gaussians")
        above = photograph(page)
        choose(page, "color", "density")
        choose(page, "render as", "points")
        below = photograph(page)
        browser.close()
    return Image.fromarray(np.concatenate((above, below)))


def photograph(page: Page) -> np.ndarray:
    """(H, W, 3) uint8, once the page has stopped to change."""
    before, now = b"", page.screenshot()
    while before != now:
        page.wait_for_timeout(3000)
        before, now = now, page.screenshot()
    return np.asarray(Image.open(io.BytesIO(now)).convert("RGB"))


def choose(page: Page, label: str, option: str) -> None:
    menu = page.get_by_text(label, exact=True).locator("xpath=ancestor::*[.//input][1]").locator("input").first
    if menu.input_value() != option:
        menu.click()
        page.get_by_role("option", name=option, exact=True).click()


def set_slider(page: Page, label: str, steps: int) -> None:
    slider = page.get_by_text(label, exact=True).locator(
        "xpath=ancestor::*[.//*[@role='slider']][1]//*[@role='slider']"
    )
    slider.focus()
    for _ in range(abs(steps)):
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
    page.wait_for_timeout(500)  # viser sends what changes within 50 ms as one, and only the last slider of it


if __name__ == "__main__":
    main()
