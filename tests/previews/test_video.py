"""Posters, facts, storyboards and clips of films of all kinds."""

import re
from pathlib import Path

import pytest
import pyvips

from server.previews.models import Unmakeable, Wishes
from server.previews.video import is_dull
from tests.previews.media import TEST_CARD, TONE, color_at, ffmpeg, is_near, make, record

H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
TWO_HALVES = "color=red:s=320x180:r=25:d=1[a];color=blue:s=160x180:r=25:d=1[b];[a][b]overlay=160:0:format=rgb"

FILMS = {
    "h264.mp4": ("video/mp4", "h264", "aac", (*H264, "-c:a", "aac")),
    "h264.mov": ("video/quicktime", "h264", "pcm_s16le", (*H264, "-c:a", "pcm_s16le")),
    "h264.3gp": ("video/3gpp", "h264", "aac", (*H264, "-c:a", "aac")),
    "h264.mkv": ("video/x-matroska", "h264", "flac", (*H264, "-c:a", "flac")),
    "hevc.mp4": ("video/mp4", "hevc", "aac", ("-c:v", "libx265", "-x265-params", "log-level=error", "-c:a", "aac")),
    "ten-bit.mp4": ("video/mp4", "hevc", "aac", ("-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le")),
    "vp8.webm": ("video/webm", "vp8", "vorbis", ("-c:v", "libvpx", "-c:a", "libvorbis")),
    "vp9.webm": ("video/webm", "vp9", "opus", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus")),
    "av1.mp4": ("video/mp4", "av1", "aac", ("-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p", "-c:a", "aac")),
    "mpeg4.avi": ("video/x-msvideo", "mpeg4", "mp3", ("-c:v", "mpeg4", "-q:v", "2", "-c:a", "libmp3lame")),
    "theora.ogv": ("video/ogg", "theora", "vorbis", ("-c:v", "libtheora", "-q:v", "9", "-c:a", "libvorbis")),
    "prores.mov": ("video/quicktime", "prores", None, ("-c:v", "prores_ks", "-an")),
}


@pytest.mark.parametrize("name", FILMS)
def test_codecs_and_containers(name: str, tmp_path: Path) -> None:
    mime_type, video_codec, audio_codec, options = FILMS[name]
    made, output = make(record(tmp_path / name, TEST_CARD, *options, sound=TONE), mime_type)
    assert (made.width, made.height, made.frame_rate) == (320, 180, 25.0)
    assert (made.video_codec, made.audio_codec) == (video_codec, audio_codec)
    assert made.duration_seconds == pytest.approx(2, abs=0.1)
    # Like an image's, and never enlarged.
    assert [(each.variant, each.name, each.width, each.height) for each in made.files] == [("320", "320.webp", 320, 180)]
    assert made.thumbhash is not None
    assert made.average_color is not None
    # The test card's bar on the left is red.
    assert is_near(color_at(output / "320.webp", 0.08, 0.4), (255, 0, 0))


def test_a_poster_in_all_widths(tmp_path: Path) -> None:
    made, _ = make(record(tmp_path / "a.mp4", "testsrc2=s=1920x1080:d=0.2", *H264), "video/mp4")
    assert [(each.variant, each.width, each.height) for each in made.files] == [
        ("320", 320, 180),
        ("640", 640, 360),
        ("1280", 1280, 720),
    ]
    assert (made.width, made.height) == (1920, 1080)


def test_portrait_by_rotation_metadata(tmp_path: Path) -> None:
    lying = record(tmp_path / "lying.mp4", TWO_HALVES, *H264)
    upright = tmp_path / "upright.mp4"
    ffmpeg("-display_rotation", "90", "-i", lying, "-c", "copy", upright)
    made, output = make(upright, "video/mp4", Wishes(storyboard=True, clip=True))
    assert (made.width, made.height) == (180, 320)
    # Turned a quarter against the clock: what was on the left is below.
    poster = output / "320.webp"
    assert (made.files[0].width, made.files[0].height) == (180, 320)
    assert is_near(color_at(poster, 0.5, 0.9), (255, 0, 0))
    assert is_near(color_at(poster, 0.5, 0.1), (0, 0, 255))
    assert "180x320" in ffmpeg("-i", output / "clip.mp4", "-f", "null", "-")
    assert is_near(color_at(output / "storyboard.webp", 0.5, 0.9), (255, 0, 0))


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    source = record(tmp_path / "a.mp4", "testsrc2=s=640x480:d=0.2,setsar=2/1", *H264)
    made, _ = make(source, "video/mp4", Wishes(image_widths=(320,)))
    assert (made.width, made.height) == (1280, 480)
    assert (made.files[0].width, made.files[0].height) == (320, 120)


def test_variable_frame_rate_is_averaged(tmp_path: Path) -> None:
    source = "testsrc2=r=30:d=1[a];testsrc2=r=10:d=1[b];[a][b]concat=n=2"
    made, _ = make(record(tmp_path / "a.mp4", source, *H264, "-fps_mode", "vfr"), "video/mp4")
    # 40 frames, of which ffmpeg takes the last to be as short as the first.
    assert made.frame_rate == pytest.approx(40 / (2 - 1 / 10 + 1 / 30), abs=0.01)
    assert made.duration_seconds == pytest.approx(2, abs=0.1)


def bright_from(seconds: float, ground: str = "black", total: float = 8) -> str:
    parts = f"color={ground}:s=320x180:r=25:d={seconds}[a];color=red:s=160x180:r=25:d={total - seconds}[r]"
    return f"{parts};color=blue:s=320x180:r=25:d={total - seconds}[b];[b][r]overlay=0:0:format=rgb[c];[a][c]concat=n=2"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (bright_from(2), ()),
        (bright_from(2, "white"), ()),
        (bright_from(2, "0x3060a0"), ()),
        # No key frame but the first: found by looking at the first seconds frame by frame.
        (bright_from(3), ("-g", "10000", "-sc_threshold", "0")),
        # A long dark beginning: found by looking further on.
        (bright_from(40, total=100), ("-g", "25")),
    ],
    ids=["black", "white", "blue", "one key frame", "long"],
)
def test_the_poster_is_neither_black_nor_uniform(source: str, options: tuple[str, ...], tmp_path: Path) -> None:
    _, output = make(record(tmp_path / "a.mp4", source, *H264, *options), "video/mp4")
    assert is_near(color_at(output / "320.webp", 0.25, 0.5), (255, 0, 0))
    assert is_near(color_at(output / "320.webp", 0.75, 0.5), (0, 0, 255))


