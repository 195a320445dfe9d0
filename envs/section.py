"""The base of every settings section: frozen pydantic models that refuse unknown keys."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from envs.errors import UserError

Int = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]


class Section(BaseModel):
    """A frozen group of settings; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def replaced(self, **changes: Any) -> Self:
        """These settings with some changed.

        Raises:
            UserError: a value outside its range.
        """
        try:
            return type(self).model_validate(self.model_dump() | changes)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            meaning = type(self).model_fields[name].description
            raise UserError(f"{problem_text(name, problem)} ({meaning})") from None


def problem_text(name: str, problem: Mapping[str, Any]) -> str:
    """What is wrong with the value of `name`, by one of a ValidationError's `errors()`."""
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r} is not allowed: {message[0].lower()}{message[1:]}"
