"""Media under the data root: paths of pair files, frames of videos, pictures held inside parquet files."""

import hashlib
import io
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from umer1.atomic_directory import aside_path, publish
from umer1.data.bad_samples import BadSample
from umer1.data.media import FORMATS, MAX_FILE_BYTES, MediaRoot, natural_order
from umer1.data.video_files import MAX_VIDEO_BYTES, frame_places, is_video_file, sample_frames
from umer1.files import atomic_path

_LEFT_SECONDS = 3600.0  # after which an unfinished folder is a killed run's
_JPEG_QUALITY = 95  # of a frame that training reads
_FRAME_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Library:
    """Turns what a row names into paths relative to the data root.

    num_frames: most frames of a video.  folder: where pictures from inside parquet files and frames of video files go,
    below the root; their names are hashes, so that a second pass and a second run write nothing.
    """

    def __init__(self, media: MediaRoot, *, num_frames: int, folder: str):
        self.media, self.num_frames, self.folder = media, num_frames, folder

    def image(self, value: Any, media_folder: str) -> str:
        """The path of a picture given as a path or as {bytes, path}.  Raises BadSample."""
        if isinstance(value, dict):
            content = value.get("bytes")
            if content and isinstance(content, bytes):
                return self._keep(content)
            value = None if content else value.get("path")  # text, which JSON has in place of bytes, has no agreed form
        if not isinstance(value, str) or not value:
            raise BadSample("bad_record", "an image must be a path, or {bytes, path}")
        return _below(media_folder, value)

    def frames(self, video: str, media_folder: str) -> tuple[str, ...]:
        """Evenly spaced frames of a video's folder, in natural order, or of a video file.  Raises BadSample."""
        relative = _below(media_folder, video)
        if is_video_file(relative) and not os.path.isdir(self.media.resolve(relative)):
            return self._frames_of_file(relative)
        try:
            names = sorted(filter(_is_frame, os.listdir(self.media.resolve(relative))), key=natural_order)
        except (OSError, ValueError) as error:  # ValueError: a name that no file system has
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadSample("missing_file", f"{relative!r} is no folder of frames: {reason}") from None
        if not names:
            raise BadSample("missing_file", f"{relative!r} holds no frames")
        return tuple(f"{relative}/{names[place]}" for place in frame_places(len(names), self.num_frames))

    def _frames_of_file(self, relative: str) -> tuple[str, ...]:
        """Frames of a video file as pictures, decoded and written once, in a folder named by path, size and number."""
        with self.media.open_file(relative, MAX_VIDEO_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
        identity = f"{relative}\0{size}\0{self.num_frames}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(identity).hexdigest()
        folder = f"{self.folder}/{digest[:2]}/{digest}"
        path = Path(self.media.root, folder)
        if not path.exists():
            frames = sample_frames(self.media, relative, self.num_frames)
            aside = aside_path(path)
            for left in path.parent.glob(aside.name.rpartition("-")[0] + "-*"):  # by a run that was killed
                if time.time() - left.stat().st_mtime > _LEFT_SECONDS:  # and not of one that is at work
                    shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                for number, frame in enumerate(frames):
                    frame.save(aside / f"{number}.jpg", quality=_JPEG_QUALITY)
                publish(aside, path)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return tuple(f"{folder}/{name}" for name in sorted(os.listdir(path), key=natural_order))

    def _keep(self, content: bytes) -> str:
        if len(content) > MAX_FILE_BYTES:
            raise BadSample("file_too_large", f"a picture has {len(content)} bytes, more than {MAX_FILE_BYTES}")
        digest = hashlib.sha256(content).hexdigest()
        relative = f"{self.folder}/{digest[:2]}/{digest}.{_ending(content)}"
        path = Path(self.media.root, relative)
        if not path.exists():
            with atomic_path(path) as aside:
                aside.write_bytes(content)
        return relative


def _below(folder: str, path: str) -> str:
    if path.startswith("/"):
        raise BadSample("path_escape", f"{path!r} is not a path relative to the data root")
    # one spelling for one file: pairs are told apart by their paths
    return "/".join(part for part in f"{folder}/{path}".split("/") if part not in ("", "."))


def _is_frame(name: str) -> bool:
    return name.lower().endswith(_FRAME_NAMES) and not name.startswith(".")


def _ending(content: bytes) -> str:
    """The file name's ending, by the picture's header."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return {"JPEG": "jpg"}.get(image.format, image.format.lower())
    except Exception as error:  # Pillow's readers raise nearly every type on hostile bytes
        raise BadSample("corrupt_image", f"a picture inside the file: {type(error).__name__}: {error}") from None
