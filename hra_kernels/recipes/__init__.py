"""Fine-tuning jobs from beginning to end (see `hra-kernels train --help`), and how they refuse."""

import contextlib
import textwrap
from collections.abc import Iterator


class RecipeError(Exception):
    """A bad input or a missing thing: the message says what was expected, what came, and what to do.

    The command line prints it without a traceback.
    """


def reason(error: BaseException) -> str:
    """An exception of someone else's code on one line, shortened; its type where it says nothing."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever is raised inside the `with` block as one sentence that begins with `what`.

    Around calls of other libraries on a person's files and options: what these raise for bad ones is of every kind.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{what}: {reason(error)}") from error
