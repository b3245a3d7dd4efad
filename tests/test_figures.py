"""Figures show every method of the grid and are the same bytes every time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from constructed_results import HEAD, add_languages, make_study, results_of_scores, several_languages, write_grid
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation

from study import StudyError, resolve
from study.analysis.figures import ablations, style
from study.analysis.figures import comparison as figures
from study.analysis.figures import methods as of_methods
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.claims import HS
from study.analysis.numbers.results import load_tuning
from study.descriptions import Comparison
from study.evaluation.representations import relations as related
from study.files import Layout

NAMES = [name for name in figures.CAPTIONS if name != "per_language"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    study = make_study(root)
    write_grid(study)
    return study.analyse()


def texts(figure) -> set[str]:
    figure.canvas.draw()
    labels = {text.get_text() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    legends = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    return labels | legends | {axes.get_title() for axes in figure.axes}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "claims"])
def test_every_method_and_student_is_named(results, name):
    shown = texts(getattr(figures, name)(results))
    untrained_apart = {"per_task", "learning_curves"}  # `none` is a line or has not trained
    for method, look in style.styles(results.comparison).items():
        if method != "none" or name not in untrained_apart:
            assert look.label in shown
    if name not in ("quality_latency", "performance_profiles"):  # named beside their points, all in one
        assert {"L3-H384", "L3-H192"} <= shown


def test_every_student_is_named_beside_its_points(results):
    (axes,) = figures.quality_latency(results).axes
    assert {text.get_text() for text in axes.texts} == {"L3-H384\n10 ms", "L3-H192\n5 ms", "teacher\n20 ms"}
    places = {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None"}
    assert places == {10, 5, 20}  # every method of a student is where its student is


def test_quality_is_sorted_and_stands_beside_floor_and_teacher(results):
    """Methods score 0.60 + 0.01 x place, of 0.80; 0.05 less for the second student: the last method is on top."""
    axes, second = figures.quality(results).axes
    assert [own.get_title() for own in (axes, second)] == ["L3-H384", "L3-H192"]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [style.label(method) for method in reversed(results.comparison.methods)]
    upright = {line.get_linestyle(): line.get_xdata()[0] for line in axes.lines if line.get_linestyle() in (":", "--")}
    assert upright == {":": pytest.approx(75), "--": 100}  # none, L3-H384: 0.60 / 0.80
    marks = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_markersize() == 6]
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([100 * (0.69 - 0.01 * k) / 0.8 for k in range(10)])
    (ring,) = (line for line in axes.lines if line.get_fillstyle() == "none")
    assert ring.get_ydata()[0] == 0  # the best on development data


def test_intervals_that_go_on_end_in_an_arrow():
    axes = style.new_figure(1).subplots()
    style.draw_interval(axes, 0, -5, 5, (0, 10), "black")
    style.draw_interval(axes, 1, np.nan, np.nan, (0, 10), "black")
    ends = [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
    assert ends[0] == [0, 5] and [line.get_marker() for line in axes.lines] == ["<"]


def test_every_colour_stands_out_from_white():
    """Contrast of WCAG 2: (1 + 0.05) / (luminance + 0.05), at least 4.5."""
    colours = [own.color for own in style.STYLES.values()] + [
        color for color, _ in (*style.SPARE, *style.STUDENT_STYLES)
    ]
    colours += [color for color, _ in figures.VERDICT_STYLES.values()] + [style.GREY]
    for colour in colours:
        parts = np.array(to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, colour


def test_effects_are_differences_to_the_reference_in_words():
    """`od` scores 0.5 and 0.52, its variant 0.51 and 0.55: 1 and 3 points more, 2 in the mean."""
    scores = {"od": np.reshape([0.5, 0.52], (1, 1, 2, 1)), "od-hot": np.reshape([0.51, 0.55], (1, 1, 2, 1))}
    members = {"od-hot": {"extends": "od", "variant": "hot", "changes": {"temperature": 2.0}}}
    options = {method: {"learning_rate": 1e-3} for method in scores}
    (axes,) = ablations.ablation(Analysis(results_of_scores(scores, options, members)), "hot").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["temperature 2"]
    assert axes.get_title(loc="left") == "from OD: output distribution"
    drawn = {line.get_marker(): line.get_xdata() for line in axes.lines if line.get_linestyle() == "None"}
    assert list(drawn["o"]) == pytest.approx([1, 3]) and list(drawn["D"]) == pytest.approx([2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_layer_from_top": 0}, "teacher's last layer"),
        ({"teacher_layer_from_top": 2}, "teacher's last layer but 2"),
        ({"equal_compute": "od"}, "as many operations as OD"),
        ({"learning_rate": 1e-4, "inputs": "plain"}, "learning rate 0.0001, plain text"),
        ({"head_count": 3}, "head count 3"),
    ],
)
def test_variants_are_called_by_what_they_change(changes, words):
    assert style.variant_words(changes) == words


def test_contrasts_name_a_method_once_where_its_layer_alone_differs():
    assert style.contrast_words("mha-direct@upper-middle", "mha-direct@L_T-3") == (
        "MHA: DirectMiniLM from an upper-middle layer − the last layer but 3"
    )
    assert style.contrast_words("HS 1-to-N", "od") == "HS 1-to-N − OD"


def test_every_contrast_is_a_row_with_its_interval(results):
    """The teacher layers of D5 are not in the grid: their rows say so. All methods have the same noise: no width."""
    (axes,) = figures.claims(results).axes
    table = results.contrasts
    assert axes.get_yticklabels()[0].get_text() == "MHA: MiniLMv2 − OD" and len(axes.get_yticks()) == len(table)
    notes = [" ".join(text.get_text().split()) for text in axes.texts]
    assert notes.count("not run") == 4 == (table["claim"] == "D5").sum()
    assert [note for note in notes if note != "not run"] == [
        f"{row.claim}, undecided: {row.text}" for row in results.verdicts.itertuples()
    ]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert points == pytest.approx(table["effect"].tolist(), nan_ok=True)
    assert table.loc[0, "effect"] == pytest.approx(6.0)  # mha-minilmv2 is 8th, od 2nd of the methods, 0.01 apart


def test_verdicts_look_different_and_intervals_are_drawn(tmp_path):
    levels = {"mha-minilmv2": 0.7, "mha-direct": 0.6, "od": 0.5} | dict.fromkeys(HS, 0.5)
    noise = 0.01 * np.random.default_rng(0).normal(size=(len(levels), 2, 2, 3, 2))
    results = Analysis(results_of_scores({m: levels[m] + own for m, own in zip(levels, noise, strict=True)}))
    (axes,) = figures.claims(results).axes
    table = results.contrasts.set_index("claim")
    verdict = results.verdicts.set_index("claim")["verdict"]
    assert set(verdict) == {"supported", "contradicted", "undecided"}
    drawn = Counter(line.get_marker() for line in axes.lines)
    for shown, number in results.contrasts["shown"].value_counts().items():  # of the contrast, not of its claim
        assert drawn[figures.VERDICT_STYLES[shown][1]] == number
    drawn = [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
    assert any(ends == pytest.approx(table.loc["D6", ["low", "high"]].tolist()) for ends in drawn)


def test_scores_by_language_have_a_panel_per_student_and_task(results, tmp_path):
    """Topic: 0.82 for the teacher in English, 0.1 less in Spanish; retrieval: 0.5 in Spanish, half in Hindi."""
    assert figures.names(results) == NAMES
    study = make_study(tmp_path, ["none", "od"])
    add_languages(write_grid(study))
    several = several_languages(study).analyse()
    unclaimed = [name for name in figures.CAPTIONS if name != "claims"]  # no contrast of a claim has both methods
    assert figures.names(several) == unclaimed
    one = several.results.probes.query("language == 'es'")
    assert figures.names(Analysis(replace(results.results, probes=one))) == NAMES  # a language alone compares nothing
    figure = figures.per_language(several)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{task}\n{s}" for s in ("L3-H384", "L3-H192") for task in ("topic", "retrieval")]
    assert {"the teacher", "OD: output distribution", "en\n62", "es\n52"} <= texts(figure)  # topic: 0.02 more than 0.60
    cells = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert cells[0] == ["+20"] * 3 + ["+1"] * 3 and cells[1] == ["0"] * 4  # 0.80 and 0.61 less 0.60; probes are alike
    long = several.results.probes.assign(task="masked-word-multilingual")
    figure = figures.per_language(Analysis(replace(several.results, probes=long)))
    figure.draw_without_rendering()
    whole = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(title.x0 >= 0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1 for title in whole)


def test_a_model_slower_and_worse_than_another_is_not_on_the_front(tmp_path):
    study = make_study(tmp_path, ["none", "od"])
    write_grid(study, {("od", "L3-H384"): 0.55, ("od", "L3-H192"): 0.70})  # 10 ms and 5 ms
    (axes,) = figures.quality_latency(study.analyse()).axes
    front = axes.lines[0]
    assert list(front.get_xdata()) == pytest.approx([5, 20])
    assert list(front.get_ydata()) == pytest.approx([70, 80])


@pytest.mark.parametrize("name", ["quality", "learning_curves"])
def test_saving_twice_gives_the_same_bytes(results, tmp_path, name):
    for folder in ("first", "second"):
        assert style.save(getattr(figures, name)(results), tmp_path / folder, name).is_file()
    content = (tmp_path / "first" / f"{name}.png").read_bytes()
    assert content and content == (tmp_path / "second" / f"{name}.png").read_bytes()
    assert [path.name for path in (tmp_path / "first").iterdir()] == [f"{name}.png"]  # figures are committed once
    assert len(content) < 250_000


def test_methods_look_different_in_marker_and_colour(results):
    look = style.styles(results.comparison).values()
    assert len({own.marker for own in look}) == len({own.color for own in look}) == len(look)


@pytest.mark.parametrize(
    "profile", ["laptop", "evidence", "recipes", "pruning", "pruning-multilingual", "base-teacher"]
)
def test_markers_tell_the_methods_of_a_profile_apart(profile):
    for comparison in resolve(profile).of(Comparison):
        markers = [own.marker for own in style.styles(comparison).values()]
        assert len(set(markers)) == len(markers), dict(zip(comparison.methods, markers, strict=True))


def test_profiles_are_shares_of_models_above_a_share_of_the_teacher(tmp_path):
    """Scores of 0.4, 0.5 and 0.6 (teacher: 0.8 by construction) are 50, 62.5 and 75 %."""
    scores = np.array([0.4, 0.5, 0.6]).reshape(1, 1, 3, 1)
    results = Analysis(results_of_scores({"none": scores, "od": scores + 0.1}))
    line = figures.performance_profiles(results).axes[0].lines[0]
    for place, share in enumerate((1, 2 / 3, 1 / 3, 0)):
        between = 100 * (0.35 + 0.1 * place) / 0.8
        at = np.abs(line.get_xdata() - between).argmin()
        assert line.get_ydata()[at] == pytest.approx(100 * share)


def test_rates_tried_are_marked_where_the_results_took_them(tmp_path):
    """Two students, losses of 0.5 and 0.7 of 2; the results have the first alone; the second diverged at 0.01."""
    results = Analysis(results_of_scores({"od": np.full((1, 1, 1, 1), 0.5)}, {"od": {"learning_rate": 6e-4}}))
    (known,) = results.comparison.students
    for student, score, loss in ((known, 0.6, 1.0), ("student 9", 0.8, 1.4)):
        done = {"development_mean": score, "held_out_loss_before": 2.0, "held_out_loss": loss}
        tried = [{"learning_rate": 6e-4, **done}, {"learning_rate": 1e-2, **done}]
        if student == "student 9":
            tried[1] = {"learning_rate": 1e-2, "diverged": "loss = nan"}
        record = HEAD | {"method": "od", "student": student, "steps": 5, "seed": 0, "tried": tried}
        record |= {"initialisation": "teacher-layers"}
        file = tmp_path / "reports" / "tuning" / "english" / f"od_{student}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
    (tmp_path / "params.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    layout = Layout(tmp_path, "english")
    table = load_tuning(layout)
    assert len(table) == 4 and table["loss"].isna().sum() == table["development"].isna().sum() == 1
    panels = ablations.learning_rates_tried(results, table).axes
    assert [axes.get_title() for axes in panels] == [known, known, "student 9", "student 9"]
    expected = [([60, 60], [6e-4]), ([50, 50], [6e-4]), ([80, np.nan], []), ([70, np.nan], [])]
    for axes, (values, rates) in zip(panels, expected, strict=True):
        line, taken = axes.lines
        assert list(line.get_xdata()) == [6e-4, 1e-2]
        np.testing.assert_allclose(line.get_ydata(), values)
        assert list(taken.get_xdata()) == rates and list(taken.get_ydata()) == pytest.approx(values[: len(rates)])
    assert ablations.learning_rates_tried(results, load_tuning(Layout(tmp_path, "multilingual"))) is None
    file.write_text(json.dumps(record | {"setting": "klingon"}))
    with pytest.raises(StudyError, match="tuning/english/od_student 9.json: setting = 'klingon'"):
        load_tuning(layout)


def test_a_method_without_a_style_of_its_own_is_shown_by_name(results):
    methods = ["new-method" if method == "od" else method for method in results.comparison.methods]
    look = style.styles(results.comparison.model_copy(update={"methods": methods}))
    assert look["new-method"].label == "new-method"
    assert look["mlm"] == style.STYLES["mlm"]


def test_an_unwritable_folder_is_one_line(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        style.save(figures.quality(results), tmp_path / "file", "quality")


def test_an_arrow_leads_from_every_mapped_teacher_layer_to_its_student_layer():
    figure = of_methods.mappings({"last": {2: (3,)}, "two": {1: (1, 2), 2: (3,)}}, 3, 2)
    last, two = figure.axes
    notes = [[note for note in axes.texts if isinstance(note, Annotation)] for axes in (last, two)]
    arrows = [[(note.xyann[1], note.xy[1]) for note in own] for own in notes]
    assert arrows == [[(3, 3)], [(1, 1), (2, 1), (3, 3)]]  # three teacher layers at 1, 2, 3; two of the student at 1, 3


def test_parts_without_a_gradient_are_left_white():
    norms = pd.DataFrame({"MLM": [0.5, 2.0], "MHA": [0.25, 0.0]}, index=["1: value", "head"])
    axes = of_methods.gradients(norms).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.25", "2"]


def test_a_method_named_after_another_is_called_so():
    assert style.label("mha-minilmv2-unfitted") == "MHA: MiniLMv2, unfitted"
    assert style.label("hs-uniform+last-mapping-reverse") == "HS: uniform+last, mapping reverse"
    assert style.label("hs-uniform+last") == style.STYLES["hs-uniform+last"].label and style.label("mine") == "mine"
    assert style.style_of("od-mine", 0).label == "OD, mine"


def test_controls_of_the_notebook_on_methods_draw_by_hand() -> None:
    logits, vectors = torch.randn(2, 1, 30), {name: torch.randn(1, 5, 12) for name in ("query", "key", "value")}

    def names(tokens: list[int]) -> list[str]:
        return [str(token) for token in tokens]

    bars = of_methods.at_temperature(*logits, ["word"], names, temperature=2.0).axes[0].patches
    known = (logits[0, 0] / 2).softmax(dim=-1).sort(descending=True).values[:8]
    assert [bar.get_width() for bar in bars[:8]] == pytest.approx(known.tolist())
    drawn = (
        of_methods.with_heads(related, vectors, vectors, list("abcde"), relation_heads=3).axes[0].images[0].get_array()
    )
    slices = [vectors["query"][0][:, start : start + 4] for start in (0, 4, 8)]
    by_hand = sum((own @ own.T / 2).softmax(dim=-1) for own in slices) / 3
    np.testing.assert_allclose(drawn, by_hand, rtol=1e-5)
