"""What serves a model how fast: the file that `make runtimes` writes, and the tables that it gives."""

from __future__ import annotations

import pandas as pd
from pydantic import Field

from study.analysis.numbers.results import FLOOR
from study.descriptions import TEACHER
from study.files import Layout
from study.records import Record, ResultFile

#: Runtime -> the precision that it computes in, which decides the quality.
PRECISIONS = {"eager": "fp32", "compiled": "fp32", "bf16": "bf16", "onnx": "fp32", "onnx-int8": "int8"}
LABELS = {
    "eager": "PyTorch",
    "compiled": "PyTorch, compiled",
    "bf16": "PyTorch, bf16",
    "onnx": "ONNX Runtime",
    "onnx-int8": "ONNX Runtime, int8",
}
#: What ``input`` of a timing may be, beside a number of tokens.
TEXTS = "texts"


class Timing(Record):
    """One model in one runtime; seconds of a batch. ``p99`` where at least 100 runs were counted.

    ``input``: ``texts`` as served (tokenised, encoded, pooled), or a number of tokens (encoded alone, no padding).
    """

    model: str
    runtime: str
    input: str
    batch_size: int
    threads: int
    runs: int
    lower_quartile: float = Field(gt=0)
    p50: float = Field(gt=0)
    upper_quartile: float = Field(gt=0)
    p90: float = Field(gt=0)
    p99: float | None


class Footprint(Record):
    """``file_bytes`` of the weights; ``memory_bytes``: peak of a process that serves this alone; None: not known."""

    model: str
    runtime: str
    file_bytes: int
    memory_bytes: int | None


class Quality(Record):
    """Task -> development score of a linear probe fitted on the float32 states; ``cosine``: smallest, with those.

    ``run``: the name of the trained run, which says its budget; ``teacher``.
    """

    model: str
    method: str
    run: str
    precision: str
    cosine: float
    tasks: dict[str, float]


class RuntimesResult(ResultFile):
    """``absent``: runtime -> why it was not measured; ``load``: processes that wanted to run, at start and end."""

    absent: dict[str, str]
    load: list[float]
    timings: list[Timing]
    footprints: list[Footprint]
    qualities: list[Quality]


def timings(result: RuntimesResult) -> pd.DataFrame:
    """Every timing in milliseconds, with ``texts_per_second`` and ``speed_up`` over the teacher in eager PyTorch."""
    rows = pd.DataFrame([entry.model_dump() for entry in result.timings])
    seconds = ["lower_quartile", "p50", "upper_quartile", "p90", "p99"]
    rows[seconds] = rows[seconds].astype(float) * 1000
    rows["texts_per_second"] = 1000 * rows["batch_size"] / rows["p50"]
    place = ["input", "batch_size", "threads"]
    teacher = rows.query("model == 'teacher' and runtime == 'eager'").set_index(place)["p50"]
    rows["speed_up"] = rows.join(teacher.rename("teacher"), on=place)["teacher"] / rows["p50"]
    return rows


def served(layout: Layout, student: str) -> dict[str, tuple[float, float]]:
    """Runtime -> milliseconds (median) of one text on one thread, as served, for a student's shape and for its teacher.

    From the table of timings beside the report; empty where the setting's students were not timed.
    """
    path = layout.analysis("runtimes") / "timings.csv"
    if not path.is_file():
        return {}
    timed = pd.read_csv(path, dtype={"input": str}).query("input == @TEXTS and batch_size == 1 and threads == 1")
    wide = timed.pivot(index="runtime", columns="model", values="p50").reindex([*LABELS])
    if not {student, TEACHER} <= set(wide):
        return {}
    known = wide[[student, TEACHER]].dropna()
    return {str(runtime): (float(own), float(teacher)) for runtime, own, teacher in known.itertuples()}


def choices(result: RuntimesResult) -> pd.DataFrame:
    """Every model with weights in every runtime: quality, latency of one text as served on one thread, size.

    The slowest comes first.

    Columns: model, method, run, runtime, precision, score (mean development score of the probe over tasks, 0-100), loss
    (points below the teacher in float32), milliseconds (median), p90, speed_up, megabytes (file), memory_megabytes
    (process), front: trained, above the untrained student of its shape and precision, and no other row of that
    kind that is as fast scores as high. The rule knows no chance: any difference counts, one below the sampling
    error too.

    Source: this study's choice.
    """
    timed = timings(result).query("input == @TEXTS and batch_size == 1 and threads == 1")
    sizes = pd.DataFrame([entry.model_dump() for entry in result.footprints]).set_index(["model", "runtime"])
    sizes = sizes.astype(float)
    rows = []
    for quality in result.qualities:
        score = 100 * sum(quality.tasks.values()) / len(quality.tasks)
        fits = (timed["model"] == quality.model) & (timed["runtime"].map(PRECISIONS) == quality.precision)
        for row in timed[fits].itertuples():
            size = sizes.loc[(row.model, row.runtime)]
            facts = {"model": row.model, "method": quality.method, "run": quality.run, "runtime": row.runtime}
            facts |= {"precision": quality.precision, "score": score, "milliseconds": row.p50, "p90": row.p90}
            facts |= {"speed_up": row.speed_up, "megabytes": size["file_bytes"] / 1e6}
            rows.append(facts | {"memory_megabytes": size["memory_bytes"] / 1e6})
    table = pd.DataFrame(rows).sort_values(["milliseconds", "score"], ascending=[False, True], ignore_index=True)
    whole = table.query("model == 'teacher' and precision == 'fp32'")["score"].iloc[0]
    table.insert(6, "loss", whole - table["score"])
    floors = table[table["method"] == FLOOR].groupby(["model", "precision"])["score"].first()
    floor = table.join(floors.rename("floor"), on=["model", "precision"])["floor"].fillna(float("-inf"))
    able = table["score"].where((table["method"] != FLOOR) & (table["score"] > floor), float("-inf"))
    best_of_faster = able[::-1].cummax().shift(fill_value=float("-inf"))[::-1]
    return table.assign(front=able > best_of_faster)
