"""tools/processes.py: what processes agree on, signals, output, loading, the lock; and runs that meet such trouble.

The same over thousands of iterations and a hundred kills: tests/storm.py, which is run by hand.
"""
import gc
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import evaluate
import train
from data import TrainBatches
from formats import checkpoint
from formats.checkpoint import load
from formats.coco import CocoBoxes, DataError
from formats.files import SaidElsewhere, UserError
from helpers import SMALL, Looker, command, copy_set, losses_of, metrics, one_line_error, only_training
from tools import batches, processes, run_folder
from tools.batches import Patient
from tools.processes import (Lasting, StopSignals, from_first, gathered, lasting_output, loaded, same_command,
                             same_everywhere, together)
from tools.run_folder import RunFolder, check_first, lock


def in_child(work) -> int:
    """Call `work` in a forked process; returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception as error:  # noqa: a child must never return into pytest
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -------------------------------------------------------------------------------------- what processes agree on


def disagree(rank: int, port: int, folder: Path, drawn: Path, answers) -> None:
    """One of two processes: what it catches goes to `answers`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    caught = []

    def caught_from(work) -> None:
        try:
            work()
            caught.append("nothing")
        except UserError as error:
            caught.append(f"{type(error).__name__}: {error}")

    def fail_on(*ranks: int) -> None:
        with together("a test"):
            if rank in ranks:
                raise UserError(f"wrong on {rank}")

    def nested() -> None:
        with together("a test"):
            fail_on(1)

    def over_images() -> None:
        """An evaluation of two batches, of which process 1 cannot read its own."""
        def work(predictions, batch):
            if rank == 1:
                raise ValueError("broken")
            return []

        batch = SimpleNamespace(to=lambda _: SimpleNamespace(images=None, sizes=None))
        evaluate.TestImages, evaluate.loaded = lambda *_: None, lambda *_: [batch]
        try:
            evaluate.over_images(Looker(), [0, 1], "test", work, progress=False)
        except ValueError as error:
            caught.append(f"ValueError: {error}")

    def no_network() -> None:
        """The network cannot be made on process 1; process 0 must not wait for its gradients."""
        if rank == 1:
            train.build_model = lambda **_: (_ for _ in ()).throw(UserError("no memory"))
        args = train.parse_arguments([*map(str, [*only_training(drawn), *SMALL]), "--out", "missing"])
        train.make_run(args, CocoBoxes(args.train_json, args.train_images), rank, 2, torch.device("cpu"))

    for work in (lambda: fail_on(), lambda: fail_on(0), lambda: fail_on(1), lambda: fail_on(0, 1), nested,
                 lambda: same_everywhere({"size": 3, "order": [1, 2]}),
                 lambda: same_everywhere({"size": 3, "order": [1, rank]}),
                 lambda: same_everywhere({"names": [*range(999), rank, 2, *range(99)]}),
                 lambda: check_first(folder / str(rank)), lambda: check_first(folder / str(1 - rank)), over_images,
                 no_network):
        caught_from(work)
    caught.append([from_first({"state": torch.full((2,), rank)}, "a test")["state"].tolist(), gathered(rank, "a test")])
    answers[rank] = caught
    dist.barrier()
    dist.destroy_process_group()


