"""The one exception that means "the user can fix this"."""

from __future__ import annotations

import textwrap

LONGEST_QUOTE = 240


class UserError(Exception):
    """What the user asked for cannot be done as asked.

    The message is one line: what is wrong, and what to do about it. The command line prints it on
    stderr and exits with status 2; library callers get it as an ordinary exception.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut short, to be quoted in a one-line message of ours."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(line, LONGEST_QUOTE, placeholder=" ...")
