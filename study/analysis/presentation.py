"""Tables as readers see them: words for names, numbers to few digits, no index; in notebooks and in the report alike.

Each function takes what :mod:`study.analysis.numbers` computed and returns a pandas Styler. The same numbers give the
same HTML.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from study.analysis.figures.style import METRICS, in_words, label, short, titled, varied
from study.analysis.numbers.ablations import rate_variants, sentences
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.published import PUBLISHED
from study.analysis.numbers.results import BASELINE, FLOOR, PACKAGES, RUN, TEACHER
from study.analysis.numbers.selection import RULES
from study.analysis.numbers.statistics import DISTILLATION_SEEDS, TOLD_APART, covered
from study.analysis.numbers.tables import MEAN
from study.analysis.numbers.text import NOTHING, interval, number, p_value, percent, rate, with_interval
from study.sections import BASE_BUDGET

MODEL = ["student", "method"]
MARKED = "font-weight: 600; background-color: #e3effa"
#: Where a contrast's test has the effect; {} is its margin.
CLAIMED = {"superior": "above zero", "non-inferior": "above −{:g}", "equivalent": "between −{0:g} and {0:g}"}


def styled(
    rows: Iterable[dict] | pd.DataFrame,
    name: str,
    caption: str = "",
    *,
    setting: str = "",
    words: Collection[str] = (),
    wide: Collection[str] = (),
    marked: Mapping[str, str] | None = None,
    groups: str | Sequence[str] = (),
    cards: bool = True,
) -> Styler | None:
    """A table for readers; None without rows.

    Args:
        rows: column as readers see it -> text or number; missing numbers become dashes.
        name: of the table, unlike any other of the same setting on its page.
        caption: what stands above it, after the setting if it is of one.
        words: columns of words, to the left; all others are to the right.
        wide: those of them whose lines may be broken.
        marked: cells, as CSS selects them -> their look.
        groups: what the rows belong to, or the column that says it; a line is drawn where it changes, unless it
            changes in every row.
        cards: whether pages show each row as a card where there is little room, headed by its first column, and its
            second if that is of words.
    """
    frame = pd.DataFrame(rows).reset_index(drop=True)
    if frame.empty:
        return None
    text = html.escape(caption, quote=False)
    if setting:
        name, text = f"{name}-{setting}", f"<b>{html.escape(titled(setting))}.</b> {text}"
    table = Styler(frame, uuid=name, cell_ids=False, caption=text or None, escape="html", na_rep=NOTHING)
    table = table.hide(axis="index").format_index(escape="html", axis="columns")
    if cards:
        table = table.set_table_attributes('class="cards"')
    looks: list[Any] = []
    for place, column in enumerate(frame.columns):
        if cards:
            heading = place == 0 or (place == 1 and column in words)
            named = [("--name", '""'), ("--weight", "650")] if heading else [("--name", _css_text(f"{column}: "))]
            looks.append({"selector": f"td.col{place}", "props": named})
        if column in (*words, *wide):
            looks.append({"selector": f"th.col{place}, td.col{place}", "props": "text-align: left"})
        if column in wide:
            looks.append({"selector": f"td.col{place}", "props": "white-space: normal; min-width: 7rem"})
    looks += [{"selector": cells, "props": look} for cells, look in (marked or {}).items()]
    groups = list(frame[groups]) if isinstance(groups, str) else groups
    begins = [place for place, (before, after) in enumerate(itertools.pairwise(groups), start=1) if before != after]
    if len(begins) < len(groups) - 1:
        looks += [{"selector": f"td.row{place}", "props": "border-top: 2px solid #59636e"} for place in begins]
    return table.set_table_styles(looks)


def _css_text(text: str) -> str:
    """A text as CSS writes it."""
    return '"' + "".join(f"\\{ord(c):x} " if c in '"\\<>&\n' else c for c in text) + '"'


def model_words(student: str, method: str) -> dict[str, str]:
    """The first columns of a row about a model; the teacher has no method."""
    return {"student": student, "method": NOTHING if method == TEACHER else label(method)}


def overview(analyses: Sequence[Analysis]) -> Styler | None:
    """What was run in every setting, ablations included: models, tokens, hours as one process after another, where."""
    columns = {}
    for analysis in analyses:
        everything = pd.concat([analysis.results.runs, analysis.ablated.runs]).drop_duplicates(RUN)
        runs = everything[everything["method"] != TEACHER]
        tokens = sorted(runs["tokens"].dropna().unique() / 1e6)
        hours = runs[["seconds", "evaluation_seconds"]].sum().sum() / 3600
        others = sum(budget != BASE_BUDGET for *_, budget in analysis.comparison.every_cell())
        columns[titled(analysis.setting)] = {
            "teacher": analysis.comparison.teacher.name,
            "students": ", ".join(analysis.comparison.students),
            "distillation seeds": str(len(analysis.comparison.seeds)),
            "students distilled or left untrained, ablations included": str(len(runs)),
            "million tokens of distillation each": " to ".join(number(t, 1) for t in tokens[:1] + tokens[1:][-1:]),
            "hours of distillation and evaluation": number(hours, 1),
            **({"trained for other numbers of tokens, beside them": str(others)} if others else {}),
            "measured": " to ".join(sorted({everything["date"].min(), everything["date"].max()})),
            "on": " and ".join(everything["processor"].unique()),
            "cores": " or ".join(str(cores) for cores in sorted(everything["cores"].unique())),
        }
    return _columns(columns, "overview")


def _columns(columns: dict[str, dict[str, str]], name: str, *caption: str, **looks: Any) -> Styler | None:
    """A table with a column for each entry, their keys before them; lines may be broken."""
    table = pd.DataFrame(columns).rename_axis("").reset_index()
    return styled(table, name, *caption, wide=list(table.columns), **looks)


def versions(analyses: Sequence[Analysis]) -> Styler | None:
    """Versions of packages, and the commit that models were evaluated at."""
    runs = pd.concat([analysis.results.runs for analysis in analyses])
    rows = [{"what": package, "version": ", ".join(runs[package].unique())} for package in PACKAGES]
    if commits := ", ".join(runs["commit"].dropna().unique()):
        rows.append({"what": "evaluated at commit", "version": commits})
    return styled(rows, "versions", words=["what"], wide=["version"])


def headline(analyses: Sequence[Analysis]) -> Styler | None:
    """Each student's best method beside the untrained floor, a column per setting and student."""
    columns = {}
    for analysis in analyses:
        first = analysis.timed.iloc[0]
        timed = f"batch of {first['batch_size']}, {first['threads']} thread{'s' if first['threads'] != 1 else ''}"
        for student, best in analysis.headline["students"].items():
            bounds = (best["retained_percent_low"], best["retained_percent_high"])
            columns[f"{titled(analysis.setting)}, {student}"] = {
                "of the teacher's macro test score": percent(best["retained_percent"]),
                "95 % interval": interval(*bounds, 1).strip(" ()") or NOTHING,
                "the floor: untrained": floor_of(analysis, student),
                "method": label(best["method"]),
                "which is": RULES[analysis.headline["rule"]].best,
                "over no training": _margin(best, FLOOR),
                "over MLM alone": _margin(best, BASELINE),
                f"speed-up ({timed})": f"{number(best['speed_up'], 2)} ×",
                "macro test score": number(100 * best["test"], 1),
                "its teacher's": number(100 * analysis.headline["teacher"]["test"], 1),
            }
    seeds = " and ".join(dict.fromkeys(covered(analysis.scores) for analysis in analyses))
    large = {"td.row0:not(.col0)": "font-size: 1.7em; font-weight: 650; white-space: nowrap"}
    return _columns(columns, "headline", f"Intervals: 95 %, over {seeds}.", marked=large)