def test_the_poster_is_the_first_such_frame(tmp_path: Path) -> None:
    """Not any later one, which would be whiter and whiter here."""
    source = f"{bright_from(2)},drawbox=color=green:t=fill:enable='gt(t,3)'"
    _, output = make(record(tmp_path / "a.mp4", source, *H264, "-g", "25"), "video/mp4")
    assert is_near(color_at(output / "320.webp", 0.25, 0.5), (255, 0, 0))


def test_a_wholly_black_film_has_a_black_poster(tmp_path: Path) -> None:
    made, output = make(record(tmp_path / "a.mp4", "color=black:s=320x180:d=3", *H264), "video/mp4")
    assert made.duration_seconds == 3
    assert is_near(color_at(output / "320.webp", 0.5, 0.5), (0, 0, 0))


def test_what_is_dull() -> None:
    ramp = bytes(range(48)) * 27
    assert is_dull(bytes(48 * 27))
    assert is_dull(bytes([200]) * (48 * 27))
    assert is_dull(bytes(each // 8 for each in ramp))
    assert not is_dull(ramp)
    assert is_dull(bytes([16]) * (48 * 26) + bytes([255]) * 20 + bytes([16]) * 28)  # a few bright pixels are noise
    assert not is_dull(bytes([16]) * (48 * 25) + bytes([255]) * 96)  # lettering is not


def test_one_frame(tmp_path: Path) -> None:
    made, output = make(record(tmp_path / "a.mp4", TEST_CARD, *H264, "-frames:v", "1"), "video/mp4", Wishes(storyboard=True, clip=True))
    assert made.duration_seconds == 0.04
    assert {each.variant for each in made.files} == {"320", "storyboard", "storyboard_index", "clip"}
    assert is_near(color_at(output / "320.webp", 0.08, 0.4), (255, 0, 0))


def test_a_live_recording_is_measured(tmp_path: Path) -> None:
    options = ("-c:v", "libvpx", "-c:a", "libvorbis", "-live", "1")
    source = record(tmp_path / "a.webm", TEST_CARD, *options, sound=TONE)
    assert "Duration: N/A" in ffmpeg("-i", source, "-c", "copy", "-f", "null", "-")
    made, _ = make(source, "video/webm")
    assert made.duration_seconds == pytest.approx(2, abs=0.05)


def test_truncated(tmp_path: Path) -> None:
    """With its index in front it shows what is left of it, for as long as it should have been; without its index it is lost."""
    for name, options in (("front", ("-movflags", "+faststart")), ("end", ())):
        whole = record(tmp_path / f"{name}.mp4", TEST_CARD, *H264, "-g", "5", *options).read_bytes()
        (tmp_path / f"{name}.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    made, _ = make(tmp_path / "front.mp4", "video/mp4", Wishes(storyboard=True, clip=True))
    assert (made.width, made.duration_seconds) == (320, 2.0)
    assert {each.variant for each in made.files} == {"320", "storyboard", "storyboard_index", "clip"}
    assert refusal(tmp_path / "end.mp4", "video/mp4") == "damaged"


def refusal(source: Path, mime_type: str) -> str:
    with pytest.raises(Unmakeable) as caught:
        make(source, mime_type)
    assert list(source.with_name(source.name + "-previews").iterdir()) == []
    return caught.value.reason


def test_nothing_and_something_else(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    record(tmp_path / "a.png", TEST_CARD, "-frames:v", "1", "-update", "1")
    (tmp_path / "text").write_text("a" * 10_000)
    for mime_type in ("video/mp4", "video/webm", "video/x-msvideo", "video/ogg"):
        for name in ("empty", "a.png", "text"):
            assert refusal(tmp_path / name, mime_type) == "damaged"
            (tmp_path / f"{name}-previews").rmdir()


def test_a_film_of_another_type_than_was_found_is_not_opened(tmp_path: Path) -> None:
    """Each type has one demuxer, which cannot be talked into another."""
    assert refusal(record(tmp_path / "a.mkv", TEST_CARD, *H264), "video/mp4") == "damaged"
    assert refusal(record(tmp_path / "a.mp4", TEST_CARD, *H264), "video/x-msvideo") == "damaged"


def test_codecs_without_a_decoder_are_unsupported(tmp_path: Path) -> None:
    assert refusal(record(tmp_path / "a.avi", TEST_CARD, "-c:v", "wmv2"), "video/x-msvideo") == "unsupported"
    assert refusal(record(tmp_path / "a.mkv", TEST_CARD, "-c:v", "ffv1"), "video/x-matroska") == "unsupported"


def test_an_unknown_sound_does_not_hinder_the_poster(tmp_path: Path) -> None:
    made, _ = make(record(tmp_path / "a.mkv", TEST_CARD, *H264, "-c:a", "wmav2", sound=TONE), "video/x-matroska")
    assert (made.video_codec, made.audio_codec) == ("h264", "wmav2")


def test_high_dynamic_range_is_mapped_to_what_screens_show(tmp_path: Path) -> None:
    to_pq = "zscale=tin=bt709:min=bt709:pin=bt709:rin=tv:t=smpte2084:m=bt2020nc:p=bt2020:npl=203,format=yuv420p10le"
    parameters = "log-level=error:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    source = record(tmp_path / "a.mp4", f"{TEST_CARD},format=yuv420p,{to_pq}", "-c:v", "libx265", "-x265-params", parameters)
    made, output = make(source, "video/mp4", Wishes(storyboard=True, clip=True))
    assert made.video_codec == "hevc"
    # Left unmapped, red is a dull (141, 88, 60).
    for name in ("320.webp", "storyboard.webp"):
        red, green, blue = color_at(output / name, 0.08, 0.4 if name == "320.webp" else 0.5)
        assert red > 200
        assert green < 60
        assert blue < 60
    assert "yuv420p(" in ffmpeg("-i", output / "clip.mp4", "-f", "null", "-")


def test_a_storyboard_and_its_index(tmp_path: Path) -> None:
    """Frames get brighter from left to right and from top to bottom, as the film does with time."""
    source = "color=black:s=320x180:r=5:d=50,geq=lum='16+T*4':cb=128:cr=128"
    made, output = make(record(tmp_path / "a.mp4", source, *H264, "-g", "5"), "video/mp4", Wishes(storyboard=True))
    sprite, index = made.files[-2:]
    assert (sprite.variant, sprite.name, sprite.mime_type, sprite.width, sprite.height) == (
        *("storyboard", "storyboard.webp", "image/webp"),
        *(800, 450),
    )
    assert (index.variant, index.name, index.mime_type) == ("storyboard_index", "storyboard.vtt", "text/vtt")
    picture = pyvips.Image.new_from_file(str(output / "storyboard.webp"))
    assert (picture.width, picture.height) == (800, 450)
    cues = (output / "storyboard.vtt").read_text().split("\n\n")
    assert cues[0] == "WEBVTT"
    assert len(cues) == 26
    assert cues[1] == "00:00:00.000 --> 00:00:02.000\nstoryboard.webp#xywh=0,0,160,90"
    assert cues[8] == "00:00:14.000 --> 00:00:16.000\nstoryboard.webp#xywh=320,90,160,90"
    assert cues[25] == "00:00:48.000 --> 00:00:50.000\nstoryboard.webp#xywh=640,360,160,90\n"
    seen = [color_at(output / "storyboard.webp", (x + 0.5) / 5, (y + 0.5) / 5)[0] for y in range(5) for x in range(5)]
    assert seen == sorted(seen)
    assert len(set(seen)) == 25


def test_a_clip_is_short_silent_and_small_and_tells_nothing(tmp_path: Path) -> None:
    options = (*H264, "-metadata", "location=+48.1373+011.5754/", "-metadata", "title=Secret", "-movflags", "use_metadata_tags")
    source = record(tmp_path / "a.mp4", "testsrc2=s=1280x720:d=10", *options, sound="sine=d=10")
    made, output = make(source, "video/mp4", Wishes(clip=True))
    assert (made.files[-1].variant, made.files[-1].mime_type) == ("clip", "video/mp4")
    clip = (output / "clip.mp4").read_bytes()
    assert b"+48.1373" in source.read_bytes()
    assert b"+48.1373" not in clip
    assert b"Secret" not in clip
    assert clip.index(b"moov") < clip.index(b"mdat")
    said = ffmpeg("-i", output / "clip.mp4", "-f", "null", "-").partition("Stream mapping:")[0]
    assert re.search(r"Duration: 00:00:03\.0", said)
    assert re.search(r"Video: h264.*, yuv420p.*, 480x270", said)
    assert "Audio:" not in said


def test_posters_tell_nothing(tmp_path: Path) -> None:
    options = (*H264, "-metadata", "location=+48.1373+011.5754/", "-metadata", "title=Secret", "-movflags", "use_metadata_tags")
    _, output = make(record(tmp_path / "a.mp4", TEST_CARD, *options), "video/mp4", Wishes(storyboard=True))
    for path in output.iterdir():
        assert b"+48.1373" not in path.read_bytes()
        assert b"Secret" not in path.read_bytes()
