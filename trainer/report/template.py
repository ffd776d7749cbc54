"""The text of `report.md`, and how text of others is put into Markdown without becoming Markdown."""

from __future__ import annotations

import math
import re

_TEMPLATE = """\
# Incident {{ number }}: {{ title | cell }}

**{{ verdict }}**

| | |
| --- | --- |
| began at | step {{ opened.step }}, attempt {{ opened.attempt }}, batch {{ opened.batch }} |
| batches left out | {{ left_out }} |
| rollbacks | {{ rollbacks }} |
| work done in vain | {{ steps_lost }}, {{ seconds_lost }} |
| loss before · at · after | {{ loss_before }} · {{ loss_at }} · {{ loss_after }} |
| recovery verified | {{ verified }} |

## What happened

| attempt | step | batch | | |
| --- | --- | --- | --- | --- |
{% for event in events %}
| {{ event.attempt }} | {{ event.step }} | {{ event.batch }} | {{ event.phase }} | {{ event.text | cell }} |
{% endfor %}

{% if rewinds %}
| rollback from step | to step | source | seconds | batches left out |
| --- | --- | --- | --- | --- |
{% for rewind in rewinds %}
| {{ rewind.from_step }} | {{ rewind.to_step }} | {{ rewind.source | cell }} | {{ rewind.seconds | number }} | \
{{ rewind.left_out }} |
{% endfor %}

{% endif %}
![loss around the incident](loss.png)

## What was decided from

{% if dropped %}
| attempt | step | batch | verdict | loss | gradient norm | scores |
| --- | --- | --- | --- | --- | --- | --- |
{% for attempt in dropped %}
| {{ attempt.attempt }} | {{ attempt.step }} | {{ attempt.batch }} | {{ attempt.verdict }} | \
{{ attempt.loss | number }} | {{ attempt.grad_norm | number }} | {{ attempt.scores | numbers }} |
{% endfor %}
{% if dropped_more %}

… and {{ dropped_more }} more: `evidence.json` has all.
{% endif %}
{% else %}
Every attempt was applied.
{% endif %}

{% for event in events if event.numbers %}
- {{ event.phase }}, attempt {{ event.attempt }}: {{ event.numbers | numbers }}
{% endfor %}

{% if ranks %}
## Ranks

What each rank brought to attempt {{ ranks_attempt }}. {{ ranks_note }}

| rank | its share of the loss | its gradient norm |
| --- | --- | --- |
{% for rank in ranks %}
| {{ rank.rank }} | {{ rank.loss | number }} | {{ rank.norm | number }} |
{% endfor %}

{% endif %}
{% if has_norms %}
## Gradients by layer

![gradient norm by layer, usual and at the alarm](norms.png)

{% if grown %}
| layer | usual | at the alarm | |
| --- | --- | --- | --- |
{% for layer in grown %}
| {{ layer.name | cell }} | {{ layer.usual | number }} | {{ layer.now | number }} | × {{ layer.ratio | number }} |
{% endfor %}

{% endif %}
{% endif %}
## The worst samples

{% if samples %}
Of batch {{ samples[0].batch }}; `samples.jsonl` has {{ num_samples }} of them.

{% for sample in samples %}
### Sample {{ sample.id }}{% if sample.loss is not none %}: loss {{ sample.loss | number }}{% endif %}


{% for source, document, text in sample.documents %}
{% if source or document %}
{{ source | cell }} · {{ document | cell }}

{% endif %}
{{ text | fenced }}

{% else %}
(its text was not read)

{% endfor %}
{% endfor %}
{% else %}
No samples were kept: the replay settled it, or the alarm was about the state and not about a batch.
{% endif %}
"""

_MAX_CHARACTERS = 600
_MARKDOWN = re.compile(r"([\\`*\[\]|~#])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\x85]")


def render(context: dict[str, object]) -> str:
    """The report. A name that the template needs and `context` lacks is an error."""
    from jinja2 import Environment, StrictUndefined

    # autoescape is off because this is Markdown: `cell` and `fenced` escape what others wrote
    environment = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "fenced": fenced, "number": number, "numbers": numbers}
    return environment.from_string(_TEMPLATE).render(context)


def cell(text: str) -> str:
    """Text in a line or a cell of a table, where none of it is Markdown or HTML."""
    plain = " ".join(_CONTROL.sub(" ", text).split())
    return _MARKDOWN.sub(r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def fenced(text: str) -> str:
    """Text as a block of code, cut to 600 characters. The fence is longer than any run of backticks in the text, so
    that nothing in it can end the block."""
    lines = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    if len(lines) > _MAX_CHARACTERS:
        lines = f"{lines[:_MAX_CHARACTERS]}…"
    longest = max((len(run) for run in re.findall(r"`+", lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{lines}\n{fence}"


def number(value: float) -> str:
    """Four significant digits; a dash for what is not known."""
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def numbers(values: dict[str, float]) -> str:
    """Numbers by name, on one line."""
    return ", ".join(f"{cell(name)} {number(value)}" for name, value in values.items()) or "–"
