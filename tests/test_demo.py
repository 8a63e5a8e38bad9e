"""The demo as visitors meet it: through a real browser, and through gradio_client.

AIMV2_DEMO_MODEL=RUN shows that run instead of a tiny one, and AIMV2_DEMO_PICTURES=FOLDER writes the
screenshots of the README there.
"""

import base64
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.decoding import Chooser
from aimv2_mllm.visitors.showroom import MOST_SESSIONS, Showroom, sheet

pytest.importorskip("gradio", reason="needs pip install 'aimv2-mllm[demo]'")
client = pytest.importorskip("gradio_client")
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
app = importlib.import_module("app")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PICTURES = os.environ.get("AIMV2_DEMO_PICTURES")
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
# What a screen reader calls those that can be used, by the browser's own account.
CONTROLS = {"button", "checkbox", "combobox", "link", "radio", "slider", "spinbutton", "tab",
            "textbox"}  # fmt: skip
WHOLE_PICTURES = """number => {
    const shown = [...document.querySelectorAll("[role=tabpanel] img")]
        .filter(one => one.checkVisibility());
    return shown.length == number && shown.every(one => one.complete && one.naturalWidth);
}"""
PATIENCE = 90_000  # milliseconds, on a machine that others use too
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class Served(NamedTuple):
    room: Showroom
    url: str
    called: list[Any]  # addresses outside this machine that were called


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    run = os.environ.get("AIMV2_DEMO_MODEL") or request.getfixturevalue("tiny_run")
    called: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            called.append(address)
        return connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", watched)
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    room = Showroom([run])
    with app.running(room) as page:
        yield Served(room, page.local_url, called)
    patch.undo()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out sheet as a file."""
    file = tmp_path_factory.mktemp("sheets") / "sheet.png"
    sheet(7)[0].save(file)
    return file


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "notes.png").write_text("I am no picture")
    return tmp_path / "notes.png"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Answers that do not end by themselves; when each of their tokens was made."""
    made: list[float] = []
    choose = Chooser.__call__

    def slowly(self: Chooser, before: Any, scores: Any) -> int:
        time.sleep(0.05)
        made.append(time.monotonic())
        scores = scores.clone()
        scores[:8] = float("-inf")  # the marks, one of which ends an answer
        return choose(self, before, scores)

    monkeypatch.setattr(Chooser, "__call__", slowly)
    return made


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that begin so late that a page without one is seen before."""
    begin = Chooser.__init__

    def late(self: Chooser, *given: Any) -> None:
        time.sleep(1)
        begin(self, *given)

    monkeypatch.setattr(Chooser, "__init__", late)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", *CAMERA]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Visit:
    """A page in a browser, and what went wrong in it."""

    def __init__(
        self, browser: Any, url: str, *, inside: str = "http://127.0.0.1:", **words: Any
    ) -> None:
        self._inside = (inside, "data:", "blob:")
        self.page = browser.new_page(**({"viewport": {"width": 1200, "height": 1000}} | words))
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console", lambda said: said.type == "error" and self.wrong.append(str(said.text))
        )
        self.page.on("request", self._request)
        self.page.goto(url)
        self.page.locator("#question textarea").wait_for()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(self._inside):
            self.wrong.append(f"asked for {request.url}")

    def ask(self, text: str, *files: Path) -> None:
        if files:
            self.page.locator("#question input[type=file]").set_input_files(list(map(str, files)))
            self.page.locator("#question .thumbnail-item").nth(len(files) - 1).wait_for()
        box = self.page.locator("#question textarea")
        box.fill(text)
        box.press("Enter")

    @property
    def answers(self) -> Any:
        return self.page.locator("#conversation .message.bot")

    def took(self, *, again: bool = False) -> str:
        """What the answer took, once it is whole; `again`: after an earlier one."""
        if again:
            self.page.wait_for_function(
                "!document.querySelector('#took textarea, #took input').value"
            )
        self.page.wait_for_function("document.querySelector('#took textarea, #took input').value")
        return str(self.page.locator("#took textarea, #took input").input_value())

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def photograph(self, name: str) -> None:
        if PICTURES:
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=Path(PICTURES) / name, full_page="phone" not in name)


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Visit]:
    made = Visit(browser, served.url)
    yield made
    made.page.close()
    assert not made.wrong
    assert not served.called


@needs_browser
def test_a_visitor_uploads_a_sheet_asks_and_sees_the_answer_come(
    visit: Visit, drawn: Path, slow: list[float]
) -> None:
    visit.ask("Describe the sheet.", drawn)
    visit.answers.last.wait_for()
    seen = set()
    while len(seen) < 3:
        seen.add(visit.answers.last.inner_text())
    assert visit.page.locator("#conversation .message.user img").count() == 1
    visit.button("Stop").click()
    time.sleep(1)
    count, text = len(slow), visit.answers.last.inner_text()
    time.sleep(1)
    assert len(slow) == count, "the model goes on after it was stopped"
    assert visit.answers.last.inner_text() == text


@needs_browser
@pytest.mark.usefixtures("paced")
def test_answers_are_retried_questions_edited_and_undone(visit: Visit, drawn: Path) -> None:
    visit.ask("Describe the sheet.", drawn)
    assert "(16 image," in visit.took()
    first = visit.answers.last.inner_text()
    visit.button("Retry").click()
    visit.took(again=True)
    assert visit.answers.last.inner_text() == first, "it is greedy"
    visit.button("Edit").click()
    visit.page.locator("#conversation textarea").fill("How many digits are there?")
    visit.page.locator("#conversation").get_by_role("button", name="Submit").click()
    visit.page.get_by_text("How many digits are there?").wait_for()
    assert "(16 image," in visit.took(again=True), "the picture stays with the question"
    visit.photograph("demo_chat.png")
    visit.button("Undo").click()
    visit.page.locator("#conversation .message").first.wait_for(state="detached")
    assert visit.page.locator("#question textarea").input_value() == "How many digits are there?"
    assert visit.page.locator("#question .thumbnail-item").count() == 1


@needs_browser
def test_a_conversation_is_downloaded_cleared_and_opened_again(
    visit: Visit, drawn: Path, tmp_path: Path
) -> None:
    page, kept = visit.page, tmp_path / "conversation.json"
    visit.ask("Describe the sheet.", drawn)
    visit.took()
    said = visit.answers.last.inner_text()
    visit.button("Save").click()
    with page.expect_download() as download:
        page.get_by_text("Download conversation.json").click()
    download.value.save_as(kept)
    page.get_by_role("button", name="Clear").click()
    page.locator("#conversation .message").first.wait_for(state="detached")
    page.wait_for_function("!document.querySelector('#took textarea, #took input').value")
    page.locator("input[type=file][accept*=json]").set_input_files(str(kept))
    visit.answers.last.wait_for()
    assert visit.answers.last.inner_text() == said
    assert page.locator("#conversation .message.user img").count() == 1
    visit.ask("And where?")
    assert "(16 image," in visit.took()


@needs_browser
def test_a_text_file_named_png_is_refused_in_words(visit: Visit, text_file: Path) -> None:
    visit.ask("What is it?", text_file)
    visit.page.get_by_text("notes.png: is not a picture").first.wait_for()
    assert visit.page.locator("#question textarea").input_value() == "What is it?"
    assert str(text_file.parent) not in visit.page.inner_text("body")


@needs_browser
def test_two_models_answer_side_by_side(visit: Visit, drawn: Path) -> None:
    visit.page.get_by_role("tab", name="Compare").click()
    visit.page.locator("#compare-picture input[type=file]").set_input_files(str(drawn))
    visit.page.locator("#compare-picture img").wait_for()
    visit.page.locator("#compare-question textarea").fill("Describe the sheet.")
    visit.button("Ask both").click()
    for side in ("Left", "Right"):
        visit.page.wait_for_function(f"document.querySelector('#{side} textarea').value")
    visit.page.wait_for_function("document.querySelector('#Right-took textarea').value")
    # The picture, and what each tower makes of it: all of them whole, none of them written anew
    # while the page reads it.
    visit.page.wait_for_function(WHOLE_PICTURES, arg=3)
    visit.photograph("demo_compare.png")


@needs_browser
def test_a_visitor_looks_inside_and_moves_the_prefix(visit: Visit, drawn: Path) -> None:
    visit.page.get_by_role("tab", name="Look inside").click()
    visit.page.locator("#inside-picture input[type=file]").set_input_files(str(drawn))
    visit.page.locator("#inside-picture img").wait_for()
    visit.page.locator("#inside-question textarea").fill("Describe the sheet.")
    visit.button("Look inside").click()
    chips = visit.page.locator("#tokens label")
    chips.first.wait_for()
    heat = visit.page.locator("#heat img")
    heat.wait_for()
    before = heat.get_attribute("src")
    chips.last.click()
    visit.page.wait_for_function(
        f"document.querySelector('#heat img').src != {json.dumps(before)} || {chips.count()} == 1"
    )
    if chips.count() > 1:
        before = heat.get_attribute("src")
        visit.page.keyboard.press("Shift+Tab")
        visit.page.keyboard.press("Space")
        visit.page.wait_for_function(
            f"document.querySelector('#heat img').src != {json.dumps(before)}"
        )
    paintings = []
    for prefix in (4, 9):
        slider = visit.page.locator("#prefix input[type=range]")
        slider.fill(str(prefix))
        slider.dispatch_event("pointerup")
        painted = visit.page.locator("#painted img")
        painted.wait_for()
        if paintings:
            visit.page.wait_for_function(
                f"document.querySelector('#painted img').src != {json.dumps(paintings[-1])}"
            )
        paintings.append(painted.get_attribute("src"))
    assert len(set(paintings)) == 2
    visit.photograph("demo_inside.png")


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_and_names_what_can_be_used(
    browser: Any, served: Served, theme: str
) -> None:
    phone = Visit(browser, f"{served.url}?__theme={theme}", viewport={"width": 390, "height": 844})
    tree = phone.page.context.new_cdp_session(phone.page)
    for name in ("Settings", "Camera"):
        phone.page.get_by_role("button", name=name).click()
    for tab in ("Chat", "Look inside", "Compare"):
        phone.page.get_by_role("tab", name=tab).click()
        phone.page.wait_for_timeout(300)
        phone.photograph(f"demo_phone_{theme}_{tab.split()[-1].lower()}.png")
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        nodes = tree.send("Accessibility.getFullAXTree")["nodes"]
        used = [n for n in nodes if not n["ignored"] and n["role"]["value"] in CONTROLS]
        assert len(used) > 10
        assert not [node for node in used if not node["name"]["value"].strip()], tab
    assert not phone.wrong
    phone.page.close()


def reach(page: Any, name: str, key: str = "Tab") -> None:
    """Press `key` until what is called so has the focus."""
    for _ in range(40):
        page.keyboard.press(key)
        if name in page.evaluate(
            "(e => e.ariaLabel || e.placeholder || e.innerText)(document.activeElement)"
        ):
            return
    raise AssertionError(f"{name} cannot be reached by {key}")


@needs_browser
def test_the_keyboard_is_enough(visit: Visit, slow: list[float]) -> None:
    page = visit.page

    def words_come() -> None:
        begun = len(slow)
        while len(slow) < begun + 20:  # what is stopped before its first word is no answer
            page.wait_for_timeout(100)

    for _ in range(2):
        reach(page, "Ask; pictures")
        page.keyboard.type("What is there?")
        page.keyboard.press("Enter")
        words_come()
        reach(page, "Stop")
        page.keyboard.press("Enter")
        time.sleep(1)
        count = len(slow)
        time.sleep(0.5)
        assert len(slow) == count
        visit.button("Retry").wait_for()
        reach(page, "Retry", "Shift+Tab")
        page.keyboard.press("Enter")
        words_come()
        reach(page, "Stop")
        page.keyboard.press("Enter")
        visit.button("Undo").wait_for()
        reach(page, "Undo", "Shift+Tab")
        page.keyboard.press("Enter")
        visit.answers.first.wait_for(state="detached")


@needs_browser
def test_pictures_come_by_paste_by_drop_and_from_the_camera(visit: Visit, drawn: Path) -> None:
    page, thumbnails = visit.page, visit.page.locator("#question .thumbnail-item")
    given = """(box, [raw, kinds]) => {
        const bytes = Uint8Array.from(atob(raw), letter => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], `${kinds[0]}.png`, {type: 'image/png'}));
        const words = {clipboardData: data, dataTransfer: data, bubbles: true, cancelable: true};
        for (const kind of kinds) box.dispatchEvent(
            kind == 'paste' ? new ClipboardEvent(kind, words) : new DragEvent(kind, words));
    }"""
    raw = base64.b64encode(drawn.read_bytes()).decode()
    for number, kinds in enumerate((["paste"], ["dragenter", "dragover", "drop"])):
        page.locator("#question textarea").evaluate(given, [raw, kinds])
        thumbnails.nth(number).wait_for()
    page.get_by_role("button", name="Camera").click()
    visit.button("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.videoWidth")
    visit.button("capture photo").click()
    thumbnails.nth(2).wait_for()
    visit.ask("Describe the sheets.")
    assert "(48 image," in visit.took()
    assert page.locator("#conversation .message.user img").count() == 3


@needs_browser
def test_what_no_decoder_could_paint_is_not_offered(
    browser: Any, served: Served, tmp_path: Path
) -> None:
    [tuned] = [folder for name, folder in served.room._folders.items() if name.endswith("tune")]
    shutil.copytree(tuned, tmp_path / "a" / "alone")
    with app.running(Showroom([tmp_path / "a" / "alone", tuned])) as page:
        visit = Visit(browser, page.local_url)
        visit.page.get_by_role("tab", name="Look inside").click()
        visit.page.locator("#no-decoder").get_by_text("was not given with the run").wait_for()
        assert not visit.page.locator("#prefix").is_visible()
        visit.page.get_by_label("Model").nth(1).click()
        visit.page.get_by_role("option").last.click()
        visit.page.locator("#prefix").wait_for()
        assert not visit.page.locator("#no-decoder").is_visible()
        assert not visit.wrong
        visit.page.close()


@needs_browser
def test_what_is_shared_works_under_another_address(
    browser: Any, served: Served, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tunnel(local_port: int, **_: Any) -> str:
        return f"http://localhost:{local_port}"  # what Gradio's servers do, without them

    monkeypatch.setattr("gradio.networking.setup_tunnel", tunnel)
    with app.running(served.room, share=True) as page:
        assert page.share_url.rpartition(":")[0] == "https://localhost"
        visit = Visit(browser, page.share_url.replace("https", "http"), inside="http://localhost:")
        visit.ask("Describe the sheet.", drawn)
        assert "(16 image," in visit.took()
        assert not visit.wrong
        visit.page.close()


def test_sharing_that_did_not_come_about_is_no_success(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tunnel(**_: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("gradio.networking.setup_tunnel", tunnel)
    with (
        pytest.raises(UsageError, match=r"^--share: Gradio's servers, .* were not reached"),
        app.running(served.room, share=True),
    ):
        pass


def test_an_installed_package_has_the_demo(tmp_path: Path) -> None:
    home = Path(__file__).parents[1]
    words = tomllib.loads((home / "pyproject.toml").read_text())
    wheel = words["tool"]["hatch"]["build"]["targets"]["wheel"]
    for part in wheel["only-include"]:
        shutil.copytree(home / part, tmp_path / wheel["sources"].get(part, part))
    command = [sys.executable, "-m", "aimv2_mllm", "demo", "nowhere"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("aimv2-mllm: nowhere: ")


def question(file: Path, text: str) -> dict[str, Any]:
    content = [{"type": "file", "file": client.handle_file(file)}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def visitor(served: Served) -> Any:
    return client.Client(served.url, verbose=False)


def asked(served: Served, history: list[Any], **words: Any) -> list[Any]:
    settings = {"model": served.room.names[0], "system": "", "seed": None} | words
    return [history, *[settings[name] for name in ("model", "system")], 0, 1, 96, settings["seed"]]


def test_a_client_gets_the_answer_in_pieces_and_can_stop_it(
    served: Served, drawn: Path, slow: list[float]
) -> None:
    job = visitor(served).submit(*asked(served, [question(drawn, "What?")]), api_name="/answer")
    pieces = iter(job)
    texts = [next(pieces)[0][-1]["content"][0]["text"] for _ in range(3)]
    assert texts[0] != texts[2]
    assert texts[2].startswith(texts[0])
    job.cancel()
    time.sleep(1)
    count = len(slow)
    time.sleep(1)
    assert len(slow) == count


def test_a_second_visitor_waits_and_breaks_nothing(served: Served, drawn: Path) -> None:
    other = drawn.with_name("other.png")
    sheet(8)[0].save(other)
    arguments = [asked(served, [question(file, "Describe the sheet.")]) for file in (drawn, other)]
    visitors = [visitor(served) for _ in range(4)]
    alone = [visitors[0].predict(*one, api_name="/answer")[0] for one in arguments]
    jobs = [one.submit(*arguments[i % 2], api_name="/answer") for i, one in enumerate(visitors)]
    for number, job in enumerate(jobs):
        assert job.result()[0][-1]["content"] == alone[number % 2][-1]["content"]
    assert len(served.room._sessions) <= MOST_SESSIONS


@pytest.mark.parametrize("api", ["/answer", "/compare", "/paint"])
def test_a_client_is_told_why_a_file_is_refused(served: Served, text_file: Path, api: str) -> None:
    file, names = client.handle_file(text_file), served.room.names
    arguments = {
        "/answer": asked(served, [question(text_file, "What?")]),
        "/compare": [file, "What?", names[0], names[-1]],
        "/paint": [names[0], file, 8, "true"],
    }[api]
    with pytest.raises(client.exceptions.AppError, match=r"^notes\.png: is not a picture"):
        visitor(served).predict(*arguments, api_name=api)


def test_a_client_compares_paints_and_keeps_conversations(
    served: Served, drawn: Path, tmp_path: Path
) -> None:
    me, file, names = visitor(served), client.handle_file(drawn), served.room.names
    left, took, _, right, *_ = me.predict(file, "What is on it?", *names, api_name="/compare")
    assert "; answer " in took
    assert isinstance(left, str)
    assert isinstance(right, str)
    shown, painted, caption = me.predict(names[0], file, 8, "true", api_name="/paint")
    assert Image.open(shown).size == Image.open(painted).size
    assert isinstance(caption, str)
    history = me.predict(*asked(served, [question(drawn, "What?")]), api_name="/answer")[0]
    history[0] = question(drawn, "What?")  # what the client got is a file of its own
    saved = me.predict(history, "", api_name="/save")
    saved = saved["value"] if isinstance(saved, dict) else saved
    kept = tmp_path / "conversation.json"
    shutil.copy(saved["path"] if isinstance(saved, dict) else saved, kept)
    opened, _ = me.predict(client.handle_file(kept), api_name="/open")
    assert [message["role"] for message in opened] == ["user", "user", "assistant"]
    assert opened[-1]["content"][0]["text"] == history[-1]["content"][0]["text"]


def test_a_comparison_sends_each_picture_once(served: Served, drawn: Path) -> None:
    words = (client.handle_file(drawn), "Describe the sheet.", *served.room.names)
    job = visitor(served).submit(*words, api_name="/compare")
    job.result()
    for place in (2, 5):
        sent = [one[place] for one in job.outputs() if isinstance(one[place], str)]
        assert len(sent) == 1, sent


def test_a_comparison_that_ends_early_keeps_nothing(
    served: Served, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, words = served.room.ask, (client.handle_file(drawn), "What?", *served.room.names)

    def refusing(*given: Any, **more: Any) -> None:
        ask(*given, **more)
        raise UsageError("ask in fewer words")

    monkeypatch.setattr(served.room, "ask", refusing)
    with pytest.raises(client.exceptions.AppError, match="ask in fewer words"):
        visitor(served).predict(*words, api_name="/compare")
    assert not [name for name, _ in served.room._sessions if name.endswith(" 0")]


def test_a_file_that_is_too_large_is_not_taken(served: Served, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 * 10**6))
    with pytest.raises(Exception, match=r"(?i)size|large"):
        visitor(served).predict(
            served.room.names[0], client.handle_file(large), 8, api_name="/paint"
        )


def test_who_does_not_log_in_gets_nothing(served: Served) -> None:
    with app.running(served.room, login=[("ada", "secret")]) as page:
        with pytest.raises(Exception, match=r"(?i)log ?in|auth|401"):
            client.Client(page.local_url, verbose=False).predict(api_name="/answer")
        assert client.Client(page.local_url, auth=("ada", "secret"), verbose=False)


def test_uploads_are_gone_when_the_demo_ends(served: Served, drawn: Path) -> None:
    with app.running(served.room) as page:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        client.Client(page.local_url, verbose=False).predict(
            served.room.names[0], client.handle_file(drawn), 8, "true", api_name="/paint"
        )
        assert any(folder.rglob("*.png"))
    assert not folder.exists()


def test_a_port_in_use_is_said_in_one_line(served: Served) -> None:
    port = int(served.url.rstrip("/").rpartition(":")[2])
    with (
        pytest.raises(UsageError, match=rf"127.0.0.1:{port}: no page .* give another --port"),
        app.running(served.room, port=port),
    ):
        pass
