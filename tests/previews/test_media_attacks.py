"""Playlists and references dressed as films, and bombs: nothing outside the file is touched, and caps hold (ATTACKS.md 2 and 3)."""

import asyncio
import random
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from server.previews import jail
from server.previews.ffmpeg import DEMUXERS, MOST_PIXELS, MOST_STREAMS, opened, run
from server.previews.models import Unmakeable, Wishes
from tests.previews.media import TEST_CARD, color_at, ffmpeg, is_near, make, record

H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
EVERYTHING = Wishes(storyboard=True, clip=True)


class Outside:
    """What an attack wants: an address that counts its callers, and a film of one colour in a file of its own."""

    def __init__(self, listener: socket.socket, canary: Path) -> None:
        self._listener = listener
        self.canary = canary
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"

    def calls(self) -> int:
        count = 0
        while True:
            try:
                self._listener.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield Outside(listener, record(tmp_path / "canary.ts", "color=magenta:s=320x180:d=2", *H264))


def playlists(outside: Outside) -> dict[str, bytes]:
    """By name: texts that have a player open other files and addresses."""
    url, path = f"http://{outside.address}/a.ts", outside.canary
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXTINF:2,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "hls-file": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
        "hls-concat": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nconcat:{path}|{url}\n#EXT-X-ENDLIST\n",
        "hls-key": f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n',
        "hls-map": f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MAP:URI="{url}"\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n',
        "hls-master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://{outside.address}/b.m3u8\n",
        "concat": f"ffconcat version 1.0\nfile {path}\nfile {url}\n",
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" codecs="avc1">'
            f'<BaseURL>{url}</BaseURL><SegmentList duration="2"><SegmentURL media="{url}"/></SegmentList>'
            "</Representation></AdaptationSet></Period></MPD>"
        ),
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {outside.address[10:]} RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "images": f"{path.parent}/%03d.png",
        "rtsp": f"[reference]\nRef1=rtsp://{outside.address}/a\n",
    }
    return {name: text.encode() for name, text in texts.items()}


DISGUISES = {
    "video/mp4": b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isommp42",
    "video/x-msvideo": b"RIFF\x00\x10\x00\x00AVI LIST",
    "video/webm": bytes.fromhex("1a45dfa3") + b"\x9f\x42\x86\x81\x01\x42\x82\x84webm",
    "video/ogg": b"OggS\x00\x02" + bytes(20),
    "audio/mpeg": b"ID3\x04\x00\x00\x00\x00\x00\x00",
    "audio/wav": b"RIFF\x00\x10\x00\x00WAVEfmt ",
    "audio/aac": b"\xff\xf1\x50\x80\x02\x1f\xfc",
    "audio/flac": b"fLaC",
}


def test_the_bait_is_live(outside: Outside, tmp_path: Path) -> None:
    """Without protection ffmpeg does what the texts say; otherwise the tests below would show nothing."""
    (tmp_path / "a.m3u8").write_bytes(playlists(outside)["hls"])
    ffmpeg("-protocol_whitelist", "file,http,tcp", "-rw_timeout", "200000", "-i", tmp_path / "a.m3u8", "-f", "null", "-")
    assert outside.calls() > 0
    (tmp_path / "a.ffconcat").write_bytes(playlists(outside)["concat"].partition(b"file http")[0])
    ffmpeg("-f", "concat", "-safe", "0", "-i", tmp_path / "a.ffconcat", "-frames:v", "1", tmp_path / "got.png")
    assert is_near(color_at(tmp_path / "got.png", 0.5, 0.5), (255, 0, 255))


@pytest.fixture(params=["jail", "no jail"])
def jail_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with nothing but ffmpeg's options in the way."""

    async def run_freely(command: list[str], source: Path, output: Path, **_: object) -> jail.Finished:
        with source.open("rb") as film:
            program = ["sh", "-c", 'exec "$@" 3<&0', "sh", *command]
            done = subprocess.run(program, cwd=output, stdin=film, capture_output=True, check=False, timeout=20)  # noqa: ASYNC221 - nothing else is to be done
        return jail.Finished(status=done.returncode, stdout=done.stdout, stderr=done.stderr)

    if request.param == "no jail":
        monkeypatch.setattr(jail, "run", run_freely)


