"""What a person did or has to do, said in one sentence; the command line prints it without a traceback."""


class RecipeError(Exception):
    """A bad input or a missing thing: the message says what was expected, what came, and what to do."""