def floor_of(analysis: Analysis, student: str) -> str:
    """What the untrained student keeps of the teacher's score; a dash where it was not run."""
    kept = analysis.summary.set_index(["method", "student"])["retained"]
    return percent(100 * kept.get((FLOOR, student), math.nan))


def _margin(best: dict, baseline: str) -> str:
    key = f"margin_over_{baseline}"
    if key not in best:
        return NOTHING
    return f"{number(best[key], 2, '+')} points{interval(best[f'{key}_low'], best[f'{key}_high'], 2, '+')}"


def verdicts(analysis: Analysis) -> Styler | None:
    """The verdict on every claim with its reason and its decisive contrast."""
    rows = []
    for row in analysis.verdicts.to_dict("records"):
        doubtful = len(row["not_above_floor"].split(", ")) if row["not_above_floor"] else 0
        doubt = f" ({doubtful} of its methods not shown above the untrained student)" if doubtful else ""
        reason = f": {in_words(row['reason'], short)}" if row["reason"] else ""
        contrast = f"{in_words(row['contrast'], short)}, claimed to be {CLAIMED[row['test']].format(row['margin'])}"
        rows.append(
            {
                "": row["claim"],
                "claim": f"{row['text']} ({row['standing']})",
                "verdict": f"{row['verdict']}{reason}{doubt}",
                "decisive contrast": contrast if pd.notna(row["effect"]) else "",
                "effect (interval)": with_interval((row["effect"], row["low"], row["high"]), 1, "+"),
                "models": row["runs"],
            }
        )
    students = ", ".join(analysis.comparison.students)
    caption = f"Students {students}; intervals over {covered(analysis.scores)}."
    wide = ["claim", "verdict", "decisive contrast"]
    return styled(rows, "verdicts", caption, setting=analysis.setting, words=[""], wide=wide)


