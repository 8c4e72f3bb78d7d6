import pytest

from jkmeans.report.curves import curves_figure
from jkmeans.report.records import series_of
from tests.reports import history, texts


def test_series_break_between_phases_and_skip_what_is_missing():
    records = [
        {"epoch": 1, "phase": "pretrain", "loss": 3.0},
        {"epoch": 2, "phase": "pretrain", "loss": None},
        {"epoch": 3, "phase": "pretrain", "loss": 2.0},
        {"epoch": 4, "phase": "cluster"},
        {"epoch": 5, "phase": "cluster", "loss": float("nan")},
        {"epoch": 6, "phase": "cluster", "loss": 1.0},
    ]
    series = [(e.tolist(), v.tolist()) for e, v in series_of(records, "loss")]
    assert series == [([1, 3], [3.0, 2.0]), ([6], [1.0])]


def test_curves_have_a_panel_for_each_kind_of_metric():
    figure = curves_figure(history(), "")
    drawn = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") for ax in drawn] == [
        "Loss",
        "Agreement with the true classes",
        "Labels that changed",
        "Empty clusters",
        "Inertia",
    ]
    # ARI was recorded as null throughout.
    assert [t.get_text() for t in drawn[1].get_legend().get_texts()] == ["ACC", "NMI"]
    assert drawn[0].get_yscale() == "log"
    # Pretraining is shaded, up to the middle between its last epoch and the next.
    assert drawn[0].patches[0].get_extents().transformed(drawn[0].transData.inverted()).x1 == (
        pytest.approx(4.5)
    )
    assert "pretraining" in texts(figure)
