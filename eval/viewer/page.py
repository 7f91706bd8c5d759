"""The page in the browser: one or two avatars, the panel beside them, and the loop that keeps the image up to date.

viser serves the page and draws the splats by WebGL; the server only poses. Sliders, menus and buttons do no work of their
own: they wake the loop, which alone writes to the scene and takes the values as they then are. A slider dragged fast thus
costs as many poses as the machine can make, never a queue of them, and a browser that goes away leaves nothing behind.
"""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import Any

import numpy as np
import torch
import viser
from viser import ViserServer

from eval.viewer.colors import MODES, modes, point_colors
from eval.viewer.controls import Slider, sliders, to_parameters
from eval.viewer.exports import folder_bytes, png_bytes, splat_bytes
from eval.viewer.playback import Playback
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import portrait_cameras

# The page is in centimeters: viser sends covariances as float16, which ends at Gaussians of 0.2 mm when they are in meters.
UNITS = 100.0
TITLE = "avatar viewer"
FIELD_OF_VIEW = 20.0  # degrees from the lower to the upper border: that of a portrait lens
ROOM = 1.25  # around what a portrait shows: for much hair, and for turning
TWO_FURTHER = 1.2  # than one alone
HEAD_WIDTH = 0.7  # with much hair, in parts of the height that a portrait shows
GAUSSIANS, DOTS = "Gaussians", "dots"
DOT = 0.26  # meters across, by the root of their number: together they cover the head
MAX_DOTS = 20_000  # of an avatar: of one with more points each second, each third, ... is drawn
SLOW = 0.2  # seconds a page takes to draw a tiny image, from which on it begins with dots
TOLD = (
    "This page seems to have no graphics card to draw with: Gaussians would follow a slider late. They are in the menu."
)
OTHER_PORT = "choose another --port, or 0 for any that is free"
APART = 0.7  # of two avatars, in parts of the height that a portrait shows


