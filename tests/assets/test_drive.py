"""Share links of Google Drive, in all forms that people paste, lead to the file and not to the page about it."""

import pytest

from server.assets.drive import direct_url, is_page

ID = "1A2b3C4d5E6f7G8h9I0jKlMnOpQrStUvW"
DIRECT = f"https://drive.usercontent.google.com/download?id={ID}&export=download&confirm=t"


@pytest.mark.parametrize(
    "url",
    [
        f"https://drive.google.com/file/d/{ID}/view",
        f"https://drive.google.com/file/d/{ID}/view?usp=sharing",
        f"https://drive.google.com/file/d/{ID}/view?usp=drive_link#page=1",
        f"https://drive.google.com/file/d/{ID}/edit",
        f"https://drive.google.com/file/d/{ID}/preview",
        f"https://drive.google.com/file/d/{ID}",
        f"https://drive.google.com/file/u/0/d/{ID}/view",
        f"https://drive.google.com/open?id={ID}",
        f"https://drive.google.com/open?usp=drive_copy&id={ID}",
        f"https://drive.google.com/uc?id={ID}",
        f"https://drive.google.com/uc?export=download&id={ID}",
        f"https://drive.google.com/u/1/uc?id={ID}&export=download",
        f"https://docs.google.com/uc?id={ID}",
        f"https://DRIVE.google.com/uc?id={ID}",
    ],
)
def test_share_links(url: str) -> None:
    assert direct_url(url) == DIRECT


def test_older_files_need_their_resource_key() -> None:
    url = f"https://drive.google.com/file/d/{ID}/view?resourcekey=0-abcdefghijk"
    assert direct_url(url) == f"{DIRECT}&resourcekey=0-abcdefghijk"
    assert direct_url(f"https://drive.google.com/file/d/{ID}/view?resourcekey=a%26confirm%3Dx") == DIRECT


@pytest.mark.parametrize(
    "url",
    [
        f"https://drive.google.com.example.com/file/d/{ID}/view",
        f"https://example.com/file/d/{ID}/view",
        f"https://drive.google.com/drive/folders/{ID}",
        "https://drive.google.com/open",
        "https://drive.google.com/uc?id=../../etc",
        f"https://drive.google.com/file/d/{ID}/view/more",
        f"https://drive.google.com/file/d/{ID}%2F/view",
        f"https://docs.google.com/document/d/{ID}/edit",
        DIRECT,
    ],
)
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert direct_url(url) is None


def test_a_page_in_place_of_the_file() -> None:
    assert is_page(DIRECT, "text/html") and not is_page(DIRECT, "image/png")
    assert not is_page("https://example.com/page", "text/html")
