"""Which student to ship: what a profile recommends, under which conditions, and what others do, as readers see it."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from study.analysis.answers import answers, card
from study.analysis.figures.budgets import GROUP_WORDS
from study.analysis.figures.style import label, short, titled
from study.analysis.materials import teacher_words
from study.analysis.numbers.recommendation import FINE_TUNED, read_recommendations
from study.analysis.numbers.results import TEACHER
from study.analysis.numbers.selection import DEVELOPMENT, RULES, Rule
from study.analysis.numbers.text import NOTHING, interval, millions, number, percent, with_interval
from study.analysis.pages import INDEX_PAGE, link, other_profiles
from study.analysis.presentation import styled
from study.analysis.runtimes import LABELS, served
from study.descriptions import Comparison
from study.files import profile_of
from study.plan import Plan

TASKS = GROUP_WORDS | {FINE_TUNED: "fine-tuned tasks"}
#: Kind of task -> what closes most of the gap on it, as a column.
GAPS = {kind: f"closes most of the gap on {TASKS[kind]}" for kind in ("context", "sentence")}
#: Analyses that recommend: the first that a profile has does.
ANALYSES = ("comparison", "budgets")
TERMS = """\
<p><i>Recommended</i>: shown above the untrained student (that difference alone, uncorrected), and no faster student
scores as high; in brackets: not recommended. <i>Not told apart</i>, here and on all pages: the difference of two
methods, paired by task and seeds on the same student, has a p-value above 5 %, Holm-corrected over all pairs of
methods, or there is one distillation seed.</p>"""
NOT_TIMED = "not measured beside these scores"


def recommendations(plan: Plan) -> pd.DataFrame:
    """What the profile recommends in its settings (:mod:`numbers.recommendation`); without rows if it compares nothing.

    Students are judged by score and time where the profile has a comparison, else by the scores of its budgets.
    """
    made = next((name for name in ANALYSES if name in plan.analyses()), None)
    layouts = [plan.layout(comparison.setting) for comparison in plan.of(Comparison) if made]
    return read_recommendations([layout.analysis(str(made)) for layout in layouts])


def _settings(advice: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every setting with the rows of its students by the first of its groups of tasks."""
    for setting, own in advice.groupby("setting", sort=False):
        yield titled(str(setting)), own[(own["group"] == own["group"].iloc[0]) & (own["student"] != TEACHER)]


def cards(plan: Plan, advice: pd.DataFrame) -> HTML | None:
    """A card for every recommended student, or one that says why a setting has none."""
    shown = []
    for setting, students in _settings(advice):
        teacher = f"teacher: {teacher_words(plan, students['setting'].iloc[0])}"
        for row in students[students["recommended"]].to_dict("records"):
            floor = f"; untrained: {percent(row['floor'])}" if pd.notna(row["floor"]) else ""
            margin = with_interval((row["margin"], row["margin_low"], row["margin_high"]), 1, "+")
            lines = [
                f"of the teacher's score kept by {label(row['method'])}",
                f"95 % interval {_between(row)}{floor}",
                f"over the untrained: {margin} points" if floor else "",
                _speed(plan, row),
                f"of {row['methods']} methods the {_rule(row).best}, after {millions(row['tokens'])} tokens",
                f"not told apart from {_alike(row)}" if row["alike"] else "",
                row["because"],
                teacher,
            ]
            shown.append(card(f"{setting}: {row['student']}", percent(row["retained"]), *filter(None, lines)))
        if not students["recommended"].any():
            reasons = dict.fromkeys(reason for text in students["because"] for reason in text.split("; ") if reason)
            shown.append(card(setting, "No recommendation", f"because: {'; '.join(reasons)}", teacher))
    return answers(shown)


def _speed(plan: Plan, row: dict[str, Any]) -> str:
    """How fast a student is, by the comparison it comes from, or else as served."""
    if pd.notna(row["speed_up"]):
        return f"{number(row['speed_up'], 1)} times the teacher's speed: {number(row['budget_ms'], 1)} ms a sequence"
    times = served(plan.layout(row["setting"]), row["student"])
    if "eager" not in times:
        return f"speed: {NOT_TIMED}"
    teacher, fast = times["eager"][1], "onnx-int8"
    faster = f", {number(teacher / times[fast][0], 1)} in {LABELS[fast]}" if fast in times else ""
    own = f"{number(teacher / times['eager'][0], 1)} in {LABELS['eager']}{faster}"
    return f"one text as served, times as fast as the teacher in {LABELS['eager']}: {own}"


