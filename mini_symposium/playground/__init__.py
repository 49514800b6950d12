"""The playground: a page of widgets for the models of any run, and the workbench below it, without widgets."""

from mini_symposium import lazy

_NAMES = {**dict.fromkeys(("show", "show_epochs", "front_end"), "page"), "Workbench": "workbench"}
__all__ = list(_NAMES)
__getattr__ = lazy(__name__, _NAMES)
