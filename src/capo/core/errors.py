"""The one error that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """An argument or a configuration value that cannot be used.

    Args:
        field: name of the argument or of the configuration key, as the user wrote it.
        message: what is wrong and what is allowed, in one sentence.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        """Survive a trip between processes (the default would lose ``message``)."""
        return type(self), (self.field, self.message)
