"""Files of a release: read, checked, sorted along the sky, written with checksums; and verified again, all of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.access.releases.description import (
    DESCRIPTION_FILE,
    PIXEL,
    ReleaseDescription,
    ReleaseTable,
    parse_description,
)
from cumbre.catalogs.columns import hpx29
from cumbre.core.errors import BadFileError, NotFoundError, UnprocessableDataError
from cumbre.stores.files import sha256_of, sha256_of_bytes, sync_folder, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
ROW_GROUP = 100_000
BATCH_ROWS = 131_072

type Progress = Callable[[str, int], None]
"""Called with a table's name and the rows done since the last call."""


@dataclass(frozen=True, slots=True)
class ReleaseFile:
    """One Parquet file; ``path`` is relative to the release's folder."""

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str


def stage(
    source: Path,
    target: Path,
    release: ReleaseDescription,
    text: str,
    *,
    progress: Progress,
    memory_mb: int = 1024,
) -> list[ReleaseFile]:
    """Make the folder of a release next to ``target`` and move it there when it is whole.

    Parameters
    ----------
    source
        Folder with a Parquet or CSV file, or a folder of them, for each table.
    target
        Where the release shall be; a whole one that a killed load left there is taken as it is.

    Raises
    ------
    NotFoundError
        A table has no file.
    UnprocessableDataError
        A file does not fit the description: names file, column, expectation.
    """
    fingerprint = _fingerprint(source, release, text)
    if (target / MANIFEST).is_file() and json.loads((target / MANIFEST).read_text()).get(
        "source"
    ) == fingerprint:
        return read_manifest(target)
    shutil.rmtree(target, ignore_errors=True)  # nobody knows of it: what a killed load of something else left
    folder = target.with_name(f".loading-{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for table in release.tables:
        files += _stage_table(table, _inputs(source, table), folder, progress, memory_mb)
    write_atomic(folder / DESCRIPTION_FILE, text.encode())
    content = {"name": release.name, "source": fingerprint, "files": [asdict(file) for file in files]}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1).encode())
    sync_folder(folder)
    folder.replace(target)
    sync_folder(target.parent)
    return files


def _fingerprint(source: Path, release: ReleaseDescription, text: str) -> str:
    """What a load takes in: the description, and names, sizes and times of the files."""
    parts = [text]
    for table in release.tables:
        for path in _inputs(source, table):
            about = path.stat()
            parts.append(f"{path.relative_to(source)} {about.st_size} {about.st_mtime_ns}")
    return sha256_of_bytes("\n".join(parts).encode())


