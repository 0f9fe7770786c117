"""What the suites of the standards share: documents taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import httpx

VO = "{http://www.ivoa.net/xml/VOTable/v1.3}"
INFO = f"{VO}INFO"
UWS = "{http://www.ivoa.net/xml/UWS/v1.0}"
XLINK = "{http://www.w3.org/1999/xlink}"
XSI = "{http://www.w3.org/2001/XMLSchema-instance}"
VOSI = "{http://www.ivoa.net/xml/VOSICapabilities/v1.0}capabilities"
AVAILABILITY = "{http://www.ivoa.net/xml/VOSIAvailability/v1.0}"


@dataclass(frozen=True)
class Interface:
    """What a capability says of how to call it."""

    url: str
    kind: str
    role: str
    version: str


def votable_root(answer: httpx.Response) -> Element:
    """The VOTABLE element of an answer."""
    root = ElementTree.fromstring(answer.content)
    assert root.tag == f"{VO}VOTABLE"
    return root


def infos(root: Element) -> dict[str, str]:
    """INFO elements; of one name the last counts."""
    return {item.get("name", ""): item.get("value", "") for item in root.iter(INFO)}


def fields_of(root: Element) -> dict[str, Element]:
    """FIELD elements by name."""
    return {item.get("name", ""): item for item in root.iter(f"{VO}FIELD")}


def capability(client: httpx.Client, service: str, standard: str) -> Interface:
    """The interface of a capability, after the checks that hold for every service (VOSI 1.1, 2 and 3)."""
    answer = client.get(f"/{service}/capabilities")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(("text/xml", "application/xml"))
    root = ElementTree.fromstring(answer.content)
    assert root.tag == VOSI
    found = {item.get("standardID"): item for item in root.findall("capability")}
    for name in ("capabilities", "availability"):
        url = found[f"ivo://ivoa.net/std/VOSI#{name}"].findtext("interface/accessURL").strip()
        assert client.get(url).status_code == 200
    up = ElementTree.fromstring(client.get(f"/{service}/availability").content)
    assert up.tag == f"{AVAILABILITY}availability"
    assert up.findtext(f"{AVAILABILITY}available") in ("true", "1")
    interface = found[standard].find("interface")
    return Interface(
        interface.findtext("accessURL").strip(), interface.get(f"{XSI}type"), interface.get("role"), interface.get("version")
    )  # fmt: skip
