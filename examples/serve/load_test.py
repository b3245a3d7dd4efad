"""Requests per second and latency of a server (serve.py) at stated concurrency, from this machine.

python examples/serve/load_test.py [--url http://127.0.0.1:8000] [--requests 500] [--concurrency 1 4 16]
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

TEXTS = [
    "The ferry leaves at seven.",
    "Half of the trees on the western slope were planted after the fire, and the rest are older than the village.",
    "Could you send me the report before the meeting on Thursday? I would like to read it on the train.",
]


def client(address: str, count: int, seconds: list[float], failures: list[str]) -> None:
    """Send ``count`` requests, one after the other, over one connection."""
    connection = http.client.HTTPConnection(address, timeout=30)
    for number in range(count):
        body = json.dumps({"texts": [TEXTS[number % len(TEXTS)]]})
        began = time.perf_counter()
        try:
            connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
        except OSError as error:
            failures.append(str(error))
            return
        if response.status != 200:
            failures.append(f"status {response.status}")
        seconds.append(time.perf_counter() - began)
    connection.close()


def measure(address: str, requests: int, concurrency: int) -> str:
    """One line of the table."""
    seconds: list[float] = []
    failures: list[str] = []
    share = -(-requests // concurrency)
    threads = [threading.Thread(target=client, args=(address, share, seconds, failures)) for _ in range(concurrency)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - began
    if failures or not seconds:
        sys.exit(f"error: {len(failures)} of {concurrency * share} requests failed, the first: {failures[0]}")
    seconds.sort()
    p50, p99 = (1000 * seconds[min(len(seconds) - 1, int(share * len(seconds)))] for share in (0.5, 0.99))
    return f"| {concurrency} | {len(seconds)} | {len(seconds) / passed:.0f} | {p50:.1f} | {p99:.1f} |"


def main() -> None:
    """Print a table, one row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    address = urlsplit(options.url).netloc
    client(address, 20, [], [])  # not counted
    print("| clients | requests | requests per second | p50 (ms) | p99 (ms) |\n| --- | --- | --- | --- | --- |")
    for concurrency in options.concurrency:
        print(measure(address, options.requests, concurrency), flush=True)


if __name__ == "__main__":
    main()