def _rule(row: dict[str, Any]) -> Rule:
    """What chose a row's method; a table that does not say was written when development scores chose."""
    return RULES[row["rule"] or DEVELOPMENT]


def _chosen(students: list[dict[str, Any]]) -> str:
    """A sentence: what chose the methods of each setting."""
    rules: dict[str, dict[str, None]] = {}
    for row in students:
        rules.setdefault(_rule(row).words, {})[titled(row["setting"])] = None
    if len(rules) == 1:
        return f"Methods were chosen by {next(iter(rules))}. "
    named = [f"{words} ({', '.join(settings)})" for words, settings in rules.items()]
    return f"Methods were chosen by {' and '.join(named)}. "


def _between(row: dict[str, Any]) -> str:
    return interval(row["retained_low"], row["retained_high"], 1).strip(" ()") or "unknown"


def _alike(row: dict[str, Any]) -> str:
    """The methods that a recommended one is not told apart from."""
    named = [short(method) for method in row["alike"].split(",") if method]
    return "any other" if len(named) == row["methods"] - 1 else ", ".join(named) or NOTHING


def table(advice: pd.DataFrame) -> Styler | None:
    """For every budget of time what to take, from the largest budget down; what is not recommended, and why."""
    rows = []
    students = advice[advice["student"] != TEACHER]
    timed, bettered = students["speed_up"].notna().any(), students["better"].any()
    for row in students.to_dict("records"):
        why = f"{'yes, but' if row['recommended'] else 'no:'} {row['because']}" if row["because"] else "yes"
        better = ", ".join(map(short, filter(None, row["better"].split(","))))
        why += f"; shown better on test data: {better}" if better else ""
        why += "; the teacher itself is below the untrained student" if row["floor"] > 100 else ""
        kept = with_interval((row["retained"], row["retained_low"], row["retained_high"]), 1)
        speed = {"ms a sequence": number(row["budget_ms"], 1), "times as fast": number(row["speed_up"], 1)}
        rows.append(
            {"setting": titled(row["setting"]), "tasks": TASKS[row["group"]]}
            | {"take": row["student"] if row["recommended"] else f"({row['student']})"}
            | {"trained by": label(row["method"]), "not told apart from": _alike(row)}
            | {"score kept (interval)": kept, "floor": number(row["floor"], 1)}
            | (speed if timed else {})
            | {"recommended": why}
        )
    caption = _chosen(students.to_dict("records")) + "Score kept, and floor: in percent of the teacher's. "
    if timed:
        caption += "Take a setting's first row that is fast enough; on another machine, go by times as fast."
    else:
        caption += f"Speed was {NOT_TIMED}: scores alone decide."
    if bettered:
        caption += " What is shown better on test data would have been chosen in hindsight."
    looks: dict[str, Any] = {"words": ["setting", "tasks", "take"], "groups": "setting"}
    looks["wide"] = ["tasks", "trained by", "not told apart from", "recommended"]
    return styled(rows, "recommendation", caption, **looks)


