"""Peak memory of a process that serves one model; run as a file, so that nothing of the study is loaded with it.

python study/shipping/memory.py RUNTIME FOLDER prints bytes, or nothing where the system does not say.
"""

from __future__ import annotations

import sys
from pathlib import Path


def serve(runtime: str, folder: str, texts: list[str]) -> None:
    """Load tokenizer and model and encode the texts one after the other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    if runtime.startswith("onnx"):
        import numpy
        from onnxruntime import InferenceSession

        session = InferenceSession(f"{folder}/model.onnx")
        for text in texts:
            ids = numpy.array([tokenizer.encode(text).ids])
            session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})
    else:
        import torch
        from transformers import AutoModel

        dtype = torch.bfloat16 if runtime == "bf16" else torch.float32
        model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        call = torch.compile(model, dynamic=True) if runtime == "compiled" else model
        with torch.inference_mode():
            for text in texts:
                call(input_ids=torch.tensor([tokenizer.encode(text).ids]))


def peak() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")  # ru_maxrss would count the parent, too
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], ["A text.", "A longer text of a few more words.", "word " * 30])
    print(peak() or "")
