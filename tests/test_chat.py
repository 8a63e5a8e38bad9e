"""Folders that talk, and what they say: strictly loaded, greedy, stoppable, within their limit."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from aimv2_mllm.__main__ import main
from aimv2_mllm.chat import chat, prompts, session
from aimv2_mllm.chat.chat import answer, load_model, stream
from aimv2_mllm.chat.chatbot import Chatbot, prompt_of
from aimv2_mllm.data.pictures.images import square
from aimv2_mllm.data.talks.conversations import turn
from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import stages_of, talking_folder
from aimv2_mllm.model import mllm
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower

LIMIT = 96  # tokens, with the 4 of the picture
PICTURE = Image.new("RGB", (28, 14), (200, 30, 40))
ASK = turn("what is it", "", image=True)[:1]
WEIGHTS = "model.safetensors"


def record(kind: str, source: str = "handwriting") -> str:
    return json.dumps(
        {"stage": kind, "kind": kind, "recipe": {"data": {"sources": [{"kind": source}]}}}
    )


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny aligned model with random weights, and the record of its stage."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = train_tokenizer([" what is it and where is the red one"] * 3, 300)
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LIMIT,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.5,
        )
    )
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=28))
    tower = Tower("aimv2", encoder, Preprocessing(28))
    model = mllm.assemble(tower, llm, tokenizer)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    mllm.build_processor(model, tokenizer, Preprocessing(28)).save_pretrained(folder)
    (folder / "stage.json").write_text(record("align"))
    return folder


@pytest.fixture(scope="session")
def bot(llava: Path) -> Chatbot:
    return load_model(llava)


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    """The folder again, to be spoiled."""
    return Path(shutil.copytree(llava, tmp_path / "model"))


@pytest.fixture
def sheet(tmp_path: Path) -> str:
    PICTURE.save(tmp_path / "sheet.png")
    return str(tmp_path / "sheet.png")


def run_folder(folder: Path, llava: Path, **stages: str) -> Path:
    """A run with these stages, name=kind; those whose name ends in `_open` are not finished."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        json.dumps({"stages": {name: {"kind": kind} for name, kind in stages.items()}})
    )
    for name, kind in stages.items():
        if not name.endswith("_open"):
            shutil.copytree(llava, folder / name / "model")
            (folder / name / "model" / "stage.json").write_text(record(kind))
    return folder


def test_an_answer_is_what_the_model_generates(bot: Chatbot) -> None:
    prompt = "<s><|user|><image> what is it<|end|><|assistant|>"
    inputs = bot.processor(
        images=square(PICTURE), text=prompt, add_special_tokens=False, return_tensors="pt"
    ).to(bot.model.device)
    with torch.no_grad():
        tokens = bot.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    expected = bot.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert expected
    assert answer(bot, ASK, [PICTURE], max_new_tokens=12) == expected


def test_the_picture_matters(bot: Chatbot) -> None:
    other = Image.effect_noise((28, 28), 90).convert("RGB")
    assert answer(bot, ASK, [PICTURE]) != answer(bot, ASK, [other])


def test_a_stream_joined_is_the_answer(bot: Chatbot) -> None:
    pieces = list(stream(bot, ASK, [PICTURE], max_new_tokens=40))
    assert len(pieces) > 1
    assert "".join(pieces) == answer(bot, ASK, [PICTURE], max_new_tokens=40)


def test_blanks_are_stripped_at_the_ends_alone() -> None:
    pieces = (piece for piece in ("  ", "\n a", " ", "b ", "", " \n"))
    assert "".join(session._stripped(pieces)) == "a b"