def conditions(plan: Plan, advice: pd.DataFrame) -> HTML | None:
    """What the profile's recommendations are conditional on, a sentence for every setting, and where others stand."""
    asked = {titled(comparison.setting): comparison.tasks for comparison in plan.of(Comparison)}
    said = []
    for setting, students in _settings(advice):
        row = students.iloc[0]
        tasks, languages = row["tasks"].split(","), row["languages"].split(",")
        spoken = "English" if languages == ["en"] else f"{len(languages)} languages ({', '.join(languages)})"
        left_out = [task for task in asked[setting] if task not in tasks]
        are = "are" if len(left_out) > 1 else "is"
        beside = f"; not in it: {', '.join(left_out)}, which {are} scored without fine-tuning" if left_out else ""
        mean = f"the score is the mean of {', '.join(tasks)}, in {spoken}{beside}"
        names = " or ".join(students["student"])
        facts = f"{mean}; teacher: {teacher_words(plan, row['setting'])}"
        said.append(f"<b>{setting}</b>: {names} after {millions(row['tokens'])} tokens; {html.escape(facts)}.")
    if not said:
        return None
    others = [_profile(folder, plan) for folder in other_profiles(plan) if _page(folder).is_file()]
    elsewhere = f" Other profiles answer for theirs: {', '.join(others)}." if others else ""
    timed = {c.setting: plan.layout(c.setting).analysis("runtimes") / "timings.csv" for c in plan.of(Comparison)}
    links = [_linked(file, titled(own), plan) for own, file in timed.items() if file.is_file()]
    elsewhere += f" Speed by runtime: {', '.join(links)}." if links else ""
    lead = f"What this answer of profile {html.escape(plan.profile)} holds for, and its terms"
    listed = "".join(f"<li>{sentence}</li>\n" for sentence in said)
    told = f"<ul>\n{listed}</ul>\n{TERMS}"
    return HTML(f"<details><summary>{lead}</summary>\n{told}</details>\n<p>{elsewhere.strip()}</p>")


def others(plan: Plan) -> Styler | None:
    """What other profiles recommend, and what closes most of the gap in them, from their result files."""
    rows, pages = [], dict[str, str]()
    for folder in other_profiles(plan):
        profile, made = profile_of(folder), _recommending(folder)
        if _page(folder).is_file():
            pages[profile] = _profile(folder, plan)
        for setting, students in _settings(read_recommendations(made)):
            first = students.iloc[0]
            file = folder / "reports" / "budgets" / first["setting"] / "gap.csv"
            gap = pd.read_csv(file).query("tokens == @first.tokens") if file.is_file() else None
            facts = {"profile": profile, "setting": setting, "tokens": millions(first["tokens"])}
            taken = students[students["recommended"]]
            for row in (taken if len(taken) else students.iloc[:1]).to_dict("records"):
                kept = f"{label(row['method'])}: {percent(row['retained'])}, floor {percent(row['floor'])}"
                named = row["student"] if len(taken) else " or ".join(students["student"])
                rows.append(
                    facts
                    | {"student": named, "takes": kept if len(taken) else f"nothing: {row['because']}"}
                    | {words: _most(gap, kind) for kind, words in GAPS.items()}
                    | {"tasks": row["tasks"].replace(",", ", ")}
                )
    caption = (
        "Takes: with the score kept in percent of the profile's own teacher, over its own tasks; gap: between untrained"
        " student and teacher on all tasks of that kind. Teachers, tasks and tokens differ: compare within a row."
    )
    looks: dict[str, Any] = {"words": ["profile", "setting", "student"], "groups": "profile"}
    looks["wide"] = ["takes", *GAPS.values(), "tasks"]
    shown = styled(rows, "others", caption, **looks)
    return shown.format(lambda name: pages.get(name, html.escape(name)), subset=["profile"]) if shown else None


def _most(gap: pd.DataFrame | None, kind: str) -> str:
    own = gap[gap["group"] == kind] if gap is not None else pd.DataFrame()
    if own.empty:
        return NOTHING
    best = own.loc[own["closed"].idxmax()]
    if not best["learnt"]:
        return "nothing learnt"
    return f"{short(best['method'])}: {with_interval((best['closed'], best['low'], best['high']), 0)}\u00a0%"


def _recommending(folder: Path) -> list[Path]:
    """The folders of the analysis of a profile's settings that its own page recommends by."""
    made = (sorted((folder / "reports" / name).glob("*")) for name in ANALYSES)
    return next((found for found in made if found), [])


def _page(folder: Path) -> Path:
    return folder / "reports" / "html" / INDEX_PAGE


def _profile(folder: Path, plan: Plan) -> str:
    """A profile as a link from this one's pages to its own."""
    return _linked(_page(folder), profile_of(folder), plan)


def _linked(file: Path, words: str, plan: Plan) -> str:
    return f'<a href="{html.escape(link(file, _page(plan.folder).parent))}">{html.escape(words)}</a>'
