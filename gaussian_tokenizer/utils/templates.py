"""Pages and cards from jinja2 templates, which lie in the folder `templates` of the room that renders them."""

import functools
from typing import Any

import jinja2


def render_template(package: str, name: str, **values: Any) -> str:
    """Render `templates/<name>` of a package (the caller's `__package__`); jinja2's UndefinedError for a missing value.

    Values are escaped in `*.html.j2` only.
    """
    return _environment(package).get_template(name).render(values)


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
