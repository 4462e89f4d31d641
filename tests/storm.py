"""Kill small runs again and again, and compare what survives with a run that nobody disturbed.

    python tests/storm.py FOLDER [--kills 105] [--seed 0]

Runs of one and of two processes, with and without loading processes, evaluations among their iterations, in turn. Each
is started, struck at a random moment and started again until it is complete:

    SIGKILL     to one of its processes, any moment; the others end as torchrun would end them
    SIGTERM     to all of them, twice, as a scheduler and torchrun send it;   SIGHUP    to all
    loader      SIGKILL to a loading process: the run goes on, and is killed later
    disk        no file may grow beyond a random size, so a checkpoint cannot be written

At the end weights, logged losses and evaluations must equal those of the undisturbed run to the last bit, and
metrics.jsonl must have each iteration once. Exits with 1 where they do not.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import train  # noqa: E402
from formats.checkpoint import load  # noqa: E402
from formats.shapes import write_shapes  # noqa: E402

OPTIONS = ("--backbone r18-slim --channels 32 --backbone-weights none --min-size 64 --max-size 64 --schedule 1x "
           "--teacher-min-size 64 --teacher-max-size 64 --device cpu --batch-size 2 --log-every 1 --iters 30 "
           "--eval-every 15 --checkpoint-every 2 --lr 1e-3 --augment strong").split()
KINDS = [(processes, workers) for processes in (1, 2) for workers in (0, 2)]
STRIKES = ("SIGKILL", "SIGTERM", "SIGHUP", "loader", "disk")


def start(options: list[str], processes: int, log: Path, largest: int | None) -> list[int]:
    """Fork the processes of a run, as torchrun would start them; returns their ids. largest: bytes of a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            run_process(options, processes, rank, port, log, largest)
        children.append(child)
    return children


def run_process(options: list[str], processes: int, rank: int, port: int, log: Path, largest: int | None) -> None:
    """The child's part: train, and end."""
    status = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the storm itself ignores it
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train.main(options)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        print(f"traceback {error!r}")
    finally:
        sys.stdout.flush()
        os._exit(status)


def alive(children: dict[int, int | None]) -> list[int]:
    """The processes that have not ended; the exit status of the others is filled in."""
    for child, status in children.items():
        if status is None:
            pid, how = os.waitpid(child, os.WNOHANG)
            children[child] = os.waitstatus_to_exitcode(how) if pid else None
    return [child for child, status in children.items() if status is None]


def wait(children: dict[int, int | None], done: Callable[[], bool], seconds: float) -> bool:
    """Wait until `done` or a process has ended; False where that takes too long."""
    until = time.monotonic() + seconds
    while len(alive(children)) == len(children) and not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def end(children: dict[int, int | None], seconds: float) -> bool:
    """Wait for all processes; after that time kill them, and return False."""
    until = time.monotonic() + seconds
    while alive(children) and time.monotonic() < until:
        time.sleep(0.01)
    late = alive(children)
    for child in late:
        os.kill(child, signal.SIGKILL)
    while alive(children):
        time.sleep(0.01)
    return not late


