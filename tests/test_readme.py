"""README states what committed results state, and its links lead somewhere."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from study.analysis.numbers.text import MINUS, number

ROOT = Path(__file__).parents[1]
OVERNIGHT = ROOT / "profiles" / "overnight" / "reports" / "comparison"
ABLATED = OVERNIGHT.parent / "ablations" / "multilingual" / "effects.csv"
EVIDENCE = ROOT / "profiles" / "evidence" / "reports"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What a column of README's table of methods shows: setting, budget, tasks.
COLUMNS = [("english", "large", "context"), ("english", "large", "sentence"),
           ("multilingual", "base", "context"), ("multilingual", "base", "sentence")]  # fmt: skip
KEPT = re.findall(r"^\| `([\w+-]+)`[^|]*\|((?: [*\d.]+ \|){4})$", README, re.M)
VERDICTS = re.findall(r"^\| (D\d): [^|]*\|((?: [\w ]+\*? \| ?| – \| ?){4})$", README, re.M)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def budgets(setting: str, table: str) -> list[dict[str, str]]:
    return rows(EVIDENCE / "budgets" / setting / f"{table}.csv")


@pytest.mark.parametrize(("place", "column"), [*enumerate(COLUMNS)])
def test_readme_states_what_students_keep(place: int, column: tuple[str, str, str]) -> None:
    setting, budget, group = column
    ends = [row for row in budgets(setting, "references") if row["group"] == group]
    floor = sum(float(row["none"]) for row in ends) / sum(float(row["teacher"]) for row in ends)
    stated = {"none": f"{100 * floor:.1f}"}
    for row in budgets(setting, "gap"):
        if (row["group"], row["budget"]) == (group, budget):
            kept = f"{float(row['retained']):.1f}"
            stated[row["method"]] = f"**{kept}**" if float(row["low"]) > 0 else kept
    shown = {method: cells.split("|")[place].strip() for method, cells in KEPT}
    assert len(shown) == 7 and shown == {method: stated[method] for method in shown}
    if setting == "english":  # nothing that was run at this budget is left out
        assert set(shown) == set(stated)


def test_readme_recommends_what_is_above_the_floor_everywhere() -> None:
    kept = {method: [float(cell.strip(" *")) for cell in cells.split("|")[:4]] for method, cells in KEPT}
    above = [m for m, own in kept.items() if all(a > b for a, b in zip(own, kept["none"], strict=True))]
    (said,) = re.findall(r"\*\*Ship `([\w+-]+)`\*\*", README)
    assert above == [said] and "its mean alone here is above the floor in every column, shown in three." in README
    assert dict(KEPT)[said].count("**") == 2 * 3


def test_the_page_on_limits_states_what_the_encoder_as_it_came_scores() -> None:
    page = (ROOT / "docs" / "limits.md").read_text()
    sentence = r"as it came scores\s+([\d.]+) on the three .*? tasks, the best student of the language model ([\d.]+)"
    (stated,) = re.findall(sentence, page)
    ends = [float(r["none"]) for r in budgets("english-sentence", "references") if r["group"] == "sentence"]
    (best,) = [float(r["score"]) for r in budgets("english", "gap")
               if (r["group"], r["budget"], r["method"]) == ("sentence", "large", "se-mse")]  # fmt: skip
    assert stated == (f"{sum(ends) / len(ends):.1f}", f"{best:.1f}")


def test_readme_states_who_gains_on_hs_with_tokens() -> None:
    gains = {r["method"] for r in budgets("english", "trends") if r["group"] == "context" and r["faster_low"]}
    sure = {r["method"] for r in budgets("english", "trends")
            if r["group"] == "context" and r["method"] in gains and float(r["faster_low"]) > 0}  # fmt: skip
    assert sure == {"mlm", "od", "mha-minilmv2"} and "on context MLM, OD and MiniLMv2 gain on HS with" in README


def test_readme_states_how_fast_a_student_is() -> None:
    speeds = {(r["model"], r["runtime"]): f"{float(r['speed_up']):.1f}"
              for r in rows(EVIDENCE / "runtimes" / "english" / "choices.csv")}  # fmt: skip
    (stated,) = re.findall(
        r"is ([\d.]+) times as fast, ([\d.]+) times in ONNX int8;\s+the teacher in int8 ([\d.]+)", README
    )
    models = ("L3-H192", "eager"), ("L3-H192", "onnx-int8"), ("teacher", "onnx-int8")
    assert stated == tuple(speeds[model] for model in models)


def test_the_page_on_findings_states_the_regret_of_english_development_data() -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    (stated,) = re.findall(r"they prefer OD, .*?\s([\d.]+) % of the teacher's score behind", page)
    picks = {(r["student"], r["rule"]): r for r in rows(OVERNIGHT / "multilingual" / "selection.csv")}
    assert picks["L3-H384", "development"]["method"] == "od" and picks["L3-H384", "development"]["regret"] == stated
    retrieved = {student: row for (student, rule), row in picks.items() if rule == "retrieval_development"}
    assert len(retrieved) == 2 and all(row["in_use"] == "True" and row["regret"] == "0.0" for row in retrieved.values())


def test_the_page_on_findings_states_how_well_rules_rank_methods() -> None:
    page = (ROOT / "docs" / "findings.md").read_text().partition("choose by retrieval of translations")[2]
    stated = re.findall(r"-?\d\.\d\d", page.partition("[table]")[0])
    picks = {
        (r["student"], r["rule"]): r["rank_correlation"] for r in rows(OVERNIGHT / "multilingual" / "selection.csv")
    }
    order = [(s, rule) for s in ("L3-H384", "L4-H192") for rule in ("development", "retrieval_development")]
    assert [float(value) for value in stated] == [float(picks[place]) for place in order]


def test_the_page_on_findings_states_what_starts_and_mappings_change() -> None:
    page = (ROOT / "docs" / "findings.md").read_text()
    effects = {r["method"]: r for r in rows(ABLATED)}
    start = page.partition("* **The start is worth")[2].partition("\n* **")[0]
    stated = re.findall(r"(\d+\.\d)\s+(?:points\s+)?\((-?\d+\.\d) to (\d+\.\d)", start)
    made = ("hs-uniform+last-random", "mha-minilmv2-random", "hs-uniform+last-teacher-embeddings")
    assert [list(map(float, row)) for row in stated] == [
        [pytest.approx(-float(effects[name][end]), abs=0.051) for end in ("effect", "high", "low")] for name in made
    ]
    tied = page.partition("* **Which layers are tied")[2].partition("English `uniform-consecutive`")[0]
    stated = re.findall(r"`?([a-z+-]+)`? (-?\d\.\d)\b", tied)
    assert len(stated) == 7
    for mapping, effect in stated:
        method = (
            f"hs-uniform+last-mapping-{mapping}" if mapping in ("all-to-one", "random", "reverse") else f"hs-{mapping}"
        )
        assert float(effect) == pytest.approx(float(effects[method]["effect"]), abs=0.051), mapping
        assert float(effects[method]["p_holm"]) > 0.05
    layers = page.partition("* **The teacher layer of MHA**")[2].partition("\n* **")[0]
    named = ("mha-minilmv2-from-top-5", "mha-minilmv2-from-top-2", "mha-direct-from-top-4", "mha-direct-from-top-0")
    stated = [float(value) for value in re.findall(r"\(([+-]\d\.\d)[ )]", layers)]
    assert stated == [pytest.approx(float(effects[name]["effect"]), abs=0.051) for name in named]
    for method in ("mha-minilmv2", "mha-direct"):
        tried = {name: float(row["effect"]) for name, row in effects.items() if name.startswith(f"{method}-from-top")}
        assert len(tried) == 5 and min(tried, key=tried.get) in named and max(tried, key=tried.get) in named
    positions = page.partition("* **OD wants all positions**")[2].partition("\n* **")[0]
    gain, low, high = re.findall(r"gains ([\d.]+) points \(([\d.]+) to\s+([\d.]+)\)", positions)[0]
    for value, end in ((gain, "effect"), (low, "low"), (high, "high")):
        assert float(value) == pytest.approx(float(effects["od-all-positions"][end]), abs=0.051)
    rest = page.partition("* **The rest is not told from chance**")[2].partition("\n\n")[0]
    variants = [f"mha-minilmv2-heads-{heads}" for heads in (6, 24, 48)]
    variants += [f"{method}-{what}" for what in ("plain", "equal-compute")
                 for method in ("hs-uniform+last", "mha-minilmv2", "mha-direct")]  # fmt: skip
    ahead, low, high = (float(value) for value in re.findall(r"then ([\d.]+), ([\d.]+) to ([\d.]+), above OD", rest)[0])
    own = {(r["method"], r["reference"]): r for r in rows(ABLATED)}
    above = own["hs-uniform+last-equal-compute", "od"]
    for value, key in ((ahead, "effect"), (low, "low"), (high, "high")):
        assert value == pytest.approx(float(above[key]), abs=0.051)
    stated = [float(value) for value in re.findall(r"(?:HS|MiniLMv2|DirectMiniLM|\d+:) ([+-]?\d\.\d)", rest)]
    told = [
        next(r for (method, reference), r in own.items() if method == name and reference != "od") for name in variants
    ]
    assert stated == [pytest.approx(float(row["effect"]), abs=0.051) for row in told]
    assert all(float(row["p_holm"]) > 0.05 for row in told)
    mapped = page.partition("* **From another start")[2].partition("\n* **")[0]
    stated = dict(re.findall(r"`([a-z-]+)` (-\d\.\d)", mapped))
    assert len(stated) == 4
    for mapping, effect in stated.items():
        row = effects[f"hs-uniform+last-mapping-from-embeddings-{mapping}"]
        assert row["reference"] == "hs-uniform+last-teacher-embeddings" and float(row["p_holm"]) > 0.05
        assert float(effect) == pytest.approx(float(row["effect"]), abs=0.051), mapping


def test_the_page_on_findings_states_where_retrieval_chooses_worse() -> None:
    page = (ROOT / "docs" / "findings.md").read_text().partition("In `laptop`, one seed,")[2].partition("* **")[0]
    every: dict[str, list[float]] = {"development": [], "retrieval_development": []}
    for folder in (ROOT / "reports" / "comparison", OVERNIGHT):
        for row in rows(folder / "multilingual" / "selection.csv"):
            every.get(row["rule"], []).append(float(row["regret"]))
    laptop = [r for r in rows(ROOT / "reports" / "comparison" / "multilingual" / "selection.csv") if r["rule"] in every]
    ranked = {(r["student"], r["rule"]): float(r["rank_correlation"]) for r in laptop}
    order = [(s, rule) for s in ("L6-H384", "L4-H192") for rule in ("retrieval_development", "development")]
    assert [float(value) for value in re.findall(r"\b0\.\d\d\b", page)] == [ranked[place] for place in order]
    regrets = {(r["student"], r["rule"]): float(r["regret"]) for r in laptop}
    stated = [float(value) for value in re.findall(r"\b\d\.\d\b", re.sub(r"\(.*?\)", "", page, flags=re.DOTALL))]
    means = [sum(every[rule]) / len(every[rule]) for rule in ("retrieval_development", "development")]
    assert regrets["L6-H384", "development"] == 0 and len(laptop) == len(every["development"]) == 4
    picked = {r["rule"]: r["method"] for r in laptop if r["student"] == "L6-H384"}
    assert picked == {"development": "hs-uniform+last", "retrieval_development": "hs-last"}
    assert stated == [regrets[place] for place in (order[0], *order[2:])] + [
        pytest.approx(mean, abs=0.06) for mean in means
    ]


def test_readme_is_short_and_its_first_command_is_near_the_top() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110 and len(README.split()) <= 1000
    assert next(place for place, line in enumerate(lines, start=1) if line.startswith("make ")) < 30


def test_readme_states_every_verdict_and_those_that_hang_on_one_task() -> None:
    assert [claim for claim, _ in VERDICTS] == ["D1", "D2", "D3", "D4", "D6", "D7"]
    places = [("english", "small"), ("english", "base"), ("english", "large"), ("multilingual", "base")]
    for place, (setting, budget) in enumerate(places):
        judged = {r["claim"]: r["verdict"] + ("*" if r["without"] else "") for r in budgets(setting, "sensitivity")
                  if (r["group"], r["budget"]) == ("context", budget)}  # fmt: skip
        shown = {claim: cells.split("|")[place].strip() for claim, cells in VERDICTS}
        assert shown == {claim: judged.get(claim, "–") for claim in shown}, (setting, budget)
    assert "D6 contradicted, D3 too in English; D5" in README and "undecided, in `base-teacher` too" in README
    larger = rows(ROOT / "profiles/base-teacher/reports/comparison/english-base/verdicts.csv")
    assert [row["verdict"] for row in larger if row["claim"] == "D5"] == ["undecided"]
    others = {(r["claim"], s): r["verdict"] for s in ("english", "multilingual")
              for r in rows(OVERNIGHT / s / "verdicts.csv")}  # fmt: skip
    assert [others["D5", s] for s in ("english", "multilingual")] == ["undecided", "undecided"]
    assert [others["D6", s] for s in ("english", "multilingual")] == ["contradicted", "contradicted"]
    assert [others["D3", s] for s in ("english", "multilingual")] == ["contradicted", "undecided"]
    contrasts = [r for r in budgets("english", "contrasts")
                 if (r["group"], r["budget"], r["claim"]) == ("context", "large", "D3")]  # fmt: skip
    assert len(contrasts) == 1 and "D3 at 31 M: one mapping" in README


def test_the_page_on_evidence_states_what_methods_gain_by_kind_of_teacher() -> None:
    names = {"MLM, no teacher": "mlm", "OD": "od", "HS last": "hs-last", "HS uniform": "hs-uniform",
             "HS uniform+last": "hs-uniform+last", "MiniLMv2": "mha-minilmv2", "DirectMiniLM": "mha-direct",
             "embedding transfer": "se-mse"}  # fmt: skip
    page = (ROOT / "docs" / "evidence.md").read_text().partition("| method | language model: context |")[2]
    shown = dict(re.findall(r"^\| ([\w+, ]+?) \|((?: \**[+-]?[\d.]+\** \|){4})$", page.partition("\n\n")[0], re.M))
    gains = {(s, r["group"], r["method"]): r for s in ("english", "english-sentence") for r in budgets(s, "gains")
             if r["budget"] == "base"}  # fmt: skip
    assert shown.keys() == names.keys()
    columns = [(s, g) for s in ("english", "english-sentence") for g in ("context", "sentence")]
    for words, cells in shown.items():
        for column, cell in zip(columns, cells.split("|"), strict=False):
            row = gains[*column, names[words]]
            value = number(float(row["gain"]), 1, "+").replace(MINUS, "-")
            sure = float(row["low"]) > 0 or float(row["high"]) < 0
            assert cell.strip() == (f"**{value}**" if sure else value), (words, column)


def test_the_page_on_methods_states_what_pruned_students_close() -> None:
    folder = ROOT / "profiles" / "pruning" / "reports" / "budgets" / "english"
    closed = {(r["group"], r["budget"], r["method"]): r for r in rows(folder / "gap.csv")}
    page = (ROOT / "docs" / "methods.md").read_text()
    table, _ = re.findall(r"\| layers that stay .*?\n\n", page, re.S)
    shown = re.findall(r"^\| `([\w+-]+)`[^|]*\|[^|]*\|(.*)\|$", table, re.M)
    assert {("context", "base", method) for method, _ in shown} == {
        key for key in closed if key[:2] == ("context", "base")
    }
    columns = [(group, budget) for group in ("context", "sentence") for budget in ("base", "more")]
    for method, cells in shown:
        for column, cell in zip(columns, cells.split("|"), strict=True):
            row = closed.get((*column, method))
            values = [float(row[key]) for key in ("closed", "low", "high")] if row else []
            assert cell.strip() == ("{:.1f} ({:.1f} to {:.1f})".format(*values) if row else ""), (method, column)


@pytest.mark.parametrize(
    ("folder", "page", "lead"),
    [
        ("recipes/reports/budgets/english", "methods", "**What came out** (profile [recipes]"),
        (
            "pruning-multilingual/reports/budgets/multilingual",
            "methods",
            "Multilingual (profile [pruning-multilingual]",
        ),
        ("base-teacher/reports/budgets/english-base", "evidence", "## A teacher of the paper's size"),
    ],
)
def test_pages_state_what_methods_close(folder: str, page: str, lead: str) -> None:
    ends = ("closed", "low", "high")
    closed = {(r["group"], r["method"]): "{:.1f} ({:.1f} to {:.1f})".format(*(float(r[end]) for end in ends))
              for r in rows(ROOT / "profiles" / folder / "gap.csv") if r["group"] != "all"}  # fmt: skip
    after = (ROOT / "docs" / f"{page}.md").read_text().partition(lead)[2]
    table = after[after.index("\n| ") :].partition("\n\n")[0]
    shown = re.findall(r"^\| `([\w+-]+)`.*\| ([^|]*) \| ([^|]*) \|$", table, re.M)
    assert {(g, m): c for m, *cells in shown for g, c in zip(("context", "sentence"), cells, strict=True)} == closed


def test_evidence_states_the_contrasts_of_teacher_layers() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text().partition("**D5 stays undecided**")[2]
    table = rows(ROOT / "profiles/base-teacher/reports/comparison/english-base/contrasts.csv")
    own = [row for row in table if row["claim"] == "D5" and row["effect"]]
    assert len(own) == 2 and {row["shown"] for row in own} == {"undecided"}
    for row in own:
        effect, low, high = (f"{float(row[key]):.1f}" for key in ("effect", "low", "high"))
        assert page.count(f"by {effect} points ({low} to {high})") + page.count(f"by {effect} ({low} to {high})") == 1


def test_the_page_on_methods_states_what_is_told_apart_in_several_languages() -> None:
    folder = ROOT / "profiles" / "pruning-multilingual" / "reports" / "budgets" / "multilingual"
    page = (ROOT / "docs" / "methods.md").read_text()
    picks = {r["group"]: r for r in rows(folder / "recommendation.csv") if r["student"] != "teacher"}
    assert (
        "`pruned-bottom-mlm` is told apart from `hs-uniform+last` and `mlm` on context, `pruned-bottom-hs` over" in page
    )
    for group, method in (("context", "pruned-bottom-mlm"), ("all", "pruned-bottom-hs")):
        assert picks[group]["method"] == method and "pruned-bottom" in picks[group]["alike"].split(",")
        assert not {"mlm", "hs-uniform+last"} & set(picks[group]["alike"].split(","))


def test_readme_states_which_layers_to_keep() -> None:
    folder = ROOT / "profiles" / "pruning" / "reports" / "budgets" / "english"
    closed = {
        (r["budget"], r["method"]): float(r["closed"]) for r in rows(folder / "gap.csv") if r["group"] == "context"
    }
    others = [value for (_, method), value in closed.items() if method in ("mlm", "hs-uniform+last")]
    assert len(others) == 4 and closed["base", "pruned-bottom"] > max(others)
    picks = {r["group"]: r for r in rows(folder / "recommendation.csv") if r["student"] != "teacher"}
    for group, method in (("context", "pruned-bottom-mlm"), ("all", "pruned-bottom-hs")):
        assert picks[group]["method"] == method and picks[group]["tokens"] == "2048000"
        assert not {"mlm", "hs-uniform+last"} & set(picks[group]["alike"].split(","))
    assert "On context its first layers, cut off and trained, are told apart from HS and MLM" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
