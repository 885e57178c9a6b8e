"""The report as one HTML file that needs nothing else: no script, no network, pictures inside."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable
from html import escape

from modularforge import __version__
from modularforge.observe.figures import Plot
from modularforge.observe.page_style import CSS
from modularforge.observe.progress import headline, is_finished, parts_of
from modularforge.observe.run import Run
from modularforge.observe.tables import (
    Table,
    evaluation_table,
    job_table,
    provenance_table,
    settings_table,
    versions_table,
)

SECTIONS = {
    "progress": "Progress",
    "timeline": "Timeline",
    "training": "Training",
    "evaluation": "Evaluation",
    "routing": "Routing",
    "samples": "Samples",
    "configuration": "Configuration and versions",
}


def make_page(run: Run, plots: Iterable[Plot]) -> str:
    """The whole page."""
    drawn = list(plots)
    bodies = {name: "".join(_figure(plot) for plot in drawn if plot.section == name) for name in SECTIONS}
    bodies["progress"] = _bar(run) + _table(job_table(run), "Stages and jobs")
    if run.evaluation:
        bodies["evaluation"] += _table(evaluation_table(run.evaluation), "Perplexity on the test split")
        bodies["samples"] = _samples(run.evaluation)
    bodies["configuration"] = _configuration(run)
    kept = {name: body for name, body in bodies.items() if body}
    links = "".join(f'<a href="#{name}">{SECTIONS[name].split(" ")[0]}</a>' for name in kept)
    sections = "".join(f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{body}</section>' for name, body in kept.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(_title(run))}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{CSS}</style></head><body><header>{_header(run)}<nav>{links}</nav></header>"
        f"<main>{sections}</main></body></html>\n"
    )


def _title(run: Run) -> str:
    title = str(run.config.get("name", "")) or run.name
    return title if title == run.name else f"{title}: {run.name}"


def _header(run: Run) -> str:
    made = datetime.datetime.fromtimestamp(run.read_at, datetime.timezone.utc)
    problems = "".join(f'<p class="problem">{escape(problem)}</p>' for problem in run.problems)
    return (
        f"<h1>{escape(_title(run))}</h1><p class=headline>{escape(headline(run))}.</p>{_key_figures(run)}{problems}"
        f"<p class=origin>{escape(run.url)} · read {made:%Y-%m-%d %H:%M} UTC · modularforge {__version__}</p>"
    )


def _key_figures(run: Run) -> str:
    """Test perplexity of the chosen model beside what it must beat."""
    results = run.evaluation
    if not results or not results.get("chosen"):
        return ""
    models, tiles = results["models"], []
    for name in dict.fromkeys((results["chosen"], "backbone", "dense")):
        if name in models:
            tiles.append(f"<div><dt>{escape(name)}</dt><dd>{models[name]['perplexity']:,.2f}</dd></div>")
    return f"<dl>{''.join(tiles)}<div class=unit><dt>&nbsp;</dt><dd>test perplexity</dd></div></dl>"


def _bar(run: Run) -> str:
    """Training tokens done, as a bar; nothing when the run is finished or its length unknown."""
    parts = [part for part in parts_of(run) if part.tokens]
    total = sum(part.tokens for part in parts)
    if is_finished(run) or not total:
        return ""
    share = 100 * sum(part.tokens * (part.share or 0.0) for part in parts) / total
    return (
        f'<div class=bar role=progressbar aria-valuenow="{share:.0f}" aria-label="training tokens">'
        f'<div style="width:{share:.1f}%"></div></div><p class=bar-text>{share:.0f} % of the training tokens</p>'
    )


def _figure(plot: Plot) -> str:
    content = base64.b64encode(plot.png).decode()
    heading = "" if plot.title == SECTIONS[plot.section] else f"<h3>{escape(plot.title)}</h3>"
    return (
        f'<figure id="plot-{plot.name}">{heading}'
        f'<img alt="{escape(plot.text)}" src="data:image/png;base64,{content}"></figure>'
    )


def _table(table: Table, caption: str) -> str:
    def row(cells: list[str], tag: str) -> str:
        kinds = ["" if index < table.text_columns else " class=n" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class=scroll><table aria-label="{escape(caption)}"><thead>{row(table.header, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _samples(results: dict[str, object]) -> str:
    found = results.get("samples")
    if not isinstance(found, dict):
        return ""
    return "".join(
        f"<p class=sample><b>{escape(model)}</b>, {kind}: <i>{escape(sample['prompt'])}</i>{escape(sample[kind])}</p>"
        for model, samples in found.items()
        for sample in samples
        for kind in ("greedy", "sampled")
    )


def _configuration(run: Run) -> str:
    parts = []
    if run.artifacts:
        parts.append(_table(provenance_table(run), "What is committed"))
        parts.append(f"<details open><summary>Versions</summary>{_table(versions_table(run), 'Versions')}</details>")
    if run.config:
        parts.append(
            f"<details><summary>All settings</summary>{_table(settings_table(run.config), 'Settings')}</details>"
        )
    return "".join(parts)
