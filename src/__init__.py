"""This file is run before any other of the project, so it must be valid in older versions of Python
as well."""
import sys

OLDEST_PYTHON = (3, 11)


def check_python(version):
    """End the program with one line if this version of Python is too old for the project."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        needed, found = (".".join(map(str, numbers)) for numbers in (OLDEST_PYTHON, version[:3]))
        sys.stderr.write(f"error: Python {needed} or newer is needed; this is Python {found}\n")
        sys.exit(2)


check_python(sys.version_info)
