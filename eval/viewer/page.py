"""The page in the browser: one or two avatars, the panels beside them, and the loop that keeps the scene up to date.

viser serves the page and renders the splats with WebGL; the server only poses. Controls do no work themselves: they wake the loop,
which alone updates the scene, so that dragging a slider fast never builds a queue of poses.
"""

import contextlib
import io
import socket
import threading
import time
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

import numpy as np
import torch
import viser
from viser import ClientHandle, GuiEvent, ViserServer

from eval.viewer.colors import MODES, modes, point_colors
from eval.viewer.controls import Slider, sliders, to_parameters
from eval.viewer.exports import folder_bytes, splat_bytes
from eval.viewer.playback import Playback
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import file_bytes
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.utils.hub import one_line

# The scene is in centimeters: viser sends covariances as float16, which in meters underflow for Gaussians of 0.2 mm.
UNITS = 100.0
TITLE = "avatar viewer"
FIELD_OF_VIEW = 20.0  # vertical, degrees: that of a portrait lens
ROOM = 1.25  # around the field of a portrait camera, for long hair and for turning
TWO_FURTHER = 1.2  # camera distance for two avatars, relative to one
HEAD_WIDTH = 0.7  # with long hair, relative to the height of a portrait
APART = 0.7  # distance of two avatars, relative to the height of a portrait
GAUSSIANS, POINTS = "Gaussians", "points"
POINT_SIZE = 0.26  # meters, divided by the root of the number of points: together they cover the head
MAX_POINTS = 20_000  # per avatar; of one with more, every second, third, ... point is shown
SLOW = 0.2  # seconds to render a tiny image, above which a page keeps showing points
NO_GPU = "This page seems to have no GPU: Gaussians would lag behind the sliders. You can still choose them under 'render as'."
OTHER_PORT = "choose another --port, or 0 for any free port"