def scores(analysis: Analysis, deviations: bool = False) -> Styler | None:
    """Test scores x 100 per task, macro, retained and what the last interval brought; the chosen methods are marked.

    Args:
        deviations: with the standard deviation of every task's score.
    """
    table, tasks = analysis.per_task, [task for task in analysis.comparison.tasks if task in analysis.per_task]
    falls = analysis.distillation.groupby(["method", "student"])["last_interval_percent"].mean()
    rows = []
    for _, row in table.iterrows():
        known = {task: 100 * row[f"{task}_sd"] for task in tasks if deviations and pd.notna(row[f"{task}_sd"])}
        spread = {task: f" ± {number(known[task], 1)}" if task in known else "" for task in tasks}
        kept = with_interval(100 * row[["retained", "retained_low", "retained_high"]], 1)
        rows.append(
            model_words(row["student"], row["method"])
            | {task: number(100 * row[task], 1) + spread[task] for task in tasks}
            | {"macro": number(100 * row["macro"], 1), "kept, % (interval)": kept}
            | {"last of the fall, %": number(falls.get((row["method"], row["student"]), math.nan), 1)}
        )
    marked = {f"td.row{place}": MARKED for place in np.flatnonzero(table["selected"])}
    looks: dict[str, Any] = {"words": MODEL, "marked": marked, "groups": "student"}
    return styled(rows, "scores", f"Intervals over {covered(analysis.scores)}.", setting=analysis.setting, **looks)


def tasks(analysis: Analysis) -> Styler | None:
    """Metric and test examples of every task, and what its scores may be set against."""
    rows = [
        {
            "task": row.task,
            "metric": METRICS.get(row.metric, row.metric),
            "test examples": f"{row.test_examples:,}",
            "standard error of the teacher's": number(100 * row.standard_error, 1),
            "score of always giving the commonest label": number(100 * row.majority_share, 1),
        }
        for row in analysis.sampling_error.itertuples()
    ]
    return styled(rows, "tasks", "The tasks.", setting=analysis.setting, words=["task", "metric"])


def languages(analysis: Analysis) -> list[Styler | None]:
    """Test scores x 100 by language, a table for each task that has several."""
    shown = []
    for task, table in analysis.per_language.groupby("task", sort=False):
        tested = [name for name in table.columns[5:] if table[name].notna().any()]
        if len({*tested} & {*table.columns[5:-3]}) < 2:
            continue
        if "gap" not in tested:
            del tested[-1]  # the mean of the others is the mean
        rows = [
            model_words(row["student"], row["method"])
            | {name.replace("_", " ").replace("english", "English"): number(100 * row[name], 1) for name in tested}
            for row in table.to_dict("records")
        ]
        looks: dict[str, Any] = {"words": MODEL, "groups": "student"}
        shown.append(styled(rows, f"languages-{task}", f"Task {task}.", setting=analysis.setting, **looks))
    return shown


