"""Functions that PostgreSQL lacks, in its own language: pixels and regions (see ``cumbre.access.regions``)."""

from __future__ import annotations

from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

STEPS = (
    r"""
CREATE SCHEMA IF NOT EXISTS adql;

CREATE FUNCTION adql.healpix(k integer, lon float8, lat float8) RETURNS bigint
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    nside bigint := 1::bigint << k;
    z float8 := sin(radians(lat));
    tt float8 := (lon - 360 * floor(lon / 360)) / 90;
    jp bigint; jm bigint; ifp bigint; ifm bigint; face bigint; ix bigint; iy bigint; tmp float8; ntt bigint;
BEGIN
    IF lat < -90 OR lat > 90 OR lon = 'NaN' OR lat = 'NaN' OR abs(lon) = 'Infinity' THEN RETURN NULL; END IF;
    IF abs(z) <= 2.0 / 3.0 THEN
        jp := floor(nside * (0.5 + tt) - nside * z * 0.75);
        jm := floor(nside * (0.5 + tt) + nside * z * 0.75);
        ifp := jp >> k; ifm := jm >> k;
        IF ifp = ifm THEN face := (ifp & 3) | 4;
        ELSIF ifp < ifm THEN face := ifp & 3;
        ELSE face := (ifm & 3) + 8; END IF;
        ix := jm & (nside - 1);
        iy := nside - (jp & (nside - 1)) - 1;
    ELSE
        ntt := least(3, floor(tt)::bigint);
        tmp := nside * cos(radians(lat)) / sqrt((1 + abs(z)) / 3);
        jp := least(nside - 1, floor((tt - ntt) * tmp)::bigint);
        jm := least(nside - 1, floor((1 - (tt - ntt)) * tmp)::bigint);
        IF z >= 0 THEN face := ntt; ix := nside - jm - 1; iy := nside - jp - 1;
        ELSE face := ntt + 8; ix := jp; iy := jm; END IF;
    END IF;
    RETURN (face << (2 * k)) + adql.spread(ix) + (adql.spread(iy) << 1);
END $$;

CREATE FUNCTION adql.spread(v bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE x bigint := v;
BEGIN
    x := (x | (x << 16)) & x'0000FFFF0000FFFF'::bigint;
    x := (x | (x << 8)) & x'00FF00FF00FF00FF'::bigint;
    x := (x | (x << 4)) & x'0F0F0F0F0F0F0F0F'::bigint;
    x := (x | (x << 2)) & x'3333333333333333'::bigint;
    RETURN (x | (x << 1)) & x'5555555555555555'::bigint;
END $$;

CREATE FUNCTION adql.distance(a float8[], b float8[]) RETURNS float8
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT degrees(2 * asin(sqrt(least(1.0, power(sin(radians(a[2] - b[2]) / 2), 2)
        + cos(radians(a[2])) * cos(radians(b[2])) * power(sin(radians(a[1] - b[1]) / 2), 2)))));
$$;

CREATE FUNCTION adql.dot(a float8[], b float8[]) RETURNS float8
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$ SELECT a[1] * b[1] + a[2] * b[2] + a[3] * b[3]; $$;

CREATE FUNCTION adql.cross(a float8[], b float8[]) RETURNS float8[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT ARRAY[a[2] * b[3] - a[3] * b[2], a[3] * b[1] - a[1] * b[3], a[1] * b[2] - a[2] * b[1]];
$$;

CREATE FUNCTION adql.vector(lon float8, lat float8) RETURNS float8[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT ARRAY[cos(radians(lat)) * cos(radians(lon)), cos(radians(lat)) * sin(radians(lon)), sin(radians(lat))];
$$;

CREATE FUNCTION adql.corners(p float8[]) RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE w float8[] := '{}';
BEGIN
    FOR i IN 1 .. array_length(p, 1) / 2 LOOP
        w := w || ARRAY[adql.vector(p[2 * i - 1], p[2 * i])];
    END LOOP;
    RETURN w;
END $$;

CREATE FUNCTION adql.corner(c float8[], i integer) RETURNS float8[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT ARRAY[c[1 + (i - 1) % array_length(c, 1)][1], c[1 + (i - 1) % array_length(c, 1)][2],
                 c[1 + (i - 1) % array_length(c, 1)][3]];
$$;

CREATE FUNCTION adql.middle(c float8[]) RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE x float8 := 0; y float8 := 0; z float8 := 0; n float8;
BEGIN
    FOR i IN 1 .. array_length(c, 1) LOOP x := x + c[i][1]; y := y + c[i][2]; z := z + c[i][3]; END LOOP;
    n := sqrt(x * x + y * y + z * z);
    IF n = 0 THEN n := 1; END IF;
    RETURN ARRAY[x / n, y / n, z / n];
END $$;

CREATE FUNCTION adql.in_polygon(v float8[], c float8[]) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    m float8[] := adql.middle(c);
    east float8[]; north float8[]; x float8; y float8; d float8; inside boolean := false;
    px float8; py float8; hx float8; hy float8; n integer := array_length(c, 1); w float8[];
BEGIN
    d := adql.dot(v, m);
    IF d <= 0 THEN RETURN false; END IF;
    east := adql.cross(CASE WHEN abs(m[3]) < 0.9 THEN ARRAY[0, 0, 1]::float8[] ELSE ARRAY[1, 0, 0]::float8[] END, m);
    north := adql.cross(m, east);
    x := adql.dot(v, east) / d; y := adql.dot(v, north) / d;
    w := adql.corner(c, n); d := adql.dot(w, m);
    px := adql.dot(w, east) / d; py := adql.dot(w, north) / d;
    FOR i IN 1 .. n LOOP
        w := adql.corner(c, i); d := adql.dot(w, m);
        hx := adql.dot(w, east) / d; hy := adql.dot(w, north) / d;
        IF (hy > y) <> (py > y) THEN
            IF x < (px - hx) * (y - hy) / (py - hy) + hx THEN inside := NOT inside; END IF;
        END IF;
        px := hx; py := hy;
    END LOOP;
    RETURN inside;
END $$;

CREATE FUNCTION adql.angle(a float8[], b float8[]) RETURNS float8
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE n float8[] := adql.cross(a, b);
BEGIN RETURN atan2(sqrt(adql.dot(n, n)), adql.dot(a, b)); END $$;

CREATE FUNCTION adql.edge_distance(v float8[], c float8[]) RETURNS float8
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE nearest float8 := pi(); a float8[]; b float8[]; n float8[]; l float8; f float8;
BEGIN
    FOR i IN 1 .. array_length(c, 1) LOOP
        a := adql.corner(c, i); b := adql.corner(c, i + 1); n := adql.cross(a, b); l := sqrt(adql.dot(n, n));
        IF l > 0 AND adql.dot(adql.cross(n, a), v) >= 0 AND adql.dot(adql.cross(b, n), v) >= 0 THEN
            f := abs(asin(greatest(-1, least(1, adql.dot(v, n) / l))));
        ELSE
            f := least(adql.angle(v, a), adql.angle(v, b));
        END IF;
        nearest := least(nearest, f);
    END LOOP;
    RETURN degrees(nearest);
END $$;

CREATE FUNCTION adql.edges_cross(p float8[], q float8[]) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    a float8[]; b float8[]; c float8[]; d float8[]; ab float8[]; cd float8[];
    s1 float8; s2 float8; s3 float8; s4 float8;
BEGIN
    FOR i IN 1 .. array_length(p, 1) LOOP
        a := adql.corner(p, i); b := adql.corner(p, i + 1); ab := adql.cross(a, b);
        FOR k IN 1 .. array_length(q, 1) LOOP
            c := adql.corner(q, k); d := adql.corner(q, k + 1); cd := adql.cross(c, d);
            s1 := -adql.dot(ab, c); s2 := adql.dot(ab, d); s3 := -adql.dot(cd, b); s4 := adql.dot(cd, a);
            IF (s1 > 0 AND s2 > 0 AND s3 > 0 AND s4 > 0) OR (s1 < 0 AND s2 < 0 AND s3 < 0 AND s4 < 0) THEN
                RETURN true;
            END IF;
        END LOOP;
    END LOOP;
    RETURN false;
END $$;

CREATE FUNCTION adql.all_inside(p float8[], q float8[], want boolean) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN  -- want: whether all corners of p are in q; not want: whether one is
    FOR i IN 1 .. array_length(p, 1) LOOP
        IF adql.in_polygon(adql.corner(p, i), q) <> want THEN RETURN NOT want; END IF;
    END LOOP;
    RETURN want;
END $$;

CREATE FUNCTION adql.contains(one text, a float8[], other text, b float8[]) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE v float8[]; p float8[]; q float8[];
BEGIN
    IF one = 'point' THEN
        IF other = 'point' THEN RETURN adql.distance(a, b) = 0; END IF;
        IF other = 'circle' THEN RETURN adql.distance(a, b) <= b[3]; END IF;
        RETURN adql.in_polygon(adql.vector(a[1], a[2]), adql.corners(b));
    END IF;
    IF other = 'point' THEN RETURN false; END IF;
    IF one = 'circle' THEN
        IF other = 'circle' THEN RETURN adql.distance(a, b) + a[3] <= b[3]; END IF;
        v := adql.vector(a[1], a[2]); q := adql.corners(b);
        RETURN adql.in_polygon(v, q) AND adql.edge_distance(v, q) >= a[3];
    END IF;
    IF other = 'circle' THEN
        FOR i IN 1 .. array_length(a, 1) / 2 LOOP
            IF adql.distance(a[2 * i - 1 : 2 * i], b) > b[3] THEN RETURN false; END IF;
        END LOOP;
        RETURN true;
    END IF;
    p := adql.corners(a); q := adql.corners(b);
    RETURN adql.all_inside(p, q, true) AND NOT adql.edges_cross(p, q);
END $$;

CREATE FUNCTION adql.intersects(one text, a float8[], other text, b float8[]) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE v float8[]; p float8[]; q float8[];
BEGIN
    IF one = 'point' THEN RETURN adql.contains(one, a, other, b); END IF;
    IF other = 'point' THEN RETURN adql.contains(other, b, one, a); END IF;
    IF one = 'circle' AND other = 'circle' THEN RETURN adql.distance(a, b) <= a[3] + b[3]; END IF;
    IF one = 'circle' THEN
        v := adql.vector(a[1], a[2]); q := adql.corners(b);
        RETURN adql.in_polygon(v, q) OR adql.edge_distance(v, q) <= a[3];
    END IF;
    IF other = 'circle' THEN RETURN adql.intersects(other, b, one, a); END IF;
    p := adql.corners(a); q := adql.corners(b);
    RETURN NOT adql.all_inside(p, q, false) OR NOT adql.all_inside(q, p, false) OR adql.edges_cross(p, q);
END $$;

CREATE FUNCTION adql.area(shape text, a float8[]) RETURNS float8
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE c float8[]; total float8 := 0; u float8[]; v float8[]; w float8[];
BEGIN
    IF shape = 'point' THEN RETURN 0; END IF;
    IF shape = 'circle' THEN
        RETURN 2 * pi() * (1 - cos(radians(least(greatest(a[3], 0), 180)))) * power(180 / pi(), 2);
    END IF;
    c := adql.corners(a); u := adql.corner(c, 1);
    FOR i IN 2 .. array_length(c, 1) - 1 LOOP
        v := adql.corner(c, i); w := adql.corner(c, i + 1);
        total := total + 2 * atan2(adql.dot(u, adql.cross(v, w)), 1 + adql.dot(u, v) + adql.dot(v, w) + adql.dot(w, u));
    END LOOP;
    RETURN abs(total) * power(180 / pi(), 2);
END $$;

CREATE FUNCTION adql.centroid(a float8[]) RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    c float8[] := adql.corners(a); m float8[] := adql.middle(c); s float8[] := ARRAY[0, 0, 0]::float8[];
    p float8[]; q float8[]; n float8[]; l float8; f float8; lon float8;
BEGIN
    FOR i IN 1 .. array_length(c, 1) LOOP
        p := adql.corner(c, i); q := adql.corner(c, i + 1); n := adql.cross(p, q); l := sqrt(adql.dot(n, n));
        IF l > 0 THEN
            f := atan2(l, adql.dot(p, q)) / l;
            s := ARRAY[s[1] + f * n[1], s[2] + f * n[2], s[3] + f * n[3]];
        END IF;
    END LOOP;
    IF adql.dot(s, m) < 0 THEN s := ARRAY[-s[1], -s[2], -s[3]]; END IF;
    IF s[1] = 0 AND s[2] = 0 AND s[3] = 0 THEN s := m; END IF;
    lon := degrees(atan2(s[2], s[1]));
    RETURN ARRAY[lon - 360 * floor(lon / 360), degrees(atan2(s[3], sqrt(s[1] * s[1] + s[2] * s[2])))];
END $$;
""",
    r"""
CREATE FUNCTION adql.region_key(a float8[]) RETURNS int8range
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE c float8[]; m float8[]; reach float8 := 0; size integer; k bigint;
BEGIN
    IF array_length(a, 1) IS NULL OR array_length(a, 1) < 6 OR array_length(a, 1) % 2 = 1
        OR array_position(a, NULL) IS NOT NULL OR '{Infinity,-Infinity}'::float8[] && a THEN RETURN NULL; END IF;
    c := adql.corners(a); m := adql.middle(c);
    FOR i IN 1 .. array_length(c, 1) LOOP
        reach := greatest(reach, degrees(adql.angle(adql.corner(c, i), m)));
    END LOOP;
    reach := reach * (1 + 1e-9);
    IF reach > 64 THEN size := 19;
    ELSE size := greatest(0, ceil(12 + ln(greatest(reach, 1e-9)) / ln(2))::integer); END IF;
    k := (size::bigint << 56)
        + adql.healpix(26, degrees(atan2(m[2], m[1])), degrees(asin(greatest(-1, least(1, m[3])))));
    RETURN CASE WHEN k IS NOT NULL THEN int8range(k, k, '[]') END;
END $$;

-- all_inside(p, q, false) is true when a corner of p is in q: the first version took it for the opposite
CREATE OR REPLACE FUNCTION adql.intersects(one text, a float8[], other text, b float8[]) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE v float8[]; p float8[]; q float8[];
BEGIN
    IF one = 'point' THEN RETURN adql.contains(one, a, other, b); END IF;
    IF other = 'point' THEN RETURN adql.contains(other, b, one, a); END IF;
    IF one = 'circle' AND other = 'circle' THEN RETURN adql.distance(a, b) <= a[3] + b[3]; END IF;
    IF one = 'circle' THEN
        v := adql.vector(a[1], a[2]); q := adql.corners(b);
        RETURN adql.in_polygon(v, q) OR adql.edge_distance(v, q) <= a[3];
    END IF;
    IF other = 'circle' THEN RETURN adql.intersects(other, b, one, a); END IF;
    p := adql.corners(a); q := adql.corners(b);
    RETURN adql.all_inside(p, q, false) OR adql.all_inside(q, p, false) OR adql.edges_cross(p, q);
END $$;
""",
)
"""``region_key`` is a polygon's size (the power of two of degrees, plus 12, that its corners are from its middle, 19
beyond 64 degrees) and the order-26 pixel of its middle, as a range of one number: a GiST index on it finds regions by place, see
:func:`cumbre.access.pixels.region_key_ranges`."""


def prepare(database: Database) -> None:
    """Make the functions, or bring them to this program's version."""
    migrate(database, "adql", STEPS)
