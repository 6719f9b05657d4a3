"""Going on with a run on another number of devices: allowed where each optimizer step has the same images."""

import logging
from collections.abc import Sequence
from typing import cast

from hodec.errors import ConfigError, Use
from hodec.io.atomic import JsonObject

log = logging.getLogger(__name__)

# Settings whose product is the images of one optimizer step, before accumulation.
FACTORS = ("trainer.devices", "trainer.num_nodes", "data.batch_size")


def goes_on(keys: Sequence[str], before: JsonObject, now: JsonObject) -> bool:
    """Whether a run with settings that differ in ``keys`` goes on: on other devices, with the same images a step.

    Raises:
        ConfigError: on other devices, and with other images.
    """
    if not keys or not set(keys) <= set(FACTORS) or list(keys) == ["data.batch_size"]:
        return False
    if not all("batch_size" in cast(JsonObject, settings["data"]) for settings in (before, now)):
        return False  # a data module has batches of its own
    old, new = ([_value(settings, key) for key in FACTORS] for settings in (before, now))
    images, processes = old[0] * old[1] * old[2], new[0] * new[1]
    if images == processes * new[2]:
        log.info(
            "the run goes on in %d processes with batches of %d, where it had %d with %d: each step has the same %d "
            "images, and sums round otherwise; BatchNorm takes the statistics of each process's part",
            processes, new[2], old[0] * old[1], old[2], images,
        )  # fmt: skip
        return True
    fits = {"fits": Use("data.batch_size", images // processes)} if images % processes == 0 else {}
    way = "give {fits}" if fits else f"give a number of devices that divides {images}"
    raise ConfigError(
        f"{{devices}}: with {{batch}} a step has {processes * new[2]} images in {processes} processes, and the run in "
        f"this folder has {images}: {way}, or begin in another folder",
        devices=Use("trainer.devices", new[0]),
        batch=Use("data.batch_size", new[2]),
        **fits,
    )


def _value(settings: JsonObject, key: str) -> int:
    group, _, name = key.partition(".")
    return int(settings[group][name])
