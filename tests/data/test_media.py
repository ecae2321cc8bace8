"""Nothing under a data root, and no path in a file, can read elsewhere, hang, or exhaust the machine."""

import io
import os
import socket
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_tools import write_picture
from PIL import Image

from umer1.data.bad_samples import CAUSES, BadSample
from umer1.data.media import MediaRoot, to_rgb
from umer1.errors import UserError


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def cause(media: MediaRoot, path) -> str:
    with pytest.raises(BadSample) as caught:
        media.open_image(path)
    assert caught.value.detail
    return caught.value.cause


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "a/../in.png",
        "..",
        "http://host/x.png",
        "file:///etc/passwd",
    ]
    + ["data:image/png;base64,AAAA", "x\0y.png", "a/", "."],
)
def test_paths_that_lead_elsewhere(tmp_path, path):
    write_picture(tmp_path, "secret.png")
    write_picture(tmp_path / "root", "in.png")
    write_picture(tmp_path / "root", "a/in.png")
    assert cause(MediaRoot(tmp_path / "root"), path) == "path_escape"


def test_links_out_are_refused_and_links_inside_followed(tmp_path):
    root = tmp_path / "root"
    write_picture(tmp_path, "outside/secret.png")
    write_picture(root, "real/in.png")
    (root / "file.png").symlink_to(tmp_path / "outside/secret.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inner.png").symlink_to(root / "real/in.png")
    (root / "inner").symlink_to("real")
    (root / "loop.png").symlink_to("loop.png")
    (root / "twin").symlink_to(tmp_path / "root-twin")
    write_picture(tmp_path, "root-twin/in.png")  # shares the root's name as a prefix
    media = MediaRoot(root)
    for path in ("file.png", "folder/secret.png", "twin/in.png"):
        assert cause(media, path) == "path_escape"
    assert media.open_image("inner.png").size == media.open_image("inner/in.png").size == (56, 56)
    assert cause(media, "loop.png") == "missing_file"


def test_a_root_that_is_itself_a_link_works(tmp_path):
    write_picture(tmp_path / "disk", "a.png")
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    assert MediaRoot(tmp_path / "root").open_image("a.png").size == (56, 56)
    with pytest.raises(UserError, match="not a directory"):
        MediaRoot(tmp_path / "nowhere")


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's path may have 108 bytes at most
    try:
        server.bind("socket.png")
    finally:
        os.chdir(here)
        server.close()
    media = MediaRoot(tmp_path)
    names = ["pipe.png", "folder.png", "socket.png", "none.png", "no/such/folder.png", "n" * 300, "\ud800.png"]
    if os.geteuid() == 0:
        try:
            os.mknod(tmp_path / "device.png", 0o020666, os.makedev(1, 5))  # /dev/zero: endless
            names.append("device.png")
        except PermissionError:
            pass  # a container without mknod
    for name in names:
        assert cause(media, name) == "missing_file", name


@pytest.mark.parametrize("value", [None, 7, ["a.png"], "", b"a.png"])
def test_paths_that_are_no_strings(tmp_path, value):
    assert cause(MediaRoot(tmp_path), value) == "bad_record"


def test_bombs_and_bounds_are_found_before_decoding(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    (tmp_path / "wide.png").write_bytes(png_header(2**31 - 1, 2**31 - 1))
    (tmp_path / "pbm.ppm").write_bytes(b"P6 60000 60000 255\n" + b"\0" * 100)
    write_picture(tmp_path, "fair.png", 40, 50)
    assert cause(MediaRoot(tmp_path), "bomb.png") == "too_many_pixels"
    assert cause(MediaRoot(tmp_path), "wide.png") == "too_many_pixels"
    assert cause(MediaRoot(tmp_path), "pbm.ppm") == "too_many_pixels"
    assert cause(MediaRoot(tmp_path, max_source_pixels=1999), "fair.png") == "too_many_pixels"
    assert MediaRoot(tmp_path, max_source_pixels=2000).open_image("fair.png").size == (40, 50)
    assert cause(MediaRoot(tmp_path, max_file_bytes=100), "fair.png") == "file_too_large"


def test_damaged_files_are_bad_samples_whatever_the_damage(tmp_path):
    rng = np.random.default_rng(0)
    media = MediaRoot(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    for name in ("empty.png", "text.png", "page.eps"):
        assert cause(media, name) == "corrupt_image"
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    decoded = failed = 0
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        whole = buffer.getvalue()
        for attempt in range(40):
            data = bytearray(whole)
            if attempt % 2:
                data = data[: int(rng.integers(1, len(data)))]
            else:
                for _ in range(int(rng.integers(1, 30))):
                    data[int(rng.integers(0, min(len(data), 400)))] = int(rng.integers(0, 256))
            (tmp_path / "damaged").write_bytes(bytes(data))
            try:
                image = media.open_image("damaged")
                assert image.mode == "RGB"
                decoded += 1
            except BadSample as error:
                assert error.cause in CAUSES
                failed += 1
    assert failed > 100 and decoded > 0
    # every format is refused when cut in half
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert cause(media, "half.png") == "corrupt_image"


def test_a_wrong_extension_does_not_matter(tmp_path):
    write_picture(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert MediaRoot(tmp_path).open_image("a.jpg").size == (56, 56)


def test_modes_become_rgb(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    np.testing.assert_array_equal(np.asarray(to_rgb(grey))[..., 1], np.asarray(grey))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert list(map(tuple, np.asarray(to_rgb(palette))[0].tolist())) == [(10, 20, 30), (40, 50, 60)]
    palette.save(tmp_path / "p.png", transparency=1)  # the second colour is transparent: white shows
    seen = np.asarray(MediaRoot(tmp_path).open_image("p.png"))
    assert seen[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)
    deep = Image.fromarray(np.array([[0, 256 * 100, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert np.asarray(MediaRoot(tmp_path).open_image("deep.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 20), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "turned.png", exif=exif)
    for name in ("turned.jpg", "turned.png"):
        assert MediaRoot(tmp_path).open_image(name).size == (20, 30)


def test_no_warning_of_pillow_reaches_the_user(tmp_path):
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    (tmp_path / "half.tif").write_bytes(b"II*\0\x08\0\0\0\xff\0" + b"\1" * 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        media = MediaRoot(tmp_path)
        assert media.open_image("p.png").getpixel((0, 0)) == (255, 255, 255)
        assert cause(media, "half.tif") == "corrupt_image"


def test_threads_may_decode_together(tmp_path):
    for index in range(20):
        write_picture(tmp_path, f"{index}.png", 40, 40, seed=index)
    media = MediaRoot(tmp_path)
    names = [f"{index % 20}.png" for index in range(400)]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda name: media.open_image(name).tobytes(), names))
    assert threaded == [media.open_image(name).tobytes() for name in names]
    assert warnings.filters == filters
