"""What the pages take from the repository, so that nothing stands in two places.

BUILD.md and the studies of experiments/ are pages as they are, under the paths that they have. In a page's text, a line of its own
    {{ section | FILE | HEADING }}     that section of a Markdown file; without HEADING, what stands before the first one
    {{ docstring | FILE }}             of a Python file
    {{ fields | FILE | CLASS }}        what a class says of its fields, line by line, as a list
    {{ cell | NOTEBOOK | TAG }}        the cell of a notebook with that tag
    {{ defaults }}                     every key that training reads
    {{ keys | FILE ... }}              the sections of the config that these files define
is replaced by it. What is not there stops the build. Code is read, never imported.
"""

import ast
import io
import json
import posixpath
import re
import textwrap
import tokenize
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"^\{\{ *(\w+)((?: *\|[^|}]+)*) *\}\}$", re.MULTILINE)
TABLE = "| key | default | |\n|---|---|---|\n"
shown: set[str] = set()  # files whose sections of the config are on a page


def on_config(config):
    """The studies of experiments/ in the navigation: those of its table in that order, then what it does not have yet."""
    studies = re.findall(r"^\| \[(\w+)\]\(\1/README\.md\)", (ROOT / "experiments" / "README.md").read_text(), re.MULTILINE)
    studies += sorted({path.parent.name for path in (ROOT / "experiments").glob("*/README.md")} - {*studies})
    (found,) = (entry for entry in config.nav if "Experiments" in entry)
    found["Experiments"] += [{name: f"experiments/{name}/README.md"} for name in studies if name != "doctor"]
    return config


def on_files(files, config):
    taken = [ROOT / "BUILD.md", *(ROOT / "experiments").glob("README.md"), *(ROOT / "experiments").glob("*/README.md"),
             *(ROOT / "experiments").glob("*/*.png"), *(ROOT / "experiments" / "notebooks").glob("*.ipynb")]  # fmt: skip
    for path in sorted(taken):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    def told(match):
        name, arguments = match[1], [part.strip() for part in match[2].split("|")[1:]]
        if name not in DIRECTIVES:
            raise PluginError(f"{page.file.src_uri}: found {match[0]!r}; accepted: {', '.join(DIRECTIVES)}")
        try:
            return DIRECTIVES[name](*arguments)
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise PluginError(f"{page.file.src_uri}: {match[0]}: {error}") from None

    return DIRECTIVE.sub(told, markdown if page.file.abs_src_path.startswith(config.docs_dir) else indented(markdown))


