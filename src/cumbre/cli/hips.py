"""``cumbre hips``: images of the sky as tiles for viewers."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import NotFoundError


@click.group()
def hips() -> None:
    """Make and list HiPS: the sky as tiles that Aladin and others pan and zoom.

    \b
    Examples:
      cumbre hips make --band r --site ./site
      cumbre hips list --site ./site
    """


@hips.command()
@site_option
@click.option("--band", required=True, help="Band of the images.")
@click.option("--product", default="template", show_default=True, help="Which images: template, calibrated.")
@click.option("--name", help="Of the HiPS; by default camera, product and band.")
@click.option("--order", type=int, help="Of the deepest tiles; by default as fine as the images.")
def make(folder: Path, band: str, product: str, name: str | None, order: int | None) -> None:
    """Make tiles of all released images of a band; what is there and fits is kept, so it goes on after a stop."""
    import time

    from cumbre.access.identity import Principal
    from cumbre.access.images.catalogue import ImageCatalogue
    from cumbre.access.images.hips import FOLDER, HipsMaker, Survey
    from cumbre.site.roles import site_database

    site = Site.load(folder)
    config = site.config
    catalogue = ImageCatalogue(
        site_database(site), config.instruments, embargo_s=config.retention.embargo_hours * 3600,
        proprietary_s=config.access.proprietary_hours * 3600,
    )  # fmt: skip
    images = catalogue.of_product(product, band, Principal())
    if not images:
        raise NotFoundError(
            f"no {product} images in band {band} are released; see: cumbre query ivoa.obscore"
        )
    name = name or f"{images[0].instrument}_{product}_{band}"
    survey = Survey(
        name, f"{config.observatory.name} {product} images, {band}", config.observatory.name, config.access.authority,
        tuple(images), order,
    )  # fmt: skip
    maker = HipsMaker(site.path(FOLDER) / name, survey)
    with click.progressbar(length=1, label=f"order {maker.order}") as bar:

        def tell(done: int, of: int) -> None:
            bar.length = of
            bar.update(done - bar.pos)

        tiles = maker.make(tell, now_utc_s=time.time())
    click.echo(f"● {name}: {tiles} tiles of order {maker.order}, {maker.made} made, {maker.kept} kept")


@hips.command(name="list")
@site_option
def list_hips(folder: Path) -> None:
    """List what there is."""
    from cumbre.access.images.hips import FOLDER

    for path in sorted(Site.load(folder).path(FOLDER).glob("*/properties")):
        lines = dict(line.split("=", 1) for line in path.read_text().splitlines())
        about = {key.strip(): value.strip() for key, value in lines.items()}
        click.echo(f"{path.parent.name:<28} order {about['hips_order']}, made {about['hips_release_date']}")
