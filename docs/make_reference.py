"""Write docs/reference/configuration.md from the configuration models: python docs/make_reference.py."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cumbre.core import configuration

HERE = Path(__file__).parent


def row(name: str, field: object) -> str:
    default = field.default
    if default is PydanticUndefined:
        shown = "required"
    elif isinstance(default, BaseModel):
        shown = "see below"
    else:
        shown = f"`{default!r}`"
    kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("|", "or")
    return f"| `{name}` | {kind} | {shown} | {field.description} |"


def main() -> None:
    lines = [
        "# Configuration of a site",
        "",
        "One file, `site.yaml`, in the site's folder. Made from the code by `python docs/make_reference.py`.",
        "Start from `cumbre init`.",
        "",
    ]
    models = [
        m for m in vars(configuration).values()
        if isinstance(m, type) and issubclass(m, BaseModel) and m.__module__ == configuration.__name__
        and not m.__name__.startswith("_")
    ]  # fmt: skip
    for model in reversed(models):
        lines += [f"## {model.__name__}", "", (model.__doc__ or "").strip(), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [row(name, field) for name, field in model.model_fields.items()] + [""]
    (HERE / "reference" / "configuration.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
