"""The page of the app: what is on it, and what happens when a visitor uses it.

Files of a visitor lie in one folder that is removed when the page is left, uploads only until they are read. Nothing is loaded
from another host.
"""

import base64
import io
import re
import secrets
import shutil
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import gradio as gr
from PIL import Image

from eval.app.making import Step, Stopped, make
from eval.app.photograph import CLICKS, OPTIONAL, Photograph
from gaussian_tokenizer.captures.landmark_files import detect_landmarks, read_landmarks
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.landmarks import N_JAW, N_LANDMARKS
from gaussian_tokenizer.utils.hub import one_line
from modeling.pipeline import CANDIDATES, SAMPLING, AvatarPipeline

TITLE = "Avatar from a portrait"
ABOUT = (
    "A portrait becomes a head of 3D Gaussians that turns and talks. Use a photograph of yourself, or of a person who "
    "agreed. It stays on the machine that runs this page and is removed when you leave."
)
GIVEN = "To correct a landmark, click where it belongs: the nearest one moves there."
MAX_VISITS, MAX_WAITING = 32, 16
REFINE_STEPS = 30
MAX_SEED = 2**31 - 1
# Gradio's own footer links to other hosts; fonts are those of the visitor's system.
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto }
#photograph img { cursor: crosshair }
.hint { display: flex; gap: 12px; align-items: center; min-height: 92px }
.hint svg { width: 84px; flex: none } .hint p { margin: 0 }
#steps img { width: 100%; border-radius: 8px } #steps progress { width: 100%; height: 8px }
"""
SANS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]


@dataclass(eq=False)
class Visit:
    """One open page, with a folder for what it shows."""

    folder: Path
    photograph: Photograph | None = None
    stop: Event = field(default_factory=Event)  # set to end the avatar that is being made
    fitting: Lock = field(default_factory=Lock)
    uploads: list[Path] = field(default_factory=list)
    shown: int = 0  # files so far

    def show(self, name: str, image: Image.Image) -> str:
        """The path of a new file with this image. The one before stays, for the browser may still be reading it."""
        for old in sorted(self.folder.glob(f"{name}-*.jpg"))[:-1]:
            old.unlink()
        self.shown += 1
        path = self.folder / f"{name}-{self.shown:06d}.jpg"
        image.save(path, quality=92)
        return str(path)

    def results(self) -> Path:
        """A new folder for the files of an avatar; those of the one before are removed."""
        for old in self.folder.glob("avatar-*"):
            shutil.rmtree(old)
        self.shown += 1
        folder = (
            self.folder / f"avatar-{self.shown:06d}"
        )  # never the same name: the browser would show the old animation
        folder.mkdir()
        return folder

    def forget_uploads(self) -> None:
        for path in self.uploads:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()
        self.uploads.clear()


class App:
    """One pipeline for all visitors; `cache` is Gradio's folder for uploads."""

    def __init__(self, pipeline: AvatarPipeline, cache: Path, mediapipe: Path | None = None, **limits: Any) -> None:
        """`mediapipe`: face_landmarker.task, to find landmarks; `limits` of generation, such as max_points.

        ValueError for a head model without landmarks.
        """
        if len(pipeline.head.landmark_faces) not in (N_LANDMARKS, N_LANDMARKS - N_JAW):
            raise ValueError(
                f"the pipeline's head model {pipeline.head.name!r} has no landmarks, so it cannot be fitted to photographs; FLAME "
                "gets them by convert-flame --landmark_embedding"
            )
        self.pipeline, self.cache, self.mediapipe, self.limits = pipeline, cache, mediapipe, limits
        self.visits: OrderedDict[str, Visit] = OrderedDict()

    def visit(self, request: gr.Request) -> Visit:
        """That of the page a request comes from."""
        key = str(request.session_hash)
        if key not in self.visits:
            folder = self.cache / secrets.token_hex(16)
            folder.mkdir()
            self.visits[key] = Visit(folder)
        self.visits.move_to_end(key)
        while len(self.visits) > MAX_VISITS:
            self.end(next(iter(self.visits)))
        return self.visits[key]

    def end(self, key: str) -> None:
        if (visit := self.visits.pop(key, None)) is not None:
            visit.stop.set()
            visit.forget_uploads()
            shutil.rmtree(visit.folder, ignore_errors=True)

    def leave(self, request: gr.Request) -> None:
        self.end(str(request.session_hash))

    def open(self, path: str | None, request: gr.Request) -> list:
        """A photograph was uploaded, or taken."""
        visit = self.visit(request)
        if path is None or not Path(path).is_file():  # the field was emptied
            return [gr.skip()] * 8
        visit.uploads.append(Path(path))
        with self.one_sentence():
            photograph = Photograph(path)
            visit.stop.set()
            visit.photograph = photograph
        if self.mediapipe is not None:
            try:
                found = detect_landmarks(photograph.image, self.mediapipe)
                photograph.use(found / photograph.scale, None, self.pipeline.head)
            except (ValueError, ImportError) as error:
                gr.Warning(f"Please click the landmarks: {self.sentence(error)}.")
        return self.fitted(visit)

    def click(self, event: gr.SelectData, request: gr.Request) -> list:
        visit = self.visit(request)
        if visit.photograph is not None:
            visit.photograph.click(*(each + 0.5 for each in event.index))
        return self.fitted(visit)

    def undo(self, request: gr.Request) -> list:
        visit = self.visit(request)
        if visit.photograph is not None:
            visit.photograph.undo()
        return self.fitted(visit)

    def again(self, request: gr.Request) -> list:
        """Back to the beginning: another photograph."""
        visit = self.visit(request)
        visit.stop.set()
        visit.photograph = None
        return self.fitted(visit)

    def use_file(self, path: str | None, request: gr.Request) -> list:
        """A file of landmarks was uploaded."""
        visit = self.visit(request)
        if path is None or visit.photograph is None:
            return [gr.skip()] * 8
        visit.uploads.append(Path(path))
        with self.one_sentence():
            visit.photograph.use(*read_landmarks(path), self.pipeline.head)
        return self.fitted(visit)

    def empty(self, request: gr.Request) -> None:
        """Empty a field whose file was read, or refused."""
        self.visit(request).forget_uploads()

    def fitted(self, visit: Visit) -> list:
        """Fit the head, and say what the page shows now: the outputs of `build`."""
        photograph = visit.photograph
        if photograph is None:
            shown, hidden = gr.update(visible=True, value=None), gr.update(visible=False, value=None)
            return [
                shown,
                hidden,
                gr.update(visible=False, value=""),
                *2 * [gr.update(visible=False)],
                None,
                "",
                locked(),
            ]
        text = ""
        try:
            with visit.fitting:
                photograph.fit(self.pipeline.head)
        except ValueError as error:
            text = f"The head cannot be fitted: {self.sentence(error)}."
        found = photograph.found
        if found is not None:
            warnings = "".join(f"\n\nNote: {each.rstrip('?')}." for each in found.warnings)
            text = f"The head's landmarks are {found.rms:.1f} pixels from yours (root mean square).{warnings}"
        mesh = None if found is None else visit.show("mesh", photograph.with_head(self.pipeline.head))
        return [
            gr.update(visible=False),
            gr.update(visible=True, value=visit.show("photograph", photograph.marked())),
            gr.update(visible=True, value=hint(photograph, self.pipeline.head)),
            gr.update(visible=True),
            gr.update(visible=True),
            mesh,
            text,
            locked(found is None),
        ]

    def make(
        self, seed: float, candidates: int, temperature: float, refine_steps: int, request: gr.Request
    ) -> Iterator[list]:
        """Yield what the page shows while an avatar is made: its steps, animation, files, and the two buttons."""
        visit = self.visit(request)
        with self.one_sentence():
            with visit.fitting:  # the head may still follow the last click
                if visit.photograph is None or visit.photograph.found is None:
                    raise ValueError("There is no head yet: choose a photograph, and click its landmarks")
                portrait = visit.photograph.portrait(self.pipeline.head)
            visit.stop = Event()
            settings = {"seed": int(seed or 0), "candidates": int(candidates), "refine_steps": int(refine_steps)}
            settings |= {"temperature": float(temperature)} | self.limits
            empty = [gr.update(visible=False, value=None)] * 2
            busy = [gr.update(visible=False), gr.update(visible=True)]
            yield [steps(Step("Reading the portrait")), *empty, *busy]
            try:
                for step in make(self.pipeline, portrait, visit.results(), visit.stop, **settings):
                    paths = [str(path) for path in step.files]
                    files = [gr.update(visible=True, value=value) for value in (paths[0], paths)] if paths else empty
                    yield [steps(step), *files, *busy]
            except Stopped:
                yield [steps(Step("Stopped", 1.0)), *empty, *busy]
            except Exception:
                yield [steps(Step("No avatar was made", 1.0)), *empty, *busy]
                raise

    def stop(self, request: gr.Request) -> None:
        self.visit(request).stop.set()

    def sentence(self, error: Exception) -> str:
        """Without this machine's folders, and without a final period."""
        return re.sub(rf"{re.escape(str(self.cache))}/(\S+/)?", "", one_line(error)).rstrip(".")

    @contextmanager
    def one_sentence(self) -> Iterator[None]:
        """Show the visitor what is wrong in one sentence; the terminal gets the traceback of what only a bug can cause."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(f"{self.sentence(error)}.", print_exception=False) from None
        except Exception:
            traceback.print_exc(file=sys.stderr)
            raise gr.Error(
                "Something went wrong; the terminal that runs the app says what.", print_exception=False
            ) from None

    def build(self) -> gr.Blocks:
        """The page. Each listener has a limit of one at a time, so a second visitor's avatar waits for the first one's."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.Markdown(f"# {TITLE}\n{ABOUT}")
            with gr.Row():
                with gr.Column(min_width=320):
                    gr.Markdown("### 1. Photograph")
                    with gr.Group() as choose:
                        kinds: Any = ["upload", "webcam", "clipboard"]
                        upload = as_it_is(gr.Image(sources=kinds, type="filepath", label="Your photograph", height=320))
                    marked = gr.Image(
                        visible=False, interactive=False, show_label=False, buttons=[], elem_id="photograph"
                    )
                    instructions = gr.HTML(visible=False)
                    with gr.Row(visible=False) as tools:
                        undo = gr.Button("Undo the last click", size="sm")
                        again = gr.Button("Another photograph", size="sm")
                    with gr.Accordion("Landmarks from a file", open=False, visible=False) as more:
                        gr.Markdown("68 or 51 points in iBUG's order, in pixels of the upright photograph.")
                        file = as_it_is(gr.File(file_types=[".json", ".npz"], label="JSON or NPZ", height=140))
                with gr.Column(min_width=320):
                    gr.Markdown("### 2. Head")
                    mesh = gr.Image(interactive=False, show_label=False, buttons=["fullscreen"])
                    told = gr.Markdown()
                with gr.Column(min_width=320):
                    gr.Markdown("### 3. Avatar")
                    start = gr.Button("Make the avatar", variant="primary", interactive=False)
                    stop = gr.Button("Stop", variant="stop", visible=False)
                    with gr.Accordion("Advanced", open=False):
                        settings = advanced()
                    progress = gr.HTML(elem_id="steps")
                    animation = gr.Image(visible=False, interactive=False, show_label=False, buttons=["fullscreen"])
                    files = gr.Files(visible=False, interactive=False, label="Downloads")
            outputs = [choose, marked, instructions, tools, more, mesh, told, start]
            quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            # `change` covers uploads, photographs taken and images pasted. The fields are empty afterwards.
            opened = upload.change(self.open, upload, outputs, trigger_mode="once", **quiet)
            read = file.upload(self.use_file, file, outputs, **quiet)
            making = start.click(self.make, settings, [progress, animation, files, start, stop], **quiet)
            idle = [gr.update(visible=True), gr.update(visible=False)]
            for ended in ("success", "failure"):  # `then` does not follow an error
                getattr(opened, ended)(self.empty, None, upload, **quiet)
                getattr(read, ended)(self.empty, None, file, **quiet)
                getattr(making, ended)(lambda: idle, None, [start, stop], **quiet)
            marked.select(self.click, None, outputs, **quiet)
            undo.click(self.undo, None, outputs, **quiet)
            again.click(self.again, None, outputs, **quiet)
            stop.click(self.stop, None, None, **quiet)
            page.unload(self.leave)
        return page.queue(max_size=MAX_WAITING)

    def launch(self, host: str, port: int, max_bytes: int) -> gr.Blocks:
        """Serve the page in the background; the address is its `local_url`."""
        page = self.build()
        look: dict[str, Any] = {"theme": gr.themes.Soft(font=SANS, font_mono=MONO), "css": CSS, "footer_links": []}
        page.launch(
            server_name=host, server_port=port, max_file_size=max_bytes, quiet=True, share=False, ssr_mode=False,
            run_history=False, prevent_thread_lock=True, **look,
        )  # fmt: skip
        return page


