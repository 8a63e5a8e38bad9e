"""What lmms-eval asks, and how a model of ours answers it; lmms-eval itself is not needed here."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_chat import bot as bot_of_chat
from test_chat import llava as llava_of_chat

from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.scoring import likelihood
from aimv2_mllm.data.talks.conversations import said, turn
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.answerers import Ours
from aimv2_mllm.lmms.reading import MOST_NEW_TOKENS, settings_of, talk_of_messages, talk_of_text
from aimv2_mllm.model.sampling import GREEDY, Sampling

llava, bot = llava_of_chat, bot_of_chat  # fixtures: the folder of a tiny Llava of ours, and it
RED, BLUE = (Image.new("RGB", (28, 14), colour) for colour in ("red", "blue"))
NOISE = Image.effect_noise((40, 30), 90).convert("RGB")
WORDS = ["what is it", "where is the red one", "is it the one", "what is the red"]


@pytest.mark.parametrize(
    ("generation", "most", "sampling"),
    [
        ({}, MOST_NEW_TOKENS, GREEDY),
        ({"until": None, "max_new_tokens": 16, "do_sample": False}, 16, GREEDY),
        (
            {"until": "\n\n", "temperature": 0, "top_p": 0},
            MOST_NEW_TOKENS,
            Sampling(stop=("\n\n",)),
        ),
        ({"until": ["ASSISTANT:", ""], "num_beams": 1}, 1024, Sampling(stop=("ASSISTANT:",))),
        ({"do_sample": False, "temperature": 0.7}, 1024, GREEDY),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, 1024, Sampling(0.7, 0.9, 5)),
        ({"do_sample": True}, 1024, Sampling(1.0)),
        ({"repetition_penalty": 1.2}, 1024, Sampling(repetition_penalty=1.2)),
    ],
)
def test_the_settings_of_a_task_become_ours(
    generation: dict[str, Any], most: int, sampling: Sampling
) -> None:
    assert settings_of(generation) == (most, sampling)


def test_beams_are_refused() -> None:
    with pytest.raises(UsageError, match="num_beams 3, and models here have one"):
        settings_of({"num_beams": 3})


def test_messages_keep_their_order_and_each_picture_its_place() -> None:
    grey = Image.new("L", (4, 4), 7)
    talk, pictures = talk_of_messages(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Is"},
                    {"type": "image", "url": RED},
                    {"type": "text", "text": "like"},
                    {"type": "image", "url": grey},
                ],
            },
        ]
    )
    assert [part["type"] for part in talk[1]["content"]] == ["text", "image", "text", "image"]
    assert talk[0] == said("system", "Be brief.")
    assert all("url" not in part for message in talk for part in message["content"])
    assert pictures[0].tobytes() == RED.tobytes()
    assert pictures[1].mode == "RGB"
    assert pictures[1].getpixel((0, 0)) == (7, 7, 7)


def test_videos_and_what_is_no_picture_are_refused() -> None:
    with pytest.raises(UsageError, match="the task shows video, and these models see pictures"):
        talk_of_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    with pytest.raises(UsageError, match="the task shows a bytes"):
        talk_of_text("what is it", [b"RIFF"])


def kinds(talk: Any) -> list[str]:
    return [part.get("text", "image") for part in talk[0][0]["content"]]


def test_a_text_s_pictures_stand_at_its_marks_or_before_it() -> None:
    assert kinds(talk_of_text("What is it?", [RED])) == ["image", "What is it?"]
    assert kinds(talk_of_text("What is it?", [RED, BLUE])) == ["image", "image", "What is it?"]
    assert kinds(talk_of_text("Is <image> <image>?", [RED, BLUE])) == [
        "Is ",
        "image",
        " ",
        "image",
        "?",
    ]
    assert kinds(talk_of_text("What is it?", [])) == ["What is it?"]
    # Too few marks: none of them is one, and the model's own refusal follows.
    assert kinds(talk_of_text("Is <image>?", [RED, BLUE])) == ["image", "image", "Is <image>?"]


class Base:
    """What lmms-eval's own class does for ours."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.rank = 0