def costs(analysis: Analysis) -> Styler | None:
    """Size, latency of the smallest batch and throughput of the largest one, beside the teacher's."""
    table, first = analysis.costs, analysis.results.latency.iloc[0]
    sizes = sorted(analysis.results.latency["batch_size"].unique())
    rows, measures = [], [f"latency_ms_{end}batch_{sizes[0]}" for end in ("", "lower_quartile_", "upper_quartile_")]
    for _, row in table.iterrows():
        rows.append(
            {
                "model": row["student"],
                "threads": row["threads"],
                "parameters (M)": number(row["parameters"] / 1e6, 1),
                "without embeddings (M)": number(row["encoder_parameters"] / 1e6, 1),
                "GFLOPs": number(row["flops_per_sequence"] / 1e9, 2),
                f"latency (ms), batch of {sizes[0]}": with_interval(row[measures], 1),
                f"speed-up, batch of {sizes[0]}": f"{number(row[f'speed_up_batch_{sizes[0]}'], 2)} ×",
                f"sequences / s, batch of {sizes[-1]}": number(row[f"sequences_per_second_batch_{sizes[-1]}"], 0),
                f"speed-up, batch of {sizes[-1]}": f"{number(row[f'speed_up_batch_{sizes[-1]}'], 2)} ×",
            }
        )
    caption = (
        f"{first['sequence_length']} tokens without padding, {first['precision']}; medians"
        f" of {first['runs']} runs after {first['warmup_runs']} uncounted ones, quartiles in brackets."
    )
    return styled(rows, "costs", caption, setting=analysis.setting, words=["model"])


def published(analyses: Sequence[Analysis]) -> Styler | None:
    """What others published, and what this study's students keep, marked."""
    rows = [
        {"student": row.student, "teacher": row.teacher, "method": row.method, "measure": row.measure}
        | {"score": number(row.score, 1), "of its teacher's": f"{row.retained:.1f} %" if row.retained else NOTHING}
        | {"floor": NOTHING, "source": row.source}
        for row in PUBLISHED
    ]
    ours = [
        {"student": f"{titled(analysis.setting)}, {student}", "teacher": analysis.comparison.teacher.name}
        | {"method": label(best["method"]), "measure": "macro test score", "score": number(100 * best["test"], 1)}
        | {"of its teacher's": percent(best["retained_percent"]), "floor": floor_of(analysis, student)}
        | {"source": "this study"}
        for analysis in analyses
        for student, best in analysis.headline["students"].items()
    ]
    marked = {f"td.row{len(rows) + place}": MARKED for place in range(len(ours))}
    wide = ["student", "method", "measure", "source"]
    return styled([*rows, *ours], "published", words=["teacher"], wide=wide, marked=marked)


def unlearnt(analyses: Sequence[Analysis]) -> Styler | None:
    """Methods whose own held-out loss is higher after training than before (mean ratio of seeds); None without any."""
    rows = []
    for analysis in analyses:
        losses = analysis.results.curves.groupby(RUN, sort=False)["loss"].agg(["first", "last"])
        ratios = (losses["last"] / losses["first"]).groupby(["student", "method"], sort=False).mean()
        rates = analysis.distillation.groupby(["student", "method"])["learning_rate"].first()
        rows += [
            {"setting": titled(analysis.setting)}
            | model_words(*model)
            | {"learning rate": f"{rates[model]:g}", "held-out loss, times that before": number(ratio, 1)}
            for model, ratio in ratios.items()
            if ratio > 1
        ]
    caption = "Methods that training harmed: these scores say nothing of the method at a rate that suits the student."
    return styled(rows, "unlearnt", caption, words=["setting", *MODEL])


def rates_that_matter(analyses: Sequence[Analysis]) -> Styler | None:
    """Methods that another rate than theirs is told apart from; None without any."""
    rows = []
    for analysis in analyses:
        table = analysis.effects[analysis.effects["variant"].isin(rate_variants(analysis.comparison))]
        rows += [
            {"setting": analysis.setting, "method": label(row.reference)}
            | {"at a learning rate of": f"{row.learning_rate:g}", "instead of": f"{row.reference_learning_rate:g}"}
            | {"points (interval)": with_interval((row.effect, row.low, row.high), 1, "+")}
            for row in table.itertuples()
            if row.covers in DISTILLATION_SEEDS and row.p_holm <= TOLD_APART
        ]
    caption = "Methods whose place is a matter of their learning rate as much as of what they transfer."
    return styled(rows, "rates", caption, words=["setting", "method"])