class Shown:
    """An avatar on the page; `offset` (3,) meters is the position of its head's origin."""

    def __init__(self, name: str, avatar: GaussianAvatar, offset: np.ndarray) -> None:
        assert avatar.opacities is not None
        self.name, self.avatar, self.offset = name, avatar, offset.astype(np.float32)
        self.step = -(-len(avatar) // MAX_POINTS)
        self.gaussians, self.points = avatar.bind(), avatar.select(slice(None, None, self.step)).bind()
        self.modes = modes(avatar)
        self.colors: dict[str, np.ndarray] = {}  # (N, 3) uint8 by mode, computed on demand
        self.opacities = _to_bytes(avatar.opacities.sigmoid()[:, None].numpy())  # (N, 1)

    @torch.inference_mode()
    def posed(self, params: HeadParameters, color: str, render_as: str) -> dict[str, np.ndarray]:
        """What viser renders, by the attribute names of its handles, in the units of the scene."""
        if color not in self.modes:  # a mode of the other avatar
            color = MODES[0]
        if color not in self.colors:
            self.colors[color] = _to_bytes(point_colors(self.avatar, color))
        if render_as == POINTS:
            positions = self.points.pose(params, rotate_covariances=False).positions[0].numpy()
            return {"points": (positions + self.offset) * UNITS, "colors": self.colors[color][:: self.step]}
        positions, covariances = (each[0].numpy() for each in self.gaussians.covariances(params))
        return {
            "centers": (positions + self.offset) * UNITS,
            "covariances": covariances * UNITS**2,
            "rgbs": self.colors[color],
            "opacities": self.opacities,
        }


class Page:
    """The scene and the panels of one server; `run` keeps them up to date until the process ends."""

    def __init__(
        self, server: ViserServer, avatars: Mapping[str, GaussianAvatar], motions: Mapping[str, HeadParameters]
    ) -> None:
        """One or two avatars of one head model by name, from left to right; `motions` by name."""
        head = next(iter(avatars.values())).head
        assert head is not None
        self.head: HeadModel = head
        self.server, self.changed = server, threading.Event()
        distance, target, height = view(head)
        left = -APART * height * (len(avatars) - 1) / 2
        self.shown = [
            Shown(name, avatar, np.array((left + APART * height * index, 0.0, 0.0)))
            for index, (name, avatar) in enumerate(avatars.items())
        ]
        further = 1 if len(avatars) == 1 else TWO_FURTHER
        self.aspect = (HEAD_WIDTH + APART * (len(avatars) - 1)) / further  # width by height in which all are visible
        self._set_initial_camera(target, distance * further)
        self._build_panels(motions)
        self.handles: list[Any] = []
        self.rendered_as = self.rendered_color = ""  # current state of the handles
        self.measured = False  # whether the speed of the page is known
        self.draw()
        server.on_client_connect(self._reset_view)
        server.on_client_connect(self._measure_speed)

    def run(self) -> None:
        """Draw whenever something changes or a motion plays; never returns."""
        while True:
            begun = time.perf_counter()
            self.changed.clear()
            self.draw()
            rest = max(0.0, 1 / self.playback.rate.value - (time.perf_counter() - begun))
            self.changed.wait(rest if self.playback.play.value else None)

    def draw(self) -> None:
        """Update the scene to the current values of the panels."""
        params, render_as, color = self.parameters(), self.render_as.value, self.color.value
        posed = [shown.posed(params, color, render_as) for shown in self.shown]
        with self.server.atomic():
            if render_as != self.rendered_as:
                # Removed rather than hidden: three.js renders hidden splats off screen, at full cost.
                for handle in self.handles:
                    handle.remove()
                self.handles = [self._add(f"/avatar_{index}", render_as, each) for index, each in enumerate(posed)]
            else:
                for handle, each in zip(self.handles, posed):
                    if render_as == GAUSSIANS:
                        handle.set_gaussians(**each)
                        continue
                    handle.points = each["points"]
                    if color != self.rendered_color:  # new colors create a new material, which is slow
                        handle.colors = each["colors"]
        self.rendered_as, self.rendered_color = render_as, color
        self.server.flush()

    def _add(self, name: str, render_as: str, posed: dict[str, Any]) -> Any:
        if render_as == GAUSSIANS:
            return self.server.scene.add_gaussian_splats(name, **posed)
        size = POINT_SIZE * UNITS / len(posed["points"]) ** 0.5
        style: dict[str, Any] = dict(point_shape="circle", point_shading="flat", precision="float32")
        return self.server.scene.add_point_cloud(name, **posed, point_size=size, **style)

    def _measure_speed(self, client: ClientHandle) -> None:
        """Switch from points to Gaussians if the first page renders fast; without a GPU, these take it a second an image."""
        if self.measured:
            return
        answer = partial(client.local_storage.get_item, "", timeout=10.0)
        image = partial(client.get_render, 16, 16, transport_format="png", timeout=10.0)
        try:
            answered, rendered = (min(timeit.repeat(call, number=1, repeat=3)) for call in (answer, image))
            fast = rendered - answered < SLOW
        except (RuntimeError, TimeoutError):
            if client.client_id not in self.server.get_clients():
                return  # disconnected: measure the next page
            fast = False
        self.measured = True
        if fast:
            self.render_as.value = GAUSSIANS  # type: ignore[misc]  # it has a setter, apart from its getter
            self.changed.set()
        else:
            client.add_notification("rendering as points", NO_GPU, auto_close_seconds=8.0)

    def parameters(self) -> HeadParameters:
        """The frame on the screen: that of the motion, with the sliders added."""
        values = [(slider, handle.value) for slider, handle in self.sliders]
        return to_parameters(values, self.head, self.playback.frame())

    def _set_initial_camera(self, target: np.ndarray, distance: float) -> None:
        scene, camera = self.server.scene, self.server.initial_camera
        scene.set_up_direction("+y")
        scene.world_axes.visible = False
        camera.fov = np.radians(FIELD_OF_VIEW)
        camera.position = (target + np.array((0, 0, distance))) * UNITS
        camera.look_at = target * UNITS
        camera.near, camera.far = 1.0, 10_000.0

    def _reset_view(self, client: ClientHandle | None) -> None:
        """The initial camera of one page, further away where the page is narrow."""
        if client is None:
            return
        start, camera = self.server.initial_camera, client.camera
        further = max(1.0, self.aspect / camera.aspect)
        with client.atomic():
            camera.up_direction = (0.0, 1.0, 0.0)
            camera.position = start.look_at + further * (start.position - start.look_at)
            camera.look_at = start.look_at

    def _build_panels(self, motions: Mapping[str, HeadParameters]) -> None:
        """A small panel that is always visible, and one with the controls, which narrow screens collapse."""
        gui = self.server.gui
        # viser's share button would open a tunnel through a third-party server.
        gui.configure_theme(show_logo=False, show_share_button=False, control_width="medium")
        gui.main_panel.float(x=15, y=-15, width=240)
        names = [escape(shown.name) for shown in self.shown]
        counts = [f"{name}: {len(shown.avatar):,} points" for name, shown in zip(names, self.shown)]
        title = f"<title>{', '.join(names)}: {TITLE}</title>"  # React moves it to the head of the page
        gui.add_markdown(title + "\n\n" + "  \n".join(counts))
        self.style = gui.add_html("")
        reset = gui.add_button("reset view", hint="back to the initial camera")
        reset.on_click(lambda event: self._reset_view(event.client))
        controls = gui.add_panel()
        controls.dock_right()
        with controls.add_tab("controls"):
            self._build_controls(motions)

    def _build_controls(self, motions: Mapping[str, HeadParameters]) -> None:
        gui = self.server.gui
        known = {mode for shown in self.shown for mode in shown.modes}
        self.color = gui.add_dropdown("color", [mode for mode in MODES if mode in known])
        hint = "points are the default without a GPU, where Gaussians are slow"
        self.render_as = gui.add_dropdown("render as", (GAUSSIANS, POINTS), initial_value=POINTS, hint=hint)
        self.background = gui.add_rgb("background", (255, 255, 255))
        self.playback = Playback(gui, motions, self.changed)
        self.sliders: list[tuple[Slider, viser.GuiSliderHandle[float]]] = []
        for group, specifications in sliders(self.head).items():
            with gui.add_folder(group):
                for each in specifications:
                    self.sliders.append((each, gui.add_slider(each.label, each.low, each.high, each.step, 0.0)))
        waking: list[Any] = [self.color, self.render_as, *(handle for _, handle in self.sliders)]
        for control in waking:
            control.on_update(lambda _: self.changed.set())
        self.background.on_update(lambda _: self._paint())
        gui.add_button("reset sliders").on_click(lambda _: self._reset_sliders())
        with gui.add_folder("save"):
            self._build_exports()

    def _build_exports(self) -> None:
        gui = self.server.gui
        names = [shown.name for shown in self.shown]
        which = gui.add_dropdown("avatar", names, visible=len(names) > 1)

        def offer(label: str, hint: str, file: str, make: Callable[[ClientHandle, Shown], bytes]) -> None:
            def send(event: GuiEvent) -> None:
                if event.client is not None:
                    shown = self.shown[names.index(which.value)]
                    _send(event.client, file.format(shown.name), partial(make, event.client, shown))

            gui.add_button(label, hint=hint).on_click(send)

        def splats(suffix: str) -> Callable[[ClientHandle, Shown], bytes]:
            return lambda _, shown: splat_bytes(shown.avatar, self.parameters(), suffix)

        pose, about = "the Gaussians in their current pose, for", "the avatar, to be opened elsewhere"
        offer("PLY", f"{pose} any splat viewer", "{}.ply", splats(".ply"))
        offer(".splat", f"{pose} viewers of .splat", "{}.splat", splats(".splat"))
        offer("GaussianAvatars folder (zip)", about, "{}.zip", lambda _, shown: folder_bytes(shown.avatar, shown.name))
        offer("screenshot", "PNG of the view with a transparent background", "screenshot.png", _screenshot)

    def _paint(self) -> None:
        """Color the page behind the scene, so that screenshots stay transparent; viser has a canvas above that of three.js."""
        self.style.content = f"<style>canvas[data-engine] {{ background: rgb{self.background.value} }}</style>"

    def _reset_sliders(self) -> None:
        for _, handle in self.sliders:
            handle.value = 0.0  # type: ignore[misc]  # it has a setter, apart from its getter
        self.changed.set()


def view(head: HeadModel) -> tuple[float, np.ndarray, float]:
    """Distance of the camera in meters, the point it looks at (3,), and the height visible at that point."""
    camera = portrait_cameras(head, size=1)
    height = ROOM / float(camera.Ks[0, 0, 0])  # of an image of 1 pixel, at a distance of 1 m
    target = camera.positions[0].numpy() - np.array((0.0, 0.0, 1.0))
    return height / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2)), target, height