@pytest.fixture(scope="module")
def model_module() -> Iterator[ModuleType]:
    """The module of our classes, with stand-ins for the two things that it imports of lmms-eval."""
    instance = SimpleNamespace(Instance=object, GenerationResult=SimpleNamespace)
    instance.GenerationResult = lambda text: SimpleNamespace(text=text)
    parts = {"lmms_eval": ModuleType("lmms_eval"), "lmms_eval.api": ModuleType("lmms_eval.api")}
    parts |= {"lmms_eval.api.instance": instance, "lmms_eval.api.model": SimpleNamespace(lmms=Base)}
    name = "aimv2_mllm.lmms.model"
    with pytest.MonkeyPatch.context() as patch:
        for key, part in parts.items():
            patch.setitem(sys.modules, key, part)
        patch.delitem(sys.modules, name, raising=False)
        yield import_module(name)
        sys.modules.pop(name, None)


DOCS = [
    {"image": image, "question": WORDS[number % 4]}
    for number, image in enumerate([RED, BLUE, NOISE, None, RED])
]


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    shown = [] if doc["image"] is None else [{"type": "image", "url": doc["image"]}]
    text = {"type": "text", "text": doc["question"]}
    return [{"role": "user", "content": [*shown, text]}]


def visuals_of(doc: dict[str, Any]) -> list[Any]:
    return [] if doc["image"] is None else [doc["image"]]


def request(*args: Any, number: int) -> Any:
    """An Instance as lmms-eval's tasks make them: the document's place comes last."""
    return SimpleNamespace(args=(*args, number, "t", "test"), task_name="t", doc_id=number)


def by_messages(docs: list[dict[str, Any]], **generation: Any) -> list[Any]:
    return [request("", messages_of, dict(generation), number=n) for n in range(len(docs))]


def asked(module: ModuleType, folder: Path, docs: list[Any], simple: bool = False) -> Any:
    kind = module.TextModel if simple else module.MessagesModel
    model = kind(pretrained=str(folder), batch_size=2, device="cpu")
    model.task_dict = {"t": {"test": docs}}
    return model


def test_answers_are_those_of_evaluate(model_module: ModuleType, llava: Path) -> None:
    expected = Ours(llava)([(doc["question"], doc["image"]) for doc in DOCS], 6)
    assert len(set(expected)) > 3  # so pictures and words matter
    model = asked(model_module, llava, DOCS)
    assert model.generate_until(by_messages(DOCS, max_new_tokens=6)) == expected
    simple = asked(model_module, llava, DOCS, simple=True)
    requests = [
        request(doc["question"], {"max_new_tokens": 6}, visuals_of, number=n)
        for n, doc in enumerate(DOCS)
    ]
    assert simple.generate_until(requests) == expected
    assert (model.is_simple, simple.is_simple) == (False, True)


def test_each_request_keeps_its_own_settings(model_module: ModuleType, llava: Path) -> None:
    model, docs = asked(model_module, llava, DOCS[:3] * 2), DOCS[:3] * 2
    long = model.generate_until(by_messages(docs, max_new_tokens=8))
    requests = by_messages(docs, max_new_tokens=8)
    requests[1].args[2]["max_new_tokens"] = 2
    requests[4].args[2]["until"] = [long[4][1:3]]
    given = model.generate_until(requests)
    assert given[1] == Ours(llava)([(docs[1]["question"], docs[1]["image"])], 2)[0] != long[1]
    assert given[4] == long[4].partition(long[4][1:3])[0].strip()
    assert [given[n] for n in (0, 2, 3, 5)] == [long[n] for n in (0, 2, 3, 5)]


def test_drawn_answers_differ_and_come_again_by_torch_s_seed(
    model_module: ModuleType, llava: Path
) -> None:
    model, same = asked(model_module, llava, DOCS[:1] * 4), DOCS[:1] * 4
    requests = by_messages(same, max_new_tokens=8, temperature=1.0)
    torch.manual_seed(3)
    first = model.generate_until(requests)
    assert len(set(first)) > 1
    torch.manual_seed(3)
    assert model.generate_until(requests) == first


def test_a_question_that_cannot_be_asked_counts_as_not_answered(
    model_module: ModuleType, llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = [DOCS[0]] * 21
    docs[5] = {"image": RED, "question": "what is <image>"}
    given = asked(model_module, llava, docs).generate_until(
        by_messages(docs, max_new_tokens=3, image_aspect_ratio="pad")
    )
    assert given[5] == ""
    assert len(set(given)) == 2
    err = capsys.readouterr().err
    said = "t, question 5 counts as not answered: conversation 0: '<image>' is a special token"
    assert said in err
    assert "settings that change nothing here: image_aspect_ratio" in err
    docs[7] = docs[5]
    with pytest.raises(UsageError, match=r"question 7: .* \(2 questions cannot be asked\)"):
        asked(model_module, llava, docs).generate_until(by_messages(docs, max_new_tokens=3))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"batch_size": "auto"}, "batch_size is auto"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is int8, must be one of float32, bfloat16, float16"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    model_module: ModuleType, llava: Path, words: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        model_module.MessagesModel(pretrained=str(llava), **words)


