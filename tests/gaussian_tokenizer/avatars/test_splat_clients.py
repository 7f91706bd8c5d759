"""Real clients open what we export: splat-transform, SuperSplat's reader and writer, and Spark in a real browser.

Both come from npm in fixed versions, into pytest's cache. What they read is drawn and compared with our own render.
"""

import base64
import functools
import io
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars.export import save_splats
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.ply import read_gaussian_ply
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.image_metrics import psnr
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.subject import synthesize_subject

pytest.importorskip("gsplat", reason="needs gsplat for .splat and .compressed.ply")
pytestmark = pytest.mark.slow

SPLAT_TRANSFORM, SPARK = ["@playcanvas/splat-transform@2.7.1"], ["@sparkjsdev/spark@2.2.0", "three@0.187.0"]
OLDEST_NODE = 18  # for splat-transform 2.7.1
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--no-sandbox --disable-gpu-sandbox --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
)
ALIKE = 38.0  # dB
EXPORTS = [(".ply", 0), (".ply", 2), (".splat", 0), (".compressed.ply", 0), (".compressed.ply", 2)]  # and SH degrees
SIZE, FOCAL, DRAWS = 256, 512.0, 40
PAGE = """<!doctype html>
<style>body { margin: 0 } canvas { display: block }</style>
<link rel="icon" href="data:,">
<script type="importmap">{"imports": {
  "three": "/node_modules/three/build/three.module.js",
  "three/addons/": "/node_modules/three/examples/jsm/",
  "spark": "/node_modules/@sparkjsdev/spark/dist/spark.module.js"
}}</script>
<script type="module">
  import * as THREE from "three";
  import { SparkRenderer, SplatMesh } from "spark";
  window.open_file = async (url, cameraToWorld, degrees, size) => {
    const renderer = new THREE.WebGLRenderer({preserveDrawingBuffer: true});
    renderer.setSize(size, size);
    renderer.setClearColor(0xffffff, 1);
    document.body.replaceChildren(renderer.domElement);
    const scene = new THREE.Scene(), mesh = new SplatMesh({url});
    await mesh.initialized;
    // As 3D Gaussian Splatting draws: 0.3 pixels squared on each covariance, sorted by depth. Both are options of Spark.
    scene.add(new SparkRenderer({renderer, preBlurAmount: 0.3, blurAmount: 0, sortRadial: false}), mesh);
    const camera = new THREE.PerspectiveCamera(degrees, 1, 0.01, 100);
    camera.matrixAutoUpdate = false;
    camera.matrix.fromArray(cameraToWorld);
    camera.matrixWorldNeedsUpdate = true;
    window.draw = async () => {
      renderer.render(scene, camera);
      await new Promise(requestAnimationFrame);
      return renderer.domElement.toDataURL();
    };
    return mesh.numSplats;
  };
</script>"""


