"""MiniSymposium: fine-tune a language model on a dozen handwritten examples, and know what happened.

Importing the package costs nothing: each module loads what it needs, and only
the modules that touch weights load torch.
"""

import logging

from mini_symposium.safe_text import one_line

# On a CPU bitsandbytes advises at import to install optional kernels; it works without them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"


class InputError(ValueError):
    """Bad input, said in one line: what was found, where (``file:line``) and what to do.

    Every entry point turns it into that line and exit code 2, without a traceback. What was found is quoted so that it
    can be shown: see `safe_text.one_line`.
    """

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


class RunError(RuntimeError):
    """A run failed: a notebook cell raised, a loss was no number, adapters did not move. Exit code 1."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))
