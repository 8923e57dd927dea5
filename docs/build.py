r"""What `mkdocs.yml` adds to MkDocs: docstrings with Sphinx's roles, and tables made from the code."""

import re
from pathlib import Path
from typing import Any

import click
from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sda_ray.cli.options import sda_ray
from sda_ray.core import KEYS, format_value

TOP = Path(__file__).parents[1]


class Docstrings(Extension):
    r"""Turns what Sphinx reads in a docstring into Markdown. Formulas become MathML."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    r"""Returns the Markdown of a docstring. Its sections stay in Google's style.

    A line that began with the formula itself would be a paragraph of its own.
    """

    block = r"^( *)\.\. math::((?:.*\n?)(?:\1 +.*\n?|\n(?=\1 ))*)"
    text = re.sub(block, lambda m: f"{m[1]}{_mathml(m[2], 'block')}\n", text, flags=re.M)
    text = re.sub(r":math:`([^`]*)`", lambda m: f"<span>{_mathml(m[1], 'inline')}</span>", text)
    text = re.sub(r":[a-z]+:`~?([^`]*)`", r"`\1`", text)
    text = re.sub(r"^( *)\| (http.*)$", r"\1<\2>", text, flags=re.M)
    text = re.sub(r"^( *)\| (.*)$", r"\1\2  ", text, flags=re.M)

    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)


def _mathml(formula: str, display: Any) -> str:
    return convert(" ".join(formula.split()), display=display)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    picture = TOP / "benchmarks" / "results" / "results.png"
    files.append(File.generated(config, "images/results.png", abs_src_path=str(picture)))

    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""Replaces marks such as `<!-- settings -->` by what they name, so that no copy goes stale."""

    markdown = markdown.replace("<!-- settings -->", _settings())
    markdown = markdown.replace("<!-- commands -->", "\n\n".join(_commands(sda_ray, "sda-ray")))

    return re.sub(r"<!-- include (\S+) ?(.*) -->", _tables, markdown)


def _settings() -> str:
    rows = [
        f"| `{name}` | {key.about} | {format_value(key.default)} | {key.accepts} |"
        for name, key in KEYS.items()
    ]

    return "\n".join(["| key | meaning | default | accepted |", "|---|---|---|---|", *rows])


def _commands(group: click.Group, path: str) -> Any:
    r"""Yields a section for each command of a group, with its help."""

    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        context = click.Context(command, info_name=f"{path} {name}", max_content_width=100)
        context.terminal_width = 100

        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"## {path} {name}\n\n```text\n{command.get_help(context)}\n```"


def _tables(match: re.Match[str]) -> str:
    r"""Returns the tables of a file, or of one of its sections."""

    text = (TOP / match[1]).read_text()
    text = text.partition(match[2])[2].partition("\n## ")[0] if match[2] else text

    return "\n".join(line for line in text.split("\n") if line.startswith("|") or not line)
