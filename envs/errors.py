"""Errors that a user can cause.

A `UserError` says in one line what is wrong, the value seen, what is allowed and what to do next. The command line
prints it without a traceback (exit status 2). Its single string argument pickles unchanged across processes.
"""


class UserError(Exception):
    """Bad input from outside: configuration, files, checkpoints, knobs, budgets."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The one-line explanation."""
        return str(self.args[0])


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
