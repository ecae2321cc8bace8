"""Frames of video files: those that decoding everything gives, and nothing that a hostile file could reach by them."""

import random
import sys

import numpy as np
import pytest

from umer1.data import video_files
from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot

av = pytest.importorskip("av")
# name -> codec and its options; B-frames and open groups make decoding order differ from that of presentation
KINDS = {
    "b.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "open.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "b.mkv": ("libx264", {"g": "12"}),
    "v.webm": ("libvpx-vp9", {"g": "15"}),
    "m.avi": ("mpeg4", {"g": "10", "bf": "2"}),
}


def write_video(path, *, frames=40, codec="libx264", options=None, size=(96, 64), rotation=0, title=None):
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), 5 * index % 256, np.uint8)
            pixels[:16, : 2 * index % size[0]] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def all_frames(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def cause(media, path) -> str:
    with pytest.raises(BadSample) as caught:
        video_files.sample_frames(media, path, 8)
    return caught.value.cause


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seeking", [True, False])
def test_frames_are_those_of_decoding_everything(tmp_path, monkeypatch, name, seeking):
    codec, options = KINDS[name]
    every = all_frames(write_video(tmp_path / name, codec=codec, options=options))
    ways = []
    by_seeking = video_files._by_seeking

    def watched(*arguments):
        ways.append(by_seeking(*arguments) if seeking else None)
        return ways[-1]

    monkeypatch.setattr(video_files, "_by_seeking", watched)
    assert len(every) == 40
    media = MediaRoot(tmp_path)
    for count in (1, 3, 8, 40, 100):
        got = video_files.sample_frames(media, name, count)
        places = [int(np.floor(i * 39 / (count - 1))) if count > 1 else 0 for i in range(count)]
        want = [every[place] for place in places] if count < 40 else every
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in got]), np.stack(want))
        assert video_files.video_shape(media, name, count) == (96, 64, min(count, 40))
    assert all((way is not None) == seeking for way in ways)


def test_a_rotation_is_applied(tmp_path):
    every = all_frames(write_video(tmp_path / "r.mp4", frames=3, rotation=90))
    first = video_files.sample_frames(MediaRoot(tmp_path), "r.mp4", 1)[0]
    np.testing.assert_array_equal(np.asarray(first), np.rot90(every[0]))


def test_titles_may_be_in_any_encoding(tmp_path):
    path = write_video(tmp_path / "t.mp4", frames=3, title="cafe-cafe")
    data = path.read_bytes()
    assert data.count(b"cafe-cafe") == 1
    path.write_bytes(data.replace(b"cafe-cafe", b"caf\xe9-caf\xe9"))  # Latin-1
    assert len(video_files.sample_frames(MediaRoot(tmp_path), "t.mp4", 8)) == 3


def test_bounds_are_checked_before_decoding(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(video_files, "_by_seeking", None)  # decoding would be a TypeError, so a corrupt video
    assert cause(MediaRoot(tmp_path, max_source_pixels=96 * 64 - 1), "a.mp4") == "too_many_pixels"
    for bound, limit, words in (
        ("MAX_VIDEO_FRAMES", 39, "too_many_frames"),
        ("MAX_VIDEO_SECONDS", 1, "too_many_frames"),
        ("_MAX_TAKEN_PIXELS", 8 * 96 * 64 - 1, "too_many_pixels"),
        ("MAX_VIDEO_BYTES", 100, "file_too_large"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video_files, bound, limit)
            assert cause(MediaRoot(tmp_path), "a.mp4") == words


def test_paths_and_files_that_name_other_files(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    outside = write_video(tmp_path / "secret.mp4")
    (root / "link.mp4").symlink_to(outside)
    (root / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{outside}\n#EXT-X-ENDLIST\n")
    (root / "joined.mp4").write_text(f"ffconcat version 1.0\nfile {outside}\n")
    media = MediaRoot(root)
    assert [cause(media, name) for name in ("../secret.mp4", str(outside), "link.mp4")] == ["path_escape"] * 3
    assert [cause(media, name) for name in ("list.mp4", "joined.mp4")] == ["corrupt_video"] * 2
    assert cause(media, "none.mp4") == "missing_file"


def test_damaged_files_are_bad_samples_or_fewer_frames(tmp_path):
    seed = random.randrange(2**31)
    draw = random.Random(seed)
    write_video(tmp_path / "a.mp4", options={"g": "12"})
    whole = (tmp_path / "a.mp4").read_bytes()
    for damage in range(30):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 30, 300))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "d.mp4").write_bytes(content[: draw.randrange(len(content)) if damage % 3 == 0 else None])
        try:
            taken = len(video_files.sample_frames(MediaRoot(tmp_path), "d.mp4", 8))
        except BadSample as error:
            assert error.cause in ("corrupt_video", "too_many_pixels", "too_many_frames"), f"seed {seed}: {error}"
        else:
            assert 1 <= taken <= 8, f"seed {seed}"


@pytest.mark.parametrize("name", ["e.avi", "e.mp4", "e.mkv"])
def test_a_header_without_a_frame_is_a_corrupt_video(tmp_path, name):
    """No frames, and in the first fragment of an MP4 no size either: asked for its shape, it has none to divide by."""
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "e.mp4" else {}
    with av.open(str(tmp_path / name), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    assert cause(MediaRoot(tmp_path), name) == "corrupt_video"
    with pytest.raises(BadSample, match="corrupt_video"):
        video_files.video_shape(MediaRoot(tmp_path), name, 8)


def test_without_the_decoder_the_cause_says_what_helps(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", frames=2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadSample, match=r"pip install av\); or save its frames as pictures") as caught:
        video_files.sample_frames(MediaRoot(tmp_path), "a.mp4", 8)
    assert caught.value.cause == "no_video_decoder"
    assert video_files.is_video_file("a/B.MP4") and not video_files.is_video_file("a.mp4/1.jpg")
