"""What ``raysys filter`` shows in TensorBoard: how much is kept, and pictures of what is kept and of what each reason drops.

In: annotations, the policy, counts over all rows. Out: S/tensorboard. Pictures and histograms are of a sample of rows from shards all over
the corpus, judged again: that is cheaper than to read the selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.board import new_board
from raysys.config import PolicyConfig
from raysys.policy.policy import judge
from raysys.regions.annotations import Annotations
from raysys.regions.gallery import MAX_PICTURES, read_sample
from raysys.regions.on_board import add_histograms, draw_rows
from raysys.storage import join


def write_board(
    folder: str, annotations: Annotations, roots: dict[str, str], policy: PolicyConfig, counts: Mapping[str, Any]
) -> None:
    """
    :param folder: S.
    :param roots: source -> where its shards lie now.
    :param counts: of S's manifest.
    """
    table, _, _ = read_sample(join(annotations.path, "shards"))
    verdict = judge(table, policy)
    pictures = draw_rows("filter", table, groups_of_verdicts(table, verdict), roots)
    samples = max(counts["samples"], 1)
    with new_board(join(folder, "tensorboard")) as board:
        dropped = {f"data/dropped_share/{reason}": number / samples for reason, number in counts["reasons"].items()}
        board.scalars({"data/kept_share": counts["kept"] / samples} | dropped, 0)
        add_histograms(board, table.filter(verdict["keep"]))
        for group, drawn in pictures.items():
            board.pictures(f"regions/{group}", drawn, 0)


def groups_of_verdicts(table: pa.Table, verdict: pa.Table) -> dict[str, np.ndarray]:
    """``kept`` and each reason -> numbers of rows, those nearest to the other verdict first: kept ones with the most text, dropped ones
    with the least. Samples with an error have no picture to show.

    :param table: annotations. :param verdict: as :func:`judge` gives it.
    """
    area = table["text_area"].to_numpy(zero_copy_only=False).astype(float)
    reason = np.array(verdict["reason"].fill_null("kept").to_pylist(), dtype=object)
    seen = np.flatnonzero(table["error"].is_null().to_numpy(zero_copy_only=False))
    order = seen[np.argsort(np.nan_to_num(area[seen]), kind="stable")]
    groups = {name: order[reason[order] == name] for name in sorted(set(reason[order]), key=lambda name: (name != "kept", name))}
    return {name: (rows[::-1] if name == "kept" else rows)[:MAX_PICTURES] for name, rows in groups.items()}
