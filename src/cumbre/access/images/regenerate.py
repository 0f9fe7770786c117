"""Images that are not stored, made again on demand: calibrated and difference images of processed raw files.

The record of the processing names the inputs of then by checksum; a process of its own reproduces the images, and
says whether their pixels are those of then, bit for bit. What was made is kept until the space is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cumbre.access.identity import Principal
from cumbre.access.images.catalogue import RAW, Image, ImageCatalogue
from cumbre.access.images.source import is_remote, place_of
from cumbre.core.errors import CumbreError, NotFoundError, TransientError, UnprocessableDataError

log = logging.getLogger(__name__)

CALIBRATED, DIFFERENCE = "calibrated", "difference"
KINDS = {CALIBRATED: 2, DIFFERENCE: 3}
"""Products and their levels of calibration."""
CACHE = "access/regenerated"
REPORT = "report.json"


class Regenerator:
    """Makes images again and keeps them.

    Parameters
    ----------
    root
        Folder of the site.
    catalogue
        Of the raw files; who may see a raw file may see what is made of it.
    most_bytes
        Of what is kept; the least recently used goes first.
    """

    def __init__(self, root: Path, catalogue: ImageCatalogue, *, most_bytes: int = 20 << 30) -> None:
        self._root, self._catalogue, self._most = root, catalogue, most_bytes
        self._cache = root / CACHE
        self._one = threading.Lock()

    def find_many(self, image_ids: Iterable[str], who: Principal) -> dict[str, Image]:
        """Images that can be made: those whose raw file the one who asks may see, and that were processed."""
        wanted = {}
        for image_id in image_ids:
            kind, _, rest = image_id.partition("/")
            if kind in KINDS and rest.count("/") == 1:
                wanted[image_id] = (kind, f"{RAW}/{rest}")
        raws = self._catalogue.find_many([raw for _, raw in wanted.values()], who) if wanted else {}
        out = {}
        for image_id, (kind, raw) in wanted.items():
            if raw in raws and (folder := self._folder(raws[raw])) is not None:
                path = folder / f"{kind}.fits"
                out[image_id] = replace(
                    raws[raw], image_id=image_id, product=kind, calib_level=KINDS[kind], path=str(path),
                    byte_size=path.stat().st_size if path.exists() else None,
                )  # fmt: skip
        return out

    def products_of(self, raw: Image) -> list[str]:
        """Identifiers of what can be made of a raw file."""
        if raw.product != RAW or self._folder(raw) is None:
            return []
        rest = raw.image_id.removeprefix(f"{RAW}/")
        return [f"{kind}/{rest}" for kind in KINDS]

    def _record_path(self, image: Image) -> Path:
        from cumbre.orchestration.provenance import record_path

        return record_path(self._root, image.obs_id, image.detector_name)

    def _folder(self, image: Image) -> Path | None:
        """Where the images of one record are kept: another record, another folder."""
        try:
            content = self._record_path(image).read_bytes()
        except OSError:
            return None
        return (
            self._cache / f"{image.obs_id}_{image.detector_name}_{hashlib.sha256(content).hexdigest()[:16]}"
        )

    @staticmethod
    def is_made(image: Image) -> bool:
        """Whether the image is here."""
        return Path(image.path).is_file()

    def make(
        self, image: Image, who: Principal, on_cancel: Callable[[Callable[[], None]], None]
    ) -> dict[str, Any]:
        """See that an image is here; returns the report of its making.

        Parameters
        ----------
        on_cancel
            Told how to stop the work.

        Raises
        ------
        NotFoundError
            The raw file or an input is not here any more.
        UnprocessableDataError
            It cannot be made.
        """
        folder = Path(image.path).parent
        with self._one:  # each needs a core and gigabytes
            if not self.is_made(image):
                raw = self._catalogue.find(f"{RAW}/{image.obs_id}/{image.detector_name}", who)
                snaps = [
                    self._catalogue.find(f"{RAW}/{obs_id}/{image.detector_name}", who)
                    for obs_id in self._snaps(raw)
                ]
                self._make([raw, *snaps], folder, on_cancel)
                self._make_room(folder)
        for path in folder.iterdir():
            os.utime(path)
        report: dict[str, Any] = json.loads((folder / REPORT).read_bytes())
        return report

    def _snaps(self, raw: Image) -> list[str]:
        """Further exposures of which its images were made."""
        from cumbre.orchestration.provenance import read_record, snaps_of

        return snaps_of(read_record(self._record_path(raw)))

    @staticmethod
    def _local(raw: Image, target: Path) -> str:
        """Path of a raw file that is here, or was fetched to ``target``."""
        if is_remote(raw.path):
            store, key = place_of(raw.path)
            target.write_bytes(store.get(key))
            return str(target)
        if not Path(raw.path).is_file():
            raise NotFoundError(f"{raw.image_id}: the raw file is not in the cache any more; it is on tape")
        return raw.path

    def _make(self, raws: list[Image], folder: Path, on_cancel: Callable[[Callable[[], None]], None]) -> None:
        from cumbre.orchestration.task import THREAD_VARIABLES

        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".making-") as made:
            raw, fetched = raws[0], [Path(made, f"raw-{number}.fits") for number in range(len(raws))]
            paths = [self._local(one, target) for one, target in zip(raws, fetched, strict=True)]
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._root), str(self._record_path(raw)), made, *paths],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1"),
            )  # fmt: skip
            on_cancel(process.kill)
            _, said = process.communicate()
            if process.returncode < 0:
                raise TransientError(f"{raw.image_id}: the work was stopped; ask again")
            if process.returncode:
                raise UnprocessableDataError(
                    f"{raw.image_id}: {said.strip().splitlines()[-1] if said.strip() else 'the work failed'}"
                )
            for target in fetched:
                target.unlink(missing_ok=True)
            try:
                os.rename(made, folder)
            except OSError as error:
                if not folder.is_dir():  # else another server was faster with the same
                    raise TransientError(f"{folder}: {error}") from error
            else:
                Path(made).mkdir()  # for the end of the temporary folder

    def _make_room(self, keep: Path) -> None:
        """Delete what was not used for longest until the rest fits; never what was just made."""
        folders = [path for path in self._cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: sum(item.stat().st_size for item in path.iterdir()) for path in folders}
        used = {path: (path / REPORT).stat().st_mtime for path in folders if (path / REPORT).exists()}
        total = sum(sizes.values())
        for path in sorted(folders, key=lambda item: used.get(item, 0.0)):
            if total <= self._most:
                return
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]


def main(arguments: list[str]) -> int:
    """Make the images of one record: ROOT RECORD FOLDER RAW…; the last line of what is said tells what is wrong."""
    from cumbre.observatory.control.software import installed_hash
    from cumbre.orchestration.provenance import pixel_checksum, read_record, reproduce
    from cumbre.orchestration.task import one_thread
    from cumbre.payloads.exposure_file import save_exposure

    root, record_file, folder, *raws = (Path(argument) for argument in arguments)
    one_thread()
    os.nice(5)
    try:
        record = read_record(record_file)
        made = reproduce(root, record, *raws)
    except CumbreError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    about: dict[str, Any] = {
        "provenance": record,
        "is_same_software": record["software"]["hash"] == installed_hash(),
    }
    for kind, exposure in ((CALIBRATED, made.exposure), (DIFFERENCE, made.result.exposure)):
        save_exposure(exposure, folder / f"{kind}.fits")
        about[kind] = {"is_identical": pixel_checksum(exposure) == record["pixels"][kind]}
    (folder / REPORT).write_text(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
