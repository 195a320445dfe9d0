"""The base of every settings section: frozen pydantic models that refuse unknown keys."""

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
            message = problem["msg"][0].lower() + problem["msg"][1:]
            meaning = type(self).model_fields[name].description
            raise UserError(f"{name} = {problem['input']!r} is not allowed: {message} ({meaning})") from None
