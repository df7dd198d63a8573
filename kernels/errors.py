"""The errors a user can mend.

Every message is a sentence that names the file, the key or the tensor, and the remedy.
"""

from __future__ import annotations


class KeelbackError(Exception):
    """Something the user can mend; the command line prints it and exits with status 1."""


class InvalidFile(KeelbackError):
    """A file is damaged, truncated, hostile, or not of the kind it was taken for."""


class UnsupportedModel(KeelbackError):
    """A file or checkpoint is sound, and keelback cannot run what it holds."""


class InvalidInput(KeelbackError, ValueError):
    """An argument (token ids, a state, an option) is out of its range."""


class NumericalError(KeelbackError, ArithmeticError):
    """A forward pass produced logits that are not finite."""