def check_address(host: str, port: int) -> None:
    """ValueError where a server cannot listen; port 0 stands for any free port."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; {OTHER_PORT}") from None


def open_server(host: str, port: int) -> ViserServer:
    """A server at exactly this address; ValueError if it is not available."""
    check_address(host, port)
    with contextlib.redirect_stdout(io.StringIO()):  # the command prints the address once the page is ready
        server = ViserServer(host=host, port=port, label=TITLE, verbose=False)
    # viser falls back to the next port, but another program would answer at the requested one.
    if port not in (0, server.get_port()):
        server.stop()
        raise ValueError(f"cannot listen on {host} port {port}: it was taken just now; {OTHER_PORT}")
    return server


def _send(client: ClientHandle, name: str, make: Callable[[], bytes]) -> None:
    """Send the file to the browser, or show what is wrong as a notification there."""
    try:
        client.send_file_download(name, make(), save_immediately=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # viser: RuntimeError for a closed browser
        client.add_notification(f"{name} was not saved", one_line(error), color="red")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """0..1 to the nearest of 0..255; viser would truncate."""
    return (values * 255 + 0.5).astype(np.uint8)


def _screenshot(client: ClientHandle, _: Shown) -> bytes:
    camera = client.camera
    return file_bytes(client.get_render(camera.image_height, camera.image_width, transport_format="png", timeout=30.0))
