"""The two errors that end a command with a one-line message, and the functions that make a message safe to print.

An error quotes its input, and a dataset, a preset or a model may hold anything. So secrets are removed from every
message, and its control characters are escaped.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?|_PAT|AUTH|WEBHOOK|WEBHOOK_URL)$")
"""Environment variables that hold a secret, such as HF_TOKEN, WANDB_API_KEY and AWS_SECRET_ACCESS_KEY."""
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""Name and password in a web address."""

MOST_FAULTS = 20
"""An error lists this many faults, and gives the number of the others."""
LONGEST_LINE = 1000
"""Maximum length of a message. The input that it quotes may be megabytes."""
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters except newline and tab, characters that change the direction of writing, and those without a
visible shape, such as a zero-width space."""


def without_secrets(text: str) -> str:
    """`text` with *** for each secret in the environment, and for the name and password in a web address.

    >>> without_secrets("from https://ada:pass@example.org/simple")
    'from https://***@example.org/simple'
    """
    # A value of a few characters, such as "true", is not a secret and occurs everywhere.
    secrets = {value for name, value in os.environ.items() if SECRET_NAME.search(name.upper()) and len(value) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _LOGIN.sub("***", text)


def printable(text: str) -> str:
    r"""Escape all characters that a terminal may not show as they are, except newlines and tabs.

    This includes `INVISIBLE`, odd spaces, private and unassigned characters, and halves of surrogate pairs.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    r"""`text` as an error message: on one line, printable, without secrets, and without its middle if it is long.

    >>> one_line("pip: https://me:secret@host\nfailed")
    'pip: https://***@host failed'
    """
    text = _shortened(without_secrets(text))  # shortened first, because `printable` looks at each character
    return _shortened(printable(re.sub(r"[\n\t]", " ", text).strip()))


def _shortened(text: str) -> str:
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def reason(error: Exception) -> str:
    r"""The first non-blank line of a library exception's message, or else the exception's type.

    >>> reason(ValueError("\nno such tensor\nsee the log")), reason(KeyError())
    ('no such tensor', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class InputError(ValueError):
    """Bad input. The message is one line: what was found, where (``file:line``), and what to do. Exit code 2.

    Every command prints it without a traceback; of several faults, a line for each. The text is made safe to print, see
    `one_line`.

    >>> str(InputError("mine.md:3: no text", "mine.md:9: no answer"))
    'mine.md:3: no text | mine.md:9: no answer'
    """

    def __init__(self, *faults: object):
        self.all = faults
        """Every fault, in the words it was given."""
        self.faults = [one_line(str(fault)) for fault in faults[:MOST_FAULTS]]
        """The lines to print: the first MOST_FAULTS, and the number of the others."""
        if len(faults) > MOST_FAULTS:
            self.faults.append(f"and {len(faults) - MOST_FAULTS:,} more faults")
        super().__init__(" | ".join(self.faults))


class Faults(list):
    """The faults of an input, collected so that all of them are told at once.

    >>> faults = Faults()
    >>> for number in (1, 2):
    ...     with faults.collected():
    ...         raise InputError(f"line {number} is empty")
    >>> faults
    ['line 1 is empty', 'line 2 is empty']
    """

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the InputError that is raised below."""
        try:
            yield
        except InputError as error:
            self.extend(map(str, error.all))

    def refuse(self) -> None:
        """Raise an InputError of all faults, if there are any."""
        if self:
            raise InputError(*self)


class RunError(RuntimeError):
    """A run failed: a notebook cell raised, a loss is not a number, the adapters did not move. Exit code 1."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))
