"""Modes: the configurations of the four entities, as data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import cumbre
from cumbre.core.errors import ConfigurationError, NotFoundError
from cumbre.core.instrument import explain_validation
from cumbre.observatory.component.configuration import Configuration

SHIPPED = Path(__file__).parents[1] / "modes"
SCHEMA_VERSION = "1"
INSTALLED = "installed"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArchiverMode(_Model):
    """Archiver."""

    trigger: Annotated[
        Literal["Camera.startIntegration"], Field(description="Event that makes replicate jobs.")
    ] = "Camera.startIntegration"
    image_types: Annotated[list[str], Field(description="Types to archive; empty for all.")] = []
    min_pairs: Annotated[int, Field(ge=0, description="Replicator pairs that must be registered.")] = 1
    deadline_s: Annotated[
        float, Field(gt=0, description="Night seconds after which a job goes to another pair.")
    ] = 180.0
    attempts: Annotated[
        int, Field(ge=1, description="Pairs tried; then the image is left to the Catch-Up Archiver.")
    ] = 5


class CatchUpMode(_Model):
    """Catch-Up Archiver."""

    min_pairs: Annotated[int, Field(ge=0, description="Catch-up pairs that must be registered.")] = 1


class EfdMode(_Model):
    """EFD Replicator."""


class ClusterMode(_Model):
    """Alert Production Cluster."""

    trigger: Annotated[
        Literal["ScriptQueue.nextVisit", "Camera.startIntegration", "none"],
        Field(description="Event that makes process jobs; none: no image is processed."),
    ] = "ScriptQueue.nextVisit"
    processing: Annotated[
        Literal["alerts", "isr"],
        Field(
            description="What a job does: everything up to alerts, or instrument signature removal and quality "
            "numbers only."
        ),
    ] = "alerts"
    corrections: Annotated[
        list[Literal["bias", "dark", "flat", "fringe", "defects", "brighter_fatter"]],
        Field(description="Calibrations that `isr` applies, beside overscan, linearity, crosstalk and gain."),
    ] = ["bias", "dark", "flat", "fringe", "defects"]
    psf: Annotated[bool, Field(description="`isr` measures the point spread function.")] = True
    missed: Annotated[
        bool, Field(description="Images left for later are done where `prompt.missed.when` is `daytime`.")
    ] = False
    min_workers: Annotated[int, Field(ge=0, description="Workers that must answer.")] = 1
    deadline_s: Annotated[
        float,
        Field(
            gt=0, description="Night seconds after the end of visit or exposure in which a job is waited for."
        ),
    ] = 360.0
    wavefront: Annotated[bool, Field(description="Jobs for wavefront sensors too, always `isr`.")] = True


class Entities(_Model):
    """What the mode means to each entity; an absent one cannot be configured with it."""

    Archiver: ArchiverMode | None = None
    CatchUpArchiver: CatchUpMode | None = None
    EfdReplicator: EfdMode | None = None
    AlertProductionCluster: ClusterMode | None = None


class Mode(_Model):
    """One mode file."""

    mode: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name; as the file's.")]
    description: Annotated[str, Field(description="What it is for.")]
    version: Annotated[
        str, Field(description="Version of the software to use; `installed` for what is installed.")
    ] = INSTALLED
    wait_s: Annotated[
        float, Field(ge=0, le=600, description="Real seconds a configure waits for prerequisites.")
    ] = 20.0
    entities: Annotated[Entities, Field(description="Parameters of each entity.")]


ENTITIES = tuple(Entities.model_fields)


class Modes:
    """The modes of a site: those that came with cumbre, replaced or joined by those of its own folder."""

    def __init__(self, own: Path | None = None) -> None:
        self.own = own

    def _files(self) -> dict[str, Path]:
        folders = [SHIPPED, *([self.own] if self.own and self.own.is_dir() else [])]
        return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}

    def names(self) -> list[str]:
        """Names of all modes; read again each time, files may change by day."""
        return sorted(self._files())

    def load(self, name: str) -> Mode:
        """Read one mode.

        Raises
        ------
        NotFoundError
            No such mode.
        ConfigurationError
            The file is wrong; the message names key, value and expectation.
        """
        files = self._files()
        if name not in files:
            raise NotFoundError(f"configuration {name!r}: not one of {', '.join(sorted(files))}")
        path = files[name]
        try:
            mode = Mode.model_validate(yaml.safe_load(path.read_text()))
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{path}: not YAML: {error}") from error
        except ValidationError as error:
            raise explain_validation(str(path), error) from error
        if mode.mode != name:
            raise ConfigurationError(f"{path}: mode = {mode.mode!r}: expected {name!r}, the file's name")
        return mode

    def configuration(self, name: str, entity: str) -> Configuration:
        """One entity's part of a mode.

        Raises
        ------
        NotFoundError, ConfigurationError
            As :meth:`load`, or the mode has nothing for the entity.
        """
        mode = self.load(name)
        settings = getattr(mode.entities, entity)
        if settings is None:
            raise ConfigurationError(f"configuration {name!r}: it has no part for {entity}")
        version = cumbre.__version__ if mode.version == INSTALLED else mode.version
        return Configuration(name, version, settings.model_dump(), mode.wait_s, str(self._files()[name]))


def settings_from_json(entity: str, text: str) -> Any:
    """Parameters of an entity as stored with its state."""
    return getattr(Entities.model_validate({entity: json.loads(text)}), entity)
