"""Functions and operators: types checked, SQL of the engine made."""

from __future__ import annotations

from dataclasses import replace

from cumbre.access.adql.dialect import Dialect
from cumbre.access.adql.values import RANKS, Value, merged
from cumbre.access.tables import Column

LONG = Column("", "long")
DOUBLE = Column("", "double")
TEXT = Column("", "char", "*")
BOOLEAN = Column("", "boolean")


class TypeMismatchError(ValueError):
    """A value of the wrong type; ``remedy`` says what to do."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def make(sql: str, column: Column, *parts: Value) -> Value:
    """A value made of others."""
    relations, aggregate = merged(parts)
    return Value(sql, column, relations=relations, aggregate=aggregate)


def common_type(values: list[Value]) -> Column:
    """Type that holds all of them.

    Raises
    ------
    TypeMismatchError
        Numbers among texts, and such.
    """
    known = [value for value in values if not value.null]
    if not known:
        return TEXT
    first = known[0].column
    if all(value.numeric for value in known):
        best = max((value.column for value in known), key=lambda column: RANKS[column.datatype])
        if best.datatype == "float" and any(RANKS[v.column.datatype] in (2, 3) for v in known):
            best = replace(best, datatype="double")
        units = {value.column.unit for value in known if value.constant is None}
        return Column("", best.datatype, unit=units.pop() if len(units) == 1 else "", ucd=first.ucd)
    if all(value.string for value in known):
        wide = any(value.column.datatype == "unicodeChar" for value in known)
        xtype = first.xtype if len({v.column.xtype for v in known}) == 1 else ""
        return replace(TEXT, datatype="unicodeChar" if wide else "char", xtype=xtype)
    if all(value.boolean for value in known):
        return BOOLEAN
    if all((v.column.datatype, v.column.xtype) == (first.datatype, first.xtype) for v in known):
        return replace(first, name="")
    kinds = " and ".join(dict.fromkeys(value.kind for value in known))
    raise TypeMismatchError(f"{kinds} do not go together", "CAST one of them")


def as_type(dialect: Dialect, value: Value, column: Column) -> str:
    """SQL of a value in a type that holds it."""
    if value.column.datatype == column.datatype and value.column.arraysize == column.arraysize:
        return value.sql
    if value.string and column.datatype in ("char", "unicodeChar"):
        return value.sql
    return f"CAST({value.sql} AS {dialect.type_of(column)})"


def number(dialect: Dialect, value: Value) -> Value:
    """A value that must be a number (true and false are 1 and 0).

    Raises
    ------
    TypeMismatchError
        It is text, a geometry or an array.
    """
    if value.numeric or value.null:
        return value
    if value.boolean:
        return make(dialect.cast(value.sql, "int"), Column("", "int"), value)
    raise TypeMismatchError(f"{value.kind} where a number is expected", "CAST(… AS DOUBLE PRECISION)")


def arithmetic(dialect: Dialect, operator: str, left: Value, right: Value) -> Value:
    """``+ - * /`` of numbers; whole numbers stay whole."""
    left, right = number(dialect, left), number(dialect, right)
    integer = left.integer and right.integer
    a, b = (
        (as_type(dialect, value, LONG) if integer else dialect.double(value.sql)) for value in (left, right)
    )
    if operator == "/":
        sql = dialect.divide(a, b, integer=integer)
    else:
        sql = f"({a} {operator} {b})"
    unit = _unit(operator, left, right)
    made = make(sql, Column("", "long" if integer else "double", unit=unit), left, right)
    if left.constant is not None and right.constant is not None:
        return replace(made, constant=_fold(operator, left.constant, right.constant, integer=integer))
    return made


def _fold(operator: str, a: float, b: float, *, integer: bool) -> float | None:
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    if b == 0:
        return None
    if integer:
        whole = abs(int(a)) // abs(int(b))
        return float(whole if (a < 0) == (b < 0) else -whole)
    return a / b


def _unit(operator: str, left: Value, right: Value) -> str:
    one, other = left.column.unit, right.column.unit
    if operator in "+-":
        return (
            one
            if one == other or right.constant is not None
            else (other if left.constant is not None else "")
        )
    if right.constant is not None:
        return one
    return other if operator == "*" and left.constant is not None else ""


def negative(dialect: Dialect, operator: str, value: Value) -> Value:
    """A sign."""
    value = number(dialect, value)
    if operator == "+":
        return value
    column = replace(value.column, name="", ucd=value.column.ucd)
    made = make(f"(- {value.sql})", column, value)
    return replace(made, constant=None if value.constant is None else -value.constant)


def _text(*values: Value) -> Column:
    """Text as wide as what it is made of."""
    wide = any(value.column.datatype == "unicodeChar" for value in values)
    return replace(TEXT, datatype="unicodeChar") if wide else TEXT


def concatenate(dialect: Dialect, left: Value, right: Value) -> Value:
    """``||``: numbers as text."""
    parts = []
    for value in (left, right):
        if value.column.arraysize is not None and not value.string:
            raise TypeMismatchError(f"{value.kind} cannot be joined to text")
        parts.append(value.sql if value.string else dialect.cast(value.sql, "char"))
    return make(f"({parts[0]} || {parts[1]})", _text(left, right), left, right)


def comparison(dialect: Dialect, operator: str, left: Value, right: Value) -> str:
    """SQL of a comparison.

    Raises
    ------
    TypeMismatchError
        Values that cannot be compared.
    """
    if left.boolean != right.boolean and not (left.null or right.null):
        left, right = _truths(dialect, left, right)
    if not (left.null or right.null):
        same = (
            (left.numeric and right.numeric)
            or (left.string and right.string)
            or (left.boolean and right.boolean)
        )
        if not same:
            text = left.kind == "text" or right.kind == "text"
            raise TypeMismatchError(
                f"{left.kind} compared with {right.kind}", "CAST one of them" if text else ""
            )
    return f"({left.sql} {operator} {right.sql})"


def _truths(dialect: Dialect, left: Value, right: Value) -> tuple[Value, Value]:
    """True and false compared with 1, 0, 'true', 'false'."""
    truth, other = (left, right) if left.boolean else (right, left)
    if other.text is not None and other.text.strip().lower() in ("true", "false", "t", "f", "1", "0"):
        sql = "TRUE" if other.text.strip().lower() in ("true", "t", "1") else "FALSE"
        other = make(sql, BOOLEAN)
    elif other.numeric:
        truth = number(dialect, truth)
    return (truth, other) if left.boolean else (other, truth)


def aggregate(dialect: Dialect, name: str, value: Value | None, *, distinct: bool) -> Value:
    """An aggregate; COUNT(*) without a value."""
    if value is None:
        return replace(make("COUNT(*)", Column("count", "long", ucd="meta.number")), aggregate=True)
    if value.aggregate:
        raise TypeMismatchError(f"{name} of an aggregate", "compute the inner one in a query in FROM")
    word = "DISTINCT " if distinct else ""
    if name == "COUNT":
        made = make(f"COUNT({word}{value.sql})", Column("count", "long", ucd="meta.number"), value)
    elif name in ("MIN", "MAX"):
        if value.boolean or not (value.numeric or value.string):
            raise TypeMismatchError(f"{name} of {value.kind}", "it takes numbers or text")
        ucd = f"stat.{name.lower()};{value.column.ucd}" if value.column.ucd else ""
        made = make(
            f"{name}({value.sql})", replace(value.column, name=name.lower(), ucd=ucd, utype=""), value
        )
    else:
        value = number(dialect, value)
        column = Column(name.lower(), "double", unit=value.column.unit)
        plain = dialect.double(value.sql)
        if name == "SUM" and value.integer:
            sql = dialect.cast(f"SUM({word}{value.sql})", "long")
            column = replace(column, datatype="long")
        elif name == "MEDIAN":
            sql = dialect.median(value.sql)
        elif name == "STDDEV":
            sql = f"STDDEV_SAMP({plain})"
        else:
            sql = f"{name}({word}{plain})"
        made = make(sql, column, value)
    return replace(made, aggregate=True)


_PLAIN = {
    "ACOS": "rad", "ASIN": "rad", "ATAN": "rad", "COS": "", "COT": "", "SIN": "", "TAN": "", "EXP": "",
    "SQRT": "", "DEGREES": "deg", "RADIANS": "rad",
}  # fmt: skip


def scalar(dialect: Dialect, name: str, values: list[Value]) -> Value:
    """A function of numbers."""
    values = [number(dialect, value) for value in values]
    column = Column(name.lower(), "double")
    plain = [dialect.double(value.sql) for value in values]
    if name in _PLAIN:
        return make(f"{name.lower()}({plain[0]})", replace(column, unit=_PLAIN[name]), *values)
    if name == "ABS":
        made = make(f"abs({values[0].sql})", replace(values[0].column, name="abs", utype=""), *values)
        constant = values[0].constant
        return replace(made, constant=None if constant is None else abs(constant))
    same = replace(column, unit=values[0].column.unit) if values else column
    if name == "CEILING":
        return make(f"ceil({plain[0]})", same, *values)
    if name == "FLOOR":
        return make(f"floor({plain[0]})", same, *values)
    if name == "SIGN":
        return make(dialect.double(f"sign({plain[0]})"), column, *values)
    if name in ("ROUND", "TRUNCATE"):
        cut = dialect.round if name == "ROUND" else dialect.truncate
        return make(cut(values[0].sql, values[1].sql if len(values) > 1 else None), same, *values)
    if name in ("LOG", "LOG10"):
        function = {"LOG": "ln", "LOG10": "log10"}[name]
        return make(dialect.logarithm(function, values[0].sql), column, *values)
    if name == "MOD":
        integer = values[0].integer and values[1].integer
        a, b = (as_type(dialect, v, LONG) for v in values) if integer else plain
        return make(
            dialect.mod(a, b, integer=integer),
            replace(same, datatype="long" if integer else "double"),
            *values,
        )
    if name == "PI":
        return replace(make("pi()", column), constant=3.141592653589793)
    if name == "RAND":
        return make("random()", column)
    return make(f"{name.lower()}({', '.join(plain)})", column, *values)  # POWER, ATAN2


def cast(dialect: Dialect, value: Value, kind: str, size: int | None) -> Value:
    """CAST to anything but a geometry."""
    names = {
        "SMALLINT": "short", "INTEGER": "int", "BIGINT": "long", "REAL": "float", "DOUBLE PRECISION": "double",
    }  # fmt: skip
    if kind == "TIMESTAMP":
        if not (value.string or value.null):
            raise TypeMismatchError(
                f"CAST of {value.kind} to TIMESTAMP", "it takes text like 2026-11-21T01:02:03"
            )
        return make(dialect.timestamp(value.sql), Column("", "char", "*", "timestamp"), value)
    if kind in ("CHAR", "VARCHAR"):
        sql = value.sql if value.string else dialect.cast(value.sql, "char")
        if size is not None:
            sql = f"left({sql}, {size})"
        return make(sql, replace(_text(value), arraysize=f"{size}*" if size else "*"), value)
    if not (value.numeric or value.boolean or value.string or value.null):
        raise TypeMismatchError(f"CAST of {value.kind} to {kind}")
    target = names[kind]
    sql = value.sql
    if target in ("short", "int", "long") and value.numeric and not value.integer:
        sql = f"trunc({dialect.double(sql)})"
    if value.boolean and target not in ("int",):
        sql = dialect.cast(sql, "int")
    made = make(dialect.cast(sql, target), Column("", target, unit=value.column.unit), value)
    if value.constant is None:
        return made
    return replace(
        made, constant=float(int(value.constant)) if target in ("short", "int", "long") else value.constant
    )


def in_unit(dialect: Dialect, value: Value, unit: str) -> Value:
    """A number in another unit.

    Raises
    ------
    TypeMismatchError
        The unit is not known, or the two do not fit.
    """
    from astropy import units

    value = number(dialect, value)
    if not value.column.unit:
        raise TypeMismatchError("IN_UNIT of a value whose unit is not known", "give it a column with a unit")
    try:
        factor = units.Unit(value.column.unit).to(units.Unit(unit))
    except (ValueError, TypeError, units.UnitConversionError) as error:
        raise TypeMismatchError(
            f"IN_UNIT from {value.column.unit} to {unit}: {' '.join(str(error).split())}"
        ) from error
    sql = f"({dialect.double(value.sql)} * {dialect.number(float(factor))})"
    return make(sql, Column("in_unit", "double", unit=unit, ucd=value.column.ucd), value)
