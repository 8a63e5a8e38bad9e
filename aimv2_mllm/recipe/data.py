"""What a recipe may say about the samples of a stage: where they come from, and how they are made.

Whether a named file is there is not looked up here: a recipe means the same on every machine.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from aimv2_mllm.recipe.types import Count, Number, Section, Seed, Switch, Text

Task = Literal["describe", "backwards", "table", "several", "question"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Skipped = Annotated[
    Number, Field(ge=0, le=1, description="share of unusable rows that ends a run, in [0, 1]")
]
Workers = Annotated[
    int,
    Field(ge=0, le=256, description="processes that prepare samples, per rank; 0: none but itself"),
]


class _Source(Section):
    weight: Number = Field(
        default=1.0, gt=0, description="share of the samples, relative to the other sources"
    )


class HandwritingSource(_Source):
    """The embedded world of handwritten digits; it has no end."""

    kind: Literal["handwriting"] = Field(default="handwriting", description="the kind of source")


class ShardsSource(_Source):
    """Tar shards as WebDataset lays them out: KEY.jpg, .png or .webp with KEY.txt or KEY.json."""

    kind: Literal["shards"] = Field(default="shards", description="the kind of source")
    urls: Annotated[list[Text], BeforeValidator(_listed)] = Field(
        min_length=1, description="shards: paths or URLs, with {0000..0331} or *, one or a list"
    )
    caption: Text = Field(
        default="caption", description="field of KEY.json with the caption, where no KEY.txt is"
    )
    cache: Text | None = Field(
        default=None, description="folder for copies of remote shards; null: the user's cache"
    )
    cache_gib: Number = Field(default=50.0, gt=0, description="most that the copies take up, GiB")


class DatasetsSource(_Source):
    """A data set of the library `datasets`."""

    kind: Literal["datasets"] = Field(default="datasets", description="the kind of source")
    dataset: Text = Field(description="a folder that save_to_disk wrote, or a hub id")
    config: Text | None = Field(default=None, description="its configuration, where it has several")
    split: Text = Field(default="train", description="its split")
    image: Text = Field(default="image", description="column with the picture")
    caption: Text = Field(default="caption", description="column with the caption")


class FolderSource(_Source):
    """A folder of pictures with captions in NAME.txt beside them, or all in metadata.jsonl."""

    kind: Literal["folder"] = Field(default="folder", description="the kind of source")
    folder: Text = Field(description="the folder; those in it are searched too")
    caption: Text = Field(default="caption", description="field of metadata.jsonl with the caption")


class JsonlSource(_Source):
    """A file with one JSON mapping a line, which names a picture and has its caption."""

    kind: Literal["jsonl"] = Field(default="jsonl", description="the kind of source")
    file: Text = Field(description="the file")
    root: Text | None = Field(
        default=None, description="folder below which all pictures lie; null: the file's own"
    )
    image: Text = Field(default="image", description="field with the picture's path")
    caption: Text = Field(default="caption", description="field with the caption")


CaptionSource = HandwritingSource | ShardsSource | DatasetsSource | FolderSource | JsonlSource
SOURCE_SECTIONS: dict[str, type[CaptionSource]] = {
    "handwriting": HandwritingSource,
    "shards": ShardsSource,
    "datasets": DatasetsSource,
    "folder": FolderSource,
    "jsonl": JsonlSource,
}


class CaptionData(Section):
    """Pictures with one caption each, drawn from one or several sources."""

    seed: Seed = Field(default=0, description="seed of the samples and of their order")
    sources: list[Annotated[CaptionSource, Field(discriminator="kind")]] = Field(
        default=[HandwritingSource()], min_length=1, description="where samples come from"
    )
    augment: Switch = Field(
        default=True,
        description="files: random crops of 0.4 to 1 of the area, for native encoders none; "
        "false: the middle square, for native encoders all of it",
    )
    flip: Number = Field(
        default=0.5, ge=0, le=1, description="files: share mirrored while augmenting, in [0, 1]"
    )
    clean: Literal["none", "lower"] = Field(
        default="none", description="captions as they are, or in lower case"
    )
    max_skipped: Skipped = 0.05
    workers: Workers = 0


class HandwritingTalks(_Source):
    """Questions and answers about the embedded world of handwritten digits; it has no end."""

    kind: Literal["handwriting"] = Field(default="handwriting", description="the kind of source")
    tasks: dict[Task, Annotated[Number, Field(gt=0)]] = Field(
        default={"describe": 1.0, "question": 1.0},
        min_length=1,
        description="weight of each task, relative",
    )
    turns: int = Field(default=1, ge=1, le=8, description="questions per picture, 1 to 8")


class LlavaTalks(_Source):
    """LLaVA's JSON or JSON lines: {id, image, conversations: [{from: human | gpt, value}]}.

    `image` is a path, a list of paths, or missing; `<image>` in what the human says is where each
    stands, and without such marks all stand before the first question.
    """

    kind: Literal["llava"] = Field(default="llava", description="the kind of source")
    file: Text = Field(description="the file, a JSON list or a JSON mapping a line")
    root: Text | None = Field(
        default=None, description="folder below which all pictures lie; null: the file's own"
    )


class _TableOfTalks(_Source):
    dataset: Text = Field(description="a folder that save_to_disk wrote, or a hub id")
    config: Text | None = Field(default=None, description="its configuration, where it has several")
    split: Text = Field(default="train", description="its split")
    images: Text | None = Field(
        default="images", description="column with the picture or pictures; null: there are none"
    )


class MessagesTalks(_TableOfTalks):
    """A data set of the library `datasets` with messages as OpenAI's and TRL's: role, content."""

    kind: Literal["messages"] = Field(default="messages", description="the kind of source")
    messages: Text = Field(default="messages", description="column with the messages")


class TextsTalks(_TableOfTalks):
    """A data set of the library `datasets` with turns of {user, assistant}, as the_cauldron's and
    FineVision's."""

    kind: Literal["texts"] = Field(default="texts", description="the kind of source")
    texts: Text = Field(default="texts", description="column with the turns")


