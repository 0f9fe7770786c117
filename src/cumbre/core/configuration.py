"""The site configuration: one YAML file that describes an observatory, whatever its size.

Every key has a description, and ``docs/reference/configuration.md`` is made from them; a test holds both
together. Paths are relative to the site's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cumbre.core.errors import ConfigurationError, NotFoundError
from cumbre.core.instrument import explain_validation

SITE_FILE = "site.yaml"
CLOCK_FILE = "clock.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Observatory(_Model):
    """Where the telescope stands."""

    name: Annotated[str, Field(description="Name shown on pages and written to headers.")] = "Cumbre"
    latitude_deg: Annotated[float, Field(ge=-90, le=90, description="Geodetic latitude, north positive.")]
    longitude_deg: Annotated[float, Field(ge=-180, le=360, description="Longitude, east positive.")]
    elevation_m: Annotated[float, Field(ge=-500, le=9000, description="Height above the ellipsoid.")] = 0.0


class Place(_Model):
    """One data centre of the observatory."""

    raw: Annotated[str, Field(description="Raw cache: a folder.")]
    tape: Annotated[
        str | None,
        Field(
            description="Write-once tape: folder (mounted tape, disk) or s3://bucket/prefix; null for none."
        ),
    ] = None
    tape_volume_mb: Annotated[
        float, Field(gt=0, le=5000, description="Size at which a volume is closed.")
    ] = 4096.0
    tape_close_s: Annotated[
        float, Field(gt=0, description="Night time after which a volume for a bucket is closed and uploaded.")
    ] = 900.0
    tape_lock_days: Annotated[
        float | None,
        Field(gt=0, description="Object lock of uploaded volumes; null leaves it to the bucket."),
    ] = None
    repository: Annotated[str | None, Field(description="Butler repository; null for none.")] = None
    buffer: Annotated[
        str | list[str] | None,
        Field(
            description="Network outage buffer in front of the link: one folder, or two on different disks."
        ),
    ] = None
    buffer_gb: Annotated[
        float | None, Field(gt=0, description="Most that the outage buffer may hold; null for no limit.")
    ] = None
    listen: Annotated[
        str | None,
        Field(
            description="host:port of the first distributor, the others count up; 0 lets the system choose."
        ),
    ] = None
    certificate_name: Annotated[
        str | None, Field(description="Name of the place in its certificate; null: the place's own name.")
    ] = None

    @property
    def buffers(self) -> list[str]:
        """Folders of the outage buffer, each on a store of its own."""
        if isinstance(self.buffer, str):
            return [self.buffer]
        return self.buffer or []


class Link(_Model):
    """A network link between two places; latency, bandwidth and outages are simulated when given."""

    source: Annotated[str, Field(description="Place that sends.")]
    target: Annotated[str, Field(description="Place that receives.")]
    latency_ms: Annotated[float, Field(ge=0, description="Simulated one-way latency; 0 for none.")] = 0.0
    bandwidth_mbit_s: Annotated[float | None, Field(gt=0, description="Simulated bandwidth; null = all.")] = (
        None
    )
    pairs: Annotated[int, Field(ge=1, le=64, description="Replicator and distributor pairs.")] = 2
    connections: Annotated[int, Field(ge=1, le=64, description="Transfers in parallel, of each pair.")] = 2
    addresses: Annotated[
        list[str],
        Field(description="host:port of each pair's distributor; empty: they run in this site's folder."),
    ] = []
    timeout_s: Annotated[float, Field(gt=0, description="Deadline of one try of a file, real seconds.")] = (
        30.0
    )
    expected_s: Annotated[
        float, Field(gt=0, description="A job that takes longer, real seconds, makes its pair local-only.")
    ] = 20.0
    retries: Annotated[int, Field(ge=0, description="Tries of a job's file after the first.")] = 5
    compression: Annotated[
        Literal["none", "zstd"], Field(description="On the wire, for files that become smaller.")
    ] = "none"


class Capture(_Model):
    """The image writer's nodes, which divide the detectors of each image among them."""

    writers: Annotated[int, Field(ge=1, le=64, description="Nodes at work.")] = 2
    spares: Annotated[
        int, Field(ge=0, le=64, description="Further nodes that work only in the place of a silent one.")
    ] = 0
    silence_s: Annotated[
        float, Field(gt=0, description="Real seconds after which a silent node's detectors go to the others.")
    ] = 3.0


