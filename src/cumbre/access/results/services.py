"""What can be asked next with the rows of a document: service descriptors of DataLink 1.1."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr


@dataclass(frozen=True, slots=True)
class Input:
    """A parameter of a service.

    Attributes
    ----------
    ref
        ID of the FIELD whose values it takes; empty when a person gives the value.
    value
        One that is always sent.
    """

    name: str
    datatype: str = "char"
    arraysize: str = "*"
    xtype: str = ""
    ucd: str = ""
    unit: str = ""
    description: str = ""
    ref: str = ""
    value: str = ""

    def xml(self) -> str:
        """A PARAM element."""
        attributes = {
            "name": self.name, "datatype": self.datatype, "arraysize": self.arraysize, "xtype": self.xtype,
            "unit": self.unit, "ucd": self.ucd, "ref": self.ref,
        }  # fmt: skip
        words = " ".join(f"{name}={quoteattr(text)}" for name, text in attributes.items() if text)
        # a number has no empty value
        empty = "0" if self.datatype in ("int", "long") and not self.arraysize else ""
        value = quoteattr(self.value or empty)
        start = f"<PARAM {words} value={value}"
        if not self.description:
            return start + "/>"
        return f"{start}><DESCRIPTION>{escape(self.description)}</DESCRIPTION></PARAM>"


@dataclass(frozen=True, slots=True)
class ServiceDescriptor:
    """A service by its address and its parameters; ``example`` is an address that works."""

    identity: str
    name: str
    description: str
    url: str
    inputs: tuple[Input, ...]
    standard_id: str = ""
    content_type: str = ""
    example: str = ""

    def lines(self) -> list[str]:
        """A RESOURCE element."""
        texts = {
            "standardID": self.standard_id, "accessURL": self.url, "contentType": self.content_type,
            "exampleURL": self.example,
        }  # fmt: skip
        return [
            f'<RESOURCE type="meta" utype="adhoc:service" ID={quoteattr(self.identity)} name={quoteattr(self.name)}>',
            f"<DESCRIPTION>{escape(self.description)}</DESCRIPTION>",
            *(
                f'<PARAM name="{name}" datatype="char" arraysize="*" value={quoteattr(text)}/>'
                for name, text in texts.items()
                if text
            ),
            '<GROUP name="inputParams">',
            *(item.xml() for item in self.inputs),
            "</GROUP>",
            "</RESOURCE>",
        ]


def field_id(column: str) -> str:
    """ID of the FIELD of a column to which a parameter refers."""
    return "field_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in column)
