"""What is missing or wrong in an instrument description for given files, in words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cumbre.core.errors import CumbreError
from cumbre.core.header import OWN_RULES, QUANTITIES, ObservationMetadata, translate
from cumbre.core.header_files import read_headers
from cumbre.core.instrument import Amplifier, Box, Detector, Instrument

Severity = Literal["error", "note"]
Header = Mapping[str, Any]

USUAL_KEYWORDS: dict[str, tuple[str, ...]] = {
    "begin": ("DATE-BEG", "DATE-OBS", "UT-OBS", "UTC-OBS", "MJD-BEG", "MJD-OBS", "JD"),
    "exposure_s": ("EXPTIME", "EXPOSURE", "ITIME", "TEXP"),
    "dark_s": ("DARKTIME",),
    "image_type": ("IMGTYPE", "IMAGETYP", "OBSTYPE", "FRMTYPE", "FRAME"),
    "filter": ("FILTER", "FILTER1", "FILTNAME", "INSFLNAM"),
    "ra": ("RA", "RASTART", "RA-TEL", "TELRA", "OBJCTRA", "CRVAL1"),
    "dec": ("DEC", "DECSTART", "DEC-TEL", "TELDEC", "OBJCTDEC", "CRVAL2"),
    "rotpa": ("ROTPA", "POSANG", "PA", "ROTANGLE"),
    "airmass": ("AIRMASS", "AMSTART", "SECZ"),
    "altitude": ("ELSTART", "ALT", "TELALT", "OBJCTALT", "EL"),
    "azimuth": ("AZSTART", "AZ", "TELAZ", "OBJCTAZ"),
    "detector": ("CHIPID", "DETECTOR", "CCDNUM", "DETPOS", "CCDNAME"),
    "seq_num": ("SEQNUM", "OBSNUM", "EXPNUM", "FRAMENUM", "RUN"),
    "object": ("OBJECT", "TARGNAME"),
    "program": ("PROGRAM", "PROPID", "PROPOSID"),
}
"""Where cameras of the world keep these; only to suggest a rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one file (or about all of them, ``file`` empty)."""

    severity: Severity
    message: str
    file: str = ""


@dataclass(slots=True)
class CheckReport:
    """Result of a check."""

    instrument: str
    files: int = 0
    findings: list[Finding] = field(default_factory=list)
    metadata: dict[str, ObservationMetadata] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of findings that would stop the file."""
        return sum(finding.severity == "error" for finding in self.findings)


def check_files(instrument: Instrument, paths: Sequence[Path]) -> CheckReport:
    """Check a description against raw files.

    Errors are what would send a file into quarantine or put pixels in the wrong place; notes are what gets
    repaired, guessed or stays empty.
    """
    report = CheckReport(instrument.name, len(paths))
    report.findings += [Finding("error", text) for text in _description_faults(instrument)]
    for path in paths:
        try:
            headers = read_headers(path)
        except CumbreError as error:
            report.findings.append(Finding("error", str(error), str(path)))
            continue
        report.findings += _check_one(instrument, path, headers, report)
    report.findings += _check_together(report)
    return report


def guess_instrument(candidates: Sequence[Instrument], path: Path) -> Instrument:
    """The description that fits a file with fewest errors, then fewest notes."""
    return min(candidates, key=lambda item: _misfit(item, path))


def _misfit(instrument: Instrument, path: Path) -> tuple[int, int, int]:
    report = check_files(instrument, [path])
    try:
        described = _named_in(instrument, read_headers(path))
    except CumbreError:
        described = False
    return report.errors, 0 if described else 1, len(report.findings)


def _named_in(instrument: Instrument, headers: Sequence[Header]) -> bool:
    """Whether the header's names of telescope and instrument sound like the description's."""
    words = " ".join(
        str(h.get(key, "")) for h in headers for key in ("INSTRUME", "TELESCOP", "CREATOR", "VERSION")
    )
    return re.sub(r"\W", "", instrument.name).lower() in re.sub(r"\W", "", words).lower()


def _description_faults(instrument: Instrument) -> list[str]:
    return [
        f"description of {instrument.name}: header.{name} is no quantity; expected one of {', '.join(sorted(QUANTITIES))}"
        for name in instrument.header
        if name not in QUANTITIES
    ]


def _check_one(
    instrument: Instrument, path: Path, headers: Sequence[Header], report: CheckReport
) -> list[Finding]:
    out: list[Finding] = []
    try:
        metadata = translate(instrument, headers, str(path))
    except CumbreError as error:
        out.append(Finding("error", str(error) + _usual_hint(str(error), headers), str(path)))
        detector: Detector | None = instrument.detectors[0] if len(instrument.detectors) == 1 else None
    else:
        report.metadata[str(path)] = metadata
        detector = instrument.detector(metadata.detector_id)
        out += [Finding("note", problem, str(path)) for problem in metadata.problems]
        out += [Finding("note", text, str(path)) for text in _unused_keywords(instrument, headers)]
    if detector is not None:
        out += _check_pixels(detector, headers, str(path))
    return out


def _usual_hint(message: str, headers: Sequence[Header]) -> str:
    """The file's own keywords that may be meant, after a message about a missing quantity."""
    for name, keywords in USUAL_KEYWORDS.items():
        if f": {name} is missing" in message:
            found = [key for key in keywords if any(key in header for header in headers)]
            return f". The file has {', '.join(found)}" if found else ""
    return ""


