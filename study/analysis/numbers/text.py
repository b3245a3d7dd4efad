"""Numbers as readers see them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

NOTHING, MINUS = "–", "−"


def number(value: float, digits: int, sign: str = "") -> str:
    """A number to so many decimals; a dash for NaN. ``sign``: "+" to show that of positive ones, too; 0 has none."""
    if pd.isna(value):
        return NOTHING
    rounded = round(value, digits) + 0.0
    return f"{rounded:{sign if rounded else ''},.{digits}f}".replace("-", MINUS)


def rate(value: float) -> str:
    """A learning rate without an exponent, to three significant digits; a dash for NaN."""
    return NOTHING if pd.isna(value) else np.format_float_positional(value, precision=3, fractional=False, trim="-")


def p_value(value: float) -> str:
    """A p-value to three decimals, or that it lies below them; a dash for NaN."""
    return "< 0.001" if value < 0.001 else number(value, 3)


def interval(low: float, high: float, digits: int, sign: str = "") -> str:
    """An interval in brackets, a blank before them; nothing where it is undefined."""
    between = " to " if sign else " – "
    return "" if pd.isna(low) else f" ({number(low, digits, sign)}{between}{number(high, digits, sign)})"


def percent(value: float) -> str:
    """A number of percent to one decimal; a dash for NaN."""
    return NOTHING if pd.isna(value) else f"{number(value, 1)} %"


def with_interval(values: Iterable[float], digits: int, sign: str = "") -> str:
    """:func:`number` with its :func:`interval`, of a value and its two bounds."""
    value, low, high = values
    return number(value, digits, sign) + interval(low, high, digits, sign)


def millions(count: float) -> str:
    """A number of tokens in millions, to two digits: 0.31 M, 300 M."""
    return f"{float(f'{count / 1e6:.2g}'):g} M"
