"""`modularforge experts`: see and change which experts an assembled model has."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from checkpoints.screen import say
from modularforge.log import configure_logging

app = typer.Typer(
    help="See and change which experts an assembled model has; only what changes is written.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The assembled model: a folder or URL.")]
Member = Annotated[str, typer.Argument(help="Which expert: its number or its place, as `experts list` shows them.")]
Expert = Annotated[
    str, typer.Argument(help="A trained expert of the same backbone, or PEFT's folder of an adapter: a folder or URL.")
]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="Files of text of the domain of PEFT's adapter. Repeatable.")
]
Output = Annotated[str | None, typer.Option("--output", help="Where the new model goes; else in the old one's place.")]


@app.command("list")
def list_members(model: Model, as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """The experts of a model: slot, index, domains, where each lies."""
    from checkpoints import open_artifact
    from modularforge import edit_experts
    from modularforge.facts import fact

    artifact = open_artifact(model)
    found = edit_experts.members_of(artifact)
    if as_json:
        say(json.dumps([vars(member) for member in found], indent=1))
        return
    public = ", the public FFN in slot 0" if fact(artifact, "public_expert") else ""
    router, active = fact(artifact, "router"), fact(artifact, "experts_per_token")
    say(f"{model}: {len(found)} experts{public}; router {router}, top {active}")
    for member in found:
        said = f" ({', '.join(member.domains)})" if member.domains else ""
        say(f"slot {member.slot}: expert {member.index}{said}  {member.url}")


@app.command()
def remove(model: Model, member: Member, output: Output = None) -> None:
    """Take an expert out of a model; the result is the model that would have been assembled without it."""
    from modularforge import edit_experts

    configure_logging()
    edit_experts.remove(model, member, output)


@app.command()
def add(model: Model, expert: Expert, output: Output = None, text: Texts = None) -> None:
    """Put one more expert into a model."""
    from modularforge import edit_experts

    configure_logging()
    edit_experts.add(model, expert, output, text or ())


@app.command()
def replace(model: Model, member: Member, expert: Expert, output: Output = None, text: Texts = None) -> None:
    """Put another expert in the place of one."""
    from modularforge import edit_experts

    configure_logging()
    edit_experts.replace(model, member, expert, output, text or ())
