"""What all pages for a browser share: one file with everything in it, and nothing of a text taken for HTML."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2430; }
h2 { border-top: 1px solid #d5dae2; font-size: 1.05rem; margin-top: 2.2rem; padding-top: 1rem; }
table { border-collapse: collapse; } th, td { padding: .15rem .6rem; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #aab3c2; font-weight: 600; } td.n, th.n { text-align: right; }
tr.chosen { background: #eef4ff; font-weight: 600; }
.matrix td, .matrix th { border: 1px solid #e6e9ef; font-size: .8rem; min-width: 1.6rem; }
.matrix th.up { height: 7rem; vertical-align: bottom; } .matrix th.up span { writing-mode: vertical-rl; }
.wide { overflow-x: auto; }
.tokens span { border-radius: 3px; padding: 1px 2px; white-space: pre-wrap; }
.note { color: #5a6675; } img { max-width: 100%; }
</style></head><body>
<h1>{{ title }}</h1>
{{ body }}
</body></html>
"""


def page(title: str, template: str, **context: object) -> str:
    """The template's HTML within the common frame. A name that it needs and `context` lacks is an error."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # already escaped
    body = Markup(environment.from_string(template).render(**context))  # noqa: S704
    return environment.from_string(_FRAME).render(title=title, body=body)


def inline(figure: Figure) -> str:
    """A picture as the address of itself."""
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
