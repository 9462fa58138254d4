"""Paths are made of what we choose, never of what a client sends."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.vault.layout import checked, checked_readable, is_previews, preview_path, stored_path, user_directory

FILE_ID = UUID("0190a0b0-0000-7000-8000-000000000001")


@given(st.text(min_size=1, max_size=255).filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
def test_any_user_id_gives_one_plain_path_component(user_id: str) -> None:
    directory = user_directory(user_id)
    assert directory.isascii() and directory not in (".", "..") and not set(directory) & set("/\\\0\n ") and len(directory) <= 128
    assert checked(stored_path(user_id, "image", FILE_ID, 1, "jpg")).startswith(f"users/{directory}/images/")


def test_a_plain_id_is_its_own_directory_and_a_strange_one_cannot_imitate_it() -> None:
    assert user_directory("user_2abc") == "user_2abc"
    assert user_directory("User_2abc") != user_directory("user_2abc")
    strange = user_directory("a/b")
    assert strange.startswith("~") and user_directory(strange) != strange


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "users/a/images/../../x",
        "users/../images/0190a0b0-0000-7000-8000-000000000001.1.jpg",
        "users/a/images/0190a0b0-0000-7000-8000-000000000001.1.jpg/",
        "users/a/images/0190a0b0-0000-7000-8000-000000000001.1.jpg\n",
        "users/a/other/0190a0b0-0000-7000-8000-000000000001.1.jpg",
        "users//images/0190a0b0-0000-7000-8000-000000000001.1.jpg",
    ],
)
def test_a_row_changed_by_hand_leads_nowhere(path: str) -> None:
    with pytest.raises(ValueError, match="not the path"):
        checked(path)


def test_a_user_may_be_called_as_our_directories_are() -> None:
    for user_id in ("previews", "users", "images", "incoming"):
        path = stored_path(user_id, "image", FILE_ID, 1, "png")
        assert checked_readable(path) == path and not is_previews(path)
        previews = preview_path(path, FILE_ID, "320.webp")
        assert checked_readable(previews) == previews and is_previews(previews)
