"""Fine-tuning jobs from beginning to end (see `hra-kernels train --help`), and how they refuse."""

import textwrap


class RecipeError(Exception):
    """A bad input or a missing thing: the message says what was expected, what came, and what to do.

    The command line prints it without a traceback.
    """


def reason(error: BaseException) -> str:
    """An exception of someone else's code on one line, shortened; its type where it says nothing."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
