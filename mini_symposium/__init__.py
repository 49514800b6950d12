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
    """A `__getattr__` for `package` that imports a name of it when it is first used.

    Parameters
    ----------
    names
        {name: the module below the package that defines it, or that is meant by it}.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{names[name]}")
        return getattr(module, name, module)

    return find


_NAMES = {
    "load_recipe": "recipe",
    "open_run": "run",
    "load_examples": "data.dataset",
    "tokenize": "data.dataset",
    "prepare": "training.finetune",
    "train": "training.finetune",
    "cross_validate": "training.cross_validation",
    "foresee": "training.forecast",
    "leave_one_out": "training.leave_one_out",
    "load_influence": "evaluation.influence",
    "load_curves": "evaluation.best_epoch",
    "recommend": "evaluation.best_epoch",
    "in_words": "evaluation.best_epoch",
    "merge": "models.merge",
    "survival": "release.survival",
    "ask": "models.generation",
    "evaluate": "evaluation.evaluate",
    "recite": "evaluation.memorization",
    "load_evidence": "claims.evidence",
    "judge": "claims.ledger",
    "figures": "figures",
    "tables": "figures.tables",
    "playground": "playground",
}
__all__ = list(_NAMES)
__getattr__ = lazy(__name__, _NAMES)
