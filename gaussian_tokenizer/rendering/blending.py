"""Projected Gaussians to pixels and back, tile by tile: compiled loops.

The image is cut into tiles of 16 x 16 pixels. `count_tiles` and `fill_tiles` write for every tile the list of Gaussians
whose ellipse meets it, front to back; `blend` walks the lists forward and composites; `blend_backward` walks them back
from the last Gaussian of each pixel, and divides the transmittance by 1 - alpha on the way (Kerbl et al. 2023, section 6
and appendix C). Each tile writes only what is its own, and gradients go to one row for each entry of a list.

An ellipse is (mean x, mean y, slope, variance over rows, variance inside a row, log opacity), as `projection` describes: in
a row at distance dy from the mean, log alpha is log opacity - dy^2 / (2 over rows) - u^2 / (2 inside), with u the distance to
mean x + slope dy. So the pixels of a row with alpha >= 1/255 are an interval, which is found in float64; float32 images
then cannot differ from float64 ones by a pixel on the other side of that threshold.

Axes: N Gaussians, M of them seen, E entries of all lists, T tiles, row after row. `kind` is the image's dtype.
"""

import math

import numpy as np

from gaussian_tokenizer.rendering.compiling import compiled, inlined

TILE = 16  # pixels
LANES = 8  # pixels of a row that are computed together, by vector instructions; those that a Gaussian does not reach are skipped
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.999  # a contribution below is left out, one above is cut
MIN_TRANSMITTANCE = 1e-4
LOG_MIN_ALPHA = math.log(MIN_ALPHA)
# Planes of a tile's memory; BEHIND is what the Gaussians behind contribute to the loss, STOP the place in the list of the
# Gaussian that ended the pixel, a number like the others so that vector code has one kind of lanes (float32 is exact to 2^24).
TRANSMITTANCE, STOP, RED, GREEN, BLUE, DEPTH, ALPHA, BEHIND = range(8)
NEVER = 2.0**24
N_SUMS = 10  # of a Gaussian over its pixels, see `blend_backward`
CHECK_EVERY = 8  # Gaussians, after which rows without a pixel that is still open are noticed

# exp(x) = exp(CENTER) * (1 + z + z^2 / 2 + ...)^16 with z = (x - CENTER) / 16, |z| < 0.174, for log(1/255) <= x <= 0.
CENTER = LOG_MIN_ALPHA / 2
SCALE = math.exp(CENTER)


@inlined
def _exponential(x):
    """exp of log(1/255) to 0, relative error 1e-11: a polynomial, because calls of exp do not become vector code."""
    kind = type(x)
    z = (x - kind(CENTER)) * kind(1 / 16)
    series = kind(1 / 40320)
    series = series * z + kind(1 / 5040)
    series = series * z + kind(1 / 720)
    series = series * z + kind(1 / 120)
    series = series * z + kind(1 / 24)
    series = series * z + kind(1 / 6)
    series = series * z + kind(1 / 2)
    series = series * z + kind(1)
    series = series * z + kind(1)
    series *= series
    series *= series
    series *= series
    return series * series * kind(SCALE)


@inlined
def _alpha(peak, falloff, distance):
    """min(0.999, opacity exp(-sigma)) at a distance from the row's maximum; below 1/255 it is not exact."""
    kind = type(peak)
    logarithm = peak - falloff * distance * distance
    logarithm = min(max(logarithm, kind(LOG_MIN_ALPHA)), kind(0))
    return min(_exponential(logarithm), kind(MAX_ALPHA))


@inlined
def _tile_columns(ellipse, band, n_across):
    """First tile and the one after the last that an ellipse meets in a band of tiles.

    The right edge, slope dy + sqrt(2 inside (room - dy^2 / (2 over rows))), has one maximum over dy, and the left edge is
    its mirror image; where that lies outside the band, the band's border is nearest to it.
    """
    mean_x, mean_y, slope, over_rows, inside, log_opacity = ellipse
    room = max(log_opacity - LOG_MIN_ALPHA, 0.0)
    reach = math.sqrt(2 * room * over_rows)
    top = max(band * TILE + 0.5 - mean_y, -reach)
    bottom = min(band * TILE + TILE - 0.5 - mean_y, reach)
    if top > bottom:
        return 0, 0
    extreme = slope * over_rows * math.sqrt(2 * room / (inside + slope * slope * over_rows))
    right = min(max(extreme, top), bottom)
    left = min(max(-extreme, top), bottom)
    right = mean_x + slope * right + math.sqrt(2 * inside * max(room - right * right / (2 * over_rows), 0.0))
    left = mean_x + slope * left - math.sqrt(2 * inside * max(room - left * left / (2 * over_rows), 0.0))
    first = np.ceil(left - 0.5)  # pixels
    last = np.floor(right - 0.5)
    if first > last or last < 0 or first >= n_across * TILE:
        return 0, 0
    return int(max(first, 0.0)) // TILE, int(min(last, n_across * TILE - 1.0)) // TILE + 1


