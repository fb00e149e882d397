"""Locations: how they are resolved against a folder, and shown without secrets."""

from pathlib import Path

import pytest

from diffsmooth.pipeline.errors import RunError, UserError, one_line, redacted
from diffsmooth.pipeline.locations import EMBEDDED, embedded_path, is_relative, is_remote, require_set, resolve, shown

FOLDER = Path("/specs")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("RELATIVE", "here")
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)


@pytest.mark.parametrize(
    ("location", "resolved"),
    [
        ("a.pt", "/specs/a.pt"),
        ("../a.pt", "/specs/../a.pt"),
        ("/a.pt", "/a.pt"),
        ("~/a.pt", "/home/user/a.pt"),
        ("~no-such-user/a.pt", "~no-such-user/a.pt"),
        ("${MODELS}/a.pt", "/models/a.pt"),
        ("${RELATIVE}/a.pt", "/specs/here/a.pt"),
        ("x/${RELATIVE}/a.pt", "/specs/x/here/a.pt"),
        ("${NOT_SET_ANYWHERE}/a.pt", "${NOT_SET_ANYWHERE}/a.pt"),
        ("$MODELS/a.pt", "/specs/$MODELS/a.pt"),
        ("s3://bucket/a.pt", "s3://bucket/a.pt"),
        ("https://host/a.pt?x=~", "https://host/a.pt?x=~"),
        ("embedded:mnist.parquet", "embedded:mnist.parquet"),
    ],
)
def test_resolve(location, resolved):
    assert resolve(location, FOLDER) == resolved


@pytest.mark.parametrize(
    ("location", "remote", "relative"),
    [
        ("a.pt", False, True),
        ("/a.pt", False, False),
        ("~/a.pt", False, False),
        ("${MODELS}/a.pt", False, False),
        ("embedded:a", False, False),
        ("s3://b/k", True, False),
        ("hf://owner/name", True, False),
    ],
)
def test_kinds_of_locations(location, remote, relative):
    assert (is_remote(location), is_relative(location)) == (remote, relative)


def test_unset_variable_is_named_with_its_key():
    assert require_set("data.path", "/a/b") == "/a/b"
    with pytest.raises(UserError, match=r"data\.path = '\$\{UNSET\}/a': the environment variable UNSET is not set"):
        require_set("data.path", "${UNSET}/a")
    with pytest.raises(UserError) as error:
        require_set("data.path", "https://user:secret@host/${UNSET}?token=secret")
    assert "secret" not in str(error.value)


def test_embedded_files_exist():
    assert embedded_path("embedded:mnist.parquet").is_file()


@pytest.mark.parametrize("name", ["", "none.pt", "../data.py", "/etc/passwd", "__init__.py", "a\0b", 5000 * "a"])
def test_other_embedded_names_are_refused(name):
    with pytest.raises(UserError, match=r"no such embedded file; use one of .*embedded:mnist\.parquet") as error:
        embedded_path(EMBEDDED + name)
    assert "\0" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("/a/b.pt", "/a/b.pt"),
        ("/a?b@c", "/a?b@c"),
        ("s3://bucket/a/b.pt", "s3://bucket/a/b.pt"),
        ("s3://id:secret@bucket/a", "s3://bucket/a"),
        ("https://host/a.pt", "https://host/a.pt"),
        ("https://user:secret@host:8080/a.pt?signature=secret", "https://host:8080/a.pt?..."),
        ("https://user:sec@ret@host/a", "https://host/a"),
        ("https://host?signature=secret", "https://host?..."),
        ("https://host/a@b", "https://host/a@b"),
        ("https://[::1", "https://[::1"),
        ("a\nb", "a b"),
        ("a\x1b[31mb\0", "a\\x1b[31mb\\x00"),
        ("run\udcff", "run\\udcff"),
        ("über/ä", "über/ä"),
    ],
)
def test_shown_hides_secrets_and_stays_on_one_line(location, text):
    assert shown(location) == text


def test_long_text_is_cut():
    assert one_line(400 * "a") == 300 * "a" + "..."
    assert one_line("first\r\n  second\n") == "first second"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("checkpoint https://u:p@h/a.pt?sig=x#net: damaged; get it", "checkpoint https://h/a.pt?...: damaged; get it"),
        ("--set k=https://u:p@h:80/a and s3://id:key@b/c", "--set k=https://h:80/a and s3://b/c"),
        ("('https://h/a?token=x', \"s3://b/c?y\")", "('https://h/a?...', \"s3://b/c?...\")"),
        ("https://u:p@[::1]/a", "https://[::1]/a"),
        ("is https://h/a?... there?", "is https://h/a?... there?"),
        ("a@b, /x?y=1, 3:4; n = 5?", "a@b, /x?y=1, 3:4; n = 5?"),
    ],
)
def test_no_message_shows_the_secrets_of_a_uri(text, expected):
    assert redacted(text) == redacted(expected) == expected
    assert str(UserError(text)) == str(RunError(text)) == expected


@pytest.mark.parametrize("location", ["https://u:SECRET@h/a.pt", "https://h/a.pt?sig=SECRET", "s3://SECRET@b/a"])
def test_redacting_agrees_with_what_is_shown_of_a_location(location):
    assert redacted(f"x {location}: y") == f"x {shown(location)}: y"
