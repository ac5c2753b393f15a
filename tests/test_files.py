"""Opening and replacing files whose paths come from people."""

import contextlib
import os
import socket
import stat

import pytest

from vllm_specplug.files import open_regular, replacing


@pytest.fixture
def not_files(tmp_path):
    """Paths that are no regular files, by what they are, with a word of the error."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "linked").symlink_to(tmp_path / "pipe")
    return {
        tmp_path / "pipe": "named pipe",
        tmp_path / "linked": "named pipe",
        tmp_path / "socket": "socket",
        tmp_path / "folder": "folder",
        tmp_path / "loop": "symbolic links",
        tmp_path / "missing": "No such file",
        tmp_path / ("n" * 300): "too long",
        "/dev/zero": "device",
    }


def test_what_is_no_file_is_refused_at_once(not_files):
    for path, word in not_files.items():
        with pytest.raises(OSError, match=word) as raised:
            open_regular(path)
        assert raised.value.filename == str(path)


def test_files_and_links_to_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"text"


def test_a_file_is_replaced_whole_and_with_its_rights_or_not_at_all(tmp_path):
    path = tmp_path / "out"
    for mode, text in ((0o600, b"one"), (0o444, b"two"), (0o600, b"three")):
        with replacing(path, mode) as file:
            file.write(text)
        assert path.read_bytes() == text
        assert stat.S_IMODE(path.stat().st_mode) == mode
    with contextlib.suppress(OSError), replacing(path, 0o600) as file:
        file.write(b"half of")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["out"]
