"""Polygons of text regions: how much of a picture they cover.

Polygons are [4, 2] corners as x, y in fractions of width and height, so areas are shares of the picture.
"""

from __future__ import annotations

import numpy as np
import shapely


def union_area(polygons: np.ndarray) -> float:
    """Share of the picture that [N, 4, 2] polygons cover together; overlaps count once, what lies outside does not."""
    return float(union_areas(polygons, np.zeros(len(polygons), np.int64), 1)[0])


def union_areas(polygons: np.ndarray, picture: np.ndarray, num_pictures: int) -> np.ndarray:
    """float64 [num_pictures]: :func:`union_area` of many pictures at a time.

    :param picture: int [N], ascending: whose polygon each is; a picture without one gets 0.
    """
    shapes = shapely.make_valid(shapely.polygons(np.asarray(polygons, dtype=np.float64)))
    owners, place = np.unique(picture, return_inverse=True)
    together = shapely.union_all(shapely.geometrycollections(shapes, indices=place)[:, None], axis=1)
    areas = np.zeros(num_pictures)
    areas[owners] = np.minimum(1.0, shapely.area(shapely.intersection(together, shapely.box(0, 0, 1, 1))))
    return areas


def polygon_area(polygon: np.ndarray) -> float:
    """Shoelace formula; [4, 2] in fractions -> share of the picture."""
    x, y = np.asarray(polygon, dtype=np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def keep_best(polygons: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Positions of [N, 4, 2] polygons that stay, best first: one that shares over half of the smaller's area with a better one goes."""
    shapes = shapely.make_valid(shapely.polygons(np.asarray(polygons, dtype=np.float64)))
    areas = shapely.area(shapes)
    tree = shapely.STRtree(shapes)
    kept: list[int] = []
    gone = np.zeros(len(shapes), dtype=bool)
    for best in np.argsort(-worth, kind="stable"):
        if gone[best]:
            continue
        kept.append(int(best))
        near = tree.query(shapes[best])
        shared = shapely.area(shapely.intersection(shapes[near], shapes[best]))
        gone[near[shared > 0.5 * np.minimum(areas[near], areas[best])]] = True
    return np.array(kept, dtype=np.int64)
