"""The app end to end: started as a program, used in a real Chromium from upload to download; what it leaves, whom it asks."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from eval.app.__main__ import main
from eval.app.photograph import CLICKS
from gaussian_tokenizer.avatars.avatar import GaussianAvatar

SIZE = 512
ASTRONAUT = np.array(json.loads((ROOT / "training/recipe/astronaut.json").read_text())["landmarks"])


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """Where the program has its temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(pipeline_folder, temporary) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'avatar-pointillist[app]'")
    command = [sys.executable, "-m", "eval.app", "--model", str(pipeline_folder), "--port", "0", "--max_points", "12"]
    # Gradio looks for itself at this address, so a proxy must not stand between.
    environment = os.environ | {"TMPDIR": str(temporary), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stderr is not None
    line = server.stdout.readline()
    match = re.match(r"http://127.0.0.1:\d+", line)
    if match is None:
        server.kill()
        pytest.fail(f"the app said {line!r}: {server.stderr.read()}")
    (cache,) = temporary.glob("pointillist-app-*")
    assert cache.stat().st_mode & 0o077 == 0, "only this user can read uploads"
    yield match[0]
    assert server.poll() is None, "the app ended by itself"
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and "Traceback" not in errors, errors
    assert not cache.exists()


def kept(temporary: Path) -> list[str]:
    """The files of all visitors, without the numbers of images."""
    (cache,) = temporary.glob("pointillist-app-*")
    return sorted({path.name.split("-")[0] for path in cache.rglob("*") if path.is_file()})


def until_kept(page, temporary: Path, names: list[str]) -> None:
    for _ in range(300):
        if kept(temporary) == names:
            return
        page.wait_for_timeout(100)
    assert kept(temporary) == names


def click(page, x: float, y: float) -> None:
    """Click a pixel of the photograph."""
    box = page.locator("#photograph img").bounding_box()
    scale = min(box["width"], box["height"]) / SIZE
    left, top = (box[side] + (box[length] - SIZE * scale) / 2 for side, length in (("x", "width"), ("y", "height")))
    page.mouse.click(left + x * scale, top + y * scale)


@pytest.mark.slow
def test_a_portrait_becomes_an_avatar_and_nothing_is_left_of_it(address, browser, temporary, bench_head, tmp_path):
    hosts, said = set(), []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)

    (tmp_path / "notes.png").write_text("This is not an image.")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
    page.get_by_text("notes.png is not a readable image: not one of PNG").wait_for()
    until_kept(page, temporary, [])
    make = page.get_by_role("button", name="Make the avatar")
    assert make.is_disabled()

    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "me.png")  # gray, 16 bits
    page.locator("input[type=file]").first.set_input_files(tmp_path / "me.png")
    until_kept(page, temporary, ["photograph"])  # not the upload
    for number, index in enumerate(CLICKS.values(), 1):
        page.get_by_text(f"({number} of {len(CLICKS)})").wait_for()
        click(page, *ASTRONAUT[index])
    page.get_by_text("the nearest one moves there").wait_for()
    pixels = re.search(r"are ([\d.]+) pixels from yours", page.inner_text("body"))
    assert pixels is not None and 0 < float(pixels[1]) < 6, "the clicks arrived where they were made"
    assert kept(temporary) == ["mesh", "photograph"]

    (tmp_path / "points.json").write_text(json.dumps(ASTRONAUT[17:].tolist()))
    page.get_by_text("Landmarks from a file").click()
    page.locator("input[type=file][accept*=json]").set_input_files(tmp_path / "points.json")
    page.wait_for_function(f"!document.body.innerText.includes('{pixels[0]}')")
    until_kept(page, temporary, ["mesh", "photograph"])

    make.click()
    with page.expect_download() as waiting:
        page.locator("a[download='avatar.zip']").click()
    assert page.locator("#steps img").evaluate("image => image.naturalWidth") > 100
    zipfile.ZipFile(waiting.value.path()).extractall(tmp_path)
    avatar = GaussianAvatar.load(tmp_path / "avatar", head=bench_head)
    assert 0 < len(avatar) <= 12 and avatar.params.shape.any(), "on the head of the photograph"
    assert make.is_enabled()

    page.close()
    for _ in range(300):
        if not kept(temporary):
            break
        time.sleep(0.1)
    assert kept(temporary) == [] and said == [] and hosts == {urlsplit(address).netloc}


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """What the command changes is changed back."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("in_this_process")
def test_the_command_says_what_is_wrong_in_one_line(bench_pipeline, capsys, tmp_path):
    page = pytest.importorskip("eval.app.page", reason="needs Gradio: pip install 'avatar-pointillist[app]'")
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--port", "0"])
    assert end.value.code == 1 and "has no pipeline.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--port", "70000"])
    assert "expected 0 to 65535" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--port", str(taken.getsockname()[1])])
    assert "choose another --port" in capsys.readouterr().err
    none = {name: getattr(bench_pipeline.head, name)[:0] for name in ("landmark_faces", "landmark_barycentrics")}
    faceless = SimpleNamespace(head=dataclasses.replace(bench_pipeline.head, **none))
    with pytest.raises(ValueError, match="has no landmarks"):
        page.App(faceless, tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "eval.app.page", raising=False)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path)])
    assert 'pip install "avatar-pointillist[app]"' in capsys.readouterr().err
