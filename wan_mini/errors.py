"""The errors that a user can mend. Every other exception is a bug and shows its traceback."""


class UserError(ValueError):
    """What was got, what was wanted, and how to fix it, in one line."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that should be there."""