def test_what_is_wrong_on_one_process_ends_all_and_one_says_it(drawn, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/last.pt").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        answers = manager.dict()
        both = [context.Process(target=disagree, args=(rank, port, tmp_path, drawn, answers)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(100)
        first, second = answers[0], answers[1]
    host = socket.gethostname()
    differs = f"order differs: [1, 0] for process 0 on {host}, [1, 1] for process 1 on {host}"
    for caught in (first, second):
        assert f": the run in {tmp_path}/1 is that of process 1 on {host}, but process 0 on {host}" in caught.pop(9)
        names = caught.pop(7)  # 80 characters of each
        assert re.search("names differs: ….* 998, 0, 2, .*… for process 0 on .*, ….* 998, 1, 2, .*… for", names)
        assert len(names) < 300
    assert first == ["nothing", "UserError: wrong on 0", "UserError: process 1: wrong on 1", "UserError: wrong on 0",
                     "UserError: process 1: wrong on 1", "nothing", f"UserError: {differs}", "nothing",
                     "UserError: process 1: broken", "UserError: process 1: no memory", [[0, 0], [0, 1]]]
    assert second == ["nothing", "SaidElsewhere: wrong on 0", "SaidElsewhere: process 1: wrong on 1",
                      "SaidElsewhere: wrong on 0", "SaidElsewhere: process 1: wrong on 1", "nothing",
                      f"SaidElsewhere: {differs}", "nothing", "ValueError: broken", "nothing",
                      "SaidElsewhere: process 1: no memory", [[0, 0], [0, 1]]]
    assert issubclass(SaidElsewhere, UserError)


def test_a_long_wait_says_what_it_waits_for(monkeypatch, capfd):
    monkeypatch.setattr(processes, "SILENT", 0.01)
    with processes.saying("a miracle"):
        time.sleep(0.3)
    assert capfd.readouterr().err == f"process 0 on {socket.gethostname()} waits for a miracle\n"


# ------------------------------------------------------------------------------------------- signals and output


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_many_signals_are_one_request():
    def work():
        with StopSignals() as signals:
            send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            assert signals.asked == signal.SIGUSR1

    assert in_child(work) == 0


def test_a_second_ctrl_c_ends_at_once_but_not_the_one_that_torchrun_forwards(monkeypatch):
    def work():
        with StopSignals() as signals:
            send(signal.SIGINT, signal.SIGINT)
            assert signals.asked == signal.SIGINT

    monkeypatch.delenv("RANK", raising=False)
    assert in_child(work) == -signal.SIGINT
    monkeypatch.setenv("RANK", "0")
    assert in_child(work) == 0
    monkeypatch.setattr(processes, "FORWARDED", -1)
    assert in_child(work) == -signal.SIGINT


def test_nohup_stays():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            send(signal.SIGHUP)
            assert not signals.asked and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL

    assert in_child(work) == 0


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("opened", [closed_pipe, lambda: open("/dev/full", "w")])
def test_what_cannot_be_printed_is_lost(opened):
    stream = Lasting(opened())
    for _ in range(3):
        print("x" * 10_000, file=stream, flush=True)
    stream.stream.close()  # nothing is left that would fail at the end of the process


def test_a_name_that_the_terminal_cannot_show(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with lasting_output():
            print("café")
    assert (tmp_path / "out").read_text() == "caf\\xe9\n"


def test_output_that_was_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output():
        print("x")
        sys.stdout.write("x")


def test_a_run_without_anywhere_to_print_ends_well(drawn, tmp_path):
    options = map(str, [*only_training(drawn), "--out", tmp_path / "out", *SMALL, "--iters", 2])
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, train.__file__, *options], stdout=full, stderr=full)
    assert done.returncode == 0 and (tmp_path / "out/final.pt").exists()


def test_the_command_that_goes_on(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options = ["--data", "my set", "--fresh", "--fr", "--iters", "4"]
    assert same_command(options) == "python train.py --data 'my set' --iters 4"
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "5",
                        "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert same_command(["--iters", "4"]) == "torchrun --nproc_per_node=8 train.py --iters 4"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert same_command([]) == ("torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=a --master_port=5 "
                                "train.py")


# ----------------------------------------------------------------------------------------------------- loading


class Deadly(Dataset):
    """Its process dies at item 2: `times` times in all."""

    def __init__(self, folder: Path, times: int):
        self.folder, self.times = folder, times

    def __getitem__(self, i: int) -> int:
        died = len(list(self.folder.iterdir()))
        if i == 2 and died < self.times:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_loading_process_that_dies_is_replaced(tmp_path, monkeypatch, capsys, attempts):
    monkeypatch.setattr(processes, "ATTEMPTS", attempts)
    images = Deadly(tmp_path, times=1)
    found = loaded(lambda i: DataLoader(images, batch_size=None, sampler=range(i, 5), num_workers=1), 0, 5)
    if attempts == 2:
        assert list(found) == [0, 1, 2, 3, 4]
        assert "loading processes are started anew" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="died 1 times in a row"):
            list(found)


def test_a_mistake_of_the_program_is_not_taken_for_a_dead_process():
    class Wrong(Dataset):
        def __getitem__(self, i):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(loaded(lambda i: DataLoader(Wrong(), batch_size=None, sampler=range(i, 5)), 0, 5))


def test_torch_raises_no_error_in_the_middle_of_a_step(monkeypatch):
    """It has set no handler for the end of a process."""
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for _ in loaded(lambda i: DataLoader(range(2), batch_size=None, sampler=range(i, 2), num_workers=1), 0, 2):
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


class Collecting(Dataset):
    """Its loading process frees what it can, or fails."""

    def __init__(self, fails: bool):
        self.fails = fails

    def __getitem__(self, i: int) -> int:
        if self.fails:
            raise DataError("broken")
        gc.collect()
        return i


def test_loading_processes_say_nothing_of_a_loader_that_failed_before(capfd, monkeypatch):
    def load_all(fails: bool):
        try:
            return list(loaded(lambda i: DataLoader(Collecting(fails), batch_size=None, sampler=range(i, 2),
                                                    num_workers=1), 0, 2))
        except DataError as error:
            problem = error  # and so in a cycle with this frame, as in evaluate.over_images
            return str(problem)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's says nothing here
    gc.disable()
    try:
        assert load_all(True) == "broken" and load_all(False) == [0, 1]
    finally:
        gc.enable()
    assert "Exception ignored" not in capfd.readouterr().err


def test_more_loading_processes_than_cores_are_no_reason_to_warn():
    code = ("from tools.processes import loaded, DataLoader\n"
            f"make = lambda i: DataLoader(range(i, 3), batch_size=None, num_workers={(os.cpu_count() or 1) + 1})\n"
            "print(list(loaded(make, 0, 3)))")
    done = subprocess.run([sys.executable, "-W", "always:This DataLoader", "-c", code], capture_output=True, text=True,
                          cwd=Path(train.__file__).parent)
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "")