@pytest.mark.usefixtures("jail_or_none")
@pytest.mark.parametrize("mime_type", DISGUISES)
def test_playlists_in_disguise_open_nothing(mime_type: str, outside: Outside, tmp_path: Path) -> None:
    for name, text in playlists(outside).items():
        for number, content in enumerate((text, DISGUISES[mime_type] + b"\n" + text)):
            source = tmp_path / f"{name}-{number}"
            source.write_bytes(content)
            with pytest.raises(Unmakeable, match=r"damaged|unsupported"):
                make(source, mime_type, EVERYTHING)
            assert list((tmp_path / f"{name}-{number}-previews").iterdir()) == []
    assert outside.calls() == 0


def test_the_jail_alone_keeps_ffmpeg_from_all_of_it(outside: Outside, tmp_path: Path) -> None:
    """Were its options once got round."""
    output = tmp_path / "output"
    output.mkdir()
    program = imageio_ffmpeg.get_ffmpeg_exe()
    for name, text in playlists(outside).items():
        source = tmp_path / name
        source.write_bytes(text)
        command = [program, *("-nostdin", "-y", "-protocol_whitelist", "file,http,tcp,udp,rtp,rtsp,concat,crypto,data", "-safe", "0")]
        if not name.startswith("concat"):
            command[-2:] = []
        command += [*("-allowed_extensions", "ALL") * name.startswith("hls"), "-i", jail.INPUT, "-frames:v", "1", "got.png"]
        finished = asyncio.run(jail.run(command, source, output))
        assert finished.status != 0, name
    assert list(output.iterdir()) == []
    assert outside.calls() == 0


@pytest.mark.usefixtures("jail_or_none")
def test_an_mp4_that_keeps_its_pictures_elsewhere(outside: Outside, tmp_path: Path) -> None:
    """A data reference (`alis` in `dref`) has the demuxer read another file at the offsets that this one gives."""
    honest = record(tmp_path / "honest.mp4", "color=magenta:s=320x180:d=2", *H264, "-movflags", "-faststart")
    source = tmp_path / "elsewhere.mp4"
    source.write_bytes(referring(honest.read_bytes(), honest))
    shown = tmp_path / "got.png"
    ffmpeg("-enable_drefs", "1", "-use_absolute_path", "1", "-i", source, "-frames:v", "1", shown)
    assert is_near(color_at(shown, 0.5, 0.5), (255, 0, 255))
    with pytest.raises(Unmakeable):
        make(source, "video/mp4", EVERYTHING)


