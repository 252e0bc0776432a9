"""The root of every error that people read, and the error of a file that a person must mend."""

from __future__ import annotations


class PhasewiseError(Exception):
    """Root of every error that a person or a client is meant to read."""


class InvalidConfig(PhasewiseError):
    """A file or flag that a person must mend (exit code 2).

    `where` is a key path or a file, `at` the place in the text ("local.yaml line 7", "--set"),
    `nearest` the valid key that an unknown one is closest to.
    """

    def __init__(
        self, where: str, reason: str, remedy: str, *, at: str = "", nearest: str = ""
    ) -> None:
        place = f" ({at})" if at else ""
        super().__init__(f"{where}: {reason}{place}; {remedy}")
        self.where = where
        self.reason = reason
        self.remedy = remedy
        self.at = at
        self.nearest = nearest
