"""From counts to grey levels by what there is to see: plateau equalisation, weighted by edges.

A linear stretch between percentiles gives most greys to the largest spread of counts, and under a cold sky that is the
sky: people, a few hundredths of the picture, are clipped to white. Plain equalisation gives the greys to what covers
most of the picture. Here a count gets greys for how many edges of the scene cross it (a high edge, as of an exhaust,
counts less for each), and for how many pixels have it, both up to a plateau; and what is colder than the bulk of the
scene gets a small share in all. No count gets more than `255 / min_span` greys: a flat wall is not made into noise.
"""

from __future__ import annotations

import numpy as np

BIN_COUNTS = 8
BINS = 65536 // BIN_COUNTS
STEP = 6  # every sixth pixel of every sixth row: a third of the time that every fourth takes, the same curve
EDGE_SIGMAS = 4.5  # of the noise; neighbours that differ by less have no edge between them
SIGMA_OF_DIFFERENCE = 0.74  # the 40th percentile of the difference of two pixels, in sigmas of one
EDGE_SHARE = 0.75  # of the greys go by edges, where there are many...
FEW_EDGES = 0.004  # ...half as many where this share of neighbours has one between them
EDGE_SPANS = 3.0  # an edge higher than so many minimum spans counts no more than that
LINEAR_SHARE = 0.06  # of the greys go to all counts between the outermost ones alike
COLD_SHARE = 0.12  # of the greys for all that is colder than the bulk of the scene
OUTERMOST = 0.001  # of the pixels on either side may be beyond


