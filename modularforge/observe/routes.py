"""`modularforge route`: which experts a text goes to, and why, in words and a table."""

from __future__ import annotations

from operator import attrgetter

from checkpoints.screen import say
from modularforge.evaluation.generation import load_for_generation
from modularforge.evaluation.routes import Routes, routes_of, slot_names
from modularforge.model.moe import moe_layers
from modularforge.observe.table import Column, Table, decimals, percent
from modularforge.stored_models import stored_model


def show_routes(url: str, prompt: str) -> None:
    """Print where a prompt goes in the model at a URL; raises DataError where it has nothing to choose from."""
    loaded, stored = load_for_generation(url), stored_model(url)
    layers = moe_layers(loaded.model)
    found = routes_of(loaded, slot_names(stored, len(layers[0].experts) if layers else 0), prompt)
    routes_table(found).show(marked=0)
    for line in reasons(found):
        say(line)


def routes_table(routes: Routes) -> Table:
    """A row for each expert, the one with most weight first."""
    columns = [
        Column("expert", attrgetter("name"), is_text=True),
        Column("visits", attrgetter("visits"), percent),
        Column("weight", attrgetter("weight"), percent),
        Column("probability at the end", attrgetter("probability"), decimals(3)),
        Column("evidence, nats", attrgetter("evidence"), decimals(1)),
    ]
    title = f"{routes.tokens} tokens; each visits {routes.visited} of {len(routes.slots)} experts"
    return Table(columns, routes.ranked, title)


def reasons(routes: Routes) -> list[str]:
    """Why: in one sentence each."""
    if all(slot.probability is None for slot in routes.slots):
        return ["Each layer routes by rows that read its own inputs; what single tokens say is not known."]
    best = max(routes.slots, key=lambda slot: slot.probability or 0.0)
    if not routes.telling:
        return [f"No token speaks for one more than for all others; {best.name} is what comes first then."]
    named = ", ".join(f"{token!r} {nats:+.1f}" for token, nats in routes.telling)
    return [f"It suits {best.name} best. What speaks most for it against the next, in nats: {named}."]
