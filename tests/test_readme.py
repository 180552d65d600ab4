"""What the README says is what the code does."""

import re
from pathlib import Path

from memtrack import config, metrics, registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(after: str) -> list[list[str]]:
    """The cells of the first table behind a text, without its head."""
    lines = README[README.index(after) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_metrics_table_is_the_code_s():
    """Each metric stands there with its peak twin, whether it is charted by default, and its meaning."""
    expected = []
    for metric in (*metrics.TABLE, *metrics.PATTERNS):
        name = metric.name.format("N")
        name = f"`{name}`" + (f", `{metrics.peak_name(name).rpartition('/')[2]}`" if metric.peak else "")
        expected.append([name, "yes" if metric.default else "", metric.meaning])
    assert rows("## What is measured") == expected


def test_settings_table_is_the_code_s():
    """Each argument stands there with its variable, and the default is the real one."""
    settings = config.Settings()
    for argument, variable, default, _ in rows("## Settings"):
        if argument:
            name = argument.strip("`")
            resolved = config.resolve({}, {variable.strip("`"): default.strip("`")})
            assert resolved == settings, name
            assert config.resolve({name: default.strip("`")}, {}) == settings


def test_integrations_are_there():
    """Each sink of ours is in the table of integrations."""
    table = README[README.index("## Integrations") : README.index("## Settings")]
    for sink in registry.SINKS:
        assert f'sinks=["{sink}"]' in table


def test_links_lead_somewhere():
    """Each relative link and picture is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_make_targets_exist():
    """Each `make` command that is named is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