def installed(config: pytest.Config, packages: list[str]) -> Path:
    """A folder with `node_modules`; skips the test where there is no npm or no registry."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node and npm on the PATH: apt-get install nodejs npm")
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {version}, needs v{OLDEST_NODE} or newer")
    folder = Path(config.cache.mkdir(re.sub(r"[^\w.]+", "-", "npm" + "".join(packages))))
    if not (folder / "done").exists():
        command = [npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts", *packages]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode != 0:
            reason = [line for line in result.stderr.splitlines() if "error" in line][:1]
            pytest.skip(f"npm could not install {' '.join(packages)}: {' '.join(reason)}")
        (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def splat_transform(pytestconfig):
    """Call it as on the command line."""
    folder = installed(pytestconfig, SPLAT_TRANSFORM)
    program = folder / "node_modules" / "@playcanvas" / "splat-transform" / "bin" / "cli.mjs"

    def run(*arguments) -> None:
        command = ["node", program, "--quiet", "--gpu", "cpu", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr

    return run


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    """A head of 1,500 Gaussians, SH degree 0."""
    return synthesize_subject(
        build_procedural_head(600), 0, num_points=1500, placement="regular"
    ).avatar.canonical_gaussians()


@pytest.fixture(scope="module", params=[(".sog", "y"), (".spz", "minus_y")], ids=["sog", "spz"])
def web_file(request, tmp_path_factory, gaussians, splat_transform) -> tuple[Path, Path]:
    """A `.ply` and what the line in docs/animation.md makes of it."""
    suffix, up = request.param
    source = tmp_path_factory.mktemp("web") / "head.ply"
    made = source.with_suffix(suffix)
    save_splats(source, gaussians, up=up)
    splat_transform(*(["--spz-version", "3"] if suffix == ".spz" else []), source, made)
    return source, made


@pytest.fixture(scope="module")
def camera() -> Cameras:
    """From in front, a little above and to the side: no image of a mirrored, turned or inverted head is like it."""
    return Cameras.orbit((0.0, 0.0, 0.0), 1.0, [25.0], 10.0, FOCAL, SIZE, SIZE)


@pytest.fixture(scope="module")
def spark(pytestconfig, tmp_path_factory, camera) -> Iterator:
    """Call it with a file and the expected image; the PSNR of what a page with Spark draws in the end."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    site = tmp_path_factory.mktemp("site")
    (site / "index.html").write_text(PAGE)
    (site / "node_modules").symlink_to(installed(pytestconfig, SPARK) / "node_modules")
    handler = functools.partial(QuietHandler, directory=str(site))
    # OpenGL's camera looks along -z with y up, and JavaScript's matrices are stored by columns.
    to_world = torch.linalg.inv(camera.viewmats[0].double()) @ torch.diag(torch.tensor((1.0, -1, -1, 1)).double())
    degrees = float(np.degrees(2 * np.arctan(SIZE / (2 * FOCAL))))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_api.sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": SIZE, "height": SIZE})
        page.set_default_timeout(60_000)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("'open_file' in window")

        def show(path: Path, expected: torch.Tensor) -> float:
            shutil.copy(path, site)
            arguments = [f"/{path.name}", to_world.T.flatten().tolist(), degrees, SIZE]
            assert page.evaluate("(given) => open_file(...given)", arguments) > 1000
            before, found = b"", 0.0
            for _ in range(DRAWS):  # it sorts in another thread: the first images may be wrong
                content = base64.b64decode(page.evaluate("draw()").split(",")[1])
                image = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))) / 255
                found = decibels(image, expected)
                if found >= ALIKE and content == before:
                    break
                before = content
                page.wait_for_timeout(50)
            return found

        yield show
        browser.close()
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def image_of(gaussians: Gaussians, camera: Cameras) -> torch.Tensor:
    return render(gaussians, camera, background=1.0).image[0].clamp(0, 1)


def read_back(path: Path) -> Gaussians:
    ply = read_gaussian_ply(path, with_faces=False)
    values = {
        name: torch.from_numpy(getattr(ply, name)) for name in ("positions", "scales", "quats", "opacities", "sh")
    }
    return Gaussians(
        positions=values["positions"][None],
        scales=values["scales"].exp()[None],
        quats=values["quats"][None],
        opacities=values["opacities"].sigmoid(),
        sh=values["sh"],
    )


def decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(psnr(found[None], expected[None]))


def with_view_dependence(gaussians: Gaussians) -> Gaussians:
    """The same head with colors of SH degree 2."""
    rest = torch.randn(len(gaussians), 8, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    return replace(gaussians, sh=torch.cat((gaussians.sh, rest), 1))


@pytest.mark.parametrize(("suffix", "degree"), EXPORTS)
def test_splat_transform_reads_an_export_as_we_draw_it(tmp_path, gaussians, camera, splat_transform, suffix, degree):
    given = with_view_dependence(gaussians) if degree else gaussians
    save_splats(tmp_path / f"head{suffix}", given)
    splat_transform(tmp_path / f"head{suffix}", tmp_path / "back.ply")
    found = decibels(image_of(read_back(tmp_path / "back.ply"), camera), image_of(given, camera))
    print(f"\nsplat-transform {suffix} of degree {degree}: {found:.1f} dB")
    assert found >= ALIKE


def test_the_documented_lines_make_files_for_the_web_a_third_of_the_size(tmp_path, camera, splat_transform, web_file):
    source, made = web_file
    assert made.stat().st_size < source.stat().st_size / 3
    splat_transform(made, tmp_path / "back.ply")
    found = decibels(image_of(read_back(tmp_path / "back.ply"), camera), image_of(read_back(source), camera))
    print(f"\nsplat-transform {made.suffix}: {found:.1f} dB")
    assert found >= ALIKE


@pytest.mark.parametrize(("suffix", "degree"), EXPORTS)
def test_spark_draws_an_export_as_we_do(tmp_path, gaussians, camera, spark, suffix, degree):
    given = with_view_dependence(gaussians) if degree else gaussians
    save_splats(tmp_path / f"head{degree}{suffix}", given)
    found = spark(tmp_path / f"head{degree}{suffix}", image_of(given, camera))
    print(f"\nSpark {suffix} of degree {degree}: {found:.1f} dB")
    assert found >= ALIKE


def test_spark_draws_what_the_documented_lines_make_upright(gaussians, camera, spark, web_file):
    _, made = web_file
    found = spark(made, image_of(gaussians, camera))
    print(f"\nSpark {made.suffix}: {found:.1f} dB")
    assert found >= ALIKE