def target_curve(sample: np.ndarray, min_span_counts: float, plateau: float) -> np.ndarray:
    """The grey level at each bin's edge.

    Args:
        sample: every `STEP`th pixel of a picture, uint16 (h, w).
        min_span_counts: over which black turns white at the earliest.
        plateau: what a count may have at most, as a multiple of what those that occur have on average.

    Returns:
        float32 (BINS + 1,), rising from 0 to 255; a flat picture lies in the middle, with room to both sides.
    """
    ordered = np.sort(sample, axis=None, kind="stable")  # a radix sort for 16 bits
    last = ordered.size - 1
    low, high = (int(ordered[round(share * last)]) // BIN_COUNTS for share in (OUTERMOST, 1 - OUTERMOST))
    span = slice(low, high + 1)
    pixels = np.bincount(sample.ravel() // BIN_COUNTS, minlength=BINS)[span].astype(np.float64)
    edges, edge_share = _edges(sample, min_span_counts)
    by_edges = EDGE_SHARE * edge_share / (edge_share + FEW_EDGES)
    density = LINEAR_SHARE * np.full(high - low + 1, 1 / (high - low + 1))
    density += by_edges * _up_to_plateau(edges[span], plateau)
    density += (1 - LINEAR_SHARE - by_edges) * _up_to_plateau(pixels, plateau)
    density /= density.sum()
    density = _with_little_for_the_cold(density, (_bulk_begins(ordered) // BIN_COUNTS) - low)
    density = _no_steeper_than(density, BIN_COUNTS / min_span_counts)
    return _summed(density, low, BIN_COUNTS / min_span_counts)


def table_of(curve: np.ndarray) -> np.ndarray:
    """uint8 (65536,): the grey level of every count."""
    rise = np.diff(curve)
    inside = np.flatnonzero(rise > 0)
    table = np.empty(65536, np.float32)
    first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    table[: first * BIN_COUNTS] = curve[first]
    table[last * BIN_COUNTS :] = curve[last]
    part = (np.arange(BIN_COUNTS, dtype=np.float32) + 0.5) / BIN_COUNTS
    middle = curve[first:last, None] + rise[first:last, None] * part
    table[first * BIN_COUNTS : last * BIN_COUNTS] = middle.reshape(-1)
    return np.rint(np.clip(table, 0, 255)).astype(np.uint8)


def shifted(curve: np.ndarray, counts: float) -> np.ndarray:
    """The curve for a picture of which all counts have risen."""
    places = np.arange(BINS + 1, dtype=np.float32)
    return np.interp(places - counts / BIN_COUNTS, places, curve).astype(np.float32)


def flat_share(sample: np.ndarray, curve: np.ndarray) -> float:
    """Share of the pixels to which the curve gives next to no contrast: a scene that it was not made for."""
    rise = np.diff(curve)
    occupied = rise[rise > 1e-4]
    if len(occupied) == 0:
        return 1.0
    return float(np.mean(rise[sample // BIN_COUNTS] < 0.05 * occupied.mean()))


def _summed(density: np.ndarray, low: int, limit: float) -> np.ndarray:
    """The curve of a density that begins at a bin; what is missing to full contrast is added on both sides alike."""
    whole = np.zeros(BINS)
    high = low + len(density)
    whole[low:high] = density
    missing = 1 - float(density.sum())
    if missing > 1e-6:
        room = int(np.ceil(missing / 2 / limit))
        below = min(room, low)
        above = min(2 * room - below, BINS - high)
        below = min(2 * room - above, low)
        share = missing / (below + above)
        whole[low - below : low] = share
        whole[high : high + above] = share
    return (255 * np.concatenate(([0.0], np.cumsum(whole)))).astype(np.float32)


def _edges(sample: np.ndarray, min_span_counts: float) -> tuple[np.ndarray, float]:
    """How many edges cross each bin, (BINS,), and the share of neighbours that have one between them."""
    values = sample.astype(np.int32)
    pairs = ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:]))
    low = np.concatenate([np.minimum(one, other).ravel() for one, other in pairs])
    high = np.concatenate([np.maximum(one, other).ravel() for one, other in pairs])
    height = high - low
    place = int(0.4 * height.size)
    is_edge = height > max(2.0, EDGE_SIGMAS / SIGMA_OF_DIFFERENCE * float(np.partition(height, place)[place]))
    share = float(is_edge.mean())
    low, high, height = low[is_edge], high[is_edge], height[is_edge]
    weight = np.minimum(1.0, EDGE_SPANS * min_span_counts / np.maximum(height, 1))
    begins = np.bincount(low // BIN_COUNTS, weight, minlength=BINS)
    ends = np.bincount(high // BIN_COUNTS, weight, minlength=BINS)
    return np.cumsum(begins - ends), share


def _up_to_plateau(density: np.ndarray, plateau: float) -> np.ndarray:
    density = np.maximum(density, 0)
    occurring = density > 1e-9
    if not occurring.any():
        return np.full(len(density), 1 / len(density))
    density = np.minimum(density, plateau * density[occurring].mean())
    return np.asarray(density / density.sum())


def _bulk_begins(ordered: np.ndarray) -> int:
    """The count below which a pixel is colder than the bulk: the tightest half of all pixels, and as much again."""
    half = ordered.size // 2
    widths = ordered[half:].astype(np.int64) - ordered[: ordered.size - half]
    first = int(np.argmin(widths))
    return max(0, int(ordered[first]) - max(int(widths[first]), BIN_COUNTS))


def _with_little_for_the_cold(density: np.ndarray, bulk: int) -> np.ndarray:
    bulk = min(max(bulk, 0), len(density))
    cold = float(density[:bulk].sum())
    if not COLD_SHARE < cold < 1:
        return density
    return np.concatenate((density[:bulk] * (COLD_SHARE / cold), density[bulk:] * ((1 - COLD_SHARE) / (1 - cold))))


def _no_steeper_than(density: np.ndarray, limit: float) -> np.ndarray:
    """Caps the density; what is cut off goes to where there is room, as far as there is any."""
    for _ in range(8):
        over = density > limit
        excess = float((density[over] - limit).sum())
        if excess < 1e-6:
            break
        density = np.minimum(density, limit)
        room = np.where(density < limit, density, 0)
        if room.sum() <= 0:
            break
        density = density + room * (excess / room.sum())
    return np.minimum(density, limit)
