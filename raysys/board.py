"""TensorBoard's files: the one place that writes them, for every verb, into local folders and object stores.

In: numbers, pictures (uint8 RGB [H, W, 3]), hyper-parameters. Out: event files that ``tensorboard --logdir`` shows. The ``tensorboard``
package writes them by itself; torch, which its own SummaryWriter would load for seconds, is not asked. What to show is left to others.

The same number has the same tag in every verb, so that runs, evaluations and sweeps under one folder stand in one chart:

    train/METRIC         a logged step of train, as in metrics.jsonl; ``train/steps`` of a sweep's trial: steps done
    val/SET/METRIC       an evaluator's answer: beside train, to evaluate, of a sweep's trial (a trial's HParams have those that count)
    val/score            the mean over the sets of the metric that stands for each (evaluation/metrics.py: PRIMARY)
    data/...             what annotate and filter count: shares of the samples, histograms of text_area, box_score, text_score
    regions/GROUP        pictures of annotate (by what was found) and of filter (kept, or by reason), boxes drawn
    views/SAMPLE         pictures of train: a sample's views, as the model gets them
    attacked/GROUP       pictures of evaluate: what is written on them, and what the model said

Steps are optimisation steps of the model; 0 where there is none. A run of TensorBoard's is a folder with such files:

    A/tensorboard, S/tensorboard, R/tensorboard, E/tensorboard/MODEL, W/tensorboard/TRIAL (HParams) beside W/trials/TRIAL/tensorboard
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raysys.patience import naming_full_disk
from raysys.storage import is_local, join, list_names, named_errors, open_fs, remove_file, write_bytes

JPEG_QUALITY = 80
"""Of pictures on a board, with colours at full resolution, or the lines of boxes would blur."""
PICTURE_PX = 384
"""Long side of a picture with boxes: small print can just be read."""
MIN_CANVAS_PX = 200
"""Least width of one with its notes, which are cut off at the edge."""
LETTER_PX = 11
LINE_PX = 14
BOX_COLOR, LABEL_COLOR = (255, 0, 96), (255, 255, 255)
MAX_LABEL, MAX_NOTE = 40, 100
"""Characters of a box's label, and of a line below the picture."""
BINS = 30
"""Of a histogram: as many as TensorBoard draws."""


