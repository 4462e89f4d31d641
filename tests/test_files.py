"""formats/files.py: errors of one line, text that is safe to print, files written whole, optional packages."""
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from formats.files import (CommandLine, UserError, counted, one_line_errors, optional, printable, replacing, warn,
                           write_whole)
from formats.pictures import save_image
from helpers import noise_image, one_line_error
from tools.command_line import output_file, print_table, write_json


@pytest.mark.parametrize("error, line", [(UserError("a.json: no images"), "error: a.json: no images\n"),
                                         (FileNotFoundError(2, "No such file", "a"), "error: [Errno 2] No such file: "
                                                                                     "'a'\n")])
def test_an_error_is_one_line_and_exit_status_1(capsys, error, line):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise error
    assert exit.value.code == 1
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("count", [1, 10 ** 5])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_any_more_is_no_error(count, unbuffered):
    """As with `| head`: a pipe that is closed. Also where what is printed waits for the end."""
    code = f"from formats.files import one_line_errors\nwith one_line_errors(): print({count} * 'a line\\n')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE,
                          cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_another_broken_pipe_is_an_error(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise BrokenPipeError(32, "Broken pipe")
    assert "Broken pipe" in one_line_error(capsys)


def test_a_program_without_an_output_ends_as_any_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    with one_line_errors():
        print("a line")
    assert capsys.readouterr().err == ""


def test_other_errors_pass():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a bug")


def test_an_error_of_a_loading_process_is_its_last_line():
    traceback = ("Caught UserError in DataLoader worker process 0.\nTraceback ...\n"
                 "formats.files.UserError: a.json: empty\n")
    assert str(UserError(traceback)) == "a.json: empty"


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        Path(temporary).write_text("new")
        assert path.read_text() == "old" and os.path.dirname(temporary) == str(tmp_path)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        Path(temporary).write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OSError), replacing(tmp_path / "missing" / "b.json") as temporary:
        open(temporary, "w")


def test_the_new_file_follows_no_link_and_destroys_no_neighbour(tmp_path):
    path, precious = tmp_path / "a.json", tmp_path / "precious"
    for planted in ("a.json.tmp", "a.tmp", ".a.json.tmp"):
        (tmp_path / planted).symlink_to(precious)
    precious.write_text("mine")
    os.umask(before := os.umask(0o027))
    names = set()
    for _ in range(2):
        with replacing(path) as temporary:
            assert os.path.dirname(temporary) == str(tmp_path) and temporary.endswith(".tmp")
            names.add(temporary)
            Path(temporary).write_text("new")
    assert len(names) == 2 and precious.read_text() == "mine" and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~before
    output_file(str(tmp_path / "mine"))
    assert sorted(os.listdir(tmp_path)) == [".a.json.tmp", "a.json", "a.json.tmp", "a.tmp", "precious"]


def test_a_long_name_leaves_room_for_that_of_the_new_file(tmp_path):
    write_whole(tmp_path / ("ä" * 125 + ".json"), b"x")
    assert [name[-6:] for name in os.listdir(tmp_path)] == ["ä.json"]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, capsys):
    path = tmp_path / "a.jpg"
    save_image(noise_image(0, 8, 8), path, "JPEG")
    old = path.read_bytes()
    noise, signals = noise_image(1, 200, 200), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        for write in (lambda: write_whole(path, bytes(5000)), lambda: save_image(noise, path, "JPEG"),
                      lambda: write_json(str(path), [0] * 5000)):
            with pytest.raises(SystemExit), one_line_errors():
                write()
            assert str(path) in (line := one_line_error(capsys)) and "File too large" in line and ".tmp" not in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signals)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.jpg"]


HOSTILE = "a\x1b[2J\r\n\t\x00\x7f\x9b\u202e\u2028\udc80b"
CLEANED = r"a\x1b[2J\r\n\t\x00\x7f\x9b\u202e\u2028\udc80b"


def test_what_is_printed_commands_no_terminal(capsys):
    """In one line: escape sequences, control characters, and what UTF-8 cannot hold."""
    assert printable(HOSTILE) == CLEANED == str(UserError(HOSTILE))
    assert printable("Käse, 犬 \u3000") == "Käse, 犬 \u3000"
    caught = f"Caught UserError in DataLoader worker process 0.\nx\nformats.files.UserError: {CLEANED}\n"
    assert str(UserError(caught)) == CLEANED
    warn(HOSTILE)
    print_table("table", ["AP"], {HOSTILE: [1.0], "x" * 1000: [None]})
    with pytest.raises(SystemExit), one_line_errors():
        raise OSError(HOSTILE)
    with pytest.raises(SystemExit):
        CommandLine(prog="x").error(HOSTILE)
    out, err = capsys.readouterr()
    assert err == f"warning: {CLEANED}\nerror: {CLEANED}\nerror: {CLEANED} (see x --help)\n"
    assert out.count("\n") == 3 and f"\n{CLEANED} " in out and max(map(len, out.splitlines())) < 80


@pytest.mark.parametrize("package, pip", [("cv2", "opencv-python-headless"), ("torch.utils.tensorboard", "tensorboard"),
                                          ("cityscapesscripts.evaluation.x", "cityscapesscripts"), ("yaml", "pyyaml")])
def test_a_missing_package_names_the_pip_command(monkeypatch, package, pip):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^--option needs a package .*: pip install {pip}$"):
        optional(package, "--option")


def test_an_installed_package_is_imported():
    assert optional("json", "x").loads("1") == 1


def test_warnings_come_from_the_first_process_alone(capsys, monkeypatch):
    warn("here")
    monkeypatch.setenv("RANK", "1")
    warn("there")
    assert capsys.readouterr().err == "warning: here\n"


def test_counted_nouns():
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(1, "box"), counted(2, "box"), counted(1, "image"), counted(3, "image")] == [
        "1 box", "2 boxes", "1 image", "3 images"]