def as_it_is(field: Any) -> Any:
    """Let a field hand over its file: Gradio would open an image without our limits, and copy other files.

    Such a field is given values only: Gradio replaces one whose other properties change.
    """
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def advanced() -> list[Any]:
    """The settings, in the order of the arguments of `App.make`."""
    return [
        gr.Number(0, label="Seed", info="Another one makes another avatar.", precision=0, minimum=0, maximum=MAX_SEED),
        gr.Slider(
            1, 8, CANDIDATES, step=1, label="Candidates", info="Clouds made side by side; the likeliest is kept."
        ),
        gr.Slider(
            0.1, 1.5, SAMPLING["temperature"], step=0.05, label="Temperature", info="Lower: closer to the average."
        ),
        gr.Slider(
            0, 200, REFINE_STEPS, step=10, label="Refinement", info="Steps that bring it closer to the photograph."
        ),
    ]


def locked(lock: bool = True) -> Any:
    return gr.update(interactive=not lock)


def hint(photograph: Photograph, head: HeadModel) -> str:
    """What to click next, with a drawing of the 68 landmarks that shows where it is."""
    if not photograph.asked:
        return f"<div class='hint'><p>{GIVEN}</p></div>"
    asked, count = photograph.asked[0], len(CLICKS)
    (name,) = (name for name, index in CLICKS.items() if index == asked)
    points = head.landmarks(head.template).cpu()
    low, high = points.amin(0), points.amax(0)
    drawing = "<svg viewBox='-0.08 -0.08 1.16 1.16' aria-hidden='true'>"
    for index, (x, y, _) in enumerate(((points - low) / (high - low).amax()).tolist(), N_LANDMARKS - len(points)):
        radius, color = (0.05, "#dc2626") if index == asked else (0.014, "#888")
        drawing += f"<circle cx='{x:.3f}' cy='{1 - y:.3f}' r='{radius}' fill='{color}'/>"
    drawing += "</svg>"
    optional = " Optional: it improves the proportions." if len(photograph.asked) <= OPTIONAL else ""
    number = count - len(photograph.asked) + 1
    sentence = f"Click the <b>{name}</b> ({number} of {count}).{optional}"
    return f"<div class='hint'>{drawing}<p>{sentence}</p></div>"


def steps(step: Step) -> str:
    """What is being done, as HTML that holds its picture."""
    bar = "<progress></progress>" if step.share is None else f"<progress value='{step.share:.3f}'></progress>"
    bar = "" if step.share == 1 else bar
    picture = ""
    if step.picture is not None:
        content = io.BytesIO()
        step.picture.save(content, "PNG")
        picture = f"<img alt='the points' src='data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}'>"
    return f"<p>{step.text}</p>{bar}{picture}"
