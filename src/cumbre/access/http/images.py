"""DataLink 1.1, SODA 1.0 at once and as jobs, and whole files; embargo holds on each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from cumbre.access.http.base import (
    MAX_LINKS_BYTES,
    Parameters,
    TooLargeError,
    UsageError,
    base_url,
    in_pool,
    lines,
    read_parameters,
    xml_attribute,
    xml_text,
)
from cumbre.access.identity import Identity, Principal
from cumbre.access.images.catalogue import RAW, Image, ImageCatalogue
from cumbre.access.images.cutout import PLANES, Cutout, exposure_cutout, fits_bytes, png_bytes, raw_cutout
from cumbre.access.images.shapes import Shape, circle, polygon, pos
from cumbre.access.uws import Job, JobResult, JobStore
from cumbre.access.uws_runner import JobContext
from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.time import mjd_from_seconds
from cumbre.stores.files import write_atomic

SERVICE = "soda"
FITS_MIME, PNG_MIME = "application/fits", "image/png"
MAX_SYNC, MAX_ASYNC = 100, 5000
MAX_PIXELS = 100_000_000
MAX_LINKS = 10_000
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
    """

    identifiers: tuple[str, ...]
    shapes: tuple[Shape | None, ...]
    time: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...]
    polarization: bool
    planes: tuple[str, ...]
    mime: str

    def pairs(self) -> Iterator[tuple[str, Shape | None]]:
        """Every combination of image and region."""
        return product(self.identifiers, self.shapes)