class Mounted:
    """Batches that need a folder; `skipped` is what a batch without it has."""

    def __init__(self, folder: Path, skipped: list | None):
        self.folder, self.skipped, self.annotations = folder, skipped, SimpleNamespace(image_dir=folder)

    def folders(self, k: int) -> set[str]:
        return {str(self.folder)}

    def __getitem__(self, k: int):
        there = self.folder.is_dir() and any(self.folder.iterdir())
        if not there and self.skipped is None:
            raise DataError("100 images in a row cannot be decoded")
        return SimpleNamespace(k=k, skipped=[] if there else self.skipped)


@pytest.mark.parametrize("skipped", [None, ["a.jpg cannot be decoded"]])
@pytest.mark.parametrize("within", ["", "camera"])
def test_a_folder_that_comes_back_is_waited_for(tmp_path, monkeypatch, skipped, within):
    """That of all images or one within it, where others are."""
    folder = tmp_path / "images" / within
    if within:
        (tmp_path / "images/other").mkdir(parents=True)
        folder.mkdir()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        folder.mkdir(exist_ok=True)  # a mount point is there before what it holds
        if len(waits) == 3:
            (folder / "a.jpg").touch()

    monkeypatch.setattr(batches.time, "sleep", sleep)
    batch = Patient(Mounted(folder, skipped))[7]
    assert (batch.k, batch.skipped, len(waits)) == (7, [], 3)


