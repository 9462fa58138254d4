"""Which kind accepts which bytes, under every allow-list."""

import pytest

from server.errors import InvalidRequest, KindRequired, TypeMismatch, UnsupportedType
from server.kinds import DIRECTORIES, GLTF, JPEG, JSON, KINDS, KNOWN, MP4, ZIP, Allowed, FileType, resolve
from server.settings import SettingError, Settings

ALL = Allowed.from_settings(Settings())


def test_one_fitting_kind_needs_no_declaration() -> None:
    assert resolve(ALL, JPEG, None) == resolve(ALL, JPEG, "image") == "image"
    assert resolve(ALL, GLTF, None) == "scene"


def test_json_and_zip_must_be_declared() -> None:
    for each in (JSON, ZIP):
        assert {resolve(ALL, each, kind) for kind in ("scene", "project")} == {"scene", "project"}
        with pytest.raises(KindRequired) as caught:
            resolve(ALL, each, None)
        assert caught.value.choices == ["scene", "project"]


def test_an_allow_list_can_settle_the_kind() -> None:
    only_gltf_scenes = Allowed.from_settings(Settings(types_scene=("model/gltf-binary",)))
    assert resolve(only_gltf_scenes, JSON, None) == "project"
    with pytest.raises(TypeMismatch):
        resolve(only_gltf_scenes, JSON, "scene")


def test_a_picture_declared_as_video_is_a_mismatch() -> None:
    with pytest.raises(TypeMismatch) as caught:
        resolve(ALL, JPEG, "video")
    assert (caught.value.declared, caught.value.detected) == ("video", "image/jpeg")


@pytest.mark.parametrize("kind", ["", "Image", "images", "video\0", "../image"])
def test_an_unknown_kind_is_an_invalid_request(kind: str) -> None:
    for detected in (JPEG, None):
        with pytest.raises(InvalidRequest) as caught:
            resolve(ALL, detected, kind)
        assert caught.value.field == "type"


@pytest.mark.parametrize("detected", [None, FileType("application/pdf", "", ())])
def test_unknown_bytes_are_unsupported_whatever_is_declared(detected: FileType | None) -> None:
    for kind in (None, *KINDS):
        with pytest.raises(UnsupportedType) as caught:
            resolve(ALL, detected, kind)
        assert caught.value.detected == (detected and detected.mime_type)
        assert set(caught.value.allowed) == (ALL.by_kind[kind] if kind else set(KNOWN))


def test_a_type_the_server_does_not_allow_is_unsupported() -> None:
    photographs = Allowed.from_settings(Settings(types_image=("image/jpeg",), types_video=("video/webm",)))
    assert resolve(photographs, JPEG, "image") == "image"
    with pytest.raises(UnsupportedType) as caught:
        resolve(photographs, MP4, "video")
    assert (caught.value.detected, caught.value.allowed) == ("video/mp4", ["video/webm"])


@pytest.mark.parametrize("strange", ["image/jpg", "video/mp4", "text/html", "image/JPEG"])
def test_a_setting_with_a_strange_type_stops_the_start(strange: str) -> None:
    with pytest.raises(SettingError, match="COFFER_TYPES_IMAGE"):
        Allowed.from_settings(Settings(types_image=("image/png", strange)))


def test_every_kind_has_a_directory_and_a_type() -> None:
    assert set(DIRECTORIES) == set(KINDS) == set(ALL.by_kind)
    assert all(ALL.by_kind.values())
