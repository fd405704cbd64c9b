"""Every code block of a document runs in a test, or says that it is a fragment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.documents.blocks import ROOT, all_blocks, blocks

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
RUN_BY = {
    ("README.md", "console"): (
        "tests/documents/test_readme.py::test_the_readme_works_from_an_empty_directory"
    ),
    ("README.md", "python"): (
        "tests/documents/test_readme.py::test_the_readme_works_from_an_empty_directory"
    ),
    ("README.md", "sh"): ("tests/documents/test_commands.py::test_each_command_and_option_exists"),
    ("docs/operating.md", "console"): (
        "tests/documents/test_operating.py::test_the_operators_page_prints_what_it_shows"
    ),
    ("docs/llm.md", "python"): (
        "tests/documents/test_llm_page.py::test_the_examples_of_the_page_run"
    ),
    ("docs/operations.md", "nginx"): "tests/faults/test_operations.py::test_nginx_as_documented",
    ("docs/how-to/adopt-a-table.md", "console"): (
        "tests/documents/test_tutorial.py::test_a_table_is_adopted_as_the_guide_says"
    ),
    ("docs/how-to/migrate.md", "console"): (
        "tests/documents/test_tutorial.py::test_a_backend_is_migrated_as_the_guide_says"
    ),
    ("docs/how-to/migrate.md", "python"): (
        "tests/documents/test_tutorial.py::test_a_backend_is_migrated_as_the_guide_says"
    ),
    ("docs/how-to/synchronous-backend.md", "console"): (
        "tests/documents/test_tutorial.py::test_the_synchronous_backends_work"
    ),
    ("docs/how-to/synchronous-backend.md", "python"): (
        "tests/documents/test_tutorial.py::test_the_synchronous_backends_work"
    ),
    ("docs/operations.md", "ini"): (
        "tests/faults/test_operations.py::test_the_systemd_unit_can_be_enabled_and_starts_a_server"
    ),
    ("docs/operations.md", "sh"): (
        "tests/faults/test_operations.py::test_sqlite_backup_and_restore_as_documented"
    ),
    ("docs/protocol.md", "json"): (
        "tests/test_protocol.py::test_every_example_of_the_document_is_a_golden_message"
    ),
    ("docs/providers.md", "sh"): (
        "tests/llm/test_recipes.py::test_a_recipe_leads_to_the_right_path"
    ),
    ("docs/sdk.md", "python"): (
        "tests/documents/test_sdk_page.py::test_an_example_of_the_sdks_page_runs"
    ),
    ("docs/tutorial/fastapi.md", "console"): (
        "tests/documents/test_tutorial.py::test_the_tutorial_works_from_an_empty_directory"
    ),
    ("docs/tutorial/fastapi.md", "python"): (
        "tests/documents/test_tutorial.py::test_the_tutorial_works_from_an_empty_directory"
    ),
}
"""Which test runs the blocks of a page that are of a language and not marked."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_marked(page: str) -> None:
    """A new block needs a test, or the line `<!-- fragment -->` before it."""
    for block in all_blocks(page):
        assert block.fragment or (page, block.language) in RUN_BY, f"{page}:{block.line}"


def test_every_test_of_a_page_exists() -> None:
    """A renamed test shows up here; so does one that has nothing left to run."""
    for (page, language), test in RUN_BY.items():
        assert blocks(page, language), f"{page} has no block of {language} any more"
        file, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.parse((ROOT / Path(file)).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, test