@inlined
def _bands(ellipse, n_down):
    """First band of tiles and the one after the last that an ellipse meets."""
    reach = math.sqrt(2 * max(ellipse[5] - LOG_MIN_ALPHA, 0.0) * ellipse[3])
    first = np.ceil(ellipse[1] - reach - 0.5)
    last = np.floor(ellipse[1] + reach - 0.5)
    if first > last or last < 0 or first >= n_down * TILE:
        return 0, 0
    return int(max(first, 0.0)) // TILE, int(min(last, n_down * TILE - 1.0)) // TILE + 1


@inlined
def _numbers(ellipses, i):
    return ellipses[i, 0], ellipses[i, 1], ellipses[i, 2], ellipses[i, 3], ellipses[i, 4], ellipses[i, 5]


@compiled
def count_tiles(start, end, size, order, ellipses, n_across, n_down, tiles_met, per_tile):
    """Tiles that each Gaussian of the parts `start` to `end` meets (M,), and Gaussians of each part in each tile (P, T).

    Part p is the Gaussians p * size to (p + 1) * size of `order` (M,), which is front to back.
    """
    for part in range(start, end):
        for rank in range(part * size, min((part + 1) * size, len(order))):
            ellipse = _numbers(ellipses, order[rank])
            met = 0
            top, bottom = _bands(ellipse, n_down)
            for band in range(top, bottom):
                left, right = _tile_columns(ellipse, band, n_across)
                met += right - left
                for column in range(left, right):
                    per_tile[part, band * n_across + column] += 1
            tiles_met[rank] = met


@compiled
def fill_tiles(start, end, size, order, ellipses, n_across, n_down, entries, cursors, owners, places):
    """The lists: Gaussians (E,) by tile, front to back, and `places` (E,), the same entries' numbers by Gaussian.

    `entries` (M,) is the number of a Gaussian's first entry, `cursors` (P, T) where in `owners` a part's Gaussians begin in
    each tile. A counting sort: the order inside a part is kept.
    """
    for part in range(start, end):
        for rank in range(part * size, min((part + 1) * size, len(order))):
            ellipse = _numbers(ellipses, order[rank])
            entry = entries[rank]
            top, bottom = _bands(ellipse, n_down)
            for band in range(top, bottom):
                left, right = _tile_columns(ellipse, band, n_across)
                for column in range(left, right):
                    cursor = cursors[part, band * n_across + column]
                    cursors[part, band * n_across + column] = cursor + 1
                    owners[cursor] = order[rank]
                    places[cursor] = entry
                    entry += 1


@inlined
def _rows(ellipses, owner, left, top, first, end, peaks, offsets):
    """A Gaussian in the rows of a tile: its pixels first <= x < end, log alpha at the maximum, distance of pixel 0 to it."""
    mean_x, mean_y, slope, over_rows, inside, log_opacity = _numbers(ellipses, owner)
    for y in range(TILE):
        dy = top + y + 0.5 - mean_y
        peak = log_opacity - dy * dy * (0.5 / over_rows)
        room = peak - LOG_MIN_ALPHA
        reach = math.sqrt(2 * inside * max(room, 0.0))
        offset = left + 0.5 - mean_x - slope * dy
        low = min(max(np.ceil(-reach - offset), 0.0), float(TILE))
        high = min(max(np.floor(reach - offset) + 1.0, 0.0), float(TILE))
        first[y] = low
        end[y] = high if room >= 0 else 0.0
        peaks[y] = peak
        offsets[y] = offset


@inlined
def _open_rows(planes, place, open_rows):
    """Which rows of a tile still have a pixel that has not ended before `place`; whether any has."""
    any_open = False
    for y in range(planes.shape[0]):
        latest = planes[y, 0, STOP, 0]
        for piece in range(planes.shape[1]):
            for x in range(planes.shape[3]):
                latest = max(latest, planes[y, piece, STOP, x])
        open_rows[y] = latest > place
        any_open |= open_rows[y]
    return any_open


