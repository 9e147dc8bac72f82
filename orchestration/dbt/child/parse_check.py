"""Decide whether dbt's earlier parse of the project still holds."""

import re
from pathlib import Path
from typing import Any

_RENDERED = (".sql", ".yml", ".yaml", ".md", ".py", ".js", ".j2", ".jinja", ".jinja2")
"""Suffixes of the files whose Jinja dbt renders; the last four since dbt 1.12."""

_CONNECTION = re.compile(r"\btarget\b(?!\s*\.\s*(name|schema|database|dbname|type|profile_name)\b)")
"""Jinja that reads `target`, other than the attributes that every parse depends on."""


def check_parse(original: Any, loader: Any) -> Any:
    """Return dbt's state check without host and user, unless the project's Jinja reads them.

    dbt parses the whole project again where host or user differ, so a parse made with the image would never hold.

    Args:
        original: `ManifestLoader.build_manifest_state_check` of dbt.
        loader: dbt's ManifestLoader.
    """
    from dbt.adapters.factory import get_include_paths
    from dbt.contracts.files import FileHash

    check = original(loader)
    root = loader.root_project
    target = root.credentials
    of_dbt = {Path(path) for path in get_include_paths(target.type)}
    projects = [project for project in loader.all_projects.values() if Path(project.project_root) not in of_dbt]
    if not any(map(reads_connection, projects)):
        depends_on = [root.profile_name, root.target_name, target.type, target.database, target.schema]
        check.profile_hash = FileHash.from_contents("\0".join(map(str, depends_on)))
    return check


def reads_connection(project: Any) -> bool:
    """Return whether the Jinja of a project reads host, user or another part of the connection."""
    folder = Path(project.project_root)
    files = [folder / "dbt_project.yml"]
    for source in project.all_source_paths:
        files += (folder / source).rglob("*")
    for file in files:
        if file.suffix in _RENDERED and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix == ".py" and "target" in text:
                return True
            # Most files do not have the word at all.
            if _CONNECTION.search(text) and _CONNECTION.search(_jinja(text)):
                return True
    return False


def _jinja(text: str) -> str:
    """Return the Jinja of a file. Jinja itself finds the ends of blocks, which may have dictionaries and strings."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, value) for _, kind, value in Environment(autoescape=True).lex(text)]
    except TemplateSyntaxError:
        return text
    return "".join(value for kind, value in tokens if kind != "data" and not kind.startswith("comment"))
