"""DataLink 1.1, SODA 1.0 at once and as jobs, and whole files; embargo holds on each of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from cumbre.access.http.base import (
    MAX_LINKS_BYTES,
    Parameters,
    TooLargeError,
    UsageError,
    base_url,
    in_pool,
    read_parameters,
)
from cumbre.access.http.links import ASYNC, LINKS_MIME, SYNC, links_document
from cumbre.access.identity import Identity, Principal
from cumbre.access.images.catalogue import RAW, Image, ImageCatalogue
from cumbre.access.images.cutout import PLANES, Cutout, exposure_cutout, fits_bytes, picture, raw_cutout
from cumbre.access.images.products import MOSAIC, STACK, contact_sheet, grid_of, mosaic, stack
from cumbre.access.images.regenerate import KINDS, Regenerator
from cumbre.access.images.shapes import Shape, circle, polygon, pos
from cumbre.access.images.source import is_remote, place_of
from cumbre.access.uws import Job, JobResult, JobStore
from cumbre.access.uws_runner import JobContext
from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.time import mjd_from_seconds, utc_from_tai
from cumbre.stores.files import write_atomic

SERVICE = "soda"
FITS_MIME, PNG_MIME = "application/fits", "image/png"
MAX_SYNC, MAX_ASYNC = 100, 5000
MAX_PIXELS = 100_000_000
MAX_LINKS = 10_000
_BLOCK = 4 << 20
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_FORMATS = {
    "application/fits": FITS_MIME,
    "image/fits": FITS_MIME,
    "fits": FITS_MIME,
    "image/png": PNG_MIME,
    "png": PNG_MIME,
}
_DETAILS = {"image": ("IMAGE",), "maskedimage": PLANES, "exposure": PLANES}


class MultiValuedError(UsageError):
    """More values than this way of asking takes."""

    outcome = "MultiValuedParamNotSupported"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a cutout request asks for.

    Attributes
    ----------
    identifiers
        Image identifiers, in order.
    shapes
        Regions; one None stands for whole images.
    time, band
        Intervals that an image must touch: MJD and metres.
    combine
        Empty for a cutout of each image, else ``MOSAIC`` or ``STACK``: one product of them all.
    """

    identifiers: tuple[str, ...]
    shapes: tuple[Shape | None, ...]
    time: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...]
    polarization: bool
    planes: tuple[str, ...]
    mime: str
    combine: str = ""

    def each_interval(self) -> list[Wish]:
        """The same with one TIME and one BAND each: every combination is a result of its own."""
        times, bands = self.time or (None,), self.band or (None,)
        return [
            replace(self, time=(time,) if time else (), band=(band,) if band else ())
            for time, band in product(times, bands)
        ]