def on_env(env, config, files):
    """Every section of a config must be on the page of the configuration."""
    defining = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxdistill").glob("*/*.py") if sections(path)}
    if missing := defining - shown - {"jaxdistill/training/prepare.py"}:  # whose keys are those of the defaults
        raise PluginError(f"docs/configuration.md: lacks the sections of {', '.join(sorted(missing))}; accepted: {{{{ keys | FILE }}}}")
    return env


def section(file: str, heading: str = "") -> str:
    """The text below a heading, up to the next of its own level or above."""
    text = relinked((ROOT / file).read_text(), posixpath.dirname(file))
    before, *parts = re.split(r"^(#{2,6} .*)$", text, flags=re.MULTILINE)
    if not heading:
        return indented(re.sub(r"^# .*$", "", before, count=1, flags=re.MULTILINE).strip("\n"))
    headings = [part.split(" ", 1) for part in parts[::2]]
    if heading not in [words for _, words in headings]:
        raise LookupError(f"found no {heading!r} in {file}; accepted: {', '.join(words for _, words in headings)}")
    first = [words for _, words in headings].index(heading)
    below = next((i for i in range(first + 1, len(headings)) if len(headings[i][0]) <= len(headings[first][0])), len(headings))
    return indented("".join(parts[2 * first + 1 : 2 * below]).strip("\n"))


def relinked(text: str, folder: str) -> str:
    """Links beside a file of `folder`, as links of a page at the top."""
    join = lambda match: f"]({posixpath.normpath(posixpath.join(folder, match[1]))})"  # noqa: E731
    return re.sub(r"\]\((?!\w+:|#|/)([^)\s]+)\)", join, text)


def indented(text: str) -> str:
    """What belongs to an item of a list, indented by four spaces: two, which are enough elsewhere, are none to Python-Markdown. And
    indented commands fenced, that none is taken for a part of the list before it."""
    text = re.sub(r"^ {4}(?:python|make|pip) .*\n(?: {4}.*\n)*", lambda block: f"```\n{textwrap.dedent(block[0])}```\n", text,
                  flags=re.MULTILINE)
    lines, inside, parted = [], False, False
    for line in text.split("\n"):
        starts = line.startswith("* ")
        if starts and parted:  # the item before it has several blocks, of which this would become a part
            lines.append("")
        inside = starts or inside and (not line or line.startswith("  "))
        parted = inside and not starts and (parted or not line)
        lines.append(f"  {line}" if inside and line.startswith("  ") else line)
    return "\n".join(lines)


def docstring(file: str) -> str:
    """The docstring of a file; what is indented in it, and the command that it begins with, as code."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    if text.startswith("python -m "):
        line, _, rest = text.partition("\n")
        usage, _, told = line.partition(": ")
        text = f"    {usage}\n\n{told[:1].upper()}{told[1:]}\n{rest}"
    return as_markdown(text)


def as_markdown(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    ") and lines and lines[-1] and not lines[-1].startswith("    "):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def fields(file: str, name: str) -> str:
    (found,) = (node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef) and node.name == name)
    text = re.sub(r"\n +", " ", ast.get_docstring(found))  # what goes on in the next line
    return re.sub(r"^(\w+): ", r"* `\1`: ", text, flags=re.MULTILINE)


def cell(notebook: str, tag: str) -> str:
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    (found,) = (one for one in cells if tag in one["metadata"].get("tags", ()))
    source = re.sub(r"^%%writefile ", "# ", "".join(found["source"]))
    return f"```python\n{source}\n```"


def defaults() -> str:
    """The keys of training/defaults.py with their comments, a table for each section."""
    source = (ROOT / "jaxdistill" / "training" / "defaults.py").read_text()
    comments, rows = comments_of(source), {"": []}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        name, value = node.targets[0].attr, node.value
        if isinstance(value, ast.Call) and value.args:  # ConfigDict(dict(...))
            rows[name] = [row(f"{name}.{key.arg}", key.value, comments) for key in value.args[0].keywords]
        else:
            rows[""].append(row(name, value, comments))
    return "\n\n".join((f"### {name}\n\n" if name else "") + TABLE + "\n".join(found) for name, found in rows.items())


def keys(files: str) -> str:
    """The sections of the config that these files define: what their classes say, and their fields."""
    parts = []
    for file in files.split():
        path = ROOT / file
        shown.add(file)
        comments = comments_of(path.read_text())
        if not (found := sections(path)):
            raise LookupError(f"found no section of a config in {file}")
        for name, node in found:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            table = [row(f"{name}.{part.target.id}", part.value, comments) for part in fields]
            parts.append(f"### {name}\n\n`{file}`\n\n{as_markdown(ast.get_docstring(node))}\n\n{TABLE}" + "\n".join(table))
    return "\n\n".join(parts)


def sections(path: Path) -> list[tuple[str, ast.ClassDef]]:
    """(name of the section, class) of each dataclass of a file that is a section of the config by its docstring's first words."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    named = [(re.match(r"(?:The|A) section `([\w.]+)`", ast.get_docstring(node) or ""), node) for node in classes]
    return [(match[1], node) for match, node in named if match]


def comments_of(source: str) -> dict[int, str]:
    """Line number -> the comment at its end."""
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in found if token.type == tokenize.COMMENT}


def row(key: str, value: ast.expr | None, comments: dict[int, str]) -> str:
    default = f"`{ast.unparse(value)}`" if value is not None else ""
    told = comments.get(value.end_lineno, "") if value is not None else ""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key}`", default, told)) + " |"


DIRECTIVES = {"section": section, "docstring": docstring, "fields": fields, "cell": cell, "defaults": defaults, "keys": keys}
