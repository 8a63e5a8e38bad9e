"""The models that are shown: their names, their visitors' memory, and what is said of mistakes."""

import shutil
from pathlib import Path

import pytest

from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.errors import UsageError
from aimv2_mllm.visitors import showroom, visit
from aimv2_mllm.visitors.showroom import Showroom, sheet


@pytest.fixture(scope="module")
def room(tiny_run: Path) -> Showroom:
    return Showroom([tiny_run])


@pytest.fixture
def asked(tmp_path: Path) -> list[visit.Shown]:
    sheet(1)[0].save(tmp_path / "sheet.png")
    return visit.with_question([], "How many digits?", [str(tmp_path / "sheet.png")])


def test_a_run_shows_every_stage_that_talks_the_last_one_first(room: Showroom) -> None:
    assert room.names == ["quickstart/tune", "quickstart/align"]


def test_models_of_one_name_are_told_apart(tiny_run: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        shutil.copytree(tiny_run / "tune" / "model", tmp_path / place / "mine" / "model")
    folders = [tmp_path / place / "mine" / "model" for place in ("one", "two")]
    assert Showroom(folders).names == ["mine", str(folders[1])]
    assert Showroom([tiny_run, tiny_run / "align" / "model", tiny_run]).names == [
        "quickstart/tune",
        "quickstart/align",
    ]


def test_without_a_model_the_quickstart_is_shown_or_how_to_make_it(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="make quickstart"):
        Showroom([])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    assert len(Showroom([]).names) == 2


def test_a_model_that_is_not_there_is_said_before_any_is_loaded(
    room: Showroom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(showroom, "load_model", lambda _: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="there is no such folder"):
        Showroom([tmp_path / "gone"])
    with pytest.raises(UsageError, match=r"no model quickstart/tine, only .*did you mean"):
        room.ask("ada", "quickstart/tine", [])


def test_each_visitor_has_a_memory_which_goes_with_him(
    room: Showroom, asked: list[visit.Shown]
) -> None:
    name = room.names[0]
    first = room.ask("ada", name, asked, max_new_tokens=4)
    text = "".join(first)
    longer = [*asked, visit.answer(text), *visit.question("Which?", [])]
    second, other = room.ask("ada", name, longer), room.ask("ben", name, longer)
    for reply in (second, other):
        "".join(reply)
    assert second.counts.cached_tokens > 0
    assert other.counts.cached_tokens == 0
    room.leave("ada")
    again = room.ask("ada", name, longer)
    "".join(again)
    assert again.counts.cached_tokens == 0


def test_the_memory_of_who_was_silent_longest_is_given_back_first(
    room: Showroom, asked: list[visit.Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(showroom, "MOST_SESSIONS", 2)
    for visitor in ("ada", "ben", "ada", "cleo"):
        "".join(room.ask(visitor, room.names[0], asked, max_new_tokens=1))
    assert [visitor for visitor, _ in room._sessions] == ["ada", "cleo"]


def test_sheets_are_for_models_of_handwriting(
    room: Showroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room.knows_sheets(room.names[0])
    bot = room.bot(room.names[0])
    for data in (None, {"sources": [{"kind": "handwriting"}, {"kind": "llava"}]}):
        monkeypatch.setattr(room, "bot", lambda _, data=data: Chatbot(*(bot.model, None), data))
        assert not room.knows_sheets(room.names[0])


def test_a_sheet_is_told_by_its_seed() -> None:
    assert sheet(3)[0].tobytes() == sheet(3)[0].tobytes() != sheet(4)[0].tobytes()
    assert sheet(3)[1].endswith("?")


def test_only_a_run_with_its_pre_training_paints(room: Showroom, tiny_run: Path) -> None:
    assert room.longest_prefix(room.names[0]) == 15
    alone = Showroom([tiny_run / "tune" / "model"])
    assert alone.longest_prefix("tune") == 15, "its run lies around it"


def test_a_model_away_from_its_run_does_not_paint(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    model = tmp_path / "a" / "b" / "model"
    shutil.copytree(tiny_run / "tune" / "model", model)
    alone = Showroom([model])
    assert alone.longest_prefix(alone.names[0]) == 0
    with pytest.raises(UsageError, match="no decoder that could paint"):
        alone.painter(alone.names[0])
