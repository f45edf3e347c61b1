"""A matplotlib figure as inline SVG that follows the page: its text, its colours by day and by night; and its legend as HTML."""

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

# As on the pictures, and as they have to be on a dark page. Text and axes take the page's own colour.
DARK = {"#1f6fb4": "#6db3f2", "#d1495b": "#ff8a97", "#2e8b57": "#5fce93", "#8d6cab": "#c9a8e6", "#e08e2b": "#f2b155", "#5b6770": "#a9b4bd"}
INKS = ("#000000", "#262626")
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "jaxdistill", "font.family": "sans-serif", "font.size": 8}


def variables(dark: bool) -> str:
    """The CSS that gives the colours' variables their values."""
    return "".join(f"{_name(light)}:{night if dark else light};" for light, night in DARK.items())


def inline(figure: Figure, alt: str) -> str:
    """`figure` as <svg>, as wide as the page lets it be. alt: what it shows, in words."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S)  # (a style would be the whole page's)
    text = re.sub(r"^<svg[^>]*>", "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure would have a figure_1
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)  # hundredths of a point; no word of the text
    text = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", text)
    text = text.replace("xlink:href", "href")
    for light in DARK:
        text = text.replace(light, f"var({_name(light)})")
    for ink in INKS:
        text = text.replace(ink, "currentColor")
    text = re.sub(r"\s*\n\s*", "\n", text)
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(alt)}">{text.strip()}'


def legend(figure: Figure) -> str:
    """The labelled artists of the first axis as a list: a stroke or a patch, and the name."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    items = "".join(f"<li>{_sample(handle)}{html.escape(label)}</li>" for handle, label in zip(handles, labels, strict=True))
    return f'<ul class="legend">{items}</ul>' if items else ""


def _sample(handle) -> str:
    if not hasattr(handle, "get_linestyle") or not hasattr(handle, "get_marker"):  # an area
        colour, alpha = matplotlib.colors.to_hex(handle.get_facecolor()[0][:3]), handle.get_alpha()
        return f'<i style="background:{_css(colour)};opacity:{1 if alpha is None else alpha:g}"></i>'
    colour, dashes, marker = matplotlib.colors.to_hex(handle.get_color()), handle._unscaled_dash_pattern[1], handle.get_marker()
    shapes = ""
    if handle.get_linestyle() not in ("None", ""):
        pattern = f' stroke-dasharray="{" ".join(f"{2 * length:g}" for length in dashes)}"' if dashes else ""
        shapes += f'<path d="M0 5H24" stroke-width="2"{pattern}/>'
    if marker == "x":
        shapes += '<path d="M9 2l6 6m0-6l-6 6" stroke-width="1.5"/>'
    elif marker not in ("None", "", None):
        fill = "none" if handle.get_markerfacecolor() == "none" else "currentColor"
        shapes += f'<circle cx="12" cy="5" r="3" fill="{fill}"/>'
    return f'<svg viewBox="0 0 24 10" fill="none" stroke="currentColor" style="color:{_css(colour)}" aria-hidden="true">{shapes}</svg>'


def _css(colour: str) -> str:
    return f"var({_name(colour)})" if colour in DARK else "currentColor" if colour in INKS else colour


def _name(colour: str) -> str:
    return f"--c{colour[1:]}"
