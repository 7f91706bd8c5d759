"""The motion under its controls, by a clock that the test holds."""

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("viser", reason="the viewer needs viser: pip install 'avatar-pointillist[viewer]'")

from eval.viewer import playback as playback_module
from eval.viewer.page import open_server
from eval.viewer.playback import Playback
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.heads.procedural_head import build_procedural_head


@pytest.fixture(scope="module")
def motions():
    head = build_procedural_head(600)
    return {"nod": synthetic_motion("nod", head, 96), "talk": synthetic_motion("talk", head, 8)}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(playback_module, "time", clock)
    return clock


@pytest.fixture
def playback(motions, clock):
    server = open_server("127.0.0.1", 0)
    yield Playback(server.gui, motions, threading.Event())
    server.stop()


def is_frame(playback: Playback, motion, index: int) -> bool:
    shown, expected = playback.frame().tensors(), motion.frame(index).tensors()
    return all(torch.equal(shown[name], expected[name]) for name in expected)


def can_be_moved(playback: Playback) -> tuple[bool, bool, bool]:
    return tuple(not handle.disabled for handle in (playback.play, playback.timeline, playback.rate))


def test_without_a_motion_there_is_nothing_to_play(playback):
    assert playback.frame() is None and not playback.play.value and can_be_moved(playback) == (False, False, False)
    playback.motion.value = "nod"
    assert playback.play.value and can_be_moved(playback) == (True, False, True)
    playback.motion.value = "none"
    assert playback.frame() is None and not playback.play.value and can_be_moved(playback) == (False, False, False)


def test_the_rate_holds_however_few_frames_are_drawn(playback, clock, motions):
    playback.rate.value = 10
    playback.motion.value = "nod"
    assert is_frame(playback, motions["nod"], 0)
    clock.now += 3.05  # the machine was busy
    assert is_frame(playback, motions["nod"], 30) and playback.timeline.value == 30
    clock.now += 9.6  # once around
    assert is_frame(playback, motions["nod"], 30)


def test_the_timeline_chooses_the_frame_where_the_motion_rests(playback, clock, motions):
    playback.motion.value = "nod"
    assert playback.timeline.max == 95
    playback.play.value = False
    playback.timeline.value = 40
    assert can_be_moved(playback) == (True, True, True) and is_frame(playback, motions["nod"], 40)
    clock.now += 5
    assert is_frame(playback, motions["nod"], 40), "it rests"
    playback.play.value = True
    clock.now += 0.2 + 1e-6
    assert is_frame(playback, motions["nod"], 45), "it goes on from there, at 25 frames a second"


def test_another_rate_goes_on_from_the_frame_on_the_screen(playback, clock, motions):
    playback.motion.value = "nod"
    clock.now += 1 + 1e-6
    assert is_frame(playback, motions["nod"], 25)
    playback.rate.value = 50
    assert is_frame(playback, motions["nod"], 25)
    clock.now += 0.5 + 1e-6
    assert is_frame(playback, motions["nod"], 50)


def test_another_motion_begins_at_its_first_frame(playback, clock, motions):
    playback.motion.value = "nod"
    clock.now += 2
    playback.frame()
    playback.motion.value = "talk"
    assert playback.timeline.max == 7 and is_frame(playback, motions["talk"], 0)


def test_the_clock_does_not_wake_the_loop_that_draws(playback, clock):
    playback.motion.value = "nod"
    playback.changed.clear()
    clock.now += 1
    playback.frame()
    assert playback.timeline.value == 25 and not playback.changed.is_set()