@dataclass(frozen=True)
class Images:
    """Images of a site over HTTP.

    Attributes
    ----------
    catalogue
        What there is, and who may have it.
    authority
        Of the identifiers: ``ivo://AUTHORITY?image``.
    regenerator
        Makes calibrated and difference images again; without it there are stored images only.
    """

    catalogue: ImageCatalogue
    identity: Identity
    store: JobStore
    pool: Executor
    authority: str
    regenerator: Regenerator | None = None

    def find_many(self, image_ids: Sequence[str], who: Principal) -> dict[str, Image]:
        """Images by identifier, also those that can be made again; what is not released is left out."""
        found = self.catalogue.find_many(image_ids, who)
        if self.regenerator is not None and len(found) < len(set(image_ids)):
            found |= self.regenerator.find_many([text for text in image_ids if text not in found], who)
        return found

    # identifiers

    def did(self, image_id: str) -> str:
        """Identifier of an image for the world."""
        return f"ivo://{self.authority}?{image_id}"

    def image_id(self, text: str) -> str:
        """Our own identifier of one for the world, or of itself."""
        prefix = f"ivo://{self.authority}?"
        return text[len(prefix) :] if text.lower().startswith(prefix.lower()) else text

    # files

    async def file(self, request: Request, who: Principal) -> Response:
        """A whole file, also in parts (Range)."""
        image_id = request.path_params["image"]
        image = (await in_pool(self.pool, self.find_all, [image_id], who))[image_id]
        headers = {"Content-Disposition": f'attachment; filename="{Path(image.path).name}"'}
        if is_remote(image.path):
            await in_pool(self.pool, self.identity.audit, who, "file", image.image_id)
            return await self._remote(image, request, headers)
        path = Path(image.path)
        if not path.is_file():
            raise NotFoundError(_not_here(image))
        await in_pool(self.pool, self.identity.audit, who, "file", image.image_id)
        return FileResponse(path, media_type=FITS_MIME, headers=headers)

    async def _remote(self, image: Image, request: Request, headers: dict[str, str]) -> Response:
        """A file of an object store, passed on in blocks; with ``Range: bytes=A-B`` a part of it."""
        store, key = place_of(image.path)
        size = await in_pool(self.pool, store.size, key)
        match = _RANGE.fullmatch(request.headers.get("range", ""))
        first, last = (int(match[1]), int(match[2] or size - 1)) if match else (0, size - 1)
        last = min(last, size - 1)
        if first > last:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})

        async def blocks() -> AsyncIterator[bytes]:
            for start in range(first, last + 1, _BLOCK):
                yield await in_pool(self.pool, store.read_range, key, start, min(_BLOCK, last + 1 - start))

        headers = headers | {"Content-Length": str(last + 1 - first), "Accept-Ranges": "bytes"}
        if match:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return StreamingResponse(blocks(), 206 if match else 200, headers, FITS_MIME)

    # SODA

    def wish(self, parameters: Parameters, most: int) -> Wish:
        """What a request asks for.

        Raises
        ------
        UserError
            A parameter that is missing, wrong, or given too often.
        """
        identifiers = parameters.values("ID")
        if not identifiers:
            raise UsageError("the parameter ID is missing: an obs_publisher_did of ivoa.obscore")
        shapes: list[Shape | None] = [circle(text) for text in parameters.values("CIRCLE")]
        shapes += [polygon(text) for text in parameters.values("POLYGON")]
        shapes += [pos(text) for text in parameters.values("POS")]
        intervals = [max(len(parameters.values(name)), 1) for name in ("TIME", "BAND")]
        count = len(identifiers) * max(len(shapes), 1) * math.prod(intervals)
        if count > most:
            raise MultiValuedError(
                f"{count} combinations of ID, region, TIME and BAND: at most {most} are cut here; send more of them as an "
                "asynchronous job, or in several"
            )
        wanted = parameters.value("RESPONSEFORMAT") or parameters.value("FORMAT") or FITS_MIME
        if wanted.lower() not in _FORMATS:
            raise UsageError(f"RESPONSEFORMAT = {wanted[:60]!r}: expected application/fits or image/png")
        detail = (parameters.value("CUTOUTDETAIL") or "Image").lower()
        if detail not in _DETAILS:
            raise UsageError(f"CUTOUTDETAIL = {detail[:40]!r}: expected Image, MaskedImage or Exposure")
        combine = (parameters.value("COMBINE") or "").upper()
        if combine not in ("", MOSAIC, STACK):
            raise UsageError(f"COMBINE = {combine[:40]!r}: expected MOSAIC or STACK")
        if combine == STACK and not shapes:
            raise UsageError("COMBINE=STACK needs a region: CIRCLE, POLYGON or POS")
        return Wish(
            tuple(self.image_id(text) for text in dict.fromkeys(identifiers)),
            tuple(shapes) or (None,),
            tuple(_interval("TIME", text) for text in parameters.values("TIME")),
            tuple(_interval("BAND", text) for text in parameters.values("BAND")),
            bool(parameters.values("POL")), _DETAILS[detail], _FORMATS[wanted.lower()], combine,
        )  # fmt: skip

    async def cut(self, request: Request, who: Principal) -> Response:
        """``/soda/sync``: one FITS file of all cutouts, 204 when there is nothing."""
        parameters = await read_parameters(request)
        wish = self.wish(parameters, MAX_SYNC)
        content = await in_pool(self.pool, self._cut_all, wish, who)
        if content is None:
            return Response(status_code=204)
        name = f"cutout.{'png' if wish.mime == PNG_MIME else 'fits'}"
        return Response(content, 200, {"Content-Disposition": f'inline; filename="{name}"'}, wish.mime)

    def _cut_all(self, wish: Wish, who: Principal) -> bytes | None:
        images = self.find_all(wish.identifiers, who)
        cutouts: list[Cutout] = []
        pixels = 0
        for _, part in self.products(wish, images):
            if part is not None:
                pixels += sum(plane.size for plane in part.planes.values())
                if pixels > MAX_PIXELS:
                    raise TooLargeError(_too_many_pixels())
                cutouts.append(part)
        self.identity.audit(who, "cutout", " ".join(wish.identifiers), "ok" if cutouts else "no overlap")
        if not cutouts:
            return None
        if wish.mime == PNG_MIME:
            if len(cutouts) > 1:
                raise MultiValuedError("a picture shows one cutout; ask for one ID and one region")
            return _picture(cutouts[0])
        return fits_bytes(cutouts)

    def products(self, wish: Wish, images: Mapping[str, Image]) -> Iterator[tuple[str, Cutout | None]]:
        """Everything that a request asks for, one after the other: what it is of, and the pixels if there are any.

        Raises
        ------
        TooLargeError
            One product alone has too many pixels.
        """
        if not wish.combine:
            for image_id, (shape, one) in product(
                wish.identifiers, product(wish.shapes, wish.each_interval())
            ):
                yield image_id, self.cutout(images[image_id], shape, one)
            return
        for shape in wish.shapes:
            groups: dict[str, list[Image]] = {}
            for image_id in wish.identifiers:
                image = images[image_id]
                name = f"{image.product}/{image.obs_id}" if wish.combine == MOSAIC else "stack"
                groups.setdefault(name, []).append(image)
            for name, members in groups.items():
                yield name, self._combined(members, shape, wish)

    def _combined(self, images: Sequence[Image], shape: Shape | None, wish: Wish) -> Cutout | None:
        """One mosaic or stack."""
        grid = grid_of(shape, images)
        layers = len(images) if wish.combine == STACK else 1
        if math.prod(grid.shape) * layers * len(wish.planes) > MAX_PIXELS:
            raise TooLargeError(_too_many_pixels())
        region = grid.region()
        parts = ((image, self.cutout(image, region, wish)) for image in images)
        touching = [(image, part) for image, part in parts if part is not None]
        return (mosaic if wish.combine == MOSAIC else stack)(touching, grid, wish.planes)

    def find_all(self, identifiers: Sequence[str], who: Principal) -> dict[str, Image]:
        """All images of a request.

        Raises
        ------
        NotFoundError
            One is not there, or not released to the one who asks.
        """
        images = self.find_many(identifiers, who)
        for image_id in identifiers:
            if image_id not in images:
                raise NotFoundError(f"ID {image_id[:200]}: there is none, or it is not released to you yet")
        return images

    def cutout(self, image: Image, shape: Shape | None, wish: Wish) -> Cutout | None:
        """One cutout; None when image and wish share nothing."""
        if wish.polarization or not _touches(wish.time, image.begin_tai, image.end_tai, _mjd_utc):
            return None
        if not _touches(wish.band, image.em_min, image.em_max, float):
            return None
        if image.product in KINDS and not is_remote(image.path) and not Path(image.path).is_file():
            raise NotFoundError(_not_here(image))
        if image.product != RAW:
            return exposure_cutout(image.path, shape, planes=wish.planes)
        if len(wish.planes) > 1:
            raise UsageError(f"{image.image_id}: a raw image has no mask and variance; CUTOUTDETAIL=Image")
        if image.boresight_ra is None or image.boresight_dec is None:
            if shape is not None:
                return None
            pointing = (0.0, 0.0, 0.0)
        else:
            pointing = (image.boresight_ra, image.boresight_dec, image.rotation or 0.0)
        instrument = self.catalogue.instruments[image.instrument]
        return raw_cutout(image.path, instrument, instrument.detector(image.detector), pointing, shape)

    def make_job(self, parameters: Parameters, who: Principal) -> Job:
        """Store an asynchronous cutout."""
        kept = [pair for pair in parameters.pairs if pair[0].upper() not in ("PHASE", "ACTION")]
        return self.store.create(SERVICE, who, kept, execution_s=600, run_id=parameters.value("RUNID"))

    def work(self, job: Job, context: JobContext) -> list[JobResult]:
        """An asynchronous cutout: a result for each combination, a text where it is empty."""
        wish = self.wish(Parameters(list(job.parameters)), MAX_ASYNC)
        images = self.find_all(wish.identifiers, job.principal)
        results = [self._report(image, job, context) for image in images.values() if image.product in KINDS]
        for number, (name, part) in enumerate(self.products(wish, images), 1):
            if context.cancelled.is_set():
                raise UserError("the job was aborted")
            if part is None:
                ending, mime = "txt", "text/plain"
                content = f"UsageError: no overlap of {name} with the region\n".encode()
            elif wish.mime == PNG_MIME:
                ending, mime, content = "png", PNG_MIME, _picture(part)
            else:
                ending, mime, content = "fits", FITS_MIME, fits_bytes([part])
            file = f"cutout_{number}.{ending}"
            written = write_atomic(context.folder / file, content)
            results.append(JobResult(f"cutout_{number}", file, mime, written.size, file))
            context.info.update(done=number)
        self.identity.audit(job.principal, "cutout job", " ".join(wish.identifiers))
        return results

    def _report(self, image: Image, job: Job, context: JobContext) -> JobResult:
        """See that an image which is made on demand is here; a result that tells how it was made."""
        context.info.update(making=image.image_id)
        assert self.regenerator is not None
        report = self.regenerator.make(image, job.principal, context.on_cancel)
        if context.cancelled.is_set():
            raise UserError("the job was aborted")
        name = f"provenance_{image.image_id.replace('/', '_')}"
        about = {key: value for key, value in report.items() if key not in KINDS}
        content = json.dumps(about | {"image": image.image_id} | report[image.product], indent=1)
        written = write_atomic(context.folder / f"{name}.json", content.encode())
        return JobResult(name, f"{name}.json", "application/json", written.size, f"{name}.json")

    # DataLink

    async def links(self, request: Request, who: Principal) -> Response:
        """``/datalink/links``: what belongs to each image; a row says it when there is none."""
        parameters = await read_parameters(request, limit_bytes=MAX_LINKS_BYTES)
        wanted = (parameters.value("RESPONSEFORMAT") or "").lower()
        if wanted and not wanted.startswith(("votable", "application/x-votable+xml", "text/xml")):
            raise UsageError(f"RESPONSEFORMAT = {wanted[:60]!r}: links are a VOTable")
        identifiers = parameters.values("ID")
        maxrec = parameters.integer("MAXREC")
        most = MAX_LINKS if maxrec is None else min(maxrec, MAX_LINKS)
        taken = list(dict.fromkeys(identifiers))
        images = await in_pool(self.pool, self.find_many, [self.image_id(t) for t in taken], who)
        rows: list[dict[str, object]] = []
        overflow = False
        for text in taken:
            more = self._rows(text, images, request, who)
            overflow = len(rows) + len(more) > most
            if overflow:  # the links of one image are never parted
                break
            rows += more
        document = links_document(rows, base_url(request, "soda"), overflow=overflow)
        return Response(document, media_type=LINKS_MIME)

    def _rows(
        self, text: str, images: dict[str, Image], request: Request, who: Principal
    ) -> list[dict[str, object]]:
        image = images.get(self.image_id(text))
        if image is None:
            message = f"NotFoundFault: {text[:200]}: there is none, or it is not released to you yet"
            return [{"ID": text, "error_message": message, "semantics": "#this"}]
        open_to_all = image.release_at_once or who.is_anonymous
        common: dict[str, object] = {
            "ID": text, "content_type": FITS_MIME, "content_qualifier": "image",
            "link_auth": "optional" if open_to_all else "true", "link_authorized": True,
        }  # fmt: skip
        if image.product in KINDS and not Path(image.path).is_file():
            what = {
                "service_def": ASYNC,
                "semantics": "#this",
                "description": f"{image.product} image, made on demand",
            }
            return [common | what]
        did = self.did(image.image_id)
        cut = f"{base_url(request, 'soda/sync')}?ID={quote(did, safe='')}"
        rows = [
            common | {
                "access_url": f"{base_url(request, 'files')}/{quote(image.image_id)}", "semantics": "#this",
                "description": f"{image.product} image, whole file", "content_length": image.byte_size,
            },
            common | {
                "access_url": f"{cut}&RESPONSEFORMAT=image/png", "semantics": "#preview",
                "description": "picture of the whole image", "content_type": PNG_MIME,
            },
            common | {"service_def": SYNC, "semantics": "#cutout", "description": "part of the image"},
        ]  # fmt: skip
        for made in self.regenerator.products_of(image) if self.regenerator is not None else ():
            link = f"{base_url(request, 'datalink/links')}?ID={quote(self.did(made), safe='')}"
            rows.append(common | {
                "access_url": link, "semantics": "#derivation", "content_type": LINKS_MIME,
                "description": f"{made.partition('/')[0]} image, made again as it was processed",
            })  # fmt: skip
        return rows


def _mjd_utc(tai_s: float) -> float:
    return mjd_from_seconds(utc_from_tai(tai_s))


def _not_here(image: Image) -> str:
    if image.product in KINDS:
        return f"{image.image_id} is made on demand: ask for it as a job at soda/async; then it is here for a while"
    return f"{image.image_id}: the file is not in the cache any more; it is on tape"


def _picture(part: Cutout) -> bytes:
    pixels = part.planes["IMAGE"]
    return picture(contact_sheet(pixels) if pixels.ndim == 3 else pixels)


def _too_many_pixels() -> str:
    return f"the cutouts have more than {MAX_PIXELS:,} pixels; ask for less at a time"


def _interval(name: str, text: str) -> tuple[float, float]:
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not numbers[0] <= numbers[-1]:
        raise UsageError(f"{name} = {text[:60]!r}: expected one number, or two with the smaller first")
    return numbers[0], numbers[-1]


def _touches(
    intervals: Sequence[tuple[float, float]], low: float | None, high: float | None, scale: object
) -> bool:
    if not intervals or low is None or high is None:
        return not intervals
    assert callable(scale)
    return any(scale(low) <= b and scale(high) >= a for a, b in intervals)
