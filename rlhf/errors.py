"""The errors a user can meet, each with the exit status the command line gives it."""

from __future__ import annotations


class PairloopError(Exception):
    """Base of every error that pairloop raises on purpose."""

    exit_status = 1


class InputError(PairloopError, ValueError):
    """What the user gave can't be used: names the field or file, rule, value and remedy."""

    exit_status = 2


class DataGateError(PairloopError):
    """The data of this run can't be trusted (too many abstentions, cold start, no pairs)."""

    exit_status = 3


class ParityError(PairloopError):
    """A generator does not serve the weights that were published to it."""


class NonFiniteError(PairloopError):
    """A loss or gradient was NaN or infinite; the weights were not touched."""


class InexactError(PairloopError):
    """The frugal way of computing log-probs does not give what the plain way gives."""


class Interrupted(PairloopError):
    """A signal, a spent budget or an endpoint that is down stopped the run at a safe point; the
    same command goes on."""

    exit_status = 75
