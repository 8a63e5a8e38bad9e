"""What a recipe may say about the connector, a section for each kind; defaults are the network's.

Whether it can serve the tower's grid is seen when the tower is known.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from aimv2_mllm.recipe.types import Count, Section


def _sides(value: Any) -> Any:
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


Sides = Annotated[list[Count], Field(min_length=2, max_length=2), BeforeValidator(_sides)]
DEPTH = "layers of its MLP"
TARGET = "tokens of every picture: a side, or [rows, columns]"


class _Connector(Section):
    def options(self) -> dict[str, Any]:
        """What `build_connector` is told besides the name."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class LinearChoice(_Connector):
    """One linear layer for each patch."""

    name: Literal["linear"] = Field(description="the connector")


class MlpChoice(_Connector):
    """An MLP for each patch; with two layers the result is a stock Llava."""

    name: Literal["mlp"] = Field(default="mlp", description="the connector")
    depth: Count = Field(default=2, description="layers")


class PixelShuffleChoice(_Connector):
    """Squares of neighbouring patches become one token each."""

    name: Literal["pixel_shuffle"] = Field(description="the connector")
    factor: Count = Field(default=2, description="side of a square, patches")
    depth: Count = Field(default=2, description=DEPTH)


class AveragePoolChoice(_Connector):
    """Means of neighbouring patches."""

    name: Literal["average_pool"] = Field(description="the connector")
    factor: Count | None = Field(default=None, description="side of a square, patches; or target")
    target: Sides | None = Field(default=None, description=f"{TARGET}; or factor")
    depth: Count = Field(default=2, description=DEPTH)

    @model_validator(mode="after")
    def _is_told_one_way(self) -> Self:
        if (self.factor is None) == (self.target is None):
            raise ValueError("must have either factor or target, for instance factor: 2")
        return self


class ResamplerChoice(_Connector):
    """Learned queries that read the patches."""

    name: Literal["resampler"] = Field(description="the connector")
    num_queries: Count = Field(default=64, description="tokens of every picture")
    num_heads: Count = Field(default=8, description="heads, a divisor of the LLM's width")


class CAbstractorChoice(_Connector):
    """Convolutions around pooling."""

    name: Literal["c_abstractor"] = Field(description="the connector")
    target: Sides = Field(default=[12, 12], description=TARGET)
    depth: Count = Field(default=3, description="blocks before pooling, and behind it")
    width: Count | None = Field(default=None, description="channels; null: the tower's")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


CONNECTOR_SECTIONS: dict[str, type[_Connector]] = {
    "linear": LinearChoice,
    "mlp": MlpChoice,
    "pixel_shuffle": PixelShuffleChoice,
    "average_pool": AveragePoolChoice,
    "resampler": ResamplerChoice,
    "c_abstractor": CAbstractorChoice,
}
# A name alone, or a mapping of name and options.
ConnectorChoice = Annotated[
    Annotated[
        LinearChoice
        | MlpChoice
        | PixelShuffleChoice
        | AveragePoolChoice
        | ResamplerChoice
        | CAbstractorChoice,
        Field(discriminator="name"),
    ],
    BeforeValidator(_named),
]