@dataclass(frozen=True)
class Images:
    """Images of a site over HTTP.

    Attributes
    ----------
    catalogue
        What there is, and who may have it.
    authority
        Of the identifiers: ``ivo://AUTHORITY?image``.
    """

    catalogue: ImageCatalogue
    identity: Identity
    store: JobStore
    pool: Executor
    authority: str

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
        image = await in_pool(self.pool, self.catalogue.find, request.path_params["image"], who)
        path = Path(image.path)
        if not path.is_file():
            raise NotFoundError(f"{image.image_id}: the file is not in the cache any more; it is on tape")
        await in_pool(self.pool, self.identity.audit, who, "file", image.image_id)
        headers = {"Content-Disposition": f'attachment; filename="{path.name}"'}
        return FileResponse(path, media_type=FITS_MIME, headers=headers)

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
        count = len(identifiers) * max(len(shapes), 1)
        if count > most:
            raise MultiValuedError(
                f"{count} combinations of ID and region: at most {most} are cut here; send more of them as an "
                "asynchronous job, or in several"
            )
        wanted = parameters.value("RESPONSEFORMAT") or parameters.value("FORMAT") or FITS_MIME
        if wanted.lower() not in _FORMATS:
            raise UsageError(f"RESPONSEFORMAT = {wanted[:60]!r}: expected application/fits or image/png")
        detail = (parameters.value("CUTOUTDETAIL") or "Image").lower()
        if detail not in _DETAILS:
            raise UsageError(f"CUTOUTDETAIL = {detail[:40]!r}: expected Image, MaskedImage or Exposure")
        return Wish(
            tuple(self.image_id(text) for text in dict.fromkeys(identifiers)),
            tuple(shapes) or (None,),
            tuple(_interval("TIME", text) for text in parameters.values("TIME")),
            tuple(_interval("BAND", text) for text in parameters.values("BAND")),
            bool(parameters.values("POL")), _DETAILS[detail], _FORMATS[wanted.lower()],
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
        for image_id, shape in wish.pairs():
            part = self.cutout(images[image_id], shape, wish)
            if part is not None:
                pixels += part.planes["IMAGE"].size * len(part.planes)
                if pixels > MAX_PIXELS:
                    raise TooLargeError(
                        f"the cutouts have more than {MAX_PIXELS:,} pixels; ask for less at a time"
                    )
                cutouts.append(part)
        self.identity.audit(who, "cutout", " ".join(wish.identifiers), "ok" if cutouts else "no overlap")
        if not cutouts:
            return None
        if wish.mime == PNG_MIME:
            if len(cutouts) > 1:
                raise MultiValuedError("a picture shows one cutout; ask for one ID and one region")
            return png_bytes(cutouts[0])
        return fits_bytes(cutouts)

    def find_all(self, identifiers: Sequence[str], who: Principal) -> dict[str, Image]:
        """All images of a request.

        Raises
        ------
        NotFoundError
            One is not there, or not released to the one who asks.
        """
        images = self.catalogue.find_many(identifiers, who)
        for image_id in identifiers:
            if image_id not in images:
                raise NotFoundError(f"ID {image_id[:200]}: there is none, or it is not released to you yet")
        return images

    def cutout(self, image: Image, shape: Shape | None, wish: Wish) -> Cutout | None:
        """One cutout; None when image and wish share nothing."""
        if wish.polarization or not _touches(wish.time, image.begin_tai, image.end_tai, mjd_from_seconds):
            return None
        if not _touches(wish.band, image.em_min, image.em_max, float):
            return None
        if image.product != RAW:
            return exposure_cutout(Path(image.path), shape, planes=wish.planes)
        if len(wish.planes) > 1:
            raise UsageError(f"{image.image_id}: a raw image has no mask and variance; CUTOUTDETAIL=Image")
        if image.boresight_ra is None or image.boresight_dec is None:
            if shape is not None:
                return None
            pointing = (0.0, 0.0, 0.0)
        else:
            pointing = (image.boresight_ra, image.boresight_dec, image.rotation or 0.0)
        instrument = self.catalogue.instruments[image.instrument]
        return raw_cutout(Path(image.path), instrument, instrument.detector(image.detector), pointing, shape)

    def make_job(self, parameters: Parameters, who: Principal) -> Job:
        """Store an asynchronous cutout."""
        kept = [pair for pair in parameters.pairs if pair[0].upper() not in ("PHASE", "ACTION")]
        return self.store.create(SERVICE, who, kept, execution_s=600, run_id=parameters.value("RUNID"))

    def work(self, job: Job, context: JobContext) -> list[JobResult]:
        """An asynchronous cutout: a result for each combination, a text where it is empty."""
        wish = self.wish(Parameters(list(job.parameters)), MAX_ASYNC)
        images = self.find_all(wish.identifiers, job.principal)
        results = []
        for number, (image_id, shape) in enumerate(wish.pairs(), 1):
            if context.cancelled.is_set():
                raise UserError("the job was aborted")
            part = self.cutout(images[image_id], shape, wish)
            if part is None:
                name, mime = f"cutout_{number}.txt", "text/plain"
                content = f"UsageError: no overlap of {image_id} with the region\n".encode()
            elif wish.mime == PNG_MIME:
                name, mime, content = f"cutout_{number}.png", PNG_MIME, png_bytes(part)
            else:
                name, mime, content = f"cutout_{number}.fits", FITS_MIME, fits_bytes([part])
            written = write_atomic(context.folder / name, content)
            results.append(JobResult(f"cutout_{number}", name, mime, written.size, name))
            context.info.update(done=number)
        self.identity.audit(job.principal, "cutout job", " ".join(wish.identifiers))
        return results

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
        images = await in_pool(self.pool, self.catalogue.find_many, [self.image_id(t) for t in taken], who)
        rows = [row for text in taken for row in self._rows(text, images, request, who)]
        overflow = len(rows) > most
        document = links_document(rows[:most], base_url(request, "soda/sync"), overflow=overflow)
        return Response(document, media_type="application/x-votable+xml;content=datalink")

    def _rows(
        self, text: str, images: dict[str, Image], request: Request, who: Principal
    ) -> list[dict[str, object]]:
        image = images.get(self.image_id(text))
        if image is None:
            message = f"NotFoundFault: {text[:200]}: there is none, or it is not released to you yet"
            return [{"ID": text, "error_message": message, "semantics": "#this"}]
        auth: dict[str, object] = {
            "link_auth": "optional" if image.release_at_once else "true",
            "link_authorized": True,
        }
        del who
        did = self.did(image.image_id)
        cut = f"{base_url(request, 'soda/sync')}?ID={quote(did, safe='')}"
        return [
            {
                "ID": text, "access_url": f"{base_url(request, 'files')}/{quote(image.image_id)}", "semantics": "#this",
                "description": f"{image.product} image, whole file", "content_type": FITS_MIME,
                "content_length": image.byte_size, "content_qualifier": "image",
            } | auth,
            {
                "ID": text, "access_url": f"{cut}&RESPONSEFORMAT=image/png", "semantics": "#preview",
                "description": "picture of the whole image", "content_type": PNG_MIME, "content_qualifier": "image",
            } | auth,
            {
                "ID": text, "service_def": "soda-sync", "semantics": "#cutout",
                "description": "part of the image", "content_type": FITS_MIME, "content_qualifier": "image",
            } | auth,
        ]  # fmt: skip


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


_LINK_FIELDS = (
    # name, datatype, arraysize, ucd, description
    ("ID", "char", "*", "meta.id;meta.main", "Identifier that was asked for"),
    ("access_url", "char", "*", "meta.ref.url", "Where it is"),
    ("service_def", "char", "*", "meta.ref", "Descriptor of the service that gives it"),
    ("error_message", "char", "*", "meta.code.error", "Why there is nothing"),
    ("semantics", "char", "*", "meta.code", "What it is to the image"),
    ("description", "char", "*", "meta.note", "In words"),
    ("content_type", "char", "*", "meta.code.mime", "Media type"),
    ("content_length", "long", None, "phys.size;meta.file", "Size in bytes"),
    ("content_qualifier", "char", "*", "meta.code", "Kind of data"),
    ("link_auth", "char", "*", "meta.code", "Whether a token is needed"),
    ("link_authorized", "boolean", None, "meta.code", "Whether you may"),
)


def links_document(rows: Sequence[dict[str, object]], soda_url: str, *, overflow: bool) -> str:
    """The table of links with the descriptor of the cutout service."""
    out = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">',
        '<RESOURCE type="results">',
        '<INFO name="standardID" value="ivo://ivoa.net/std/DataLink#links-1.1"/>',
        '<INFO name="QUERY_STATUS" value="OK"/>',
        '<TABLE name="links">',
    ]
    for name, kind, size, ucd, description in _LINK_FIELDS:
        identity = ' ID="links_id"' if name == "ID" else ""
        shape = f' arraysize="{size}"' if size else ""
        unit = ' unit="byte"' if name == "content_length" else ""
        out.append(
            f'<FIELD{identity} name="{name}" datatype="{kind}"{shape}{unit} ucd="{ucd}">'
            f"<DESCRIPTION>{description}</DESCRIPTION></FIELD>"
        )
    out.append("<DATA><TABLEDATA>")
    for row in rows:
        cells = (row.get(name) for name, *_ in _LINK_FIELDS)
        out.append("<TR>" + "".join(f"<TD>{xml_text(_cell(cell))}</TD>" for cell in cells) + "</TR>")
    out.append("</TABLEDATA></DATA></TABLE>")
    if overflow:
        out.append(f'<INFO name="QUERY_STATUS" value="OVERFLOW">the first {len(rows)} rows of more</INFO>')
    out.append("</RESOURCE>")
    example = next((str(row["ID"]) for row in rows if row.get("service_def")), "")
    return lines([*out, *_descriptor(soda_url, example), "</VOTABLE>"])


