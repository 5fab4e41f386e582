"""Dominance between cost vectors, all minimised: a vector is dominated by one that is nowhere worse and differs."""

import numpy as np

from plait.routing.graph import Floats, Ints


def nondominated(values: Floats) -> Ints:
    """Rows of [n, objectives] that no other row dominates, ordered by the first column; one of equal rows is kept."""
    if values.shape[1] == 2:
        order = np.lexsort((values[:, 1], values[:, 0]))
        second = values[order, 1]
        keep = np.ones(len(order), dtype=bool)
        keep[1:] = second[1:] < np.minimum.accumulate(second)[:-1]
        return order[keep]
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    for row in order:
        # In this order no row dominates an earlier one.
        if not (values[kept] <= values[row]).all(axis=1).any():
            kept.append(int(row))
    return np.array(kept, dtype=np.intp)


def nondominated_by_group(values: Floats, groups: Ints) -> Ints:
    """The same within each group; rows come back group by group."""
    if values.shape[1] != 2:
        members = (np.flatnonzero(groups == group) for group in np.unique(groups))
        return np.concatenate([rows[nondominated(values[rows])] for rows in members])
    order = np.lexsort((values[:, 1], values[:, 0], groups))
    # Ranks instead of values, lowered from group to group, make one running minimum start anew in each.
    ranks = np.unique(values[order, 1], return_inverse=True)[1]
    group_number = np.cumsum(np.diff(groups[order], prepend=groups[order[0]]) != 0)
    key = ranks - group_number * (len(order) + 1)
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = key[1:] < np.minimum.accumulate(key)[:-1]
    return order[keep]


def hypervolume(values: Floats, reference: Floats) -> float:
    """The area that points of two objectives dominate, up to the reference point."""
    inside = values[(values < reference).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    front = inside[nondominated(inside)]
    widths = np.diff(front[:, 0], append=reference[0])
    return float((widths * (reference[1] - front[:, 1])).sum())


def normalised_hypervolume(values: Floats, exact: Floats) -> float:
    """Hypervolume of a front as a share of the exact one's: both scaled so that the exact front's ideal point is
    (0, 0) and its nadir (1, 1), reference point (1.1, 1.1)."""
    ideal = exact.min(axis=0)
    extent = np.where(exact.max(axis=0) > ideal, exact.max(axis=0) - ideal, 1.0)
    reference = np.full(2, 1.1)
    return hypervolume((values - ideal) / extent, reference) / hypervolume(
        (exact - ideal) / extent, reference
    )