class CaptionTalks(_Source):
    """Pictures with captions: each is what is said when asked one of `prompts`."""

    kind: Literal["captions"] = Field(default="captions", description="the kind of source")
    pairs: Annotated[
        ShardsSource | DatasetsSource | FolderSource | JsonlSource, Field(discriminator="kind")
    ] = Field(description="the pictures and captions")
    prompts: Annotated[list[Text], BeforeValidator(_listed)] = Field(
        default=["Describe the image."], min_length=1, description="what is asked, one or a list"
    )


class QuestionTalks(_Source):
    """A folder of pictures with a table (CSV) of columns image, question and answer."""

    kind: Literal["questions"] = Field(default="questions", description="the kind of source")
    folder: Text = Field(description="the folder; pictures are named from there")
    file: Text = Field(default="questions.csv", description="the table, a file in the folder")


Talks = HandwritingTalks | LlavaTalks | MessagesTalks | TextsTalks | CaptionTalks | QuestionTalks
TALK_SECTIONS: dict[str, type[Talks]] = {
    "handwriting": HandwritingTalks,
    "llava": LlavaTalks,
    "messages": MessagesTalks,
    "texts": TextsTalks,
    "captions": CaptionTalks,
    "questions": QuestionTalks,
}


class FeaturesChoice(Section):
    """Where the features of a frozen tower are kept, for later epochs, stages and runs."""

    folder: Text = Field(description="folder for them, which all processes share")
    max_gib: Number = Field(
        default=20.0, gt=0, description="most that the folder takes up, GiB, of all towers"
    )


class ConversationData(Section):
    """Conversations about pictures, or about none, drawn from one or several sources."""

    seed: Seed = Field(default=0, description="seed of the samples and of their order")
    sources: list[Annotated[Talks, Field(discriminator="kind")]] = Field(
        default=[HandwritingTalks()], min_length=1, description="where samples come from"
    )
    template: Literal["chat", "v1", "plain"] = Field(
        default="chat",
        description="how a conversation is written: the tokenizer's chat template, or LLaVA's own",
    )
    max_tokens: Count = Field(
        default=2048, description="longest conversation, tokens, those of its pictures included"
    )
    too_long: Literal["cut", "skip"] = Field(
        default="cut", description="a longer one loses its last turns, or is left out"
    )
    image_aspect: Literal["pad", "crop", "native"] = Field(
        default="pad",
        description="a picture is made square by a rim (pad) or by its middle alone (crop), or, for"
        " a native tower, keeps its shape (native)",
    )
    max_skipped: Skipped = 0.05
    workers: Workers = 0
    features: FeaturesChoice | None = Field(
        default=None,
        description="align and tune: compute the features of all pictures once and keep them, "
        "where the tower is frozen",
    )

    @field_validator("features")
    @classmethod
    def _there_is_an_end(
        cls, value: FeaturesChoice | None, info: ValidationInfo
    ) -> FeaturesChoice | None:
        sources = info.data.get("sources", ())
        if value and any(isinstance(source, HandwritingTalks) for source in sources):
            raise ValueError("must be null with a source of handwriting: its pictures have no end")
        if value and info.data.get("image_aspect") == "native":
            raise ValueError("must be null with image_aspect native: squares alone are kept")
        return value
