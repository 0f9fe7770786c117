"""The site file: errors name file, key, value and expectation; every key is documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from cumbre.core import configuration
from cumbre.core.configuration import Site, SiteConfig, parse_site
from cumbre.core.errors import ConfigurationError, ConflictError, NotFoundError
from cumbre.site.profiles import ONE_MACHINE, create_site

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "configuration.md"


def valid() -> str:
    return ONE_MACHINE.format(instrument="democam")


def test_the_profile_is_valid():
    config = parse_site(valid(), "site.yaml")
    assert config.places["base"].tape == "base/tape"
    assert config.simulator is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("latitude_deg: -30.2446", "latitude_deg: -130", ("observatory.latitude_deg", "-130", "-90")),
        ("cadence_s: 37", "cadence_s: soon", ("scheduler.cadence_s", "soon", "number")),
        ("workers: 2", "wokers: 2", ("prompt.wokers", "not permitted")),
        ("source: base", "source: basement", ("basement",)),
        ("instruments: [democam]", "instruments: []", ("instruments", "at least 1")),
    ],
)
def test_errors_name_file_key_value_and_expectation(old, new, words):
    assert old in valid()
    with pytest.raises(ConfigurationError) as caught:
        parse_site(valid().replace(old, new), "here/site.yaml")
    assert "here/site.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_broken_yaml_names_the_line():
    with pytest.raises(ConfigurationError, match="line 2"):
        parse_site("a: 1\nb: [", "site.yaml")


def test_a_list_is_not_a_site():
    with pytest.raises(ConfigurationError, match="mapping"):
        parse_site("- 1", "site.yaml")


def test_no_site_tells_how_to_make_one(tmp_path):
    with pytest.raises(NotFoundError, match="cumbre init"):
        Site.load(tmp_path)


def test_a_site_is_never_overwritten(tmp_path):
    create_site(tmp_path / "s", seed=3)
    assert Site.load(tmp_path / "s").config.simulator.seed == 3
    with pytest.raises(ConflictError, match="already"):
        create_site(tmp_path / "s")


def test_unknown_instrument_writes_nothing(tmp_path):
    with pytest.raises(NotFoundError, match="democam"):
        create_site(tmp_path / "s", instrument="nocam")
    assert not (tmp_path / "s").exists()


def keys(model: type[BaseModel]) -> list[str]:
    return [f"{model.__name__}.{name}" for name in model.model_fields]


def test_every_key_has_a_description_and_stands_in_the_reference():
    models = [
        m
        for m in vars(configuration).values()
        if isinstance(m, type) and issubclass(m, BaseModel) and m.__module__ == configuration.__name__
        and not m.__name__.startswith("_")
    ]  # fmt: skip
    assert SiteConfig in models
    text = DOCS.read_text()
    for model in models:
        assert f"## {model.__name__}" in text
        section = text.split(f"## {model.__name__}\n")[1].split("\n## ")[0]
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert f"| `{name}` |" in section, f"{model.__name__}.{name} is not in {DOCS.name}"
            assert field.description in section