class Archive(_Model):
    """How archiving is led."""

    control: Annotated[
        bool,
        Field(description="Replicators send what the control system's jobs say; false: all that is written."),
    ] = False


class Control(_Model):
    """The control systems and who may command their entities."""

    start: Annotated[
        dict[str, str],
        Field(description="Entity: configuration. What control itself enables after a cold boot."),
    ] = {}
    commanders: Annotated[
        dict[str, list[str]],
        Field(
            description="`Entity.command`, `Entity` or `*`: identities (patterns) that may command; the most "
            "special key counts. People are user@host, services have the name of their role."
        ),
    ] = {"*": ["*@*", "control-*"]}
    software: Annotated[
        Literal["installed", "accepted"],
        Field(
            description="Software that may run: what is installed, or only versions accepted with "
            "`cumbre doctor --accept-software`."
        ),
    ] = "installed"
    lease_s: Annotated[
        float, Field(gt=0.5, le=60, description="Real seconds of silence until the spare takes over.")
    ] = 4.0


class Tls(_Model):
    """Certificates of the links; ``{place}`` in a path stands for the name of a place."""

    authority: Annotated[str, Field(description="Certificate of the authority that all places trust.")] = (
        "certificates/ca.crt"
    )
    certificate: Annotated[str, Field(description="Certificate that a place shows.")] = (
        "certificates/{place}.crt"
    )
    key: Annotated[str, Field(description="Its private key, readable for nobody else.")] = (
        "certificates/{place}.key"
    )


class Overload(_Model):
    """What happens when prompt workers fall behind; without a value nothing is left out."""

    spare_workers: Annotated[
        int, Field(ge=0, description="Further worker processes that take images while the others are behind.")
    ] = 0
    spare_cluster: Annotated[
        str | None, Field(description="Address of a Dask scheduler as the spare pool, in their place.")
    ] = None
    behind: Annotated[
        float, Field(gt=0, description="Waiting detector images per worker that mean the workers are behind.")
    ] = 2.0
    sampling: Annotated[
        float, Field(ge=0, le=1, description="Part of the visits that is taken up while behind.")
    ] = 1.0
    drop_above: Annotated[
        int | None,
        Field(
            ge=1,
            description="Most detector images that may wait; the oldest beyond are dropped; null for all.",
        ),
    ] = None
    kill_after_s: Annotated[
        float | None,
        Field(
            gt=0,
            description="Night time beyond `deadline_s` after which a job is ended, or not begun; null for never.",
        ),
    ] = None


class Missed(_Model):
    """Images that prompt processing could not do in time: they are done later."""

    when: Annotated[
        Literal["idle", "daytime", "command"],
        Field(
            description="When workers do them: as soon as no visit needs them, in the mode `daytime` only, or "
            "never (`cumbre process-missed` does)."
        ),
    ] = "idle"
    alerts: Annotated[bool, Field(description="Whether alerts of late work are published.")] = True
    attempts: Annotated[int, Field(ge=1, description="Tries of each.")] = 3
    catch_up_workers: Annotated[
        int,
        Field(
            ge=0, description="Worker processes of a pool for nothing but this, at low priority; 0 for none."
        ),
    ] = 0


class Prompt(_Model):
    """Prompt processing."""

    workers: Annotated[int, Field(ge=1, description="Worker processes of the local cluster.")] = 2
    cluster: Annotated[str | None, Field(description="Address of a Dask scheduler; null starts one.")] = None
    deadline_s: Annotated[float, Field(gt=0, description="Required latency, readout to alerts.")] = 60.0
    image_timeout_s: Annotated[float, Field(gt=0, description="Wait for an image after its nextVisit.")] = (
        180.0
    )
    detection_sigma: Annotated[float, Field(gt=0, description="Threshold on the difference image.")] = 5.0
    difference: Annotated[
        Literal["alard_lupton", "zogy"],
        Field(
            description="How images are subtracted: by a fitted kernel, or both filtered by their PSFs and noise."
        ),
    ] = "alard_lupton"
    reliability: Annotated[float, Field(ge=0, le=1, description="Least score of a published alert.")] = 0.5
    retries: Annotated[int, Field(ge=0, description="Tries after the first, before anything is stored.")] = 2
    injection_fraction: Annotated[
        float, Field(ge=0, le=1, description="Part of the visits that carry fake sources, for completeness.")
    ] = 0.0
    images: Annotated[
        Literal["path", "distributor"],
        Field(
            description="Where workers get images: from the archive's raw cache, or by asking its distributors."
        ),
    ] = "path"
    overload: Annotated[Overload, Field(description="Workers that fall behind.")] = Overload()
    missed: Annotated[Missed, Field(description="Images left for later.")] = Missed()
    precovery_days: Annotated[
        float,
        Field(
            ge=0,
            description="How far back new objects are measured by day (in the mode `daytime`); 0 leaves it to "
            "`cumbre precover`.",
        ),
    ] = 30.0


