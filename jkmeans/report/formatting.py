"""Numbers and texts as a page shows them, and what makes them safe to stand in it."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jkmeans.drawing import whole_characters

_LONGEST_VALUE = 400  # letters of a config value


def short_number(value: float, digits: int = 3) -> str:
    """A number with a few digits, and no exponent where one can do without."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def readable_value(value: Any) -> str:
    """A result as a reader wants it: few digits, thousands apart, yes or no."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return short_number(value, 4)
    return as_written(value)


def as_written(value: Any) -> str:
    """The value as a config file has it: no digit is lost, the empty string can be seen."""
    text = str(value) or "''"
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " …"


def escape(text: str) -> str:
    """The text as it may stand in an element or an attribute of HTML."""
    # A browser drops control characters or takes them for errors.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)
    return html.escape(whole_characters(text), quote=True)


def embeddable_json(value: Any) -> str:
    """JSON that may stand in a script element: pure ASCII, without `<`, `>` and `&`.

    NaN and infinity are null: a browser reads no JSON that has them.
    """
    text = json.dumps(_encodable(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {whole_characters(str(name)): _encodable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(inner) for inner in value]
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
