"""Serve an exported student over HTTP: ONNX Runtime behind FastAPI, without PyTorch.

python examples/serve/serve.py EXPORT [--port 8000] [--threads 1]

EXPORT is a folder of ``make export FORMAT=onnx`` or ``onnx-int8``. ``POST /embed`` with ``{"texts": ["..."]}`` answers
``{"embeddings": [[...]]}``: mean pooled hidden states. Whatever cannot be read is answered with a 4xx and one line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from onnxruntime import InferenceSession, SessionOptions
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer

#: Texts and characters of a text that one request may have, and bytes of its body.
TEXTS, CHARACTERS, BYTES = 64, 20_000, 1_000_000


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: list[Annotated[str, Field(min_length=1, max_length=CHARACTERS)]] = Field(min_length=1, max_length=TEXTS)


class Encoder:
    """Texts to embeddings, by the files of an export."""

    def __init__(self, folder: Path, threads: int):
        options = SessionOptions()
        options.intra_op_num_threads = threads
        self.session = InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = json.loads((folder / "config.json").read_text())
        roberta = config["model_type"] in ("roberta", "xlm-roberta", "camembert")  # positions begin behind padding
        self.positions = config["max_position_embeddings"] - (config["pad_token_id"] + 1 if roberta else 0)
        self.padding = config.get("pad_token_id") or 0

    def __call__(self, texts: list[str]) -> list[list[float]]:
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        for place, row in enumerate(rows):
            if len(row) > self.positions:
                problem = f"texts[{place}] has {len(row)} tokens; allowed: at most {self.positions}"
                raise HTTPException(422, problem)
        ids = np.full((len(rows), max(map(len, rows))), self.padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        (states,) = self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        weights = mask[..., None].astype(np.float32)
        return ((states * weights).sum(axis=1) / weights.sum(axis=1)).tolist()


class BodyLimit:
    """Refuse bodies that are too long, or do not say how long they are, before they are read."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"").decode()
            if not length.isdigit():
                return await JSONResponse({"detail": "Content-Length is missing"}, 411)(scope, receive, send)
            if int(length) > BYTES:
                problem = f"the body has {length} bytes; allowed: at most {BYTES}"
                return await JSONResponse({"detail": problem}, 413)(scope, receive, send)
        await self.app(scope, receive, send)


def make_app(folder: Path, threads: int = 1) -> FastAPI:
    """The application that serves one export."""
    encoder, app = Encoder(folder, threads), FastAPI(title="A distilled text encoder")
    app.add_middleware(BodyLimit)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/embed")  # not async: FastAPI runs it in a thread, and ONNX Runtime lets others work meanwhile
    def embed(request: Request) -> dict[str, list[list[float]]]:
        return {"embeddings": encoder(request.texts)}

    return app


def main() -> None:
    """Serve until SIGTERM or SIGINT; requests that are under way are answered first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder with model.onnx, tokenizer.json and config.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of a request")
    options = parser.parse_args()
    for name in ("model.onnx", "tokenizer.json", "config.json"):
        if not (options.export / name).is_file():
            sys.exit(f"error: {options.export / name} is missing; `make export FORMAT=onnx-int8` writes it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn stops serving first, then passes the signal on
    app = make_app(options.export, options.threads)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