def _cell(value: object) -> object:
    if value is None:
        return ""
    return ("true" if value else "false") if isinstance(value, bool) else value


def _descriptor(url: str, example: str) -> list[str]:
    """How to call the cutout service, by DataLink's service descriptors."""
    inputs = (
        ("CIRCLE", "double", "3", "circle", "phys.angArea;obs", "deg", "Longitude, latitude, radius (ICRS)"),
        ("POLYGON", "double", "*", "polygon", "phys.angArea;obs", "deg", "Corners (ICRS)"),
        ("POS", "char", "*", "", "phys.angArea;obs", "", "CIRCLE, RANGE or POLYGON and numbers"),
        ("RESPONSEFORMAT", "char", "*", "", "meta.code.mime", "", "application/fits or image/png"),
        ("CUTOUTDETAIL", "char", "*", "", "meta.code", "", "Image, MaskedImage or Exposure"),
    )
    out = [
        '<RESOURCE type="meta" utype="adhoc:service" ID="soda-sync" name="cutout">',
        "<DESCRIPTION>Part of an image</DESCRIPTION>",
        '<PARAM name="standardID" datatype="char" arraysize="*" value="ivo://ivoa.net/std/SODA#sync-1.0"/>',
        f'<PARAM name="accessURL" datatype="char" arraysize="*" value={xml_attribute(url)}/>',
        '<PARAM name="contentType" datatype="char" arraysize="*" value="application/fits"/>',
    ]
    if example:
        link = f"{url}?ID={quote(example, safe='')}"
        out.append(f'<PARAM name="exampleURL" datatype="char" arraysize="*" value={xml_attribute(link)}/>')
    out += [
        '<GROUP name="inputParams">',
        '<PARAM name="ID" datatype="char" arraysize="*" ucd="meta.id;meta.dataset" ref="links_id" value=""/>',
    ]
    for name, kind, size, xtype, ucd, unit, description in inputs:
        extra = (f' xtype="{xtype}"' if xtype else "") + (f' unit="{unit}"' if unit else "")
        out.append(
            f'<PARAM name="{name}" datatype="{kind}" arraysize="{size}"{extra} ucd="{ucd}" value="">'
            f"<DESCRIPTION>{description}</DESCRIPTION></PARAM>"
        )
    return [*out, "</GROUP>", "</RESOURCE>"]
