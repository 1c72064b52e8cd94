"""The one error that a user may see: a single line that says what is wrong and how to mend it."""


class UserError(Exception):
    """Something outside the code is wrong: a file, a key, a flag.

    The message is one line: which file or key, what is wrong, what to do. The command line prints it
    without a traceback and exits with status 2; everything else is a defect and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
