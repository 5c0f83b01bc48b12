"""`flexpert models`: what is served of which models."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from flexpert.cli.options import Json

MODELS_EXAMPLES = ("flexpert models", "flexpert models qwen", "flexpert models --json")


def models(
    family: Annotated[
        str, typer.Argument(help="Only those whose name has this in it.", metavar="[FAMILY]")
    ] = "",
    json_: Json = False,
) -> None:
    """Tell which families and formats of models are served, and why others are not."""
    from flexpert.models import catalogue

    rows = [one for one in catalogue.FAMILIES.values() if family in one.name]
    if json_:
        told = {
            "transformers": catalogue.TRANSFORMERS,
            "formats": [asdict(one) for one in catalogue.FORMATS],
            "families": [asdict(one) for one in rows],
        }
        print(json.dumps(told, indent=2))
        return
    from flexpert.display.model_tables import show_models

    show_models(rows, catalogue.FORMATS, catalogue.TRANSFORMERS)
