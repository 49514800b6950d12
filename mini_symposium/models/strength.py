"""The strength of an adapter: how much of what it adds is added. Needs no torch; `adapters.mixed` applies it."""

from mini_symposium.errors import InputError

STRONGEST = 1.5
"""The highest strength of an adapter. Higher ones extrapolate too far to show anything about the fine-tune."""


def check_strength(strength: float) -> float:
    """The strength itself: 0 is the base, 1 the adapter as it was trained.

    Raises
    ------
    InputError
        If it is not a number from 0 to `STRONGEST`.
    """
    if not 0 <= strength <= STRONGEST:  # nan neither
        raise InputError(f"strength {strength:g}: takes 0, the base, to {STRONGEST}; 1 is the adapter as trained")
    return strength


def at_strength(name: str, strength: float) -> str:
    """A model's name at a strength.

    >>> at_strength("1e-05/epoch-30", 0.5), at_strength("1e-05/epoch-30", 1)
    ('1e-05/epoch-30 x 0.5', '1e-05/epoch-30')
    """
    return name if strength == 1 else f"{name} x {strength:.4g}"
