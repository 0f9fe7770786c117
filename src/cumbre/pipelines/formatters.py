"""How the Butler reads and writes calibrated images and alerts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lsst.daf.butler import DatasetProvenance, FormatterV2
from lsst.resources import ResourcePath

from cumbre.payloads.exposure import Exposure


class ExposureFormatter(FormatterV2):  # type: ignore[misc]
    """An :class:`Exposure` in the file of :func:`cumbre.payloads.exposure_file.save_exposure`.

    What the image was made from goes into its metadata, under keys that begin with ``butler``.
    """

    default_extension = ".fits"
    supported_extensions: ClassVar[frozenset[str]] = frozenset({".fits"})
    can_read_from_local_file = True

    def read_from_local_file(self, path: str, component: str | None = None, expected_size: int = -1) -> Any:
        """Read the file, or its ``metadata`` or ``metrics``."""
        from cumbre.payloads.exposure_file import load_about, load_exposure

        del expected_size
        return load_exposure(Path(path)) if component is None else load_about(Path(path))[component]

    def write_local_file(self, in_memory_dataset: Exposure, uri: ResourcePath) -> None:
        """Write the whole file."""
        from cumbre.payloads.exposure_file import save_exposure

        save_exposure(in_memory_dataset, Path(uri.ospath))

    def add_provenance(
        self, in_memory_dataset: Exposure, /, *, provenance: DatasetProvenance | None = None
    ) -> Exposure:
        """Note dataset, run, quantum and inputs."""
        if provenance is None:
            return in_memory_dataset
        told = provenance.to_flat_dict(
            self.dataset_ref, prefix="butler", sep=".", simple_types=True, use_upper=False
        )
        return replace(in_memory_dataset, metadata=in_memory_dataset.metadata | told)


class AlertsFormatter(FormatterV2):  # type: ignore[misc]
    """Alert packets as an Avro container; read back as a list of records."""

    default_extension = ".avro"
    supported_extensions: ClassVar[frozenset[str]] = frozenset({".avro"})
    can_read_from_local_file = True

    def read_from_local_file(self, path: str, component: str | None = None, expected_size: int = -1) -> Any:
        """Read all packets."""
        from cumbre.alerts.packet import read_packets

        del component, expected_size
        return list(read_packets(Path(path)))

    def write_local_file(self, in_memory_dataset: list[dict[str, Any]], uri: ResourcePath) -> None:
        """Write the container."""
        from cumbre.alerts.packet import write_container

        write_container(Path(uri.ospath), in_memory_dataset)
