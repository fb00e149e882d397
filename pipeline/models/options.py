"""classifier.options: the keys that one architecture adds to [classifier], checked by a model of its own."""

from typing import TypeVar

from pydantic import ValidationError

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.records import Record, first_problem
from diffsmooth.pipeline.spec import ClassifierIdentity


class Options(Record):
    """The base of the options of an architecture."""


OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(model: type[OptionsT], section: ClassifierIdentity) -> OptionsT:
    """Return the options of an architecture. Raises: UserError, naming the first unknown key or wrong value."""
    try:
        return model.model_validate(section.options)
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        raise UserError(
            f"classifier.options of arch = {section.arch!r}: {first_problem(error)}; the options are: {known}"
        ) from error