def _unused_keywords(instrument: Instrument, headers: Sequence[Header]) -> list[str]:
    rules = instrument.header or OWN_RULES
    out = []
    for name, keywords in USUAL_KEYWORDS.items():
        if name in rules or name == "detector" or (name == "seq_num" and instrument.file_pattern):
            continue
        found = next((key for key in keywords if any(key in header for header in headers)), None)
        if found is not None:
            out.append(
                f"{name}: no rule, but the file has {found}; add header: {{{name}: {{keywords: [{found}]}}}}"
            )
    return out


def _sizes(headers: Sequence[Header]) -> dict[str, tuple[int, int]]:
    """(nx, ny) of each HDU with pixels, by number and by EXTNAME; "0" also means the first of them."""
    out: dict[str, tuple[int, int]] = {}
    for number, header in enumerate(headers):
        if int(header.get("NAXIS", 0)) != 2 or str(header.get("XTENSION", "IMAGE")).strip() != "IMAGE":
            continue
        size = int(header["NAXIS1"]), int(header["NAXIS2"])
        out.setdefault("0", size)
        out[str(number)] = size
        if str(header.get("EXTNAME", "")).strip():
            out[str(header["EXTNAME"]).strip().lower()] = size
    return out


def _check_pixels(detector: Detector, headers: Sequence[Header], file: str) -> list[Finding]:
    out: list[Finding] = []
    sizes = _sizes(headers)
    used: dict[str, list[Box]] = defaultdict(list)
    for amplifier in detector.amplifiers:
        key = str(amplifier.hdu).lower()
        size = sizes.get(key)
        if size is None:
            known = ", ".join(sorted(sizes)) or "none"
            out.append(
                Finding(
                    "error",
                    f"amplifier {amplifier.name} of {detector.name}: no HDU {amplifier.hdu!r} with pixels; the file "
                    f"has {known}",
                    file,
                )
            )
            continue
        for label, box in _boxes(amplifier):
            used[key].append(box)
            if box.x1 > size[0] or box.y1 > size[1] or box.x0 < 0 or box.y0 < 0:
                out.append(
                    Finding(
                        "error",
                        f"amplifier {amplifier.name} of {detector.name}: {label} {list(box)} reaches outside the "
                        f"file's {size[0]} x {size[1]} pixels",
                        file,
                    )
                )
    for key, boxes in used.items():
        right, top = max(box.x1 for box in boxes), max(box.y1 for box in boxes)
        width, height = sizes[key]
        if right < width or top < height:
            out.append(
                Finding(
                    "note",
                    f"HDU {key}: the description uses {right} x {top} of {width} x {height} pixels; are overscan or "
                    "a detector's part missing in it?",
                    file,
                )
            )
    out += _datasec_notes(detector, headers, file)
    return out


def _boxes(amplifier: Amplifier) -> list[tuple[str, Box]]:
    names = ("raw_box", "overscan_box", "prescan_box", "parallel_overscan_box")
    return [(name, box) for name in names if (box := getattr(amplifier, name)) is not None]


def _datasec_notes(detector: Detector, headers: Sequence[Header], file: str) -> list[Finding]:
    """Where the file's DATASEC says something else: the description counts, but one of them is wrong."""
    by_name = {str(header.get("EXTNAME", "")).strip().lower(): header for header in headers}
    differing = []
    for amplifier in detector.amplifiers:
        header = by_name.get(str(amplifier.hdu).lower(), {}) if isinstance(amplifier.hdu, str) else {}
        match = re.fullmatch(r"\[(\d+):(\d+),(\d+):(\d+)\]", str(header.get("DATASEC", "")).replace(" ", ""))
        if match:
            x0, x1, y0, y1 = (int(part) for part in match.groups())
            if Box(x0 - 1, x1, y0 - 1, y1) != amplifier.raw_box:
                differing.append((amplifier, match[0]))
    if not differing:
        return []
    amplifier, text = differing[0]
    return [
        Finding(
            "note",
            f"{len(differing)} amplifiers: DATASEC differs from raw_box (first {amplifier.name}: header {text}, "
            f"description {list(amplifier.raw_box)}, 0-based); the description is used",
            file,
        )
    ]


def _check_together(report: CheckReport) -> list[Finding]:
    """Faults that only show among several files."""
    out = []
    same: dict[tuple[str, int], list[str]] = defaultdict(list)
    begins: dict[int, set[str]] = defaultdict(set)
    for file, metadata in report.metadata.items():
        same[metadata.obs_id, metadata.detector_id].append(file)
        begins[metadata.begin_ns].add(metadata.obs_id)
    for (obs_id, detector), files in same.items():
        if len(files) > 1:
            out.append(
                Finding(
                    "error",
                    f"{len(files)} files get the same identity {obs_id} detector {detector}: {', '.join(files[:4])}; "
                    "add a seq_num rule or a file_pattern with (?P<seq_num>...)",
                )
            )
    out += [
        Finding(
            "note",
            f"exposures {', '.join(sorted(names)[:10])} begin at the same instant: DATE-OBS was copied from one to "
            "the others, their times cannot be trusted",
        )
        for names in begins.values()
        if len(names) > 1
    ]
    return out
