"""What a recipe may say about the samples of a stage: where they come from, and how they are made.

Whether a named file is there is not looked up here: a recipe means the same on every machine.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from aimv2_mllm.recipe_types import Number, Section, Seed, Switch, Text

Task = Literal["describe", "backwards", "table", "several", "question"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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


Source = HandwritingSource | ShardsSource | DatasetsSource | FolderSource | JsonlSource
SOURCE_SECTIONS: dict[str, type[Source]] = {
    "handwriting": HandwritingSource,
    "shards": ShardsSource,
    "datasets": DatasetsSource,
    "folder": FolderSource,
    "jsonl": JsonlSource,
}


class CaptionData(Section):
    """Pictures with one caption each, drawn from one or several sources."""

    seed: Seed = Field(default=0, description="seed of the samples and of their order")
    sources: list[Annotated[Source, Field(discriminator="kind")]] = Field(
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
    max_skipped: Number = Field(
        default=0.05, ge=0, le=1, description="share of unusable rows that ends a run, in [0, 1]"
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="processes that prepare samples, per rank; 0: none but itself",
    )


class ConversationData(Section):
    """Conversations, each about one picture."""

    source: Literal["handwriting"] = Field(
        default="handwriting", description="where samples come from"
    )
    seed: Seed = Field(default=0, description="seed of the samples")
    tasks: dict[Task, Annotated[Number, Field(gt=0)]] = Field(
        default={"describe": 1.0, "question": 1.0},
        min_length=1,
        description="weight of each task, relative",
    )
    turns: int = Field(default=1, ge=1, le=8, description="questions per picture, 1 to 8")
