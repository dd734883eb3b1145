"""Files that another program may hold for a moment.

On Windows a file cannot be replaced or deleted while another program, such as a virus scanner, an
indexer or a second run, has it open. This module must not import torch."""
import os
import time

DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between two attempts; about three in all
HELD_BY_ANOTHER = (5, 32, 33)  # Windows' errors: access denied, sharing violation, lock violation


def patiently(action):
    """Return action(). If Windows refuses it because another program holds the file, it is tried
    again for about three seconds before the PermissionError is raised."""
    for delay in DELAYS:
        try:
            return action()
        except PermissionError as error:
            if getattr(error, "winerror", None) not in HELD_BY_ANOTHER:
                raise
        time.sleep(delay)
    return action()


def replace(source, target):
    """Rename a file, in the place of another one if that exists. Raises OSError."""
    patiently(lambda: os.replace(source, target))


def delete(path):
    """Delete a file, if it exists. Raises OSError."""
    try:
        patiently(lambda: os.unlink(path))
    except FileNotFoundError:
        pass