def referring(film: bytes, target: Path) -> bytes:
    """The film with its index last, without its pictures, for which it refers to the file `target`."""
    at = film.index(b"mdat") + 4
    index = film.index(b"moov") - 4
    film = film[:at] + bytes(index - at) + film[index:]
    # macOS' alias record: names in fixed fields, then a list of which only the absolute path (2) is of use.
    path = f"disk{target}".replace("/", ":").encode()
    path += b"\0" * (len(path) % 2)
    alias = bytes(10) + b"\x04disk".ljust(28, b"\0") + bytes(12) + b"\x01x".ljust(64, b"\0") + bytes(16 + 4 + 16)
    alias += struct.pack(">hH", 2, len(path)) + path + struct.pack(">hH", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    start = film.index(b"dref") + 12
    assert film[start + 4 : start + 8] == b"url "
    grown = film[:start] + entry + film[start + 12 :]
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = grown.rindex(box, 0, start) - 4 if box != b"dref" else start - 16
        (size,) = struct.unpack_from(">I", grown, place)
        grown = grown[:place] + struct.pack(">I", size + len(entry) - 12) + grown[place + 4 :]
    return grown


@pytest.mark.usefixtures("jail_or_none")
def test_subtitles_in_an_avi_that_are_a_playlist(outside: Outside, tmp_path: Path) -> None:
    """AVI's GAB2 subtitles are a file in the file, whose type the demuxer guesses from its bytes."""
    film = record(tmp_path / "a.avi", TEST_CARD, "-c:v", "mpeg4").read_bytes()
    for name, text in playlists(outside).items():
        payload = b"GAB2\0\x02\0" + struct.pack("<I", 2) + b"s\0" + struct.pack("<HI", 4, len(text)) + text
        source = tmp_path / f"{name}.avi"
        source.write_bytes(with_subtitles(film, payload))
        assert "Stream #0:1: " in ffmpeg("-protocol_whitelist", "file", "-i", source, "-map", "0:v", "-f", "null", "-")
        made, output = make(source, "video/x-msvideo")
        assert made.video_codec == "mpeg4"
        assert is_near(color_at(output / "320.webp", 0.08, 0.4), (255, 0, 0))
    assert outside.calls() == 0


def test_no_demuxer_runs_inside_another(tmp_path: Path) -> None:
    film = record(tmp_path / "a.avi", TEST_CARD, "-c:v", "mpeg4").read_bytes()
    text = b"1\n00:00:00,000 --> 00:00:02,000\nHello\n\n"
    payload = b"GAB2\0\x02\0" + struct.pack("<I", 2) + b"s\0" + struct.pack("<HI", 4, len(text)) + text
    source = tmp_path / "b.avi"
    source.write_bytes(with_subtitles(film, payload))
    assert "Subtitle: subrip" in ffmpeg("-i", source, "-map", "0:v", "-f", "null", "-")
    finished = asyncio.run(run(opened("video/x-msvideo")["V:0"].output("-", f="null", c="copy"), source, tmp_path))
    assert b"Video: mpeg4" in finished.stderr
    assert b"subrip" not in finished.stderr


def with_subtitles(avi: bytes, payload: bytes) -> bytes:
    """The AVI with a second stream, of text, whose one packet is `payload`; without an index, which need not be."""
    header = struct.pack("<4s4sIHHIIIIIIIIHHHH", b"txts", b"\0\0\0\0", 0, 0, 0, 0, 1, 25, 0, 1, len(payload), 0, 0, 0, 0, 0, 0)
    stream = b"LIST" + struct.pack("<I", 4 + 8 + len(header) + 8) + b"strl" + b"strh" + struct.pack("<I", len(header)) + header
    stream += b"strf" + struct.pack("<I", 0)
    packet = b"01tx" + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    main = avi.index(b"LIST")
    (size,) = struct.unpack_from("<I", avi, main + 4)
    grown = avi[: main + 4] + struct.pack("<I", size + len(stream)) + avi[main + 8 : main + 8 + size] + stream + avi[main + 8 + size :]
    streams = grown.index(b"avih") + 8 + 24
    grown = grown[:streams] + struct.pack("<I", 2) + grown[streams + 4 :]
    movi = grown.index(b"movi")
    (size,) = struct.unpack_from("<I", grown, movi - 4)
    grown = grown[: movi - 4] + struct.pack("<I", size + len(packet)) + b"movi" + packet + grown[movi + 4 :]
    return grown[:4] + struct.pack("<I", len(grown) - 8) + grown[8:]


# Bombs


def test_a_day_long_film(tmp_path: Path) -> None:
    source = record(tmp_path / "a.mp4", "testsrc2=s=64x64:r=1/4:d=86400", *H264, "-g", "10")
    made, _ = make(source, "video/mp4", EVERYTHING)
    assert made.duration_seconds == 86_400
    assert {each.variant for each in made.files} == {"320", "storyboard", "storyboard_index", "clip"}


def test_a_film_that_claims_to_be_a_day_long(tmp_path: Path) -> None:
    film = bytearray(record(tmp_path / "a.mp4", TEST_CARD, *H264).read_bytes())
    scale_at = film.index(b"mvhd") + 16
    (scale,) = struct.unpack_from(">I", film, scale_at)
    struct.pack_into(">I", film, scale_at + 4, scale * 86_400)
    (tmp_path / "a.mp4").write_bytes(film)
    made, _ = make(tmp_path / "a.mp4", "video/mp4", EVERYTHING)
    assert made.files[0].variant == "320"


@pytest.mark.parametrize(
    ("name", "mime_type", "options"),
    [
        ("a.mp4", "video/mp4", H264),
        ("a.mkv", "video/x-matroska", ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error")),
    ],
    ids=["h264", "hevc"],
)
def test_frames_above_the_cap_are_too_large(name: str, mime_type: str, options: tuple[str, ...], tmp_path: Path) -> None:
    size = (8192, MOST_PIXELS // 8192 + 16)
    source = record(tmp_path / name, f"color=gray:s={size[0]}x{size[1]}:d=0.04", *options)
    assert refusal(source, mime_type) == "too_large"


def test_headers_that_claim_enormous_frames(tmp_path: Path) -> None:
    vp9 = bytearray(record(tmp_path / "vp9.webm", TEST_CARD, "-c:v", "libvpx-vp9", "-cpu-used", "8", "-frames:v", "1").read_bytes())
    at = vp9.index(bytes.fromhex("498342"))  # a key frame's sync code; half a byte on are two 16-bit numbers
    vp9[at + 3 : at + 8] = bytes([vp9[at + 3] | 0x0F]) + b"\xff\xff\xff" + bytes([vp9[at + 7] | 0xF0])
    (tmp_path / "vp9.webm").write_bytes(vp9)
    assert refusal(tmp_path / "vp9.webm", "video/webm") == "too_large"
    vp8 = bytearray(record(tmp_path / "vp8.webm", TEST_CARD, "-c:v", "libvpx", "-frames:v", "1").read_bytes())
    at = vp8.index(bytes.fromhex("9d012a"))
    vp8[at + 3 : at + 7] = b"\xff\x3f\xff\x3f"
    (tmp_path / "vp8.webm").write_bytes(vp8)
    assert refusal(tmp_path / "vp8.webm", "video/webm") == "too_large"
    jpegs = bytearray(record(tmp_path / "a.avi", TEST_CARD, "-c:v", "mjpeg", "-frames:v", "1").read_bytes())
    at = jpegs.index(bytes.fromhex("ffc0"))
    jpegs[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"
    (tmp_path / "a.avi").write_bytes(jpegs)
    assert refusal(tmp_path / "a.avi", "video/x-msvideo") == "too_large"


def refusal(source: Path, mime_type: str) -> str:
    with pytest.raises(Unmakeable) as caught:
        make(source, mime_type, EVERYTHING)
    assert list(source.with_name(source.name + "-previews").iterdir()) == []
    return caught.value.reason


def test_an_eight_k_frame_fits_into_the_caps(tmp_path: Path) -> None:
    options = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le")
    made, _ = make(record(tmp_path / "a.mp4", "testsrc2=s=8192x4320:r=25:d=0.16", *options), "video/mp4")
    assert (made.width, made.height) == (8192, 4320)


def test_thousands_of_streams(tmp_path: Path) -> None:
    film = record(tmp_path / "a.mp4", TEST_CARD, *H264).read_bytes()
    index, track = film.index(b"moov") - 4, film.index(b"trak") - 4
    (index_size,) = struct.unpack_from(">I", film, index)
    (track_size,) = struct.unpack_from(">I", film, track)
    for count in (MOST_STREAMS - 1, MOST_STREAMS, 5000):
        more = film[track : track + track_size] * count
        source = tmp_path / f"{count}.mp4"
        source.write_bytes(film[:index] + struct.pack(">I", index_size + len(more)) + film[index + 4 : index + index_size] + more)
        if count < MOST_STREAMS:
            assert make(source, "video/mp4")[0].video_codec == "h264"
        else:
            assert refusal(source, "video/mp4") == "too_large"


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi", "a.ogv"])
def test_damage_anywhere_gives_a_poster_or_a_reason(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    codec = {"a.mp4": H264, "a.webm": ("-c:v", "libvpx"), "a.avi": ("-c:v", "mpeg4"), "a.ogv": ("-c:v", "libtheora")}[name]
    mime_type = {"a.mp4": "video/mp4", "a.webm": "video/webm", "a.avi": "video/x-msvideo", "a.ogv": "video/ogg"}[name]
    film = record(tmp_path / name, "testsrc2=s=64x64:d=0.5", *codec, sound="sine=d=0.5").read_bytes()
    assert mime_type in DEMUXERS
    for number in range(6):
        hurt = bytearray(film)
        for _ in range(chance.choice((1, 8, 64))):
            hurt[chance.randrange(len(hurt) if number % 2 else min(1000, len(hurt)))] = chance.randrange(256)
        source = tmp_path / f"{number}-{name}"
        source.write_bytes(hurt)
        try:
            made, _ = make(source, mime_type)
            assert made.files
        except Unmakeable as problem:
            assert re.fullmatch("damaged|unsupported|too_large|too_slow", problem.reason)


def test_an_encrypted_film_has_no_picture(tmp_path: Path) -> None:
    """Common encryption (ISO/IEC 23001-7), and nobody here has its key. What can be read of it is noise, and none of that is shown."""
    key = ("-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "00112233445566778899aabbccddeeff", "-encryption_kid", "0" * 32)
    film = record(tmp_path / "film.mp4", TEST_CARD, *H264, *key)
    with pytest.raises(Unmakeable) as refused:
        make(film, "video/mp4", EVERYTHING)
    assert refused.value.reason in {"damaged", "unsupported"}