def test_a_broken_image_is_loaded_twice_only_once(tmp_path):
    """The second time makes sure that its folder was not away the first time."""
    class Broken:
        calls, annotations = [], SimpleNamespace(image_dir=tmp_path)

        def folders(self, k):
            return {str(tmp_path)}

        def __getitem__(self, k):
            self.calls.append(k)
            return SimpleNamespace(skipped=[f"{k % 2}.jpg cannot be decoded"] if k else [])

    (tmp_path / "0.jpg").touch()
    images = Patient(Broken())
    for k in range(6):
        assert bool(images[k].skipped) == (k > 0)
    assert Broken.calls == [0, 1, 1, 2, 2, 3, 4, 5]


def test_a_sub_folder_that_never_was_there_is_not_waited_for(tmp_path):
    """Its images are broken; once it has been seen, they are away."""
    batches_of = Mounted(tmp_path / "none", ["a.jpg cannot be decoded"])
    batches_of.annotations.image_dir = tmp_path
    assert Patient(batches_of)[7].skipped == ["a.jpg cannot be decoded"]


def test_a_batch_names_the_folders_of_its_images(drawn, tmp_path):
    def change(content):
        content["images"] = content["images"][:2]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 3]
        content["images"][0]["file_name"] = f"one/{content['images'][0]['file_name']}"

    data = copy_set(drawn, tmp_path / "set", change)
    (data / "train2017/one").mkdir()
    (data / "train2017/000000000001.jpg").rename(data / "train2017/one/000000000001.jpg")
    annotations = CocoBoxes(data / "annotations/instances_train2017.json", data / "train2017")
    found = TrainBatches(annotations, batch_size=2, min_sizes=[64], max_size=64).folders(0)
    assert found == {f"{data}/train2017", f"{data}/train2017/one"}


def test_a_folder_that_stays_away_ends_the_run_after_it_has_saved(drawn, warm, tmp_path, monkeypatch, capsys):
    data, once = copy_set(drawn, tmp_path / "set"), tmp_path / "once"
    options = [*only_training(data), *SMALL, "--init", warm, "--iters", 4]
    assert command(*options, "--out", once) == 0
    step, images, away = train.train_step, data / "train2017", data / "away"

    def step_and_lose(run, batches, iteration, stop):
        if iteration == 1:
            images.rename(away)
        return step(run, batches, iteration, stop)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(batches, "PATIENCE", -1)
        patch.setattr(train, "train_step", step_and_lose)
        assert command(*options, "--out", tmp_path / "out") == 1
    assert f"{images} have been away" in one_line_error(capsys)
    assert load(tmp_path / "out/last.pt")["iteration"] == 2
    away.rename(images)
    assert command(*options, "--out", tmp_path / "out") == 0
    assert losses_of(once) == losses_of(tmp_path / "out")


# ------------------------------------------------------------------------------------------------- run folders


def hold(folder: Path, ready: int) -> None:
    with lock(folder):
        os.write(ready, b"x")
        time.sleep(100)