def differences(analysis: Analysis) -> list[Styler | None]:
    """Paired differences between all methods, a matrix for each student and, of several, one for their mean."""
    tables = enumerate(analysis.differences.groupby("student", sort=False))
    said, how = {MEAN: "Mean over students"}, "points (intervals: differences.csv below)"
    return [_matrix(analysis, f"{said.get(s, s)}: {how}", own, f"differences-{place}") for place, (s, own) in tables]


def _matrix(analysis: Analysis, what: str, table: pd.DataFrame, name: str) -> Styler | None:
    """The best method first; pairs told apart are marked."""
    mirrored = table.assign(first=table["second"], second=table["first"], effect=-table["effect"])
    both = pd.concat([table, mirrored]).set_index(["first", "second"])
    told = (both["p_holm"] <= TOLD_APART) & both["covers"].isin(DISTILLATION_SEEDS)
    order = list(both["effect"].groupby("first", sort=False).mean().sort_values(ascending=False, kind="stable").index)
    rows = [
        {"row less column": label(first)}
        | {short(other): number(both["effect"].get((first, other), math.nan), 1, "+") for other in order}
        for first in order
    ]
    marked = {
        f"td.row{row}.col{column}": MARKED
        for row, first in enumerate(order)
        for column, other in enumerate(order, start=1)
        if told.get((first, other), False)
    }
    family = f"Holm over the {len(table)} pairs of this table, 5 %"
    caption = f"{what}; over {covered(analysis.scores)}. Marked: told apart ({family})."
    return styled(rows, name, caption, words=["row less column"], marked=marked, cards=False)


def aggregates(analysis: Analysis) -> Styler | None:
    """Interquartile means, probabilities of improvement and performance profiles, in percent of the teacher."""
    table = analysis.aggregates
    above = [column for column in table if column.startswith("above_")]
    rows = [
        {"method": label(row["method"]), "models": row["runs"]}
        | {"interquartile mean (interval)": with_interval((row["iqm"], row["iqm_low"], row["iqm_high"]), 1)}
        | {"P(better than MLM)": number(row["improvement_over_mlm"], 2)}
        | {f"% above {column.removeprefix('above_')}": number(row[column], 0) for column in above}
        for row in table.to_dict("records")
    ]
    return styled(rows, "aggregates", "Percent of the teacher's score in each task.", words=["method"])


def effects(analysis: Analysis) -> Styler | Markdown | None:
    """Every effect of the ablations as numbers; a line where no variant was run."""
    table = analysis.effects
    if table.empty:
        return Markdown(sentences(table))
    named = partial(varied, analysis.comparison)
    rows = [
        {"method": named(row.method), "less": named(row.reference), "macro": number(row.macro, 1)}
        | {"points (interval)": with_interval((row.effect, row.low, row.high), 1, "+")}
        | {"p, Holm": p_value(row.p_holm), "models": row.runs}
        | {"learning rates": _rates(row.learning_rate, row.reference_learning_rate)}
        for row in table.itertuples()
    ]
    caption = f"Intervals over {' or '.join(table['covers'].unique())}. Where there are two learning rates, the second"
    return styled(rows, "effects", f"{caption} is the reference's.", wide=["method", "less"], groups=table["variant"])


def _rates(own: float, reference: float) -> str:
    """The learning rates of a method and its reference, once if they are the same; a dash where one was not trained."""
    if pd.isna(own) or pd.isna(reference):
        return NOTHING
    return rate(own) if own == reference else f"{rate(own)}, {rate(reference)}"


def found(analysis: Analysis, *variants: str) -> Markdown | None:
    """What the effects of some axes show, in sentences; None where no variant of theirs was run."""
    ran = analysis.effects["variant"].isin(variants).any()
    said = partial(sentences, analysis.effects, *variants, named=partial(varied, analysis.comparison))
    return Markdown(said()) if ran else None


def likeness(table: pd.DataFrame) -> Styler | None:
    """How alike students' layers are to their teacher's, beside what they score."""
    rows = [
        model_words(row.student, row.method)
        | {"CKA of the last layers": number(row.last_layers, 2), "order of layers kept (ρ)": number(row.depth_kept, 2)}
        | {"divergence (nats)": number(row.divergence, 3)}
        | {"last layer adds (points)": number(row.last_layer_adds, 1, "+"), "macro": number(row.macro, 1)}
        for row in table.itertuples()
    ]
    return styled(rows, "likeness", words=MODEL, groups="student")
