"""Risk over coverage: the arithmetic by hand, and a picture."""

import numpy as np
import pytest
from PIL import Image

from clipcap_rag.risk_coverage import area, areas, draw, points, reliability, risks, table

SURE, GOOD = np.array([0.8, 0.1, 0.9, 0.7]), np.array([False, False, True, True])
CIDER = np.array([0.2, 0.0, 1.0, 0.6])


def test_risk_is_the_share_of_bad_captions_among_the_surest():
    assert risks(SURE, GOOD) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert area(SURE, GOOD) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert risks(np.zeros(4), GOOD) == pytest.approx([1, 1, 2 / 3, 1 / 2])  # ties keep their order


def test_an_oracle_and_chance_bound_the_area():
    found = areas({"sure": SURE}, GOOD)
    assert found == pytest.approx({"sure": 1 / 3, "oracle": (0 + 0 + 1 / 3 + 1 / 2) / 4, "chance": 1 / 2})


def test_points_of_the_curve():
    rows = points(SURE, GOOD, CIDER, steps=2)
    assert rows == [
        {"coverage": 0.5, "level": 0.8, "risk": 0.5, "CIDEr": pytest.approx(0.6)},
        {"coverage": 1.0, "level": 0.1, "risk": 0.5, "CIDEr": pytest.approx(0.45)},
    ]
    assert len(points(SURE, GOOD, CIDER)) == 4  # no more than there are photos
    for row in rows:
        assert (row["level"] <= SURE).mean() == row["coverage"]


def test_calibration_error_by_hand():
    error, bins = reliability(SURE, GOOD, bins=2)
    assert bins == [
        {"sure": pytest.approx(0.4), "good": 0.5, "photos": 2},
        {"sure": pytest.approx(0.85), "good": 0.5, "photos": 2},
    ]
    assert error == pytest.approx((0.1 + 0.35) / 2)


def test_the_curves_are_drawn_and_told(tmp_path):
    draw({"calibrated": SURE, "nearest": -SURE}, GOOD, CIDER, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    error, _ = reliability(SURE, GOOD)
    measured = {
        "photos": 4,
        "curve": points(SURE, GOOD, CIDER),
        "AURC": areas({"calibrated": SURE}, GOOD),
        "calibration_error": error,
    }
    lines = table(measured, coverages=(1.0, 0.5)).splitlines()
    assert lines[1].split() == ["100", "0.10", "50.0", "45.0"] and lines[2].split() == ["50", "0.80", "50.0", "60.0"]
    assert "calibrated 33.3, oracle 20.8, chance 50.0" in lines[3]
