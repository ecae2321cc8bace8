"""Evenly spaced frames of a video file: the pictures that a list of frame files would have given.

Decoding is PyAV's (`pip install av`), which is not needed where videos are folders of frames.  A file is not trusted:
it is opened by us, below the data root, and can name no second file; container, codec, length and size are checked
before a frame is decoded.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MAX_VIDEO_BYTES = 8 * 2**30
MAX_VIDEO_SECONDS = 3 * 3600
MAX_VIDEO_FRAMES = 3 * 3600 * 60
# Those that cameras and the web use.  FFmpeg also knows play lists, which open further files: not these.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
_CODECS = "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,mpeg4,msmpeg4,mpeg1video,mpeg2video,h263,mjpeg"
_MAX_TAKEN_PIXELS = 10**9  # of all frames taken together: 3 GB


@dataclass(frozen=True, slots=True)
class _Packets:
    """Presentation times of all frames, ascending, and where decoding can start: (time, decoding time)."""

    times: list[int]
    keys: list[tuple[int, int]]


def is_video_file(path: str) -> bool:
    """Whether a media path names a video file, by its ending."""
    return path.lower().endswith(SUFFIXES)


def frame_places(total: int, num_frames: int) -> list[int]:
    """Which of `total` frames are taken: evenly spaced with both ends, rounded down; all where they are fewer."""
    if total <= num_frames:
        return list(range(total))
    return np.linspace(0, total - 1, num_frames, dtype=int).tolist()


def sample_frames(media: MediaRoot, relative: str, num_frames: int) -> list[Image.Image]:
    """`frame_places` of a video file's frames, RGB, upright by its rotation.

    Raises BadSample: no_video_decoder, path_escape, missing_file, file_too_large, too_many_frames (length),
    too_many_pixels, corrupt_video.
    """
    with _opened(media, relative) as (container, stream):
        packets = _read_packets(container, stream)
        total = len(packets.times)
        _check(media, relative, stream, total, num_frames)
        frames = _by_seeking(container, stream, packets, frame_places(total, num_frames))
        if frames is None:
            frames = _in_order(container, stream, total, num_frames)
        if not frames:
            raise BadSample("corrupt_video", f"{relative!r} holds no frame that can be decoded")
        return frames


def video_shape(media: MediaRoot, relative: str, num_frames: int) -> tuple[int, int, int]:
    """(width, height, frames that `sample_frames` takes) by the file's headers, nothing decoded.

    Width and height are those before a rotation.  Raises BadSample like `sample_frames`.
    """
    with _opened(media, relative) as (container, stream):
        total = len(_read_packets(container, stream).times)
        _check(media, relative, stream, total, num_frames)
        return stream.width, stream.height, min(total, num_frames)


@contextmanager
def _opened(media: MediaRoot, relative: str) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of an acceptable file; whatever FFmpeg says against it is a BadSample."""
    try:
        import av
    except ImportError:
        raise BadSample(
            "no_video_decoder",
            f"{relative!r} is a video file, which needs PyAV (pip install av); or save its frames as pictures and list "
            "those",
        ) from None
    options = {"format_whitelist": _CONTAINERS, "codec_whitelist": _CODECS, "protocol_whitelist": "none"}
    with media.open_file(relative, MAX_VIDEO_BYTES) as file:
        try:
            with av.open(file, options=options, io_open=_no_second_file, **_any_metadata(av)) as container:
                if not container.streams.video:
                    raise BadSample("corrupt_video", f"{relative!r} has no video stream")
                stream = container.streams.video[0]
                # FFmpeg's own bound, for a size that changes on the way; one thread: worker processes are parallel
                stream.codec_context.options = {"max_pixels": str(media.max_source_pixels)}
                stream.codec_context.thread_count = 1
                yield container, stream
        except BadSample:
            raise
        except MemoryError:
            raise BadSample("too_many_pixels", f"{relative!r} does not fit in memory") from None
        except Exception as error:  # hostile bytes make FFmpeg and its binding raise nearly every type
            raise BadSample("corrupt_video", f"{relative!r}: {type(error).__name__}: {error}") from None


def _any_metadata(av: ModuleType) -> dict[str, str]:
    """The argument that lets titles be in any encoding; from PyAV 19 on they may be, and there is no such argument."""
    return {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


def _no_second_file(url: str, flags: int, options: dict) -> Any:
    raise BadSample("path_escape", f"a video file names another one, {url!r}")


def _read_packets(container: Any, stream: Any) -> _Packets:
    """Pass over the file once without decoding; no times where they cannot tell the frames apart."""
    times, keys, complete = [], [], True
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:  # the end; frames that an edit list hides
            continue
        if len(times) > MAX_VIDEO_FRAMES:
            break
        complete = complete and packet.pts is not None
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))  # Matroska has no dts
    if not complete or len(set(times)) < len(times):
        return _Packets(list(range(len(times))), [])
    return _Packets(sorted(times), sorted(keys))


def _check(media: MediaRoot, relative: str, stream: Any, total: int, num_frames: int) -> None:
    """The bounds, before anything is decoded."""
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if total > MAX_VIDEO_FRAMES or seconds > MAX_VIDEO_SECONDS:
        raise BadSample(
            "too_many_frames",
            f"{relative!r} has {total} frames and lasts {seconds:.0f} s, more than {MAX_VIDEO_FRAMES} or "
            f"{MAX_VIDEO_SECONDS} s",
        )
    pixels = stream.width * stream.height
    if not total or not pixels:
        raise BadSample("corrupt_video", f"{relative!r} holds no frame: {total} of {stream.width} x {stream.height}")
    if pixels > media.max_source_pixels:
        raise BadSample(
            "too_many_pixels",
            f"{relative!r} is {stream.width} x {stream.height}, more than {media.max_source_pixels} pixels",
        )
    taken = min(total, num_frames)
    if taken * pixels > _MAX_TAKEN_PIXELS:
        raise BadSample(
            "too_many_pixels", f"{relative!r}: {taken} frames of {pixels} pixels, more than {_MAX_TAKEN_PIXELS} in all"
        )


def _by_seeking(container: Any, stream: Any, packets: _Packets, places: list[int]) -> list[Image.Image] | None:
    """The frames at `places`, decoded from the key frame before each; None where the file's times do not hold."""
    if not packets.keys:
        return None
    starts = [time for time, _ in packets.keys]
    taken, decoded, here = [], iter(()), -1
    for wanted in (packets.times[place] for place in places):
        key = bisect_right(starts, wanted) - 1
        if key < 0:
            return None
        if key != here:
            container.seek(packets.keys[key][1], stream=stream)
            decoded, here = container.decode(stream), key
        frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= wanted), None)
        if frame is None or frame.pts != wanted:
            return None
        taken.append(_picture(frame))
    return taken


def _in_order(container: Any, stream: Any, total: int, num_frames: int) -> list[Image.Image]:
    """Evenly spaced frames by decoding all; a second time where fewer decode than the file announces."""
    while True:
        container.seek(0, stream=stream)
        places, count, taken = set(frame_places(total, num_frames)), 0, []
        for frame in container.decode(stream):
            if count in places:
                taken.append(_picture(frame))
            count += 1
        if count >= total:
            return taken
        total = count


def _picture(frame: Any) -> Image.Image:
    """RGB, turned as the container says."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