def lines(out: Path) -> list[dict]:
    """Whole lines of metrics.jsonl; the last one may be half written."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def loaders(children: dict[int, int | None]) -> list[int]:
    """The children of the processes."""
    found = []
    for child in children:
        try:
            found += [int(word) for word in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
        except OSError:
            pass
    return found


def signal_all(children: list[int], number: int) -> None:
    for child in children:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass


def strike(kind: str, children: dict[int, int | None], out: Path, seen: int, chance: random.Random) -> str | None:
    """Do it to a run that logs its iterations; returns what is wrong with the way in which the run took it."""
    if kind == "loader":
        signal_all(chance.sample(found := loaders(children), min(1, len(found))), signal.SIGKILL)
        now = len(lines(out))
        if not wait(children, lambda: len(lines(out)) > now + 2, 60):
            return "a run stands still without its loading process"
        if any(children.values()):
            return "a run ended with its loading process"
    if kind in ("SIGTERM", "SIGHUP"):
        for _ in range(2):
            signal_all(alive(children), getattr(signal, kind))
            time.sleep(chance.random() * 0.1)
        whole = end(children, 60)
        saved = load(out / "last.pt")["iteration"] if (out / "last.pt").exists() else 0
        if len(lines(out)) > seen and (not whole or saved < max(line["iter"] for line in lines(out))):
            return f"{kind} ended a run before it had saved"
    else:
        signal_all(chance.sample(left := alive(children), min(1, len(left))), signal.SIGKILL)
    signal_all(alive(children), signal.SIGTERM)
    end(children, 2)
    return None


def undisturbed(folder: Path, data: Path, processes: int, workers: int) -> Path:
    out = folder / f"undisturbed-{processes}-{workers}"
    options = ["--data", str(data), "--out", str(out), "--workers", str(workers), *OPTIONS]
    children = dict.fromkeys(start(options, processes, folder / "undisturbed.log", None))
    assert end(children, 600) and not any(children.values()), f"see {folder}/undisturbed.log"
    return out


def without_times(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines(out)]


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two runs that are complete."""
    wrong = [] if without_times(one) == without_times(two) else [f"{two}: metrics.jsonl differs"]
    iterations = [line["iter"] for line in lines(two) if "loss" in line]
    if iterations != list(range(1, len(iterations) + 1)):
        wrong.append(f"{two}: iterations {iterations}")
    a, b = load(one / "final.pt"), load(two / "final.pt")
    for network in ("student", "teacher"):
        if not all(torch.equal(a[network][name], b[network][name]) for name in a[network] | b[network]):
            wrong.append(f"{two}: the {network} differs")
    return wrong


def survive(folder: Path, data: Path, number: int, kills: int, chance: random.Random,
            count: Counter) -> tuple[Path, list[str]]:
    """Strike a run until it is complete, or let it end once there were enough `kills`."""
    processes, workers = KINDS[number % len(KINDS)]
    out, wrong = folder / f"run-{number}", []
    options = ["--data", str(data), "--out", str(out), "--workers", str(workers), *OPTIONS]
    while True:
        kind = chance.choice([kind for kind in STRIKES if workers or kind != "loader"])
        if sum(count.values()) >= kills:
            kind = "none"
        size = (out / "last.pt").stat().st_size if (out / "last.pt").exists() else 4_000_000
        largest = chance.randrange(size // 4, size) if kind == "disk" else None
        seen = len(lines(out))
        children = dict.fromkeys(start(options, processes, folder / f"run-{number}.log", largest))
        if kind in ("none", "disk"):
            if not end(children, 300):
                wrong.append(f"{out} hangs ({kind})")
        else:
            more = chance.randrange(4)
            wait(children, lambda: len(lines(out)) >= seen + more and more > 0, 60 if more else chance.random())
            time.sleep(chance.random() * 0.3)
            if len(alive(children)) == processes:
                if problem := strike(kind, children, out, seen, chance):
                    wrong.append(f"{out}: {problem}")
            end(children, 60)
        if all(status == 0 for status in children.values()):
            return out, wrong
        if kind == "none":
            return out, [*wrong, f"{out} fails: {children}"]
        count[f"{kind}, {processes} process{'es' * (processes > 1)}"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=105)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True)
    data = args.folder / "data"
    write_shapes(data, train=12, val=3, size=64)
    references, count, wrong, number, chance = {}, Counter(), [], 0, random.Random(args.seed)
    while sum(count.values()) < args.kills:
        kind = KINDS[number % len(KINDS)]
        if kind not in references:
            references[kind] = undisturbed(args.folder, data, *kind)
        out, problems = survive(args.folder, data, number, args.kills, chance, count)
        wrong += problems + (differences(references[kind], out) if (out / "final.pt").exists() else [])
        print(f"run {number} ({kind[0]} processes, {kind[1]} loaders): {sum(count.values())} kills so far, "
              f"{len(wrong)} faults", flush=True)
        number += 1
    tracebacks = sum(path.read_text().count("traceback") for path in args.folder.glob("run-*.log"))
    print(*(f"{kind}: {times}" for kind, times in sorted(count.items())), *wrong, sep="\n")
    print(f"{sum(count.values())} kills of {number} runs, {len(wrong)} faults, {tracebacks} tracebacks")
    shutil.rmtree(data)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
