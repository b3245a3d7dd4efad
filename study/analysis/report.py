"""The HTML report: an index page and the executed analysis notebooks, readable offline and byte-stable."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert import HTMLExporter

from study.analysis import figures
from study.analysis.ablations import ABLATIONS, effects
from study.analysis.published import COMPARABLE, PUBLISHED
from study.analysis.recommendation import recommendation
from study.analysis.results import RUN, TEACHER, Results, load_results
from study.analysis.statistics import BOTH_SEEDS
from study.analysis.tables import costs, distillation, headline, per_language, per_task, sampling_error
from study.analysis.verdicts import verdicts
from study.config import Layout, Params, StudyError, find_root
from study.files import write_file

MAIN_FIGURE = "quality_heatmap"
TABLES = {
    "verdicts.csv": "verdicts on the paper's claims",
    "contrasts.csv": "their contrasts",
    "differences.csv": "differences between all pairs of methods",
    "aggregates.csv": "interquartile means and performance profiles",
    "per_task.csv": "test scores per task",
    "costs.csv": "size and speed",
    "distillation.csv": "what training took",
}
#: What makes the pages, by what their names begin with.
NOTEBOOKS = {
    "compare": "50_compare.ipynb",
    "ablations": "52_ablations.ipynb",
    "representations": "54_representations.ipynb",
}
#: Where a contrast's test has the effect; {} is its margin.
CLAIMED = {
    "superior": "above zero",
    "non-inferior": "above −{:g}",
    "equivalent": "between −{0:g} and {0:g}",
}
LANGUAGE_TABLE = {"per_language.csv": "test scores per language"}

STYLE = """
:root { --ink: #1b1f24; --soft: #59636e; --line: #d9dee3; --link: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1.05rem; margin: 1rem 0 0.5rem; }
a { color: var(--link); }
code { font-size: 0.92em; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
.wide, .output_html { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
table, thead, tbody, tr { border: 0; }
th, td { padding: 0.25rem 0.5rem; border: 0; border-bottom: 1px solid var(--line); text-align: right; }
td, tbody th, .interval { white-space: nowrap; }
th.name, td.name { text-align: left; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tr.group td { border-top: 2px solid var(--soft); }
tr.chosen td { font-weight: 600; background: #eef5fc; }
td.words { white-space: normal; min-width: 10rem; }
ul.plain { padding-left: 1.2rem; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
.settings > section { min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.9rem 1rem; }
.card h4 { margin: 0; font-size: 1rem; color: var(--soft); font-weight: 600; }
.card .value { font-size: 2rem; font-weight: 650; line-height: 1.2; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 0.15rem 0.8rem; margin: 0.6rem 0 0; font-size: 0.9rem; }
.card dt { color: var(--soft); } .card dd { margin: 0; text-align: right; }
pre { overflow-x: auto; font-size: 0.85rem; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% block body %}
<p><a href="index.html">← Report</a></p>
<main>{{ content }}</main>
<p class="soft">Made by <a href="../../../notebooks/{{ notebook }}">notebooks/{{ notebook }}</a>. Its numbers: {%
for file in numbers %}<a href="../{{ file }}">{{ file.rpartition("/")[2] }}</a>{{ ", " if not loop.last }}{% endfor %}.
</p>
{% endblock %}
</body>
</html>
"""

INDEX = """{% extends "page" %}
{% macro between(low, high) %}
{% if low is not none %} <span class="interval">({{ low }} to {{ high }})</span>{% endif %}
{% endmacro %}
{% block body %}
<header>
<h1>{{ title }}</h1>
<p class="soft">Profile <b>{{ profile }}</b>, {{ seeds }} distillation seed{{ "s" if seeds != 1 }};
measured {{ dates }} on {{ processor }}, {{ cores }} cores.
{% for s in settings %}{{ s.setting|capitalize }}: {{ s.budget }}.{{ " " if not loop.last }}{% endfor %}</p>
</header>
<main>
<h2>Which method makes the best student?</h2>
<div class="settings">
{% for s in settings %}{% with headline=s.headline, labels=s.labels, latency=s.latency %}
<section>
<h3>Setting {{ s.setting }}, teacher {{ s.teacher }}</h3>
<div class="cards">
{% for student, best in headline.students.items() %}
<section class="card">
<h4>{{ student }}</h4>
<div class="value">{{ best.retained_percent }} %</div>
<div>of the teacher's macro test score{{ between(best.retained_percent_low, best.retained_percent_high) }}</div>
<dl>
<dt>best method</dt><dd>{{ labels[best.method] }}</dd>
<dt>speed-up</dt><dd>{{ "%.2f"|format(best.speed_up) }} ×</dd>
{% for baseline, name in (("none", "over no training"), ("mlm", "over MLM alone")) %}
{% if best["margin_over_" ~ baseline] is defined %}
<dt>{{ name }}</dt><dd>{{ "%+.2f"|format(best["margin_over_" ~ baseline]) }} points{{
between(best["margin_over_" ~ baseline ~ "_low"], best["margin_over_" ~ baseline ~ "_high"]) }}</dd>
{% endif %}
{% endfor %}
</dl>
</section>
{% endfor %}
</div>
<p class="soft">Methods were chosen on development data; every number is from test data. The macro score is the mean of
the tasks' main metrics; the teacher's is {{ (100 * headline.teacher.test)|round(1) }}. Speed-up at batch size
{{ latency.batch_size }} with {{ latency.threads }} thread{{ "s" if latency.threads != 1 }}. In brackets: 95 %
intervals over {{ "distillation and fine-tuning seeds" if seeds > 1 else "fine-tuning seeds only" }}.</p>

<figure>
{{ s.picture }}
<figcaption>{{ s.captions[s.main_figure] }}</figcaption>
</figure>
</section>
{% endwith %}{% endfor %}
</div>

<h2>Which student should I ship?</h2>
<div class="wide"><table>
<thead><tr><th class="name">setting</th><th>if a sequence may take</th><th>of the teacher's time</th>
<th class="name">take</th><th class="name">distilled by</th><th>teacher's score kept</th>
<th>points lost</th></tr></thead>
<tbody>
{% for s in settings %}{% for row in s.recommendation %}
<tr class="{{ "group" if loop.first }}"><td class="name">{{ s.setting if loop.first }}</td><td>{{ row.budget }} ms</td>
<td>1 / {{ row.speed_up }}</td><td class="name">{{ row.student }}</td>
<td class="name words">{{ row.label }}{% if row.reservation %}: {{ row.reservation }}{% endif %}{%
if row.alike %} <span class="soft">(not told apart from {{ row.alike }})</span>{% endif %}</td>
<td>{{ row.retained }} %{% if row.interval %} ({{ row.interval }}){% endif %}</td><td>{{ row.loss }}</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p class="soft">Within a setting, take the first row whose time you have; on another machine go by the share of the
teacher's time. Times: one sequence of {{ settings[0].latency.sequence_length }} tokens, {{
settings[0].latency.threads }} thread{{ "s" if settings[0].latency.threads != 1 }}, medians. Students and methods were
chosen on development data, and a student that a faster one equals is left out; what is kept and lost is from test data.
{% if seeds == 1 %}One distillation seed is behind every row: another may put another method first.{% else %}{{ seeds }}
distillation seeds are behind every row.{% endif %} Not told apart: the 95 % interval of the difference holds zero.</p>

{% for s in settings %}
<h2>{{ s.setting|capitalize }}: what do these results say of the paper's claims?</h2>
<div class="wide"><table>
<thead><tr><th class="name" colspan="2">claim</th><th class="name">verdict</th><th class="name">decisive contrast</th>
<th>effect (interval)</th><th>models</th></tr></thead>
<tbody>
{% for row in s.verdicts %}
<tr><td class="name">{{ row.claim }}</td>
<td class="name words">{{ row.text }}
<span class="soft">({{ row.standing }})</span></td>
<td class="name words"><b>{{ row.verdict }}</b>{% if row.reason %}: {{ row.reason }}{% endif %}{%
if row.doubtful %} <span class="soft">({{ row.doubtful }} of its methods not shown to beat no training)</span>{%
endif %}</td>
<td class="name words">{% if row.effect != "–" %}{{ row.contrast }}, claimed to be {{ row.claimed }}{% endif %}</td>
<td>{{ row.effect }}{% if row.interval %} ({{ row.interval }}){% endif %}</td><td>{{ row.runs }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Effect: points of macro test score, paired by student, task and seed, with its 95 % interval over
{{ "distillation and fine-tuning seeds" if seeds > 1 else "fine-tuning seeds only" }}; of several contrasts, the one
that fails or is least sure to hold. Every contrast is in
<a href="../tables/{{ s.setting }}/contrasts.csv">this table</a> and
<a href="../figures/{{ s.setting }}/claims.png">this figure</a>; students:
{{ s.headline.students|join(", ") }}. What is not shown either way is undecided, and one distillation seed judges no
method. Which methods are not shown to beat no training is
<a href="../tables/{{ s.setting }}/verdicts.csv">here</a>. HS: mean over its five mappings; @L_T-2: distilled from the
teacher's last layer but two.</p>
{% endfor %}

{% for s in settings %}{% with tasks=s.tasks, scores=s.scores, costs=s.costs, sizes=s.sizes, latency=s.latency %}
<h2>{{ s.setting|capitalize }}: scores per task</h2>
<div class="wide"><table>
<thead><tr><th class="name">student</th><th class="name">method</th>
{% for task in tasks %}<th class="interval">{{ task.task }}</th>{% endfor %}
<th>macro</th><th class="interval">retained % (interval)</th><th>last of the fall, %</th></tr></thead>
<tbody>
{% for row in scores %}
<tr class="{{ "group" if row.first }}{{ " chosen" if row.selected }}"><td class="name">{{ row.student }}</td>
<td class="name">{{ row.label }}</td>{% for value in row.tasks %}<td>{{ value }}</td>{% endfor %}
<td>{{ row.macro }}</td><td>{{ row.retained }}{% if row.interval %} ({{ row.interval }}){% endif %}</td>
<td>{{ row.last_fall }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Test scores × 100, mean over seeds; shaded: each student's best method on development data.
Retained: macro in percent of the teacher's. Last of the fall: what the last interval between two evaluations brought of
the whole fall of the method's held-out loss (mean over seeds); near 0 the learning curve has flattened.
{% for task in tasks %}{{ task.task }}: {{ task.label }}, {{ task.test_examples }} test examples{%
if task.standard_error %}, standard error about {{ task.standard_error }}{% endif %}{%
if task.majority_share %}, {{ task.majority_share }} for always giving the commonest label{% endif %}{{
";" if not loop.last else "." }}
{% endfor %}The standard errors (binomial, at the teacher's accuracy) are a rough yardstick for the choice of test
examples, which the intervals leave out.</p>

{% if s.by_language %}
<h2>{{ s.setting|capitalize }}: scores per language</h2>
<div class="wide"><table>
<thead><tr><th class="name">student</th><th class="name">method</th><th class="name">task</th>
{% for language in s.languages %}<th>{{ language|replace("_", " ") }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in s.by_language %}
<tr class="{{ "group" if row.first }}"><td class="name">{{ row.student }}</td><td class="name">{{ row.label }}</td>
<td class="name">{{ row.task }}</td>{% for value in row.scores %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Test scores × 100 of the task's main metric, mean over seeds. Fine-tuning and the choice of methods saw
English alone; distillation read the setting's corpus in all its languages. Gap: English less the mean without
English.</p>
{% endif %}

<h2>{{ s.setting|capitalize }}: what each model costs to run</h2>
<div class="wide"><table>
<thead><tr><th class="name">model</th><th>threads</th><th>parameters (M)</th>
<th>without embeddings (M)</th><th>GFLOPs</th>
<th>latency (ms), batch of {{ sizes[0] }}</th><th>speed-up</th>
<th>sequences / s, batch of {{ sizes[-1] }}</th><th>speed-up</th></tr></thead>
<tbody>
{% for row in costs %}
<tr><td class="name">{{ row.student }}</td><td>{{ row.threads }}</td><td>{{ row.parameters }}</td>
<td>{{ row.encoder }}</td>
<td>{{ row.flops }}</td><td>{{ row.latency }}</td><td>{{ row.latency_speed_up }} ×</td>
<td>{{ row.throughput }}</td><td>{{ row.throughput_speed_up }} ×</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Forward pass of the encoder on {{ latency.sequence_length }} tokens without padding,
{{ latency.precision }}; medians of {{ latency.runs }} runs after {{ latency.warmup_runs }} uncounted ones, quartiles in
brackets; the teacher is timed in turn with each student. FLOPs: floating-point operations of one sequence.</p>
{% endwith %}{% endfor %}

<h2>Published numbers, not ours</h2>
<div class="wide"><table>
<thead><tr><th class="name">student</th><th class="name">teacher</th><th class="name">method</th>
<th class="name">measure</th><th>score</th><th>of its teacher's</th><th class="name">source</th></tr></thead>
<tbody>
{% for row in published %}
<tr><td class="name">{{ row.student }}</td><td class="name">{{ row.teacher }}</td><td class="name">{{ row.method }}</td>
<td class="name">{{ row.measure }}</td><td>{{ "%.1f"|format(row.score) }}</td>
<td>{% if row.retained %}{{ "%.1f"|format(row.retained) }} %{% else %}–{% endif %}</td>
<td class="name words">{{ row.source }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">{{ comparable }} Ours: {% for s in settings %}{% for student, best in s.headline.students.items() %}{{
student }} ({{ s.setting }}) keeps {{ best.retained_percent }} %{{ ", " if not loop.last }}{% endfor %}{{
"; " if not loop.last else "." }}{% endfor %}</p>

<h2>What these numbers do not say</h2>
<ul class="plain">
<li>The embedded teachers are contrastively tuned sentence encoders, not freshly pre-trained language models. Their
masked-language-modelling head, which output-distribution transfer needs, was fitted by this study.</li>
<li>The results are about these teachers and these budgets, not about RoBERTa or XLM-R, nor about training runs many
thousand times longer.</li>
{% if seeds == 1 %}<li>One distillation seed per method: the intervals hold the chance of fine-tuning, not that of
initialisation and data order in distillation. Small differences between methods may be chance.</li>{% endif %}
{% for s in settings %}{% for row in s.unlearnt %}<li>{{ s.setting|capitalize }}, {{ row.student }}, {{ row.label }}:
after training at a learning rate of {{ row.rate }} the held-out loss is {{ row.ratio }} times what it was before. This
score says nothing of the method at a rate that suits the student.</li>
{% endfor %}{% for row in s.rates %}<li>{{ s.setting|capitalize }}, {{ row.label }}: at a learning rate of {{
row.rate }} instead of {{ row.tuned }}, which development data chose, {{ row.effect }} points ({{ row.interval }}). The
place of this method is a matter of its learning rate as much as of what it transfers.</li>
{% endfor %}{% endfor %}
<li>The best of several methods looks better than it is, even when it is chosen on development data.</li>
<li>The macro score averages unlike metrics: it ranks models and has no meaning beyond that.</li>
</ul>

<h2>More</h2>
{% for s in settings %}
<h3>{{ s.setting|capitalize }}</h3>
<ul class="plain">
{% for page, title in s.pages.items() %}<li><a href="{{ page }}">{{ title }}</a></li>
{% endfor %}
<li>Figures: {% for name in s.captions %}{{ name|replace("_", " ") }} (<a
href="../figures/{{ s.setting }}/{{ name }}.png">PNG</a>,
<a href="../figures/{{ s.setting }}/{{ name }}.svg">SVG</a>){{ ", " if not loop.last }}{% endfor %}</li>
<li>Tables: {% for file, name in s.tables.items() %}<a href="../tables/{{ s.setting }}/{{ file }}">{{ name }}</a> (CSV),
{% endfor %}<a href="../headline/{{ s.setting }}.json">headline</a> (JSON)</li>
<li><details><summary>Result files of every run (JSON)</summary>
<ul class="plain">{% for file in s.files %}<li><a
href="{{ file|urlencode }}">{{ file.rpartition("/")[2] }}</a></li>
{% endfor %}</ul></details></li>
</ul>
{% endfor %}
<p class="soft">Versions: {{ versions }}{% if commits %}; evaluated at commit {{ commits }}{% endif %}.</p>
</main>
{% endblock %}
"""


def write_report(params: Params, root: Path | None = None) -> Path:
    """Write ``reports/<profile>/html``: index.html and a page per analysis and setting; return the index.

    The pages hold no picture of their own: they show the files of figures beside them. Nothing in them comes from the
    clock or from the network, so the same results, figures and notebooks give the same bytes.

    Args:
        params: the study's parameters; their profile names the folder, ``grid.settings`` what is shown.
        root: the study's folder; by default found from the working folder.

    Raises:
        StudyError: a result, figure, table or executed notebook is missing, or the folder cannot be written.
    """
    root = root or find_root()
    layouts = [Layout(params, setting, root) for setting in params.grid.settings]
    loaded = {layout: load_results(params, layout.setting, root) for layout in layouts}
    missing = []
    for layout, results in loaded.items():
        needed = [layout.figures / f"{name}.{kind}" for name in figures.names(results) for kind in ("png", "svg")]
        needed += [layout.tables / name for name in tables(results)] + [layout.headline, *layout.analyses]
        missing += [str(path.relative_to(root)) for path in needed if not path.is_file()]
    if missing:
        raise StudyError(f"the report lacks {', '.join(missing)}; `dvc repro` makes them")

    templates = jinja2.DictLoader({"page": PAGE, "index": INDEX})
    environment = jinja2.Environment(loader=templates, autoescape=True, trim_blocks=True)
    html, settings = layouts[0].reports / "html", []
    for layout, results in loaded.items():
        pages = {}
        for notebook, folder in layout.analyses.items():
            name = f"{notebook.stem}.html"
            pages[name], content = notebook_page(notebook, folder)
            numbers = layout.tables if folder == layout.figures else folder
            page = environment.get_template("page").render(
                title=pages[name],
                style=Markup(STYLE),
                content=Markup(content),
                notebook=NOTEBOOKS[notebook.stem.rpartition("_")[0]],
                numbers=[path.relative_to(layout.reports).as_posix() for path in sorted(numbers.glob("*.csv"))],
            )
            write_file(html / name, page + "\n")
        values = index_values(results) | {
            "teacher": params.settings[layout.setting].teacher.name,
            "pages": pages,
            "picture": picture(layout.figures / f"{MAIN_FIGURE}.png"),
            "files": [f"../results/{layout.setting}/{path.name}" for path in result_files(params, layout)],
        }
        settings.append(values)
    index = environment.get_template("index").render(
        title="Task-agnostic distillation: methods compared",
        style=Markup(STYLE),
        profile=params.profile,
        seeds=len(params.grid.seeds),
        settings=settings,
        published=PUBLISHED,
        comparable=COMPARABLE,
        **machine(pd.concat([results.runs for results in loaded.values()])),
    )
    write_file(html / "index.html", index + "\n")
    return html / "index.html"


def result_files(params: Params, layout: Layout) -> list[Path]:
    """The result files behind the report, in the order of the grid, those of ablations after them."""
    cells = [(TEACHER, TEACHER, 0), *params.grid.cells(layout.setting)]
    varied = params.of_ablations(layout.setting)
    cells += [cell for cell in (varied.grid.cells(layout.setting) if varied else ()) if cell not in cells]
    others = [*(layout.results / f"{name}.json" for name in ("latency", "tasks")), layout.representations]
    return [*(layout.result(*cell) for cell in cells), *(path for path in others if path.is_file())]


def notebook_page(path: Path, figure_folder: Path) -> tuple[str, str]:
    """Title (its first heading) and HTML of an executed notebook, without code.

    A picture that is byte for byte one of ``figure_folder`` becomes a reference to that file; others stay inside.

    Raises:
        StudyError: the file is no notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise StudyError(f"{path.name}: not a notebook: {' '.join(str(error).split())[:200]}") from None
    names = {picture.read_bytes(): picture.stem for picture in sorted(figure_folder.glob("*.png"))}
    for place, cell in enumerate(notebook.cells):
        cell["id"] = str(place)  # papermill gives the cell that it injects a random one
        for output in cell.get("outputs", []):
            encoded = output.get("data", {}).get("image/png")
            name = names.get(base64.b64decode(encoded)) if encoded else None
            if name:
                output["data"] = {"text/html": str(picture(figure_folder / f"{name}.png"))}
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    content, _ = exporter.from_notebook_node(notebook)
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.stem)
    return title, content


def picture(path: Path) -> Markup:
    """HTML that shows a PNG of a report's figures at its printed size or narrower and leads to its SVG."""
    width = int.from_bytes(path.read_bytes()[16:20], "big") * 96 // 200  # in the PNG header; CSS has 96 pixels an inch
    tag = '<a href="../{0}.svg"><img src="../{0}.png" width="{1}" alt="{2}"></a>'
    place = "/".join(path.with_suffix("").parts[-3:])  # <kind>/<setting>/<name>
    return Markup(tag).format(place, width, figures.caption(path.stem))


def index_values(results: Results) -> dict:
    """What the index page shows of the results, as text and plain values."""
    labels = {method: style.label for method, style in figures.styles(results).items()} | {TEACHER: TEACHER}
    table, tasks, runs = per_task(results), sampling_error(results), results.runs
    falls = distillation(results).groupby(["method", "student"])["last_interval_percent"].mean()
    latency = results.latency.sort_values(["batch_size", "threads"], kind="stable").iloc[0]
    scores = [
        {
            "student": row["student"] if row["method"] != TEACHER else TEACHER,
            "label": labels[row["method"]] if row["method"] != TEACHER else "the ceiling",
            "first": row["student"] != previous,
            "selected": row["selected"],
            "tasks": [_text(100 * row[task], 1) for task in tasks["task"]],
            "macro": _text(100 * row["macro"], 1),
            "retained": _text(100 * row["retained"], 1),
            "interval": _range(100 * row["retained_low"], 100 * row["retained_high"], 1),
            "last_fall": _text(falls.get((row["method"], row["student"]), math.nan), 1),
        }
        for previous, (_, row) in zip([None, *table["student"]], table.iterrows(), strict=False)
    ]
    sizes = sorted(results.latency["batch_size"].unique())
    rows = [
        {
            "student": row["student"],
            "threads": row["threads"],
            "parameters": _text(row["parameters"] / 1e6, 1),
            "encoder": _text(row["encoder_parameters"] / 1e6, 1),
            "flops": _text(row["flops_per_sequence"] / 1e9, 2),
            "latency": _text(row[f"latency_ms_batch_{sizes[0]}"], 1)
            + f" ({_range(*(row[f'latency_ms_{end}_quartile_batch_{sizes[0]}'] for end in ('lower', 'upper')), 1)})",
            "latency_speed_up": _text(row[f"speed_up_batch_{sizes[0]}"], 2),
            "throughput": _text(row[f"sequences_per_second_batch_{sizes[-1]}"], 0),
            "throughput_speed_up": _text(row[f"speed_up_batch_{sizes[-1]}"], 2),
        }
        for _, row in costs(results).iterrows()
    ]
    languages = per_language(results)
    return {
        "setting": runs["setting"].iloc[0],
        "budget": budget(results),
        "headline": headline(results),
        "labels": labels,
        "recommendation": [
            {key: row[key] for key in ("student", "reservation")}
            | {"alike": ", ".join(labels[method] for method in row["alike"])}
            | {"budget": _text(row["budget_ms"], 1), "speed_up": _text(row["speed_up"], 1)}
            | {"label": labels[row["method"]], "retained": _text(row["retained"], 1), "loss": _text(row["loss"], 1)}
            | {"interval": _range(row["retained_low"], row["retained_high"], 1)}
            for row in recommendation(results).to_dict("records")
        ],
        "captions": {name: figures.CAPTIONS[name] for name in figures.names(results)},
        "main_figure": MAIN_FIGURE,
        "tables": tables(results),
        "languages": list(languages.columns[5:]),
        "by_language": [
            {"student": row[2], "label": labels[row[1]], "task": row[3]}
            | {"first": row[2] != previous, "scores": [_text(100 * score, 1) for score in row[5:]]}
            for previous, row in zip([None, *languages["student"]], languages.itertuples(index=False), strict=False)
        ],
        "scores": scores,
        "verdicts": [
            row
            | {"effect": _text(row["effect"], 1, sign="+"), "interval": _range(row["low"], row["high"], 1, sign="+")}
            | {"claimed": CLAIMED[row["test"]].format(row["margin"])}
            | {key: in_words(row[key], labels) for key in ("contrast", "reason")}
            | {"doubtful": len(row["not_above_floor"].split(", ")) if row["not_above_floor"] else 0}
            for row in verdicts(results).to_dict("records")
        ],
        "tasks": [
            {"task": row.task, "label": figures.METRICS.get(row.metric, row.metric), "test_examples": row.test_examples}
            | {
                name: None if math.isnan(value) else _text(100 * value, 1)
                for name, value in (("standard_error", row.standard_error), ("majority_share", row.majority_share))
            }
            for row in tasks.itertuples()
        ],
        "costs": rows,
        "rates": rate_effects(results, labels),
        "unlearnt": unlearnt(results, labels),
        "sizes": sizes,
        "latency": latency.to_dict(),
    }


def in_words(text: str, labels: dict[str, str]) -> str:
    """``text`` with the names that params.yaml gives to methods replaced by their ``labels``."""
    names = "|".join(re.escape(name) for name in sorted(labels, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({names})(?![\w+-])", lambda name: labels[name[0]], text)


def rate_effects(results: Results, labels: dict[str, str]) -> list[dict[str, str]]:
    """Methods that another learning rate than theirs is told apart from (95 % interval over distillation), as text."""
    table = effects(results, {"learning_rate": ABLATIONS["learning_rate"]})
    return [
        {"label": labels[row.reference], "rate": f"{row.learning_rate:g}", "tuned": f"{row.reference_learning_rate:g}"}
        | {"effect": _text(row.effect, 1, sign="+"), "interval": _range(row.low, row.high, 1, sign="+")}
        for row in table.itertuples()
        if row.covers == BOTH_SEEDS and not row.low <= 0 <= row.high
    ]


def unlearnt(results: Results, labels: dict[str, str]) -> list[dict[str, str]]:
    """Methods whose own held-out loss is higher after training than before (mean ratio over seeds), as text."""
    losses = results.curves.groupby(RUN, sort=False)["loss"].agg(["first", "last"])
    ratios = (losses["last"] / losses["first"]).groupby(["student", "method"], sort=False).mean()
    rates = distillation(results).groupby(["student", "method"])["learning_rate"].first()
    return [
        {"student": cell[0], "label": labels[cell[1]], "rate": f"{rates[cell]:g}", "ratio": _text(ratio, 1)}
        for cell, ratio in ratios.items()
        if ratio > 1
    ]


def budget(results: Results) -> str:
    """How much was run, ablations included: students, tokens of a training run, hours as one process after another."""
    parts = [part.runs for part in (results, results.ablations) if part]
    runs = pd.concat(parts).drop_duplicates(RUN)
    runs = runs[runs["method"] != TEACHER]
    tokens = sorted(runs["tokens"].dropna().unique() / 1e6)
    of_each = " to ".join(_text(value, 1) for value in tokens[:1] + tokens[1:][-1:])
    hours = runs[["seconds", "evaluation_seconds"]].sum().sum() / 3600
    return (
        f"{len(runs)} students, {of_each} million tokens of distillation each, {_text(hours, 1)} hours of distillation"
        " and evaluation"
    )


def machine(runs: pd.DataFrame) -> dict[str, str]:
    """Where and when runs were made, and with what versions, as text."""
    packages = ["python", "torch", "transformers", "datasets"]
    return {
        "dates": " to ".join(sorted({runs["date"].min(), runs["date"].max()})),
        "processor": " and ".join(runs["processor"].unique()),
        "cores": " or ".join(str(cores) for cores in sorted(runs["cores"].unique())),
        "commits": " and ".join(runs["commit"].dropna().unique()),
        "versions": ", ".join(f"{package} {' and '.join(runs[package].unique())}" for package in packages),
    }


def tables(results: Results) -> dict[str, str]:
    """The tables that the comparison writes, and what they hold."""
    return TABLES if per_language(results).empty else TABLES | LANGUAGE_TABLE


def _text(value: float, digits: int, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign},.{digits}f}"


def _range(low: float, high: float, digits: int, sign: str = "") -> str:
    between = " to " if sign else " – "
    return "" if math.isnan(low) else f"{low:{sign},.{digits}f}{between}{high:{sign},.{digits}f}"
