"""The images that are drawn and cut."""

from __future__ import annotations

import numpy as np
import pytest

from quadric.data.image_sets import PATCH, control_points, cut_patches, draw_curves


def test_curves_are_the_same_again_and_probabilities() -> None:
    count = 600  # more than are drawn at a time
    drawn = draw_curves(control_points(count))
    assert drawn.shape == (count, 784) and drawn.dtype == np.float32
    assert drawn.min() == 0 and drawn.max() == 1
    again = draw_curves(control_points(count))
    np.testing.assert_array_equal(drawn, again)
    np.testing.assert_array_equal(drawn[:7], draw_curves(control_points(7)))
    assert not np.array_equal(drawn, draw_curves(control_points(count, seed=1)))
    grey = ((drawn > 0) & (drawn < 1)).sum(1)
    assert grey.min() > 0  # edges fall off
    frame = drawn.reshape(-1, 28, 28)[:, [0, -1], :]
    assert frame.max() <= 0.5  # no curve leaves the image


def test_curves_pass_their_points() -> None:
    points = np.array([[[6.5, 6.5], [6.5, 14.5], [6.5, 22.5]], [[6.5, 6.5], [20.5, 14.5], [6.5, 22.5]]], np.float32)
    line, bend = draw_curves(points).reshape(2, 28, 28)
    np.testing.assert_array_equal(line[6, 6:23], 1)
    np.testing.assert_allclose(line[[5, 7], 6:23], 0.5, atol=1e-5)
    assert line.sum() == pytest.approx(2 * line[6, 6:23].sum() + 2 * (0.5 + 2 * (1.5 - 2**0.5)), rel=1e-5)
    assert bend[20, 14] == bend[6, 6] == bend[6, 22] == 1
    assert bend[6, 10:19].max() == 0


def test_patches_are_of_the_images_and_the_same_again() -> None:
    """A patch of a slope is a slope: linear interpolation keeps it, whatever the angle and the scale."""
    slope = np.broadcast_to(np.arange(92, dtype=np.uint8), (2, 112, 92))
    patches = cut_patches(slope, 30, seed=3)
    np.testing.assert_array_equal(patches, cut_patches(slope, 30, seed=3))
    assert patches.shape == (30, PATCH**2) and patches.min() >= 0 and patches.max() <= 91 / 255
    inside = patches.reshape(-1, PATCH, PATCH)[:, 8:17, 8:17]
    steps = 255 * np.diff(inside, axis=2)
    assert 2.4 * np.cos(np.pi / 12) - 0.01 < steps.min() and steps.max() < 3.21
