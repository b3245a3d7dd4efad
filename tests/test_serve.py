"""The example that serves an export: right answers, 4xx for whatever cannot be read, a clean end on SIGTERM."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from study.files import Layout
from study.shipping.formats import WRITERS

for needed in ("fastapi", "uvicorn", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed, reason=f"examples/serve needs {needed}")
EXAMPLE = Path(__file__).parents[1] / "examples" / "serve"


def start(folder: Path) -> tuple[subprocess.Popen, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, EXAMPLE / "serve.py", folder, "--port", str(port)])
    for _ in range(600):
        try:
            if ask(port, "GET", "/health")[0] == 200:
                return server, port
        except OSError:
            assert server.poll() is None
            time.sleep(0.1)
    server.kill()
    raise AssertionError("the server did not start")


def ask(port: int, method: str, path: str, body: str | bytes | None = None, headers: dict | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    words = tiny.tokenizer(place / "words")
    WRITERS["onnx"](tiny.masked_language_model(), words, place / "export", Layout(place, "english"))
    return place / "export"


@pytest.fixture(scope="module")
def port(folder):
    server, port = start(folder)
    yield port
    server.terminate()
    server.wait(20)


def test_embeddings_are_the_mean_of_the_models_states(port, folder):
    texts = ["ax by cz", "b"]
    status, answer = ask(port, "POST", "/embed", json.dumps({"texts": texts}))
    assert status == 200
    model, words = tiny.masked_language_model().base_model, tiny.tokenizer(folder.parent / "words")
    for text, found in zip(texts, answer["embeddings"], strict=True):
        with torch.no_grad():
            states = model(**words(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(found, states[0].mean(dim=0), atol=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 422, "JSON"),
        (b"\xff\xfe", 422, "detail"),
        ('{"texts": []}', 422, "at least 1"),
        ('{"texts": [""]}', 422, "at least 1"),
        ('{"texts": "a"}', 422, "list"),
        ('{"texts": [1]}', 422, "string"),
        ('{"text": ["a"]}', 422, "texts"),
        ('{"texts": ["a"], "model": "b"}', 422, "model"),
        (json.dumps({"texts": ["a"] * 65}), 422, "at most 64"),
        (json.dumps({"texts": ["a" * 20_001]}), 422, "at most 20000"),
        (json.dumps({"texts": ["b", "ax " * 39]}), 422, r"texts[1] has 41 tokens; allowed: at most 40"),
        (" " * 1_000_001, 413, "at most 1000000"),
    ],
)
def test_what_cannot_be_read_is_answered_with_4xx_and_the_server_lives(port, body, status, said):
    found, answer = ask(port, "POST", "/embed", body)
    assert found == status and said in json.dumps(answer)
    assert ask(port, "POST", "/embed", '{"texts": ["ax"]}')[0] == 200


def test_a_body_of_unknown_length_is_refused(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/embed", iter([b"{}"]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 411


def test_the_load_test_counts_every_request(port):
    command = [sys.executable, EXAMPLE / "load_test.py", "--url", f"http://127.0.0.1:{port}", "--requests", "20"]
    rows = subprocess.run([*command, "--concurrency", "1", "3"], capture_output=True, text=True, check=True).stdout
    assert [row.split(" | ")[:2] for row in rows.splitlines()[2:]] == [["| 1", "20"], ["| 3", "21"]]
    gone = subprocess.run([*command[:-3], "http://127.0.0.1:9"], capture_output=True, text=True)
    assert gone.returncode == 1 and "requests failed" in gone.stderr and "Traceback" not in gone.stderr


def test_sigterm_answers_what_is_under_way_and_ends_cleanly(folder):
    server, port = start(folder)
    answers: list[int] = []
    body = json.dumps({"texts": ["ax " * 30] * 64})
    clients = [threading.Thread(target=lambda: answers.append(ask(port, "POST", "/embed", body)[0])) for _ in range(4)]
    for client in clients:
        client.start()
    while not any(not client.is_alive() for client in clients):  # one is answered: the others were sent, too
        time.sleep(0.001)
    server.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    assert server.wait(20) == 0 and answers == [200] * 4


def test_a_folder_that_is_no_export_is_told_in_one_line(tmp_path):
    found = subprocess.run([sys.executable, EXAMPLE / "serve.py", tmp_path], capture_output=True, text=True)
    assert found.returncode == 1 and "model.onnx is missing" in found.stderr and "Traceback" not in found.stderr
