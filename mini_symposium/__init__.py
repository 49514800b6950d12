"""MiniSymposium: fine-tune a language model on a dozen handwritten examples, and know what happened.

Importing the package costs nothing: its public names are loaded when they are first used, and only those that touch
weights load torch.
"""

import importlib
import logging
from collections.abc import Callable, Mapping

# On a CPU bitsandbytes advises at import to install optional kernels; it works without them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for `package` that finds each of `names` in the module it stands in when it is first used.

    A name that ends its module's own path is that module.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{names[name]}")
        return module if names[name].rpartition(".")[2] == name else getattr(module, name)

    return find
