"""Which values a weight may take."""

from inq_lightning.grid.power_of_two import (
    MAX_BITS,
    MIN_BITS,
    Exponent,
    PowerOfTwoGrid,
    Underflow,
    check_bits,
    check_exponent,
    check_floating,
    check_underflow,
    exponent_range,
)

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "Exponent",
    "PowerOfTwoGrid",
    "Underflow",
    "check_bits",
    "check_exponent",
    "check_floating",
    "check_underflow",
    "exponent_range",
]
