"""TensorBoard event files: scalars, text cards and the custom-scalars page, without torch or TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trainer.telemetry.heatmap import Picture

_FLUSH_SECONDS = 5
_RGBA = 4


class EventFile:
    """One event file in `folder`. `time` is in Unix seconds; values are stored as float32, NaN as NaN."""

    def __init__(self, folder: Path):
        self._writer = EventFileWriter(str(folder), max_queue_size=1000, flush_secs=_FLUSH_SECONDS)

    def scalars(self, values: Mapping[str, float], step: int, time: float) -> None:
        """One point of each tag, all in one event: its frame and checksum are paid once."""
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._add(step, time, summary)

    def text(self, tag: str, markdown: str, step: int, time: float) -> None:
        """A card on the text page."""
        metadata = text_metadata.create_summary_metadata(display_name="", description="")
        self._add(step, time, _string_summary(tag, markdown.encode(), metadata, scalar=False))

    def image(self, tag: str, picture: Picture, step: int, time: float) -> None:
        """A picture on the images page."""
        summary = summary_pb2.Summary()
        image = summary.Image(
            height=picture.height, width=picture.width, colorspace=_RGBA, encoded_image_string=picture.png
        )
        summary.value.add(tag=tag, image=image)
        self._add(step, time, summary)

    def layout(self, layout: layout_pb2.Layout, time: float) -> None:
        """The charts of the custom-scalars page."""
        metadata = custom_scalar_metadata.create_summary_metadata()
        tag = custom_scalar_metadata.CONFIG_SUMMARY_TAG
        self._add(0, time, _string_summary(tag, layout.SerializeToString(), metadata, scalar=True))

    def resume(self, step: int, time: float) -> None:
        """From here on the file goes on after `step`: readers drop what was recorded for later steps before."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time, step=step + 1, session_log=start))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, time: float, summary: summary_pb2.Summary) -> None:
        self._writer.add_event(event_pb2.Event(wall_time=time, step=step, summary=summary))


def _string_summary(
    tag: str, content: bytes, metadata: summary_pb2.SummaryMetadata, scalar: bool
) -> summary_pb2.Summary:
    dimensions = [] if scalar else [tensor_shape_pb2.TensorShapeProto.Dim(size=1)]
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING,
        tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=dimensions),
        string_val=[content],
    )
    summary = summary_pb2.Summary()
    summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
    return summary


def layout_of(categories: Mapping[str, Mapping[str, list[str]]]) -> layout_pb2.Layout:
    """Category → chart → regular expressions (matched from the start of the tag) of what the chart overlays."""
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=patterns))
                    for title, patterns in charts.items()
                ],
            )
            for category, charts in categories.items()
        ]
    )