def test_a_precision_is_that_of_the_weights(model_module: ModuleType, llava: Path) -> None:
    model = model_module.MessagesModel(pretrained=str(llava), device="cpu", dtype="bfloat16")
    assert model._answerer.model.dtype == torch.bfloat16
    model.task_dict = {"t": {"test": DOCS}}
    assert len(model.generate_until(by_messages(DOCS, max_new_tokens=2))) == len(DOCS)


def test_the_likelihood_of_an_answer_is_transformers_own(bot: Chatbot) -> None:
    for answer in ("it is the red one", "red"):
        told = likelihood(bot, turn(WORDS[0], "", image=True)[:1], [NOISE], answer)
        text = bot.processor.apply_chat_template(turn(WORDS[0], answer, image=True), tokenize=False)
        inputs = bot.processor(text=text, images=[NOISE], return_tensors="pt")
        pixels = likelihood_pixels(bot)
        labels = inputs.input_ids.clone()
        # The template writes a blank before each answer, and it is part of the first token.
        said_tokens = bot.processor.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        start = find(labels[0].tolist(), said_tokens)
        labels[:, :start] = labels[:, start + len(said_tokens) :] = -100
        with torch.no_grad():
            made = bot.model(**{**inputs, "pixel_values": pixels}, labels=labels)
        assert told.loss == pytest.approx(float(made.loss), abs=1e-4)
        best = made.logits[0, start - 1 : start - 1 + len(said_tokens)].argmax(-1).tolist()
        assert told.is_greedy == (best == said_tokens)


def likelihood_pixels(bot: Chatbot) -> torch.Tensor:
    """The picture as in the model's training, which its processor alone does not do."""
    from aimv2_mllm.chat.prompts import pixels_of

    pixels: torch.Tensor = pixels_of(bot.processor, [NOISE], bot.data)["pixel_values"]
    return pixels


def find(tokens: list[int], part: list[int]) -> int:
    [start] = [n for n in range(len(tokens)) if tokens[n : n + len(part)] == part][-1:]
    return start


def test_the_choices_of_a_question_get_their_likelihoods(
    model_module: ModuleType, llava: Path, bot: Chatbot
) -> None:
    model = asked(model_module, llava, DOCS, simple=True)
    requests = [
        request(WORDS[0], answer, visuals_of, number=0)
        for answer in (" the red one", " it", lambda doc: doc["question"])
    ]
    talk = turn(WORDS[0], "", image=True)[:1]
    for told, answer in zip(
        model.loglikelihood(requests), ("the red one", "it", WORDS[0]), strict=True
    ):
        assert told.text == likelihood(bot, talk, [RED], answer)


def test_models_of_others_and_rounds_are_refused(model_module: ModuleType, llava: Path) -> None:
    model = asked(model_module, llava, DOCS, simple=True)
    with pytest.raises(UsageError, match="t asks in rounds"):
        model.generate_until_multi_round(by_messages(DOCS))
    model._answerer = SimpleNamespace()
    with pytest.raises(UsageError, match="only models of ours tell"):
        model.loglikelihood([request(WORDS[0], "it", visuals_of, number=0)])


def test_an_empty_answer_has_no_likelihood(bot: Chatbot) -> None:
    with pytest.raises(UsageError, match="the answer is empty"):
        likelihood(bot, turn(WORDS[0], "")[:1], [], " ")


def test_an_answer_whose_tokens_are_the_likeliest_is_greedy(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, talk = bot.model.get_output_embeddings(), turn(WORDS[0], "")[:1]
    [red] = bot.processor.tokenizer(" red", add_special_tokens=False).input_ids
    bump = torch.zeros(head.out_features).index_fill(0, torch.tensor(red), 1000.0)
    monkeypatch.setattr(bot.model, "get_output_embeddings", lambda: lambda h: head(h) + bump)
    assert likelihood(bot, talk, [], "red").is_greedy
    assert not likelihood(bot, talk, [], "red one").is_greedy
