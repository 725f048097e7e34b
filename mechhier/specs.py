"""Reading a spec: YAML in, a validated pydantic model out, or an error that names the field."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Spec = TypeVar("Spec", bound=BaseModel)


class SpecError(ValueError):
    """A spec that cannot be read; the message says which field and what is accepted."""


def read_spec(model: type[Spec], source: str | Path, *, package: str) -> Spec:
    """Read a spec from a YAML file, or one that comes with the package by its name.

    Args:
        model: What the YAML describes.
        source: A file, or the name of a packaged spec.
        package: Where the packaged ones are.

    Raises:
        SpecError: No such file, not YAML, or a field that is wrong or unknown.
    """
    what = model.__name__.removesuffix("Spec").lower()
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        entries = resources.files(package).iterdir()
        packaged = {Path(entry.name).stem: entry for entry in entries if entry.name.endswith(".yaml")}
        if str(source) not in packaged:
            raise SpecError(f"no file {source}, and no packaged {what} of that name ({', '.join(sorted(packaged))})")
        text = packaged[str(source)].read_text(encoding="utf-8")
    try:
        described = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source} is not YAML: {error}") from error
    if not isinstance(described, dict):
        raise SpecError(f"{source} must hold the fields {', '.join(model.model_fields)}")
    try:
        return model.model_validate(described)
    except ValidationError as error:
        listed = "\n".join(
            f"  {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()
        )
        raise SpecError(f"{source} is not a valid {what}:\n{listed}") from error
