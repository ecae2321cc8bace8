"""Images from under a data root that no path can leave, with every bound checked before pixels are decoded.

A data file is not trusted: a path may be absolute, climb out, go through a link, name a URL, a pipe or a device, and a
file may claim 60,000 x 60,000 pixels.  Each of these is a BadSample, never a hang or an exhausted machine.
"""

import os
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from umer1.data.bad_samples import BadSample
from umer1.errors import UserError

# Decoders that are plain C code over bytes.  Pillow also knows formats that start other programs (EPS): not these.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_SOURCE_PIXELS = 100_000_000  # 300 MB once decoded to RGB
MAX_FILE_BYTES = 256 * 2**20

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file|javascript):", re.IGNORECASE)
_ALLOWED_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_ORIENTATION_TAG = 0x0112


class MediaRoot:
    """Opens images by their path relative to `root`, a directory that exists."""

    def __init__(
        self, root: str | Path, *, max_source_pixels: int = MAX_SOURCE_PIXELS, max_file_bytes: int = MAX_FILE_BYTES
    ):
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise UserError(
                f"the data root {str(root)!r} is not a directory; give the folder that media paths start at"
            )
        # Our own bound on the header's size is what counts, and metadata faults are not the pixels' faults.  Once and
        # for the process: warnings.catch_warnings is not safe where threads decode.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self.max_source_pixels = max_source_pixels
        self.max_file_bytes = max_file_bytes
        self._inside = self.root.rstrip("/") + "/"
        self._folders: dict[str, str] = {}  # relative folder -> its real path, found to be inside

    def resolve(self, relative: str) -> str:
        """The real path of a file under the root; BadSample("path_escape") for anything that leads elsewhere."""
        if not isinstance(relative, str) or not relative:
            raise BadSample("bad_record", f"a media path must be a non-empty string, not {relative!r}")
        if "\0" in relative or relative.startswith("/") or _URL.match(relative):
            raise BadSample("path_escape", f"{relative!r} is not a path relative to the data root")
        folder, _, name = relative.rpartition("/")
        real_folder = self._folders.get(folder)
        if real_folder is None:
            real_folder = self._resolve_folder(relative, folder)
        if name in ("", ".", ".."):
            raise BadSample("path_escape", f"{relative!r} does not name a file")
        path = f"{real_folder}/{name}"
        if os.path.islink(path):
            path = self._real_inside(path, relative)
        return path

    def _resolve_folder(self, relative: str, folder: str) -> str:
        if ".." in folder.split("/"):
            raise BadSample("path_escape", f"{relative!r} climbs out of its folder")
        real = self._real_inside(os.path.join(self.root, folder), relative)
        if len(self._folders) < 65536 and os.path.isdir(real):
            self._folders[folder] = real
        return real

    def _real_inside(self, path: str, relative: str) -> str:
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError) as error:
            raise BadSample("missing_file", f"{relative!r}: {error}") from None
        if real != self.root and not real.startswith(self._inside):
            raise BadSample("path_escape", f"{relative!r} leads out of the data root through a link")
        return real

    def signature(self, relative: str) -> tuple[str, int, int, int] | None:
        """What stays the same as long as the file does; None when it cannot be looked at (opening says why)."""
        try:
            path = self.resolve(relative)
            status = os.stat(path)
        except (BadSample, OSError, ValueError):
            return None
        return path, status.st_ino, status.st_mtime_ns, status.st_size

    def open_image(self, relative: str) -> Image.Image:
        """Decode one image to RGB: upright by its EXIF orientation, transparency on white.

        Raises BadSample: path_escape, missing_file, file_too_large, too_many_pixels, corrupt_image.
        """
        with self.open_file(relative, self.max_file_bytes) as file:
            return self._decode(file, relative, to_rgb)

    def image_size(self, relative: str) -> tuple[int, int]:
        """(width, height) as the file's header has it, no pixel decoded.  Raises BadSample like open_image."""
        with self.open_file(relative, self.max_file_bytes) as file:
            return self._decode(file, relative, lambda image: image.size)

    def open_file(self, relative: str, max_bytes: int) -> BinaryIO:
        """A regular file's bytes.  Raises BadSample: path_escape, missing_file, file_too_large."""
        return _open_regular(self.resolve(relative), relative, max_bytes)

    def _decode(self, file, relative: str, read):
        """`read(image)` of an image whose header is within the bounds."""
        try:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > self.max_source_pixels:
                    raise BadSample(
                        "too_many_pixels",
                        f"{relative!r} is {width} x {height}, more than {self.max_source_pixels} pixels",
                    )
                return read(image)
        except BadSample:
            raise
        except UnidentifiedImageError:
            raise BadSample("corrupt_image", f"{relative!r} is not a {', '.join(FORMATS)} image") from None
        except Image.DecompressionBombError as error:
            raise BadSample("too_many_pixels", f"{relative!r}: {error}") from None
        except MemoryError:
            raise BadSample("too_many_pixels", f"{relative!r} does not fit in memory") from None
        except Exception as error:  # Pillow's decoders raise nearly every type on hostile bytes
            raise BadSample("corrupt_image", f"{relative!r}: {type(error).__name__}: {error}") from None


def _open_regular(path: str, relative: str, max_bytes: int) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device is never opened for good and never waited for."""
    try:
        # stat before open: opening a device can act on it.  O_NONBLOCK: a pipe put there in between must not hang.
        if stat.S_ISREG(os.stat(path).st_mode):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                if status.st_size <= max_bytes:
                    return os.fdopen(fd, "rb")
                os.close(fd)
                raise BadSample("file_too_large", f"{relative!r} has {status.st_size} bytes, more than {max_bytes}")
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSample("missing_file", f"{relative!r}: {reason}") from None
    raise BadSample("missing_file", f"{relative!r} is not a regular file")


def natural_order(name: str) -> tuple[list, str]:
    """What to sort file names by: frame10 stands behind frame9, letters without regard to case."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part.lower() for place, part in enumerate(parts)], name


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as users of Qwen2-VL prepare it: EXIF orientation applied, alpha composited on white."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return _upright(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _from_16_bit(image)
    elif image.mode not in _ALLOWED_MODES:
        raise ValueError(f"pixel mode {image.mode} has no agreed conversion to RGB")
    image = _upright(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # getexif parses; most images have none, and the plain look-up costs nothing.
    if "exif" not in image.info and "Raw profile type exif" not in image.info and image.format != "TIFF":
        return image
    if image.getexif().get(_ORIENTATION_TAG, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 and so turns nearly every 16-bit picture white.
    return image.point(lambda value: value * (1 / 256)).convert("L")
