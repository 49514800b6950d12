"""Pictures and tables of results, made from lines of metrics.jsonl and from dicts. They need no torch and no model."""

from mini_symposium import lazy

_NAMES = {
    **dict.fromkeys(
        ("loss_curves", "growing", "example_heatmap", "token_lengths", "travel", "recitation", "format_grid"),
        "training",
    ),
    **dict.fromkeys(("memorization_curves", "ledger_picture"), "ledger"),
    **dict.fromkeys(("overfitting", "overfitting_of_models"), "stopping"),
    "influence_map": "influence",
    "survival_picture": "survival",
}
__all__ = list(_NAMES)
__getattr__ = lazy(__name__, _NAMES)
