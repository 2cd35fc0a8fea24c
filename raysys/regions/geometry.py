"""Polygons of text regions: how much of a picture they cover.

Polygons are [4, 2] corners as x, y in fractions of width and height, so areas are shares of the picture.
"""

from __future__ import annotations

import numpy as np
import shapely


def union_area(polygons: np.ndarray) -> float:
    """Share of the picture that [N, 4, 2] polygons cover together; overlaps count once, what lies outside does not."""
    if len(polygons) == 0:
        return 0.0
    shapes = shapely.make_valid(shapely.polygons(np.asarray(polygons, dtype=np.float64)))
    return float(min(1.0, shapely.area(shapely.intersection(shapely.union_all(shapes), shapely.box(0, 0, 1, 1)))))


def polygon_area(polygon: np.ndarray) -> float:
    """Shoelace formula; [4, 2] in fractions -> share of the picture."""
    x, y = np.asarray(polygon, dtype=np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def order_corners(box: np.ndarray) -> np.ndarray:
    """Corners [4, 2] clockwise from top left, so that text reads from corner 0 to corner 1."""
    by_x = box[np.argsort(box[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.array([left[0], right[0], right[1], left[1]], dtype=np.float32)
