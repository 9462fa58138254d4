"""Which URLs may be fetched: by their text, and by the addresses that their hosts have."""

from ipaddress import ip_address, ip_network

import pytest

from server.errors import UrlRefused
from server.fetching import Rules
from server.fetching.rules import is_public
from server.settings import SettingError, Settings

PUBLIC = Rules()
LOCAL = Rules(private_networks=(ip_network("127.0.0.0/8"),))

NOT_PUBLIC = {
    "this network": ["0.0.0.0", "0.1.2.3"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.254"],
    "link-local": ["169.254.169.254", "169.254.0.1", "fe80::1", "febf::1"],
    "protocol assignments": ["192.0.0.8", "192.0.0.170", "2001:1::1", "2001:4:112::1"],
    "documentation": ["192.0.2.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "3fff::1"],
    "benchmarking": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "AS112 and AMT": ["192.31.196.1", "192.175.48.1", "192.52.193.1", "2620:4f:8000::1", "2001:3::1"],
    "relays of 6to4": ["192.88.99.1"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255"],
    "unspecified": ["::"],
    "mapped IPv4": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::ffff:0:1.2.3.4"],
    "compatible IPv4": ["::127.0.0.1", "::8.8.8.8"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:808:808::"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "ORCHID": ["2001:10::1", "2001:20::1"],
    "unique local": ["fc00::1", "fd12:3456:789a::1", "fd00:ec2::254"],
    "site-local": ["fec0::1", "feff::1"],
    "6bone": ["3ffe::1"],
    "discard": ["100::1"],
    "segment routing": ["5f00::1"],
    "unassigned": ["4000::1", "8000::1"],
    "a zone": ["2600::1%eth0"],
}


@pytest.mark.parametrize(("sort", "text"), [(sort, text) for sort, texts in NOT_PUBLIC.items() for text in texts])
def test_addresses_that_are_not_for_everybody(sort: str, text: str) -> None:
    assert not is_public(ip_address(text)), sort


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "198.17.0.1", "2600::1", "2a01:4f8::1", "2001:4860:4860::8888"]
)
def test_addresses_that_are(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://127.1/",
            "https://0x7f.1/",
            "https://2130706433/",
            "https://0177.0.0.1/",
            "https://017700000001/",
            "https://0x7f000001/",
        ),
        *("https://127.0.0.01/", "https://1.2.3/", "https://8.8.8.8.8/", "https://example.com.0x7f/", "https://0x/", "https://1.2.3.4./"),
        *("https://[::1%25eth0]/", "https://[fe80::1%eth0]/", "https://[::g]/", "https://[1.2.3.4]/", "https://[::1", "https://[]/"),
        *("https://user@example.com/", "https://user:password@example.com/", "https://example.com@127.0.0.1/", "https://example.com:80@a/"),
        *("https://ex%61mple.com/", "https://127.0.0.1%2f@example.com/", "https:\\\\127.0.0.1\\", "https://example.com\\@127.0.0.1/"),
        *(
            "http\u017f://example.com/",
            "https://\u212a.example/",
            "https://\uff11\uff12\uff17.0.0.1/",
            "https://bücher.example/",
            "https://\u2460\u2461\u2466.0.0.1/",
            "https://exa\u00admple.com/",
            "https://localhost\u3002/",
        ),
        *("ftp://example.com/", "file:///etc/passwd", "gopher://example.com/", "//example.com/", "example.com", "javascript:alert(1)", ""),
        *("https:///path", "https://", "https://.example.com/", "https://-a.example.com/", "https://a..b/", "https://example.com./"),
        *("https://example.com:0/", "https://example.com:25/", "https://example.com:22/", "https://example.com:65536/", "https://a:99999/"),
        *("https://example.com/a b", "https://example.com/\r\nX: 1", "https://example.com/\x00", " https://example.com/", "https://a/\t"),
        *("https://example.com/\nhttps://b/", "https://example.com/é", f"https://example.com/{'a' * 2_048}", f"https://{'a.' * 130}com/"),
        *("http://example.com/", "http://8.8.8.8/", "http://127.0.0.1/", "https://127.0.0.1/", "https://10.0.0.1:8443/", "https://[::1]/"),
        *("https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://169.254.169.254/latest/"),
    ],
)
def test_urls_that_are_refused_by_their_text(url: str) -> None:
    with pytest.raises(UrlRefused):
        PUBLIC.read(url)


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://Example.COM", "https://example.com/"),
        ("HTTPS://example.com:443/a?b=c&d=%2F#fragment", "https://example.com/a?b=c&d=%2F"),
        ("https://example.com:8443/a", "https://example.com:8443/a"),
        ("https://8.8.8.8/", "https://8.8.8.8/"),
        ("https://[2600:0::1]:8443/?a=[1]", "https://[2600:0::1]:8443/?a=[1]"),
        ("https://a_b.xn--bcher-kva.example/~a/;b=(1)", "https://a_b.xn--bcher-kva.example/~a/;b=(1)"),
        ("https://example.com?a", "https://example.com/?a"),
    ],
)
def test_urls_that_are_taken(url: str, plain: str) -> None:
    assert PUBLIC.read(url).url == plain