@dataclass(eq=False)
class Shown:
    """An avatar on the page."""

    name: str
    avatar: GaussianAvatar
    offset: np.ndarray  # (3,) meters, where its head's origin stands
    bound: Skinning = field(init=False)
    dots: Skinning = field(init=False)
    step: int = field(init=False)  # from one point that is a dot to the next
    opacities: np.ndarray = field(init=False)  # (N, 1) uint8
    modes: tuple[str, ...] = field(init=False)  # that it can be colored by
    colors: dict[str, np.ndarray] = field(init=False, default_factory=dict)  # (N, 3) uint8 by mode, as asked for

    def __post_init__(self) -> None:
        self.step = -(-len(self.avatar) // MAX_DOTS)
        self.bound, self.dots = self.avatar.bind(), self.avatar.select(slice(None, None, self.step)).bind()
        self.modes = modes(self.avatar)
        assert self.avatar.opacities is not None
        self.opacities = _to_bytes(self.avatar.opacities.sigmoid()[:, None].numpy())

    @torch.inference_mode()
    def posed(self, params: HeadParameters, color: str, drawn_as: str) -> dict[str, np.ndarray]:
        """What viser draws, by the names of its handles, in units of the page."""
        if color not in self.modes:  # of another avatar beside it
            color = MODES[0]
        if color not in self.colors:
            self.colors[color] = _to_bytes(point_colors(self.avatar, color))
        offset = self.offset.astype(np.float32)
        if drawn_as == DOTS:
            dots = self.dots.pose(params, rotate_covariances=False).positions[0].numpy()
            return {"points": (dots + offset) * UNITS, "colors": self.colors[color][:: self.step]}
        positions, covariances = self.bound.covariances(params)
        return {
            "centers": (positions[0].numpy() + offset) * UNITS,
            "covariances": covariances[0].numpy() * UNITS**2,
            "rgbs": self.colors[color],
            "opacities": self.opacities,
        }


class Page:
    """The scene and the panel of one server; `run` keeps them up to date until the process ends."""

    def __init__(
        self, server: ViserServer, avatars: Mapping[str, GaussianAvatar], motions: Mapping[str, HeadParameters]
    ) -> None:
        """One or two avatars of one head model, from left to right, by name; `motions` by name."""
        head = next(iter(avatars.values())).head
        assert head is not None
        self.head: HeadModel = head
        self.server, self.changed = server, threading.Event()
        distance, target, height = view(head)
        places = np.linspace(-1, 1, len(avatars)) * APART * height / 2 if len(avatars) > 1 else [0.0]
        self.shown = [
            Shown(name, avatar, np.array((x, 0.0, 0.0))) for (name, avatar), x in zip(avatars.items(), places)
        ]
        further = 1 if len(avatars) == 1 else TWO_FURTHER
        self.aspect = (HEAD_WIDTH + APART * (len(avatars) - 1)) / further  # width by height that shows all of them
        self._look(target, distance * further)
        self._build_panels(motions)
        self.handles: list[Any] = []
        self.drawn_as = self.drawn_color = ""  # what the handles are now
        self.judged = False  # whether it is known how fast the page draws
        self.draw()
        server.on_client_connect(self._look_from_start)
        server.on_client_connect(self._judge)

    def run(self) -> None:
        """Draw whenever something changed or a motion plays; returns never."""
        while True:
            begun = time.perf_counter()
            self.changed.clear()
            self.draw()
            rest = max(0.0, 1 / self.playback.rate.value - (time.perf_counter() - begun))
            self.changed.wait(rest if self.playback.play.value else None)

    def draw(self) -> None:
        """The avatars in the pose and colors that the panel says now."""
        params, drawn_as, color = self.parameters(), self.form.value, self.color.value
        posed = [shown.posed(params, color, drawn_as) for shown in self.shown]
        with self.server.atomic():
            if drawn_as != self.drawn_as:
                # Hidden splats would be drawn off the screen, at the full price of drawing.
                for handle in self.handles:
                    handle.remove()
                self.handles = [self._add(f"/avatar_{index}", drawn_as, each) for index, each in enumerate(posed)]
            elif drawn_as == DOTS:
                for handle, each in zip(self.handles, posed):
                    handle.points = each["points"]
                    if color != self.drawn_color:  # colors sent again are a new material, which takes the page time
                        handle.colors = each["colors"]
            else:
                for handle, each in zip(self.handles, posed):
                    handle.set_gaussians(**each)
        self.drawn_as, self.drawn_color = drawn_as, color
        self.server.flush()

    def _judge(self, client: viser.ClientHandle) -> None:
        """A page that draws fast goes from dots, which every page draws at once, to Gaussians; the first page decides.

        Without a graphics card a page takes a second for each image of 27,000 Gaussians, and a third of one for any.
        """
        if self.judged:
            return
        way, image = client.local_storage.get_item, partial(client.get_render, 16, 16, transport_format="png")
        try:
            answered = min(_seconds(partial(way, "", timeout=10.0)) for _ in range(3))
            drawn = min(_seconds(partial(image, timeout=10.0)) for _ in range(3))
            fast = drawn - answered < SLOW
        except (RuntimeError, TimeoutError):
            if client.client_id not in self.server.get_clients():
                return  # it went away: the next one is asked
            fast = False
        self.judged = True
        if fast:
            self.form.value = GAUSSIANS  # type: ignore[misc]  # it has a setter, apart from its getter
            self.changed.set()
        else:
            client.add_notification("shown as dots", TOLD, auto_close_seconds=8.0)

    def _add(self, name: str, drawn_as: str, posed: dict[str, Any]) -> Any:
        scene = self.server.scene
        if drawn_as == DOTS:
            return scene.add_point_cloud(
                name,
                **posed,
                point_size=DOT * UNITS / len(posed["points"]) ** 0.5,
                point_shape="circle",
                point_shading="flat",
                precision="float32",
            )
        return scene.add_gaussian_splats(name, **posed)

    def parameters(self) -> HeadParameters:
        """The one frame on the screen: that of the motion, with the sliders added."""
        values = [(slider, handle.value) for slider, handle in self.sliders]
        return to_parameters(values, self.head, self.playback.frame())

    def _look(self, target: np.ndarray, distance: float) -> None:
        scene, camera = self.server.scene, self.server.initial_camera
        scene.set_up_direction("+y")
        scene.world_axes.visible = False
        camera.fov = np.radians(FIELD_OF_VIEW)
        camera.position = (target + np.array((0, 0, distance))) * UNITS
        camera.look_at = target * UNITS
        camera.near, camera.far = 1.0, 10_000.0

    def _look_from_start(self, client: viser.ClientHandle) -> None:
        """The camera of one page as it began: further away where the page is narrow."""
        start, camera = self.server.initial_camera, client.camera
        further = max(1.0, self.aspect / camera.aspect)
        with client.atomic():
            camera.up_direction = (0.0, 1.0, 0.0)
            camera.position = start.look_at + further * (start.position - start.look_at)
            camera.look_at = start.look_at

    def _build_panels(self, motions: Mapping[str, HeadParameters]) -> None:
        """A small one that is always there; what controls the avatars, which narrow screens fold away, in one of its own."""
        gui = self.server.gui
        # Its button would open a tunnel through somebody else's server.
        gui.configure_theme(show_logo=False, show_share_button=False, control_width="medium")
        gui.main_panel.float(x=15, y=-15, width=240)
        names = [escape(shown.name) for shown in self.shown]
        counts = [f"{name}: {len(shown.avatar):,} points" for name, shown in zip(names, self.shown)]
        title = f"<title>{', '.join(names)}: {TITLE}</title>"  # React puts it where a page has its title
        gui.add_markdown(title + "\n\n" + "  \n".join(counts))
        self.style = gui.add_html("")
        view_again = gui.add_button("reset view", hint="the camera as at the beginning")

        @view_again.on_click
        def _(event: viser.GuiEvent) -> None:
            if event.client is not None:
                self._look_from_start(event.client)

        controls = gui.add_panel()
        controls.dock_right()
        with controls.add_tab("controls"):
            self._build_controls(motions)

    def _build_controls(self, motions: Mapping[str, HeadParameters]) -> None:
        gui = self.server.gui
        known = {mode for shown in self.shown for mode in shown.modes}
        self.color = gui.add_dropdown("color", [mode for mode in MODES if mode in known])
        hint = "dots where no graphics card draws the page: moving Gaussians are slow there"
        self.form = gui.add_dropdown("drawn as", (GAUSSIANS, DOTS), initial_value=DOTS, hint=hint)
        self.background = gui.add_rgb("background", (255, 255, 255))
        self.playback = Playback(gui, motions, self.changed)
        self.sliders: list[tuple[Slider, viser.GuiSliderHandle[float]]] = []
        for group, specifications in sliders(self.head).items():
            with gui.add_folder(group):
                for each in specifications:
                    handle = gui.add_slider(each.label, each.low, each.high, each.step, 0.0)
                    self.sliders.append((each, handle))
        reset = gui.add_button("sliders to zero")
        for _, handle in self.sliders:
            handle.on_update(lambda _: self.changed.set())
        self.color.on_update(lambda _: self.changed.set())
        self.form.on_update(lambda _: self.changed.set())
        self.background.on_update(lambda _: self._paint())
        reset.on_click(lambda _: self._reset())
        with gui.add_folder("save"):
            self._build_exports()

    def _build_exports(self) -> None:
        gui = self.server.gui
        names = [shown.name for shown in self.shown]
        which = gui.add_dropdown("avatar", names, visible=len(names) > 1)

        def chosen() -> Shown:
            return self.shown[names.index(which.value)]

        def offer(label: str, hint: str, suffix: str, make: Callable[[Shown], bytes]) -> None:
            button = gui.add_button(label, hint=hint)

            @button.on_click
            def _(event: viser.GuiEvent) -> None:
                shown = chosen()
                if event.client is not None:
                    _send(event.client, f"{shown.name}{suffix}", lambda: make(shown))

        pose = "the Gaussians as they are posed now, for "
        offer(
            "PLY",
            pose + "any splat viewer",
            ".ply",
            lambda shown: splat_bytes(shown.avatar, self.parameters(), ".ply"),
        )
        offer(
            ".splat",
            pose + "viewers of .splat",
            ".splat",
            lambda shown: splat_bytes(shown.avatar, self.parameters(), ".splat"),
        )
        offer(
            "GaussianAvatars folder (zip)",
            "the avatar, to be moved elsewhere",
            ".zip",
            lambda shown: folder_bytes(shown.avatar, shown.name),
        )
        image = gui.add_button("screenshot", hint="PNG of the view, transparent behind the head")

        @image.on_click
        def _(event: viser.GuiEvent) -> None:
            if event.client is not None:
                client = event.client
                _send(client, "screenshot.png", lambda: _screenshot(client))

    def _paint(self) -> None:
        """The page behind the scene, of which a screenshot stays transparent; viser has a canvas over that of three.js."""
        self.style.content = f"<style>canvas[data-engine] {{ background: rgb{self.background.value} }}</style>"

    def _reset(self) -> None:
        for _, handle in self.sliders:
            handle.value = 0.0  # type: ignore[misc]  # it has a setter, apart from its getter
        self.changed.set()


def view(head: HeadModel) -> tuple[float, np.ndarray, float]:
    """Distance of the camera in meters, the point it looks at (3,), and the height that it sees there."""
    camera = portrait_cameras(head, size=1)
    height = ROOM / float(camera.Ks[0, 0, 0])  # of an image of 1 pixel, a meter away
    target = camera.positions[0].numpy() - np.array((0.0, 0.0, 1.0))
    return height / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2)), target, height


