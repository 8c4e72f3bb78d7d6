import json

import numpy as np
import pytest

from jkmeans.report.formatting import embeddable_json, short_number


def test_json_can_stand_in_a_script():
    value = {"a": ["</script>", "<!--", "]]>", "\u2028", "\ud800", np.float32("nan"), 1e400, 3]}
    text = embeddable_json(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": ["</script>", "<!--", "]]>", "\u2028", "?", None, None, 3]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.6, "1,235"), (0.45678, "0.457"), (1e-5, "1.00e-5"), (2.5e8, "2.50e8"),
     (float("nan"), "nan"), (-0.5, "-0.5"), (100.0, "100")],
)  # fmt: skip
def test_numbers(value, text):
    assert short_number(value) == text
