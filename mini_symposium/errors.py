"""The two errors that end a command in one line, and the text that such a line may hold.

A dataset, a preset or a model may hold anything, and an error quotes what it found: so the quoted text is made safe to
show here, once, for every message.
"""

import os
import re

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?|_PAT|AUTH|WEBHOOK|WEBHOOK_URL)$")
"""Environment variables whose value is nobody else's business: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY."""
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""Name and password in an address."""

LONGEST_LINE = 1000
"""Characters of an error; what was found may be a line of megabytes."""


INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters but newline and tab, those that change the direction of writing, and those without a shape."""


def secrets() -> list[str]:
    """The values of such variables, longest first; one of a few characters is no secret, and is found everywhere."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name.upper()) and len(value) >= 8}
    return sorted(found, key=len, reverse=True)


def without_secrets(text: str) -> str:
    """`text` with *** for every secret of the environment, and for the name and password in an address.

    >>> without_secrets("from https://ada:pass@example.org/simple")
    'from https://***@example.org/simple'
    """
    for secret in secrets():
        text = text.replace(secret, "***")
    return _LOGIN.sub("***", text)


def printable(text: str) -> str:
    r"""`text` with every character spelled out that a terminal may not show as itself; newlines and tabs stay.

    These are more than `INVISIBLE`: odd spaces, private and unassigned characters, halves of surrogate pairs.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    r"""What an error says: `text` on one line, printable, without secrets, its middle left out if it is long.

    >>> one_line("pip: https://me:secret@host\nfailed")
    'pip: https://***@host failed'
    """
    text = _shortened(without_secrets(text))  # before every character is looked at
    return _shortened(printable(re.sub(r"[\n\t]", " ", text).strip()))


def _shortened(text: str) -> str:
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


class InputError(ValueError):
    """Bad input, said in one line: what was found, where (``file:line``) and what to do. Exit code 2.

    Every entry point prints that line without a traceback. What was found is quoted so that it can be shown: see
    `one_line`.
    """

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


class RunError(RuntimeError):
    """A run failed: a notebook cell raised, a loss was not a number, adapters did not move. Exit code 1."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))
