"""The demo under visitors: how soon it can be used, whether all are answered, what memory it keeps.

    python tests/benchmarks/demo.py RUN [--visitors 20] [--questions 5] [--rounds 3]

Starts `aimv2-mllm demo RUN` on loopback. Each visitor shows a held-out sheet of his own and asks
about it in one conversation, all at once; every answer is compared with what the same model says to
that conversation without the demo. Memory is that of the server's process, after each round, when
its visitors have left. Gradio keeps something of the last 32 of them: rounds are level from the
second one on.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client import Client, handle_file

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.visitors import visit
from aimv2_mllm.visitors.showroom import Showroom, sheet

SETTLED = 3  # seconds until the server has noticed that a visitor left
SETTINGS = ["", 0, 1, 96, None]  # system prompt, temperature, top-p, longest answer, seed


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def started(run: str, port: int) -> tuple[subprocess.Popen[bytes], float]:
    """The server, and the seconds until its page could be loaded."""
    command = [sys.executable, "-m", "aimv2_mllm", "demo", run, "--port", str(port)]
    begun = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/config", timeout=5).status_code == 200:
                return server, time.perf_counter() - begun
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"the server ended with {server.returncode}")


def questions(seed: int, count: int) -> list[str]:
    """What visitor number `seed` asks about his sheet."""
    scene, random = scenes.scene(seed, "heldout", 0), scenes.generator(seed, "visitor")
    return [scenes.question(scene, random).text for _ in range(count)]


def expected(room: Showroom, file: Path, asked: list[str]) -> list[str]:
    """The answers of the same model, one conversation, without the demo."""
    shown: list[Any] = []
    for number, text in enumerate(asked):
        shown = visit.with_question(shown, text, [] if number else [str(file)])
        answer = "".join(room.ask(file.stem, room.names[0], shown, max_new_tokens=96))
        shown.append(visit.answer(answer or "(nothing)"))
    room.leave(file.stem)
    return _answers(shown)


def _answers(shown: list[Any]) -> list[str]:
    return [one["content"][0]["text"] for one in shown if one["role"] == "assistant"]


def visited(url: str, model: str, file: Path, asked: list[str]) -> tuple[list[str], list[float]]:
    """The answers that a visitor of the page gets, and the seconds that each took to be whole."""
    patient = {"timeout": 120}  # seconds; what is measured is the server, on a machine with others
    client = Client(url, verbose=False, httpx_kwargs=patient)
    history, seconds = list[Any](), list[float]()
    for number, text in enumerate(asked):
        parts = [] if number else [{"type": "file", "file": handle_file(file)}]
        history.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        if number:  # the server sent the picture back as a file of its own, which it knows
            history[0]["content"][0]["file"] = handle_file(file)
        begun = time.perf_counter()
        history, _ = client.predict(history, model, *SETTINGS, api_name="/answer")
        seconds.append(time.perf_counter() - begun)
    client.close()
    return _answers(history), seconds


def main() -> None:
    """Print start, and for each round answers, waiting and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    for name, default in (("visitors", 20), ("questions", 5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    room, port = Showroom([args.run]), free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"sheet-{seed}.png" for seed in range(args.visitors)]
        asked = [questions(seed, args.questions) for seed in range(args.visitors)]
        for seed, file in enumerate(files):
            sheet(seed)[0].save(file)
        truths = [expected(room, file, texts) for file, texts in zip(files, asked, strict=True)]
        server, seconds = started(args.run, port)
        spent = psutil.Process(server.pid).cpu_times()
        busy = spent.user + spent.system
        print(f"page after {seconds:.1f} s, {busy:.1f} s of them computing", flush=True)
        try:
            for number in range(args.rounds):
                round_(f"http://127.0.0.1:{port}", room.names[0], files, asked, truths)
                time.sleep(SETTLED)
                memory = psutil.Process(server.pid).memory_info().rss / 2**20
                print(f"round {number + 1}: server holds {memory:.0f} MiB", flush=True)
        finally:
            server.terminate()
            server.wait()


def round_(
    url: str, model: str, files: list[Path], asked: list[list[str]], truths: list[list[str]]
) -> None:
    """Let every visitor come at once, and print how it went."""
    tasks = list(zip(files, asked, strict=True))
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(files)) as pool:
        found = list(pool.map(lambda one: visited(url, model, *one), tasks))
    whole = time.perf_counter() - begun
    answers = [text for texts, _ in found for text in texts]
    true = [text for texts in truths for text in texts]
    right = [a == b for a, b in zip(answers, true, strict=True)]
    waits = sorted(second for _, seconds in found for second in seconds)
    print(
        f"{len(answers)} answers, {sum(right)} of them as without the demo, in {whole:.1f} s; "
        f"waited {waits[len(waits) // 2]:.2f} s (median), {waits[-1]:.2f} s (longest)"
    )


if __name__ == "__main__":
    main()
