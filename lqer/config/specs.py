"""How a configuration's components are read and written: number formats, roundings, transforms and methods."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from lqer.components import Component, component_class
from lqer.formats import NumberFormat
from lqer.methods import Method
from lqer.rounding import Rounding
from lqer.transforms import Transform


def _reader(family: type[Component]) -> PlainValidator:
    """Reads a component, given by its kind or by a table of its kind and settings."""

    def read(value: Any) -> Component:
        if isinstance(value, Component):
            return value
        if not isinstance(value, str | dict):
            raise ValueError(f"must be the kind of a {family.family} or a table with its kind")
        settings = {"kind": value} if isinstance(value, str) else dict(value)
        cls = component_class(family, settings.pop("kind", None))
        # As in the whole configuration: strict about types, while lists become tuples.
        return TypeAdapter(cls).validate_json(json.dumps(settings), strict=True)

    return PlainValidator(read)


_WRITER = PlainSerializer(lambda part: {key: value for key, value in part.to_dict().items() if value is not None})
FormatSpec = Annotated[NumberFormat, _reader(NumberFormat), _WRITER]
RoundingSpec = Annotated[Rounding, _reader(Rounding), _WRITER]
MethodSpec = Annotated[Method, _reader(Method), _WRITER]
TransformSpec = Annotated[Transform, _reader(Transform), _WRITER]
