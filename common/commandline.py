"""What every program here does first: take the words of its command, and make its console safe to print to."""

import os
import re
import sys

PATH_START = re.compile(r"^((?:--?[\w-]+=)?(?:\w+=)?)(~.*)$", re.DOTALL)  # ~/x, --flag=~/x, KEY=~/x


def words(argv: list[str] | None = None) -> list[str]:
    """argv, or without it the words this program was called with, after `console`; ~ stands for the home folder.

    Shells leave the ~ of --flag=~/x and KEY=~/x as it is, and so do rows, Windows and notebooks.
    """
    if argv is None:
        console()
        argv = sys.argv[1:]
    return [PATH_START.sub(lambda m: m[1] + os.path.expanduser(m[2]), str(word)) for word in argv]


def console() -> None:
    """Print what the console cannot encode as \\x.. or \\u.... instead of ending the program over it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
