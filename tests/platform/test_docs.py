"""The pages that come from the code are what the code says; links lead somewhere; commands in the README exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from engine.config import Config
from engine.plugins import Plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["plugins.md", "config.md", "errors.md", "api.md"])
def test_a_page_from_the_code_is_up_to_date(build: ModuleType, page: str) -> None:
    written = (ROOT / "docs" / page).read_text("utf-8")
    assert written == build.PAGES[page]().rstrip() + "\n", "run `make docs`"


def models(model: type[BaseModel], build: ModuleType) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        inner = build._model_in(field.annotation)
        if inner is not None and inner not in found:
            found |= models(inner, build)
    return found


def test_every_key_and_every_option_is_described(build: ModuleType) -> None:
    described = set(models(Config, build))
    plugins = Plugins()
    described |= {plugins.get(row.kind, row.name).Options for row in plugins.table() if row.kind != "moments"}
    silent = [
        f"{model.__qualname__}.{name}"
        for model in described
        for name, field in model.model_fields.items()
        if not (field.description or build._inner_description(field))
    ]
    assert silent == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert missing == []


def test_no_page_names_a_file_that_is_not_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        path
        for page in pages
        for path in re.findall(
            r"\b((?:configs|engine|plugins|models|serving|examples|docs|packaging)/[\w./-]+\.\w+)", page.read_text()
        )
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
