"""Our outcomes in the middleware's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lsst.pipe.base import NoWorkFound, RepeatableQuantumError
from lsst.pipe.base import UnprocessableDataError as MiddlewareUnprocessableDataError

from cumbre.core.errors import CumbreError, NoWorkFoundError, TransientError, UnprocessableDataError


@contextmanager
def outcomes() -> Iterator[None]:
    """Turn what payloads raise into what an executor records.

    Nothing to do and data that cannot be used end one detector, not the run. Other errors of ours come again when
    the same is tried again, except those of a database that is away.
    """
    try:
        yield
    except NoWorkFoundError as error:
        raise NoWorkFound(str(error)) from error
    except UnprocessableDataError as error:
        raise MiddlewareUnprocessableDataError(str(error)) from error
    except TransientError:
        raise
    except CumbreError as error:
        raise RepeatableQuantumError(f"{error.outcome}: {error}") from error
