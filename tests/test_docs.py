"""The pages build without a warning and need no network; the commands and keys that they and the READMEs name are there."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxdistill import UserError, main
from jaxdistill.diagnosis.rules import RULES
from jaxdistill.training import plan
from jaxdistill.training.defaults import defaults

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("**/README.md"))]
COMMAND = re.compile(r"(?:python -m \w|python experiments/|make [a-z]|pip install )")
PLACEHOLDER = re.compile(r"[A-Z]+(?:[.:/].*)?|\.+")  # FILE, DIR/teacher, WORKDIR:RUN


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_need_no_network(site):
    """What a page loads by itself lies beside it."""
    pages = list(site.glob("**/*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text())
        for address in loaded:
            assert not re.match(r"(?:https?:)?//", address), f"{page}: {address}"
            if not address.startswith(("data:", "#")):
                assert (page.parent / address.split("?")[0].split("#")[0]).exists() or page.name == "404.html", f"{page}: {address}"
    assert "@import" not in (site / "style.css").read_text()


def test_search_has_what_the_pages_say(site):
    index = (site / "search" / "search_index.js").read_text()
    assert index.startswith("var __index = ")
    assert all(words in index for words in ("teacher_misaligned", "fused_vocab_loss", "train.micro", "binarization_temp"))


def test_each_finding_of_the_doctor_has_an_anchor(site):
    page = (site / "experiments" / "doctor" / "index.html").read_text()
    assert all(f'id="{rule.name}"' in page for rule in RULES)


def test_public_losses_are_on_the_page(site):
    page = (site / "losses.html").read_text()
    for path in (ROOT / "jaxdistill" / "losses").glob("[a-z]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and path.stem != "mesh":
                assert f'id="jaxdistill.losses.{path.stem}.{node.name}"' in page, node.name
    assert "*batch vocab" in page, "shapes are told"


# --- commands -----------------------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """What is typed, in blocks of code and within lines."""
    text = re.sub(r"\\\n\s*", "", text)  # a command that goes on in the next line
    fences = text.split("```")
    code = [line.strip() for block in fences[1::2] for line in block.splitlines()]
    code += [line.strip() for block in fences[::2] for line in block.splitlines() if line.startswith("    ")]
    found = [line for line in code if COMMAND.match(line)]
    found += [span for span in re.findall(r"`([^`\n]+)`", text) if COMMAND.match(span)]
    return [re.split(r"\s+#\s|;", command)[0].strip() for command in found]


def every_command() -> list[tuple[str, str]]:
    return [(str(path.relative_to(ROOT)), command) for path in TEXTS for command in dict.fromkeys(commands(path.read_text()))]


def check_python(words: list[str]) -> None:
    module, *rest = words
    rest = [word.strip("[]") for word in rest]
    if module.endswith(".py"):
        source = ROOT / module
    else:
        spec = importlib.util.find_spec(module)
        assert spec, f"no module {module}"
        source = Path(spec.origin)
    if "main.parse(" in source.read_text() or module == "jaxdistill.main":  # absl's flags, and a config
        rest = [word for word in rest if not re.match(r"--config\.[A-Z]", word)]
        config = next((word.partition("=")[2] for word in rest if word.startswith("--config=")), "")
        if config and not PLACEHOLDER.fullmatch(config.split(":")[0]):
            main.check_config(["main", *rest])
        flags = {word.split("=")[0] for word in rest if word.startswith("--") and not word.startswith("--config.")}
        told = (ROOT / "jaxdistill" / "main.py").read_text() + source.read_text()
        assert flags <= {"--config", "--help"} | {f"--{name}" for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', told)}
    else:
        for name in [word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")]:
            taken = rf'"--{name}"|\b(args|flags)\.{name.replace("-", "_")}\b'
            assert name == "help" or re.search(taken, source.read_text()), f"{module} has no --{name}"


@pytest.mark.parametrize(("file", "command"), every_command(), ids=lambda text: text.replace("/", "_")[:60])
def test_command_is_there(file, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("<", "").replace(">", ""))
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            pattern = rf"^{word.split('=')[0]} \?=" if "=" in word else rf"^{word}:"
            assert re.search(pattern, makefile, re.MULTILINE), f"{file}: no {word}"
            if word.startswith("KD="):
                main.check_config(["main", f"--config={word[3:]}"])
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = [extra for name in re.findall(r"\.\[([\w,]+)\]", command) for extra in name.split(",")]
        assert set(wanted) <= set(extras)
    else:
        check_python(words[2:] if words[1] == "-m" else words[1:])


def test_a_command_that_is_not_there_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in (["jaxdistill.mian"], ["jaxdistill.main", "--config=configs/kd.py", "--dryrun"], ["jaxdistill.doctor", "W", "--xml"]):
        with pytest.raises(AssertionError):
            check_python(words)
    for flag in ("--config.train.stepz=3", "--config.kd.colour=red"):
        with pytest.raises(UserError):
            check_python(["jaxdistill.main", "--config=configs/kd.py", flag])


# --- keys ---------------------------------------------------------------------------------------------------------------------------


def known_keys(hooks) -> set[str]:
    """Every key of a config: those of the defaults, of each run, and the fields of each section."""
    found = set(plan.leaves(defaults().to_dict())) | {f"run.NAME.{key}" for key in plan.RUN_KEYS}
    for path in (ROOT / "jaxdistill").glob("*/*.py"):
        for name, node in hooks.sections(path):
            names = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            found |= {f"{section}.{key}" for key in names for section in ([name] if name != "model" else ["model", "student", "teacher"])}
    for path in (ROOT / "configs").glob("*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for variant in getattr(module, "VARIANTS", ("",)):
            config = module.get_config(variant) if variant else module.get_config()
            assert isinstance(config, ConfigDict)
            found |= set(plan.leaves(config.to_dict()))
    return found


def test_keys_that_are_named_exist(hooks):
    known = known_keys(hooks)
    sections = {key.split(".")[0] for key in known if "." in key} - {"run"}
    for path in TEXTS[:2] + sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text()
        named = re.findall(r"--config\.([a-z][\w.]*[a-z0-9])", text)
        named += [key for key in re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", text) if key.split(".")[0] in sections]
        wrong = [key for key in named if key not in known and not re.search(r"\.(py|md|ipynb|html|json|png)$", key)
                 and not any(other.startswith(f"{key}.") for other in known)]
        assert not wrong, f"{path.name}: {wrong}"


# --- what the pages take from the repository -----------------------------------------------------------------------------------------


def test_section_is_what_stands_below_a_heading(hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# Title\n\nbefore\n\n## One\n\nfirst\n\n### Below\n\nmore\n\n## Two\n\nsecond\n")
    assert hooks.section("a.md") == "before"
    assert hooks.section("a.md", "One") == "first\n\n### Below\n\nmore"
    assert hooks.section("a.md", "Two") == "second"
    with pytest.raises(LookupError, match=r"no 'Three' in a.md; accepted: One, Below, Two"):
        hooks.section("a.md", "Three")


def test_links_follow_their_section(hooks):
    text = "[a](b/c.md) ![d](../e/f.png) [g](#h) [i](https://j) [k](l.md#m)"
    assert hooks.relinked(text, "x/y") == "[a](x/y/b/c.md) ![d](x/e/f.png) [g](#h) [i](https://j) [k](x/y/l.md#m)"


def test_blocks_of_an_item_stay_in_it(hooks):
    assert hooks.indented("* a\n  b\n\n  c\n* d\n\ne\n  f") == "* a\n    b\n\n    c\n\n* d\n\ne\n  f"
    assert hooks.indented("* a\n\n    make b \\\n        c\n\nd") == "* a\n\n```\nmake b \\\n    c\n```\n\nd"


def test_what_is_not_there_stops_the_build(hooks):
    page = type("Page", (), {"file": type("File", (), {"src_uri": "x.md", "abs_src_path": "/docs/x.md"})})
    config = type("Config", (), {"docs_dir": "/docs"})
    for line in ("{{ section | README.md | Nowhere }}", "{{ docstring | nofile.py }}", "{{ keys | jaxdistill/report.py }}", "{{ sction }}"):
        with pytest.raises(hooks.PluginError, match="x.md"):
            hooks.on_page_markdown(line, page, config, None)
    assert hooks.on_page_markdown("{{ x }} y", page, config, None) == "{{ x }} y"  # within a line it is text


def test_every_key_of_the_defaults_is_told(hooks):
    told = set(re.findall(r"^\| `([\w.]+)` \|", hooks.defaults(), re.MULTILINE))
    assert told == set(plan.leaves(defaults().to_dict())) | {"run"}