class CatchUp(_Model):
    """The Catch-Up Archiver: images that did not go the usual way."""

    grace_s: Annotated[
        float, Field(ge=0, description="Night time after readout before an image is taken up.")
    ] = 120.0
    every_s: Annotated[float, Field(gt=0, description="Real seconds between scans.")] = 10.0
    connections: Annotated[int, Field(ge=1, le=64, description="Transfers in parallel on each link.")] = 2
    bandwidth_mbit_s: Annotated[
        float | None, Field(gt=0, description="Most that it takes of each link, real time; null for all.")
    ] = None


class Retention(_Model):
    """How long caches keep what is archived; nothing unarchived is ever deleted."""

    daq_days: Annotated[float, Field(gt=0, description="Camera image store.")] = 2.0
    raw_cache_days: Annotated[float, Field(gt=0, description="Raw caches of base and archive.")] = 30.0
    summit_days: Annotated[float, Field(gt=0, description="Summit repository (OODS).")] = 7.0
    embargo_hours: Annotated[float, Field(ge=0, description="Hours before images become public.")] = 80.0
    scrub_mb_s: Annotated[
        float, Field(gt=0, description="Pace at which raw caches are read again for rotten bytes, MB/s.")
    ] = 50.0
    scrub_every_s: Annotated[
        float, Field(gt=0, description="Real seconds from the beginning of one such round to the next.")
    ] = 300.0


class Templates(_Model):
    """Which visits make a template, and for which airmasses there is one of its own."""

    airmass_edges: Annotated[
        list[float],
        Field(min_length=2, description="Limits of the ranges of airmass; each range has its own templates."),
    ] = [1.0, 1.3, 1.7, 2.5]
    fewest_visits: Annotated[int, Field(ge=1, description="No template of fewer visits.")] = 3
    most_visits: Annotated[int, Field(ge=1, le=200, description="The best ones are enough.")] = 12
    seeing_ratio: Annotated[
        float, Field(ge=1, description="Most seeing, in units of the best quarter's of the range.")
    ] = 1.4
    cloud_mag: Annotated[
        float, Field(gt=0, description="Most loss of zero point against the clearest visits of the range.")
    ] = 0.3
    background_ratio: Annotated[
        float, Field(gt=1, description="Most sky background, in units of the darkest quarter's.")
    ] = 4.0
    depth_mag: Annotated[
        float, Field(gt=0, description="Most loss of limiting magnitude against the deepest quarter.")
    ] = 1.0
    most_masked: Annotated[float, Field(gt=0, le=1, description="Most part of unusable pixels.")] = 0.3
    most_elliptical: Annotated[float, Field(gt=0, le=1, description="Most ellipticity of the PSF.")] = 0.3
    astrometry_arcsec: Annotated[
        float, Field(gt=0, description="Largest scatter of the stars about the fitted WCS.")
    ] = 0.2

    @model_validator(mode="after")
    def _edges_rise(self) -> Templates:
        if any(low >= high for low, high in zip(self.airmass_edges, self.airmass_edges[1:], strict=False)):
            raise ValueError(f"templates.airmass_edges: expected rising numbers, found {self.airmass_edges}")
        if self.fewest_visits > self.most_visits:
            raise ValueError("templates.fewest_visits: expected at most templates.most_visits")
        return self


class Scheduler(_Model):
    """What the survey wants."""

    exposure_s: Annotated[float, Field(gt=0, description="Time of each exposure of a visit.")] = 30.0
    snaps: Annotated[
        int,
        Field(
            ge=1,
            le=10,
            description="Exposures of a visit, one after the other; they are processed as one image.",
        ),
    ] = 1
    cadence_s: Annotated[float, Field(gt=0, description="Least time from visit to visit.")] = 37.0
    notice_s: Annotated[float, Field(ge=20, description="nextVisit this long before the exposure.")] = 22.0
    max_airmass: Annotated[float, Field(gt=1, description="Limit of airmass.")] = 1.8
    moon_avoidance_deg: Annotated[float, Field(ge=0, description="Least distance from the Moon.")] = 30.0
    filters: Annotated[list[str], Field(description="Bands to observe, in order of preference.")] = ["r"]
    tiles: Annotated[int, Field(ge=1, description="Number of sky tiles of the survey.")] = 3


