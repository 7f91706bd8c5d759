"""The motion of the viewer: which one, whether it plays, at how many frames a second, and the timeline.

The timeline holds the frame on the screen. While a motion plays, the clock moves it (frames are left out where the machine
is too slow, so that the rate holds); while it rests, the person does. Without a motion there is nothing to play.
"""

import threading
import time
from collections.abc import Mapping

from viser import GuiApi, GuiEvent

from eval.viewer.controls import STILL
from gaussian_tokenizer.heads.head_parameters import HeadParameters

RATE, MAX_RATE = 25, 60  # frames a second


class Playback:
    """The controls of one panel and the frame they ask for; `changed` is set when that is another one."""

    def __init__(self, gui: GuiApi, motions: Mapping[str, HeadParameters], changed: threading.Event) -> None:
        self.motions: dict[str, HeadParameters | None] = {STILL: None, **motions}
        self.changed = changed
        self.motion = gui.add_dropdown("motion", tuple(self.motions))
        self.play = gui.add_checkbox("play", False, disabled=True)
        self.timeline = gui.add_slider("frame", 0, 1, 1, 0, disabled=True, hint="while the motion does not play")
        self.rate = gui.add_slider("frames/s", 1, MAX_RATE, 1, RATE, disabled=True)
        self.motion.on_update(lambda _: self._choose())
        self.play.on_update(lambda _: self._go_on())
        self.rate.on_update(lambda _: self._go_on())

        @self.timeline.on_update
        def _(event: GuiEvent) -> None:
            if event.client is not None:  # moved by a person, not by the clock
                changed.set()

        self._go_on()

    def frame(self) -> HeadParameters | None:
        """The frame to show now; None for the head at rest."""
        motion = self.motions[self.motion.value]
        if motion is None:
            return None
        if self.play.value:
            self.timeline.value = int((time.perf_counter() - self.started) * self.rate.value) % motion.num_frames  # type: ignore[misc]
        return motion.frame(self.timeline.value % motion.num_frames)

    def _choose(self) -> None:
        """The motion that was chosen, from its first frame."""
        motion = self.motions[self.motion.value]
        self.play.value = False  # type: ignore[misc]
        self.timeline.value = 0  # type: ignore[misc]
        self.play.disabled = self.rate.disabled = motion is None
        if motion is not None:
            self.timeline.max = max(motion.num_frames - 1, 1)  # a slider needs two ends
            self.play.value = True  # type: ignore[misc]
        self._go_on()

    def _go_on(self) -> None:
        """From the frame on the timeline, which a person may move while nothing else does."""
        self.started = time.perf_counter() - self.timeline.value / self.rate.value
        self.timeline.disabled = self.play.value or self.motions[self.motion.value] is None
        self.changed.set()
