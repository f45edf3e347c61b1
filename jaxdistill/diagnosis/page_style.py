"""How the report looks. Every rule is bound to the report's own element: in a notebook the page around it must stay as it is."""

from jaxdistill.diagnosis import svg

DAY = "--page:#fff;--ink:#1c2833;--quiet:#5b6770;--line:#d8dee4;--card:#f5f7f9;--error:#b3261e;--warning:#8a5a00;--note:#3d5a73;"
NIGHT = "--page:#12181f;--ink:#e4e9ee;--quiet:#a9b4bd;--line:#36424d;--card:#1c252e;--error:#ff8a80;--warning:#ffc266;--note:#9fc3e0;"
ROOT = (f"main.jaxdistill{{{DAY}{svg.variables(dark=False)}font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);"
        "max-width:76rem;margin:0 auto;padding:1rem;box-sizing:border-box;overflow-wrap:anywhere}\n"
        f"@media(prefers-color-scheme:dark){{main.jaxdistill{{{NIGHT}{svg.variables(dark=True)}}}"
        "html:has(>body>main.jaxdistill){background:#12181f}}\nbody:has(>main.jaxdistill){margin:0}\n")
RULES = """
h1 {font-size:1.5rem;margin:.2rem 0 .6rem}
h2 {font-size:1.2rem;margin:1.8rem 0 .4rem}
h3 {font-size:1rem;margin:1rem 0 .3rem}
small, .quiet {color:var(--quiet)}
p + ul {padding-left:1.2rem}
.wide {overflow-x:auto;max-width:100%;background:linear-gradient(to left,var(--page) 1rem,transparent) local right/2rem 100% no-repeat,
linear-gradient(to left,var(--line),transparent) right/1rem 100% no-repeat}
table {border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap;font-size:.85rem;color:inherit;background:none}
tr {background:none!important}
th, td {padding:.3rem .5rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child, td:first-child {text-align:left;padding-left:0;position:sticky;left:0;background:var(--page)}
td.value {white-space:normal;min-width:7rem;max-width:22rem}
.charts {display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem 1.5rem;margin:.8rem 0}
figure {margin:0;min-width:0}
figcaption {font-size:.9rem;line-height:1.3;margin-bottom:.3rem}
figure > svg {width:100%;height:auto;display:block;overflow:visible}
figure > svg text {fill:currentColor}
figure img {max-width:max(100%,34rem);height:auto;background:#fff;border-radius:4px;display:block}
.pictures {display:flex;flex-wrap:wrap;gap:1rem 1.5rem;align-items:flex-start;margin:1rem 0}
.picture {max-width:100%}
ul.legend {list-style:none;display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:.3rem 0 0;padding:0;font-size:.8rem;line-height:1.4}
.legend li {display:flex;align-items:center;gap:.35rem;margin:0}
.legend svg {width:24px;height:10px;flex:none}
.legend i {width:14px;height:10px;flex:none;border-radius:2px}
.finding {background:var(--card);border-left:4px solid var(--of);border-radius:4px;padding:.5rem .8rem;margin:.6rem 0}
.finding p {margin:.15rem 0}
.severity {color:var(--of)}
details {border-top:1px solid var(--line);padding:.5rem 0}
summary {cursor:pointer;font-weight:600}
code, pre {font:.8rem/1.45 ui-monospace,monospace;white-space:pre-wrap;background:var(--card);color:inherit}
code {padding:.1rem .3rem}
code span {display:inline-block;max-width:100%}
pre {padding:.5rem;max-height:24rem;overflow:auto}
"""


def _bound(rule: str) -> str:
    selector, _, body = rule.partition(" {")
    return f".jaxdistill :is({selector}){{{body}"


CSS = ROOT + "\n".join(map(_bound, RULES.strip().replace(",\nlinear", ",linear").splitlines()))