def test_every_address_of_a_host_must_be_public() -> None:
    target = PUBLIC.read("https://example.com/")
    PUBLIC.check(target, [ip_address("8.8.8.8"), ip_address("2600::1")])
    for bad in ("127.0.0.1", "::1", "fe80::1%lo"):
        with pytest.raises(UrlRefused):
            PUBLIC.check(target, [ip_address("8.8.8.8"), ip_address(bad)])


def test_private_networks_are_those_that_are_named() -> None:
    assert LOCAL.read("http://127.0.0.1:8000/a").authority == "127.0.0.1:8000"
    for url in ("http://10.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "http://8.8.8.8/"):
        with pytest.raises(UrlRefused):
            LOCAL.read(url)
    target = LOCAL.read("http://example.com/")  # plain HTTP is judged once the address is known
    LOCAL.check(target, [ip_address("127.0.0.1")])
    for addresses in (["8.8.8.8"], ["127.0.0.1", "8.8.8.8"], ["10.0.0.1"]):
        with pytest.raises(UrlRefused):
            LOCAL.check(target, [ip_address(each) for each in addresses])


def test_only_hosts_that_are_named() -> None:
    rules = Rules(hosts=("files.example.com", "*.example.org"))
    for good in ("https://files.example.com/", "https://FILES.example.com/", "https://a.example.org/", "https://a.b.example.org/"):
        rules.read(good)
    for bad in (
        "https://example.org/",
        "https://badexample.org/",
        "https://a.files.example.com/",
        "https://8.8.8.8/",
        "https://example.com/",
    ):
        with pytest.raises(UrlRefused):
            rules.read(bad)
    with pytest.raises(UrlRefused):
        rules.redirected(rules.read("https://a.example.org/"), "https://elsewhere.example/")


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        ("/b", "https://example.com/b"),
        ("c?d", "https://example.com/a/c?d"),
        ("//other.example/", "https://other.example/"),
        ("https://other.example:8443/x", "https://other.example:8443/x"),
        ("/caf\xc3\xa9 menu", "https://example.com/caf%C3%A9%20menu"),
    ],
)
def test_redirects(location: str, leads_to: str) -> None:
    assert PUBLIC.redirected(PUBLIC.read("https://example.com/a/b"), location).url == leads_to


@pytest.mark.parametrize(
    "location",
    [
        "http://example.com/",
        "https://127.0.0.1/",
        "//127.1/",
        "file:///etc/passwd",
        "https://user@other.example/",
        "https://[",
        "\\\\127.0.0.1\\a:b",
    ],
)
def test_redirects_are_judged_as_the_first_url(location: str) -> None:
    with pytest.raises(UrlRefused):
        PUBLIC.redirected(PUBLIC.read("https://example.com/a/b"), location)


def test_rules_come_from_the_settings() -> None:
    environment = {
        "DATABASE_URL": "postgresql://a/b",
        "COFFER_FETCH_HOSTS": "Files.example.com, *.example.org",
        "COFFER_FETCH_PRIVATE_NETWORKS": "10.1.0.0/16 fd00::/8",
    }
    rules = Rules.from_settings(Settings.load(environment))
    assert rules == Rules(("files.example.com", "*.example.org"), (ip_network("10.1.0.0/16"), ip_network("fd00::/8")))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("HOSTS", text) for text in ("https://example.com", "example.com:443", "*", "*.", "a.*.example.com", "example.com/a", "a..b")),
        *(("PRIVATE_NETWORKS", text) for text in ("0.0.0.0/0", "::/0", "10.0.0.1/8", "intranet")),
    ],
)
def test_rules_that_are_none(name: str, text: str) -> None:
    with pytest.raises(SettingError, match=f"COFFER_FETCH_{name}"):
        Settings.load({"DATABASE_URL": "postgresql://a/b", f"COFFER_FETCH_{name}": text})
