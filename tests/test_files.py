"""formats/files.py: errors of one line, files written whole, optional packages."""
import os
import sys
from pathlib import Path

import pytest

from formats.files import UserError, counted, one_line_errors, optional, replacing, warn


@pytest.mark.parametrize("error, line", [(UserError("a.json: no images"), "error: a.json: no images\n"),
                                         (FileNotFoundError(2, "No such file", "a"), "error: [Errno 2] No such file: "
                                                                                     "'a'\n")])
def test_an_error_is_one_line_and_exit_status_1(capsys, error, line):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise error
    assert exit.value.code == 1
    assert capsys.readouterr() == ("", line)


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
