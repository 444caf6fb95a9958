"""Typesets ```math fences for the site, at build time: nothing is loaded or run in the reader's browser."""

from latex2mathml.converter import convert


def fence(source, language, css_class, options, md, **kwargs):
    """A formatter for pymdownx.superfences."""
    return f'<div class="{css_class}">{convert(source.strip(), display="block")}</div>'
