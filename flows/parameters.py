"""Settings as a flow's parameters: one parameter per field, so that Prefect's form shows titles, help and bounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from tasks.settings import checked

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


def spread(function: Callable[[Model], Result], model: type[Model]) -> Callable[..., Result]:
    """Make a function of the fields of a settings model out of a function of the model.

    Prefect reads the signature for its form and its checks before a run; the model's own checks are made as it begins.
    """

    def spreading(**values: Any) -> Result:
        return function(checked(model, values))

    spreading.__name__ = function.__name__
    spreading.__qualname__ = function.__qualname__
    spreading.__module__ = function.__module__
    spreading.__doc__ = function.__doc__
    spreading.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(name, field) for name, field in model.model_fields.items()],
    )
    return spreading


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    # Prefect gives title and description of its own; what is in json_schema_extra comes after them.
    shown = {key: text for key, text in (("title", field.title), ("description", field.description)) if text}
    annotated: Any = Annotated
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=annotated[(field.annotation, *field.metadata, Field(json_schema_extra=dict(shown)))],
        default=inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True),
    )