@inlined
def _blend_piece(planes, y, piece, low, high, place, peak, falloff, offset, color):
    """Put one Gaussian behind what is already there, in the pixels low <= x < high of LANES."""
    kind = type(peak)
    red, green, blue, depth = color
    for x in range(LANES):
        column = kind(x)
        alpha = _alpha(peak, falloff, offset + column)
        transmittance, stop = planes[y, piece, TRANSMITTANCE, x], planes[y, piece, STOP, x]
        after = transmittance * (kind(1) - alpha)
        covers = (column >= low) & (column < high) & (stop > place)
        ends = covers & (after <= kind(MIN_TRANSMITTANCE))
        counts = covers & (after > kind(MIN_TRANSMITTANCE))
        weight = alpha * transmittance if counts else kind(0)
        planes[y, piece, TRANSMITTANCE, x] = after if counts else transmittance
        planes[y, piece, STOP, x] = place if ends else stop
        planes[y, piece, ALPHA, x] += weight
        planes[y, piece, DEPTH, x] += weight * depth
        planes[y, piece, RED, x] += weight * red
        planes[y, piece, GREEN, x] += weight * green
        planes[y, piece, BLUE, x] += weight * blue


@compiled
def blend(start, end, starts, owners, ellipses, features, colors, alphas, depths, remaining, stops):
    """Composite the tiles `start` to `end`.

    `starts` (T + 1,) are the tiles' first entries in `owners`; `features` (N, 4) red, green, blue, depth. Written: colors (H,
    W, 3), alphas and depths (H, W), the sums of weight times feature; `remaining` (T, TILE, TILE), the transmittance that is
    left, and `stops` (T, TILE, TILE), the place in its tile's list of the Gaussian that ended the pixel.
    """
    height, width = alphas.shape
    n_across = (width + TILE - 1) // TILE
    kind = features.dtype.type
    planes = np.empty((TILE, TILE // LANES, 7, LANES), features.dtype)
    first, last = np.empty(TILE, features.dtype), np.empty(TILE, features.dtype)
    peaks, offsets = np.empty(TILE, features.dtype), np.empty(TILE, features.dtype)
    open_rows = np.empty(TILE, np.bool_)
    for tile in range(start, end):
        left, top = tile % n_across * TILE, tile // n_across * TILE
        across, down = min(TILE, width - left), min(TILE, height - top)
        for y in range(TILE):
            for x in range(TILE):
                piece, lane = x // LANES, x % LANES
                for plane in range(7):
                    planes[y, piece, plane, lane] = kind(0)
                planes[y, piece, TRANSMITTANCE, lane] = kind(1)
                if y < down and x < across:
                    planes[y, piece, STOP, lane] = kind(NEVER)
        for place in range(starts[tile + 1] - starts[tile]):
            if place % CHECK_EVERY == 0 and not _open_rows(planes, place, open_rows):
                break
            owner = owners[starts[tile] + place]
            color = features[owner, 0], features[owner, 1], features[owner, 2], features[owner, 3]
            falloff = kind(0.5 / ellipses[owner, 4])
            _rows(ellipses, owner, left, top, first, last, peaks, offsets)
            for y in range(TILE):
                if last[y] > first[y] and open_rows[y]:
                    for piece in range(TILE // LANES):
                        shift = kind(piece * LANES)
                        low, high = first[y] - shift, last[y] - shift
                        if low < LANES and high > 0:
                            offset = offsets[y] + shift
                            _blend_piece(planes, y, piece, low, high, kind(place), peaks[y], falloff, offset, color)
        for y in range(TILE):
            for x in range(TILE):
                remaining[tile, y, x] = planes[y, x // LANES, TRANSMITTANCE, x % LANES]
                stops[tile, y, x] = planes[y, x // LANES, STOP, x % LANES]
        for y in range(down):
            for x in range(across):
                piece, lane = x // LANES, x % LANES
                alphas[top + y, left + x] = planes[y, piece, ALPHA, lane]
                depths[top + y, left + x] = planes[y, piece, DEPTH, lane]
                for channel in range(3):
                    colors[top + y, left + x, channel] = planes[y, piece, RED + channel, lane]


@inlined
def _blend_row_backward(planes, y, sums, columns, low, high, place, peak, falloff, offset, dy, color):
    """Take one Gaussian away again, from the pixels low <= x < high of a row, and add to its sums (N_SUMS, TILE).

    dL/dalpha = T (feature . dL/dfeature) - (what is behind) / (1 - alpha), T the transmittance in front of the Gaussian. Whole
    rows, unlike forward: the many sums would not become vector code in shorter pieces.
    """
    kind = type(peak)
    red, green, blue, depth = color
    for x in range(TILE):
        u = offset + columns[x]
        alpha = _alpha(peak, falloff, u)
        counts = (columns[x] >= low) & (columns[x] < high) & (planes[y, 0, STOP, x] > place)
        alpha = alpha if counts else kind(0)
        inverse = kind(1) / (kind(1) - alpha)
        transmittance = planes[y, 0, TRANSMITTANCE, x] * inverse
        behind = planes[y, 0, BEHIND, x]
        weight = alpha * transmittance
        along = planes[y, 0, ALPHA, x] + depth * planes[y, 0, DEPTH, x]
        along += red * planes[y, 0, RED, x] + green * planes[y, 0, GREEN, x] + blue * planes[y, 0, BLUE, x]
        g = alpha * (transmittance * along - behind * inverse)
        g = g if alpha < kind(MAX_ALPHA) else kind(0)
        planes[y, 0, TRANSMITTANCE, x] = transmittance
        planes[y, 0, BEHIND, x] = behind + weight * along
        sums[0, x] += g
        sums[1, x] += g * dy
        sums[2, x] += g * dy * dy
        sums[3, x] += g * u
        sums[4, x] += g * u * dy
        sums[5, x] += g * u * u
        sums[6, x] += weight * planes[y, 0, RED, x]
        sums[7, x] += weight * planes[y, 0, GREEN, x]
        sums[8, x] += weight * planes[y, 0, BLUE, x]
        sums[9, x] += weight * planes[y, 0, DEPTH, x]


@inlined
def _add_lanes(lanes, sums, row):
    """A row of sums, of `lanes` (N_SUMS, TILE), by halves: an order that vector instructions can follow."""
    half = TILE // 2
    while half > 0:
        for index in range(N_SUMS):
            for x in range(half):
                lanes[index, x] += lanes[index, x + half]
        half //= 2
    for index in range(N_SUMS):
        sums[row, index] = lanes[index, 0]


@inlined
def _load_tile(tile, left, top, remaining, stops, grad_colors, grad_alphas, grad_depths, planes):
    """Set the planes of the way back: where the pixels ended, and their gradients, 0 outside the image; the latest stop."""
    height, width = grad_alphas.shape
    latest = stops[tile, 0, 0]
    for y in range(TILE):
        for x in range(TILE):
            for plane in range(8):
                planes[y, 0, plane, x] = 0
            planes[y, 0, TRANSMITTANCE, x] = remaining[tile, y, x]
            planes[y, 0, STOP, x] = stops[tile, y, x]
            latest = max(latest, stops[tile, y, x])
    for y in range(min(TILE, height - top)):
        for x in range(min(TILE, width - left)):
            planes[y, 0, ALPHA, x] = grad_alphas[top + y, left + x]
            planes[y, 0, DEPTH, x] = grad_depths[top + y, left + x]
            for channel in range(3):
                planes[y, 0, RED + channel, x] = grad_colors[top + y, left + x, channel]
    return latest


@compiled
def blend_backward(
    start,
    end,
    starts,
    owners,
    places,
    ellipses,
    features,
    remaining,
    stops,
    grad_colors,
    grad_alphas,
    grad_depths,
    sums,
):
    """Gradients of the tiles `start` to `end`: a row of `sums` (E, N_SUMS) for each entry, at the entry's `places`.

    With g = dL/dlog alpha of a pixel: the sums over the tile's pixels of g, g dy, g dy^2, g u, g u dy, g u^2, and of weight times
    the gradient of red, green, blue and depth.
    """
    n_across = (grad_alphas.shape[1] + TILE - 1) // TILE
    kind = features.dtype.type
    planes, lanes = np.empty((TILE, 1, 8, TILE), features.dtype), np.empty((N_SUMS, TILE), features.dtype)
    columns = np.arange(TILE).astype(features.dtype)
    first, last = np.empty(TILE, features.dtype), np.empty(TILE, features.dtype)
    peaks, offsets = np.empty(TILE, features.dtype), np.empty(TILE, features.dtype)
    open_rows = np.empty(TILE, np.bool_)
    for tile in range(start, end):
        left, top = tile % n_across * TILE, tile // n_across * TILE
        latest = _load_tile(tile, left, top, remaining, stops, grad_colors, grad_alphas, grad_depths, planes)
        count = min(starts[tile + 1] - starts[tile], int(latest))
        for place in range(count - 1, -1, -1):
            if place % CHECK_EVERY == CHECK_EVERY - 1 or place == count - 1:
                _open_rows(planes, place // CHECK_EVERY * CHECK_EVERY, open_rows)
            entry = starts[tile] + place
            owner = owners[entry]
            color = features[owner, 0], features[owner, 1], features[owner, 2], features[owner, 3]
            falloff = kind(0.5 / ellipses[owner, 4])
            _rows(ellipses, owner, left, top, first, last, peaks, offsets)
            for index in range(N_SUMS):
                for x in range(TILE):
                    lanes[index, x] = kind(0)
            for y in range(TILE):
                if last[y] > first[y] and open_rows[y]:
                    dy = kind(top + y + 0.5 - ellipses[owner, 1])
                    _blend_row_backward(
                        planes,
                        y,
                        lanes,
                        columns,
                        first[y],
                        last[y],
                        kind(place),
                        peaks[y],
                        falloff,
                        offsets[y],
                        dy,
                        color,
                    )
            _add_lanes(lanes, sums, places[entry])