def read_manifest(folder: Path) -> list[ReleaseFile]:
    """Files of a staged release.

    Raises
    ------
    BadFileError
        There is no manifest, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        return [ReleaseFile(**item) for item in json.loads(path.read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path}: not the manifest of a release: {error}") from error


def _inputs(source: Path, table: ReleaseTable) -> list[Path]:
    for ending in ("parquet", "csv"):
        single = source / f"{table.name}.{ending}"
        if single.is_file():
            return [single]
        several = sorted((source / table.name).glob(f"*.{ending}"))
        if several:
            return several
    raise NotFoundError(
        f"{source}: no file for table {table.name}; expected {table.name}.parquet, {table.name}.csv or files in "
        f"{table.name}/"
    )


def _stage_table(
    table: ReleaseTable, inputs: list[Path], folder: Path, progress: Progress, memory_mb: int
) -> list[ReleaseFile]:
    import pyarrow.parquet as pq

    out = folder / table.name
    out.mkdir()
    schema = table.arrow()
    unsorted = folder / f".{table.name}.unsorted.parquet"
    rows = 0
    with pq.ParquetWriter(unsorted, schema, compression="lz4") as writer:
        for path in inputs:
            for batch in _batches(path):
                made = _fit(table, batch, path)
                writer.write_table(made)
                rows += made.num_rows
                progress(table.name, made.num_rows)
    _sort(table, unsorted, out, memory_mb)
    unsorted.unlink()
    shutil.rmtree(folder / ".spill", ignore_errors=True)
    files = []
    for path in sorted(out.glob("*.parquet")):
        _sync(path)
        count = pq.read_metadata(path).num_rows
        files.append(
            ReleaseFile(table.name, f"{table.name}/{path.name}", count, path.stat().st_size, sha256_of(path))
        )
    if sum(file.rows for file in files) != rows:
        raise UnprocessableDataError(
            f"table {table.name}: {rows} rows came in, {sum(f.rows for f in files)} went out"
        )
    return files


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _batches(path: Path) -> Iterator[pa.Table]:
    import pyarrow as pa

    try:
        if path.suffix == ".csv":
            import pyarrow.csv

            with pyarrow.csv.open_csv(path) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
        else:
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _fit(table: ReleaseTable, batch: pa.Table, path: Path) -> pa.Table:
    """A batch with the columns of the description, in their order and types, and the pixel of each row."""
    import pyarrow as pa

    have = {name.lower(): name for name in batch.column_names}
    wanted = {column.name.lower() for column in table.columns}
    if extra := sorted(set(have) - wanted - {PIXEL}):
        raise UnprocessableDataError(
            f"{path}: column {', '.join(extra[:5])} is not in {DESCRIPTION_FILE}; describe or drop it"
        )
    schema = table.arrow()
    arrays = []
    for column in table.columns:
        field = schema.field(column.name)
        name = have.get(column.name.lower())
        if name is None:
            if not column.nullable:
                raise UnprocessableDataError(f"{path}: required column {column.name} is missing")
            arrays.append(pa.nulls(batch.num_rows, field.type))
            continue
        try:
            array = batch.column(name).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UnprocessableDataError(
                f"{path}: column {column.name}: expected {column.datatype}, found {batch.column(name).type}: {error}"
            ) from error
        if not column.nullable and array.null_count:
            raise UnprocessableDataError(
                f"{path}: column {column.name}: {array.null_count} rows are null, none may be"
            )
        arrays.append(array)
    if table.position is not None:
        arrays.append(pa.array(_pixels(table, arrays, path)))
    return pa.Table.from_arrays(arrays, schema=schema)


def _pixels(table: ReleaseTable, arrays: list[Any], path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    assert table.position is not None
    names = [column.name for column in table.columns]
    ra, dec = (
        np.asarray(arrays[names.index(name)].to_numpy(zero_copy_only=False), float)
        for name in table.position_names()
    )
    good = np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
    if not good.all():
        first = int(np.flatnonzero(~good)[0])
        raise UnprocessableDataError(
            f"{path}: table {table.name}: {int((~good).sum())} rows without a position (the first: ra {ra[first]}, dec "
            f"{dec[first]}); expected finite degrees, |dec| <= 90"
        )
    return hpx29(ra, dec)


def _sort(table: ReleaseTable, unsorted: Path, out: Path, memory_mb: int) -> None:
    """Sort by pixel, spilling to disk beyond the memory limit."""
    import duckdb

    order = f'ORDER BY "{PIXEL}"' if table.position is not None else ""
    with duckdb.connect() as engine:
        engine.execute(f"SET memory_limit = '{memory_mb}MB'")
        engine.execute("SET threads = 2")
        engine.execute("SET preserve_insertion_order = true")
        engine.execute("SET temp_directory = ?", [str(out.parent / ".spill")])
        engine.execute(
            f"COPY (SELECT * FROM read_parquet(?) {order}) TO ? (FORMAT parquet, COMPRESSION zstd, "  # noqa: S608
            f"ROW_GROUP_SIZE {ROW_GROUP})",
            [str(unsorted), str(out / "part-0000.parquet")],
        )


def verify(folder: Path, progress: Progress) -> list[str]:
    """Read every byte of a release again; gives what is wrong, nothing when all is right.

    Checks: bytes and checksum of each file, no file too many, row counts, types, required values, that keys are unique,
    and that the rows are in the order of their pixels, which belong to their positions.
    """
    try:
        files = read_manifest(folder)
        release = parse_description((folder / DESCRIPTION_FILE).read_text(), str(folder / DESCRIPTION_FILE))
    except (BadFileError, OSError, UnprocessableDataError) as error:
        return [str(error)]
    wrong = []
    known = {file.path for file in files}
    for path in sorted(folder.glob("*/*")):
        if str(path.relative_to(folder)) not in known:
            wrong.append(f"{path}: not in the manifest")
    for file in files:
        path = folder / file.path
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            wrong.append(f"{path}: damaged: its checksum is not the one of the manifest")
    if wrong:
        return wrong
    for table in release.tables:
        paths = [folder / file.path for file in files if file.table == table.name]
        wrong += _verify_table(table, paths, sum(f.rows for f in files if f.table == table.name), progress)
    return wrong


def _verify_table(table: ReleaseTable, paths: list[Path], rows: int, progress: Progress) -> list[str]:
    import pyarrow.parquet as pq

    wrong: list[str] = []
    count, last = 0, -1
    schema = table.arrow()
    for path in paths:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.names != schema.names or file.schema_arrow.types != schema.types:
                return [f"{path}: columns {file.schema_arrow.names} are not those of the description"]
            for batch in file.iter_batches(BATCH_ROWS):
                count += batch.num_rows
                progress(table.name, batch.num_rows)
                for column in table.columns:
                    if not column.nullable and batch.column(column.name).null_count:
                        wrong.append(f"{path}: column {column.name} has null values, none may be")
                if table.position is None or batch.num_rows == 0:
                    continue
                ra, dec = (
                    batch.column(name).to_numpy(zero_copy_only=False) for name in table.position_names()
                )
                pixels = batch.column(PIXEL).to_numpy()
                if not np.array_equal(pixels, hpx29(ra.astype(float), dec.astype(float))):
                    wrong.append(f"{path}: {PIXEL} does not belong to the positions")
                if pixels[0] < last or (np.diff(pixels) < 0).any():
                    wrong.append(f"{path}: rows are not in the order of {PIXEL}")
                last = int(pixels[-1])
    if count != rows:
        wrong.append(f"table {table.name}: {count} rows, the manifest says {rows}")
    wrong += _doubles(table, paths)
    return list(dict.fromkeys(wrong))


def _doubles(table: ReleaseTable, paths: list[Path]) -> list[str]:
    if not table.key or not paths:
        return []
    import duckdb

    keys = ", ".join(f'"{name}"' for name in table.key)
    with duckdb.connect() as engine:
        engine.execute("SET threads = 2")
        found = engine.execute(
            f"SELECT count(*) FROM (SELECT {keys} FROM read_parquet(?) GROUP BY ALL HAVING count(*) > 1)",  # noqa: S608
            [[str(path) for path in paths]],
        ).fetchone()
    doubles = found[0] if found else 0
    return (
        [f"table {table.name}: {doubles} values of the key {keys} stand in several rows"] if doubles else []
    )