def test_closing_a_stream_stops_the_model(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    forward = bot.model.get_decoder().forward
    monkeypatch.setattr(
        bot.model.get_decoder(), "forward", lambda **k: runs.append(1) or forward(**k)
    )
    monkeypatch.setattr(bot.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(Chatbot, "limit", 100_000)
    pieces = stream(bot, ASK, [PICTURE], max_new_tokens=50_000)
    assert not runs
    next(pieces)
    pieces.close()
    assert 0 < len(runs) < 20
    assert list(pieces) == []


def test_a_set_stop_ends_an_answer_after_one_token(bot: Chatbot) -> None:
    stop = threading.Event()
    stop.set()
    one = answer(bot, ASK, [PICTURE], max_new_tokens=1)
    assert answer(bot, ASK, [PICTURE], max_new_tokens=40, stop=stop) == one
    assert "".join(stream(bot, ASK, [PICTURE], max_new_tokens=40, stop=stop)) == one


def test_an_error_while_the_model_talks_comes_out(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bot.model.get_decoder(), "forward", fail)
    pieces = stream(bot, ASK, [PICTURE])
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pieces)


def test_earlier_turns_are_part_of_the_prompt(bot: Chatbot) -> None:
    talk = [*turn("what is it", "red", image=True), *turn("where is it", "")[:1]]
    assert prompt(bot, talk, 9)[0] == (
        "<s><|user|><image><image><image><image> what is it<|end|>"
        "<|assistant|> red<|end|><|user|> where is it<|end|><|assistant|>"
    )


def prompt(bot: Chatbot, messages: list[prompts.Message], room: int) -> tuple[str, int, int]:
    """What the model is asked, as text; its number of tokens; the room for the answer."""
    asked = prompt_of(bot, messages, [PICTURE], room, {})
    return bot.processor.tokenizer.decode(asked.ids), len(asked.ids), asked.room


def long_talk(turns: int) -> list[prompts.Message]:
    talk = turn("what is it", "red", image=True)
    for number in range(turns):
        talk += turn(f"where is it {number}", "where the red one is")
    return talk[:-1]


def test_the_oldest_turns_after_the_first_are_left_out(
    bot: Chatbot, capsys: pytest.CaptureFixture[str]
) -> None:
    text, length, room = prompt(bot, long_talk(6), 20)
    assert " what is it<|end|>" in text
    assert " is it 5<|end|><|assistant|>" in text
    assert " is it 0" not in text
    assert text.count("<image>") == 4
    assert (room, length + room <= LIMIT) == (20, True)
    error = capsys.readouterr().err
    assert error.startswith("aimv2-mllm: the conversation is longer than the model's 96 tokens")
    assert error.count("\n") == 1
    kept = text.count("<|user|>")
    assert f"{7 - kept} of its 7 turns" in error


def test_a_conversation_that_fits_is_left_alone(
    bot: Chatbot, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(bot, long_talk(2), [PICTURE], max_new_tokens=4)
    assert capsys.readouterr().err == ""


def test_a_long_last_question_takes_the_picture_along(bot: Chatbot) -> None:
    talk = [*turn("what " * 40, "red", image=True), *turn("where " * 40, "")[:1]]
    text, _, room = prompt(bot, talk, 20)
    assert text.startswith("<s><|user|><image><image><image><image> where where")
    assert room > 0


def test_an_answer_ends_at_the_model_s_limit(bot: Chatbot) -> None:
    _, length, room = prompt(bot, ASK, 10**6)
    assert length + room == LIMIT


def test_a_question_that_is_too_long_alone_is_refused_with_both_numbers(bot: Chatbot) -> None:
    with pytest.raises(UsageError, match=r"the question has 20\d tokens .* can hold 96 "):
        answer(bot, turn("what " * 200, "", image=True)[:1], [PICTURE])


@pytest.mark.parametrize("mark", ["<image>", "<|end|>", "<|assistant|>"])
def test_the_model_s_own_marks_are_refused_as_text(bot: Chatbot, mark: str) -> None:
    with pytest.raises(UsageError, match="is a special token of this model"):
        answer(bot, turn(f"what is {mark} it", "", image=True)[:1], [PICTURE])


def test_messages_and_pictures_must_agree(bot: Chatbot) -> None:
    with pytest.raises(UsageError, match="speak of 1 pictures, and 0 are given"):
        answer(bot, ASK, [])
    with pytest.raises(UsageError, match="last message must be a question"):
        answer(bot, turn("what is it", "red", image=True), [PICTURE])
    with pytest.raises(UsageError, match="not valid UTF-8"):
        answer(bot, turn("what is \udcff", "", image=True)[:1], [PICTURE])


def test_sampling_settings_of_a_folder_do_not_count(copy: Path, bot: Chatbot) -> None:
    settings = json.loads((copy / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 9.0, "top_k": 5, "repetition_penalty": 3.0}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    assert answer(load_model(copy), ASK, [PICTURE]) == answer(bot, ASK, [PICTURE])


def test_a_stock_folder_without_a_record_loads(copy: Path, bot: Chatbot) -> None:
    (copy / "stage.json").unlink()
    assert stages_of(copy) == {}
    assert answer(load_model(copy), ASK, [PICTURE]) == answer(bot, ASK, [PICTURE])


def test_loading_says_nothing(llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(llava)
    assert capfd.readouterr() == ("", "")


def test_the_last_finished_stage_of_a_run_talks(llava: Path, tmp_path: Path) -> None:
    stages = {"eyes": "pretrain", "zip": "align", "again": "tune", "more_open": "tune"}
    run = run_folder(tmp_path / "run", llava, **stages)
    assert talking_folder(run) == run / "again" / "model"


def test_a_run_that_cannot_talk_yet_or_at_all_is_refused(llava: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "begun", llava, eyes="pretrain", zip_open="align")
    with pytest.raises(
        UsageError, match=r"run `aimv2-mllm run .*begun/recipe.yaml output=.*begun` to the end"
    ):
        load_model(run)
    run = run_folder(tmp_path / "words", llava, llm="language")
    with pytest.raises(UsageError, match=r"no align or tune stage, only llm \(language\)"):
        load_model(run)


@pytest.mark.parametrize(("kind", "why"), [("pretrain", "cannot talk"), ("language", "no eyes")])
def test_the_model_of_another_stage_is_refused(copy: Path, kind: str, why: str) -> None:
    (copy / "stage.json").write_text(record(kind))
    with pytest.raises(UsageError, match=rf"{why}; give a run folder, or the model folder of"):
        load_model(copy)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"neither recipe\.yaml, stage\.json nor config"):
        load_model(tmp_path)
    (tmp_path / "stage" / "model").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"give .*stage/model$"):
        load_model(tmp_path / "stage")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        load_model(tmp_path / "file")


@pytest.mark.parametrize("name", ["stage.json", "config.json", "recipe.yaml"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stages": [1], "stage": 1}', "\0"])
def test_an_unreadable_record_is_refused_with_its_path(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        load_model(copy)


def spoil_cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def spoil_empty(weights: Path) -> None:
    weights.write_bytes(b"")


def spoil_missing(weights: Path) -> None:
    state = load_file(weights)
    del state[next(name for name in state if name.endswith("rms_norm.weight"))]
    save_file(state, weights, metadata={"format": "pt"})


def spoil_left_over(weights: Path) -> None:
    save_file(load_file(weights) | {"x.y": torch.zeros(1)}, weights, metadata={"format": "pt"})


def spoil_shape(weights: Path) -> None:
    state = load_file(weights)
    name = next(name for name in state if "linear_1.weight" in name)
    save_file(state | {name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_cut, "damaged or cut off"),
        (spoil_empty, "damaged or cut off"),
        (Path.unlink, "cannot be loaded: .*no file named model.safetensors"),
        (spoil_missing, r"do not fit its config.json: \S*rms_norm.weight is missing$"),
        (spoil_left_over, r"do not fit its config.json: x.y is left over$"),
        (spoil_shape, r"do not fit its config.json: \S*linear_1.weight has another shape$"),
    ],
)
def test_nothing_goes_on_half_loaded(
    copy: Path, spoil: Any, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(copy / WEIGHTS)
    with pytest.raises(UsageError, match=why) as error:
        load_model(copy)
    assert str(error.value).startswith(f"{copy}: ")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_another_architecture_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="its model_type is 'llama', must be 'llava'"):
        load_model(copy)


def test_a_folder_without_a_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template"):
        load_model(copy)


@pytest.fixture
def at_hand(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line finds the model loaded already, which saves a second each time."""
    monkeypatch.setattr(chat, "load_model", lambda folder: bot)


def test_a_prompt_prints_the_answer_and_nothing_else(
    llava: Path, bot: Chatbot, sheet: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(llava), "--image", sheet, "--prompt", "what is it"]) == 0
    assert capfd.readouterr() == (answer(bot, ASK, [PICTURE]) + "\n", "")
