<?xml version="1.0"?>
<!-- The catalogue of "cumbre benchmark access" in GAVO DaCHS, to be measured beside ours with its option "peer".

Debian has the server: apt install gavodachs2-server. The sky extension of Debian 12 needs one change for the security
releases of its PostgreSQL: take COMMUTATOR and NEGATOR out of the two operators "@ (bigint|spoint, smoc)" in
pg_sphere's SQL script. Then, with WORK of the benchmark's option "work" and ROWS of "rows":

  mkdir /var/gavo/inputs/cat; cp dachs.rd /var/gavo/inputs/cat/q.rd; dachs imp /var/gavo/inputs/cat/q.rd import
  python -c "import pyarrow.parquet as p, pyarrow.csv as c; t = p.read_table('WORK/object-ROWS.parquet');
             i = t.schema.get_field_index('extended'); t = t.set_column(i, 'extended', t['extended'].cast('int16'));
             c.write_csv(t, 'object.csv', c.WriteOptions(include_header=False))"
  (in [web] of /etc/gavo.rc: maxSyncUploadSize: 20000000)
  psql gavo -c "\copy cat.object from 'object.csv' csv" -c "cluster cat.object" -c "analyze cat.object"
  dachs imp -m /var/gavo/inputs/cat/q.rd; dachs serve debug
  cumbre benchmark access -work WORK -rows ROWS -peer http://127.0.0.1:8080/tap     (each option with two dashes)
-->
<resource schema="cat" resdir="cat">
  <meta name="title">Benchmark catalogue</meta>
  <meta name="description">Benchmark catalogue</meta>
  <meta name="creationDate">2026-11-21T00:00:00Z</meta>
  <meta name="subject">catalogs</meta>
  <meta name="creator">Bench</meta>
  <table id="object" onDisk="True" adql="True" mixin="//scs#q3cindex" primary="objectid">
    <column name="objectid" type="bigint" ucd="meta.id;meta.main" required="True"/>
    <column name="ra" type="double precision" unit="deg" ucd="pos.eq.ra;meta.main"/>
    <column name="dec" type="double precision" unit="deg" ucd="pos.eq.dec;meta.main"/>
    <column name="hpx29" type="bigint" required="True"/>
    <column name="u_mag" unit="mag"/><column name="g_mag" unit="mag"/><column name="r_mag" unit="mag"/>
    <column name="i_mag" unit="mag"/><column name="z_mag" unit="mag"/><column name="y_mag" unit="mag"/>
    <column name="pm_ra" type="double precision"/><column name="pm_dec" type="double precision"/>
    <column name="visits" type="integer" required="True"/>
    <column name="extended" type="smallint" required="True"/>
  </table>
  <data id="import"><make table="object"/></data>
</resource>