def test_a_folder_is_held_until_its_process_dies(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            hold(tmp_path, writer)
        finally:
            os._exit(1)
    assert os.read(reader, 1) == b"x"
    with pytest.raises(UserError, match=f"a run is under way in {tmp_path}: process {child} on {socket.gethostname()} "
                                        r"since \d{4}-"):
        lock(tmp_path).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_a_lock_is_neither_a_link_nor_a_pipe(tmp_path):
    """What a planted link leads to stays as it was; foreign bytes in the file are no traceback."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot lock"):
        lock(tmp_path).__enter__()
    assert (tmp_path / "precious").read_text() == "mine"
    os.remove(tmp_path / "lock")
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UserError, match="cannot lock"):
        lock(tmp_path).__enter__()
    os.remove(tmp_path / "lock")
    (tmp_path / "lock").write_bytes(b"\xff")
    with lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_run_that_is_refused_leaves_no_lock(drawn, tmp_path, capsys):
    """In a folder of something else; that of a run keeps it."""
    out, options = tmp_path / "out", [*only_training(drawn), *SMALL, "--iters", 1]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert command(*options, "--out", out, "--train-json", tmp_path / "missing") == 1
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert command(*options, "--out", out) == 0
    assert command(*options, "--out", out, "--train-json", tmp_path / "missing") == 1
    assert (out / "lock").read_text() == "" and (out / "notes.txt").exists()


def test_what_a_killed_run_left_half_written_goes_and_files_of_others_stay(tmp_path):
    code = "0123456789abcdef.tmp"
    others = ["mine.tmp", "last.pt.tmp", f"last.pt.{code[:-5]}.tmp", f"other.pt.{code}", f"labels.png.{code}"]
    half = [f"{name}.{code}" for name in ("last.pt", "final.pt", "metrics.jsonl", "config.json", "nonfinite.json",
                                          "labels-0000010.png")]
    for name in (*others, *half):
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path, fresh=False, rank=0) as folder:
        assert len(list(tmp_path.iterdir())) == 12  # a run that is refused changes nothing
        folder.begin()
        assert {path.name for path in tmp_path.iterdir()} == {*others, "lock"}


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    with lock(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_second_run_in_the_folder_is_refused(drawn, tmp_path, capsys, monkeypatch):
    """Before it reads anything, also one that would move the folder aside, and one that began at the same moment."""
    out = tmp_path / "out"
    out.mkdir()
    options = [*only_training(drawn), "--out", out, *SMALL, "--iters", 1]

    def held(*_):
        raise BlockingIOError

    monkeypatch.setattr(run_folder.fcntl, "lockf", held)
    monkeypatch.setattr(checkpoint, "load_latest", None)
    for more in ([], ["--fresh"]):
        assert command(*options, *more) == 1
        assert f"a run is under way in {out}" in one_line_error(capsys)
    assert [path.name for path in out.iterdir()] == ["lock"] and not (tmp_path / "out.1").exists()
    monkeypatch.undo()
    (out / "last.pt").touch()
    folder = RunFolder(out, fresh=False, rank=0)
    with pytest.raises(UserError, match="another run has just begun"):
        folder.begin()


# --------------------------------------------------------------------------------- what must not end a run


class Killed(BaseException):
    """What a test raises where a process is killed."""


def fail_at(monkeypatch, iteration: int, error: BaseException) -> None:
    """Let the evaluation at an iteration fail."""
    original = train.evaluate_and_draw

    def evaluate_and_draw(run, *rest):
        with monkeypatch.context() as patch:
            if run.iteration == iteration:
                patch.setattr(train, "evaluate", lambda *_, **__: (_ for _ in ()).throw(error))
            original(run, *rest)

    monkeypatch.setattr(train, "evaluate_and_draw", evaluate_and_draw)


def evaluations(out: Path) -> list[int]:
    return [line["iter"] for line in metrics(out) if "eval" in line]


@pytest.mark.parametrize("iteration", [2, 4])
def test_an_evaluation_that_fails_is_said_and_made_again_at_the_end(drawn, warm, tmp_path, monkeypatch, capsys,
                                                                    iteration):
    out = tmp_path / "out"
    options = ["--data", drawn, "--out", out, *SMALL, "--init", warm, "--iters", 4, "--eval-every", 2]
    with monkeypatch.context() as patch:
        fail_at(patch, iteration, RuntimeError("out of\nmemory"))
        assert command(*options) == 0
    captured = capsys.readouterr()
    assert captured.err == f"warning: no evaluation at iteration {iteration}: out of\n"
    assert f"{out} is complete" in captured.out and evaluations(out) == [i for i in (2, 4) if i != iteration]
    before = losses_of(out)
    assert command(*options) == 0
    assert evaluations(out) == ([4] if iteration == 2 else [2, 4]) and losses_of(out) == before


@pytest.mark.parametrize("iteration", [2, 4])
def test_an_evaluation_that_was_killed_is_made_again(drawn, warm, tmp_path, monkeypatch, iteration):
    out = tmp_path / "out"
    options = ["--data", drawn, "--out", out, *SMALL, "--init", warm, "--iters", 4, "--eval-every", 2]
    with monkeypatch.context() as patch:
        fail_at(patch, iteration, Killed())
        with pytest.raises(Killed):
            command(*options)
    assert load(out / "last.pt")["iteration"] == iteration and iteration not in evaluations(out)
    assert command(*options) == 0
    assert evaluations(out) == [2, 4] and len(losses_of(out)) == 4
    assert command(*options) == 0
    assert evaluations(out) == [2, 4]


def test_figures_are_in_their_file_before_they_are_printed(drawn, warm, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "print_tables", lambda _: seen.append(evaluations(tmp_path / "out")))
    assert command("--data", drawn, "--out", tmp_path / "out", *SMALL, "--init", warm, "--iters", 1) == 0
    assert seen == [[1]]


def test_a_log_that_cannot_be_written_does_not_end_the_run(drawn, tmp_path, monkeypatch, capsys):
    def full_log(*arguments):
        log = train_log(*arguments)
        log.file.close()
        log.file = open("/dev/full", "w", buffering=1)
        log.writer = SimpleNamespace(add_scalar=lambda *_: 1 / 0)
        return log

    train_log = train.Log
    monkeypatch.setattr(train, "Log", full_log)
    assert command(*only_training(drawn), "--out", tmp_path / "out", *SMALL, "--iters", 2) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert sum("metrics.jsonl cannot be written: No space left" in line for line in warnings) == 3
    assert sum("nothing more is written for TensorBoard" in line for line in warnings) == 1 and len(warnings) == 4
    assert load(tmp_path / "out/final.pt")["iteration"] == 2


def test_the_log_is_on_the_disk_before_a_checkpoint(drawn, tmp_path, monkeypatch):
    """A run that goes on from the checkpoint does not log these iterations again."""
    out, sync, save, synced, lines = tmp_path / "out", os.fsync, checkpoint.save, {}, []

    def fsync(number: int) -> None:
        sync(number)
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    def checked_save(state, path, *rest, **more):
        log = os.stat(out / "metrics.jsonl")
        assert synced[log.st_ino] == log.st_size
        lines.append((out / "metrics.jsonl").read_text().count("\n"))
        save(state, path, *rest, **more)

    def checked_replace(source, path) -> None:  # lines of earlier iterations, too
        assert not str(path).endswith("metrics.jsonl") or os.stat(source).st_ino in synced
        replace(source, path)

    replace = os.replace
    monkeypatch.setattr(os, "replace", checked_replace)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "save", checked_save)
    options = [*only_training(drawn), "--out", out, *SMALL, "--iters", 4, "--checkpoint-every", 2]
    assert command(*options) == 0
    assert lines == [2, 4, 4]  # last.pt, final.pt and last.pt


def test_a_checkpoint_that_cannot_be_written_ends_it(drawn, tmp_path, monkeypatch, capsys):
    original, out = checkpoint.save, tmp_path / "out"

    def save(state, path, *rest, **more):
        if state["iteration"] == 2:
            raise OSError(28, "No space left on device", str(path))
        original(state, path, *rest, **more)

    monkeypatch.setattr(checkpoint, "save", save)
    options = [*only_training(drawn), "--out", out, *SMALL, "--iters", 4, "--checkpoint-every", 1]
    assert command(*options) == 1
    assert str(out / "last.pt") in one_line_error(capsys) and load(out / "last.pt")["iteration"] == 1


def test_sizes_at_which_batch_norm_has_one_value(drawn, tmp_path, capsys):
    small = ["--min-size", 32, "--max-size", 32, "--teacher-min-size", 32, "--teacher-max-size", 32]
    options = [*only_training(drawn), *SMALL, "--iters", 1]
    for number, sizes in enumerate((small, [*small[:4], *SMALL[-8:-2]], ["--teacher-min-size", 32])):
        assert command(*options, *sizes, "--batch-size", 1, "--out", tmp_path / "out") == 1, number
        assert "--batch-size 2" in one_line_error(capsys) and not (tmp_path / "out").exists()
    assert command(*options, *small, "--batch-size", 2, "--out", tmp_path / "out") == 0
