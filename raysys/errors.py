"""The two ways in which a verb ends badly and on purpose."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the words or the input: one line that names it and the mend; the command exits with status 2."""


class WorkFailed(RuntimeError):
    """The words were good, the work cannot end well: one line that says what happened and what may help; the command exits with status 1."""
