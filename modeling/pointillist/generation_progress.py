"""The progress bar of generation: `generating: 512 points [00:12, 41.3 points/s, height 37 %]`.

Points are sorted by y first, from the neck to the crown: the share of the y bins already passed shows how far a cloud is.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .configuration_pointillist import PointillistConfig

WITHOUT_TOTAL = "{desc}{n_fmt} points [{elapsed}, {rate_noinv_fmt}{postfix}]"
WITH_TOTAL = "{l_bar}{bar}| {n_fmt}/{total_fmt} points [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class GenerationProgress:
    """A bar for a batch: the most points of a row, prompt (B, L) included, and the height of the lowest unfinished row.

    `max_points` is the total, if there is one. Only `sorted_points` have a height. Not `shown`, it never waits for the device.
    """

    def __init__(
        self, config: PointillistConfig, prompt: Tensor, max_points: int | None, sorted_points: bool, shown: bool
    ):
        self.config, self.sorted_points = config, sorted_points
        self.starts = (prompt == config.first_special).int().argmax(1) + 1  # column after bos
        self.bar = tqdm(
            total=max_points,
            initial=self.most_points(prompt) if shown else 0,
            unit=" points",
            desc="generating: ",
            bar_format=WITHOUT_TOTAL if max_points is None else WITH_TOTAL,
            disable=not shown,
        )
        self.close = self.bar.close

    def update(self, ids: Tensor, unfinished: Tensor) -> None:
        """ids (B, L) so far, unfinished (B,) bool."""
        if self.bar.disable:
            return
        points = (ids.shape[1] - self.starts) // 4
        column = self.starts + 4 * (points - 1) + self.config.slot_columns[1]
        y = ids.gather(1, column.clamp(min=0)[:, None])[:, 0].where(points > 0, 0)
        lowest = y.where(unfinished, self.config.n_bins).min()
        most, lowest = torch.stack((points.where(unfinished, 0).max(), lowest)).tolist()
        if most <= self.bar.n:
            return
        if self.sorted_points:
            self.bar.set_postfix_str(f"height {100 * lowest // self.config.n_bins} %", refresh=False)
        self.bar.update(most - self.bar.n)

    def finish(self, ids: Tensor) -> None:
        """Count the points of the final ids (B, L) that `update` was not called for."""
        if not self.bar.disable:
            self.bar.update(self.most_points(ids) - self.bar.n)

    def most_points(self, ids: Tensor) -> int:
        return int((ids < self.config.first_special).sum(1).max()) // 4