class Simulator(_Model):
    """The simulated sky and telescope; absent at a real observatory."""

    seed: Annotated[int, Field(ge=0, description="Same seed, same night, bit for bit.")] = 1
    start: Annotated[str, Field(description="UTC start of the first night, ISO 8601.")] = (
        "2026-11-21T01:00:00"
    )
    rate: Annotated[float, Field(gt=0, description="Night seconds per real second.")] = 6.0
    star_density: Annotated[float, Field(gt=0, description="Factor on the star counts.")] = 1.0
    transients_per_detector: Annotated[float, Field(ge=0, description="Mean number of new transients.")] = 4.0
    variables_fraction: Annotated[float, Field(ge=0, le=1, description="Part of stars that vary.")] = 0.01
    asteroids_per_deg2: Annotated[float, Field(ge=0, description="Sky density of asteroids.")] = 40.0
    known_asteroids: Annotated[
        float, Field(ge=0, le=1, description="Part of them whose orbits are in the site's catalogue.")
    ] = 0.8
    template_epochs: Annotated[int, Field(ge=0, description="Earlier visits of each tile for templates.")] = 4


class Web(_Model):
    """Pages and APIs."""

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port; 0 lets the system choose.")] = 0


class QueryLimits(_Model):
    """What one query may cost; null leaves it to the limits of everybody."""

    seconds: Annotated[float | None, Field(gt=0, description="Time.")] = None
    rows: Annotated[int | None, Field(gt=0, description="Rows of the result.")] = None
    gigabytes: Annotated[
        float | None, Field(gt=0, description="Of the result, and of what is brought between engines.")
    ] = None
    memory_mb: Annotated[int | None, Field(ge=64, description="Memory of the engine.")] = None


class UserClass(_Model):
    """Limits of a group of people, in the place of those of everybody."""

    sync: Annotated[QueryLimits, Field(description="Queries answered at once.")] = QueryLimits()
    job: Annotated[QueryLimits, Field(description="Asynchronous queries.")] = QueryLimits()
    per_minute: Annotated[int | None, Field(ge=0, description="Requests a minute; 0 for none at all.")] = None


class Access(_Model):
    """Data access: queries, images, who may ask how much."""

    authority: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,60}$", description="Of data set identifiers ivo://AUTHORITY?…"),
    ] = "cumbre.local"
    sync_s: Annotated[float, Field(gt=0, description="Seconds that a query answered at once may take.")] = (
        60.0
    )
    job_s: Annotated[float, Field(gt=0, description="Seconds that an asynchronous query may take.")] = 3600.0
    rows: Annotated[int, Field(gt=0, description="Most rows of one result.")] = 20_000_000
    memory_mb: Annotated[
        int, Field(ge=64, description="Memory of one query; more is spilled or refused.")
    ] = 1024
    upload_mb: Annotated[int, Field(gt=0, description="Most megabytes of one request with uploads.")] = 64
    jobs: Annotated[int, Field(ge=1, le=64, description="Asynchronous jobs at a time.")] = 3
    job_days: Annotated[float, Field(gt=0, description="Days that jobs and their results are kept.")] = 7.0
    regenerated_gb: Annotated[
        float, Field(gt=0, description="Most gigabytes of images made again on demand that are kept.")
    ] = 20.0
    anonymous_per_minute: Annotated[
        int, Field(gt=0, description="Requests a minute of one address without a token.")
    ] = 3000
    user_per_minute: Annotated[int, Field(gt=0, description="Requests a minute of one user.")] = 12000
    classes: Annotated[
        dict[str, UserClass],
        Field(
            description="Other limits for a group, or for `anonymous` (people without a token). Of several groups the "
            "most generous limit counts."
        ),
    ] = {}
    issuer: Annotated[
        str | None, Field(description="OpenID provider for logins; null for the built-in one of one machine.")
    ] = None
    client_id: Annotated[str, Field(description="Name of this site at the provider.")] = "cumbre"
    client_secret_file: Annotated[
        str | None, Field(description="File with the secret for the provider; null for a public client.")
    ] = None
    groups_claim: Annotated[str, Field(description="Claim of identity tokens that holds groups.")] = "groups"
    groups: Annotated[
        dict[str, str],
        Field(description="Provider's group: ours. `administrators` is given by an entry here only."),
    ] = {}
    pages: Annotated[
        Literal["auto", "open", "login"],
        Field(
            description="Pages for everybody, or for those who may see embargoed images; auto: open on loopback."
        ),
    ] = "auto"
    proprietary_hours: Annotated[
        float, Field(ge=0, description="Hours for members only; the embargo when that is longer.")
    ] = 0.0


