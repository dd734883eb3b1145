"""The errors that a user can cause: as many as have different handlers."""


class UsageError(Exception):
    """What the user asked for cannot be done: wrong arguments, or a missing or invalid file.
    A script that ends with it has exit status 2."""


class DataError(UsageError):
    """A dataset, or one photo of it, is missing, incomplete or damaged. Where photos may be left
    out, this is what leaves one out."""


class RunError(Exception):
    """Something failed while running, such as a loss that is no longer finite or a full disk.
    A script that ends with it has exit status 1."""


def first_line(error):
    """Describe an exception of other people's code by its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