def check_address(host: str, port: int) -> None:
    """ValueError where a server cannot listen; port 0 stands for any that is free."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; {OTHER_PORT}") from None


def open_server(host: str, port: int) -> ViserServer:
    """A server at exactly this address; ValueError where that is not to be had."""
    check_address(host, port)
    with contextlib.redirect_stdout(io.StringIO()):  # the address is told once, when there is something to see
        server = ViserServer(host=host, port=port, label=TITLE, verbose=False)
    # viser takes the next port where one is in use; whoever opens the usual address would look at another program.
    if port not in (0, server.get_port()):
        server.stop()
        raise ValueError(f"cannot listen on {host} port {port}: it was taken just now; {OTHER_PORT}")
    return server


def _send(client: viser.ClientHandle, name: str, make: Callable[[], bytes]) -> None:
    """The file to the browser, or what is wrong with it as a notice there."""
    try:
        client.send_file_download(name, make(), save_immediately=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # viser: RuntimeError where a browser went away
        client.add_notification(f"{name} was not saved", " ".join(str(error).split()), color="red")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """0..1 to the nearest of 0..255, where viser would take the next lower."""
    return (values * 255 + 0.5).astype(np.uint8)


def _screenshot(client: viser.ClientHandle) -> bytes:
    camera = client.camera
    return png_bytes(client.get_render(camera.image_height, camera.image_width, transport_format="png", timeout=30.0))
