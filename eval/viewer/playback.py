"""The motion of the viewer: the choice of motion, play and pause, the frame rate, and the timeline."""

import threading
import time
from collections.abc import Mapping

from viser import GuiApi, GuiEvent

from eval.viewer.controls import STILL
from gaussian_tokenizer.heads.head_parameters import HeadParameters

RATE, MAX_RATE = 25, 60  # frames per second


class Playback:
    """The controls of one panel and the frame they select; `changed` is set when the user selects another.

    A playing motion skips frames on a slow machine to keep the frame rate. Without a motion, all but the choice is disabled.
    """

    def __init__(self, gui: GuiApi, motions: Mapping[str, HeadParameters], changed: threading.Event) -> None:
        self.motions: dict[str, HeadParameters | None] = {STILL: None, **motions}
        self.changed = changed
        self.motion = gui.add_dropdown("motion", tuple(self.motions))
        self.play = gui.add_checkbox("play", False, disabled=True)
        self.timeline = gui.add_slider("frame", 0, 1, 1, 0, disabled=True, hint="available while the motion is paused")
        self.rate = gui.add_slider("frames/s", 1, MAX_RATE, 1, RATE, disabled=True)
        self.motion.on_update(lambda _: self._choose())
        self.play.on_update(lambda _: self._go_on())
        self.rate.on_update(lambda _: self._go_on())

        @self.timeline.on_update
        def _(event: GuiEvent) -> None:
            if event.client is not None:  # moved by the user, not by the clock
                changed.set()

        self._go_on()

    def frame(self) -> HeadParameters | None:
        """The current frame; None for the head at rest."""
        motion = self.motions[self.motion.value]
        if motion is None:
            return None
        if self.play.value:
            self.timeline.value = int((time.perf_counter() - self.started) * self.rate.value) % motion.num_frames  # type: ignore[misc]
        return motion.frame(self.timeline.value % motion.num_frames)

    def _choose(self) -> None:
        """Play the chosen motion from its first frame."""
        motion = self.motions[self.motion.value]
        self.play.value = False  # type: ignore[misc]
        self.timeline.value = 0  # type: ignore[misc]
        self.play.disabled = self.rate.disabled = motion is None
        if motion is not None:
            self.timeline.max = max(motion.num_frames - 1, 1)  # a slider needs two different ends
            self.play.value = True  # type: ignore[misc]
        self._go_on()

    def _go_on(self) -> None:
        """Continue from the frame on the timeline, which the user can move while the motion is paused."""
        self.started = time.perf_counter() - self.timeline.value / self.rate.value
        self.timeline.disabled = self.play.value or self.motions[self.motion.value] is None
        self.changed.set()