class SiteConfig(_Model):
    """The whole observatory."""

    observatory: Annotated[Observatory, Field(description="Name and place of the telescope.")]
    instruments: Annotated[
        list[str], Field(min_length=1, description="Shipped names or paths of instrument descriptions.")
    ]
    database: Annotated[str, Field(description="`embedded` or a postgresql:// URL.")] = "embedded"
    bus: Annotated[str, Field(description="`embedded` or kafka://host:port.")] = "embedded"
    places: Annotated[dict[str, Place], Field(description="summit, base, archive…")]
    links: Annotated[list[Link], Field(description="Links between places.")] = []
    tls: Annotated[
        Tls | None, Field(description="TLS with mutual authentication on the links; null for none.")
    ] = None
    scheduler: Annotated[Scheduler, Field(description="Survey and cadence.")] = Scheduler()
    prompt: Annotated[Prompt, Field(description="Prompt processing.")] = Prompt()
    templates: Annotated[Templates, Field(description="Which visits make templates.")] = Templates()
    capture: Annotated[Capture, Field(description="Image writer.")] = Capture()
    archive: Annotated[Archive, Field(description="How archiving is led.")] = Archive()
    control: Annotated[Control, Field(description="Control systems.")] = Control()
    catch_up: Annotated[CatchUp, Field(description="Catch-Up Archiver.")] = CatchUp()
    retention: Annotated[Retention, Field(description="How long caches keep.")] = Retention()
    simulator: Annotated[Simulator | None, Field(description="Simulated sky; null at a real one.")] = None
    web: Annotated[Web, Field(description="Pages and APIs.")] = Web()
    access: Annotated[Access, Field(description="Queries, images and their limits.")] = Access()
    roles: Annotated[list[str] | None, Field(description="Services to run on this machine; null = all.")] = (
        None
    )
    profile: Annotated[
        Literal["one-machine", "summit", "base", "archive"], Field(description="Roles here.")
    ] = "one-machine"

    @model_validator(mode="after")
    def _buffers_have_one_or_two_folders(self) -> SiteConfig:
        for name, place in self.places.items():
            if len(set(place.buffers)) != len(place.buffers) or len(place.buffers) > 2:
                raise ValueError(f"places.{name}.buffer: expected one folder or two different ones")
        return self

    @model_validator(mode="after")
    def _links_join_places(self) -> SiteConfig:
        for link in self.links:
            for end in (link.source, link.target):
                if end not in self.places:
                    raise ValueError(f"link {link.source} → {link.target}: no place is called {end!r}")
        return self


class Site:
    """A site's folder and its configuration."""

    def __init__(self, root: Path, config: SiteConfig) -> None:
        self.root = root.resolve()
        self.config = config

    @classmethod
    def load(cls, root: Path) -> Site:
        """Read ``root/site.yaml``.

        Raises
        ------
        NotFoundError
            There is no site in the folder.
        ConfigurationError
            The file is wrong; the message names file, key, value and expectation.
        """
        path = root / SITE_FILE
        if not path.is_file():
            raise NotFoundError(f"{root}: no site here (no {SITE_FILE}); make one with: cumbre init {root}")
        return cls(root, parse_site(path.read_text(), str(path)))

    def path(self, relative: str) -> Path:
        """Absolute path of something in the site's folder."""
        return self.root / relative

    @property
    def clock_path(self) -> Path:
        """The shared clock of the site's processes."""
        return self.root / CLOCK_FILE


def parse_site(text: str, where: str) -> SiteConfig:
    """Validate a site file's text.

    Raises
    ------
    ConfigurationError
        Names file, line or key, value, and what was expected.
    """
    return parse_yaml(text, where, SiteConfig)


def parse_yaml[M: BaseModel](text: str, where: str, model: type[M]) -> M:
    """Validate YAML text against a model.

    Parameters
    ----------
    where
        Path for messages.

    Raises
    ------
    ConfigurationError
        Names file, line or key, value, and what was expected.
    """
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{where}: expected a mapping of keys, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain_validation(where, error) from error
