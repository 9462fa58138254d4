"""Waveforms, covers and facts of sounds of all kinds."""

import json
import struct
from pathlib import Path

import pytest
import pyvips

from server.previews.models import Unmakeable
from tests.previews.media import TEST_CARD, TONE, color_at, ffmpeg, is_near, make, record

SILENT_THEN_LOUD = "aevalsrc='if(lt(t,1),0,0.8*sin(2*PI*440*t))':s=44100:d=2"

SOUNDS = {
    "a.mp3": ("audio/mpeg", "mp3", ("-c:a", "libmp3lame")),
    "a.m4a": ("audio/mp4", "aac", ("-c:a", "aac")),
    "alac.m4a": ("audio/mp4", "alac", ("-c:a", "alac")),
    # Bytes of an MP4 do not say whether there is a picture: the type may be a film's.
    "a.mp4": ("video/mp4", "aac", ("-c:a", "aac")),
    "opus.ogg": ("audio/ogg", "opus", ("-c:a", "libopus")),
    "vorbis.ogg": ("video/ogg", "vorbis", ("-c:a", "libvorbis")),
    "a.wav": ("audio/wav", "pcm_s16le", ("-c:a", "pcm_s16le")),
    "float.wav": ("audio/wav", "pcm_f32le", ("-c:a", "pcm_f32le")),
    "a.flac": ("audio/flac", "flac", ("-c:a", "flac")),
    "a.aac": ("audio/aac", "aac", ("-c:a", "aac")),
    "a.webm": ("audio/webm", "opus", ("-c:a", "libopus")),
    "a.mka": ("audio/x-matroska", "vorbis", ("-c:a", "libvorbis")),
    "a.3gp": ("video/3gpp", "amr_nb", ("-c:a", "libopencore_amrnb", "-ar", "8000", "-ac", "1")),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_codecs_and_containers(name: str, tmp_path: Path) -> None:
    mime_type, codec, options = SOUNDS[name]
    made, output = make(record(tmp_path / name, SILENT_THEN_LOUD, *options), mime_type)
    assert made.duration_seconds == pytest.approx(2, abs=0.1)
    assert (made.audio_codec, made.video_codec, made.width, made.frame_rate) == (codec, None, None, None)
    assert [(each.variant, each.name, each.mime_type, each.width, each.height) for each in made.files] == [
        ("peaks", "peaks.json", "application/json", None, None),
        ("waveform", "waveform.webp", "image/webp", 640, 120),
    ]
    peaks = json.loads((output / "peaks.json").read_bytes())
    assert {key: peaks[key] for key in ("version", "channels", "bits")} == {"version": 2, "channels": 1, "bits": 8}
    assert peaks["length"] == len(peaks["data"]) // 2 == pytest.approx(1000, abs=60)
    assert peaks["length"] * peaks["samples_per_pixel"] / peaks["sample_rate"] == pytest.approx(2, abs=0.1)
    lows, highs = peaks["data"][::2], peaks["data"][1::2]
    assert max(map(abs, peaks["data"][: int(0.9 * peaks["length"])])) < 10
    loud = range(int(1.2 * peaks["length"] / 2), int(1.8 * peaks["length"] / 2))
    assert min(lows[each] for each in loud) == pytest.approx(-102, abs=8)
    assert max(highs[each] for each in loud) == pytest.approx(102, abs=8)
    waveform = pyvips.Image.new_from_file(str(output / "waveform.webp"))
    assert (waveform.width, waveform.height, waveform.hasalpha()) == (640, 120, True)
    inked = [[waveform.getpoint(x, y)[3] > 128 for x in (160, 480)] for y in (5, 30, 60, 90, 115)]
    assert [loud for _, loud in inked] == [False, True, True, True, False]
    assert [inked[0][0], inked[1][0], inked[3][0], inked[4][0]] == [False] * 4


def test_both_channels_are_heard(tmp_path: Path) -> None:
    made, output = make(record(tmp_path / "a.wav", "aevalsrc=0|sin(2*PI*440*t):d=1"), "audio/wav")
    assert made.duration_seconds == 1
    assert max(json.loads((output / "peaks.json").read_bytes())["data"]) > 120


def test_a_cover_becomes_the_picture(tmp_path: Path) -> None:
    cover = {
        kind: record(tmp_path / f"a.{kind}", "color=orange:s=500x500:d=1", "-frames:v", "1", "-update", "1") for kind in ("jpg", "png")
    }
    for name, kind, mime_type in (("a.mp3", "jpg", "audio/mpeg"), ("b.mp3", "png", "audio/mpeg"), ("a.m4a", "jpg", "video/mp4")):
        plain = record(tmp_path / f"plain-{name}", TONE)
        source = tmp_path / name
        ffmpeg("-i", plain, "-i", cover[kind], "-map", "0", "-map", "1", "-c", "copy", "-disposition:v", "attached_pic", source)
        made, output = make(source, mime_type)
        assert [each.variant for each in made.files] == ["peaks", "waveform", "320", "640"]
        assert (made.files[2].width, made.files[2].height, made.files[3].width) == (320, 320, 500)
        assert is_near(color_at(output / "320.webp", 0.5, 0.5), (255, 165, 0))
        assert made.thumbhash is not None
        assert (made.width, made.video_codec, made.average_color is not None) == (None, None, True)


def test_a_damaged_cover_is_as_none(tmp_path: Path) -> None:
    cover = record(tmp_path / "a.jpg", TEST_CARD, "-frames:v", "1", "-update", "1")
    plain, source = record(tmp_path / "plain.mp3", TONE), tmp_path / "a.mp3"
    ffmpeg("-i", plain, "-i", cover, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v", "attached_pic", source)
    inside = cover.read_bytes()[20:]
    assert inside in source.read_bytes()
    source.write_bytes(source.read_bytes().replace(inside, bytes(len(inside))))
    made, _ = make(source, "audio/mpeg")
    assert [each.variant for each in made.files] == ["peaks", "waveform"]


@pytest.mark.parametrize("sound", ["if(lt(t,6),0,random(0)-0.5)", "if(lt(t,2),random(0)-0.5,0)"], ids=["too long", "too short"])
def test_a_length_that_is_only_estimated_is_measured(sound: str, tmp_path: Path) -> None:
    source = record(tmp_path / "a.aac", f"aevalsrc='{sound}':s=44100:d=20", "-c:a", "aac", "-b:a", "128k")
    assert "Duration: 00:00:20" not in ffmpeg("-f", "aac", "-i", source, "-t", "0.1", "-f", "null", "-")
    made, output = make(source, "audio/aac")
    assert made.duration_seconds == pytest.approx(20, abs=0.1)
    peaks = json.loads((output / "peaks.json").read_bytes())
    assert peaks["length"] == pytest.approx(1000, abs=60)
    assert peaks["length"] * peaks["samples_per_pixel"] / peaks["sample_rate"] == pytest.approx(20, abs=0.2)


def test_a_length_that_is_a_lie_does_not_make_more_peaks(tmp_path: Path) -> None:
    source = record(tmp_path / "a.mka", "sine=d=20", "-c:a", "flac")
    content = bytearray(source.read_bytes())
    at = content.index(bytes.fromhex("448988")) + 3  # Duration, eight bytes, in milliseconds
    struct.pack_into(">d", content, at, 1_000.0)
    source.write_bytes(content)
    made, output = make(source, "audio/x-matroska")
    assert made.duration_seconds == pytest.approx(20, abs=0.1)
    peaks = json.loads((output / "peaks.json").read_bytes())
    assert 1000 < peaks["length"] <= 2000
    assert peaks["length"] * peaks["samples_per_pixel"] / peaks["sample_rate"] == pytest.approx(20, abs=0.2)


def test_truncated_sound_is_as_long_as_what_is_left(tmp_path: Path) -> None:
    source = record(tmp_path / "a.wav", TONE)
    source.write_bytes(source.read_bytes()[: 44 + 44_100 * 2])
    made, _ = make(source, "audio/wav")
    assert made.duration_seconds == pytest.approx(1, abs=0.01)


def test_half_a_day_is_told_but_not_drawn(tmp_path: Path) -> None:
    made, _ = make(record(tmp_path / "a.flac", f"anullsrc=r=1000:cl=mono:d={13 * 3600}"), "audio/flac")
    assert (made.duration_seconds, made.audio_codec, made.files) == (13 * 3600, "flac", [])


def refusal(source: Path, mime_type: str) -> str:
    with pytest.raises(Unmakeable) as caught:
        make(source, mime_type)
    assert list(source.with_name(source.name + "-previews").iterdir()) == []
    return caught.value.reason


def test_nothing_and_something_else(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("a" * 10_000)
    for mime_type in ("audio/mpeg", "audio/wav", "audio/flac", "audio/ogg", "audio/mp4"):
        for name in ("empty", "text"):
            assert refusal(tmp_path / name, mime_type) == "damaged"
            (tmp_path / f"{name}-previews").rmdir()


def test_codecs_without_a_decoder_are_unsupported(tmp_path: Path) -> None:
    assert refusal(record(tmp_path / "a.mka", TONE, "-c:a", "wmav2"), "audio/x-matroska") == "unsupported"