class Board:
    """A run of TensorBoard's that is being written. Each call may raise OSError naming the folder (or TMPDIR) where the disk is full."""

    def __init__(self, folder: str, *, purge_step: int | None = None) -> None:
        """:param purge_step: of a run that is taken up: TensorBoard forgets what earlier files say of this step and later ones."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = folder
        self._own_folder = None if is_local(folder) else tempfile.TemporaryDirectory(prefix="raysys-tensorboard-")
        self._place = f"TMPDIR={tempfile.gettempdir()}" if self._own_folder else folder
        with naming_full_disk(self._place):
            self._writer = EventFileWriter(self._own_folder.name if self._own_folder else open_fs(folder)[1])
        if purge_step is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """:param numbers: by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, value in numbers.items():
            self._add(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]))

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """:param values: shares and scores, 0..1; the bins are those of that range, so that boards can be compared."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        counts, edges = np.histogram(values, BINS, (0, 1))
        content = HistogramProto(
            min=0,
            max=1,
            num=len(values),
            sum=float(np.sum(values)),
            sum_squares=float(np.sum(np.square(values))),
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],  # the first ends at 0
        )
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, histo=content)]))

    def pictures(self, tag: str, pictures: Sequence[np.ndarray], step: int) -> None:
        """One tag for several pictures: TensorBoard shows them beside each other. :param pictures: uint8 RGB [h, w, 3], of any sizes."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        height, width, _ = pictures[0].shape
        cells = [str(width).encode(), str(height).encode(), *map(_jpeg, pictures)]  # the images plugin's format
        content = TensorProto(
            dtype=DT_STRING, string_val=cells, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(cells))])
        )
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="images"), data_class=DATA_CLASS_BLOB_SEQUENCE)
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, tensor=content, metadata=kind)]))

    def hparams(self, values: Mapping[str, float | str], metrics: Sequence[str], name: str) -> None:
        """Make this run a row of TensorBoard's HParams, ended well.

        All runs of one board must declare the same metrics, and values of the same types: TensorBoard takes any run's word for all.

        :param metrics: tags of this run's scalars. :param name: of the row.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        number, text = api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_STRING
        experiment = api_pb2.Experiment(
            hparam_infos=[
                api_pb2.HParamInfo(name=key, type=text if isinstance(value, str) else number) for key, value in values.items()
            ],
            metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
        )
        start = plugin_data_pb2.SessionStartInfo(group_name=name, start_time_secs=time.time())
        for key, value in values.items():
            if isinstance(value, str):
                start.hparams[key].string_value = value
            else:
                start.hparams[key].number_value = float(value)
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        version = metadata.PLUGIN_DATA_VERSION
        for tag, content in (
            (metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(version=version, experiment=experiment)),
            (metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(version=version, session_start_info=start)),
            (metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(version=version, session_end_info=end)),
        ):
            data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
            self._add(0, summary=Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data))]))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with naming_full_disk(self._place):
            self._writer.add_event(Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        """Until all of it can be read in the folder."""
        with naming_full_disk(self._place):
            self._writer.flush()
        if self._own_folder is not None:
            fs, folder = open_fs(self._folder)
            for file in Path(self._own_folder.name).iterdir():
                with named_errors(self._folder):
                    fs.put_file(str(file), join(folder, file.name))

    def close(self) -> None:
        """The board takes no more; on an object store what came after the last :meth:`flush` is dropped."""
        with naming_full_disk(self._place), ExitStack() as stack:
            if self._own_folder is not None:
                stack.callback(self._own_folder.cleanup)
            self._writer.close()


@contextmanager
def new_board(folder: str) -> Iterator[Board]:
    """A board that is there whole when the block ends, in place of an earlier one; where it raises, what was there stays.

    A kill meanwhile leaves the earlier one too, at worst both: the next board takes the place of both.
    """
    with tempfile.TemporaryDirectory(prefix="raysys-tensorboard-") as own_folder:
        with closing(Board(own_folder)) as board:
            yield board
        earlier = list_names(folder)
        for file in Path(own_folder).iterdir():  # its name holds time, host and process: never that of an earlier one
            write_bytes(join(folder, file.name), file.read_bytes(), durable=False)
        for name in earlier:
            remove_file(join(folder, name))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


# ---- pictures with what was found in them ------------------------------------------------------------------------------


def draw_boxes(pixels: np.ndarray, polygons: np.ndarray, labels: Sequence[str], notes: Sequence[str]) -> np.ndarray:
    """A picture at :data:`PICTURE_PX`, with polygons, their labels where there is room, and lines of text below.

    :param pixels: uint8 RGB [h, w, 3].
    :param polygons: [N, 4, 2], x and y in fractions of width and height.
    :param labels: one a polygon. :param notes: one a line. Any text will do.
    :returns: uint8 RGB; the picture is its upper left corner.
    """
    picture = Image.fromarray(pixels)
    scale = PICTURE_PX / max(picture.size)
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    width, height = max(picture.width, MIN_CANVAS_PX), picture.height + LINE_PX * len(notes)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(picture)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER_PX)
    corners_N42 = np.asarray(polygons, float).reshape(-1, 4, 2) * picture.size
    for corners_42 in corners_N42:
        pen.polygon([tuple(corner) for corner in corners_42.tolist()], outline=BOX_COLOR, width=2)
    taken: list[tuple[float, ...]] = [(0, picture.height, width, height)]
    for corners_42, label in zip(corners_N42, labels, strict=True):
        text = one_line(label, MAX_LABEL)
        (x, y), bottom = corners_42.min(axis=0).tolist(), float(corners_42[:, 1].max())
        label_px = pen.textlength(text, font=font) + 2
        x = max(min(x, picture.width - label_px), 0)
        for top in (y - LINE_PX, bottom):  # above the box, else below
            where = (x, top, x + label_px, top + LINE_PX)
            if text and top >= 0 and where[2] <= width and not any(_overlap(where, other) for other in taken):
                pen.rectangle(where, fill=BOX_COLOR)
                pen.text((x + 1, top), text, fill=LABEL_COLOR, font=font)
                taken.append(where)
                break
    for number, note in enumerate(notes):
        pen.text((2, picture.height + LINE_PX * number), one_line(note, MAX_NOTE), fill="black", font=font)
    return np.asarray(canvas)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def one_line(text: str, most: int) -> str:
    """What of a stranger's text can stand in a line: no control characters, at most ``most`` characters."""
    head = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * most])
    folded = " ".join(head.split())
    return folded if len(folded) <= most and len(text) <= 4 * most else folded[: most - 1] + "…"
