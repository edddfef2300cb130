"""The templates of pages and of what commands print, filled."""

import jinja2

from deltafl.errors import shorten

_LOOK = jinja2.Environment(
    loader=jinja2.PackageLoader("deltafl"),
    autoescape=jinja2.select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: object) -> str:
    """A template of `deltafl/templates` filled with values, which are escaped in HTML."""
    return _LOOK.get_template(name).render(values, shorten=shorten, zip=zip).rstrip()
